"""What is on disk: headers, pairing, layouts and files. No tensor arithmetic, nothing of torch.distributed."""

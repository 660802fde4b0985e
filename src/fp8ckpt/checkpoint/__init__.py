"""PyTorch: readers and writers for torch.distributed.checkpoint, and loading and saving of whole models."""

"""What serving engines need beyond sound tensors; the only room that knows engines."""

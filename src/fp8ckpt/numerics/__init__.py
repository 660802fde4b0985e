"""What the numbers are: no I/O, no tensor names, nothing of torch."""

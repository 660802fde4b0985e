"""Numbers: codes, scales and blocks. No I/O, no tensor names, nothing of torch."""

"""One folder per model family: names and shapes only."""

"""One folder a model family: names and shapes only."""

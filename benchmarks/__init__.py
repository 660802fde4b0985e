"""Benchmarks against peers, in the same run on the same bytes; each asserts equality before it reports a time."""

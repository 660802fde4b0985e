"""``python -m benchmarks [NAME ...]``: run them all, or those named. They need about 25 GB of disk and half an hour."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = (
    "floor",
    "kernel",
    "four_bits",
    "first",
    "opening",
    "convert",
    "timeline",
    "verify",
    "quantize",
    "merge",
    "loading",
    "moe",
    "saving",
    "planning",
    "scaling",
    "families",
    "stores",
)

for name in sys.argv[1:] or NAMES:
    import_module(f"benchmarks.{name}").main()

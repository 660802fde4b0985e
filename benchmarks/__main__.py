"""``python -m benchmarks [NAME ...]``: run them all, or those named. They need about 15 GB of disk and ten minutes."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = (
    "floor",
    "kernel",
    "four_bits",
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
    "families",
    "stores",
)

for name in sys.argv[1:] or NAMES:
    import_module(f"benchmarks.{name}").main()

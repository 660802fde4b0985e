"""Pausing Python's garbage collector while many long-lived objects are made that are in no reference cycle.

For a large model these are a few hundred thousand small tuples; for the first compiled loop, the thousands of types
that numba makes, among all of torch's objects. The collector would take a third of the time, or more.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the collector in a with block, or as a decorator in a function."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

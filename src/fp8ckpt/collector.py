"""Python's search for circles of objects, put off while many objects are made that stay and are in none.

Of a large model these are a few hundred thousand small tuples, and of the first compiled loop the thousands of types
that numba makes, among all of torch's objects. Searching takes a third of the time, or more.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Also a decorator."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

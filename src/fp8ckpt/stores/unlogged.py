"""Keep what clients log of our requests below the level of a warning (signatures, tokens, signed URLs) out of the logs.
What the same clients log of other users' requests is not affected.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

THREADS = "fp8ckpt-store"  # prefix of the names of threads that only make our requests
_NAMES = (
    "urllib3.connection", "urllib3.connectionpool", "urllib3.poolmanager", "urllib3.util.retry",
    *(name + two + part for two in ("", "2") for name, part in (
        ("httpx", ""), ("httpcore", ".connection"), ("httpcore", ".http11"), ("httpcore", ".http2"),
        ("httpcore", ".proxy"), ("httpcore", ".socks"))),
)  # fmt: skip
_here = threading.local()


@contextmanager
def unlogged() -> Iterator[None]:
    """Inside the context, this thread's requests to a store are not logged."""
    before = getattr(_here, "ours", False)
    _here.ours = True
    try:
        yield
    finally:
        _here.ours = before


class _OfOthers(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        ours = getattr(_here, "ours", False) or (record.threadName or "").startswith(THREADS)
        return record.levelno >= logging.WARNING or not ours


_OF_OTHERS = _OfOthers()


def heed(names: Iterable[str]) -> None:
    """Add the filter to these loggers."""
    for name in names:
        logging.getLogger(name).addFilter(_OF_OTHERS)


heed(_NAMES)

"""Threads that take work from one iterator: how jobs read, convert, compare and write in parallel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def share(items: Iterable[T], workers: Sequence[Callable[[T], object]]) -> None:
    """Process all ``items``, with a thread for each of ``workers``; a thread that is done with an item takes the next.

    One thread at a time advances ``items``. The first error, or Ctrl-C in the calling thread, stops every worker after
    its current item, and is raised.
    """
    left = iter(items)
    lock = threading.Lock()
    stop = threading.Event()

    def take_turns(work: Callable[[T], object]) -> None:
        try:
            while not stop.is_set():
                with lock:
                    try:
                        item = next(left)
                    except StopIteration:
                        return
                work(item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(len(workers), "fp8ckpt") as pool:
        futures = []
        with suppress(RuntimeError):  # if the system gives no more threads, the existing ones do all the work
            for work in workers:
                futures.append(pool.submit(take_turns, work))
        if not futures:
            take_turns(workers[0])
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()

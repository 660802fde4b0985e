"""Threads that take turns at one iterator."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fp8ckpt.workers import share


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_item_is_done_once(workers: int) -> None:
    """All items, each by one worker, and the iterator is never entered by two threads at once."""
    inside = threading.Semaphore(1)

    def items() -> Iterator[int]:
        for i in range(500):
            assert inside.acquire(blocking=False)
            inside.release()
            yield i

    done: list[int] = []
    share(items(), [done.append] * workers)
    assert sorted(done) == list(range(500))


def test_the_first_error_ends_all() -> None:
    """An error of a worker is raised, and the items after it are left."""
    done: list[int] = []

    def work(item: int) -> None:
        if item == 10:
            raise ValueError("the tenth")
        done.append(item)

    with pytest.raises(ValueError, match="the tenth"):
        share(range(1_000_000), [work, work])
    assert len(done) < 1_000_000 - 1


def test_an_error_of_the_iterator_is_raised() -> None:
    """What the iterator raises is not mistaken for its end."""

    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    done: list[int] = []
    with pytest.raises(OSError, match="no more"):
        share(items(), [done.append, done.append])
    assert done == [1]

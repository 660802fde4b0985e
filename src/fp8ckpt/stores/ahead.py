"""Fetch what a job announces to read, before it asks for it.

A job announces its reads in order (`fp8ckpt.stores.store.Store.ahead`). Of the next 48 MiB, ranges that lie close
together are joined into requests of at most 16 MiB. The gap between two may be at most a sixteenth of what comes before
it (a scale between two weights), so that a rank fetches little that another one needs: if ranks share out rows, each
byte is fetched once. Strips of one read are joined by the rule of `fp8ckpt.stores.remote`.

At most `AHEAD` bytes are held, in flight or waiting to be taken. A request is released when all of it was taken, or
when nearly all was and the room is needed; small remainders (scales) are kept. Its memory is reused for a later request
of about its size: fresh memory takes as long as fetching the bytes from a near server. A thread that gets ahead of all
that is held fetches for itself, and those bytes are not fetched again: no thread waits for another.
"""

from __future__ import annotations

import mmap
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fp8ckpt.stores.store import ByteRange, Bytes

if TYPE_CHECKING:
    from fp8ckpt.stores.remote import RemoteStore

AHEAD = 144 << 20  # bytes; together with the rest of a conversion, less than 256 MiB
REQUEST = 16 << 20  # bytes; the longest request
GAP = 128 << 10  # bytes; a longer gap within one read begins another request
_BETWEEN_READS = 16  # a gap between two reads may be this fraction, 1/16, of what comes before it
_NEAR = 64  # bytes of a gap that is always read over: between scales of one value lie other scales, and norms
_BATCH = 3 * REQUEST  # bytes that are planned together
_MOST_RANGES = 1 << 14
_SMALL = 64 << 10  # bytes; releasing less is not worth another request for a scale
_SLACK = 8  # reused memory may be longer than needed by 1/8
_REST = 16  # a request is released early once less than 1/16 of it is left, such as a scale that nobody takes


class Request(NamedTuple):
    """One range of an object, and the buffers for parts of it; ``parts`` are in order and do not overlap."""

    file: str
    start: int
    stop: int
    parts: Sequence[tuple[int, Bytes]]  # (first byte in the object, buffer)


class Wanted(NamedTuple):
    """A part of an object that one of the reads asks for."""

    file: str
    start: int
    stop: int
    read: int


def joined(wanted: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """Yield the requests for what is wanted, in order, by the rules above. A range that fills a request is cut."""
    group: list[Wanted] = []
    held = 0
    for file, start, stop, read in wanted:
        while start < stop:
            if group:
                last, gap = group[-1], start - group[-1].stop
                most = GAP if last.read == read else max(_NEAR, min(GAP, held // _BETWEEN_READS))
                if file != last.file or not 0 <= gap <= most or start >= group[0].start + REQUEST:
                    yield group
                    group, held = [], 0
            end = min(stop, (group[0].start if group else start) + REQUEST)
            group.append(Wanted(file, start, end, read))
            held += end - start
            start = end
    if group:
        yield group


@dataclass(eq=False)
class _Fetched:
    """A request that was begun: its bytes, ``left`` of which nobody has taken yet. Its ``memory`` may be reused once it
    was ``given`` back and no thread is ``reading`` it. ``parts`` are in order.
    """

    file: str
    size: int
    left: int
    memory: Bytes
    parts: list[_Part] = field(default_factory=list)
    future: Future[None] = field(default_factory=Future)
    reading: int = 0
    given: bool = False


@dataclass(eq=False)
class _Part:
    """Bytes of an object that are held, or will be; ``left`` of them have not been taken."""

    start: int
    stop: int
    buffer: Bytes
    fetched: _Fetched
    left: int


class _Found(NamedTuple):
    """Bytes that a read asks for and that are ``held``."""

    part: _Part
    fetched: _Fetched
    held: Bytes
    out: Bytes


class Window:
    """What is held of the announced ``reads``, inside the context."""

    def __init__(self, store: RemoteStore, windows: list[Window], reads: Iterable[Sequence[ByteRange]]) -> None:
        self._store = store
        self._windows = windows
        self._lock = threading.Lock()
        self._groups = self._planned(iter(reads))
        self._next: list[Wanted] | None = None
        self._held = 0
        self._spare: list[Bytes] = []
        self._fetched: list[_Fetched] = []
        self._parts: dict[str, list[_Part]] = {}
        self._passed: dict[str, list[tuple[int, int]]] = {}

    def __enter__(self) -> None:
        self._windows.append(self)
        self._fill()

    def __exit__(self, *_: object) -> None:
        self._windows.remove(self)
        with self._lock:
            self._groups = iter(())
            fetched = self._fetched
            self._parts.clear()
            self._spare.clear()
        for one in fetched:
            one.future.cancel()

    def take(self, reads: Iterable[tuple[ByteRange, Bytes]]) -> list[tuple[ByteRange, Bytes]]:
        """Fill what is held of the buffers; return the rest."""
        rest: list[tuple[ByteRange, Bytes]] = []
        found: list[_Found] = []
        with self._lock:
            for wanted, out in reads:
                self._look_up(wanted, out, found, rest)
        for fetched in {id(one.fetched): one.fetched for one in found}.values():
            fetched.future.result()
        for one in found:
            one.out[:] = one.held
        with self._lock:
            for one in found:
                one.fetched.reading -= 1
                self._taken(one.part, one.out.nbytes)
                self._spare_of(one.fetched)
        if found:
            self._fill()
        return rest

    def _look_up(self, wanted: ByteRange, out: Bytes, found: list[_Found], rest: list[tuple[ByteRange, Bytes]]) -> None:
        file, at, stop = wanted
        parts = self._parts.get(file, [])
        i = max(0, bisect_right(parts, at, key=_start) - 1)
        while at < stop:
            while i < len(parts) and parts[i].stop <= at:
                i += 1
            part = parts[i] if i < len(parts) else None
            if part is not None and part.start <= at:
                end = min(stop, part.stop)
                held = part.buffer[at - part.start : end - part.start]
                part.fetched.reading += 1
                found.append(_Found(part, part.fetched, held, out[at - wanted.start : end - wanted.start]))
            else:
                end = stop if part is None else min(stop, part.start)
                rest.append((ByteRange(file, at, end), out[at - wanted.start : end - wanted.start]))
                insort(self._passed.setdefault(file, []), (at, end))
            at = end

    def _taken(self, part: _Part, count: int) -> None:
        count = min(count, part.left)  # two threads may have read the same scale
        part.left -= count
        part.fetched.left -= count
        if count and not part.fetched.left:
            self._give_back(part.fetched)

    def _give_back(self, fetched: _Fetched) -> None:
        self._fetched.remove(fetched)
        self._held -= sum(part.buffer.nbytes for part in fetched.parts)
        parts = self._parts[fetched.file]
        if fetched.parts:
            low = bisect_left(parts, fetched.parts[0].start, key=_start)
            high = bisect_right(parts, fetched.parts[-1].start, key=_start)
            parts[low:high] = [part for part in parts[low:high] if part.fetched is not fetched]
        fetched.parts.clear()  # or a reference cycle would delay freeing the memory
        fetched.given = True
        self._spare_of(fetched)

    def _spare_of(self, fetched: _Fetched) -> None:
        """Make the memory of a request available for another one, once nobody reads it."""
        if fetched.given and not fetched.reading and fetched.memory.size:
            self._spare.append(fetched.memory)
            fetched.memory = fetched.memory[:0]

    def _memory(self, size: int) -> Bytes:
        fits = [i for i, spare in enumerate(self._spare) if size <= spare.size <= size + size // _SLACK]
        if fits:
            return self._spare.pop(fits[0])
        while self._spare and self._held + sum(spare.size for spare in self._spare) + size > AHEAD:
            self._spare.pop(0)
        if size <= _SMALL:
            return np.empty(size, np.uint8)
        # Freed at once and completely: malloc would keep some of it.
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)

    def _make_room(self) -> None:
        """Release requests that were nearly all taken. Small parts of them that are left, such as scales, are kept."""
        for fetched in [one for one in self._fetched if one.size > _SMALL and one.left * _REST < one.size]:
            for part in fetched.parts if fetched.future.done() else ():
                if part.left and part.buffer.nbytes <= _SMALL:
                    part.buffer = part.buffer.copy()
                    part.fetched = _Fetched(fetched.file, part.left, part.left, part.buffer, [part], fetched.future)
                    self._fetched.append(part.fetched)
            fetched.parts = [part for part in fetched.parts if part.fetched is fetched]
            self._give_back(fetched)

    def _fill(self) -> None:
        """Begin as many requests as there is room for."""
        with self._lock:
            while True:
                group = self._next or next(self._groups, None)
                if group is not None:
                    group = [part for wanted in group for part in self._not_passed(wanted)]
                    if not group:
                        self._next = None
                        continue
                size = sum(part.stop - part.start for part in group or ())
                if group is not None and self._held + size > AHEAD:
                    self._make_room()
                if group is None or (self._held and self._held + size > AHEAD):
                    self._next = group
                    return
                self._next = None
                self._begin(group, size)

    def _begin(self, group: list[Wanted], size: int) -> None:
        file, start, stop = group[0].file, group[0].start, group[-1].stop
        fetched = _Fetched(file, size, size, self._memory(size))
        done = 0
        for _, low, high, _ in group:
            piece = fetched.memory[done : done + high - low]
            fetched.parts.append(_Part(low, high, piece, fetched, piece.size))
            done += piece.size
        held = self._parts.setdefault(file, [])
        at = bisect_right(held, start, key=_start)
        if at == len(held) or held[at].start >= stop:
            held[at:at] = fetched.parts
        else:  # between the parts of others
            for part in fetched.parts:
                insort(held, part, key=_start)
        self._fetched.append(fetched)
        self._held += size
        request = Request(file, start, stop, [(part.start, part.buffer) for part in fetched.parts])
        fetched.future = self._store.submit(self._store.fetch, request)

    def _planned(self, reads: Iterator[Sequence[ByteRange]]) -> Iterator[list[Wanted]]:
        """Yield the requests of all reads. Reads are planned in batches, each in the order of the files; the last
        request of a batch waits for the next batch, which may extend it.
        """
        batch: list[Wanted] = []
        size = 0
        for i, read in enumerate(reads):
            for wanted in read:
                batch.append(Wanted(*wanted, i))
                size += wanted.stop - wanted.start
            if size >= _BATCH or len(batch) > _MOST_RANGES:
                *groups, batch = joined(_apart(sorted(batch)))
                yield from groups
                size = batch[-1].stop - batch[0].start
        yield from joined(_apart(sorted(batch)))

    def _not_passed(self, wanted: Wanted) -> Iterator[Wanted]:
        """Yield the parts of a range that nobody has asked for yet."""
        at, read = wanted.start, wanted.read
        passed = self._passed.get(wanted.file, [])
        for start, stop in passed[max(0, bisect_right(passed, at, key=min) - 1) :]:
            if start >= wanted.stop:
                break
            if stop > at:
                if start > at:
                    yield Wanted(wanted.file, at, start, read)
                at = stop
        if at < wanted.stop:
            yield Wanted(wanted.file, at, wanted.stop, read)


def _start(part: _Part) -> int:
    return part.start


def _apart(wanted: Iterable[Wanted]) -> Iterator[Wanted]:
    """Yield the ranges without overlaps: two reads may ask for the same bytes."""
    end: tuple[str, int] = ("", 0)
    for file, start, stop, read in wanted:
        start = max(start, end[1]) if file == end[0] else start
        if start < stop:
            yield Wanted(file, start, stop, read)
            end = file, stop

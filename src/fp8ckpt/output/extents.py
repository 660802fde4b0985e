"""How an output file is cut: into chunks, which a worker fills and writes at once, and extents, which are shared among
processes, flushed to disk, and resumed.

Pure data; every process that makes the same plan cuts it in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fp8ckpt.output.layout import FileLayout

#: Bytes, at most. With what it is made of, a chunk stays in a second-level cache, and a disk takes it in one request.
CHUNK = 4 << 20
#: Bytes: what a run that was cut off has to write again, at most, per worker.
EXTENT = 16 * CHUNK


class Chunk(NamedTuple):
    """Bytes ``[start, stop)`` of an output file; ``first``: which of its tensors is the first that it meets."""

    start: int
    stop: int
    first: int

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk."""
        return self.stop - self.start


class Extent(NamedTuple):
    """Some chunks of an output file; ``beside``: the other files that filling them writes to."""

    layout: FileLayout
    chunks: tuple[Chunk, ...]
    beside: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.nbytes for chunk in self.chunks)


def page_chunks(layout: FileLayout) -> Iterator[Chunk]:
    """All of a file in chunks that begin at pages."""
    first = 0
    for start in range(0, layout.size, CHUNK):
        while first < len(layout.spans) and layout.spans[first].stop <= start:
            first += 1
        yield Chunk(start, min(start + CHUNK, layout.size), first)


def extents_of(layout: FileLayout, chunks: Iterable[Chunk]) -> Iterator[Extent]:
    """The chunks of a file in extents of `EXTENT` bytes: their order means the same to every process that made the same
    plan.
    """
    taken: list[Chunk] = []
    size = 0
    for chunk in chunks:
        taken.append(chunk)
        size += chunk.nbytes
        if size >= EXTENT:
            yield Extent(layout, tuple(taken))
            taken, size = [], 0
    if taken:
        yield Extent(layout, tuple(taken))

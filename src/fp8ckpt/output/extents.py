"""How an output file is cut: into chunks, which a worker fills and writes in one step, and extents, which are shared
among processes, flushed to disk, and resumed.

Pure data; every process with the same plan cuts it in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from fp8ckpt.output.layout import FileLayout
from fp8ckpt.stores.store import ByteRange, Store
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import Tensor, reads_of_run, with_scales

#: Bytes, at most. A chunk and its inputs fit into a second-level cache, and a disk takes it in one request.
CHUNK = 4 << 20
#: Bytes; at most this is written again, per worker, after an interruption.
EXTENT = 16 * CHUNK
#: Bytes of an extent that is held in memory until it is in a store.
PART = 4 * CHUNK
#: The most parts that a store allows a file.
MOST_PARTS = 10_000


class Chunk(NamedTuple):
    """Bytes ``[start, stop)`` of an output file; ``first``: the index of the first tensor in the file that it meets."""

    start: int
    stop: int
    first: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Extent(NamedTuple):
    """Some chunks of an output file; ``beside``: the other files that are written to when it is filled.

    ``number``: its number in the file, from 1 on; bytes ``[start, stop)`` belong to it alone. ``again``: it was written
    before.
    """

    layout: FileLayout
    chunks: tuple[Chunk, ...]
    number: int
    start: int
    stop: int
    beside: tuple[str, ...] = ()
    again: bool = False

    @property
    def whole(self) -> bool:
        """Whether its chunks cover all of its bytes: scales that are made with other extents are in no chunk."""
        return self.nbytes == self.stop - self.start

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)


def page_chunks(layout: FileLayout) -> Iterator[Chunk]:
    """Yield all of a file in chunks that begin at pages."""
    first = 0
    for start in range(0, layout.size, CHUNK):
        while first < len(layout.spans) and layout.spans[first].stop <= start:
            first += 1
        yield Chunk(start, min(start + CHUNK, layout.size), first)


def extents_of(layout: FileLayout, chunks: Iterable[Chunk], most: int) -> Iterator[Extent]:
    """Yield the chunks of a file in extents of ``most`` bytes, or more if the file would have over `MOST_PARTS`. Their
    order is the same in every process with the same plan.
    """
    most = part_of(layout.size, most)
    taken: list[Chunk] = []
    number, start, size = 1, 0, 0
    for chunk in chunks:
        if size >= most:
            yield Extent(layout, tuple(taken), number, start, chunk.start)
            taken, number, start, size = [], number + 1, chunk.start, 0
        taken.append(chunk)
        size += chunk.nbytes
    if taken:
        yield Extent(layout, tuple(taken), number, start, layout.size)


def part_of(size: int, least: int) -> int:
    """Bytes of each part of a file of ``size`` bytes: ``least``, or more if a store would not allow as many parts."""
    return max(least, -(-size // (MOST_PARTS - 1)))


def met(layout: FileLayout, chunk: Chunk) -> Iterator[tuple[TensorSpan, int, int]]:
    """Yield the tensors that a chunk of an output file meets, and the range of the file's bytes that is theirs."""
    for span in islice(layout.spans, chunk.first, None):
        if span.start >= chunk.stop:
            return
        low, high = max(span.start, chunk.start), min(span.stop, chunk.stop)
        if low < high:
            yield span, low, high


def reads_of(tensors: Mapping[str, Tensor], extents: Iterable[Extent], store: Store) -> Iterator[list[ByteRange]]:
    """Yield what filling the extents will read from a store, in order: scales, once a tensor, and values. ``tensors``:
    the source of each tensor of the output, by the output's name.
    """

    def values() -> Iterator[tuple[Sequence[TensorSpan], list[ByteRange]]]:
        last = None
        for extent in extents:
            for span, low, high in (part for chunk in extent.chunks for part in met(extent.layout, chunk)):
                tensor = tensors.get(span.name)
                if tensor is not None and tensor.span.file.store is store:
                    start, stop = ((at - span.start) * tensor.numel // span.nbytes for at in (low, high))
                    yield tensor.scales if tensor is not last else (), list(reads_of_run(tensor, start, stop))
                    last = tensor

    return with_scales(values())

"""How an output file is cut: into chunks, which a worker fills and writes at once, and extents, which are shared among
processes, flushed to disk, and resumed.

Pure data; every process that makes the same plan cuts it in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from fp8ckpt.output.layout import FileLayout
from fp8ckpt.stores.store import ByteRange, Store
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import Tensor, reads_of_run, with_scales

#: Bytes, at most. With what it is made of, a chunk stays in a second-level cache, and a disk takes it in one request.
CHUNK = 4 << 20
#: Bytes: what a run that was cut off has to write again, at most, per worker.
EXTENT = 16 * CHUNK
#: Bytes of an extent that is held in memory until a store has it.
PART = 4 * CHUNK
#: As many parts a file may have in a store.
MOST_PARTS = 10_000


class Chunk(NamedTuple):
    """Bytes ``[start, stop)`` of an output file; ``first``: which of its tensors is the first that it meets."""

    start: int
    stop: int
    first: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Extent(NamedTuple):
    """Some chunks of an output file; ``beside``: the other files that filling them writes to.

    ``number``: which of the file it is, from 1 on; bytes ``[start, stop)`` of it are this one's, and no other's.
    ``again``: it was written before.
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
        """Whether its chunks are all of its bytes: scales that are made beside are in none."""
        return self.nbytes == self.stop - self.start

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)


def page_chunks(layout: FileLayout) -> Iterator[Chunk]:
    """All of a file in chunks that begin at pages."""
    first = 0
    for start in range(0, layout.size, CHUNK):
        while first < len(layout.spans) and layout.spans[first].stop <= start:
            first += 1
        yield Chunk(start, min(start + CHUNK, layout.size), first)


def extents_of(layout: FileLayout, chunks: Iterable[Chunk], most: int) -> Iterator[Extent]:
    """The chunks of a file in extents of ``most`` bytes, in a longer file of as many as `MOST_PARTS` need: their order
    means the same to every process that made the same plan.
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
    """Bytes of the parts of a file of ``size``: at least so many, and no more parts than a store takes."""
    return max(least, -(-size // (MOST_PARTS - 1)))


def met(layout: FileLayout, chunk: Chunk) -> Iterator[tuple[TensorSpan, int, int]]:
    """The tensors that a chunk of an output file meets, and which of its bytes, of the file, are theirs."""
    for span in islice(layout.spans, chunk.first, None):
        if span.start >= chunk.stop:
            return
        low, high = max(span.start, chunk.start), min(span.stop, chunk.stop)
        if low < high:
            yield span, low, high


def reads_of(tensors: Mapping[str, Tensor], extents: Iterable[Extent], store: Store) -> Iterator[list[ByteRange]]:
    """What filling the extents will read of a store, in order: scales, once a tensor, and values. ``tensors``: of which
    each tensor of the output is made, by its name.
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

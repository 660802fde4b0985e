"""Fill planned files in parallel, in pieces at known offsets.

A *chunk* is a piece of a few MiB of an output file: a worker thread has it filled into its own reused buffer and writes
it at its offset. An *extent* is a number of chunks of one file: the unit of sharing among processes, of flushing to
disk, and of resuming. What fills a chunk is the job's own business (`Filler`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

from fp8ckpt.output.files import ALIGNMENT, OutputFile, aligned_buffer
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.stores.local import Bytes
from fp8ckpt.workers import share

CHUNK = (
    4 << 20
)  # bytes, at most; with what it is made of it stays in a second-level cache, and a disk takes it in one request
EXTENT = 16 * CHUNK  # bytes; what a run that was cut off has to write again, at most, per worker

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done
Facts = dict[str, Any]  # what is recorded of an extent; JSON


class Filled(NamedTuple):
    """What became of a chunk: facts, and whether there is anything to write."""

    facts: Facts
    write: bool = True


class Filler(Protocol):
    """One worker's means of making output bytes."""

    def fill(self, layout: FileLayout, start: int, stop: int, out: Bytes) -> Filled:
        """Fill ``out`` with the bytes ``[start, stop)`` of an output file."""

    def close(self) -> None:
        """Release what the filler holds."""


class Extent(NamedTuple):
    """Some chunks, ``[start, stop)`` in bytes, of an output file; ``beside``: the other files that filling them writes
    to.
    """

    layout: FileLayout
    chunks: tuple[tuple[int, int], ...]
    beside: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return sum(stop - start for start, stop in self.chunks)


def page_chunks(layout: FileLayout) -> Iterator[tuple[int, int]]:
    """All of a file in chunks that begin at pages."""
    for start in range(0, layout.size, CHUNK):
        yield start, min(start + CHUNK, layout.size)


def extents_of(layout: FileLayout, chunks: Iterable[tuple[int, int]]) -> Iterator[Extent]:
    """The chunks of a file in extents of `EXTENT` bytes: their order means the same to every process that made the same
    plan.
    """
    taken: list[tuple[int, int]] = []
    size = 0
    for chunk in chunks:
        taken.append(chunk)
        size += chunk[1] - chunk[0]
        if size >= EXTENT:
            yield Extent(layout, tuple(taken))
            taken, size = [], 0
    if taken:
        yield Extent(layout, tuple(taken))


@dataclass
class _OpenExtent:
    file: OutputFile
    facts: dict[int, Facts] = field(default_factory=dict)  # by chunk


class ExtentWriter:
    """Writes extents of a partial output, by their numbers, and records each with its facts once it is on disk.

    ``combine`` makes the facts of an extent of those of its chunks, which come in order.
    """

    def __init__(
        self,
        output: PartialOutput,
        writer: int,
        extents: Mapping[int, Extent],
        combine: Callable[[Iterable[Facts]], Facts],
        progress: Progress | None,
    ) -> None:
        self._output = output
        self._writer = writer
        self._extents = extents
        self._combine = combine
        self._progress = progress
        self._total = sum(extent.nbytes for extent in extents.values())
        self._written = 0
        self._open: dict[int, _OpenExtent] = {}
        self._lock = threading.Lock()

    def run(self, fillers: Sequence[Filler]) -> None:
        """Write them all, with a worker thread a filler; the first error stops every worker, and is raised."""
        try:
            share(
                self._chunks(), [partial(self._write, filler, aligned_buffer(CHUNK + ALIGNMENT)) for filler in fillers]
            )
        finally:
            for filler in fillers:
                filler.close()
            for extent in self._open.values():
                extent.file.close()

    def _chunks(self) -> Iterator[tuple[int, int]]:
        for i, extent in self._extents.items():
            self._open[i] = _OpenExtent(OutputFile(self._output.directory / extent.layout.name))
            for k in range(len(extent.chunks)):
                yield i, k

    def _write(self, filler: Filler, buffer: Bytes, chunk: tuple[int, int]) -> None:
        i, k = chunk
        extent, opened = self._extents[i], self._open[i]
        start, stop = extent.chunks[k]
        out = buffer[start % ALIGNMENT :][: stop - start]  # as it lies on disk, so that it can be written directly
        filled = filler.fill(extent.layout, start, stop, out)
        if filled.write:
            opened.file.write(out, start)
        with self._lock:
            opened.facts[k] = filled.facts
            last = len(opened.facts) == len(extent.chunks)
            self._written += stop - start
            if self._progress is not None:
                self._progress(self._written, self._total, f"writing {extent.layout.name}")
        if last:
            self._finish(i, extent, opened)

    def _finish(self, i: int, extent: Extent, opened: _OpenExtent) -> None:
        opened.file.flush()
        for name in extent.beside:
            flush(self._output, name)
        self._output.record(self._writer, i, self._combine(opened.facts[k] for k in sorted(opened.facts)))
        self._open.pop(i).file.close()


def flush(output: PartialOutput, name: str) -> None:
    """Return when all that was written to a file of the output is on disk."""
    file = OutputFile(output.directory / name)
    try:
        file.flush()
    finally:
        file.close()

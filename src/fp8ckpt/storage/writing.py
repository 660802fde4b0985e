"""Fill planned files in parallel, in pieces at known offsets, each byte once.

A *chunk* is a page-aligned piece of a few MiB of an output file: a worker thread has it filled into its own reused buffer
and writes it at its offset. An *extent* is a run of chunks: the unit of sharing among processes, of flushing to disk, and
of resuming. What fills a chunk is the job's own business (`Filler`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from fp8ckpt.storage.files import Bytes, OutputFile, aligned_buffer
from fp8ckpt.storage.layout import FileLayout
from fp8ckpt.storage.partial import PartialOutput
from fp8ckpt.storage.workers import share

CHUNK = 4 << 20  # bytes; with what it is made of it stays in a second-level cache, and a disk takes it in one request
EXTENT = 16 * CHUNK  # bytes; what a run that was cut off has to write again, at most, per worker

Progress = Callable[[int, int], None]


class Filler(Protocol):
    """One worker's means of making output bytes."""

    def fill(self, layout: FileLayout, start: int, stop: int, out: Bytes) -> dict[str, int]:
        """Fill ``out`` with the bytes ``[start, stop)`` of an output file; returns counts to be recorded, by tensor."""

    def close(self) -> None:
        """Release what the filler holds."""


class Extent(NamedTuple):
    """A piece of an output file, in bytes."""

    layout: FileLayout
    start: int
    stop: int


def extents_of(layouts: Sequence[FileLayout]) -> list[Extent]:
    """The extents of an output: their numbers mean the same to every process that made the same plan."""
    return [Extent(layout, start, min(start + EXTENT, layout.size)) for layout in layouts for start in range(0, layout.size, EXTENT)]


@dataclass
class _OpenExtent:
    file: OutputFile
    chunks_left: int
    counts: Counter[str] = field(default_factory=Counter)


class ExtentWriter:
    """Writes the extents ``mine`` of a partial output, and records each with its counts once it is on disk."""

    def __init__(
        self, output: PartialOutput, writer: int, extents: Sequence[Extent], mine: Sequence[int], progress: Progress | None
    ) -> None:
        self._output = output
        self._writer = writer
        self._extents = extents
        self._progress = progress
        self._total = sum(extents[i].stop - extents[i].start for i in mine)
        self._written = 0
        self._mine = mine
        self._open: dict[int, _OpenExtent] = {}
        self._lock = threading.Lock()

    def run(self, fillers: Sequence[Filler]) -> None:
        """Write them all, with a worker thread a filler; the first error stops every worker, and is raised."""
        try:
            share(self._chunks(), [partial(self._write, filler, aligned_buffer(CHUNK)) for filler in fillers])
        finally:
            for filler in fillers:
                filler.close()
            for extent in self._open.values():
                extent.file.close()

    def _chunks(self) -> Iterator[tuple[int, int, int]]:
        for i in self._mine:
            layout, start, stop = self._extents[i]
            self._open[i] = _OpenExtent(OutputFile(self._output.directory / layout.name), -(-(stop - start) // CHUNK))
            for first in range(start, stop, CHUNK):
                yield i, first, min(first + CHUNK, stop)

    def _write(self, filler: Filler, out: Bytes, chunk: tuple[int, int, int]) -> None:
        i, start, stop = chunk
        extent = self._open[i]
        counts = filler.fill(self._extents[i].layout, start, stop, out[: stop - start])
        extent.file.write(out[: stop - start], start)
        self._finish_chunk(i, extent, counts, stop - start)

    def _finish_chunk(self, i: int, extent: _OpenExtent, counts: dict[str, int], size: int) -> None:
        with self._lock:
            extent.counts.update(counts)
            extent.chunks_left -= 1
            last = extent.chunks_left == 0
            self._written += size
            if self._progress is not None:
                self._progress(self._written, self._total)
        if last:
            extent.file.flush()
            self._output.record(self._writer, i, extent.counts)
            self._open.pop(i).file.close()

"""Fill planned files in parallel, in pieces at known offsets.

A worker thread has a chunk (`fp8ckpt.output.extents`) filled into its own reused buffer and writes it at its offset;
once all chunks of an extent are on disk, it is recorded. What fills a chunk is the job's own business (`Filler`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from fp8ckpt.output import extents as cutting
from fp8ckpt.output.extents import Chunk, Extent
from fp8ckpt.output.files import ALIGNMENT, OutputFile, aligned_buffer
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.output.partial import Facts, PartialOutput
from fp8ckpt.output.plan import OutputPlan, refuse_unlike
from fp8ckpt.ranks import Ranks
from fp8ckpt.stores.store import Bytes
from fp8ckpt.workers import share

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done


def begin(plan: OutputPlan, output: PartialOutput, ranks: Ranks) -> dict[int, Facts]:
    """Begin an output together: all ranks plan the same one, and the first makes it. Returns what was done before, as
    the first rank saw it: others may be writing by the time that the last one looks.
    """
    refuse_unlike(ranks.gather(lambda: plan.said(output)))
    return ranks.first(lambda: plan.begin(output))


class Filled(NamedTuple):
    """What became of a chunk: facts, and whether there is anything to write."""

    facts: Facts
    write: bool = True


class Filler(Protocol):
    """One worker's means of making output bytes."""

    def fill(self, layout: FileLayout, chunk: Chunk, out: Bytes) -> Filled:
        """Fill ``out`` with the bytes of a chunk of an output file."""

    def close(self) -> None:
        """Release what the filler holds."""


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
            buffers = [aligned_buffer(cutting.CHUNK + ALIGNMENT) for _ in fillers]
            workers = [partial(self._write, *held) for held in zip(fillers, buffers, strict=True)]
            share(self._chunks(), workers)
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

    def _write(self, filler: Filler, buffer: Bytes, place: tuple[int, int]) -> None:
        i, k = place
        extent, opened = self._extents[i], self._open[i]
        chunk = extent.chunks[k]
        # As it lies on disk, so that it can be written directly.
        out = buffer[chunk.start % ALIGNMENT :][: chunk.nbytes]
        filled = filler.fill(extent.layout, chunk, out)
        if filled.write:
            opened.file.write(out, chunk.start)
        with self._lock:
            opened.facts[k] = filled.facts
            last = len(opened.facts) == len(extent.chunks)
            self._written += chunk.nbytes
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

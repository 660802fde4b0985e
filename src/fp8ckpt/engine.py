"""Fill planned files in parallel, in pieces at known offsets.

A worker thread has a chunk (`fp8ckpt.output.extents`) filled into one of its own reused buffers. It fills the next one
while another thread writes the first at its offset: cores and disk work at once. Once all chunks of an extent are on
disk, the extent is recorded. Its facts may add further extents (``then``), which are filled in turn with the remaining
ones. How a chunk is filled is up to the job (`Filler`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from fp8ckpt.output import extents as cutting
from fp8ckpt.output.extents import Chunk, Extent
from fp8ckpt.output.files import ALIGNMENT, OutputFile, OutputFiles, aligned_buffer
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.places import Place
from fp8ckpt.output.plan import OutputPlan, refuse_unlike
from fp8ckpt.output.state import Facts
from fp8ckpt.ranks import Ranks
from fp8ckpt.stores.store import Bytes
from fp8ckpt.workers import share

_BUFFERS = 2  # for each worker: one is filled while the other is written

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, the current activity


def begin(
    plan: OutputPlan,
    output: PartialOutput,
    ranks: Ranks,
    extents: Mapping[int, Extent],
    stale: Callable[[Mapping[int, Facts]], Collection[int]],
) -> dict[int, Facts]:
    """Begin an output on all ranks: all plan the same one, and the first rank creates it. Return the extents that were
    done before, as the first rank saw them: others may be writing by the time the last rank looks. ``stale`` returns
    those that are no longer valid; they are forgotten before anything is written.
    """
    if ranks.size > 1:
        refuse_unlike(ranks.gather(lambda: plan.said(output)))

    def begun() -> dict[int, Facts]:
        done = plan.begin(output, extents.values())
        if lost := stale(done):
            output.forget(lost)
        return {i: facts for i, facts in done.items() if i not in lost}

    return ranks.first(begun)


class Beside(NamedTuple):
    """Bytes of an output file that are in no chunk."""

    file: str
    start: int
    data: Bytes


class Filled(NamedTuple):
    """A filled chunk: its facts, whether it must be written, and the bytes to write ``beside`` it."""

    facts: Facts
    write: bool = True
    beside: tuple[Beside, ...] = ()


class Filler(Protocol):
    """The interface that makes output bytes, one object a worker."""

    def fill(self, extent: Extent, chunk: Chunk, out: Bytes) -> Filled:
        """Fill ``out`` with the bytes of a chunk of an extent."""


_Chunk = tuple[int, int]  # (index of the extent, index of the chunk in it)


@dataclass
class _OpenExtent:
    place: Place
    facts: dict[int, Facts] = field(default_factory=dict)  # by chunk
    beside: list[Beside] = field(default_factory=list)


class ExtentWriter:
    """A writer of numbered extents of a partial output, which records each with its facts once it is on disk.

    ``combine`` makes the facts of an extent from those of its chunks, in order. ``then`` returns the extents to add
    once these facts are recorded. If the output finishes several extents at once, separate threads do that.
    """

    def __init__(
        self,
        output: PartialOutput,
        writer: int,
        extents: Mapping[int, Extent],
        combine: Callable[[Iterable[Facts]], Facts],
        then: Callable[[int, Facts], Mapping[int, Extent]],
        progress: Progress | None,
        before: int,
    ) -> None:
        self._output = output
        self._writer = writer
        self._extents = dict(extents)
        self._combine = combine
        self._then = then
        self._progress = progress
        self._total = before + sum(extent.nbytes for extent in extents.values())
        self._written = before
        self._open: dict[int, _OpenExtent] = {}
        self._left = deque(extents)
        self._following: deque[int] = deque()
        self._lock = threading.Lock()
        self._finishing: Executor | None = None
        self._unfinished: deque[Future[None]] = deque()

    def run(self, fillers: Sequence[Filler]) -> int:
        """Write all extents, with one worker thread for each filler. The first error stops every worker, and is raised.
        Return the number of bytes written, including ``before``.
        """
        try:
            with ExitStack() as threads:
                if self._output.goal.at_once:
                    self._finishing = ThreadPoolExecutor(self._output.goal.at_once, "fp8ckpt-finishing")
                    threads.callback(self._finishing.shutdown, cancel_futures=True)
                writing = threads.enter_context(ThreadPoolExecutor(len(fillers), "fp8ckpt-writing"))
                workers = [_Worker(self, filler, writing) for filler in fillers]
                while self._left or self._following:  # the last extents may add others once they are written
                    share(self._chunks(), [worker.fill for worker in workers])
                    for worker in workers:
                        worker.wait()
                    self._leave_open(-1)
            return self._written
        finally:
            for extent in self._open.values():
                extent.place.close()

    def _chunks(self) -> Iterator[_Chunk]:
        """Yield chunks of remaining and of added extents in turn: chunks that are only looked at keep the cores busy
        while the disk writes the others.
        """
        taken: tuple[deque[_Chunk], ...] = (deque(), deque())
        while self._left or self._following or any(taken):
            for extents, chunks in zip((self._following, self._left), taken, strict=True):
                if extents and not chunks:
                    self._leave_open(self._output.goal.at_once)
                    i = extents.popleft()
                    self._open[i] = _OpenExtent(self._output.goal.place(self._extents[i]))
                    chunks.extend((i, k) for k in range(len(self._extents[i].chunks)))
                if chunks:
                    yield chunks.popleft()

    def _leave_open(self, most: int) -> None:
        """Wait until at most ``most`` extents are open, or none is being finished. Raise their errors."""
        while self._unfinished and len(self._open) > most:
            self._unfinished.popleft().result()

    def filled(self, filler: Filler, buffer: Bytes, of: _Chunk) -> Callable[[], None] | None:
        """Fill a chunk. Return a function that writes it, to be called before the buffer is used again, or None if
        there is nothing to write.
        """
        i, k = of
        extent = self._extents[i]
        chunk = extent.chunks[k]
        # aligned as on disk, so that it can be written directly
        out = buffer[chunk.start % ALIGNMENT :][: chunk.nbytes]
        filled = filler.fill(extent, chunk, out)
        if filled.write:
            return partial(self._write, of, out, filled)
        self._done(of, filled)
        return None

    def _write(self, of: _Chunk, out: Bytes, filled: Filled) -> None:
        i, k = of
        self._open[i].place.write(out, self._extents[i].chunks[k].start)
        self._done(of, filled)

    def _done(self, of: _Chunk, filled: Filled) -> None:
        i, k = of
        extent, opened = self._extents[i], self._open[i]
        with self._lock:
            opened.facts[k] = filled.facts
            opened.beside += filled.beside
            last = len(opened.facts) == len(extent.chunks)
        if self._finishing is None:
            self._report(extent, extent.chunks[k].nbytes)
            if last:
                self._finish(i, extent, opened)
        elif last:
            self._unfinished.append(self._finishing.submit(self._finish, i, extent, opened))

    def _report(self, extent: Extent, nbytes: int) -> None:
        with self._lock:
            self._written += nbytes
            if self._progress is not None:
                doing = "writing" if self._finishing is None else "sending"
                self._progress(self._written, self._total, f"{doing} {extent.layout.name}")

    def _finish(self, i: int, extent: Extent, opened: _OpenExtent) -> None:
        _write_beside(self._output, opened.beside)
        sent = opened.place.flush()
        for name in extent.beside:
            with closing(OutputFile(self._output.directory / name)) as file:
                file.flush()
        facts = self._combine(opened.facts[k] for k in sorted(opened.facts))
        self._output.record(self._writer, i, facts, sent)
        self._open.pop(i).place.close()
        following = self._then(i, facts)
        with self._lock:
            self._extents |= following
            self._total += sum(other.nbytes for other in following.values())
            self._following += following
        if self._finishing is not None:
            self._report(extent, extent.nbytes)


class _Worker:
    """One filling thread with its buffers. The threads of ``writing`` write them."""

    def __init__(self, writer: ExtentWriter, filler: Filler, writing: Executor) -> None:
        self._writer = writer
        self._filler = filler
        self._writing = writing
        self._buffers = deque(aligned_buffer(cutting.CHUNK + ALIGNMENT) for _ in range(_BUFFERS))
        self._under_way: deque[Future[None]] = deque()

    def fill(self, of: _Chunk) -> None:
        """Fill a chunk, and submit it for writing. Raise the error of an earlier write."""
        if len(self._under_way) == _BUFFERS:
            self._under_way.popleft().result()
        write = self._writer.filled(self._filler, self._buffers[0], of)
        if write is not None:
            self._buffers.rotate()
            self._under_way.append(self._writing.submit(write))

    def wait(self) -> None:
        """Wait until everything is written. Raise the errors of writing."""
        while self._under_way:
            self._under_way.popleft().result()


def _write_beside(output: PartialOutput, parts: list[Beside]) -> None:
    """Write adjacent parts in one call: each write that is not of whole pages waits for all other writes of its
    file.
    """
    runs: list[list[Beside]] = []
    for part in sorted(parts, key=lambda part: (part.file, part.start)):
        last = runs[-1][-1] if runs else None
        if last is None or (last.file, last.start + last.data.nbytes) != (part.file, part.start):
            runs.append([])
        runs[-1].append(part)
    with closing(OutputFiles(output.directory)) as files:
        for run in runs:
            files.of(run[0].file).write(np.concatenate([part.data for part in run]), run[0].start)

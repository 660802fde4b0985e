"""Reading the tensors of one checkpoint, or the same ones of two side by side, for jobs that write none.

Threads take chunks of elements in turn. Memory is a few MiB a worker. Remote stores get their reads announced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache

from fp8ckpt.engine import Progress
from fp8ckpt.tensors.tensor import DequantizerOf, Reader, Tensor
from fp8ckpt.workers import share

CHUNK = 2 << 20  # elements that are looked at together; half or a quarter as many take a tenth longer

#: Looks at ``count`` elements, from ``start`` on, of the tensors with that name: (name, start, count).
Step = Callable[[str, int, int], None]


class Walk:
    """A parallel pass over ``tensors``: by name, one or two of one shape. ``progress`` is called with (bytes read so
    far, bytes in all, the current activity). ``bytes_read``: codes and values, by all threads so far.
    """

    def __init__(self, tensors: Mapping[str, Sequence[Tensor]], progress: Progress | None) -> None:
        self.tensors = tensors
        self.bytes_read = 0
        self.lock = threading.Lock()  # guards the sums of the threads
        self._progress = progress

    def run(self, workers: int, step_of: Callable[[DequantizerOf], tuple[Step, Sequence[Reader]]]) -> None:
        """Look at all tensors. ``step_of`` makes the step of one worker, and the readers that only it uses."""
        from fp8ckpt.tensors.reading import load_dequantizer

        dequantizer = lru_cache(maxsize=4 * workers)(load_dequantizer)
        every = [tensor for same in self.tensors.values() for tensor in same]
        reads = (read for tensor in every for read in tensor.reads(((0,) * len(tensor.shape), tensor.shape)))
        self._total = sum(stop - start for _, start, stop in reads)
        numels = ((name, same[0].numel) for name, same in self.tensors.items())
        chunks = (
            (name, start, min(CHUNK, numel - start)) for name, numel in numels for start in range(0, numel, CHUNK)
        )
        spans = [tensor.span for tensor in every]
        with ExitStack() as announced:
            for store in {span.file.store for span in spans}:
                announced.enter_context(store.ahead([span.whole] for span in spans if span.file.store == store))
            share(chunks, [self._worker(*step_of(dequantizer)) for _ in range(workers)])

    def _worker(self, step: Step, readers: Sequence[Reader]) -> Callable[[tuple[str, int, int]], None]:
        def work(chunk: tuple[str, int, int]) -> None:
            step(*chunk)
            with self.lock:
                for reader in readers:
                    self.bytes_read += reader.bytes_read
                    reader.bytes_read = 0
                if self._progress is not None:
                    file = self.tensors[chunk[0]][0].span.file.name
                    self._progress(self.bytes_read, self._total, f"reading {file}")

        return work

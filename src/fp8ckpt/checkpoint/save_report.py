"""What quantizing did to each weight of a save, added up over threads and ranks: the report that a conversion makes.

A weight is a row of numbers, so that what is kept is 80 bytes a weight; ranks exchange a bounded number of rows at
once. Counts and maxima are exact however the weights are sharded; mean errors are sums, whose last digits are not.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import astuple
from functools import partial
from math import prod

import numpy as np
import numpy.typing as npt

from fp8ckpt.encodings.facts import WeightFacts
from fp8ckpt.encodings.results import QuantizationReport, WeightReport
from fp8ckpt.numerics import quantize
from fp8ckpt.numerics.quantize import Tally
from fp8ckpt.ranks import Ranks
from fp8ckpt.tensors.checkpoint import Checkpoint

_SUMS = 6  # of a tally; what follows are maxima
_EXCHANGED = 1 << 17  # rows at once, over all ranks

Rows = npt.NDArray[np.float64]  # [weights, columns]


class Tallies:
    """The tallies of a base's weights, and how many scales of each were kept and made; for any number of threads."""

    def __init__(self, base: Checkpoint, *, fresh: bool) -> None:
        self._base = base
        self._rows = {tensor.name: row for row, tensor in enumerate(base.quantized)}
        self._sums: Rows = np.zeros((len(self._rows), _SUMS + 3))
        self._maxima: Rows = np.zeros((len(self._rows), 2))
        self._lock = threading.Lock()
        self._fresh = fresh

    def add(self, name: str, tally: Tally, kept: int, made: int, factors: int) -> None:
        """Take in what was counted in a part of a weight; ``factors``: 1 with the part that writes a new one."""
        row, counts = self._rows[name], astuple(tally)
        with self._lock:
            self._sums[row] += (*counts[:_SUMS], kept, made, factors)
            self._maxima[row] = np.maximum(self._maxima[row], counts[_SUMS:])

    def report(self, ranks: Ranks, carried: Collection[str]) -> QuantizationReport:
        """The report of all ranks together, on each of them. ``carried``: what was taken from the base."""
        sums, maxima = np.zeros_like(self._sums), np.zeros_like(self._maxima)
        at_once = max(1, _EXCHANGED // ranks.size)
        for start in range(0, len(sums), at_once):
            part = slice(start, start + at_once)
            for theirs, largest in ranks.gather(partial(self._part, part)):
                sums[part] += theirs
                maxima[part] = np.maximum(maxima[part], largest)
        for tensor in self._base.quantized:
            if not tensor.numel and tensor.scale.nbytes:  # no shard holds any of it, and it has a scale
                sums[self._rows[tensor.name], _SUMS + self._fresh] = prod(quantize.block_shape(tensor.grid))
        written = [tensor.name for tensor in self._base.quantized if tensor.name not in carried]
        held = [self._rows[name] for name in written]
        rows = [_report_of(name, sums[row], maxima[row]) for name, row in zip(written, held, strict=True)]
        total = _report_of("", sums[held].sum(axis=0), maxima[held].max(axis=0, initial=0.0))
        return QuantizationReport(total, tuple(rows), tuple(sorted(carried)))

    def _part(self, part: slice) -> tuple[Rows, Rows]:
        return self._sums[part], self._maxima[part]


def _report_of(name: str, sums: Rows, maxima: Rows) -> WeightReport:
    elements, moved, clipped, outgrown, magnitude, error, *scales = sums.tolist()
    kept, made, factors = map(int, scales)
    counts = int(elements), int(moved), int(clipped), int(outgrown)
    tally = Tally(*counts, magnitude, error, *maxima.tolist())
    return WeightReport.of(name, WeightFacts(tally, kept=kept, made=made, factors=factors), has_base=True)

"""Counts for the report's page, taken as tensors pass: which codes are in use, and how two tensors differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.numerics import kernels
from fp8ckpt.numerics.codes import CODE_FORMATS, F32, U8, code_values
from fp8ckpt.numerics.quantize import Tally
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import DTYPE_BITS


class Seen:
    """The counts of one thread, or of all. ``codes``: how often each code occurs, by dtype; ``use``: for each weight
    how many of its codes are zeros, subnormals, saturated (of the largest magnitude) and nonfinite; ``changes``: how
    each tensor differs from its counterpart.
    """

    def __init__(self) -> None:
        self.codes: dict[str, npt.NDArray[np.int64]] = {}
        self.use: dict[str, Counter[str]] = {}
        self.changes: dict[str, Tally] = {}

    def count(self, tensor: QuantizedTensor, codes: U8) -> None:
        """Count codes of a weight, one a byte."""
        self.count_codes(tensor.name, tensor.code_dtype, codes)

    def count_codes(self, name: str, dtype: str, codes: U8) -> None:
        """Count codes of a weight that is given by its name and code dtype."""
        spread = np.zeros((4, 256), np.int64)
        kernels.count_codes(codes.reshape(-1), spread)
        classes = _code_classes(dtype)
        counts = spread.sum(axis=0)[: classes["zeros"].size]
        self._add_codes(dtype, counts)
        use = {what: int(counts[which].sum()) for what, which in classes.items()}
        self.use.setdefault(name, Counter()).update(use)

    def compare(self, name: str, before: F32, after: F32, moved: int | None = None) -> None:
        """Compare values [n] of a tensor and its counterpart. ``moved``: by default the elements of other values."""
        sums = np.zeros(kernels.TALLY)
        unequal = int(kernels.compare_values(before, after, sums))
        self.change(name, Tally(before.size, unequal if moved is None else moved, 0, 0, *map(float, sums)))

    def change(self, name: str, tally: Tally) -> None:
        self.changes.setdefault(name, Tally()).add(tally)

    def add(self, other: Seen) -> None:
        for dtype, counts in other.codes.items():
            self._add_codes(dtype, counts)
        for name, use in other.use.items():
            self.use.setdefault(name, Counter()).update(use)
        for name, tally in other.changes.items():
            self.change(name, tally)

    def recorded(self) -> dict[str, Any]:
        """Return the counts as JSON; empty if there are none."""
        parts = {
            "codes": {dtype: counts.tolist() for dtype, counts in self.codes.items()},
            "use": self.use,
            "changes": {name: asdict(tally) for name, tally in self.changes.items()},
        }
        return {what: part for what, part in parts.items() if part}

    @classmethod
    def of(cls, recorded: Iterable[dict[str, Any]]) -> Seen:
        total = cls()
        for one in recorded:
            part = cls()
            part.codes = {dtype: np.array(counts, np.int64) for dtype, counts in one.get("codes", {}).items()}
            part.use = {name: Counter(use) for name, use in one.get("use", {}).items()}
            part.changes = {name: Tally(**tally) for name, tally in one.get("changes", {}).items()}
            total.add(part)
        return total

    def _add_codes(self, dtype: str, counts: npt.NDArray[np.int64]) -> None:
        self.codes.setdefault(dtype, np.zeros(counts.size, np.int64))[:] += counts


def moved_bytes(before: U8, after: U8, dtype: str) -> int:
    """Return how many elements of a dtype have other bytes."""
    itemsize = max(1, DTYPE_BITS[dtype] // 8)
    return int((before != after).reshape(-1, itemsize).any(axis=1).sum())


@lru_cache
def _code_classes(dtype: str) -> dict[str, npt.NDArray[np.bool_]]:
    """Return a mask of the codes for each class; a code may be in no class."""
    values = np.abs(code_values(dtype))
    finite = np.isfinite(values)
    form = CODE_FORMATS[dtype]
    subnormal = (np.arange(values.size) >> form.mantissa_bits) % (1 << form.exponent_bits) == 0
    return {
        "zeros": values == 0,
        "subnormals": subnormal & finite & (values > 0),
        "saturated": values == values[finite].max(),
        "nonfinite": ~finite,
    }

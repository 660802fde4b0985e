"""Products of low rank, and what became of them: the compiled loops of merging.

An element is ``value + scaling * sum``, in float32, where the sum begins at zero and takes the products of its row of
``left`` and its column of ``right`` in the order of the rank. No operation is fused or reordered, so an element's bits
depend on that row and that column alone: not on the shape of what is worked on at once, on threads, or on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.numerics.codes import F32
from fp8ckpt.numerics.compiled import compiled

Array = npt.NDArray[Any]

_STRIP = 512  # columns; the sums of four rows, and a strip of a right of rank 64, stay close to a core
_LANES = 16  # partial sums, so that an addition need not wait for the one before it


@compiled()
def add_product(left: Array, right: Array, scaling: Any, out: Array) -> None:
    """``out += scaling * (left @ right)``: left f32 [R, K], right f32 [K, C], scaling f32, out f32 [R, C].

    Four rows at once, each with sums of its own, share what is read of ``right``.
    """
    rows, rank = left.shape
    cols = right.shape[1]
    sums = np.empty((4, _STRIP), np.float32)
    for start in range(0, cols, _STRIP):
        size = min(_STRIP, cols - start)
        for i in range(0, rows, 4):
            count = min(4, rows - i)
            sums[:] = np.float32(0)
            done = 0
            if count == 4:
                s, t, u, v = sums[0], sums[1], sums[2], sums[3]
                while done + 2 <= rank:
                    x, y = right[done, start : start + size], right[done + 1, start : start + size]
                    a, b, c, d = left[i, done], left[i + 1, done], left[i + 2, done], left[i + 3, done]
                    e, f, g, h = left[i, done + 1], left[i + 1, done + 1], left[i + 2, done + 1], left[i + 3, done + 1]
                    for j in range(size):
                        s[j] = (s[j] + a * x[j]) + e * y[j]
                        t[j] = (t[j] + b * x[j]) + f * y[j]
                        u[j] = (u[j] + c * x[j]) + g * y[j]
                        v[j] = (v[j] + d * x[j]) + h * y[j]
                    done += 2
            for k in range(done, rank):
                x = right[k, start : start + size]
                for q in range(count):
                    factor, total = left[i + q, k], sums[q]
                    for j in range(size):
                        total[j] += factor * x[j]
            for q in range(count):
                total, row = sums[q], out[i + q, start : start + size]
                for j in range(size):
                    row[j] += scaling * total[j]


@compiled()
def sum_squares(values: Array, sums: Array) -> None:
    """The sum of the squares of each row, in float64 and in an order that follows from the length of the row alone:
    values f32 [R, C], sums f64 [R].
    """
    rows, cols = values.shape
    whole = cols // _LANES * _LANES
    lanes = np.empty(_LANES, np.float64)
    for i in range(rows):
        row = values[i]
        lanes[:] = 0.0
        for start in range(0, whole, _LANES):
            for lane in range(_LANES):
                value = np.float64(row[start + lane])
                lanes[lane] += value * value
        total = 0.0
        for lane in range(_LANES):
            total += lanes[lane]
        for j in range(whole, cols):
            total += np.float64(row[j]) * np.float64(row[j])
        sums[i] = total


@compiled()
def add_squares(values: Array, sums: Array) -> None:
    """Add the squares of each row to the sums of its columns, in float64 and row after row: values f32 [R, C], sums f64
    [C].
    """
    rows, cols = values.shape
    for i in range(rows):
        for j in range(cols):
            value = np.float64(values[i, j])
            sums[j] += value * value


@compiled()
def count_arrived(before: Array, wanted: Array, stored: Array, sums: Array) -> int:
    """How many elements of ``stored`` differ from ``before``; all f32 [n].

    Added to ``sums`` f64 [4] are the squares of ``before``, the squares of what was to be added to it (``wanted -
    before``), its products with what was added, and the squares of that.
    """
    changed = 0
    whole = before.size // _LANES * _LANES
    lanes = np.zeros((4, _LANES), np.float64)
    for start in range(0, whole, _LANES):
        for lane in range(_LANES):
            old = np.float64(before[start + lane])
            delta = np.float64(wanted[start + lane]) - old
            added = np.float64(stored[start + lane]) - old
            lanes[0, lane] += old * old
            lanes[1, lane] += delta * delta
            lanes[2, lane] += delta * added
            lanes[3, lane] += added * added
            changed += added != 0.0
    for i in range(whole, before.size):
        old = np.float64(before[i])
        delta, added = np.float64(wanted[i]) - old, np.float64(stored[i]) - old
        lanes[0, 0] += old * old
        lanes[1, 0] += delta * delta
        lanes[2, 0] += delta * added
        lanes[3, 0] += added * added
        changed += added != 0.0
    for k in range(4):
        for lane in range(_LANES):
            sums[k] += lanes[k, lane]
    return changed


@dataclass
class Arrival:
    """What became of what was to be added to ``elements`` values, ``changed`` of which are others now. Sums of squares
    and products: of the values ``before``, of the ``delta`` that was to be added, of that with what was ``added``.
    """

    elements: int = 0
    changed: int = 0
    before: float = 0.0
    delta: float = 0.0
    product: float = 0.0
    added: float = 0.0

    @classmethod
    def of(cls, before: F32, wanted: F32, stored: F32) -> Arrival:
        """Of values [n] before, as they were to be, and as they are stored. Those that are not finite are left out."""
        sums = np.zeros(4)
        changed = count_arrived(before, wanted, stored, sums)
        if not np.isfinite(sums).all():
            finite = np.isfinite(before) & np.isfinite(wanted) & np.isfinite(stored)
            before, wanted, stored, sums = before[finite], wanted[finite], stored[finite], np.zeros(4)
            changed = count_arrived(before, wanted, stored, sums)
        return cls(before.size, int(changed), *map(float, sums))

    def add(self, other: Arrival) -> None:
        """Take in other elements."""
        self.elements += other.elements
        self.changed += other.changed
        self.before += other.before
        self.delta += other.delta
        self.product += other.product
        self.added += other.added

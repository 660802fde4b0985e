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

from fp8ckpt.numerics.codes import F32, code_values
from fp8ckpt.numerics.compiled import compiled
from fp8ckpt.numerics.kernels import _SCRATCH, _spread

Array = npt.NDArray[Any]

_STRIP = 512  # columns; the sums of four rows, and a strip of a right of rank 64, stay close to a core
_TOO_SMALL = 2.0**-100  # where rounding to float32's subnormals is no longer a matter of the last place
_FEW = 1 << 14  # places, of a run, that are looked at one by one
_LANES = 16  # partial sums, so that an addition need not wait for the one before it


@compiled()
def add_product(left: Array, right: Array, scaling: Any, out: Array) -> None:
    """``out += scaling * (left @ right)``: left f32 [R, K], right f32 [K, C], scaling f32, out f32 [R, C].

    Four rows at once, each with sums of its own, share what is read of ``right``, four of its rows at a time.
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
            while done + 4 <= rank:
                w, x = right[done, start : start + size], right[done + 1, start : start + size]
                y, z = right[done + 2, start : start + size], right[done + 3, start : start + size]
                if count == 4:
                    s, t, u, v = sums[0], sums[1], sums[2], sums[3]
                    a, b, c, d = left[i, done], left[i, done + 1], left[i, done + 2], left[i, done + 3]
                    e, f, g, h = left[i + 1, done], left[i + 1, done + 1], left[i + 1, done + 2], left[i + 1, done + 3]
                    k, m, n, o = left[i + 2, done], left[i + 2, done + 1], left[i + 2, done + 2], left[i + 2, done + 3]
                    p, q, r, last = (
                        left[i + 3, done],
                        left[i + 3, done + 1],
                        left[i + 3, done + 2],
                        left[i + 3, done + 3],
                    )
                    for j in range(size):
                        s[j] = (((s[j] + a * w[j]) + b * x[j]) + c * y[j]) + d * z[j]
                        t[j] = (((t[j] + e * w[j]) + f * x[j]) + g * y[j]) + h * z[j]
                        u[j] = (((u[j] + k * w[j]) + m * x[j]) + n * y[j]) + o * z[j]
                        v[j] = (((v[j] + p * w[j]) + q * x[j]) + r * y[j]) + last * z[j]
                else:
                    for row in range(count):
                        s = sums[row]
                        a, b, c, d = (
                            left[i + row, done],
                            left[i + row, done + 1],
                            left[i + row, done + 2],
                            left[i + row, done + 3],
                        )
                        for j in range(size):
                            s[j] = (((s[j] + a * w[j]) + b * x[j]) + c * y[j]) + d * z[j]
                done += 4
            for step in range(done, rank):
                x = right[step, start : start + size]
                for row in range(count):
                    factor, total = left[i + row, step], sums[row]
                    for j in range(size):
                        total[j] += factor * x[j]
            for row in range(count):
                total, result = sums[row], out[i + row, start : start + size]
                for j in range(size):
                    result[j] += scaling * total[j]


@compiled()
def add_product_at(left: Array, right: Array, rows: Array, cols: Array, scaling: Any, out: Array) -> None:
    """The bits of `add_product` at some places: left f32 [R, K], right f32 [C, K] of any strides, rows and cols i64
    [n], out f32 [n].
    """
    for i in range(rows.size):
        total = np.float32(0)
        for k in range(left.shape[1]):
            total += left[rows[i], k] * right[cols[i], k]
        out[i] += scaling * total


@compiled()
def find_codes(codes: Array, phase: int, cols: int, least: Array, places: Array) -> int:
    """How many codes have a magnitude of at least that of their row, and the places of the first of them: codes u8 [n],
    which begin ``phase`` into a row of ``cols``, least u8 [R], places i64 [m].
    """
    found = 0
    start, row = 0, 0
    while start < codes.size:
        size = min(codes.size - start, cols - (phase if row == 0 else 0))
        part, bound, here = codes[start : start + size], least[row], 0
        for i in range(size):
            here += np.uint8(part[i] & np.uint8(0x7F)) >= bound
        if here:
            for i in range(size):
                if np.uint8(part[i] & np.uint8(0x7F)) >= bound:
                    if found < places.size:
                        places[found] = start + i
                    found += 1
        start, row = start + size, row + 1
    return found


class FewLargest:
    """Finds the ``largest`` magnitude among values of codes to each of which at most a bound is added: of those codes
    alone that could be it, once some are known. ``scale``: of all codes; ``largest``: a magnitude that is there.
    """

    def __init__(self, scale: float, dtype: str, largest: np.float32) -> None:
        self.largest = largest
        self._values = code_values(dtype)[:128].astype(np.float64) * scale
        self._scale = np.float32(scale)
        self._codes = code_values(dtype)
        self._places = np.empty(_FEW, np.int64)

    def candidates(
        self, codes: npt.NDArray[np.uint8], phase: int, cols: int, bounds: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.int64], F32] | None:
        """The places [n], among these codes, that may hold one that is larger, and their values f32 [n]; None if there
        are too many. ``bounds`` f64 [R], of the rows of ``cols`` that the codes meet, ``phase`` into the first.
        """
        top = int((codes & np.uint8(0x7F)).max(initial=0))
        # One of the largest code is at least its value less the bound.
        known = max(float(self.largest), float(self._values[min(top, 126)]) - float(bounds.max(initial=0)))
        wanted = known * (1 - 2.0**-20) - bounds
        least = np.searchsorted(self._values[:127], wanted).astype(np.uint8)
        count = find_codes(codes, phase, cols, least, self._places)
        if count > _FEW or known < _TOO_SMALL:
            return None
        places = self._places[:count].copy()
        values: F32 = self._codes[codes[places]] * self._scale
        return places, values

    def raise_to(self, values: F32) -> None:
        """Take in values that were found; NaN and infinity stay above all."""
        found = np.abs(values).max(initial=0)
        self.largest = max(self.largest, found if found == found else np.float32(np.inf))


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
def _add_arrived(before: Array, wanted: Array, stored: Array, lanes: Array) -> int:
    changed = 0
    whole = before.size // _LANES * _LANES
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
    return changed


@compiled()
def count_arrived(before: Array, wanted: Array, stored: Array, sums: Array) -> int:
    """How many elements of ``stored`` differ from ``before``; all f32 [n].

    Added to ``sums`` f64 [4] are the squares of ``before``, the squares of what was to be added to it (``wanted -
    before``), its products with what was added, and the squares of that.
    """
    lanes = np.zeros((4, _LANES), np.float64)
    changed: int = _add_arrived(before, wanted, stored, lanes)
    for k in range(4):
        for lane in range(_LANES):
            sums[k] += lanes[k, lane]
    return changed


@compiled()
def arrive_blocks(
    before: Array,
    wanted: Array,
    codes: Array,
    scales: Array,
    form: tuple[int, int, int],
    beyond: Any,
    row_phase: int,
    col_phase: int,
    block_rows: int,
    block_cols: int,
    sums: Array,
    counts: Array,
) -> None:
    """What `count_arrived` does, of a window of codes times scales: before and wanted f32 [R, C], codes u8 [R, C],
    scales f32 [R blocks, C blocks]. A code's value is found as `tally_blocks` finds it.

    Added to ``counts`` i64 [2] are the elements that differ from before, and magnitudes of ``wanted`` that are above
    ``beyond`` f32 times their scale.
    """
    rows, cols = before.shape
    width, mantissa, bias = form
    dropped, of_size, subnormals = (
        np.int32(23 - mantissa),
        np.int32((1 << (width - 1)) - 1),
        np.int32((1 << mantissa) - 1),
    )
    sign_at, below, one_less = np.int32(32 - width), np.int32((128 - bias) << 23), np.int32((127 - bias) << 23)
    least = np.float32(2.0 ** (1 - bias))
    factors = np.empty(_SCRATCH, np.float32)
    bits = np.empty(_SCRATCH, np.int32)
    values = bits.view(np.float32)
    lanes = np.zeros((4, _LANES), np.float64)
    for start in range(0, cols, _SCRATCH):
        size = min(_SCRATCH, cols - start)
        spread = -1
        for r in range(rows):
            block_row = (row_phase + r) // block_rows
            if block_row != spread:
                _spread(scales, block_row, start, col_phase, block_cols, factors[:size])
                spread = block_row
            old, new = before[r, start : start + size], wanted[r, start : start + size]
            coded = codes[r, start : start + size]
            for i in range(size):
                code = np.int32(np.int32(coded[i]) & of_size)
                exponent = one_less if code > subnormals else below
                bits[i] = np.int32(np.int32(code << dropped) + exponent)
            for i in range(size):
                code = np.int32(np.int32(coded[i]) & of_size)
                excess = np.float32(0) if code > subnormals else least
                values[i] = (values[i] - excess) * factors[i]
            for i in range(size):
                sign = np.int32(np.int32(np.int32(coded[i]) & ~of_size) << sign_at)
                bits[i] = np.int32(bits[i] | sign)
            over = np.int32(0)
            for i in range(size):
                over = np.int32(over + np.int32(abs(new[i]) > factors[i] * beyond))
            counts[1] += over
            counts[0] += _add_arrived(old, new, values[:size], lanes)
    for k in range(4):
        for lane in range(_LANES):
            sums[k] += lanes[k, lane]


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

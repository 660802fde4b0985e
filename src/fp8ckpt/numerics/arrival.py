"""How much of an update arrives: how many values change, and sums that compare the wanted change with the stored one.

Sums are taken in float64, in an order that depends on the number of elements alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.numerics.codes import F32
from fp8ckpt.numerics.compiled import compiled
from fp8ckpt.numerics.kernels import E2M1, E4M3, decoded, spread

Array = npt.NDArray[Any]

_LANES = 512  # partial sums, each of four elements at once; together with these they fit the first-level cache


@compiled()
def add_arrived(before: Array, wanted: Array, stored: Array, lanes: Array, changed: Array) -> None:
    """Add the terms of `sum_arrived` to ``lanes`` f64 [4, _LANES], and the number of elements of ``stored`` that differ
    from ``before`` to ``changed`` i32 [_LANES]. All are f32 [n], with n at most four times the number of lanes.
    """
    size = before.size // 4
    of_before, of_delta, of_product, of_added = lanes[0], lanes[1], lanes[2], lanes[3]
    b, c, d, e = before[:size], before[size : 2 * size], before[2 * size : 3 * size], before[3 * size : 4 * size]
    w, x, y, z = wanted[:size], wanted[size : 2 * size], wanted[2 * size : 3 * size], wanted[3 * size : 4 * size]
    s, t, u, v = stored[:size], stored[size : 2 * size], stored[2 * size : 3 * size], stored[3 * size : 4 * size]
    for i in range(size):
        old, old2, old3, old4 = np.float64(b[i]), np.float64(c[i]), np.float64(d[i]), np.float64(e[i])
        new, new2 = np.float64(w[i]) - old, np.float64(x[i]) - old2
        new3, new4 = np.float64(y[i]) - old3, np.float64(z[i]) - old4
        got, got2 = np.float64(s[i]) - old, np.float64(t[i]) - old2
        got3, got4 = np.float64(u[i]) - old3, np.float64(v[i]) - old4
        of_before[i] += (old * old + old2 * old2) + (old3 * old3 + old4 * old4)
        of_delta[i] += (new * new + new2 * new2) + (new3 * new3 + new4 * new4)
        of_product[i] += (new * got + new2 * got2) + (new3 * got3 + new4 * got4)
        of_added[i] += (got * got + got2 * got2) + (got3 * got3 + got4 * got4)
    for i in range(size):
        of_two = np.int32(np.int32(b[i] != s[i]) + np.int32(c[i] != t[i]))
        changed[i] += np.int32(of_two + np.int32(np.int32(d[i] != u[i]) + np.int32(e[i] != v[i])))
    for i in range(4 * size, before.size):
        old = np.float64(before[i])
        new, got = np.float64(wanted[i]) - old, np.float64(stored[i]) - old
        of_before[0] += old * old
        of_delta[0] += new * new
        of_product[0] += new * got
        of_added[0] += got * got
        changed[0] += np.int32(before[i] != stored[i])


@compiled()
def sum_arrived(lanes: Array, changed: Array, sums: Array, counts: Array) -> None:
    """Add to ``sums`` f64 [4] the squares of ``before``, the squares of the wanted change, its products with the stored
    change, and the squares of that; and to the first of ``counts`` i64 the number of changed elements.
    """
    for k in range(4):
        for lane in range(lanes.shape[1]):
            sums[k] += lanes[k, lane]
    for lane in range(changed.size):
        counts[0] += changed[lane]


@compiled()
def count_arrived(before: Array, wanted: Array, stored: Array, sums: Array, counts: Array) -> None:
    """Add what `sum_arrived` adds, for values f32 [n] before the update, as wanted, and as stored."""
    lanes, changed = np.zeros((4, _LANES), np.float64), np.zeros(_LANES, np.int32)
    for start in range(0, before.size, 4 * _LANES):
        stop = min(before.size, start + 4 * _LANES)
        add_arrived(before[start:stop], wanted[start:stop], stored[start:stop], lanes, changed)
    sum_arrived(lanes, changed, sums, counts)


@compiled(inline="always")
def _decode_row(codes: Array, factors: Array, form: tuple[int, int, int], out: Array) -> None:
    """Decode codes u8 [n] with one scale each to values f32 [n]. NaN codes must not occur."""
    sign_at, sign_bit = np.int32(32 - form[0]), np.int32(1 << (form[0] - 1))
    for i in range(codes.size):
        code = np.int32(codes[i])
        size = np.float32(decoded(code, form) * factors[i]).view(np.int32)
        out[i] = np.int32(size | np.int32(np.int32(code & sign_bit) << sign_at)).view(np.float32)


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
    """Add what `sum_arrived` adds, for a window of codes times scales: before and wanted f32 [R, C], codes u8 [R, C],
    scales f32 [R blocks, C blocks].

    The second of ``counts`` i64 [2] counts magnitudes of ``wanted`` above ``beyond`` f32 times their scale.
    """
    rows, cols = before.shape
    most = min(cols, 4 * _LANES)
    factors, values = np.empty(most, np.float32), np.empty(most, np.float32)
    lanes, changed = np.zeros((4, _LANES), np.float64), np.zeros(_LANES, np.int32)
    for start in range(0, cols, most):
        size = min(most, cols - start)
        of_row = -1
        for r in range(rows):
            block_row = (row_phase + r) // block_rows
            if block_row != of_row:
                spread(scales, block_row, start, col_phase, block_cols, factors[:size])
                of_row = block_row
            old, new = before[r, start : start + size], wanted[r, start : start + size]
            coded = codes[r, start : start + size]
            if form[0] == 8:
                _decode_row(coded, factors, E4M3, values)
            else:
                _decode_row(coded, factors, E2M1, values)
            over = np.int32(0)
            for i in range(size):
                over = np.int32(over + np.int32(abs(new[i]) > factors[i] * beyond))
            counts[1] += over
            add_arrived(old, new, values[:size], lanes, changed)
    sum_arrived(lanes, changed, sums, counts)


@dataclass(slots=True)
class Arrival:
    """The outcome of an update of ``elements`` values, of which ``changed`` differ afterwards. Sums of squares of the
    values ``before``, of the wanted ``delta`` and of the stored change ``added``; ``product`` sums delta times added.
    """

    elements: int = 0
    changed: int = 0
    before: float = 0.0
    delta: float = 0.0
    product: float = 0.0
    added: float = 0.0

    @classmethod
    def of(cls, before: F32, wanted: F32, stored: F32) -> Arrival:
        """Return the outcome for values [n] before, as wanted, and as stored, without those that are not finite."""
        sums, changed = np.zeros(4), np.zeros(1, np.int64)
        count_arrived(before, wanted, stored, sums, changed)
        if not np.isfinite(sums).all():
            finite = np.isfinite(before) & np.isfinite(wanted) & np.isfinite(stored)
            return cls.of(before[finite], wanted[finite], stored[finite])
        return cls(before.size, int(changed[0]), *map(float, sums))

    def add(self, other: Arrival) -> None:
        """Add the outcome for other elements."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

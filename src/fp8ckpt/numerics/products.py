"""Products of low rank: the compiled loops of merging.

An element is ``value + scaling * sum``, in float32. The sum begins at zero and adds the products of its row of ``left``
and its column of ``right`` in the order of the rank. No operation is fused or reordered, so an element's bits depend on
that row and that column alone: not on the shape of a call, on threads, or on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.numerics.arrival import Arrival, add_arrived, sum_arrived
from fp8ckpt.numerics.codes import F32, code_values
from fp8ckpt.numerics.compiled import compiled
from fp8ckpt.numerics.kernels import E4M3 as FORM
from fp8ckpt.numerics.kernels import decoded, encode_row
from fp8ckpt.numerics.quantize import E4M3
from fp8ckpt.numerics.tiles import COLS, ROWS, add_tile

Array = npt.NDArray[Any]

_STRIP = 512  # columns; a few rows of them, and a strip of a right factor of rank 64, fit the nearest cache
_TOO_SMALL = 2.0**-100  # below it, rounding to float32's subnormals is no longer a matter of the last place
_LOOKED_AT = 512  # codes, which are skipped together if none is large
_FEW = 1 << 14  # places of a run that are looked at one by one
_LANES = 16  # partial sums, so that additions do not wait for each other


@compiled()
def _pack(right: Array, start: int, size: int, panels: Array) -> None:
    """Copy the columns ``[start, start + size)`` of a right f32 [K, C] into panels f32 [n, K, COLS], padded with
    zeros.
    """
    for panel in range(panels.shape[0]):
        at = panel * COLS
        whole = at + COLS <= size
        for k in range(right.shape[0]):
            source, packed = right[k, start + at : start + min(size, at + COLS)], panels[panel, k]
            if whole:
                for i in range(COLS):
                    packed[i] = source[i]
            else:
                packed[:] = np.float32(0)
                for i in range(source.size):
                    packed[i] = source[i]


@compiled(inline="always")
def _take_rows(left: Array, row: int, count: int, taken: Array) -> None:
    """Copy the rows ``[row, row + count)`` of a left f32 [R, K], and zeros for the missing ones of ROWS."""
    for r in range(ROWS):
        if r < count:
            taken[r] = left[row + r]
        else:
            taken[r] = np.float32(0)


@compiled()
def add_product(left: Array, right: Array, scaling: Any, out: Array) -> None:
    """``out += scaling * (left @ right)``: left f32 [R, K], right f32 [K, C], scaling f32, out f32 [R, C]."""
    (rows, rank), cols = left.shape, right.shape[1]
    panels = np.empty((_STRIP // COLS, rank, COLS), np.float32)
    lefts = np.empty((ROWS, rank), np.float32)
    values = np.zeros((ROWS, _STRIP), np.float32)
    for start in range(0, cols, _STRIP):
        size = min(_STRIP, cols - start)
        used = (size + COLS - 1) // COLS
        _pack(right, start, size, panels[:used])
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            _take_rows(left, row, count, lefts)
            for r in range(count):
                source, target = out[row + r, start : start + size], values[r]
                for i in range(size):
                    target[i] = source[i]
            for panel in range(used):
                add_tile(lefts, panels[panel], 0, rank, scaling, values, panel * COLS)
            for r in range(count):
                source, target = values[r], out[row + r, start : start + size]
                for i in range(size):
                    target[i] = source[i]


@compiled(inline="always")
def _decode_row(codes: Array, scale: Any, out: Array) -> None:
    """Decode e4m3 codes u8 [n] to values f32 [n]."""
    for i in range(codes.size):
        code = np.int32(codes[i])
        size = np.float32(decoded(code, FORM) * scale).view(np.int32)
        size = np.int32(0x7FC00000) if np.int32(code & np.int32(0x7F)) == np.int32(0x7F) else size
        out[i] = np.int32(size | np.int32(np.int32(code & np.int32(0x80)) << np.int32(24))).view(np.float32)


@compiled(inline="always", error_model="numpy")
def _encode_row(values: Array, divisors: Array, most: Any, limit: Any, codes: Array, counts: Array) -> Any:
    """Encode values f32 [n] to codes u8 [n], and return the bits i32 of the largest magnitude, as `_merge_codes`."""
    bits, top = values.view(np.int32), np.int32(0)
    for i in range(values.size):
        top = max(top, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    if np.int32(top).view(np.float32) > limit:
        for i in range(values.size):
            counts[1] += abs(values[i]) > limit
    encode_row(values.view(np.uint32), divisors, most, FORM, codes)
    return top


@compiled(error_model="numpy")
def _merge_codes(
    codes: Array,
    before: Any,
    left: Array,
    right: Array,
    ends: Array,
    scalings: Array,
    scale: Any,
    most: Any,
    beyond: Any,
    sums: Array,
    counts: Array,
) -> Any:
    """Replace the base's codes by those of the merged values: e4m3 codes u8 [R, C], with scales f32 ``before`` and
    ``scale``. Return the largest magnitude of the merged values; NaN counts as larger than any number.

    left f32 [R, K] and right f32 [K, C] hold all products, one after the other along the rank, ending at ``ends`` i64
    [P]; scalings f32 [P]. For ``sums`` and the first of ``counts`` see `fp8ckpt.numerics.arrival`; the second of
    ``counts`` counts magnitudes above ``beyond`` times the scale. The work goes by a few rows of a strip of columns,
    which fit the nearest cache.
    """
    (rows, cols), rank = codes.shape, right.shape[0]
    panels = np.empty((_STRIP // COLS, rank, COLS), np.float32)
    lefts = np.empty((ROWS, rank), np.float32)
    old, new = np.zeros((ROWS, _STRIP), np.float32), np.zeros((ROWS, _STRIP), np.float32)
    stored = np.zeros((ROWS, _STRIP), np.float32)
    divisors = np.full(_STRIP, scale, np.float32)
    lanes, changed = np.zeros((4, _STRIP), np.float64), np.zeros(_STRIP, np.int32)
    largest, limit = np.int32(0), np.float32(scale * beyond)
    for start in range(0, cols, _STRIP):
        size = min(_STRIP, cols - start)
        used = (size + COLS - 1) // COLS
        _pack(right, start, size, panels[:used])
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            _take_rows(left, row, count, lefts)
            if count < ROWS or size < _STRIP:  # the padding adds zero to all sums
                old[:] = np.float32(0)
                stored[:] = np.float32(0)
            for r in range(count):
                _decode_row(codes[row + r, start : start + size], before, old[r, :size])
            for r in range(ROWS):
                for i in range(_STRIP):
                    new[r, i] = old[r, i]
            first = 0
            for product in range(ends.size):
                for panel in range(used):
                    add_tile(lefts, panels[panel], first, ends[product], scalings[product], new, panel * COLS)
                first = ends[product]
            for r in range(count):
                coded = codes[row + r, start : start + size]
                largest = max(largest, _encode_row(new[r, :size], divisors[:size], most, limit, coded, counts))
                _decode_row(coded, scale, stored[r, :size])
            add_arrived(old.reshape(-1), new.reshape(-1), stored.reshape(-1), lanes, changed)
    sum_arrived(lanes, changed, sums, counts)
    return np.int32(largest).view(np.float32)


@dataclass
class MergedCodes:
    """The outcome of merging and encoding: the ``largest`` magnitude, how much of the update arrived, and how many
    magnitudes are beyond their scale.
    """

    largest: np.float32 = np.float32(0)  # noqa: RUF009 - it is never mutated
    arrival: Arrival = field(default_factory=Arrival)
    clipped: int = 0

    def add(self, other: MergedCodes) -> None:
        """Add the outcome for other values. NaN counts as larger than any number."""
        self.largest = np.maximum(self.largest, other.largest)
        self.arrival.add(other.arrival)
        self.clipped += other.clipped


def merge_codes(
    codes: npt.NDArray[np.uint8],
    before: np.float32,
    lefts: list[F32],
    rights: list[F32],
    scalings: list[float],
    scale: np.float32,
) -> MergedCodes:
    """Replace e4m3 codes [R, C] by those of the values with products added. ``before`` and ``scale``: the scales before
    and after; lefts [R, K] and rights [K, C] of any strides.
    """
    left = _joined(lefts, 1, np.empty((codes.shape[0], 0), np.float32))
    right = _joined(rights, 0, np.empty((0, codes.shape[1]), np.float32))
    ends = np.cumsum([part.shape[1] for part in lefts], dtype=np.int64)
    sums, counts = np.zeros(4), np.zeros(2, np.int64)
    largest = _merge_codes(
        codes, before, left, right, ends, np.array(scalings, np.float32), scale, E4M3.largest, E4M3.beyond, sums, counts
    )
    return MergedCodes(largest, Arrival(codes.size, int(counts[0]), *map(float, sums)), int(counts[1]))


def _joined(parts: list[F32], axis: int, none: F32) -> F32:
    """Return the parts joined in C order, without a copy if there is one part in that order."""
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate([none, *parts], axis))


@compiled()
def add_product_at(left: Array, right: Array, rows: Array, cols: Array, scaling: Any, out: Array) -> None:
    """Add products at single places, with the bits of `add_product`: left f32 [R, K], right f32 [C, K] of any strides,
    rows and cols i64 [n], out f32 [n].
    """
    for i in range(rows.size):
        total = np.float32(0)
        for k in range(left.shape[1]):
            total += left[rows[i], k] * right[cols[i], k]
        out[i] += scaling * total


@compiled(inline="always")
def _largest_code(codes: Array) -> Any:
    top = np.uint8(0)
    for i in range(codes.size):
        top = max(top, np.uint8(codes[i] & np.uint8(0x7F)))
    return top


@compiled()
def largest_codes(codes: Array, phase: int, cols: int, largest: Array) -> None:
    """Find the largest magnitude of each row u8 [R], in codes u8 [n] that begin ``phase`` into a row of ``cols``."""
    start = -phase
    for row in range(largest.size):
        largest[row] = _largest_code(codes[max(0, start) : start + cols])
        start += cols


@compiled()
def find_codes(codes: Array, phase: int, cols: int, least: Array, places: Array) -> int:
    """Return how many codes have at least the magnitude ``least`` u8 [R] of their row, and fill ``places`` i64 [m] with
    the first of them. Codes as in `largest_codes`.
    """
    found = 0
    for row in range(least.size):
        stop = min(codes.size, (row + 1) * cols - phase)
        for start in range(max(0, row * cols - phase), stop, _LOOKED_AT):
            part = codes[start : min(stop, start + _LOOKED_AT)]
            if _largest_code(part) >= least[row]:
                for i in range(part.size):
                    if np.uint8(part[i] & np.uint8(0x7F)) >= least[row]:
                        if found < places.size:
                            places[found] = start + i
                        found += 1
    return found


class FewLargest:
    """A search for the ``largest`` magnitude among values of codes with a bounded addition to each. It looks only at
    the codes that can exceed what is known. ``scale``: of all codes; ``largest``: a magnitude that occurs.
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
        """Return the places [n] among the codes that may hold a larger magnitude, and their values f32 [n]; None if
        there are too many. ``bounds`` f64 [R]: of the rows of ``cols`` that they meet, beginning ``phase`` into the
        first.
        """
        tops = np.empty(bounds.size, np.uint8)
        largest_codes(codes, phase, cols, tops)
        # The element with the largest code has at least its value less the bound.
        known = max(float(self.largest), float(self._values[min(int(tops.max(initial=0)), 126)]) - float(bounds.max()))
        if known < _TOO_SMALL:
            return None
        least = np.searchsorted(self._values[:127], known * (1 - 2.0**-20) - bounds).astype(np.uint8)
        if (count := find_codes(codes, phase, cols, least, self._places)) > _FEW:
            return None
        places = self._places[:count].copy()
        values: F32 = self._codes[codes[places]] * self._scale
        return places, values

    def raise_to(self, values: F32) -> None:
        """Take in found values. NaN and infinity count as larger than any number."""
        found = np.abs(values).max(initial=0)
        self.largest = max(self.largest, found if found == found else np.float32(np.inf))


@compiled()
def sum_squares(values: Array, sums: Array) -> None:
    """Sum the squares of each row in float64, in an order that depends on the length of the row alone: values f32 [R,
    C], sums f64 [R].
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
    """Add the squares of each row to the sums of the columns in float64, row by row: values f32 [R, C], sums f64
    [C].
    """
    rows, cols = values.shape
    for i in range(rows):
        for j in range(cols):
            value = np.float64(values[i, j])
            sums[j] += value * value

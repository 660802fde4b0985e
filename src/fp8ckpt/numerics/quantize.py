"""Quantize parts of a weight with given scales, and make scales for it.

The contract: ``code = e4m3fn(clamp(float32(w) / float32(scale), -448, 448))``, nearest even, for finite ``w``. A fresh
scale is ``amax / 448`` in float32, 1 where ``amax`` is 0, stored in a scale dtype rounded up, so that nothing clips;
where scales are exponents (e8m0), or are to be powers of two in a dtype that holds others too, it is the least of
e8m0's values that is not below. A scale that is there already is kept where the block still *fits* it:

- nothing lies beyond: no magnitude is above 450 times the scale. The largest code is 448; a value of 448 times the
scale that was
  rounded to bfloat16 may be larger by one part in 257 (449.743), and still has that code as its nearest;
- and it is not so small that precision is thrown away: the largest magnitude is at least 28 times the scale, so that no
more
  than four of e4m3's binades are left unused; or the block is zero; or the scale gives back every element exactly.

So a block that was dequantized and not changed always fits, and gets its codes back. Only e4m3fn is written: no release
uses another FP8 dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fp8ckpt.numerics import kernels
from fp8ckpt.numerics.codes import E8M0_DTYPES, F32, SCALE_DTYPES, U8, code_values, scale_values
from fp8ckpt.numerics.dequantize import ROUNDING
from fp8ckpt.numerics.geometry import BlockGrid, Window, as_matrices, window, windows

CODE_DTYPE = "F8_E4M3"
LARGEST_CODE = np.float32(448)
_BEYOND = np.float32(450)  # times the scale
_TOO_SMALL = np.float32(28)  # times the scale

Scales = npt.NDArray[Any]  # as they are stored: of the numpy dtype that SCALE_DTYPES gives
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


class Values(NamedTuple):
    """Values of a weight as the kernels take them: bits u16 of bfloat16 or u32 of float32, and the left shift to
    float32 bits.
    """

    bits: npt.NDArray[Any]
    shift: int
    dtype: str

    @property
    def floats(self) -> F32:
        """The values as float32, a copy."""
        return (self.bits.astype(np.uint32) << np.uint32(self.shift)).view(np.float32)


def values_of(stored: U8, dtype: str) -> Values:
    """The bytes of BF16, F16 or F32 elements as values [n]; float16 is widened, exactly, and no other is copied."""
    if dtype == "BF16":
        return Values(stored.view(np.uint16), 16, dtype)
    if dtype == "F16":
        return Values(stored.view(np.float16).astype(np.float32).view(np.uint32), 0, dtype)
    return Values(stored.view(np.uint32), 0, dtype)


class Part(NamedTuple):
    """A window, and how to take it out of an array of the elements that were cut up."""

    window: Window
    of: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def parts_of_run(grid: BlockGrid, start: int, count: int) -> list[Part]:
    """The elements ``start`` to ``start + count`` of a weight, which lie in arrays [count]."""

    def taking(cut: Window) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
        return lambda array: array[cut.elements].reshape(cut.rows, cut.cols)

    return [Part(cut, taking(cut)) for cut in windows(as_matrices(grid), start, count)]


def parts_of_region(grid: BlockGrid, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[Part]:
    """The region at ``offsets`` of ``sizes`` in coordinates of the full weight; it lies in arrays of those sizes."""
    matrices = as_matrices(grid)
    rank = len(matrices.weight_shape)
    offsets = (0,) * (rank - len(offsets)) + offsets
    sizes = (1,) * (rank - len(sizes)) + sizes
    if 0 in sizes:
        return []

    def taking(index: tuple[int, ...]) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
        return lambda array: array.reshape(sizes)[index]

    found = []
    for index in np.ndindex(sizes[:-2]):
        lead = tuple(offset + i for offset, i in zip(offsets, index, strict=False))
        found.append(Part(window(matrices, lead, offsets[-2], offsets[-1], sizes[-2:], slice(0, 0)), taking(index)))
    return found


def block_array(grid: BlockGrid, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """Zeros, one a block: the shape that the functions below take scales and maxima in."""
    return np.zeros(tuple(max(1, size) for size in as_matrices(grid).shape), dtype)


def raise_maxima(parts: Iterable[Part], values: Values, maxima: F32) -> None:
    """Raise ``maxima`` (of `block_array`) to the largest magnitude of each block that the parts meet; NaN and infinity
    stay above all.
    """
    for part in parts:
        found = maxima[part.window.blocks].view(np.uint32).copy()
        kernels.raise_maxima(part.of(values.bits), values.shift, *part.window.phase, found)
        maxima[part.window.blocks] = found.view(np.float32)


def encode(parts: Iterable[Part], values: Values, scales: F32, codes: U8) -> None:
    """Fill ``codes`` u8, which lie as the values do. ``scales`` as of `block_array`; values that are not finite have no
    code.
    """
    for part in parts:
        given = np.ascontiguousarray(scales[part.window.blocks])
        kernels.encode_blocks(part.of(values.bits), values.shift, given, *part.window.phase, part.of(codes))


def count_inexact(parts: Iterable[Part], values: Values, codes: U8, scales: F32) -> Counts:
    """How many elements of each block that the parts meet are not given back by their codes."""
    counts = np.zeros(scales.shape, np.int64)
    for part in parts:
        found = np.zeros(scales[part.window.blocks].shape, np.int64)
        given = np.ascontiguousarray(scales[part.window.blocks])
        kernels.count_inexact(
            part.of(values.bits), values.shift, part.of(codes), code_values(CODE_DTYPE), given, ROUNDING[values.dtype],
            *part.window.phase, found,
        )  # fmt: skip
        counts[part.window.blocks] += found
    return counts


def count_nonfinite(values: Values) -> int:
    """How many values are NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(values.floats)))


@dataclass
class Tally:
    """What quantizing did to a number of elements.

    ``clipped``: magnitudes beyond the written scale; ``outgrown``: beyond the scale of before. Errors are those of
    ``code * scale`` in float32 against the value; ``error`` and ``magnitude`` are sums.
    """

    elements: int = 0
    moved: int = 0
    clipped: int = 0
    outgrown: int = 0
    magnitude: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    largest_error: float = 0.0

    def add(self, other: Tally) -> None:
        """Take in the tally of other elements."""
        self.elements += other.elements
        self.moved += other.moved
        self.clipped += other.clipped
        self.outgrown += other.outgrown
        self.magnitude += other.magnitude
        self.error += other.error
        self.largest = max(self.largest, other.largest)
        self.largest_error = max(self.largest_error, other.largest_error)


def tally(parts: Iterable[Part], values: Values, codes: U8, scales: F32, before: F32) -> Tally:
    """What ``codes`` with ``scales`` lose of the values; ``before``: the scales that might have been kept (infinite
    where none).
    """
    sums, counts = np.zeros(kernels.TALLY), np.zeros(2, np.int64)
    with np.errstate(over="ignore"):
        beyond = before * _BEYOND
    for part in parts:
        given, limits = (np.ascontiguousarray(blocks[part.window.blocks]) for blocks in (scales, beyond))
        kernels.tally_blocks(
            part.of(values.bits), values.shift, part.of(codes), given, limits, *part.window.phase, sums, counts
        )
    return Tally(codes.size, 0, int(counts[0]), int(counts[1]), *map(float, sums))


def within(maxima: F32, scales: F32) -> Mask:
    """Which blocks have nothing beyond their scale."""
    with np.errstate(over="ignore"):
        inside: Mask = maxima / scales <= _BEYOND
    return inside


def fits(maxima: F32, scales: F32) -> Mask:
    """Which blocks fit their scale by their largest magnitude alone. Of the others, `may_fit` says which an exact look
    decides.
    """
    with np.errstate(over="ignore"):
        large: Mask = (maxima == 0) | (maxima / scales >= _TOO_SMALL)
    return large & within(maxima, scales)


def may_fit(maxima: F32, scales: F32) -> Mask:
    """Blocks that are small for their scale, and keep it if it gives back every element."""
    with np.errstate(over="ignore"):
        ratio = maxima / scales
    small: Mask = (maxima > 0) & (ratio < _TOO_SMALL)
    return small


def fresh_scales(maxima: F32, dtype: str, *, powers_of_two: bool = False) -> Scales:
    """New scales, as stored in ``dtype``, for blocks of these (finite) largest magnitudes.

    Infinite where the dtype cannot hold one: F16 alone, for magnitudes beyond 29 million (14 as powers of two).
    """
    wanted = (maxima / LARGEST_CODE).astype(np.float32)
    # Below float32's normal numbers a quotient may have lost bits that matter.
    short = (wanted < np.finfo(np.float32).tiny) & (wanted.astype(np.float64) * 448 < maxima)
    wanted = np.where(short, np.nextafter(wanted, np.float32(np.inf)), wanted)
    wanted = np.where(maxima == 0, np.float32(1), wanted)
    bits = wanted.view(np.uint32)
    if powers_of_two or dtype in E8M0_DTYPES:
        least = bits <= 0x00400000  # 2 ** -127, whose exponent is stored as 0
        exponents = np.where(least, np.uint32(0), (bits + np.uint32(0x7FFFFF)) >> np.uint32(23))
        if dtype in E8M0_DTYPES:
            return exponents.astype(SCALE_DTYPES[dtype])
        wanted = scale_values(exponents, E8M0_DTYPES[0])
        bits = wanted.view(np.uint32)
    if dtype == "F32":
        return bits.copy()
    if dtype == "BF16":
        return ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
    assert dtype == "F16"
    with np.errstate(over="ignore"):
        half = wanted.astype(np.float16)
        return np.where(half.astype(np.float32) < wanted, np.nextafter(half, np.float16(np.inf)), half)


def choose_scales(
    maxima: F32, kept: Scales | None, dtype: str, exact: Mask | None = None, *, powers_of_two: bool = False
) -> tuple[Scales, Mask]:
    """(scales as stored in ``dtype``, which of them are ``kept``) for blocks of these largest magnitudes.

    ``kept``: the scales of before, of the same shape, or None to make all anew; ``exact``: where they give back every
    element; ``powers_of_two``: of new scales.
    """
    fresh = fresh_scales(maxima, dtype, powers_of_two=powers_of_two)
    if kept is None:
        return fresh, np.zeros(maxima.shape, np.bool_)
    before = scale_values(kept, dtype)
    keep = fits(maxima, before)
    if exact is not None:
        keep = keep | (may_fit(maxima, before) & exact)
    return np.where(keep, kept, fresh), keep


def round_to(values: F32, dtype: str, out: npt.NDArray[Any]) -> int:
    """Float32 values [n] as bits of ``dtype`` (BF16, F16 or F32), nearest even; returns how many finite ones became
    infinite.
    """
    return int(kernels.round_values(values, ROUNDING[dtype], out))

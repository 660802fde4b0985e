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

So a block that was dequantized and not changed always fits, and gets its codes back. Of FP8 only e4m3fn is written: no
release uses another.

Codes of four bits (e2m1) follow the same contract with 6 in the place of 448, and keep a scale where the largest
magnitude is at least 4 times it. A fresh scale is as whoever defines the format makes it. MXFP4: the OCP's ``2 **
(floor(log2(amax)) - 2)``, by which values between 6 and 8 times it become 6. NVFP4: ``amax / 6`` less the tensor's
`Factor`, rounded to the nearest e4m3 value, as compressed-tensors and ModelOpt do it (they differ where that is zero).
The factor is to these scales what a scale is to codes of e4m3, and is kept by the rule above, of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fp8ckpt.numerics import kernels
from fp8ckpt.numerics.codes import (
    CODE_FORMATS,
    E8M0_DTYPES,
    F4,
    F32,
    SCALE_DTYPES,
    U8,
    Factor,
    code_values,
    scale_values,
)
from fp8ckpt.numerics.dequantize import ROUNDING
from fp8ckpt.numerics.geometry import BlockGrid, Window, as_matrices, window, windows
from fp8ckpt.numerics.products import Arrival, arrive_blocks


class Coding(NamedTuple):
    """What decides the codes of one dtype and their scales: the ``largest`` code; of how many times the scale on a
    magnitude is ``beyond`` it, and up to how many a block is ``small`` for it.
    """

    dtype: str
    largest: np.float32
    beyond: np.float32
    small: np.float32

    @property
    def form(self) -> tuple[int, int, int]:
        """As the kernels take it."""
        form = CODE_FORMATS[self.dtype]
        return form.bits, form.mantissa_bits, form.bias


E4M3 = Coding("F8_E4M3", np.float32(448), np.float32(450), np.float32(28))
E2M1 = Coding(F4, np.float32(6), np.float32(6 * 450 / 448), np.float32(4))
CODINGS = {coding.dtype: coding for coding in (E4M3, E2M1)}

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


def block_shape(grid: BlockGrid) -> tuple[int, ...]:
    """One a block: the shape that the functions below take scales and maxima in."""
    return tuple(max(1, size) for size in as_matrices(grid).shape)


def block_array(grid: BlockGrid, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """Zeros, one a block."""
    return np.zeros(block_shape(grid), dtype)


def raise_maxima(parts: Iterable[Part], values: Values, maxima: F32) -> None:
    """Raise ``maxima`` (of `block_array`) to the largest magnitude of each block that the parts meet; NaN and infinity
    stay above all.
    """
    for part in parts:
        found = maxima[part.window.blocks].view(np.uint32).copy()
        kernels.raise_maxima(part.of(values.bits), values.shift, *part.window.phase, found)
        maxima[part.window.blocks] = found.view(np.float32)


def encode(parts: Iterable[Part], values: Values, scales: F32, codes: U8, coding: Coding = E4M3) -> None:
    """Fill ``codes`` u8, one a byte, which lie as the values do. ``scales`` as of `block_array`; values that are not
    finite have no code.
    """
    for part in parts:
        given = np.ascontiguousarray(scales[part.window.blocks])
        kernels.encode_blocks(
            part.of(values.bits), values.shift, given, coding.form, coding.largest, *part.window.phase, part.of(codes)
        )


def pack(codes: U8) -> U8:
    """Codes of four bits [2 n], one a byte, as the bytes [n] that hold them."""
    packed = np.empty(codes.size // 2, np.uint8)
    kernels.pack(codes, packed)
    return packed


def unpack(packed: U8) -> U8:
    """The codes of four bits [2 n], one a byte, that bytes [n] hold."""
    codes = np.empty(2 * packed.size, np.uint8)
    kernels.unpack(packed, codes)
    return codes


def decode(parts: Iterable[Part], codes: U8, scales: F32, coding: Coding = E4M3) -> F32:
    """The values [n] of codes as float32: ``code * scale``."""
    bits = np.empty(codes.size, np.uint32)
    for part in parts:
        given = np.ascontiguousarray(scales[part.window.blocks])
        kernels.multiply_blocks(
            part.of(codes), code_values(coding.dtype), given, kernels.F32, *part.window.phase, part.of(bits)
        )
    return bits.view(np.float32)


def count_inexact(parts: Iterable[Part], values: Values, codes: U8, scales: F32, coding: Coding = E4M3) -> Counts:
    """How many elements of each block that the parts meet are not given back by their codes."""
    counts = np.zeros(scales.shape, np.int64)
    for part in parts:
        found = np.zeros(scales[part.window.blocks].shape, np.int64)
        given = np.ascontiguousarray(scales[part.window.blocks])
        kernels.count_inexact(
            part.of(values.bits), values.shift, part.of(codes), code_values(coding.dtype), given,
            ROUNDING[values.dtype], *part.window.phase, found,
        )  # fmt: skip
        counts[part.window.blocks] += found
    return counts


def largest_of_codes(parts: Iterable[Part], codes: U8, scales: F32, coding: Coding) -> F32:
    """The largest magnitude of each block, of codes as they are, one a byte; none of them is decoded."""
    largest = np.zeros(scales.shape, np.float32)
    sizes = (codes & np.uint8((1 << coding.form[0] - 1) - 1)).astype(np.uint16)  # in the order of their values
    raise_maxima(parts, Values(sizes, 16, coding.dtype), largest)
    found: F32 = code_values(coding.dtype)[largest.view(np.uint32) >> np.uint32(16)] * scales
    return found


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


def tally(parts: Iterable[Part], values: Values, codes: U8, scales: F32, before: F32, coding: Coding = E4M3) -> Tally:
    """What ``codes`` with ``scales`` lose of the values; ``before``: the scales that might have been kept (infinite
    where none).
    """
    sums, counts = np.zeros(kernels.TALLY), np.zeros(2, np.int64)
    with np.errstate(over="ignore"):
        beyond = before * coding.beyond
    for part in parts:
        given, limits = (np.ascontiguousarray(blocks[part.window.blocks]) for blocks in (scales, beyond))
        kernels.tally_blocks(
            part.of(values.bits), values.shift, part.of(codes), given, limits, coding.form, coding.beyond,
            *part.window.phase, sums, counts,
        )  # fmt: skip
    return Tally(codes.size, 0, int(counts[0]), int(counts[1]), *map(float, sums))


def arrival(
    parts: Iterable[Part], before: F32, wanted: F32, codes: U8, scales: F32, coding: Coding = E4M3
) -> tuple[Arrival, int]:
    """What became of what was to be added to values [n], and how many of those magnitudes are beyond their scale.
    ``scales`` as of `block_array`.
    """
    parts = list(parts)
    sums, counts = np.zeros(4), np.zeros(2, np.int64)
    for part in parts:
        given = np.ascontiguousarray(scales[part.window.blocks])
        arrive_blocks(
            part.of(before), part.of(wanted), part.of(codes), given, coding.form, coding.beyond,
            *part.window.phase, sums, counts,
        )  # fmt: skip
    if not np.isfinite(sums).all():  # then what is not finite is left out
        return Arrival.of(before, wanted, decode(parts, codes, scales, coding)), int(counts[1])
    return Arrival(before.size, int(counts[0]), *map(float, sums)), int(counts[1])


def within(maxima: F32, scales: F32, coding: Coding = E4M3) -> Mask:
    """Which blocks have nothing beyond their scale."""
    with np.errstate(over="ignore"):
        inside: Mask = maxima / scales <= coding.beyond
    return inside


def fits(maxima: F32, scales: F32, coding: Coding = E4M3) -> Mask:
    """Which blocks fit their scale by their largest magnitude alone. Of the others, `may_fit` says which an exact look
    decides.
    """
    with np.errstate(over="ignore"):
        large: Mask = (maxima == 0) | (maxima / scales >= coding.small)
    return large & within(maxima, scales, coding)


def may_fit(maxima: F32, scales: F32, coding: Coding = E4M3) -> Mask:
    """Blocks that are small for their scale, and keep it if it gives back every element."""
    with np.errstate(over="ignore"):
        ratio = maxima / scales
    small: Mask = (maxima > 0) & (ratio < coding.small)
    return small


def fresh_scales(
    maxima: F32, dtype: str, *, powers_of_two: bool = False, coding: Coding = E4M3, factor: Factor | None = None
) -> Scales:
    """New scales, as stored in ``dtype``, for blocks of these (finite) largest magnitudes; under a tensor's ``factor``.

    Infinite or NaN where the dtype cannot hold one: F16 for magnitudes beyond 29 million (14 as powers of two), and
    F8_E4M3 for those that the factor is too small for.
    """
    if coding.dtype == F4:
        return _of_exponent(maxima) if factor is None else _of_two_levels(maxima, factor)
    wanted = (maxima / coding.largest).astype(np.float32)
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


def _of_exponent(maxima: F32) -> U8:
    """MXFP4: the exponent of the largest magnitude less that of the largest code; 1 for zeros."""
    exponents = np.maximum(maxima.view(np.uint32) >> np.uint32(23), np.uint32(2)) - np.uint32(2)
    return np.where(maxima == 0, np.uint32(127), exponents).astype(np.uint8)


_MOST_OF_E4M3 = np.float32(464)  # what is larger does not round to 448
_LEAST_OF_E4M3 = np.float32(2.0**-9)
_NAN_OF_E4M3 = np.uint8(0x7F)


def _of_two_levels(maxima: F32, factor: Factor) -> U8:
    """NVFP4: to the nearest, never zero."""
    wanted = _under(maxima, factor)
    if factor.divides:  # compressed-tensors
        wanted = np.where(wanted <= _LEAST_OF_E4M3 / 2, np.float32(0.125), wanted)
    else:  # ModelOpt
        wanted = np.where(maxima == 0, np.float32(1), np.maximum(wanted, _LEAST_OF_E4M3))
    scales = np.empty(wanted.size, np.uint8)
    grid = BlockGrid(scales.shape, scales.shape)
    ones = np.ones((1, 1), np.float32)
    given = np.where(wanted <= _MOST_OF_E4M3, wanted, np.float32(0)).astype(np.float32).reshape(-1)
    encode(parts_of_run(grid, 0, scales.size), Values(given.view(np.uint32), 0, "F32"), ones, scales)
    return np.where(wanted <= _MOST_OF_E4M3, scales.reshape(wanted.shape), _NAN_OF_E4M3)


def _under(maxima: F32, factor: Factor) -> F32:
    """The scales of groups under a factor, before they are rounded."""
    with np.errstate(all="ignore"):
        found: F32 = maxima / E2M1.largest * factor.value if factor.divides else maxima / (E2M1.largest * factor.value)
    return found


def outgrows(largest: np.float32, factor: Factor) -> bool:
    """Whether a group of this largest magnitude needs a scale that e4m3 does not hold under the factor."""
    return not _under(np.full(1, largest, np.float32), factor)[0] <= _MOST_OF_E4M3


def small_for(largest: np.float32, factor: Factor) -> bool:
    """Whether a tensor is so small for its factor that it keeps it only if it is given back exactly."""
    return bool(largest > 0 and _under(np.full(1, largest, np.float32), factor)[0] < E4M3.small)


def choose_factor(largest: np.float32, before: Factor, *, exact: bool, fresh: bool) -> Factor:
    """The factor of before, or a new one, for a tensor of this largest magnitude. ``exact``: whether every element is
    given back by its scales of before; ``fresh``: none is kept.
    """
    if not fresh and not outgrows(largest, before) and (exact or not small_for(largest, before)):
        return before
    return fresh_factor(largest, divides=before.divides)


def fresh_factor(largest: np.float32, *, divides: bool) -> Factor:
    """A new factor for a tensor of this (finite) largest magnitude: that of the group which holds it is e4m3's largest.

    As compressed-tensors (``divides``) and ModelOpt make it, but that it is 1 where neither's is a number.
    """
    most = E2M1.largest * E4M3.largest
    with np.errstate(all="ignore"):
        value = np.float32(most / largest) if divides else np.float32(largest / most)
    return Factor(value if 0 < value < np.inf else np.float32(1), divides)


def choose_scales(
    maxima: F32,
    kept: Scales | None,
    dtype: str,
    exact: Mask | None = None,
    *,
    powers_of_two: bool = False,
    coding: Coding = E4M3,
    factor: Factor | None = None,
) -> tuple[Scales, Mask]:
    """(scales as stored in ``dtype``, which of them are ``kept``) for blocks of these largest magnitudes.

    ``kept``: the scales of before, of the same shape, or None to make all anew; ``exact``: where they give back every
    element; ``powers_of_two``: of new scales; ``factor``: of all.
    """
    fresh = fresh_scales(maxima, dtype, powers_of_two=powers_of_two, coding=coding, factor=factor)
    if kept is None:
        return fresh, np.zeros(maxima.shape, np.bool_)
    before = scale_values(kept, dtype, factor)
    keep = fits(maxima, before, coding)
    if exact is not None:
        keep = keep | (may_fit(maxima, before, coding) & exact)
    return np.where(keep, kept, fresh), keep


def round_to(values: F32, dtype: str, out: npt.NDArray[Any]) -> int:
    """Float32 values [n] as bits of ``dtype`` (BF16, F16 or F32), nearest even; returns how many finite ones became
    infinite.
    """
    return int(kernels.round_values(values, ROUNDING[dtype], out))

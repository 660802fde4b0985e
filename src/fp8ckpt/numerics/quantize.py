"""Quantize parts of a weight with given scales, and count what that loses.

The contract: ``code = e4m3fn(clamp(float32(w) / float32(scale), -448, 448))``, nearest even, for finite ``w``. Of FP8
only e4m3fn is written: no release uses another. Codes of four bits (e2m1) follow the same contract with 6 in place of
448. `fp8ckpt.numerics.scaling` decides the scales.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fp8ckpt.numerics import kernels
from fp8ckpt.numerics.arrival import Arrival, arrive_blocks
from fp8ckpt.numerics.codes import CODE_FORMATS, F4, F32, U8, code_values
from fp8ckpt.numerics.dequantize import ROUNDING
from fp8ckpt.numerics.geometry import BlockGrid, Window, as_matrices, window, windows


class Coding(NamedTuple):
    """The constants of one code dtype: its ``largest`` code, and two multiples of a scale. A magnitude above ``beyond``
    times the scale does not fit it; a block with all magnitudes below ``small`` times it is small for it.
    """

    dtype: str
    largest: np.float32
    beyond: np.float32
    small: np.float32

    @property
    def form(self) -> tuple[int, int, int]:
        """The format as the kernels take it: bits, mantissa bits, bias."""
        form = CODE_FORMATS[self.dtype]
        return form.bits, form.mantissa_bits, form.bias


E4M3 = Coding("F8_E4M3", np.float32(448), np.float32(450), np.float32(28))
E2M1 = Coding(F4, np.float32(6), np.float32(6 * 450 / 448), np.float32(4))
CODINGS = {coding.dtype: coding for coding in (E4M3, E2M1)}

Scales = npt.NDArray[Any]  # as stored: of the numpy dtype that SCALE_DTYPES gives
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


class Values(NamedTuple):
    """Values of a weight as the kernels take them: bits (u16 of bfloat16 or u32 of float32), and the left shift that
    makes them float32 bits.
    """

    bits: npt.NDArray[Any]
    shift: int
    dtype: str

    @property
    def floats(self) -> F32:
        """A copy of the values as float32."""
        return (self.bits.astype(np.uint32) << np.uint32(self.shift)).view(np.float32)


def values_of(stored: U8, dtype: str) -> Values:
    """Return bytes of BF16, F16 or F32 elements as values [n]. Float16 is widened, exactly; others are not copied."""
    if dtype == "BF16":
        return Values(stored.view(np.uint16), 16, dtype)
    if dtype == "F16":
        return Values(stored.view(np.float16).astype(np.float32).view(np.uint32), 0, dtype)
    return Values(stored.view(np.uint32), 0, dtype)


class Part(NamedTuple):
    """A window, and a function that takes it out of an array of the elements that were cut."""

    window: Window
    of: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def parts_of_run(grid: BlockGrid, start: int, count: int) -> list[Part]:
    """Return the parts of the elements ``start`` to ``start + count`` of a weight, held by arrays [count]."""

    def taking(cut: Window) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
        return lambda array: array[cut.elements].reshape(cut.rows, cut.cols)

    return [Part(cut, taking(cut)) for cut in windows(as_matrices(grid), start, count)]


def parts_of_region(grid: BlockGrid, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[Part]:
    """Return the parts of the region at ``offsets`` of ``sizes`` in the full weight, held by arrays [sizes]."""
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
    """Return the shape with one element a block in which the functions below take scales and maxima."""
    return tuple(max(1, size) for size in as_matrices(grid).shape)


def block_array(grid: BlockGrid, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """Return zeros, one a block."""
    return np.zeros(block_shape(grid), dtype)


def raise_maxima(parts: Iterable[Part], values: Values, maxima: F32) -> None:
    """Raise ``maxima`` (of `block_array`) to the largest magnitude of each block that the parts meet. NaN and infinity
    count as larger than any number.
    """
    for part in parts:
        found = maxima[part.window.blocks].view(np.uint32).copy()
        kernels.raise_maxima(part.of(values.bits), *part.window.phase, found)
        maxima[part.window.blocks] = found.view(np.float32)


def encode(parts: Iterable[Part], values: Values, scales: F32, codes: U8, coding: Coding = E4M3) -> None:
    """Fill ``codes`` u8, one a byte, in the order of the values, which are finite. ``scales`` as of `block_array`."""
    for part in parts:
        given = np.ascontiguousarray(scales[part.window.blocks])
        if not given.all():  # a block of zeros may keep a scale of zero
            given = np.where(given == 0, np.float32(1), given)
        kernels.encode_blocks(
            part.of(values.bits), given, coding.form, coding.largest, *part.window.phase, part.of(codes)
        )


def pack(codes: U8) -> U8:
    """Return the bytes [n] that hold codes of four bits [2 n], given one a byte."""
    packed = np.empty(codes.size // 2, np.uint8)
    kernels.pack(codes, packed)
    return packed


def unpack(packed: U8) -> U8:
    """Return the codes of four bits [2 n], one a byte, in the bytes [n]."""
    codes = np.empty(2 * packed.size, np.uint8)
    kernels.unpack(packed, codes)
    return codes


def decode(parts: Iterable[Part], codes: U8, scales: F32, coding: Coding = E4M3) -> F32:
    """Return the values [n] of codes as float32: ``code * scale``."""
    bits = np.empty(codes.size, np.uint32)
    for part in parts:
        given = np.ascontiguousarray(scales[part.window.blocks])
        kernels.multiply_blocks(
            part.of(codes), code_values(coding.dtype), given, kernels.F32, *part.window.phase, part.of(bits)
        )
    return bits.view(np.float32)


def count_inexact(parts: Iterable[Part], values: Values, codes: U8, scales: F32, coding: Coding = E4M3) -> Counts:
    """Return how many elements of each block that the parts meet are not given back by their codes."""
    counts = np.zeros(scales.shape, np.int64)
    for part in parts:
        found = np.zeros(scales[part.window.blocks].shape, np.int64)
        given = np.ascontiguousarray(scales[part.window.blocks])
        kernels.count_inexact(
            part.of(values.bits), part.of(codes), given, coding.form, ROUNDING[values.dtype],
            *part.window.phase, found,
        )  # fmt: skip
        counts[part.window.blocks] += found
    return counts


def largest_of_codes(parts: Iterable[Part], codes: U8, scales: F32, coding: Coding) -> F32:
    """Return the largest magnitude of each block, from codes, one a byte, without decoding them."""
    largest = np.zeros(scales.shape, np.float32)
    sizes = (codes & np.uint8((1 << coding.form[0] - 1) - 1)).astype(np.uint16)  # ordered as their values
    raise_maxima(parts, Values(sizes, 16, coding.dtype), largest)
    found: F32 = code_values(coding.dtype)[largest.view(np.uint32) >> np.uint32(16)] * scales
    return found


def count_nonfinite(values: Values) -> int:
    """Return how many values are NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(values.floats)))


@dataclass(slots=True)
class Tally:
    """The effect of quantizing on a number of elements.

    ``clipped``: magnitudes beyond the written scale; ``outgrown``: beyond the base's scale. Errors are those of
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
        for name in self.__slots__:
            joined = max if name.startswith("largest") else operator.add
            setattr(self, name, joined(getattr(self, name), getattr(other, name)))


def tally(parts: Iterable[Part], values: Values, codes: U8, scales: F32, before: F32, coding: Coding = E4M3) -> Tally:
    """Return what ``codes`` with ``scales`` lose of the values. ``before``: the base's scales, infinite without any."""
    sums, counts = np.zeros(kernels.TALLY), np.zeros(2, np.int64)
    with np.errstate(over="ignore"):
        beyond = before * coding.beyond
    for part in parts:
        given, limits = (np.ascontiguousarray(blocks[part.window.blocks]) for blocks in (scales, beyond))
        kernels.tally_blocks(
            part.of(values.bits), part.of(codes), given, limits, coding.form, coding.beyond,
            *part.window.phase, sums, counts,
        )  # fmt: skip
    return Tally(codes.size, 0, int(counts[0]), int(counts[1]), *map(float, sums))


def arrival(
    parts: Iterable[Part], before: F32, wanted: F32, codes: U8, scales: F32, coding: Coding = E4M3
) -> tuple[Arrival, int]:
    """Return how much of an update of values [n] arrives, and how many wanted magnitudes are beyond their scale.
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
    if not np.isfinite(sums).all():  # values that are not finite are left out
        return Arrival.of(before, wanted, decode(parts, codes, scales, coding)), int(counts[1])
    return Arrival(before.size, int(counts[0]), *map(float, sums)), int(counts[1])


def round_to(values: F32, dtype: str, out: npt.NDArray[Any]) -> int:
    """Round float32 values [n] to bits of ``dtype`` (BF16, F16 or F32), nearest even. Return how many finite ones
    became infinite.
    """
    return int(kernels.round_values(values, ROUNDING[dtype], out))

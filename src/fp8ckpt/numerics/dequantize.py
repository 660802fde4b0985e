"""Dequantize a window of a weight at a known place into a caller's buffer.

The contract: ``value = round_nearest_even(float32(code) * float32(scale), dtype)`` - one multiplication in float32, one
rounding. A code has 256 values, so for one scale this *is* a table of 256 entries, and dequantization is a look-up:
exact by construction, for every FP8 dtype, scale dtype and target dtype, NaN included. Scales stored as exponents
(e8m0) share 255 tables for blocks of any size. Other scales get a table a block if the block is large enough to repay
it, and are multiplied otherwise, with equal bits. One case has loops of its own, with equal bits and twice as fast:
e4m3 codes to bfloat16, the case of most releases.

A byte with two codes of four bits has 256 values too, and is looked up as a pair. The scales of its groups have one
byte as well, exponents or e4m3, so there are 256 tables; the second level of scales is multiplied into them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.numerics import kernels
from fp8ckpt.numerics.codes import (
    CODE_FORMATS,
    F4,
    F32,
    SCALE_DTYPES,
    TARGET_BYTES,
    U8,
    Factor,
    code_values,
    scale_values,
)
from fp8ckpt.numerics.geometry import BlockGrid, Window, as_matrices, bytes_of_run, window, windows

ROUNDING = {"BF16": kernels.BF16, "F16": kernels.F16, "F32": kernels.F32}
#: The least magnitudes that round to infinity, and the bits of infinity.
_OVERFLOW = {"BF16": (2 - 2**-8) * 2.0**127, "F16": 65520.0, "F32": (2 - 2**-24) * 2.0**127}
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_LEAST_ELEMENTS_PER_TABLE = 1024  # filling a table costs about as much as 400 look-ups

Bits = npt.NDArray[Any]  # u16 or u32: the bit patterns of the target dtype


def bits_dtype(dtype: str) -> type[np.uint16] | type[np.uint32]:
    """Return the unsigned numpy dtype that holds the bit patterns of a target dtype."""
    return np.uint16 if TARGET_BYTES[dtype] == 2 else np.uint32


def scale_table(scales: F32, code_dtype: str, dtype: str) -> Bits:
    """Return tables [T, 256] of the target's bit patterns, one row for each of ``scales`` [T]."""
    tables = np.empty((scales.size, 256), bits_dtype(dtype))
    kernels.fill_tables(scales, code_values(code_dtype), ROUNDING[dtype], tables)
    return tables


def pair_table(scales: F32, code_dtype: str, dtype: str) -> Bits:
    """Return tables [T, 256] of both codes of a byte, the low half first: u32 of two u16, u64 of two u32."""
    tables = np.empty((scales.size, 256), np.uint32 if TARGET_BYTES[dtype] == 2 else np.uint64)
    kernels.fill_pair_tables(scales, code_values(code_dtype), ROUNDING[dtype], tables)
    return tables


@lru_cache(maxsize=32)  # each of up to half a mebibyte; a factor belongs to one tensor
def _tables_by_byte(scale_dtype: str, factor: Factor | None, code_dtype: str, dtype: str) -> Bits:
    """Return the tables [256, 256] for every byte that a scale can be."""
    scales = scale_values(np.arange(256, dtype=np.uint8), scale_dtype, factor)
    fill = scale_table if CODE_FORMATS[code_dtype].per_byte == 1 else pair_table
    return fill(scales, code_dtype, dtype)


def count_nonfinite(codes: U8, code_dtype: str) -> int:
    """Return how many codes are NaN (or, in e5m2, infinite)."""
    form = CODE_FORMATS[code_dtype]
    test = np.array([form.nonfinite_mask, form.nonfinite_first, form.nonfinite_count], np.uint8)
    return int(kernels.count_nonfinite(codes.reshape(-1), test[0], test[1], test[2]))


def wider_codes(packed: U8, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> U8:
    """Return the codes of four bits of a region, stored in the bytes ``packed``, as e4m3 codes of the same values, one
    a byte: for callers that do not know codes of four bits.
    """
    wide = code_values("F8_E4M3").view(np.uint32).tolist()
    same = np.array([wide.index(bits) for bits in code_values(F4).view(np.uint32).tolist()], np.uint8)
    odd = offsets[-1] % 2
    both = np.stack((same[packed & 15], same[packed >> 4]), -1).reshape(*packed.shape[:-1], -1)
    return np.ascontiguousarray(both[..., odd : odd + sizes[-1]])


class Dequantizer:
    """The scales of one quantized tensor, ready for any part of its codes. Immutable; threads may share it.

    ``scales``: the stored scales, in any shape with one element a block, of the numpy dtype that
    `fp8ckpt.numerics.codes.SCALE_DTYPES` gives for ``scale_dtype``; a ``factor`` multiplies or divides all of them.
    ``dtype`` is the target: BF16, F16 or F32. If a byte holds two codes, the grid's blocks have even columns, and
    ``scale_dtype`` has one byte.
    """

    def __init__(
        self,
        grid: BlockGrid,
        scales: npt.NDArray[np.generic],
        scale_dtype: str,
        code_dtype: str,
        dtype: str,
        factor: Factor | None = None,
    ) -> None:
        self.grid = grid
        self.code_dtype = code_dtype
        self.dtype = dtype
        self._per_byte = CODE_FORMATS[code_dtype].per_byte
        self._matrices = as_matrices(grid)
        self._alone = grid.per_tensor and self._per_byte == 1
        row = BlockGrid((prod(grid.weight_shape),), (prod(grid.block_size),))
        self._run = as_matrices(row) if self._alone else self._matrices  # with one scale, rows need no ends
        blocks = tuple(max(1, size) for size in self._run.shape)  # an empty weight keeps its one scale
        scales = scales.astype(SCALE_DTYPES[scale_dtype], copy=False)
        self._values = scale_values(scales, scale_dtype, factor).reshape(blocks)
        self._multiplied = code_dtype == "F8_E4M3" and dtype == "BF16"
        self._by_byte: tuple[Bits, U8] | None = None  # tables, and the index of each block's table
        if SCALE_DTYPES[scale_dtype] is np.uint8 and not self._alone:
            self._by_byte = (
                _tables_by_byte(scale_dtype, factor, code_dtype, dtype),
                scales.view(np.uint8).reshape(blocks),
            )

    @property
    def scales(self) -> F32:
        """The scales as float32, in the grid's shape."""
        return self._values.reshape(self.grid.shape)

    @cached_property
    def may_overflow(self) -> bool:
        """Whether a finite code under the largest scale has a value beyond the target dtype."""
        codes = code_values(self.code_dtype)
        largest = float(codes[np.isfinite(codes)].max())
        return float(self._values.max(initial=0)) * largest >= _OVERFLOW[self.dtype]

    def count_overflown(self, codes: U8, bits: Bits) -> int:
        """Return how many of the values ``bits`` are infinite although their ``codes`` are finite."""
        infinite = np.isinf(code_values(self.code_dtype)) if self._per_byte == 1 else np.zeros(256, np.bool_)
        magnitudes = bits & (np.iinfo(bits.dtype).max >> 1)
        count = np.count_nonzero(magnitudes == _INFINITY[self.dtype])
        return int(count - (np.count_nonzero(infinite[codes]) if infinite.any() else 0))

    def alike(self, other: Dequantizer) -> bool:
        """Whether both give the same values for the same codes."""
        same = (self.grid, self.code_dtype, self.dtype) == (other.grid, other.code_dtype, other.dtype)
        return same and np.array_equal(self._values, other._values)

    def flat(self, codes: U8, start: int, out: Bits) -> None:
        """Dequantize the elements ``start`` to ``start + n`` in row-major order into out [n]. ``codes`` u8: their
        bytes.
        """
        for part, of_rows in self._windows(codes, start, out.size):
            self._window(of_rows, part, out[part.elements].reshape(part.rows, part.cols))

    def gives(self, codes: U8, start: int, bits: Bits) -> bool:
        """Whether `flat` would give ``bits`` [n]. False also if no loop can compare without writing."""
        return self._multiplied and all(
            kernels.e4m3_are_bf16(of_rows, self._scales(part), *part.phase, bits[part.elements].reshape(of_rows.shape))
            for part, of_rows in self._windows(codes, start, bits.size)
        )

    def _windows(self, codes: U8, start: int, count: int) -> Iterator[tuple[Window, U8]]:
        """Yield a run of elements as windows, each with its part of the bytes ``codes``."""
        before = start // self._per_byte
        for part in windows(self._run, start, count):
            first, size = bytes_of_run(start + part.elements.start, part.rows * part.cols, self._per_byte)
            yield part, codes[first - before :][:size].reshape(part.rows, -1)

    def _scales(self, part: Window) -> F32:
        """Return the scales of the blocks that a window meets [R blocks, C blocks]."""
        return np.ascontiguousarray(self._values[part.blocks])

    def region(self, codes: U8, offsets: tuple[int, ...], out: Bits) -> None:
        """Dequantize the codes of a region at ``offsets`` in the full tensor. ``out`` has the region's sizes, any
        strides.

        ``codes``: its bytes, see `fp8ckpt.numerics.geometry.bytes_of_region`; of the same shape if a byte is one code.
        """
        rank = len(self._matrices.weight_shape)
        codes = codes.reshape((1,) * (rank - codes.ndim) + codes.shape)
        out = out[(np.newaxis,) * (rank - out.ndim)]
        offsets = (0,) * (rank - len(offsets)) + offsets
        if not out.size:
            return
        for index in np.ndindex(out.shape[:-2]):
            lead = tuple(offset + i for offset, i in zip(offsets, index, strict=False))
            part = window(self._matrices, lead, offsets[-2], offsets[-1], out.shape[-2:], slice(0, 0))
            self._window(codes[index], part, out[index])

    @cached_property
    def _table(self) -> Bits:
        """The table of a weight with one scale."""
        table: Bits = scale_table(self._values.reshape(-1), self.code_dtype, self.dtype)[0]
        return table

    def _whole(self, codes: U8, out: Bits) -> None:
        """Dequantize codes [n] of a weight with one scale."""
        if self._multiplied:
            kernels.multiply_e4m3_to_bf16(
                codes[np.newaxis], self._values.reshape(1, 1), 0, 0, 1, codes.size, out[np.newaxis]
            )
        else:
            kernels.look_up(codes, self._table, out)

    def _window(self, codes: U8, part: Window, out: Bits) -> None:
        """Dequantize codes [R, bytes of C] of a window of the weight."""
        if self._alone:
            if codes.flags.c_contiguous and out.flags.c_contiguous:
                self._whole(codes.reshape(-1), out.reshape(-1))
            else:
                kernels.look_up_blocks(codes, self._table[np.newaxis], _ONE_ID, 0, 0, part.rows, part.cols, out)
            return
        if self._multiplied and codes.flags.c_contiguous and out.flags.c_contiguous:
            kernels.multiply_e4m3_to_bf16(codes, self._scales(part), *part.phase, out)
            return
        if self._by_byte is not None:
            look_up = kernels.look_up_blocks if self._per_byte == 1 else kernels.look_up_packed
            look_up(codes, self._by_byte[0], self._by_byte[1][part.blocks], *part.phase, out)
            return
        scales = self._scales(part)
        if codes.size >= _LEAST_ELEMENTS_PER_TABLE * prod(scales.shape):
            tables = scale_table(scales.reshape(-1), self.code_dtype, self.dtype)
            ids = np.arange(scales.size, dtype=np.uint32).reshape(scales.shape)
            kernels.look_up_blocks(codes, tables, ids, *part.phase, out)
        else:
            kernels.multiply_blocks(codes, code_values(self.code_dtype), scales, ROUNDING[self.dtype], *part.phase, out)


_ONE_ID = np.zeros((1, 1), np.uint32)

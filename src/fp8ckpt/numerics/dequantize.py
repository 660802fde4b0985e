"""Dequantize a window of a weight, given where it lies, into a caller's buffer.

The contract: ``value = round_nearest_even(float32(code) * float32(scale), dtype)`` - one multiplication in float32, one
rounding. A code has 256 values, so for one scale this *is* a table of 256 entries, and dequantization is a look-up: exact
by construction, for every FP8 dtype, scale dtype and target dtype, NaN included. Scales stored as exponents (e8m0) share
255 tables, whatever the size of their blocks; other scales get a table a block where the block is large enough to repay
one, and are multiplied with equal bits where it is not. One case has loops of its own, with equal bits and twice as fast: e4m3
codes of one scale to bfloat16, which is what most releases are.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.numerics import kernels
from fp8ckpt.numerics.codes import CODE_FORMATS, E8M0_DTYPES, F32, SCALE_DTYPES, TARGET_BYTES, U8, code_values, scale_values
from fp8ckpt.numerics.grid import BlockGrid

_ROUNDING = {"BF16": kernels.BF16, "F16": kernels.F16, "F32": kernels.F32}
_LEAST_ELEMENTS_PER_TABLE = 1024  # filling a table costs about as much as 400 look-ups

Bits = npt.NDArray[Any]  # u16 or u32: the bit patterns of the target dtype


def bits_dtype(dtype: str) -> type[np.uint16] | type[np.uint32]:
    """The unsigned numpy dtype that carries the bit patterns of a target dtype."""
    return np.uint16 if TARGET_BYTES[dtype] == 2 else np.uint32


def scale_table(scales: F32, code_dtype: str, dtype: str) -> Bits:
    """Tables [T, 256] of the target's bit patterns, one row for each of ``scales`` [T]."""
    tables = np.empty((scales.size, 256), bits_dtype(dtype))
    kernels.fill_tables(scales, code_values(code_dtype), _ROUNDING[dtype], tables)
    return tables


@lru_cache
def _exponent_tables(code_dtype: str, dtype: str) -> Bits:
    """The tables [256, 256] of every e8m0 exponent."""
    return scale_table(scale_values(np.arange(256, dtype=np.uint8), "U8"), code_dtype, dtype)


def count_nonfinite(codes: U8, code_dtype: str) -> int:
    """How many codes are NaN (or, in e5m2, infinite)."""
    form = CODE_FORMATS[code_dtype]
    test = np.array([form.nonfinite_mask, form.nonfinite_first, form.nonfinite_count], np.uint8)
    return int(kernels.count_nonfinite(codes.reshape(-1), test[0], test[1], test[2]))


class Dequantizer:
    """One quantized tensor's scales, ready to be applied to any part of its codes. Immutable; threads may share it.

    ``scales``: the stored scales, in any shape with one element a block, of the numpy dtype that
    `fp8ckpt.numerics.codes.SCALE_DTYPES` gives for ``scale_dtype``. ``dtype`` is the target: BF16, F16 or F32.
    """

    def __init__(self, grid: BlockGrid, scales: npt.NDArray[np.generic], scale_dtype: str, code_dtype: str, dtype: str) -> None:
        self.grid = grid
        self.code_dtype = code_dtype
        self.dtype = dtype
        # A weight of fewer than two dimensions is handled as one row.
        shape, block = (
            (1, 1, *grid.weight_shape)[-max(2, len(grid.weight_shape)) :],
            (1, 1, *grid.block_size)[-max(2, len(grid.block_size)) :],
        )
        self._shape, self._block = shape, block
        blocks = tuple(max(1, -(-dim // size)) for dim, size in zip(shape, block, strict=True))  # an empty weight has its one scale
        scales = scales.astype(SCALE_DTYPES[scale_dtype], copy=False)
        self._values = scale_values(scales, scale_dtype).reshape(blocks)
        self._exponents = scales.reshape(blocks) if scale_dtype in E8M0_DTYPES and not grid.per_tensor else None
        self._table = scale_table(self._values.reshape(-1), code_dtype, dtype)[0] if grid.per_tensor else None

    @property
    def scales(self) -> F32:
        """The scales as float32, in the grid's shape."""
        return self._values.reshape(self.grid.shape)

    def flat(self, codes: U8, start: int, out: Bits) -> None:
        """Dequantize codes u8 [n], which are the elements ``start`` to ``start + n`` in row-major order, into out [n]."""
        if self._table is not None:
            self._whole(codes, self._table, out)
            return
        cols = self._shape[-1]
        done = 0
        while done < codes.size:
            row, col = divmod(start + done, cols)
            lead, row = divmod(row, self._shape[-2])
            # A whole number of rows, as many as remain in this matrix; or the rest of a row that was entered midway.
            rows = 1 if col else min(self._shape[-2] - row, (codes.size - done) // cols) or 1
            width = min(cols - col, codes.size - done)
            part = slice(done, done + rows * width)
            self._window(codes[part].reshape(rows, width), lead, row, col, out[part].reshape(rows, width))
            done += rows * width

    def region(self, codes: U8, offsets: tuple[int, ...], out: Bits) -> None:
        """Dequantize codes of a region at ``offsets`` in the full tensor; ``out`` has the codes' shape, and any strides."""
        rank = len(self._shape)
        codes = codes.reshape((1,) * (rank - codes.ndim) + codes.shape)
        out = out[(np.newaxis,) * (rank - out.ndim)]
        offsets = (0,) * (rank - len(offsets)) + offsets
        leading = self._shape[:-2]
        for index in np.ndindex(codes.shape[:-2]):
            lead = 0
            for size, offset, i in zip(leading, offsets, index, strict=False):
                lead = lead * size + offset + i
            self._window(codes[index], lead, offsets[-2], offsets[-1], out[index])

    def _whole(self, codes: U8, table: Bits, out: Bits) -> None:
        """Codes [n] of a weight with one scale."""
        if self.code_dtype == "F8_E4M3" and self.dtype == "BF16":
            kernels.multiply_e4m3_to_bf16(codes, self._values.reshape(-1)[0], out)
        else:
            kernels.look_up(codes, table, out)

    def _window(self, codes: U8, lead: int, row: int, col: int, out: Bits) -> None:
        """A window [R, C] at (row, col) of the ``lead``-th matrix of the weight."""
        rows, cols = codes.shape
        if not rows or not cols:
            return
        if self._table is not None:
            if codes.flags.c_contiguous and out.flags.c_contiguous:
                self._whole(codes.reshape(-1), self._table, out.reshape(-1))
            else:
                kernels.look_up_blocks(codes, self._table[np.newaxis], _ONE_ID, 0, 0, rows, cols, out)
            return
        block_rows, block_cols = self._block[-2:]
        matrix = np.unravel_index(lead, self._shape[:-2]) if self._shape[:-2] else ()
        index = tuple(int(i) // size for i, size in zip(matrix, self._block, strict=False))
        window: tuple[Any, ...] = (
            *index,
            slice(row // block_rows, (row + rows - 1) // block_rows + 1),
            slice(col // block_cols, (col + cols - 1) // block_cols + 1),
        )
        phase = (row % block_rows, col % block_cols, block_rows, block_cols)
        if self._exponents is not None:
            tables = _exponent_tables(self.code_dtype, self.dtype)
            kernels.look_up_blocks(codes, tables, self._exponents[window], *phase, out)
            return
        scales = np.ascontiguousarray(self._values[window])
        if rows * cols >= _LEAST_ELEMENTS_PER_TABLE * prod(scales.shape):
            tables = scale_table(scales.reshape(-1), self.code_dtype, self.dtype)
            ids = np.arange(scales.size, dtype=np.uint32).reshape(scales.shape)
            kernels.look_up_blocks(codes, tables, ids, *phase, out)
        else:
            kernels.multiply_blocks(codes, code_values(self.code_dtype), scales, _ROUNDING[self.dtype], *phase, out)


_ONE_ID = np.zeros((1, 1), np.uint32)

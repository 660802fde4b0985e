"""The compiled loops. Nothing else imports numba, and nothing here allocates per element or knows a name or a file.

All loops release the GIL. Floating-point work is one float32 multiplication and one rounding to nearest even; there is
no fast-math, so every result is the contract's, bit for bit. Compiled code is cached on disk by numba.

Block loops work on a two-dimensional window of a weight. ``row_phase`` and ``col_phase`` say how far into its first
block the window begins, so that a window may start and stop anywhere.
"""

# mypy: disable-error-code="no-untyped-call,untyped-decorator"
# (numba ships no type information for its decorators; the functions below are typed for their callers.)

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

BF16, F16, F32 = 0, 1, 2  # rounding targets; constants so that numba folds them


@njit(nogil=True, cache=True, inline="always")
def _rounded(value: Any, target: int) -> Any:
    """Bits of a float32 rounded to nearest even in the target dtype. NaN stays a quiet NaN with its sign."""
    bits = np.float32(value).view(np.uint32)
    if target == F32:
        return bits
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = bits & np.uint32(0x7FFFFFFF)
    if target == BF16:
        if size > np.uint32(0x7F800000):
            return sign | np.uint32(0x7FC0)
        return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    if size > np.uint32(0x7F800000):
        return sign | np.uint32(0x7E00)
    if size >= np.uint32(0x477FF000):  # 65520, halfway to 65536: the even neighbour is infinity
        return sign | np.uint32(0x7C00)
    if size >= np.uint32(0x38800000):  # 2 ** -14, the least normal
        size -= np.uint32(0x38000000)
        return sign | ((size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13))
    if size <= np.uint32(0x33000000):  # 2 ** -25, halfway to the least subnormal: the even neighbour is zero
        return sign
    shift = np.uint32(126) - (size >> np.uint32(23))
    mantissa = (size & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    whole = mantissa >> shift
    rest = mantissa & ((np.uint32(1) << shift) - np.uint32(1))
    half = np.uint32(1) << (shift - np.uint32(1))
    if rest > half or (rest == half and whole & np.uint32(1)):
        whole += np.uint32(1)
    return sign | whole


@njit(nogil=True, cache=True)
def fill_tables(scales: Array, values: Array, target: int, tables: Array) -> None:
    """``tables[t, code] = round(values[code] * scales[t])``: scales f32 [T], values f32 [256], tables u16/u32 [T, 256]."""
    for t in range(scales.size):
        scale = scales[t]
        for code in range(256):
            tables[t, code] = _rounded(values[code] * scale, target)


@njit(nogil=True, cache=True)
def look_up(codes: Array, table: Array, out: Array) -> None:
    """``out[i] = table[codes[i]]``: codes u8 [n], table [256], out [n]."""
    for i in range(codes.size):
        out[i] = table[codes[i]]


_SCRATCH = 4096  # elements; with codes and results they stay in the first-level cache
_LEAST_NORMAL = 2.0**-6  # of e4m3


@njit(nogil=True, cache=True)
def multiply_e4m3_to_bf16(codes: Array, scale: Any, out: Array) -> None:
    """What `look_up` gives for e4m3fn codes and a table of bfloat16, in loops that a compiler turns into vector instructions.

    codes u8 [n], scale f32, out u16 [n]. A code's bits, moved into a float32, are its value; those of a subnormal code are read
    as ``2**-6 * (1 + m / 8)``, from which ``2**-6`` is taken: exact, and without float32 subnormals, which some processors
    handle a hundred times slower. 32-bit operations throughout, or half of a vector is wasted.
    """
    bits = np.empty(_SCRATCH, np.int32)
    values = bits.view(np.float32)
    for start in range(0, codes.size, _SCRATCH):
        part = codes[start : start + _SCRATCH]
        result = out[start : start + _SCRATCH]
        for i in range(part.size):
            size = np.int32(np.int32(part[i]) & np.int32(0x7F))
            exponent = np.int32(120 << 23) if size > np.int32(7) else np.int32(121 << 23)
            bits[i] = np.int32(np.int32(size << np.int32(20)) + exponent)
        for i in range(part.size):
            excess = np.float32(0) if (part[i] & np.uint8(0x7F)) > np.uint8(7) else np.float32(_LEAST_NORMAL)
            values[i] = (values[i] - excess) * scale
        for i in range(part.size):
            product = bits[i]
            result[i] = np.uint16(np.int32(product + np.int32(0x7FFF) + ((product >> np.int32(16)) & np.int32(1))) >> np.int32(16))
        for i in range(part.size):
            code = part[i]
            value = result[i]
            if (code & np.uint8(0x7F)) == np.uint8(0x7F):
                value = np.uint16(0x7FC0)
            result[i] = value | (np.uint16(code & np.uint8(0x80)) << np.uint16(8))


@njit(nogil=True, cache=True)
def look_up_blocks(
    codes: Array, tables: Array, ids: Array, row_phase: int, col_phase: int, block_rows: int, block_cols: int, out: Array
) -> None:
    """Look up a window with one table a block: codes u8 [R, C], ids [R blocks, C blocks] into tables [T, 256], out [R, C]."""
    rows, cols = codes.shape
    for r in range(rows):
        block_row = (row_phase + r) // block_rows
        start = 0
        block = 0
        while start < cols:
            stop = min(cols, (block + 1) * block_cols - col_phase)
            look_up(codes[r, start:stop], tables[ids[block_row, block]], out[r, start:stop])
            start = stop
            block += 1


@njit(nogil=True, cache=True)
def multiply_blocks(
    codes: Array,
    values: Array,
    scales: Array,
    target: int,
    row_phase: int,
    col_phase: int,
    block_rows: int,
    block_cols: int,
    out: Array,
) -> None:
    """The same result without tables, for blocks too small to repay one: scales f32 [R blocks, C blocks]."""
    rows, cols = codes.shape
    for r in range(rows):
        block_row = (row_phase + r) // block_rows
        start = 0
        block = 0
        while start < cols:
            stop = min(cols, (block + 1) * block_cols - col_phase)
            scale = scales[block_row, block]
            part = codes[r, start:stop]
            result = out[r, start:stop]
            for i in range(part.size):
                result[i] = _rounded(values[part[i]] * scale, target)
            start = stop
            block += 1


@njit(nogil=True, cache=True)
def count_nonfinite(codes: Array, mask: Any, first: Any, count: Any) -> int:
    """How many codes u8 [n] are NaN or infinite, by the byte test of `codes.CodeFormat`."""
    total = 0
    for i in range(codes.size):
        total += np.uint8((codes[i] & mask) - first) < count
    return total


@njit(nogil=True, cache=True)
def encode_e4m3(values: Array, scale: Any, out: Array) -> None:
    """``out[i] = e4m3fn(clamp(values[i] / scale, -448, 448))``, nearest even: values f32 [n], all finite; out u8 [n]."""
    for i in range(values.size):
        quotient = np.float32(values[i] / scale)
        bits = quotient.view(np.uint32)
        sign = (bits >> np.uint32(24)) & np.uint32(0x80)
        size = abs(quotient)
        if size >= np.float32(448):
            code = np.uint32(0x7E)
        elif size >= np.float32(2.0**-6):
            rebased = (bits & np.uint32(0x7FFFFFFF)) - np.uint32(120 << 23)
            code = (rebased + np.uint32(0x7FFFF) + ((rebased >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
        else:  # subnormal: whole steps of 2 ** -9
            code = np.uint32(np.rint(size * np.float32(512)))
        out[i] = np.uint8(sign | code)

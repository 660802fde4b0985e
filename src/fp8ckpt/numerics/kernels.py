"""The compiled loops. They allocate nothing per element, and know no names and no files.

All loops release the GIL. Floating-point work is one float32 multiplication and one rounding to nearest even; there is
no fast-math, so every result is the contract's, bit for bit. `compiled` caches the machine code.

Block loops work on a two-dimensional window of a weight. ``row_phase`` and ``col_phase`` say how far inside its first
block the window begins, so a window may start and stop anywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.numerics.compiled import compiled

Array = npt.NDArray[Any]

BF16, F16, F32 = 0, 1, 2  # rounding targets; constants so that numba folds them
_SCRATCH = 4096  # elements; with codes and results they fit the first-level cache


@compiled(inline="always")
def _rounded(value: Any, target: int) -> Any:
    """Return the bits of a float32 rounded to nearest even in the target dtype. NaN stays a quiet NaN with its sign."""
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


@compiled()
def fill_tables(scales: Array, values: Array, target: int, tables: Array) -> None:
    """``tables[t, c] = round(values[c] * scales[t])``: scales f32 [T], values f32 [256], tables u16/u32 [T, 256]."""
    for t in range(scales.size):
        scale = scales[t]
        for code in range(256):
            tables[t, code] = _rounded(values[code] * scale, target)


@compiled()
def look_up(codes: Array, table: Array, out: Array) -> None:
    """``out[i] = table[codes[i]]``: codes u8 [n], table [256], out [n]."""
    for i in range(codes.size):
        out[i] = table[codes[i]]


@compiled()
def count_codes(codes: Array, counts: Array) -> None:
    """Add to ``counts`` how often each code occurs: codes u8 [n], counts i64 [4, 256]. The sum over the first dimension
    is the count; four counters keep equal codes in a row from waiting for one another.
    """
    quarter = codes.size // 4
    for i in range(quarter):
        for k in range(4):
            counts[k, codes[4 * i + k]] += 1
    for i in range(4 * quarter, codes.size):
        counts[0, codes[i]] += 1


E4M3 = (8, 3, 7)
E2M1 = (4, 1, 1)


@compiled(inline="always")
def decoded(code: Any, form: tuple[int, int, int]) -> Any:
    """Return the magnitude f32 of a code by moving its bits into a float32. A subnormal code is read as the least
    normal plus its value, and the least normal is subtracted. This avoids float32 subnormals, which some processors
    handle a hundred times slower.
    """
    width, mantissa, bias = form
    size = np.int32(np.int32(code) & np.int32((1 << (width - 1)) - 1))
    normal = size > np.int32((1 << mantissa) - 1)
    exponent = np.int32((127 - bias) << 23) if normal else np.int32((128 - bias) << 23)
    value = np.int32(np.int32(size << np.int32(23 - mantissa)) + exponent).view(np.float32)
    return np.float32(value - (np.float32(0) if normal else np.float32(2.0 ** (1 - bias))))


@compiled(inline="always")
def _to_bf16(size: Any) -> Any:
    """Round the bits i32 of a float32 without sign, and not NaN, to bfloat16, in the low half."""
    even = np.int32(np.int32(size >> np.int32(16)) & np.int32(1))
    return np.int32(np.int32(size + np.int32(0x7FFF) + even) >> np.int32(16))


_GROUP = 32  # of MXFP8: a constant trip count makes so short a loop a tenth faster


@compiled(inline="always")
def _e4m3_as_bf16(code: Any, scale: Any) -> Any:
    """Return the bits i32 of an e4m3fn code times its scale, rounded to bfloat16, in the low half.

    Each result is cast to 32 bits, because numba widens others to 64 bits and half of a vector is wasted.
    """
    rounded = _to_bf16(np.float32(decoded(code, E4M3) * scale).view(np.int32))
    is_nan = np.int32(np.int32(code) & np.int32(0x7F)) == np.int32(0x7F)
    value = np.int32(0x7FC0) if is_nan else rounded
    return np.int32(value | np.int32(np.int32(np.int32(code) & np.int32(0x80)) << np.int32(8)))


@compiled()
def multiply_e4m3_to_bf16(
    codes: Array, scales: Array, row_phase: int, col_phase: int, block_rows: int, block_cols: int, out: Array
) -> None:
    """Do what `look_up_blocks` does for e4m3fn codes and tables of bfloat16, in a loop that compiles to vector
    instructions: codes u8 [R, C], scales f32 [R blocks, C blocks], out u16 [R, C].
    """
    rows, cols = codes.shape
    groups = cols // _GROUP if block_cols == _GROUP and col_phase == 0 else 0
    for r in range(rows):
        block_row = (row_phase + r) // block_rows
        for group in range(groups):
            at = _GROUP * group
            part, result, scale = codes[r, at : at + _GROUP], out[r, at : at + _GROUP], scales[block_row, group]
            for i in range(_GROUP):
                result[i] = np.uint16(_e4m3_as_bf16(part[i], scale))
        start = groups * _GROUP
        block = groups
        while start < cols:
            stop = min(cols, (block + 1) * block_cols - col_phase)
            scale = scales[block_row, block]
            part = codes[r, start:stop]
            result = out[r, start:stop]
            for i in range(part.size):
                result[i] = np.uint16(_e4m3_as_bf16(part[i], scale))
            start = stop
            block += 1


@compiled()
def e4m3_are_bf16(
    codes: Array, scales: Array, row_phase: int, col_phase: int, block_rows: int, block_cols: int, values: Array
) -> bool:
    """Whether `multiply_e4m3_to_bf16` would give ``values`` u16 [R, C], bit for bit. Nothing is written."""
    rows, cols = codes.shape
    for r in range(rows):
        block_row = (row_phase + r) // block_rows
        start = 0
        block = 0
        other = np.int32(0)
        while start < cols:
            stop = min(cols, (block + 1) * block_cols - col_phase)
            scale = scales[block_row, block]
            part = codes[r, start:stop]
            expected = values[r, start:stop]
            for i in range(part.size):
                other = np.int32(other | np.int32(_e4m3_as_bf16(part[i], scale) ^ np.int32(expected[i])))
            start = stop
            block += 1
        if other:
            return False
    return True


@compiled()
def look_up_blocks(
    codes: Array,
    tables: Array,
    ids: Array,
    row_phase: int,
    col_phase: int,
    block_rows: int,
    block_cols: int,
    out: Array,
) -> None:
    """Look up a window with one table a block: codes u8 [R, C], ids [R blocks, C blocks] of tables [T, 256], out [R,
    C].
    """
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


@compiled()
def fill_pair_tables(scales: Array, values: Array, target: int, tables: Array) -> None:
    """Fill ``tables[t, byte]`` with the values of the two codes of a byte times ``scales[t]``, rounded, the low code in
    the low half: scales f32 [T], values f32 [16], tables u32 [T, 256] of two u16, or u64 of two u32.
    """
    singles = np.empty(16, np.uint64)
    half = np.uint64(4 * tables.itemsize)
    for t in range(scales.size):
        scale = scales[t]
        for code in range(16):
            singles[code] = np.uint64(_rounded(values[code] * scale, target))
        for high in range(16):
            for low in range(16):
                tables[t, 16 * high + low] = singles[low] | (singles[high] << half)


@compiled()
def look_up_packed(
    codes: Array,
    tables: Array,
    ids: Array,
    row_phase: int,
    col_phase: int,
    block_rows: int,
    block_cols: int,
    out: Array,
) -> None:
    """Look up codes of four bits, two at a time: codes u8 [R, bytes of C], tables of `fill_pair_tables`, ids [R blocks,
    C blocks], out u16/u32 [R, C].

    Blocks have even columns, so a byte is in one block. If ``col_phase`` is odd, a row begins with the high half of a
    byte; it may end with a low half.
    """
    rows, cols = out.shape
    odd = col_phase & 1
    half = np.uint64(8 * out.itemsize)
    flat = tables.reshape(-1)
    for r in range(rows):
        of_row = ids[(row_phase + r) // block_rows]
        if odd:
            out[r, 0] = flat[(np.uint64(of_row[0]) << np.uint64(8)) | np.uint64(codes[r, 0])] >> half
        source, result = codes[r, odd:], out[r, odd:]
        block, phase = divmod(col_phase + odd, block_cols)
        room, left = block_cols - phase, cols - odd
        byte = np.uint64(0)  # unsigned, so that no index is checked for being negative
        while left > 0:
            count = min(room, left)
            table = np.uint64(of_row[block]) << np.uint64(8)
            for _ in range(count // 2):
                pair = flat[table | np.uint64(source[byte])]
                result[np.uint64(2) * byte] = pair
                result[np.uint64(2) * byte + np.uint64(1)] = pair >> half
                byte += np.uint64(1)
            if count & 1:
                result[np.uint64(2) * byte] = flat[table | np.uint64(source[byte])]
            left -= count
            room = block_cols
            block += 1


@compiled()
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
    """Compute the same result without tables, for blocks too small to repay one: scales f32 [R blocks, C blocks]."""
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


@compiled()
def count_nonfinite(codes: Array, mask: Any, first: Any, count: Any) -> int:
    """Return how many codes u8 [n] are NaN or infinite, by the byte test of `codes.CodeFormat`. Most runs have none:
    vector instructions test 64 codes at a time, and only a part with any is counted.
    """
    total = 0
    for start in range(0, codes.size, _SCRATCH):
        part = codes[start : start + _SCRATCH]
        found = np.uint8(0)
        for i in range(part.size):
            found = np.uint8(found | np.uint8(np.uint8((part[i] & mask) - first) < count))
        if found:
            for i in range(part.size):
                total += np.uint8((part[i] & mask) - first) < count
    return total


# ---------------------------------------------------------------- quantizing
#
# Values are bit patterns, u16 of bfloat16 or u32 of float32: shifted left by 16 or 0, both are float32. Divisions do
# not check for zero (``error_model``), or they would not become vector instructions; scales are positive. A code is one
# byte here, also one of four bits, and ``form`` describes it: its bits, the bits of its mantissa, and the exponent's
# bias. Each form has its own loop, and each result is cast to 32 bits: numba widens variable shifts and results that
# are not cast to 64 bits, and half of a vector is wasted.


@compiled(inline="always")
def _widening(values: Array) -> Any:
    """Return the left shift that makes values float32 bits, a constant when a loop is compiled."""
    return np.int32(16) if values.itemsize == 2 else np.int32(0)


@compiled()
def raise_maxima(
    values: Array, row_phase: int, col_phase: int, block_rows: int, block_cols: int, maxima: Array
) -> None:
    """Raise the ``maxima`` u32 [R blocks, C blocks] to the largest magnitude of each block of a window, as float32
    bits.

    values u16/u32 [R, C]. Bits of magnitudes have the order of the magnitudes, with infinity and NaN above all numbers.
    """
    rows, cols = values.shape
    left = np.uint32(_widening(values))
    for r in range(rows):
        block_row = (row_phase + r) // block_rows
        start = 0
        block = 0
        while start < cols:
            stop = min(cols, (block + 1) * block_cols - col_phase)
            part = values[r, start:stop]
            largest = np.uint32(0)
            for i in range(part.size):
                largest = max(largest, np.uint32((np.uint32(part[i]) << left) & np.uint32(0x7FFFFFFF)))
            maxima[block_row, block] = max(maxima[block_row, block], largest)
            start = stop
            block += 1


@compiled(inline="always")
def spread(scales: Array, row: int, start: int, col_phase: int, block_cols: int, out: Array) -> None:
    """Fill out f32 [n] with the scales of one row's elements from ``start`` on, one an element."""
    done = 0
    block = (col_phase + start) // block_cols
    while done < out.size:
        stop = min(out.size, (block + 1) * block_cols - col_phase - start)
        out[done:stop] = scales[row, block]
        done = stop
        block += 1


@compiled(inline="always", error_model="numpy")
def encode_row(values: Array, divisors: Array, most: Any, form: tuple[int, int, int], out: Array) -> None:
    """Encode values with scales f32 [n] as codes u8 [n].

    The exponent and mantissa of a code are the quotient's own bits, rounded (for e4m3 at the 20th). A quotient below
    the least normal (``2**-6``) is a number of whole steps (of ``2**-9``), and adding ``2**14`` rounds it to one.
    """
    width, mantissa, bias = form
    left = _widening(values)
    dropped, sign_at, sign_bit = np.int32(23 - mantissa), np.int32(32 - width), np.int32(1 << (width - 1))
    below, one_less = np.int32((128 - bias) << 23), np.int32((127 - bias) << 23)
    half = np.int32((1 << (22 - mantissa)) - 1)
    steps_at = np.int32((151 - bias - mantissa) << 23)  # the bits of the power of two whose last place is one step
    to_steps = np.float32(2.0 ** (24 - bias - mantissa))
    for i in range(out.size):
        value = np.int32(np.int32(values[i]) << left)
        magnitude = np.int32(value & np.int32(0x7FFFFFFF)).view(np.float32)
        quotient = np.float32(min(magnitude / divisors[i], most))
        bits = quotient.view(np.int32)
        rebased = np.int32(bits - one_less)
        even = np.int32(np.int32(rebased >> dropped) & np.int32(1))
        normal = np.int32(np.int32(rebased + half + even) >> dropped)
        subnormal = np.int32(np.float32(quotient + to_steps).view(np.int32) - steps_at)
        code = subnormal if bits < below else normal
        out[i] = np.uint8(np.int32(code | np.int32(np.int32(value >> sign_at) & sign_bit)))


@compiled(error_model="numpy")
def encode_blocks(
    values: Array,
    scales: Array,
    form: tuple[int, int, int],
    most: Any,
    row_phase: int,
    col_phase: int,
    block_rows: int,
    block_cols: int,
    out: Array,
) -> None:
    """``out = code(clamp(values / scale, -most, most))``, nearest even, in a window of finite values; out u8 [R, C].

    values u16/u32 [R, C], scales f32 [R blocks, C blocks], most f32: the largest code.
    """
    rows, cols = values.shape
    divisors = np.empty(min(cols, _SCRATCH), np.float32)
    for start in range(0, cols, _SCRATCH):
        size = min(_SCRATCH, cols - start)
        of_row = -1
        for r in range(rows):
            block_row = (row_phase + r) // block_rows
            if block_row != of_row:
                spread(scales, block_row, start, col_phase, block_cols, divisors[:size])
                of_row = block_row
            part, result = values[r, start : start + size], out[r, start : start + size]
            if form[0] == 8:
                encode_row(part, divisors, most, E4M3, result)
            else:
                encode_row(part, divisors, most, E2M1, result)


@compiled()
def pack(codes: Array, out: Array) -> None:
    """Pack codes of four bits u8 [2 n] into bytes u8 [n], the first in the low half."""
    for i in range(out.size):
        out[i] = codes[2 * i] | (codes[2 * i + 1] << np.uint8(4))


@compiled()
def unpack(packed: Array, out: Array) -> None:
    """Unpack bytes u8 [n] into codes u8 [2 n]."""
    for i in range(packed.size):
        out[2 * i] = packed[i] & np.uint8(15)
        out[2 * i + 1] = packed[i] >> np.uint8(4)


TALLY = 4  # sums: of magnitudes, of errors; the largest magnitude, the largest error


@compiled(inline="always")
def _errors_of_row(
    values: Array, codes: Array, factors: Array, form: tuple[int, int, int], sizes: Array, errors: Array
) -> None:
    """Compute the magnitudes of values, and the errors of their codes: both f32 [n]."""
    left = _widening(values)
    for i in range(codes.size):
        size = np.int32(np.int32(np.int32(values[i]) << left) & np.int32(0x7FFFFFFF)).view(np.float32)
        sizes[i] = size
        errors[i] = abs(decoded(codes[i], form) * factors[i] - size)


@compiled(inline="always")
def _add_by_halves(sizes: Array, errors: Array, sums: Array) -> None:
    """Add magnitudes and errors, both f32 [n], to the first two of ``sums``, and overwrite them. Halves are added to
    each other: vector instructions can keep that order, and it loses little.
    """
    left_over = sizes.size
    while left_over > 16:
        half = (left_over + 1) // 2
        for i in range(left_over - half):
            sizes[i] += sizes[i + half]
        for i in range(left_over - half):
            errors[i] += errors[i + half]
        left_over = half
    for i in range(left_over):
        sums[0] += np.float64(sizes[i])
        sums[1] += np.float64(errors[i])


@compiled()
def tally_blocks(
    values: Array,
    codes: Array,
    scales: Array,
    limits: Array,
    form: tuple[int, int, int],
    beyond: Any,
    row_phase: int,
    col_phase: int,
    block_rows: int,
    block_cols: int,
    sums: Array,
    counts: Array,
) -> None:
    """Add to ``sums`` f64 [4] what the codes of a window lose, and to ``counts`` i64 [2] how many values are beyond.

    The error of an element is ``abs(code * scale - value)``, in float32. sums: of magnitudes, of errors; the largest
    magnitude, the largest error. counts: magnitudes above ``beyond`` f32 times their scale, and magnitudes above
    ``limits`` f32 [R blocks, C blocks] of their block.
    """
    rows, cols = values.shape
    scratch = np.empty((4, min(cols, _SCRATCH)), np.float32)
    for start in range(0, cols, _SCRATCH):
        size = min(_SCRATCH, cols - start)
        factors, bounds, sizes, errors = scratch[0, :size], scratch[1, :size], scratch[2, :size], scratch[3, :size]
        of_row = -1
        for r in range(rows):
            block_row = (row_phase + r) // block_rows
            if block_row != of_row:
                spread(scales, block_row, start, col_phase, block_cols, factors)
                spread(limits, block_row, start, col_phase, block_cols, bounds)
                of_row = block_row
            part, coded = values[r, start : start + size], codes[r, start : start + size]
            if form[0] == 8:
                _errors_of_row(part, coded, factors, E4M3, sizes, errors)
            else:
                _errors_of_row(part, coded, factors, E2M1, sizes, errors)
            clipped, outgrown = np.int32(0), np.int32(0)
            largest, worst = np.int32(0), np.int32(0)  # as bits, which have the order of magnitudes
            for i in range(size):
                clipped = np.int32(clipped + np.int32(sizes[i] > factors[i] * beyond))
                outgrown = np.int32(outgrown + np.int32(sizes[i] > bounds[i]))
                largest = max(largest, np.float32(sizes[i]).view(np.int32))
                worst = max(worst, np.float32(errors[i]).view(np.int32))
            _add_by_halves(sizes, errors, sums)
            sums[2] = max(sums[2], np.float64(np.int32(largest).view(np.float32)))
            sums[3] = max(sums[3], np.float64(np.int32(worst).view(np.float32)))
            counts[0] += clipped
            counts[1] += outgrown


@compiled()
def compare_values(before: Array, after: Array, sums: Array) -> int:
    """Return how many of the values f32 [n] differ from those before; two NaN do not. Add to ``sums`` f64 [4], for
    elements with finite ones: magnitudes before, distances; the largest magnitude, the largest distance.
    """
    unequal = 0
    magnitudes, distances = np.empty(_SCRATCH, np.float32), np.empty(_SCRATCH, np.float32)
    for start in range(0, before.size, _SCRATCH):
        size = min(_SCRATCH, before.size - start)
        one, other = before[start : start + size], after[start : start + size]
        largest, worst = np.float32(0), np.float32(0)
        for i in range(size):
            a, b = one[i], other[i]
            unequal += (a != b) & ((a == a) | (b == b))
            magnitude, distance = abs(a), abs(a - b)
            counted = (magnitude < np.inf) & (distance < np.inf)
            magnitudes[i] = magnitude if counted else np.float32(0)
            distances[i] = distance if counted else np.float32(0)
        for i in range(size):
            largest, worst = max(largest, magnitudes[i]), max(worst, distances[i])
        _add_by_halves(magnitudes[:size], distances[:size], sums)
        sums[2] = max(sums[2], np.float64(largest))
        sums[3] = max(sums[3], np.float64(worst))
    return unequal


@compiled(inline="always")
def _count_inexact(values: Array, codes: Array, scale: Any, form: tuple[int, int, int], target: int) -> Any:
    left, sign_at = _widening(values), np.int32(32 - form[0])
    count = np.int32(0)
    for i in range(codes.size):
        value = np.int32(np.int32(values[i]) << left)
        sign = np.int32(np.int32(np.int32(codes[i]) << sign_at) & np.int32(-0x80000000))
        product = np.float32(decoded(codes[i], form) * scale).view(np.int32)
        rounded = np.int32(_to_bf16(product) << np.int32(16))
        other = product if target == F32 else rounded
        wrong = (np.int32(rounded | sign) != value) & (np.int32(other | sign) != value)
        count = np.int32(count + np.int32(wrong))
    if target == F16 and count:
        count = np.int32(0)
        for i in range(codes.size):
            value = np.int32(np.int32(values[i]) << left)
            sign = np.int32(np.int32(np.int32(codes[i]) << sign_at) & np.int32(-0x80000000))
            product = np.float32(decoded(codes[i], form) * scale).view(np.int32)
            if np.int32(np.int32(_to_bf16(product) << np.int32(16)) | sign) != value:
                given_back = np.int32(product | sign).view(np.float32)
                count += np.int32(_rounded(given_back, F16) != _rounded(value.view(np.float32), F16))
    return count


@compiled()
def count_inexact(
    values: Array,
    codes: Array,
    scales: Array,
    form: tuple[int, int, int],
    target: int,
    row_phase: int,
    col_phase: int,
    block_rows: int,
    block_cols: int,
    counts: Array,
) -> None:
    """Add to ``counts`` i64 [R blocks, C blocks] how many finite values of a window their codes do not give back.

    A value is given back if its code times the scale equals it after rounding to ``target``, or to bfloat16: a float32
    weight may be a bfloat16 one in a wider dtype.
    """
    rows, cols = values.shape
    for r in range(rows):
        block_row = (row_phase + r) // block_rows
        start = 0
        block = 0
        while start < cols:
            stop = min(cols, (block + 1) * block_cols - col_phase)
            part, coded, scale = values[r, start:stop], codes[r, start:stop], scales[block_row, block]
            if form[0] == 8:
                counts[block_row, block] += _count_inexact(part, coded, scale, E4M3, target)
            else:
                counts[block_row, block] += _count_inexact(part, coded, scale, E2M1, target)
            start = stop
            block += 1


@compiled()
def round_values(values: Array, target: int, out: Array) -> int:
    """Round float32 values [n] to ``target`` bits: out u16/u32 [n]. Return how many finite values became infinite."""
    overflown = 0
    for i in range(values.size):
        out[i] = _rounded(values[i], target)
        if target == F16:
            overflown += (out[i] & 0x7FFF) == 0x7C00 and abs(values[i]) < np.float32(np.inf)
        elif target == BF16:
            overflown += (out[i] & 0x7FFF) == 0x7F80 and abs(values[i]) < np.float32(np.inf)
    return overflown

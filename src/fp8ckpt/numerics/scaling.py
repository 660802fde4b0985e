"""The scale that a block gets: the one that it had, or a new one.

A fresh scale is ``amax / 448`` in float32, 1 if ``amax`` is 0, stored in a scale dtype and rounded up, so that nothing
clips. If scales are exponents (e8m0), or must be powers of two in another dtype, it is rounded up to a value of e8m0.
An existing scale is kept if the block still *fits* it:

- no magnitude is above 450 times the scale. The largest code is 448; 448 times the scale, rounded to bfloat16, may be
  larger by one part in 257 (449.743 times the scale), and 448 is still its nearest code;
- and the block is not so small that precision is lost: the largest magnitude is at least 28 times the scale, so that
  no more than four of e4m3's binades are unused; or the block is zero; or the scale gives back every element exactly.

So a block that was dequantized and not changed always fits, and gets its codes back.

Codes of four bits (e2m1) keep a scale if the largest magnitude is at least 4 times it. A fresh scale follows the
definition of the format. MXFP4: the OCP's ``2 ** (floor(log2(amax)) - 2)``, with which values between 6 and 8 times it
become 6. NVFP4: ``amax / 6`` under the tensor's `Factor`, rounded to the nearest e4m3 value, as compressed-tensors
and ModelOpt do (they differ where that is zero). The factor relates to these scales as a scale to e4m3 codes, and is
kept by the rule above, applied to the whole tensor.
"""

from __future__ import annotations

import numpy as np

from fp8ckpt.numerics.codes import E8M0_DTYPES, F4, F32, SCALE_DTYPES, U8, Factor, scale_values
from fp8ckpt.numerics.geometry import BlockGrid
from fp8ckpt.numerics.quantize import E2M1, E4M3, Coding, Mask, Scales, Values, encode, parts_of_run


def within(maxima: F32, scales: F32, coding: Coding = E4M3) -> Mask:
    """Return a mask of the blocks whose magnitudes are not beyond their scale."""
    with np.errstate(all="ignore"):  # a block of zeros may have a scale of zero
        inside: Mask = (maxima == 0) | (maxima / scales <= coding.beyond)
    return inside


def fits(maxima: F32, scales: F32, coding: Coding = E4M3) -> Mask:
    """Return a mask of the blocks that fit their scale by their largest magnitude alone. For those of `may_fit`, the
    exactness of their elements decides.
    """
    with np.errstate(all="ignore"):
        large: Mask = (maxima == 0) | (maxima / scales >= coding.small)
    return large & within(maxima, scales, coding)


def may_fit(maxima: F32, scales: F32, coding: Coding = E4M3) -> Mask:
    """Return a mask of the blocks that are small for their scale, and keep it if it gives back every element."""
    with np.errstate(all="ignore"):
        ratio = maxima / scales
    small: Mask = (maxima > 0) & (ratio < coding.small)
    return small


def fresh_scales(
    maxima: F32, dtype: str, *, powers_of_two: bool = False, coding: Coding = E4M3, factor: Factor | None = None
) -> Scales:
    """Return new scales, as stored in ``dtype``, for blocks with these finite largest magnitudes, under ``factor``.

    Infinite or NaN if the dtype cannot hold one: F16 for magnitudes beyond 29 million (14 as powers of two), and
    F8_E4M3 for magnitudes that the factor is too small for.
    """
    if coding.dtype == F4:
        return _of_exponent(maxima) if factor is None else _of_two_levels(maxima, factor)
    wanted = (maxima / coding.largest).astype(np.float32)
    # A quotient below float32's normal numbers may have lost bits that matter.
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
    """Return MXFP4 scales: the exponent of the largest magnitude less that of the largest code; 1 for zeros."""
    exponents = np.maximum(maxima.view(np.uint32) >> np.uint32(23), np.uint32(2)) - np.uint32(2)
    return np.where(maxima == 0, np.uint32(127), exponents).astype(np.uint8)


_MOST_OF_E4M3 = np.float32(464)  # larger values do not round to 448
_LEAST_OF_E4M3 = np.float32(2.0**-9)
_NAN_OF_E4M3 = np.uint8(0x7F)


def _of_two_levels(maxima: F32, factor: Factor) -> U8:
    """Return NVFP4 scales, rounded to the nearest, never zero."""
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
    """Return the scales of groups under a factor, before rounding."""
    with np.errstate(all="ignore"):
        found: F32 = maxima / E2M1.largest * factor.value if factor.divides else maxima / (E2M1.largest * factor.value)
    return found


def outgrows(largest: np.float32, factor: Factor) -> bool:
    """Whether a group with this largest magnitude needs a scale that e4m3 cannot hold under the factor."""
    return not _under(np.full(1, largest, np.float32), factor)[0] <= _MOST_OF_E4M3


def small_for(largest: np.float32, factor: Factor) -> bool:
    """Whether a tensor is so small for its factor that it keeps it only if it gives back every element."""
    return bool(largest > 0 and _under(np.full(1, largest, np.float32), factor)[0] < E4M3.small)


def choose_factor(largest: np.float32, before: Factor, *, exact: bool, fresh: bool) -> Factor:
    """Return the factor ``before`` or a new one, for a tensor with this largest magnitude. ``exact``: whether its
    present scales give back every element; ``fresh``: nothing is kept.
    """
    if not fresh and not outgrows(largest, before) and (exact or not small_for(largest, before)):
        return before
    return fresh_factor(largest, divides=before.divides)


def fresh_factor(largest: np.float32, *, divides: bool) -> Factor:
    """Return a new factor: the group with this finite largest magnitude of the tensor then gets e4m3's largest scale.

    It is that of compressed-tensors (``divides``) or ModelOpt, or 1 where theirs is not a positive finite number.
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
    """Return (scales as stored in ``dtype``, mask of those that are ``kept``) for blocks of these largest magnitudes.

    ``kept``: the present scales, of the same shape, or None to make all new; ``exact``: which of them give back every
    element; ``powers_of_two``: for new scales; ``factor``: of all scales.
    """
    fresh = fresh_scales(maxima, dtype, powers_of_two=powers_of_two, coding=coding, factor=factor)
    if kept is None:
        return fresh, np.zeros(maxima.shape, np.bool_)
    before = scale_values(kept, dtype, factor)
    keep = fits(maxima, before, coding)
    if exact is not None:
        keep = keep | (may_fit(maxima, before, coding) & exact)
    return np.where(keep, kept, fresh), keep

"""The compiled loops against ml_dtypes and numpy: roundings over the whole of float32, and the encoding of e4m3."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fp8ckpt.numerics import kernels
from fp8ckpt.numerics.codes import FP8_DTYPES
from fp8ckpt.numerics.dequantize import count_nonfinite
from fp8ckpt.numerics.quantize import E4M3
from tests.oracle import NUMPY
from tests.support import examples

ONE = np.ones(1, np.float32)


def rounded(patterns: np.ndarray, target: int) -> np.ndarray:
    """The kernels' rounding of float32 bit patterns: each is put into a table whose scale is 1."""
    patterns = patterns.astype(np.uint32)
    padded = np.concatenate([patterns, np.zeros(-patterns.size % 256, np.uint32)])
    out = np.empty(padded.size, np.uint32 if target == kernels.F32 else np.uint16)
    for i in range(0, padded.size, 256):
        kernels.fill_tables(ONE, padded[i : i + 256].view(np.float32), target, out[np.newaxis, i : i + 256])
    return out[: patterns.size]


def check_rounding(patterns: np.ndarray) -> None:
    values = patterns.astype(np.uint32).view(np.float32)
    nan = np.isnan(values)
    with np.errstate(all="ignore"):
        expected = {
            kernels.BF16: values.astype(ml_dtypes.bfloat16).view(np.uint16),
            kernels.F16: values.astype(np.float16).view(np.uint16),
        }
    sign = (values.view(np.uint32) >> 16 & 0x8000).astype(np.uint16)
    for target, quiet in ((kernels.BF16, 0x7FC0), (kernels.F16, 0x7E00)):
        got = rounded(patterns, target)
        np.testing.assert_array_equal(got[~nan], expected[target][~nan])
        np.testing.assert_array_equal(got[nan], sign[nan] | quiet)


def boundaries() -> np.ndarray:
    """Around every exponent and every rounding boundary of the 16-bit targets, both signs."""
    exponents = np.arange(256, dtype=np.int64) << 23
    steps = np.array([0, 1, 2], np.int64)
    inside = np.concatenate([1 << np.arange(23), 0x7FFFFF - (1 << np.arange(23)), 3 << np.arange(22), [0, 0x7FFFFF]])
    near = np.concatenate([inside + step for step in steps] + [inside - step for step in steps])
    patterns = (exponents[:, np.newaxis] + near).reshape(-1)
    patterns = np.unique(patterns[(patterns >= 0) & (patterns < 1 << 31)])
    return np.concatenate([patterns, patterns | 1 << 31])


def test_rounding_at_every_boundary() -> None:
    """Ties, the last bit kept, the first bit dropped and their neighbours, in every exponent."""
    check_rounding(boundaries())


@pytest.mark.parametrize("start", [0, 977])
def test_rounding_over_all_of_float32(start: int) -> None:
    """A stride over the 2**32 patterns that is coprime to every power of two."""
    check_rounding(np.arange(start, 2**32, 4099, dtype=np.uint64))


def test_rounding_of_every_bf16_and_its_halfway_points() -> None:
    """Each bf16 pattern is itself, and the tie above each goes to the even one."""
    upper = np.arange(65536, dtype=np.uint64) << 16
    check_rounding(np.concatenate([upper, upper | 0x8000, upper | 0x7FFF, upper | 0x8001]))


def test_rounding_of_every_f16_and_its_halfway_points() -> None:
    """Each finite float16 is itself, and the tie between two neighbours goes to the even one, subnormals included."""
    values = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    ties = np.append((values[:-1] + values[1:]) / 2, 65520).astype(np.float32)  # exact: two more bits than float16 has
    around = ties.view(np.uint32).astype(np.int64)
    patterns = np.concatenate([values.astype(np.float32).view(np.uint32), around, around - 1, around + 1])
    check_rounding(np.concatenate([patterns, patterns | 1 << 31]))


@examples(200)
@given(hnp.arrays(np.uint32, st.integers(1, 64), elements=st.integers(0, 2**32 - 1)))
def test_rounding_of_any_pattern(patterns: np.ndarray) -> None:
    """Whatever the bits are."""
    check_rounding(patterns)


def test_float32_is_not_rounded() -> None:
    """The float32 target keeps every bit pattern; a signalling NaN is quieted, as any multiplication does."""
    patterns = np.concatenate([np.arange(0, 2**32, 65521, dtype=np.uint64), [0x7FC00000, 0xFFC00000, 2**31]]).astype(
        np.uint32
    )
    expected = np.where(np.isnan(patterns.view(np.float32)), patterns | 0x400000, patterns)
    np.testing.assert_array_equal(rounded(patterns, kernels.F32), expected)


def test_tables_multiply_in_float32() -> None:
    """One float32 product, with its underflow and overflow, before the rounding."""
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**32, 256, np.uint32).view(np.float32)
    scales = np.concatenate(
        [rng.integers(1, 0x7F800000, 200, np.uint32).view(np.float32), np.float32([1e-45, 2**-127, 3e38, 1])]
    )
    out = np.empty((scales.size, 256), np.uint16)
    kernels.fill_tables(scales, values, kernels.BF16, out)
    with np.errstate(all="ignore"):
        products = values[np.newaxis] * scales[:, np.newaxis]
    assert products.dtype == np.float32
    nan = np.isnan(products)
    np.testing.assert_array_equal(out[~nan], products.astype(ml_dtypes.bfloat16).view(np.uint16)[~nan])
    np.testing.assert_array_equal(out[nan] & 0x7FFF, 0x7FC0)


def encoded(values: np.ndarray, scale: float) -> np.ndarray:
    out = np.empty((1, values.size), np.uint8)
    bits = values.view(np.uint32)[np.newaxis]
    scales = np.full((1, 1), scale, np.float32)
    kernels.encode_blocks(bits, scales, E4M3.form, E4M3.largest, 0, 0, 1, max(1, values.size), out)
    return out[0]


def check_encoding(values: np.ndarray, scale: float) -> None:
    values = values[np.isfinite(values)]
    with np.errstate(all="ignore"):
        quotients = np.clip(values / np.float32(scale), np.float32(-448), np.float32(448))
    assert quotients.dtype == np.float32
    np.testing.assert_array_equal(encoded(values, scale), quotients.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_encoding_over_all_of_float32() -> None:
    """A stride over the finite float32 values, clamped and rounded as ml_dtypes does it."""
    check_encoding(np.arange(0, 2**32, 8191, dtype=np.uint64).astype(np.uint32).view(np.float32), 1)


def test_encoding_at_every_boundary() -> None:
    """Neighbours of each power of two and of each rounding bit."""
    check_encoding(boundaries().astype(np.uint32).view(np.float32), 1)


def test_encoding_of_every_code_and_its_halfway_points() -> None:
    """Each finite code is itself, and the tie between neighbours goes to the even code."""
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(encoded(values, 1), codes)
    positive = values[:127]
    ties = (positive[:-1] + positive[1:]) / 2
    around = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))]).astype(
        np.float32
    )
    check_encoding(np.concatenate([around, -around]), 1)
    np.testing.assert_array_equal(encoded(ties, 1) & 1, 0)


def test_encoding_clamps() -> None:
    """What is above 448 becomes 448 and never NaN, the largest float32 included."""
    values = np.array([448, 449, 464, 480, 1e30, 3.4028235e38], np.float32)
    assert set(encoded(values, 1).tolist()) == {0x7E}
    assert set(encoded(-values, 1).tolist()) == {0xFE}
    assert encoded(np.array([3e38], np.float32), 1e-30).tolist() == [0x7E]  # the quotient is infinite


@pytest.mark.parametrize("scale", [2.0**-9, 1.37e-3, 0.1, 3.0, 448.0, 1e-40, 1e38])
def test_encoding_divides_in_float32(scale: float) -> None:
    """One float32 division, then the clamp and one rounding."""
    rng = np.random.default_rng(2)
    values = np.concatenate(
        [rng.integers(0, 2**32, 20000, np.uint32).view(np.float32), rng.standard_normal(20000).astype(np.float32) * 448]
    )
    check_encoding(values, scale)
    check_encoding((np.clip(rng.standard_normal(20000) * 200 * scale, -3e38, 3e38)).astype(np.float32), scale)


@examples(200)
@given(
    hnp.arrays(np.float32, st.integers(0, 64), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    st.floats(min_value=2.0**-126, allow_nan=False, allow_infinity=False, width=32),
)
def test_encoding_of_any_value(values: np.ndarray, scale: float) -> None:
    """Whatever the values and the scale are."""
    check_encoding(values, scale)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("size", [0, 1, 31, 4099])
def test_count_nonfinite(dtype: str, size: int) -> None:
    """As many as ml_dtypes finds, for lengths that are no multiple of a vector."""
    codes = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert count_nonfinite(codes, dtype) == np.count_nonzero(~np.isfinite(codes.view(NUMPY[dtype]).astype(np.float32)))

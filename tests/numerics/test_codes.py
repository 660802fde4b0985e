"""Every bit pattern of codes and scales, against ml_dtypes and IEEE 754 as Python's struct reads it."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest

from fp8ckpt.numerics.codes import (
    CODE_FORMATS,
    E8M0_DTYPES,
    F4,
    FP8_DTYPES,
    SCALE_DTYPES,
    Factor,
    code_values,
    count_bad_scales,
    scale_values,
)
from fp8ckpt.numerics.dequantize import count_nonfinite
from tests.oracle import NUMPY

ALL_CODES = np.arange(256, dtype=np.uint8)
ALL_16 = np.arange(65536, dtype=np.uint16)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view({2: np.uint16, 4: np.uint32}[values.itemsize])


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_all_codes_equal_ml_dtypes_bitwise(dtype: str) -> None:
    """Each of the 256 codes is the float32 of ml_dtypes, bit for bit: zeros' and NaNs' signs included."""
    np.testing.assert_array_equal(bits(code_values(dtype)), bits(ALL_CODES.view(NUMPY[dtype]).astype(np.float32)))


def test_known_values_of_e4m3() -> None:
    """The landmarks of the OCP table: zero, least subnormal, least normal, one, 448 and both NaNs."""
    values = code_values("F8_E4M3")
    assert [values[c] for c in (0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0xFE)] == [0, 2**-9, 7 * 2**-9, 2**-6, 1, 448, -448]
    assert bits(values)[[0x80, 0x7F, 0xFF]].tolist() == [0x80000000, 0x7FC00000, 0xFFC00000]


def test_all_codes_of_four_bits_equal_ml_dtypes_bitwise() -> None:
    """Each of the 16, negative zero included; none is NaN or infinite."""
    codes = ALL_CODES[:16]
    np.testing.assert_array_equal(bits(code_values(F4)), bits(codes.view(NUMPY[F4]).astype(np.float32)))
    assert code_values(F4).tolist()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert bits(code_values(F4))[8] == 0x80000000
    assert count_nonfinite(ALL_CODES, F4) == 0


def test_the_formats_are_those_of_safetensors() -> None:
    """All FP8 dtypes that safetensors can name are decoded, and e8m0 is not one of them; of smaller ones, F4."""
    assert set(CODE_FORMATS) - set(FP8_DTYPES) == {F4}
    assert set(FP8_DTYPES) == {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


def test_the_table_cannot_be_changed() -> None:
    """Callers share one table, so it refuses writes."""
    with pytest.raises(ValueError, match="read-only"):
        code_values("F8_E4M3")[0] = 1


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_each_code_counts_as_nonfinite_exactly_where_it_is(dtype: str) -> None:
    """The byte test of a format agrees with its values, code by code."""
    finite = np.isfinite(ALL_CODES.view(NUMPY[dtype]).astype(np.float32))
    counted = [count_nonfinite(ALL_CODES[c : c + 1].copy(), dtype) for c in range(256)]
    assert counted == (~finite).astype(int).tolist()


def test_bf16_scales_are_exact() -> None:
    """All 65,536 bf16 patterns become the float32 with the same upper half."""
    got = scale_values(ALL_16, "BF16")
    np.testing.assert_array_equal(bits(got), bits(ALL_16.view(ml_dtypes.bfloat16).astype(np.float32)))


def test_f16_scales_are_exact() -> None:
    """All 65,536 float16 patterns become the float32 of the same value; NaN stays NaN."""
    got = scale_values(ALL_16.view(np.float16), "F16")
    expected = np.array([struct.unpack("<e", struct.pack("<H", pattern))[0] for pattern in range(65536)]).astype(
        np.float32
    )
    nan = np.isnan(expected)
    assert nan.sum() == 2 * 1023
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(bits(got)[~nan], bits(expected)[~nan])


def test_f32_scales_are_themselves() -> None:
    """A float32 scale keeps its bits, whatever they are."""
    patterns = np.concatenate(
        [np.arange(0, 2**32, 65521, dtype=np.uint64), [2**32 - 1, 0x7F800000, 0x7F800001, 0x80000000]]
    ).astype(np.uint32)
    np.testing.assert_array_equal(bits(scale_values(patterns, "F32")), patterns)


@pytest.mark.parametrize("dtype", E8M0_DTYPES)
def test_e8m0_scales_are_exact(dtype: str) -> None:
    """All 256 exponents, as U8 and as F8_E8M0: 2 ** (byte - 127), subnormal at 0, NaN at 255."""
    got = scale_values(ALL_CODES, dtype)
    np.testing.assert_array_equal(bits(got), bits(ALL_CODES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)))
    assert [float(v) for v in got[:255]] == [2.0 ** (e - 127) for e in range(255)]
    assert np.isnan(got[255])


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (2, 1, 3, 1), (0, 4)])
def test_scale_shapes_are_kept(dtype: str, shape: tuple[int, ...]) -> None:
    """The shape of the scales survives, 0-d and empty included."""
    stored = np.full(shape, 1, SCALE_DTYPES[dtype])
    assert scale_values(stored, dtype).shape == shape
    assert scale_values(stored, dtype).dtype == np.float32


def test_e4m3_scales_are_exact() -> None:
    """All 256 patterns, as codes have them."""
    got = scale_values(ALL_CODES, "F8_E4M3")
    np.testing.assert_array_equal(bits(got), bits(ALL_CODES.view(NUMPY["F8_E4M3"]).astype(np.float32)))


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("value", [1.0, 0.1, 2688 / 0.37, 1e-30, 3e38])
def test_a_factor_is_one_operation_in_float32(value: float, *, divides: bool) -> None:
    """Each scale times it, or divided by it, rounded once."""
    factor, scales = np.float32(value), ALL_CODES.view(NUMPY["F8_E4M3"]).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = scales / factor if divides else scales * factor
    got = scale_values(ALL_CODES, "F8_E4M3", Factor(factor, divides))
    assert got.dtype == np.float32
    nan = np.isnan(expected)
    np.testing.assert_array_equal(bits(got)[~nan], bits(expected)[~nan])
    assert np.isnan(got[nan]).all()


def test_scale_values_leaves_its_input_alone() -> None:
    """The stored bytes are not changed where exponents are rewritten."""
    stored = np.array([0, 1, 255], np.uint8)
    scale_values(stored, "U8")
    assert stored.tolist() == [0, 1, 255]


@pytest.mark.parametrize(("values", "bad"), [
    ([], 0),
    ([1.0, 2.0, 1e-45, 3.4e38], 0),
    ([np.nan], 1),
    ([-np.nan, np.inf, -np.inf], 3),
    ([0.0, -0.0], 2),
    ([-1.0, 1.0, -1e-45], 2),
])  # fmt: skip
def test_count_bad_scales(values: list[float], bad: int) -> None:
    """NaN, infinite, zero and negative scales are counted; subnormal and huge ones are not."""
    assert count_bad_scales(np.array(values, np.float32)) == bad


def test_count_bad_scales_takes_every_shape() -> None:
    """A 0-d scale and a grid are counted alike."""
    assert count_bad_scales(np.array(np.nan, np.float32)) == 1
    assert count_bad_scales(np.array([[1, 0], [0, 1]], np.float32)) == 2


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_bad_scales_among_all_16_bit_patterns(dtype: str) -> None:
    """Of 65,536 patterns, bad are the negative half, zero, infinity and the NaNs."""
    form = {"BF16": (8, 7), "F16": (5, 10)}[dtype]
    good = ((1 << form[0]) - 1 << form[1]) - 1
    assert count_bad_scales(scale_values(ALL_16.view(SCALE_DTYPES[dtype]), dtype)) == 65536 - good

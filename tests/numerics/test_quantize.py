"""Quantization of any part of a weight against the oracle, bit for bit; fresh scales, and which scales are kept."""

from __future__ import annotations

import warnings
from fractions import Fraction
from itertools import pairwise, product
from math import prod

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt.numerics.codes import FP8_SCALES, SCALE_DTYPES, scale_values
from fp8ckpt.numerics.dequantize import Dequantizer, bits_dtype
from fp8ckpt.numerics.geometry import BlockGrid, infer_grid
from fp8ckpt.numerics.quantize import (
    Tally,
    block_array,
    count_inexact,
    count_nonfinite,
    encode,
    parts_of_region,
    parts_of_run,
    raise_maxima,
    round_to,
    tally,
    values_of,
)
from fp8ckpt.numerics.scaling import fits, fresh_scales, may_fit
from tests import oracle
from tests.numerics.test_dequantize import draw_scales
from tests.oracle import NUMPY, Stored
from tests.support import examples

Shape = tuple[int, ...]
VALUE_DTYPES = ("BF16", "F16", "F32")
LARGEST = {dtype: float(ml_dtypes.finfo(NUMPY[dtype]).max) for dtype in VALUE_DTYPES}
FINITE_CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
INFINITY = np.float32(np.inf)

#: Every kind of grid: weight shape and block size.
GRIDS = {
    "per tensor": ((40, 24), (40, 24)),
    "per tensor, wide": ((3, 9001), (3, 9001)),
    "channel [o,1]": ((33, 70), (1, 70)),
    "channel [o,1], wide": ((3, 9001), (1, 9001)),
    "channel [1,i]": ((33, 70), (33, 1)),
    "blocks of 128, ragged": ((300, 200), (128, 128)),
    "blocks of 128, wide": ((130, 4500), (128, 128)),
    "blocks of 600, wide": ((5, 9001), (2, 600)),  # a kernel's scratch ends inside a block
    "blocks of 128, whole": ((256, 256), (128, 128)),
    "experts [E,1,1]": ((3, 20, 16), (1, 20, 16)),
    "experts [E,1,i]": ((3, 20, 16), (1, 20, 1)),
    "experts in blocks": ((3, 130, 200), (1, 128, 128)),
    "1x32": ((24, 100), (1, 32)),
    "small odd blocks": ((23, 31), (3, 5)),
    "blocks in every dimension": ((5, 7, 9), (2, 3, 4)),
    "4-D": ((2, 3, 5, 7), (1, 2, 2, 3)),
    "every element": ((7, 9), (1, 1)),
    "1-D": ((301,), (301,)),
    "1-D in blocks": ((301,), (128,)),
    "one element": ((1,), (1,)),
    "0-d": ((), ()),
}


def draw_values(rng: np.random.Generator, dtype: str, scales: np.ndarray) -> Stored:
    """Finite values for scales [shape]: most near the codes, some of every magnitude, zeros of both signs, and exact
    multiples.
    """
    shape = scales.shape
    width = np.dtype(NUMPY[dtype]).itemsize
    codes = rng.choice(FINITE_CODES, shape).view(NUMPY["F8_E4M3"]).astype(np.float64)
    near = scales.astype(np.float64) * rng.standard_normal(shape) * np.exp2(rng.uniform(-12, 9, shape))
    wanted = np.clip(np.where(rng.random(shape) < 0.4, scales * codes, near), -LARGEST[dtype], LARGEST[dtype])
    found = np.asarray(wanted, np.float32).astype(NUMPY[dtype])
    patterns = rng.integers(0, 256, (*shape, width), np.uint8).view(NUMPY[dtype]).reshape(shape)
    kind = rng.random(shape)
    found = np.where(kind < 0.1, patterns, found)
    found = np.where(kind > 0.95, np.float32(-0.0).astype(NUMPY[dtype]), found)
    found = np.where(np.isfinite(found.astype(np.float32)), found, np.float32(0).astype(NUMPY[dtype]))
    return Stored(dtype, shape, np.ascontiguousarray(found).tobytes())


def stored_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, in order, in memory of their own."""
    return np.frombuffer(bytearray(np.ascontiguousarray(array).tobytes()), np.uint8)


class Case:
    """A weight with scales, and what the oracle makes of them."""

    def __init__(self, shape: Shape, block: Shape, dtype: str, scale_dtype: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.grid = BlockGrid(shape, block)
        self.dtype = dtype
        self.scale_dtype = scale_dtype
        self.scale = draw_scales(rng, scale_dtype, self.grid.shape)
        self.blocks = block_array(self.grid, np.float32).shape
        self.scales = oracle.scale_floats(self.scale).reshape(self.blocks)
        self.stored = draw_values(rng, dtype, oracle.spread(self.scales, shape, block))
        self.codes = np.frombuffer(oracle.quantize(self.stored, self.scale, block), np.uint8).reshape(shape)
        self.maxima = oracle.maxima(self.stored, block).reshape(self.blocks)

    def inexact(self) -> np.ndarray:
        """How many elements of each block the codes do not give back, in the values' dtype or in bfloat16."""
        exact = np.zeros(self.grid.weight_shape, bool)
        wide = self.stored.array.astype(np.float32).view(np.uint32)
        for dtype in (self.dtype, "BF16"):
            given_back = oracle.dequantize(Stored.codes(self.codes), self.scale, self.grid.block_size, dtype)
            exact |= (
                np.frombuffer(given_back, NUMPY[dtype]).reshape(exact.shape).astype(np.float32).view(np.uint32) == wide
            )
        counts = np.zeros(self.grid.shape, np.int64)
        blocks = (np.arange(dim) // size for dim, size in zip(exact.shape, self.grid.block_size, strict=True))
        np.add.at(counts, np.ix_(*blocks), ~exact)
        return counts.reshape(self.blocks)

    def check_runs(self, cuts: list[int]) -> None:
        """Cut at places in row-major order, and put together again."""
        flat = self.stored.array.reshape(-1)
        maxima = block_array(self.grid, np.float32)
        codes = np.full(flat.size, 0xAB, np.uint8)
        inexact = block_array(self.grid, np.int64)
        for start, stop in pairwise([0, *cuts, flat.size]):
            parts = parts_of_run(self.grid, start, stop - start)
            values = values_of(stored_bytes(flat[start:stop]), self.dtype)
            raise_maxima(parts, values, maxima)
            encode(parts, values, self.scales, codes[start:stop])
            inexact += count_inexact(parts, values, codes[start:stop], self.scales)
        self._compare(maxima, codes, inexact)

    def check_regions(self, cuts: list[list[int]]) -> None:
        """Cut at places along each dimension, and put together again."""
        shape = self.grid.weight_shape
        maxima = block_array(self.grid, np.float32)
        codes = np.full(shape, 0xAB, np.uint8)
        inexact = block_array(self.grid, np.int64)
        for spans in product(*(pairwise([0, *places, dim]) for places, dim in zip(cuts, shape, strict=True))):
            window = tuple(slice(start, stop) for start, stop in spans)
            sizes = tuple(stop - start for start, stop in spans)
            parts = parts_of_region(self.grid, tuple(start for start, _ in spans), sizes)
            values = values_of(stored_bytes(self.stored.array[window]), self.dtype)
            raise_maxima(parts, values, maxima)
            part = np.full(prod(sizes), 0xAB, np.uint8)
            encode(parts, values, self.scales, part)
            codes[window] = part.reshape(sizes)
            inexact += count_inexact(parts, values, part, self.scales)
        self._compare(maxima, codes, inexact)

    def _compare(self, maxima: np.ndarray, codes: np.ndarray, inexact: np.ndarray) -> None:
        np.testing.assert_array_equal(maxima.view(np.uint32), self.maxima.view(np.uint32))
        np.testing.assert_array_equal(codes.reshape(-1), self.codes.reshape(-1))
        np.testing.assert_array_equal(inexact, self.inexact())


_dims = {0: st.just(1), 1: st.integers(1, 200), 2: st.integers(1, 30), 3: st.integers(1, 9), 4: st.integers(1, 5)}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.integers(0, 4).flatmap(lambda rank: st.tuples(*[_dims[rank]] * rank)))
    block = tuple(draw(st.one_of(st.integers(1, dim + 1), st.sampled_from([1, dim, 7, 16]))) for dim in shape)
    dtype, scale_dtype = draw(st.sampled_from(VALUE_DTYPES)), draw(st.sampled_from(list(FP8_SCALES)))
    return Case(shape, block, dtype, scale_dtype, draw(st.integers(0, 2**32 - 1)))


@examples(300)
@given(cases(), st.data())
def test_runs_equal_the_oracle(case: Case, data: st.DataObject) -> None:
    """Codes, maxima and counts of a weight that was cut anywhere in row-major order, empty runs included."""
    case.check_runs(sorted(data.draw(st.lists(st.integers(0, case.codes.size), max_size=4))))


@examples(300)
@given(cases(), st.data())
def test_regions_equal_the_oracle(case: Case, data: st.DataObject) -> None:
    """The same of a weight that was cut anywhere along each dimension, empty regions included."""
    case.check_regions([sorted(data.draw(st.lists(st.integers(0, dim), max_size=2))) for dim in case.grid.weight_shape])


@examples(150)
@given(cases(), st.data())
def test_a_part_alone_equals_the_oracle(case: Case, data: st.DataObject) -> None:
    """The largest magnitude in one region is taken of that region only, and lowers no maximum that is there already."""
    spans = [sorted(data.draw(st.tuples(st.integers(0, dim), st.integers(0, dim)))) for dim in case.grid.weight_shape]
    window = tuple(slice(*span) for span in spans)
    inside = np.zeros(case.grid.weight_shape, np.float32)
    inside[window] = case.stored.array.astype(np.float32)[window]
    expected = oracle.maxima(Stored.of(inside, "F32"), case.grid.block_size).reshape(case.blocks)
    parts = parts_of_region(case.grid, tuple(start for start, _ in spans), tuple(stop - start for start, stop in spans))
    values = values_of(stored_bytes(case.stored.array[window]), case.dtype)
    for floor in (0, 1.5, 3e38):
        maxima = np.full(case.blocks, floor, np.float32)
        raise_maxima(parts, values, maxima)
        np.testing.assert_array_equal(maxima, np.maximum(expected, np.float32(floor)))


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("kind", GRIDS)
def test_every_kind_of_grid(kind: str, dtype: str) -> None:
    """Whole, in runs, and in regions that start and stop inside blocks; with scales of every dtype in turn."""
    shape, block = GRIDS[kind]
    scale_dtype = list(FP8_SCALES)[list(GRIDS).index(kind) % len(FP8_SCALES)]
    case = Case(shape, block, dtype, "F8_E8M0" if kind == "1x32" else scale_dtype, 9)
    case.check_runs([])
    case.check_runs([case.codes.size // 3, case.codes.size // 2, case.codes.size * 9 // 10])
    case.check_regions([[dim // 2] for dim in shape])


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_rows_longer_than_the_scratch(dtype: str) -> None:
    """What is worked on at once may begin and end in any block of a row."""
    case = Case((3, 9000), (2, 128), dtype, "F32", 9)
    case.check_runs([4100, 13001])
    case.check_regions([[1], [70, 8900]])


@pytest.mark.parametrize("scale_dtype", FP8_SCALES)
@pytest.mark.parametrize("kind", GRIDS)
def test_fresh_scales_of_every_kind_of_grid(kind: str, scale_dtype: str) -> None:
    """From values to maxima to stored scales to codes, a block of zeros among them."""
    shape, block = GRIDS[kind]
    grid = BlockGrid(shape, block)
    values = np.random.default_rng(3).standard_normal(shape) * np.exp2(np.random.default_rng(4).uniform(-10, 3, shape))
    values = np.array(values)
    values[tuple(slice(0, size) for size in block)] *= not grid.per_tensor
    for dtype in VALUE_DTYPES:
        stored = Stored.of(values, dtype)
        given = values_of(stored_bytes(stored.array), dtype)
        parts = parts_of_run(grid, 0, values.size)
        maxima = block_array(grid, np.float32)
        raise_maxima(parts, given, maxima)
        fresh = fresh_scales(maxima, scale_dtype)
        assert fresh.dtype == SCALE_DTYPES[scale_dtype]
        expected = oracle.fresh_scale(stored, block, scale_dtype)
        assert fresh.tobytes() == expected.data
        codes = np.empty(values.size, np.uint8)
        encode(parts, given, scale_values(fresh, scale_dtype), codes)
        assert codes.tobytes() == oracle.quantize(stored, expected, block)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 4, 4), (3, 0, 4)])
def test_a_weight_without_elements(shape: Shape) -> None:
    """It has no parts, and one scale, which is fresh as 1."""
    grid = infer_grid(shape, (), None)
    assert grid is not None
    assert parts_of_run(grid, 0, 0) == []
    assert parts_of_region(grid, (0,) * len(shape), shape) == []
    maxima = block_array(grid, np.float32)
    assert maxima.size == 1
    raise_maxima([], values_of(np.empty(0, np.uint8), "BF16"), maxima)
    assert fresh_scales(maxima, "F32").view(np.float32).reshape(-1).tolist() == [1]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("scale", [1.0, 448.0, 1.37e-3, 0.1, 2.0**-9, 2.0**-126, 2.0**-130, 1e-45, 2.0**100, 3.38e38])
def test_every_bf16_value(scale: float) -> None:
    """All 65,536 patterns but NaN and infinity, under usual scales, subnormal ones and the largest."""
    patterns = np.arange(65536, dtype=np.uint16)
    patterns = patterns[patterns & 0x7F80 != 0x7F80]
    codes = np.empty(patterns.size, np.uint8)
    grid = BlockGrid(patterns.shape, patterns.shape)
    encode(
        parts_of_run(grid, 0, patterns.size),
        values_of(patterns.view(np.uint8), "BF16"),
        np.full((1, 1), scale, np.float32),
        codes,
    )
    expected = oracle.quantize(
        Stored("BF16", patterns.shape, patterns.tobytes()), Stored.of(np.float32([scale]), "F32"), grid.block_size
    )
    np.testing.assert_array_equal(codes, np.frombuffer(expected, np.uint8))


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-149, 2.0**-140, 2.0**-24, 2.0**-130 * 1.3])
def test_zeros_and_subnormals(dtype: str, scale: float) -> None:
    """A zero keeps its sign; nothing is flushed to zero that the contract does not round to it."""
    least = np.arange(300, dtype=bits_dtype(dtype))
    top = np.asarray(1 << 8 * least.itemsize - 1, least.dtype)
    bits = np.concatenate([least, least | top])
    grid = BlockGrid(bits.shape, bits.shape)
    codes = np.empty(bits.size, np.uint8)
    encode(
        parts_of_run(grid, 0, bits.size),
        values_of(bits.view(np.uint8), dtype),
        np.full((1, 1), scale, np.float32),
        codes,
    )
    assert (codes[0], codes[300]) == (0x00, 0x80)
    expected = oracle.quantize(
        Stored(dtype, bits.shape, bits.tobytes()), Stored.of(np.float32([scale]), "F32"), grid.block_size
    )
    np.testing.assert_array_equal(codes, np.frombuffer(expected, np.uint8))
    if scale == 2.0**-149:
        assert (
            codes[1] == 0x38 if dtype == "F32" else codes[1] == 0x7E
        )  # float32's least is 1 times it; the others' are far beyond


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_values_that_are_not_finite_stay_above_all(dtype: str) -> None:
    """A block with an infinity or a NaN has a maximum that is not finite; its neighbours have their own."""
    wide = bits_dtype(dtype)
    one, infinity, sign = {
        "BF16": (0x3F80, 0x7F80, 0x8000),
        "F16": (0x3C00, 0x7C00, 0x8000),
        "F32": (0x3F800000, 0x7F800000, 1 << 31),
    }[dtype]
    bad = [infinity, infinity | sign, infinity + 1, infinity | 1 | sign, sign - 1, sign - 1 | sign]
    bits = np.full((len(bad) + 1, 50), one, wide)
    bits[np.arange(len(bad)), [0, 7, 16, 31, 48, 49]] = bad
    grid = BlockGrid(bits.shape, (1, 50))
    values = values_of(stored_bytes(bits), dtype)
    maxima = block_array(grid, np.float32)
    raise_maxima(parts_of_run(grid, 0, bits.size), values, maxima)
    assert not np.isfinite(maxima[:-1]).any()
    assert np.isinf(maxima[:2]).all()
    assert np.isnan(maxima[2:-1]).all()
    assert maxima[-1] == 1
    assert count_nonfinite(values) == len(bad)
    raise_maxima(
        parts_of_run(grid, 0, bits.size), values_of(stored_bytes(np.full(bits.shape, one, wide)), dtype), maxima
    )
    assert not np.isfinite(maxima[:-1]).any()


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("size", [0, 1, 31, 4099])
def test_count_nonfinite(dtype: str, size: int) -> None:
    """As many as numpy finds, of every bit pattern."""
    width = np.dtype(NUMPY[dtype]).itemsize
    stored = np.random.default_rng(size).integers(0, 256, size * width, np.uint8)
    stored[width - 1 :: 3 * width] |= 0x7F
    stored[width - 2 :: 3 * width] |= 0xF0
    assert count_nonfinite(values_of(stored, dtype)) == np.count_nonzero(
        ~np.isfinite(stored.view(NUMPY[dtype]).astype(np.float32))
    )


# ---------------------------------------------------------------- round trips


def usable_scales(dtype: str, target: str, most: int) -> np.ndarray:
    """Scales as stored under which the product with every finite code but zero is a normal number of the target, or
    rounds to one.
    """
    rng = np.random.default_rng(8)
    if dtype == "F32":
        stored = rng.integers(1, 0x7F800000, 60_000, np.uint32)
        usual = np.exp2(rng.uniform(-14, 4, 5_000)).astype(np.float32).view(np.uint32)
        stored = np.concatenate([stored, usual])
    elif dtype in ("U8", "F8_E8M0"):
        stored = np.arange(255, dtype=np.uint8)
    else:
        stored = np.arange(1, 0x7F80 if dtype == "BF16" else 0x7C00, dtype=np.uint16).view(SCALE_DTYPES[dtype])
    values = scale_values(stored, dtype).astype(np.float64)
    kept = stored[
        (values * 2.0**-9 >= float(ml_dtypes.finfo(NUMPY[target]).smallest_normal)) & (values * 448 <= LARGEST[target])
    ]
    return np.sort(rng.permutation(kept)[:most])


@pytest.mark.parametrize("target", VALUE_DTYPES)
@pytest.mark.parametrize("scale_dtype", FP8_SCALES)
def test_round_trip_is_lossless(scale_dtype: str, target: str) -> None:
    """Dequantized and encoded again, each finite code is the same byte, under thousands of scales, every exponent."""
    stored = usable_scales(scale_dtype, target, 4000)
    assert stored.size > (4 if scale_dtype in ("U8", "F8_E8M0") else 1000)
    codes = np.tile(FINITE_CODES, (stored.size, 1))
    grid = BlockGrid(codes.shape, (1, FINITE_CODES.size))
    out = np.empty(codes.size, bits_dtype(target))
    Dequantizer(grid, stored, scale_dtype, "F8_E4M3", target).flat(codes.reshape(-1), 0, out)
    again = np.full(codes.size, 0xAB, np.uint8)
    scales = scale_values(stored, scale_dtype)[:, np.newaxis]
    parts = parts_of_run(grid, 0, codes.size)
    values = values_of(out.view(np.uint8), target)
    encode(parts, values, scales, again)
    np.testing.assert_array_equal(again.reshape(codes.shape), codes)
    assert not count_inexact(parts, values, again, scales).any()


@pytest.mark.parametrize(("target", "kept_as"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("BF16", "F32")])
@pytest.mark.parametrize("scale_dtype", FP8_SCALES)
def test_a_block_that_was_dequantized_and_not_changed_always_fits(scale_dtype: str, target: str, kept_as: str) -> None:
    """Whatever its largest code is, zero included; also where the bfloat16 values are kept as float32."""
    stored = np.tile(usable_scales(scale_dtype, target, 4000), 127)[: 127 * 60]
    largest = (
        np.arange(stored.size, dtype=np.uint8)[:, np.newaxis] % 127
    )  # 127 and the number of scales have no common factor
    rng = np.random.default_rng(2)
    codes = np.minimum(rng.integers(0, 127, (stored.size, 40), np.uint8), largest)
    codes[:, 17:18] = largest
    codes |= rng.integers(0, 2, codes.shape, np.uint8) << 7
    grid = BlockGrid(codes.shape, (1, 40))
    out = np.empty(codes.size, bits_dtype(target))
    Dequantizer(grid, stored, scale_dtype, "F8_E4M3", target).flat(codes.reshape(-1), 0, out)
    out = out.astype(np.uint32) << 16 if kept_as != target else out
    values, parts = values_of(out.view(np.uint8), kept_as), parts_of_run(grid, 0, codes.size)
    scales = scale_values(stored, scale_dtype)[:, np.newaxis]
    maxima = block_array(grid, np.float32)
    raise_maxima(parts, values, maxima)
    again = np.empty(codes.size, np.uint8)
    encode(parts, values, scales, again)
    np.testing.assert_array_equal(again.reshape(codes.shape), codes)
    kept = fits(maxima, scales) | may_fit(maxima, scales) & (count_inexact(parts, values, again, scales) == 0)
    assert kept.all()
    assert not fits(maxima, scales).all()  # the exact look decided some


# ---------------------------------------------------------------- which scales are kept

POWERS = np.exp2(np.arange(-120, 119, dtype=np.float64)).astype(np.float32)


def below(values: np.ndarray | float) -> np.ndarray:
    return np.nextafter(np.asarray(values, np.float32), np.float32(0))


def above(values: np.ndarray | float) -> np.ndarray:
    return np.nextafter(np.asarray(values, np.float32), INFINITY)


@pytest.mark.parametrize(("ratio", "fitting", "small"), [
    (450.0, True, False),
    (above(450.0), False, False),
    (464.0, False, False),
    (INFINITY, False, False),
    (449.743, True, False),
    (448.875, True, False),
    (448.0, True, False),
    (28.0, True, False),
    (above(28.0), True, False),
    (below(28.0), False, True),
    (1.0, False, True),
    (2.0**-9, False, True),
    (0.0, True, False),
])  # fmt: skip
def test_the_rule_at_its_edges(ratio: float, fitting: bool, small: bool) -> None:
    """The largest magnitude as a multiple of the scale; under powers of two, whose products are exact."""
    maxima = POWERS * np.float32(ratio)
    assert fits(maxima, POWERS).tolist() == [fitting] * POWERS.size
    assert may_fit(maxima, POWERS).tolist() == [small] * POWERS.size


def test_a_value_of_448_that_was_rounded_to_bfloat16_is_not_beyond() -> None:
    """It is at most 258 / 257 times as large, under any mantissa, which fits and keeps the code of 448."""
    for every in (np.arange(0x3F800000, 0x40000000, 7), np.arange(0x3F800000, 0x40000000, 1 << 16)):
        scale = every.astype(np.uint32).view(np.float32)
        maxima = (np.float32(448) * scale).astype(NUMPY["BF16"]).astype(np.float32)
        assert 449.7 < (maxima / scale).max() < 448 * 258 / 257
        assert fits(maxima, scale).all()


@examples(300)
@given(
    st.floats(0, 3.4028234663852886e38, width=32, allow_nan=False),
    st.floats(2.0**-149, 3.4028234663852886e38, width=32, allow_nan=False),
)
def test_a_block_fits_or_is_small_or_lies_beyond(amax: float, scale: float) -> None:
    """One of the three for any pair, and by exact arithmetic wherever the ratio is not within rounding of an edge."""
    fitting, small = (bool(f(np.float32([amax]), np.float32([scale]))[0]) for f in (fits, may_fit))
    assert not (fitting and small)
    ratio = Fraction(amax) / Fraction(scale)
    margin = Fraction(1, 1 << 22)
    if ratio > 450 * (1 + margin):
        assert (fitting, small) == (False, False)
    elif ratio and ratio < 28 * (1 - margin):
        assert small
    elif not ratio or 28 * (1 + margin) < ratio < 450 * (1 - margin):
        assert fitting


def test_magnitudes_far_beyond_the_scale_do_not_warn() -> None:
    """The ratio of the largest float32 to a small scale is infinite, quietly; so are infinite maxima and limits."""
    maxima, scales = np.float32([[3.4e38, 1e30, np.inf]]), np.float32([[1e-30, 1e-40, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fits(maxima, scales).any()
        assert not may_fit(maxima, scales).any()
        codes = np.full(3, 0x38, np.uint8)
        parts, values = (
            parts_of_run(BlockGrid((3,), (1,)), 0, 3),
            values_of(np.ones(3, np.float32).view(np.uint8), "F32"),
        )
        found = tally(parts, values, codes, np.ones((1, 3), np.float32), np.float32([[np.inf, 3e38, 1e38]]))
        assert (found.clipped, found.outgrown) == (0, 0)


def test_an_exact_look_keeps_a_small_block_and_sees_one_changed_element() -> None:
    """Small blocks keep their scale if each element is given back; one changed element is counted."""
    codes = np.tile(np.arange(0x40, dtype=np.uint8), (4, 1))  # at most 1.875
    grid = BlockGrid(codes.shape, (1, 64))
    scales = np.float32([[0.1], [1.37], [2.0**-20], [3e-5]])
    for dtype in VALUE_DTYPES[::2]:
        out = np.empty(codes.size, bits_dtype(dtype))
        Dequantizer(grid, scales.view(np.uint32), "F32", "F8_E4M3", dtype).flat(codes.reshape(-1), 0, out)
        for row, col in ((None, None), (0, 63), (2, 9), (3, 1)):
            changed = out.copy().reshape(codes.shape)
            if row is not None:
                changed[row, col] += 1
            values, parts = values_of(changed.reshape(-1).view(np.uint8), dtype), parts_of_run(grid, 0, codes.size)
            maxima = block_array(grid, np.float32)
            raise_maxima(parts, values, maxima)
            assert may_fit(maxima, scales).all()
            again = np.empty(codes.size, np.uint8)
            encode(parts, values, scales, again)
            assert count_inexact(parts, values, again, scales).reshape(-1).tolist() == [int(i == row) for i in range(4)]


# ---------------------------------------------------------------- what was lost


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("kind", GRIDS)
def test_tally_equals_a_computation_in_float64(kind: str, dtype: str) -> None:
    """Counts and maxima exactly, sums to 1e-5; of the whole, and of parts that are added up."""
    shape, block = GRIDS[kind]
    rng = np.random.default_rng(6)
    grid = BlockGrid(shape, block)
    stored = Stored.of(rng.standard_normal(shape) * np.exp2(rng.uniform(-6, 2, shape)), dtype)
    blocks = block_array(grid, np.float32).shape
    scale = Stored.of(np.exp2(rng.uniform(-11, -5, grid.shape)), "BF16")
    before = np.exp2(rng.uniform(-11, -5, blocks)).astype(np.float32)
    before.reshape(-1)[::3] = np.inf
    codes = np.frombuffer(bytearray(oracle.quantize(stored, scale, block)), np.uint8)
    scales = oracle.scale_floats(scale).reshape(blocks)

    sizes = np.abs(stored.array.astype(np.float64)).reshape(-1)
    given_back = np.frombuffer(oracle.dequantize(Stored.codes(codes.reshape(shape)), scale, block, "F32"), np.float32)
    errors = np.abs(np.abs(given_back) - sizes.astype(np.float32)).astype(np.float64)
    clipped = np.count_nonzero(sizes > 450 * oracle.spread(scales, shape, block).astype(np.float64).reshape(-1))
    outgrown = np.count_nonzero(sizes > 450 * oracle.spread(before, shape, block).astype(np.float64).reshape(-1))

    flat = stored.array.reshape(-1)
    middle = flat.size * 3 // 7
    added = Tally()
    for cuts in ([0, flat.size], [0, middle, flat.size]):
        found = Tally()
        for start, stop in pairwise(cuts):
            values = values_of(stored_bytes(flat[start:stop]), dtype)
            found.add(tally(parts_of_run(grid, start, stop - start), values, codes[start:stop], scales, before))
        assert (found.elements, found.moved, found.clipped, found.outgrown) == (flat.size, 0, clipped, outgrown)
        assert (found.largest, found.largest_error) == (sizes.max(), errors.max())
        assert found.magnitude == pytest.approx(sizes.sum(), rel=1e-5)
        assert found.error == pytest.approx(errors.sum(), rel=1e-5)
        added.add(found)
    added.moved = 5
    added.add(Tally(moved=2, clipped=1))
    assert (added.elements, added.moved, added.clipped) == (2 * flat.size, 7, 2 * clipped + 1)
    assert added.largest == sizes.max()
    assert added.magnitude == pytest.approx(2 * sizes.sum(), rel=1e-5)


def test_tally_at_the_edges() -> None:
    """Beyond is above 450 times the scale, of either sign, and not 450 times itself; the clipped part is an error."""
    values = np.float32([450, -450, 450.5, -450.5, 448, 0, -0.0, 30, 500])
    codes = np.array([0x7E, 0xFE, 0x7E, 0xFE, 0x7E, 0, 0x80, 0x5F, 0x7E], np.uint8)
    parts = parts_of_run(BlockGrid((9,), (9,)), 0, 9)
    one = np.ones((1, 1), np.float32)
    found = tally(parts, values_of(values.view(np.uint8), "F32"), codes, one, one / 16)
    assert found == Tally(9, 0, 3, 7, float(np.abs(values).sum()), 2 + 2 + 2.5 + 2.5 + 52, 500, 52)
    assert tally(parts, values_of(values.view(np.uint8), "F32"), codes, one, one).outgrown == 3


# ---------------------------------------------------------------- fresh scales


def magnitudes() -> np.ndarray:
    """Float32 numbers: of every exponent, all subnormal bits, multiples of 448 of each bfloat16 and float16, and their
    neighbours.
    """
    rng = np.random.default_rng(12)
    bits = [
        rng.integers(1, 0x7F800000, 50_000, np.uint32),
        np.arange(1, 5000, dtype=np.uint32),
        0x7F7FFFFF - np.arange(5, dtype=np.uint32),
    ]
    bits += [rng.integers(1, 1 << 32 - 4 - n, 3000, np.uint32) for n in range(1, 20)]  # subnormal quotients
    with np.errstate(over="ignore"):
        scales = np.arange(1, 0x7F80, dtype=np.uint16).view(NUMPY["BF16"]).astype(np.float32)
        halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
        products = np.concatenate([scales, halves]) * np.float32(448)
    products = products[np.isfinite(products)].view(np.uint32)
    found = np.concatenate([*bits, products, products + 1, products - 1])
    return found[(found > 0) & (found < 0x7F800000)].view(np.float32)


@pytest.mark.parametrize("dtype", FP8_SCALES)
def test_fresh_scales_equal_the_oracle(dtype: str) -> None:
    """For every kind of magnitude, as blocks of one element."""
    amax = magnitudes()
    expected = oracle.fresh_scale(Stored.of(amax, "F32"), (1,), dtype)
    assert fresh_scales(amax, dtype).tobytes() == expected.data


@pytest.mark.parametrize("dtype", ["BF16", "F16", "U8", "F8_E8M0"])
def test_nothing_clips_and_no_smaller_scale_would_do(dtype: str) -> None:
    """In exact arithmetic: 448 times the scale is not below the largest value, and 448 times the scale before it is."""
    amax = magnitudes()
    kind = np.dtype(NUMPY["F8_E8M0" if dtype == "U8" else dtype])
    every = np.arange(1 << 8 * kind.itemsize).astype(f"u{kind.itemsize}").view(kind).astype(np.float32)
    every = np.sort(every[every > 0]).astype(np.float64)
    scales = scale_values(fresh_scales(amax, dtype), dtype).astype(np.float64)
    assert (448 * scales >= amax).all()
    place = np.searchsorted(every, scales)
    np.testing.assert_array_equal(every[place], scales)
    smaller = np.where(place > 0, every[place - 1], 0)
    assert (448 * smaller < amax).all()


def test_float32_scales_are_the_quotient() -> None:
    """The nearest float32, by exact fractions; the next one up if subnormal; and every block fits its own."""
    rng = np.random.default_rng(1)
    amax = np.concatenate(
        [rng.choice(magnitudes(), 1500), np.float32([1e-45, 448 * 2.0**-126, below(448 * 2.0**-126)])]
    )
    scales = fresh_scales(amax, "F32").view(np.float32)
    for largest, scale in zip(amax.tolist(), scales.tolist(), strict=True):
        exact = Fraction(largest) / 448
        around = [Fraction(float(value)) for value in (below(scale), above(scale))]
        if exact < Fraction(1, 1 << 126):
            assert around[0] < exact <= Fraction(scale)
        else:
            assert all(abs(exact - Fraction(scale)) <= abs(exact - neighbour) for neighbour in around)
    normal = scales >= 2.0**-126
    assert fits(amax[normal], scales[normal]).all()


@pytest.mark.parametrize("dtype", FP8_SCALES)
def test_powers_of_two_are_exact(dtype: str) -> None:
    """448 times a power of two gives that scale; the next number up gives the next scale, except in float32."""
    least, most = {"F16": (-24, 15), "U8": (-127, 119), "F8_E8M0": (-127, 119)}.get(dtype, (-130, 119))
    powers = np.exp2(np.arange(least, most + 1, dtype=np.float64)).astype(np.float32)
    assert scale_values(fresh_scales(powers * np.float32(448), dtype), dtype).tolist() == powers.tolist()
    larger = scale_values(fresh_scales(above(powers * np.float32(448)), dtype), dtype)
    assert (larger > powers).all()
    if dtype in ("U8", "F8_E8M0"):
        assert larger.tolist() == (2 * powers).tolist()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_powers_of_two_in_a_dtype_that_holds_others(dtype: str) -> None:
    """They are e8m0's own value, the oracle's, where the dtype holds it; F16 ends at 2**-24 and 2**15."""
    amax = magnitudes()
    scales = scale_values(fresh_scales(amax, dtype, powers_of_two=True), dtype)
    expected = oracle.scale_floats(oracle.fresh_scale(Stored.of(amax, "F32"), (1,), "U8"))
    if dtype == "F16":
        expected = np.where(expected > 2.0**15, np.float32(np.inf), np.maximum(expected, np.float32(2.0**-24)))
    assert scales.tobytes() == expected.tobytes()
    finite = scales[np.isfinite(scales)]
    assert set(np.frexp(finite)[0].tolist()) == {0.5}
    assert (448 * finite.astype(np.float64) >= amax[np.isfinite(scales)]).all()


@pytest.mark.parametrize(("amax", "dtype", "bits"), [
    (0.0, "F32", 0x3F800000),
    (0.0, "BF16", 0x3F80),
    (0.0, "F16", 0x3C00),
    (0.0, "U8", 127),
    (0.0, "F8_E8M0", 127),
    (2.0**-149, "F32", 1),
    (2.0**-149, "BF16", 1),
    (2.0**-149, "F16", 1),
    (2.0**-149, "U8", 0),
    (448 * 2.0**-127, "U8", 0),
    (float(above(448 * 2.0**-127)), "U8", 1),
    (LARGEST["F32"], "BF16", 0x7B13),  # 2**128 / 448 is 2**119 * 8 / 7
    (LARGEST["F32"], "U8", 247),
    (LARGEST["F32"], "F16", 0x7C00),
    (448 * 65504.0, "F16", 0x7BFF),
    (float(above(448 * 65504.0)), "F16", 0x7C00),
    (448.0, "F32", 0x3F800000),
])  # fmt: skip
def test_extreme_magnitudes(amax: float, dtype: str, bits: int) -> None:
    """No scale is zero or NaN; only F16 has magnitudes that it cannot hold, which are infinite."""
    found = fresh_scales(np.float32([[amax]]), dtype)
    assert found.shape == (1, 1)
    assert found.view(f"u{found.itemsize}").tolist() == [[bits]]


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_round_to(dtype: str) -> None:
    """As ml_dtypes and numpy round; finite values that become infinite are counted, and NaN stays NaN."""
    edges = {"BF16": 0x7F7F8000, "F16": 0x477FF000, "F32": 0x7F7FFFFF}[dtype]  # half way to what would be infinite
    near = np.arange(edges - 3, edges + 1, dtype=np.uint32)
    patterns = np.arange(0, 2**32, 4093, dtype=np.uint64).astype(np.uint32)
    values = (
        np.concatenate([patterns, near, near | 1 << 31, [0x7F800000, 0xFF800000, 0x7FC00000]])
        .astype(np.uint32)
        .view(np.float32)
    )
    with np.errstate(all="ignore"):
        expected = values.astype(NUMPY[dtype])
    out = np.empty(values.size, bits_dtype(dtype))
    overflown = round_to(values, dtype, out)
    nan = np.isnan(values)
    np.testing.assert_array_equal(out[~nan], expected.view(out.dtype)[~nan])
    assert np.isnan(out.view(NUMPY[dtype]).astype(np.float32)[nan]).all()
    assert overflown == np.count_nonzero(np.isfinite(values) & np.isinf(expected.astype(np.float32)))
    assert (overflown > 0) == (dtype != "F32")


@pytest.mark.parametrize(("dtype", "largest"), [("BF16", 0x7F7F7FFF), ("F16", 0x477FEFFF), ("F32", 0x7F7FFFFF)])
def test_round_to_counts_from_the_first_value_that_overflows(dtype: str, largest: int) -> None:
    """The last value that rounds to the largest finite one is not counted, and the next is, of either sign."""
    out = np.empty(2, bits_dtype(dtype))
    last = np.uint32([largest, largest | 1 << 31])
    assert round_to(last.view(np.float32), dtype, out) == 0
    assert np.abs(out.view(NUMPY[dtype]).astype(np.float64)).tolist() == [LARGEST[dtype]] * 2
    assert round_to((last + np.uint32(1)).view(np.float32), dtype, out) == (0 if dtype == "F32" else 2)
    assert round_to(np.empty(0, np.float32), dtype, out[:0]) == 0

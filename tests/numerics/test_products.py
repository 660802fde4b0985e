"""Products of low rank: bit for bit the sum in the order of the rank, whatever is worked on at once; and their sums."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt.numerics.arrival import Arrival, count_arrived
from fp8ckpt.numerics.codes import code_values
from fp8ckpt.numerics.geometry import BlockGrid
from fp8ckpt.numerics.products import add_product, add_product_at, merge_codes, sum_squares
from fp8ckpt.numerics.quantize import CODINGS, arrival, block_array, decode, encode, parts_of_run, values_of
from tests import oracle
from tests.adapters import F32, in_order
from tests.support import examples


def drawn(seed: int, rows: int, rank: int, cols: int) -> tuple[F32, F32, F32]:
    rng = np.random.default_rng(seed)
    shapes = ((rows, rank), (rank, cols), (rows, cols))
    left, right, value = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return left, right, value


@examples(40)
@given(
    st.integers(0, 1 << 30),
    st.integers(0, 11),
    st.integers(1, 9),
    st.sampled_from([1, 5, 511, 512, 513, 1300]),
    st.floats(-4, 4, width=32),
)
def test_each_element_is_the_sum_in_order(seed: int, rows: int, rank: int, cols: int, scaling: float) -> None:
    """No shape, and no end of a strip or of four rows, changes a bit."""
    left, right, value = drawn(seed, rows, rank, cols)
    expected = in_order(left, right, scaling, value)
    add_product(left, right, np.float32(scaling), value)
    assert np.array_equal(value.view(np.uint32), expected.view(np.uint32))


@examples(40)
@given(st.integers(0, 1 << 30), st.integers(1, 12), st.integers(1, 6), st.data())
def test_a_part_has_the_bits_of_the_whole(seed: int, rows: int, rank: int, data: st.DataObject) -> None:
    """A box of the result is the product of its rows and columns."""
    cols = 700
    left, right, value = drawn(seed, rows, rank, cols)
    whole = value.copy()
    add_product(left, right, np.float32(0.7), whole)
    low, high = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, cols), st.integers(0, cols))))
    part = np.ascontiguousarray(value[low:high, start:stop])
    add_product(left[low:high], np.ascontiguousarray(right[:, start:stop]), np.float32(0.7), part)
    assert np.array_equal(part, whole[low:high, start:stop])


def test_places_have_the_bits_of_the_whole() -> None:
    """One by one, in any order."""
    left, right, value = drawn(3, 7, 5, 600)
    places, alone = np.random.default_rng(4).permutation(value.size), value.reshape(-1).copy()
    row, col = divmod(places, 600)
    found = alone[places]
    add_product_at(left, right.T, row, col, np.float32(0.3), found)
    add_product(left, right, np.float32(0.3), value)
    assert np.array_equal(found.view(np.uint32), value.reshape(-1)[places].view(np.uint32))


@examples(40)
@given(
    st.integers(0, 1 << 30),
    st.integers(1, 9),
    st.sampled_from([1, 31, 33, 512, 700]),
    st.lists(st.tuples(st.integers(1, 6), st.floats(-1, 1, width=32)), max_size=3),
    st.floats(0.25, 4),
)
def test_codes_in_the_place_of_the_bases(
    seed: int, rows: int, cols: int, products: list[tuple[int, float]], ratio: float
) -> None:
    """What decoding, adding one product after the other and encoding give, a step at a time; and their facts."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, cols), np.uint8)
    if seed % 4:
        codes[codes & 0x7F == 0x7F] = 0
    before, scale = np.float32(0.3), np.float32(0.3 * ratio)
    old = code_values("F8_E4M3")[codes] * before
    value, pairs = old.copy(), [drawn(seed + i, rows, rank, cols)[:2] for i, (rank, _) in enumerate(products)]
    for (left, right), (_, scaling) in zip(pairs, products, strict=True):
        value = in_order(left, right, scaling, value)
    lefts, rights = [left for left, _ in pairs], [right for _, right in pairs]
    found = merge_codes(codes, before, lefts, rights, [scaling for _, scaling in products], scale)
    assert np.array_equal(found.largest, np.abs(value).max(), equal_nan=True)
    if not np.isfinite(value).all():
        return
    grid = BlockGrid((rows, cols), (rows, cols))
    parts, expected, scales = parts_of_run(grid, 0, codes.size), np.empty(codes.size, np.uint8), np.full((1, 1), scale)
    encode(parts, values_of(value.reshape(-1).view(np.uint8), "F32"), scales, expected)
    assert np.array_equal(codes.reshape(-1), expected)
    arrived, clipped = arrival(parts, old.reshape(-1), value.reshape(-1), expected, scales)
    assert (found.arrival.elements, found.arrival.changed, found.clipped) == (codes.size, arrived.changed, clipped)
    for name in ("before", "delta", "product", "added"):
        assert np.isclose(getattr(found.arrival, name), getattr(arrived, name), rtol=1e-12)


@examples(40)
@given(st.sampled_from(["F8_E4M3", "F4"]), st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 70))
def test_what_arrived_of_codes(dtype: str, seed: int, rows: int, cols: int) -> None:
    """As of the values that they have, by their blocks; NaN codes left out; and what is beyond a scale is counted."""
    rng, coding = np.random.default_rng(seed), CODINGS[dtype]
    grid = BlockGrid((rows, cols), (int(rng.integers(1, 5)), int(rng.integers(1, 40))))
    codes = rng.integers(0, code_values(dtype).size, rows * cols, np.uint8)
    if seed % 4:
        codes[codes & 0x7F == 0x7F] = 0
    scales = rng.uniform(0.1, 2, block_array(grid, np.float32).shape).astype(np.float32)
    parts = parts_of_run(grid, 0, codes.size)
    stored = decode(parts, codes, scales, coding)
    before = np.where(rng.random(codes.size) < 0.5, stored, rng.standard_normal(codes.size)).astype(np.float32)
    wanted = (stored * rng.uniform(0.9, 1.1, codes.size)).astype(np.float32)
    found, clipped = arrival(parts, before, wanted, codes, scales, coding)
    expected = Arrival.of(before, wanted, stored)
    assert (found.elements, found.changed) == (expected.elements, expected.changed)
    for name in ("before", "delta", "product", "added"):
        assert np.isclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
    limits = oracle.spread(scales, (rows, cols), grid.block_size).reshape(-1) * coding.beyond
    assert clipped == np.count_nonzero(np.abs(wanted) > limits)


@examples(40)
@given(st.integers(0, 1 << 30), st.integers(1, 4), st.sampled_from([0, 1, 15, 16, 17, 100]))
def test_sums_of_squares(seed: int, rows: int, cols: int) -> None:
    """They are those of float64, and a row's depends on the row alone."""
    values = drawn(seed, rows, 1, cols)[2]
    sums = np.empty(rows)
    sum_squares(values, sums)
    assert np.allclose(sums, (values.astype(np.float64) ** 2).sum(axis=1), rtol=1e-13)
    last = np.empty(1)
    sum_squares(values[-1:], last)
    assert last[0] == sums[-1]


@examples(40)
@given(st.integers(0, 1 << 30), st.sampled_from([0, 1, 15, 16, 33, 2047, 2050, 9000]))
def test_what_arrived(seed: int, count: int) -> None:
    """Elements that changed, and four sums, against numpy in float64."""
    rng = np.random.default_rng(seed)
    before, wanted = rng.standard_normal((2, count)).astype(np.float32)
    stored = np.where(np.arange(count) % 3 == 0, before, np.round(wanted, 1)).astype(np.float32)
    sums, changed = np.ones(4), np.zeros(1, np.int64)
    count_arrived(before, wanted, stored, sums, changed)
    old = before.astype(float)
    delta, added = wanted - old, stored - old
    assert changed[0] == np.count_nonzero(stored != before)
    expected = [(old**2).sum(), (delta**2).sum(), (delta * added).sum(), (added**2).sum()]
    assert np.allclose(sums - 1, expected, rtol=1e-9, atol=1e-12)


def test_what_is_not_finite_did_not_arrive() -> None:
    """It is left out of the sums, and what is beside it is not."""
    before, wanted = np.ones(20, np.float32), np.full(20, 2, np.float32)
    before[3], wanted[5] = np.nan, np.inf
    found = Arrival.of(before, wanted, wanted)
    assert (found.elements, found.changed, found.delta, found.product, found.added) == (18, 18, 18.0, 18.0, 18.0)

"""Products of low rank: bit for bit the sum in the order of the rank, whatever is worked on at once; and their sums."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8ckpt.numerics.products import Arrival, add_product, count_arrived, sum_squares
from tests.adapters import F32, in_order


def drawn(seed: int, rows: int, rank: int, cols: int) -> tuple[F32, F32, F32]:
    rng = np.random.default_rng(seed)
    shapes = ((rows, rank), (rank, cols), (rows, cols))
    left, right, value = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return left, right, value


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([0, 1, 15, 16, 33, 100]))
def test_what_arrived(seed: int, count: int) -> None:
    """Elements that changed, and four sums, against numpy in float64."""
    rng = np.random.default_rng(seed)
    before, wanted = rng.standard_normal((2, count)).astype(np.float32)
    stored = np.where(np.arange(count) % 3 == 0, before, np.round(wanted, 1)).astype(np.float32)
    sums = np.ones(4)
    changed = count_arrived(before, wanted, stored, sums)
    old = before.astype(float)
    delta, added = wanted - old, stored - old
    assert changed == np.count_nonzero(stored != before)
    expected = [(old**2).sum(), (delta**2).sum(), (delta * added).sum(), (added**2).sum()]
    assert np.allclose(sums - 1, expected, rtol=1e-9, atol=1e-12)


def test_what_is_not_finite_did_not_arrive() -> None:
    """It is left out of the sums, and what is beside it is not."""
    before, wanted = np.ones(20, np.float32), np.full(20, 2, np.float32)
    before[3], wanted[5] = np.nan, np.inf
    found = Arrival.of(before, wanted, wanted)
    assert (found.elements, found.changed, found.delta, found.product, found.added) == (18, 18, 18.0, 18.0, 18.0)

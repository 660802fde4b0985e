"""The one inference rule of block grids, rule by rule, and its invariant."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt.numerics.geometry import BlockGrid, boxes, first_elements, infer_grid, surroundings, tiled, whole_blocks
from tests.support import examples

Shape = tuple[int, ...]


def ceil_div(shape: Shape, block: Shape) -> Shape:
    return tuple(-(-dim // size) for dim, size in zip(shape, block, strict=True))


@pytest.mark.parametrize("scale", [(), (1,), (1, 1), (1, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("weight", [(), (7,), (256, 300), (3, 20, 16)])
@pytest.mark.parametrize("block", [None, (128, 128), (1, 32)])
def test_one_element_spans_the_whole_tensor(weight: Shape, scale: Shape, block: Shape | None) -> None:
    """Rule 1: a one-element scale spans the tensor, whatever its rank and whatever the configuration says."""
    grid = infer_grid(weight, scale, block)
    assert grid == BlockGrid(weight, weight)
    assert grid is not None
    assert grid.per_tensor
    assert grid.shape == (1,) * len(weight)


@pytest.mark.parametrize(("weight", "scale", "block", "expected"), [
    ((40, 24), (40,), None, (1, 24)),
    ((40, 24), (40,), (128, 128), (1, 24)),
    ((3, 20, 16), (3,), None, (1, 20, 16)),
    ((40,), (40,), None, (1,)),
    ((24, 24), (24,), None, (1, 24)),
])  # fmt: skip
def test_a_vector_belongs_to_dimension_0(weight: Shape, scale: Shape, block: Shape | None, expected: Shape) -> None:
    """Rule 2: a 1-D scale of more than one element is one scale a row."""
    assert infer_grid(weight, scale, block) == BlockGrid(weight, expected)


def test_a_vector_of_columns_is_refused() -> None:
    """A 1-D scale as long as dimension 1 is not dimension 0's."""
    assert infer_grid((40, 24), (24,), None) is None


def test_scales_of_a_weight_without_elements() -> None:
    """One spans it, as it spans any; more belong to no block, and are refused."""
    assert infer_grid((0, 6), (1, 1), None) == BlockGrid((0, 6), (1, 6))
    assert infer_grid((0, 6), (0, 1), None) == BlockGrid((0, 6), (1, 6))
    assert infer_grid((0, 6), (1, 6), None) is None


@pytest.mark.parametrize(("weight", "scale", "expected"), [
    ((40, 24), (40, 1), (1, 24)),
    ((40, 24), (1, 24), (40, 1)),
    ((40, 24), (40, 24), (1, 1)),
    ((3, 20, 16), (3, 1, 1), (1, 20, 16)),
    ((3, 20, 16), (3, 1, 16), (1, 20, 1)),
    ((3, 20, 16), (3, 20, 1), (1, 1, 16)),
    ((1, 8), (1, 8), (1, 1)),
])  # fmt: skip
def test_each_dimension_is_spanned_or_single(weight: Shape, scale: Shape, expected: Shape) -> None:
    """Rule 3: per dimension, scale 1 means "spans it" and scale = weight means block 1; no configuration is needed."""
    assert infer_grid(weight, scale, None) == BlockGrid(weight, expected)


@pytest.mark.parametrize(("weight", "scale", "block", "expected"), [
    ((256, 256), (2, 2), (128, 128), (128, 128)),
    ((300, 200), (3, 2), (128, 128), (128, 128)),  # ragged in both dimensions
    ((129, 128), (2, 1), (128, 128), (128, 128)),
    ((24, 100), (24, 4), (1, 32), (1, 32)),
    ((3, 130, 200), (3, 2, 2), (128, 128), (1, 128, 128)),  # one matrix an expert
    ((2, 3, 130, 200), (2, 3, 2, 2), (128, 128), (1, 1, 128, 128)),
    ((300,), (3,), (128,), (128,)),
    ((8, 6, 10), (4, 2, 5), (2, 3, 2), (2, 3, 2)),
])  # fmt: skip
def test_the_configured_block_tiles_the_last_dimensions(
    weight: Shape, scale: Shape, block: Shape, expected: Shape
) -> None:
    """Rule 4: the configuration decides what is neither 1 nor the weight's own size; the others have blocks of 1."""
    assert infer_grid(weight, scale, block) == BlockGrid(weight, expected)


@pytest.mark.parametrize(("weight", "scale", "expected"), [
    ((256, 384), (2, 1, 3, 1), (128, 128)),
    ((300, 200), (3, 1, 2, 1), (128, 128)),
    ((3, 130, 200), (3, 1, 2, 1, 2, 1), (1, 128, 128)),
])  # fmt: skip
def test_modelopt_scales_of_twice_the_rank_are_squeezed(weight: Shape, scale: Shape, expected: Shape) -> None:
    """ModelOpt writes ``[ob, 1, ib, 1]``: the ones between are dropped."""
    assert infer_grid(weight, scale, (128, 128)) == BlockGrid(weight, expected)


@pytest.mark.parametrize("scale", [(2, 2, 3, 1), (2, 1, 3, 2), (1, 2, 1, 3), (2, 3, 1, 1)])
def test_other_scales_of_twice_the_rank_are_refused(scale: Shape) -> None:
    """Only ones may stand between ModelOpt's blocks."""
    assert infer_grid((256, 384), scale, (128, 128)) is None


@pytest.mark.parametrize(("weight", "scale", "block"), [
    ((256, 256), (2, 1), (128, 128)),  # a lost column
    ((256, 256), (1, 2), (128, 128)),  # a lost row
    ((384, 384), (2, 3), (128, 128)),
    ((384, 384), (3, 4), (128, 128)),  # one too many
    ((300, 200), (2, 1), (128, 128)),  # rounded down instead of up
    ((256, 256), (2,), (128, 128)),
    ((24, 100), (24, 3), (1, 32)),
    ((3, 256, 256), (3, 2, 1), (128, 128)),
    ((3, 256, 256), (2, 2), (128, 128)),  # no expert dimension
    ((3, 256, 256), (2, 2, 2), (128, 128)),  # a lost expert
    ((256, 256), (2, 2), (64, 64)),
    ((256, 256), (2, 2), None),  # no guessing by division
    ((256, 256), (256, 2), None),
    ((256, 256), (2, 2, 1), (128, 128)),
    ((256,), (2,), (128, 128)),  # the block has more dimensions than the weight
    ((256, 256), (0,), None),
    ((256, 256), (0, 2), (128, 128)),
    ((), (2,), None),
    ((), (2, 2), (128, 128)),
])  # fmt: skip
def test_what_does_not_tile_is_refused(weight: Shape, scale: Shape, block: Shape | None) -> None:
    """A lost or surplus row or column of scales, and what nothing states, is None."""
    assert infer_grid(weight, scale, block) is None


def test_the_configuration_goes_before_the_single_reading() -> None:
    """Where both readings fit the shape, the configured one is taken: here 128 rows a block, not all 256."""
    assert infer_grid((200, 128), (2, 1), (128, 128)) == BlockGrid((200, 128), (128, 128))
    assert infer_grid((2, 256), (2, 1), (1, 256)) == BlockGrid((2, 256), (1, 256))


def test_tiled_refuses_a_block_of_more_dimensions() -> None:
    """A block size belongs to the last dimensions, and there must be that many."""
    assert tiled((5,), (128, 128)) is None
    assert tiled((2, 5), (128, 128)) == BlockGrid((2, 5), (128, 128))


@pytest.mark.parametrize(
    ("weight", "block", "shape", "per_tensor"),
    [((), (), (), True), ((5,), (5,), (1,), True), ((5, 6), (2, 4), (3, 2), False), ((5, 6), (5, 3), (1, 2), False)],
)
def test_grid_shape(weight: Shape, block: Shape, shape: Shape, per_tensor: bool) -> None:
    """Blocks per dimension, ragged edges counted."""
    grid = BlockGrid(weight, block)
    assert (grid.shape, grid.per_tensor) == (shape, per_tensor)


_dims = st.one_of(st.integers(1, 9), st.sampled_from([32, 100, 127, 128, 129, 256]))
_weights = st.lists(_dims, max_size=4).map(tuple)
_blocks = st.none() | st.lists(st.sampled_from([1, 2, 3, 32, 128, 512]), min_size=1, max_size=3).map(tuple)


@st.composite
def _inputs(draw: st.DrawFn) -> tuple[Shape, Shape, Shape | None]:
    """A weight, a block, and a scale that either fits one reading, nearly fits, or is anything."""
    weight = draw(_weights)
    block = draw(_blocks)
    choice = draw(st.integers(0, 2))
    if choice == 0:
        scale = tuple(draw(st.sampled_from([1, dim])) for dim in weight)
    elif choice == 1 and block is not None and len(block) <= len(weight):
        scale = ceil_div(weight, (1,) * (len(weight) - len(block)) + block)
    else:
        scale = draw(st.lists(st.integers(0, 5), max_size=6).map(tuple))
    if scale and draw(st.booleans()):
        axis = draw(st.integers(0, len(scale) - 1))
        scale = (*scale[:axis], max(0, scale[axis] + draw(st.sampled_from([-1, 1]))), *scale[axis + 1 :])
    if draw(st.booleans()):
        scale = tuple(size for dim in scale for size in (dim, 1))
    return weight, scale, block


@examples(1500)
@given(_inputs())
def test_the_invariant_holds_for_whatever_is_returned(inputs: tuple[Shape, Shape, Shape | None]) -> None:
    """``scale shape == ceil(weight shape / block size)``, up to dimensions of 1 that the scale has more or fewer of."""
    weight, scale, block = inputs
    grid = infer_grid(weight, scale, block)
    if grid is None:
        return
    assert grid.weight_shape == weight
    assert len(grid.block_size) == len(weight)
    assert all(size >= 1 for size in grid.block_size)
    assert grid.shape == ceil_div(weight, grid.block_size)
    assert prod(grid.shape) == prod(scale)
    assert [dim for dim in grid.shape if dim != 1] == [dim for dim in scale if dim != 1]
    if len(scale) == len(weight):
        assert grid.shape == scale
    lead = len(weight) - len(block or ())
    stated = (1,) * lead + (block or ())
    for axis, size in enumerate(grid.block_size):
        assert size in {1, weight[axis], *(stated[axis : axis + 1] if lead >= 0 else ())}


@examples(500)
@given(_weights.filter(len), st.data())
def test_every_tiling_of_a_configured_block_is_found(weight: Shape, data: st.DataObject) -> None:
    """Scales that tile a weight by the configured block pair with it, as they are and in ModelOpt's shape."""
    block = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 32, 128, 512]), min_size=1, max_size=len(weight))))
    full = (1,) * (len(weight) - len(block)) + block
    scale = ceil_div(weight, full)
    between = tuple(size for dim in scale for size in (dim, 1))
    for shape in (scale, between):
        grid = infer_grid(weight, shape, block)
        assert grid is not None
        assert grid.shape == scale


@pytest.mark.parametrize("seed", range(60))
def test_regions_and_blocks(seed: int) -> None:
    """Which blocks a region meets, holds whole, and has the first element of: against masks of elements."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))
    shape = tuple(int(n) for n in rng.integers(1, 9, rank))
    block = tuple(int(rng.integers(1, dim + 3)) for dim in shape)
    offsets = tuple(int(rng.integers(0, dim)) for dim in shape)
    sizes = tuple(int(rng.integers(1, dim - start + 1)) for dim, start in zip(shape, offsets, strict=True))
    grid = BlockGrid(shape, block)
    numbers = np.arange(prod(grid.shape)).reshape(grid.shape)
    of_element = numbers[np.ix_(*(np.arange(dim) // size for dim, size in zip(shape, block, strict=True)))]
    region = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))

    around = surroundings(grid, offsets, sizes)
    met = tuple(slice(start, start + count) for start, count in zip(around.first, around.grid.shape, strict=True))
    assert set(numbers[met].flat) == set(of_element[region].flat)
    assert around.grid.block_size == block
    corner = tuple(start * size for start, size in zip(around.first, block, strict=True))
    assert around.offsets == tuple(start - at for start, at in zip(offsets, corner, strict=True))
    extent = tuple(slice(at, at + size) for at, size in zip(corner, around.grid.weight_shape, strict=True))
    assert np.array_equal(np.isin(of_element, numbers[met]), _mask(shape, extent))

    starts, lengths = whole_blocks(grid, offsets, sizes)
    counts, inside = np.bincount(of_element.flat), np.bincount(of_element[region].flat, minlength=numbers.size)
    expected = np.isin(of_element, np.flatnonzero(counts == inside))
    found = _mask(shape, tuple(slice(start, start + size) for start, size in zip(starts, lengths, strict=True)))
    assert np.array_equal(found, expected)

    first, count = first_elements(grid, offsets, sizes)
    begins = [
        numbers[at]
        for at in np.ndindex(grid.shape)
        if _mask(shape, region)[tuple(i * b for i, b in zip(at, block, strict=True))]
    ]
    assert sorted(numbers[tuple(slice(at, at + n) for at, n in zip(first, count, strict=True))].flat) == sorted(begins)


def _mask(shape: tuple[int, ...], region: tuple[slice, ...]) -> np.ndarray:
    mask = np.zeros(shape, np.bool_)
    mask[region] = True
    return mask


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_boxes_are_the_run(dims: list[int], data: st.DataObject) -> None:
    """One after the other they are the run of elements, and there are at most two an axis."""
    shape = tuple(dims)
    array = np.arange(prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, array.size - 1))
    count = data.draw(st.integers(1, array.size - start))
    found = [
        array[tuple(slice(at, at + size) for at, size in zip(*region, strict=True))].reshape(-1)
        for region in boxes(shape, start, count)
    ]
    np.testing.assert_array_equal(np.concatenate(found), np.arange(start, start + count))
    assert len(found) <= max(1, 2 * len(shape) - 1)

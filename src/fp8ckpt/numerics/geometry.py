"""Integer geometry: regions of a tensor, and block grids, which say how scales tile a weight.

A region is ``(offsets, sizes)`` in the coordinates of the full tensor; never local coordinates.

Per-tensor, per-expert, per-channel, per-block and MX scaling are one thing: a grid of blocks with one scale each. The
invariant is ``scale shape == ceil(weight shape / block size)``, per dimension. There is no enum of schemes, and no
guessing by division: a grid that neither the shapes nor the configuration states is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Region = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes; in the coordinates of the full tensor


def pieces(region: Region, most: int) -> Iterator[Region]:
    """Yield the region in pieces of at most ``most`` elements, in its row-major order."""
    offsets, sizes = region
    count = prod(sizes)
    if count <= most:
        if count:
            yield region
        return
    axis = next(i for i, size in enumerate(sizes) if size > 1)
    step = max(1, sizes[axis] * most // count)
    for first in range(0, sizes[axis], step):
        size = min(step, sizes[axis] - first)
        yield from pieces(
            ((*offsets[:axis], offsets[axis] + first, *offsets[axis + 1 :]), (*sizes[:axis], size, *sizes[axis + 1 :])),
            most,
        )


def within(piece: Region, region: Region) -> tuple[slice, ...]:
    """Return the slices of a piece in an array of the region's sizes."""
    return tuple(
        slice(at - start, at - start + size) for at, start, size in zip(piece[0], region[0], piece[1], strict=True)
    )


def runs(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the region as the fewest (first element, count) runs, contiguous in a row-major tensor, in order."""
    if not (count := prod(sizes)):
        return
    if sizes == shape:
        yield 0, count
        return
    # Trailing dimensions of full size merge into one run with the dimension before them.
    split = len(shape)
    while split and sizes[split - 1] == shape[split - 1]:
        split -= 1
    split = max(split - 1, 0)
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    length = prod(sizes[split:])
    base = sum(start * stride for start, stride in zip(offsets, strides, strict=True))
    for index in np.ndindex(*sizes[:split]):
        yield base + sum(i * stride for i, stride in zip(index, strides, strict=False)), length


def bytes_of_run(start: int, count: int, per_byte: int) -> tuple[int, int]:
    """Return the bytes (first, count) that hold a run of elements, with ``per_byte`` elements in each byte."""
    first = start // per_byte
    return first, -(-(start + count) // per_byte) - first


def bytes_of_region(region: Region, per_byte: int) -> Region:
    """Return the bytes that hold a region, with ``per_byte`` elements of the last dimension in each byte."""
    offsets, sizes = region
    if per_byte == 1:
        return region
    first, count = bytes_of_run(offsets[-1], sizes[-1], per_byte)
    return (*offsets[:-1], first), (*sizes[:-1], count)


def boxes(shape: Shape, start: int, count: int) -> Iterator[Region]:
    """Yield a run of elements in row-major order, from ``start`` on, as the fewest regions, in order."""
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    while count:
        index, into = divmod(start, row)
        if into or count < row:
            size = min(row - into, count)
            for offsets, sizes in boxes(shape[1:], into, size):
                yield (index, *offsets), (1, *sizes)
        else:
            size = count // row * row
            yield (index, *(0,) * (len(shape) - 1)), (size // row, *shape[1:])
        start, count = start + size, count - size


class BlockGrid(NamedTuple):
    """One block size per dimension of the weight. Edge blocks may be ragged."""

    weight_shape: Shape
    block_size: Shape

    @property
    def shape(self) -> Shape:
        """Blocks per dimension: the shape of the scales."""
        return tuple(-(-dim // block) for dim, block in zip(self.weight_shape, self.block_size, strict=True))

    @property
    def per_tensor(self) -> bool:
        """Whether one scale spans the whole weight."""
        return prod(self.shape) <= 1


class Window(NamedTuple):
    """A rectangle of one matrix of a weight, and its place in the grid.

    ``elements``: its place in the run of elements that was cut; ``rows``, ``cols``: its sizes. ``blocks`` selects the
    scales that it meets, as a matrix, from those of `as_matrices`. ``phase``: the (rows, columns) by which it begins
    inside its first block, then the rows and columns of a block.
    """

    elements: slice
    rows: int
    cols: int
    blocks: tuple[int | slice, ...]
    phase: tuple[int, int, int, int]


def as_matrices(grid: BlockGrid) -> BlockGrid:
    """Return the grid with at least two dimensions; a weight of fewer is one row. The scales and their order do not
    change.
    """
    rank = max(2, len(grid.weight_shape))
    return BlockGrid((1, 1, *grid.weight_shape)[-rank:], (1, 1, *grid.block_size)[-rank:])


def window(
    grid: BlockGrid, lead: tuple[int, ...], row: int, col: int, sizes: tuple[int, ...], elements: slice
) -> Window:
    """Return the window of ``sizes`` (rows, columns) at (row, col) of matrix ``lead`` of a grid of matrices."""
    rows, cols = sizes
    block_rows, block_cols = grid.block_size[-2:]
    blocks: tuple[int | slice, ...] = (
        *(i // size for i, size in zip(lead, grid.block_size, strict=False)),
        slice(row // block_rows, (row + rows - 1) // block_rows + 1),
        slice(col // block_cols, (col + cols - 1) // block_cols + 1),
    )
    return Window(elements, rows, cols, blocks, (row % block_rows, col % block_cols, block_rows, block_cols))


def windows(grid: BlockGrid, start: int, count: int) -> Iterator[Window]:
    """Yield the elements ``start`` to ``start + count`` of a grid of matrices, in row-major order, as windows."""
    shape = grid.weight_shape
    rows_of_one, cols = shape[-2:]
    done = 0
    while done < count:
        row, col = divmod(start + done, cols)
        matrix, row = divmod(row, rows_of_one)
        lead = []
        for dim in reversed(shape[:-2]):
            matrix, i = divmod(matrix, dim)
            lead.append(i)
        # As many whole rows as remain in this matrix, or the rest of a row that was entered midway.
        rows = 1 if col else min(rows_of_one - row, (count - done) // cols) or 1
        width = min(cols - col, count - done)
        yield window(grid, tuple(reversed(lead)), row, col, (rows, width), slice(done, done + rows * width))
        done += rows * width


class Surroundings(NamedTuple):
    """The blocks that a region meets, as a grid of their own. ``offsets``: the region's place in the weight of that
    grid; ``first``: the index of its first block in the whole grid.
    """

    grid: BlockGrid
    offsets: Shape
    first: Shape

    @property
    def region(self) -> Region:
        """The blocks, as a region of the whole grid."""
        return self.first, self.grid.shape


def surroundings(grid: BlockGrid, offsets: Shape, sizes: Shape) -> Surroundings:
    """Return the blocks that meet the non-empty region at ``offsets`` of ``sizes``."""
    first, inside, shape = [], [], []
    for dim, block, start, size in zip(*grid, offsets, sizes, strict=True):
        at = start // block
        first.append(at)
        inside.append(start - at * block)
        shape.append(min(dim, -(-(start + size) // block) * block) - at * block)
    return Surroundings(BlockGrid(tuple(shape), grid.block_size), tuple(inside), tuple(first))


def whole_blocks(grid: BlockGrid, offsets: Shape, sizes: Shape) -> tuple[Shape, Shape]:
    """Return the region (offsets, sizes) of the blocks that lie completely inside a region; sizes of 0 if there are
    none.
    """
    starts, lengths = [], []
    for dim, block, start, size in zip(*grid, offsets, sizes, strict=True):
        low = -(-start // block) * block
        high = dim if start + size == dim else (start + size) // block * block
        starts.append(low)
        lengths.append(max(0, high - low))
    return tuple(starts), tuple(lengths)


def first_elements(grid: BlockGrid, offsets: Shape, sizes: Shape) -> tuple[Shape, Shape]:
    """Return the blocks, as a region (first, count) of the grid, whose first element is in a region of the weight."""
    bounds = [
        (-(-start // block), -(-(start + size) // block))
        for block, start, size in zip(grid.block_size, offsets, sizes, strict=True)
    ]
    return tuple(low for low, _ in bounds), tuple(high - low for low, high in bounds)


def tiled(weight_shape: Shape, block_size: Shape) -> BlockGrid | None:
    """Return the grid of a configured block size, which applies to the weight's last dimensions; leading dimensions get
    blocks of 1. None if the weight has fewer dimensions.
    """
    lead = len(weight_shape) - len(block_size)
    if lead < 0:
        return None
    return BlockGrid(weight_shape, (1,) * lead + block_size)


def infer_grid(weight_shape: Shape, scale_shape: Shape, block_size: Shape | None) -> BlockGrid | None:
    """Return the grid by which scales of ``scale_shape`` tile a weight, or None if they do not.

    In order: a one-element scale spans the whole tensor, whatever its rank. A 1-D scale of more elements belongs to
    dimension 0. A scale of twice the weight's rank whose odd dimensions are 1 (ModelOpt's ``[ob, 1, ib, 1]``) is
    squeezed. Then the configured ``block_size`` is tried on the last dimensions, and last the reading in which each
    dimension of the scale is either 1 (one block spans it) or the weight's own (blocks of 1).

    The configured block size is tried first, because 1 does not mean "spans it" beside a dimension that needs the
    configuration: a weight (256, 256) in 128 x 128 blocks with a scale (2, 1) has lost a column of scales.
    """
    rank = len(weight_shape)
    if prod(scale_shape) == 1:
        return BlockGrid(weight_shape, tuple(max(dim, 1) for dim in weight_shape))
    if len(scale_shape) == 1:
        scale_shape += (1,) * (rank - 1)
    elif len(scale_shape) == 2 * rank and all(dim == 1 for dim in scale_shape[1::2]):
        scale_shape = scale_shape[::2]
    if len(scale_shape) != rank:
        return None
    if block_size is not None:
        grid = tiled(weight_shape, block_size)
        if grid is not None and grid.shape == scale_shape:
            return grid
    if all(scale in (1, dim) for scale, dim in zip(scale_shape, weight_shape, strict=True)):
        block = tuple(1 if scale == dim else dim for scale, dim in zip(scale_shape, weight_shape, strict=True))
        return BlockGrid(weight_shape, block) if all(block) else None  # an empty dimension has no block
    return None

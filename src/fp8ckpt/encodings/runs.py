"""Cutting a run of a weight's elements into pieces to process: whole blocks, or parts of wide ones."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from fp8ckpt.numerics.geometry import BlockGrid, as_matrices


class Run(NamedTuple):
    """``size`` elements of a weight from ``first`` on, at ``start`` in ``grid``. ``blocks``: the places of the grid's
    blocks among those of the weight.
    """

    first: int
    size: int
    grid: BlockGrid
    start: int
    blocks: slice


def bands_of(grid: BlockGrid, begin: int, count: int, most: int) -> Iterator[Run]:
    """Yield a run of whole blocks in bands of about ``most`` elements, each with a grid of its own."""
    matrices = as_matrices(grid)
    rows_of_one, cols = matrices.weight_shape[-2:]
    block = matrices.block_size[-2:]
    per_band = max(block[0], most // cols // block[0] * block[0])
    block_rows, block_cols = matrices.shape[-2:]
    first = begin
    while first < begin + count:
        matrix, row = divmod(first // cols, rows_of_one)
        rows = min(per_band, rows_of_one - row, (begin + count - first) // cols)
        band = BlockGrid((rows, cols), block)
        start = (matrix * block_rows + row // block[0]) * block_cols
        yield Run(first, rows * cols, band, 0, slice(start, start + prod(band.shape)))
        first += rows * cols


def runs_of(grid: BlockGrid, begin: int, count: int, most: int) -> Iterator[Run]:
    """Yield a run of a wide weight in pieces of at most ``most`` elements. The grid is that of one matrix (stacked
    experts may have many scales), unless blocks span matrices.
    """
    matrices = as_matrices(grid)
    matrix = prod(matrices.weight_shape[-2:])
    per_matrix = BlockGrid(matrices.weight_shape[-2:], matrices.block_size[-2:])
    if any(size > 1 for size in matrices.block_size[:-2]):
        matrix, per_matrix = max(1, prod(matrices.weight_shape)), matrices
    blocks = max(1, prod(per_matrix.shape))
    first = begin
    while first < begin + count:
        index, start = divmod(first, matrix)
        size = min(most, begin + count - first, matrix - start)
        yield Run(first, size, per_matrix, start, slice(index * blocks, (index + 1) * blocks))
        first += size

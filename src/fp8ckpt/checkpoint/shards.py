"""How the shards of a quantized weight are cut into pieces, in coordinates of the full weight and of its grid. Nothing
here touches values.

A block whose elements all lie in one shard is decided and written in one step. Any other block *waits*: the edge of a
shard cuts it, or it is larger than what is worked on at once, or it shares its scale with sibling weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.planner import WriteItem

from fp8ckpt.checkpoint.items import region_of
from fp8ckpt.numerics.geometry import BlockGrid, Region, pieces, surroundings, whole_blocks
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.scaled import QuantizedTensor

PIECE = 8  # steps; one write if it is contiguous

Numbers = npt.NDArray[np.int64]


class Shard(NamedTuple):
    """A part of an FP8 weight of the base that this rank writes.

    ``number``: of the weight's first block, among all blocks of the base; weights that share one scale have the same.
    ``joined``: whether the weight shares its scale so. ``factor``: the number of its second-level scale, if it has one;
    that scale spans the whole weight as a block would, and the members of a unit share it.
    """

    item: WriteItem
    weight: QuantizedTensor
    number: int
    joined: bool
    factor: int | None = None

    @property
    def region(self) -> Region:
        """The region of the weight's codes that the shard covers."""
        return self.weight.of_codes(region_of(self.item))

    def in_order(self, values: torch.Tensor) -> torch.Tensor:
        """The values with their dimensions in the order of the codes."""
        return values.mT if self.weight.across else values

    def inner(self, step: int) -> Region:
        """The region of the blocks that need not wait, if ``step`` elements are worked on at once."""
        grid = self.weight.grid
        offsets, sizes = whole_blocks(grid, *self.region)
        if self.joined or elements_of_block(grid) > step:
            return offsets, (0,) * len(sizes)
        return offsets, sizes

    def waiting(self, step: int) -> Iterator[Region]:
        """The regions outside `inner`."""
        return _outside(self.region, self.inner(step))

    def numbers(self, first: tuple[int, ...], count: tuple[int, ...]) -> Numbers:
        """The numbers [n] of the blocks of a region of the grid."""
        return self.number + numbers_of(self.weight.grid.shape, first, count)


def numbers_of(shape: tuple[int, ...], first: tuple[int, ...], count: tuple[int, ...]) -> Numbers:
    """The numbers [n], in row-major order, of the elements of a region."""
    found: Numbers = np.zeros(1, np.int64)
    for dim, start, length in zip(shape, first, count, strict=True):
        found = np.add.outer(found * dim, np.arange(start, start + length)).reshape(-1)
    return found


def number_blocks(base: Checkpoint) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of each weight's first block, and of its factor, if it has one; the same on every rank."""
    blocks, factors, following = {}, {}, 0
    for tensor in base.quantized:
        blocks[tensor.name] = following
        following += max(prod(tensor.grid.shape), 1)
        if tensor.second is not None:
            factors[tensor.name] = following
            following += 1
    return blocks, factors


class Cut(NamedTuple):
    """A piece of a shard, with the shard's values. ``whole``: it consists of whole blocks, none of which waits."""

    shard: Shard
    values: torch.Tensor
    region: Region
    whole: bool

    def steps(self, most: int) -> Iterator[Region]:
        """Yield the piece in regions of at most ``most`` elements; if it is ``whole``, in whole blocks."""
        if self.whole:
            return _pieces_of_blocks(self.shard.weight.grid, self.region, most)
        return pieces(self.region, most)


def cut(shard: Shard, values: torch.Tensor, step: int, *, waiting: bool) -> Iterator[Cut]:
    """Yield all pieces of a shard, or those that are ``waiting``: to be looked at before they are written."""
    if not waiting:
        for region in _pieces_of_blocks(shard.weight.grid, shard.inner(step), PIECE * step):
            yield Cut(shard, values, region, whole=True)
    for part in shard.waiting(step):
        for region in pieces(part, PIECE * step):
            yield Cut(shard, values, region, whole=False)


def elements_of_block(grid: BlockGrid) -> int:
    """The number of elements of a block that the weight's edge does not cut."""
    return prod(min(dim, block) for dim, block in zip(*grid, strict=True))


def _pieces_of_blocks(grid: BlockGrid, region: Region, most: int) -> Iterator[Region]:
    """Yield a region of whole blocks in pieces of at most ``most`` elements, or of one block."""
    if not prod(region[1]):
        return
    around = surroundings(grid, *region)
    ends = [start + size for start, size in zip(*region, strict=True)]
    for first, count in pieces(around.region, max(1, most // elements_of_block(grid))):
        offsets = tuple(at * block for at, block in zip(first, grid.block_size, strict=True))
        stops = [
            min((at + n) * block, end) for at, n, block, end in zip(first, count, grid.block_size, ends, strict=True)
        ]
        yield offsets, tuple(stop - start for start, stop in zip(offsets, stops, strict=True))


def _outside(region: Region, inner: Region) -> Iterator[Region]:
    """Yield the part of the region outside ``inner`` as rectangles; all of it if ``inner`` is empty."""
    if not prod(inner[1]):
        if prod(region[1]):
            yield region
        return
    offsets, sizes = list(region[0]), list(region[1])
    for axis, (start, size) in enumerate(zip(*inner, strict=True)):
        for low, high in ((offsets[axis], start), (start + size, offsets[axis] + sizes[axis])):
            if high > low:
                yield ((*offsets[:axis], low, *offsets[axis + 1 :]), (*sizes[:axis], high - low, *sizes[axis + 1 :]))
        offsets[axis], sizes[axis] = start, size

"""Block grids: how scales tile a weight.

Per-tensor, per-expert, per-channel, per-block and MX scaling are one thing: a grid of blocks with one scale each. The
invariant is ``scale shape == ceil(weight shape / block size)``, per dimension. There is no enum of schemes, and no
guessing by division: what neither the shapes nor the configuration states is refused.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]


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


def tiled(weight_shape: Shape, block_size: Shape) -> BlockGrid | None:
    """The grid of a configured block size, which belongs to the weight's last dimensions; leading ones get one block an index."""
    lead = len(weight_shape) - len(block_size)
    if lead < 0:
        return None
    return BlockGrid(weight_shape, (1,) * lead + block_size)


def infer_grid(weight_shape: Shape, scale_shape: Shape, block_size: Shape | None) -> BlockGrid | None:
    """The grid by which scales of ``scale_shape`` tile a weight, or None where they do not.

    In order: a one-element scale spans the whole tensor, whatever its rank. A 1-D scale of more elements belongs to
    dimension 0. A scale of twice the weight's rank whose odd dimensions are 1 (ModelOpt's ``[ob, 1, ib, 1]``) is squeezed.
    Then the configured ``block_size`` is tried on the last dimensions, and last the reading in which each dimension of the
    scale is either 1 (one block spans it) or the weight's own (blocks of 1).

    The configured block size goes first, and a dimension of 1 is not read as "spans it" beside one that needs the
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
        return BlockGrid(weight_shape, block)
    return None

"""How shards are cut: every element once, whole blocks where that is said, and every block owned by one piece."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fp8ckpt.checkpoint.shards import PIECE, Shard, cut
from fp8ckpt.numerics.geometry import BlockGrid, first_elements, surroundings
from fp8ckpt.stores.memory import PLANNED
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import TensorSpan


def shards_of(grid: BlockGrid, cuts: list[list[int]], joined: bool = False) -> list[Shard]:
    """A weight cut at these places in each dimension."""
    shape = grid.weight_shape
    span = TensorSpan("w", File(PLANNED, "f"), "F8_E4M3", shape, 0, prod(shape))
    weight = QuantizedTensor("w", span, span._replace(name="s"), grid, (), "F8_E4M3")
    found = []
    for bounds in product(*(pairwise([0, *at, dim]) for at, dim in zip(cuts, shape, strict=True))):
        chunk = SimpleNamespace(offsets=[low for low, _ in bounds], sizes=[high - low for low, high in bounds])
        item: Any = SimpleNamespace(tensor_data=SimpleNamespace(chunk=chunk))
        found.append(Shard(item, weight, 7, joined))
    return found


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_cuts_tile_the_weight(seed: int, joined: bool) -> None:
    """For any grid, any shards (empty ones, too) and any step."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))
    shape = tuple(int(n) for n in rng.integers(1, 15, rank))
    grid = BlockGrid(shape, tuple(int(rng.integers(1, dim + 3)) for dim in shape))
    shards = shards_of(
        grid, [sorted(int(i) for i in rng.integers(0, dim + 1, rng.integers(0, 3))) for dim in shape], joined
    )
    step = int(rng.integers(1, 60))
    numbers = 7 + np.arange(prod(grid.shape)).reshape(grid.shape)
    of_element = numbers[np.ix_(*(np.arange(dim) // size for dim, size in zip(shape, grid.block_size, strict=True)))]
    largest_block = int(np.bincount(of_element.flat).max())
    times, owned, waited = np.zeros(shape, int), [], np.zeros(shape, int)
    for shard in shards:
        assert prod(shard.region[1]) == 0 or set(shard.numbers(*_met(grid, shard.region))) == set(
            of_element[_slices(shard.region)].flat
        )
        for piece in cut(shard, torch.empty(shard.region[1]), step, waiting=False):
            assert prod(piece.region[1]) <= max(PIECE * step, 1)
            steps = list(piece.steps(step))
            assert sum(prod(sizes) for _, sizes in steps) == prod(piece.region[1])
            for region in steps:
                assert prod(region[1]) <= max(step, 1)
                times[_slices(region)] += 1
                owned += list(shard.numbers(*first_elements(grid, *region)))
                if piece.whole:
                    assert not joined
                    blocks = of_element[_slices(region)]
                    assert np.isin(of_element, blocks).sum() == blocks.size
        for piece in cut(shard, torch.empty(shard.region[1]), step, waiting=True):
            waited[_slices(piece.region)] += 1
    assert (times == 1).all()
    assert sorted(owned) == list(numbers.flat)
    if largest_block > step or joined:
        assert (waited == 1).all()
    parts = [
        len({i for i, shard in enumerate(shards) if (of_element[_slices(shard.region)] == number).any()})
        for number in numbers.flat
    ]
    assert set(of_element[waited == 1]) >= {
        number for number, count in zip(numbers.flat, parts, strict=True) if count > 1
    }
    if joined is False and largest_block <= step:
        assert set(of_element[waited == 1]) == {
            number for number, count in zip(numbers.flat, parts, strict=True) if count > 1
        }


def _slices(region: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(*region, strict=True))


def _met(grid: BlockGrid, region: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    around = surroundings(grid, *region)
    return around.first, around.grid.shape

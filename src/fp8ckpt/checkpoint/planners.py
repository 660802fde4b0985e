"""Planners that translate a model's shards, by their assemblies, into items of the tensors on disk. Readers and writers
see only the names and coordinates on disk.

An item is one piece of one shard, and its target a view of the shard, strided or transposed if need be. So a rank reads
only what it holds, without a second copy.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor

from fp8ckpt.errors import UnsupportedFormatError
from fp8ckpt.numerics.geometry import Region, Shape, within
from fp8ckpt.tensors.assembly import NEW, Assembly

Runs = list[tuple[int, int]]  # (start, stop) in the full tensor, in the order of the shard


class Part(NamedTuple):
    """A piece of this rank's shard of a tensor. ``values``: its view of the shard, in the source's axes."""

    source: str
    region: Region  # in the source
    values: torch.Tensor


def parts_of(tensor: torch.Tensor, assembly: Assembly) -> Iterator[Part]:
    """Yield the parts that this rank's shard of ``tensor`` is made of."""
    if not tensor.numel():  # its name must be in the plan all the same
        for piece in assembly.pieces:
            region = piece.source_region
            yield Part(piece.source, region, torch.empty(region[1], dtype=tensor.dtype, device=tensor.device))
        return
    for (offsets, sizes), local in boxes(tensor):
        for piece in assembly.cut((offsets, sizes)):
            region, values = piece.source_region, local[within(piece.region, (offsets, sizes))]
            yield Part(piece.source, region, _in_axes_of_source(values, piece.axes, region[1]))


def boxes(tensor: torch.Tensor) -> Iterator[tuple[Region, torch.Tensor]]:
    """Yield this rank's shard as boxes of the full tensor, each with its part of the shard. There are several only if a
    dimension is sharded in strides.
    """
    if not isinstance(tensor, DTensor):
        yield ((0,) * tensor.ndim, tuple(tensor.shape)), tensor.detach()
        return
    local = tensor.to_local().detach()
    if tensor.device_mesh.get_coordinate() is None or not local.numel():
        return
    runs = _runs(tensor)
    if tuple(local.shape) != tuple(sum(stop - start for start, stop in of_axis) for of_axis in runs):
        shape, placements = tuple(local.shape), tensor.placements
        raise UnsupportedFormatError.of_shard(shape=shape, placements=placements, whole=tuple(tensor.shape))
    for box in product(*(_with_places(of_axis) for of_axis in runs)):
        offsets, sizes = tuple(start for start, _, _ in box), tuple(stop - start for start, stop, _ in box)
        yield (offsets, sizes), local[tuple(slice(at, at + stop - start) for start, stop, at in box)]


def _runs(tensor: DTensor) -> list[Runs]:
    """For each dimension, the runs of elements that this rank holds, by applying the placements in the mesh's order."""
    coordinate = tensor.device_mesh.get_coordinate() or ()
    runs: list[Runs] = [[(0, size)] for size in tensor.shape]
    for place, size, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
        if placement.is_partial():
            raise UnsupportedFormatError.of_placement(placement=placement)
        axis: int | None = getattr(placement, "dim", None)
        if axis is not None:
            groups = _cut(runs[axis], getattr(placement, "split_factor", 1))  # more than 1 in strided shards only
            runs[axis] = [run for group in groups for run in _cut(group, size)[place]]
    return runs


def _cut(runs: Runs, count: int) -> list[Runs]:
    """Divide the runs' elements as ``torch.chunk`` does, into ``count`` parts, of which the last may be empty."""
    length = sum(stop - start for start, stop in runs)
    size = -(-length // count)
    parts: list[Runs] = [[] for _ in range(count)]
    at = 0
    for start, stop in runs:
        while start < stop:
            part = at // size
            taken = min(stop - start, (part + 1) * size - at)
            parts[part].append((start, start + taken))
            start, at = start + taken, at + taken
    return parts


def _with_places(runs: Runs) -> list[tuple[int, int, int]]:
    """The runs, each with its start in the shard."""
    places = accumulate((stop - start for start, stop in runs), initial=0)
    return [(start, stop, at) for (start, stop), at in zip(runs, places, strict=False)]


def _in_axes_of_source(values: torch.Tensor, axes: tuple[int, ...], sizes: Shape) -> torch.Tensor:
    for axis in reversed([i for i, of in enumerate(axes) if of == NEW]):
        values = values.squeeze(axis)
    kept = [of for of in axes if of != NEW]
    values = values.permute([kept.index(of) for of in sorted(kept)])
    for axis in sorted(set(range(len(sizes))) - set(kept)):
        values = values.unsqueeze(axis)
    return values


class AssemblyLoadPlanner(LoadPlanner):
    """A planner that reads the parts it is given. No rank needs another's plan, so the plan exchanged is empty."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to set up."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return LoadPlan([_read_item(i, part) for i, part in enumerate(self._parts)])

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: there is nothing but tensors."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert read_item.dest_index.index is not None  # _read_item() set it
        return self._parts[read_item.dest_index.index].values

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the values were read into the shard."""


def _read_item(index: int, part: Part) -> ReadItem:
    offsets, sizes = part.region
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(part.source, index=index),
        dest_offsets=torch.Size([0] * len(sizes)),
        storage_index=MetadataIndex(part.source),
        storage_offsets=torch.Size(offsets),
        lengths=torch.Size(sizes),
    )


class AssemblySavePlanner(DefaultSavePlanner):
    """A planner that writes a state dict's tensors by their ``assemblies``; ``shapes`` are those of the tensors on
    disk. If several ranks hold the same part, one of them writes it.
    """

    def __init__(self, assemblies: Mapping[str, Assembly], shapes: Mapping[str, Shape]) -> None:
        super().__init__(flatten_state_dict=False)
        self._assemblies = assemblies
        self._shapes = shapes
        self._values: dict[MetadataIndex, torch.Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self._values = {
            MetadataIndex(part.source, torch.Size(part.region[0])): part.values
            for name, tensor in state_dict.items()
            for part in parts_of(tensor, self._assemblies[name])
        }

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._write_item(index, values) for index, values in self._values.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._values[write_item.index]

    def _write_item(self, index: MetadataIndex, values: torch.Tensor) -> WriteItem:
        assert index.offset is not None  # set_up_planner() set it
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(index.offset, values.shape),
            properties=TensorProperties.create_from_tensor(values),
            size=torch.Size(self._shapes[index.fqn]),
        )
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

"""A storage writer that makes torch's distributed checkpoint quantize as it writes: final FP8 files in a base's own
layout, in one pass.

What is written is, file for file and byte for byte, what ``convert(..., to="fp8", like=base)`` makes of the same
values, however they are sharded: names, headers, index, configuration and side files are the base's, and so are
activation scales and the scales of a cache; a scale is kept or made by the rule of `fp8ckpt.numerics.quantize`, of all
elements of its block. No rank holds a copy of its shard, in any dtype. Values stay on their device until a piece of
them is worked on.

Its life is that of `fp8ckpt.checkpoint.directory_writer`. ``write_data`` takes three steps, after each of which all
ranks meet: look at the blocks that are cut by the edges of shards; exchange what decides their scales, where there are
any; write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from fp8ckpt.checkpoint.directory_writer import (
    DirectoryWriter,
    carried_from,
    given_like,
    region_of,
    resolved,
    write_region,
)
from fp8ckpt.checkpoint.shard_quantizing import BYTES_OF_STEP, ShardQuantizer, WaitingBlocks, count_nonfinite
from fp8ckpt.checkpoint.shards import Cut, Shard, cut_all, cut_waiting, number_blocks
from fp8ckpt.checkpoint.storage_writer import cast
from fp8ckpt.errors import RanksDifferError, WeightValueError
from fp8ckpt.families.siblings import equal_units
from fp8ckpt.numerics import quantize
from fp8ckpt.numerics.codes import SCALES
from fp8ckpt.numerics.geometry import Region, pieces, within
from fp8ckpt.output.files import OutputFiles
from fp8ckpt.output.layout import FileLayout, TensorSpec
from fp8ckpt.output.like import BaseLayout
from fp8ckpt.output.matching import refuse_base, refuse_other_dtypes
from fp8ckpt.output.plan import OutputPlan
from fp8ckpt.ranks import BEYOND, GroupRanks, Ranks, threads_of_this_rank
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint
from fp8ckpt.tensors.config import states_powers_of_two
from fp8ckpt.tensors.reading import stored_scales
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.workers import share

_LARGEST_STEP = 1 << 19  # elements that are worked on at once: with their codes they stay in a second-level cache
_LEAST_STEP = 1 << 16  # of a machine with a thousand cores

_COPIED = 4 << 20  # bytes of the base at once

T = TypeVar("T")


class FP8StorageWriter(DirectoryWriter):
    """Quantizes to the new directory ``path``, for ``dcp.save(state_dict, storage_writer=...)`` and ``dcp.async_save``.

    ``like``: the FP8 checkpoint that the model came from: a directory, a hub id in the local cache, or an open
    `Checkpoint`; ``base`` is its former name. The state dict has its logical tensors under its names, in bfloat16,
    float16 or float32; DTensors of any placement. ``scales``: "reuse" keeps the scale of a block whose values still fit
    it, "fresh" makes all anew. ``carry``: names of tensors that are taken from the base where the state dict lacks
    them; those of MTP layers always are. ``process_group``: the one that ``dcp.save`` is given. ``bytes_written``
    counts this rank's tensor bytes.

    Raises, on every rank: `UnsupportedFormatError` for a base that is not FP8 (e4m3) or a dtype that is not quantized,
    `ModelMismatchError` for other tensors or shapes than the base's, `WeightValueError` for elements that are not
    finite, `RangeError` for values that no stored dtype can hold. Through ``dcp.save`` they come inside torch's
    ``CheckpointException``.

    >>> import torch.distributed.checkpoint as dcp
    >>> checkpoint = fp8ckpt.open_checkpoint("sample-fp8")
    >>> state_dict = {name: checkpoint.read(name) for name in checkpoint.tensors}
    >>> _ = dcp.save(state_dict, storage_writer=fp8ckpt.FP8StorageWriter("saved", like="sample-fp8"))
    >>> fp8ckpt.verify("sample-fp8", "saved").ok
    True
    """

    def __init__(
        self,
        path: str | Path,
        *,
        like: CheckpointLike | None = None,
        scales: str = "reuse",
        carry: Collection[str] = (),
        process_group: ProcessGroup | None = None,
        base: CheckpointLike | None = None,
    ) -> None:
        if scales not in SCALES:
            raise ValueError(f"scales={scales!r}; expected one of {', '.join(SCALES)}")
        super().__init__(path)
        given = given_like(like, base)
        if given is None:
            raise TypeError("FP8StorageWriter needs like, the FP8 checkpoint that the model came from")
        self._base = given
        self._fresh = scales == "fresh"
        self._carry = carry
        self._group = process_group
        self._beside: set[str] = set()  # the coordinator's: stored tensors that no shard holds
        self._empty: set[str] = set()  # and those of them that are the scales of weights without elements

    def __getstate__(self) -> dict[str, Any]:
        # For the process of an asynchronous save, whose default group is made of the ranks of the group that the save
        # is given.
        return {**self.__dict__, "_group": None}

    def _base_of_output(self) -> Checkpoint:
        self._base = base = open_checkpoint(self._base)
        return base

    def _said(self) -> dict[str, Any]:
        own = {"fresh": self._fresh, "carry": sorted(self._carry)}
        if dist.is_available() and dist.is_initialized():
            own["the process_group"] = dist.get_process_group_ranks(self._group or dist.group.WORLD)
        return {**super()._said(), **own}

    def _refuse_unlike(self, said: list[dict[str, Any]]) -> None:
        """Also where the ranks of the save are not those of the group: in it they exchange what decides scales."""
        super()._refuse_unlike(said)
        group = said[0].get("the process_group", [])
        if len(said) > 1 and len(group) != len(said):
            found = f"{len(group)} ranks are in the writer's process group, and {len(said)} save"
            remedy = "give FP8StorageWriter the process_group that dcp.save is given"
            raise RanksDifferError(found, expected="the same ranks", remedy=remedy)

    def _planned(self, tensors: dict[str, TensorSpec]) -> OutputPlan:
        base = self._base_of_output()
        remedy = "give the FP8 checkpoint that the model came from"
        refuse_base(base, remedy)
        carried = carried_from(base, tensors, self._carry, remedy)
        refuse_other_dtypes(tensors, base)
        layout = BaseLayout(base)
        held = [tensor for name, tensor in base.tensors.items() if name not in carried]
        sharded = {tensor.name for tensor in held if tensor.scaled is None}
        filled = [tensor.scaled for tensor in held if tensor.scaled is not None and tensor.numel]
        sharded |= {span.name for tensor in filled for span in (tensor.weight, tensor.scale)}
        self._beside = {span.name for part in layout.layouts for span in part.spans if span.nbytes} - sharded
        self._empty = {tensor.scale.name for tensor in base.quantized if not tensor.numel}
        return OutputPlan((base,), {"job": "save", "fresh": self._fresh}, layout.layouts, layout.texts, layout.copies)

    def _shared_out(self, plans: list[SavePlan], output: OutputPlan) -> list[SavePlan]:
        per_tensor = (
            tensor for tensor in self._base_of_output().quantized if tensor.grid.per_tensor and tensor.scale.nbytes
        )
        leader = {name: unit[0] for unit in equal_units(stored_scales(per_tensor)) if len(unit) > 1 for name in unit}
        return [
            dataclasses.replace(
                plan,
                storage_data=_Task(
                    len(plans),
                    {item.index.fqn: leader[item.index.fqn] for item in plan.items if item.index.fqn in leader},
                ),
            )
            for plan in plans
        ]

    def _write(self, plan: SavePlan, planner: SavePlanner, files: OutputFiles) -> int:
        task: _Task = plan.storage_data
        return _Writing(self._base_of_output(), task, plan, planner, files, self._fresh).run(self._ranks(task))

    def _ranks(self, task: _Task) -> Ranks:
        if task.size == 1:
            return Ranks()
        return GroupRanks(self._group)

    def _complete(self, layout: FileLayout, files: OutputFiles) -> int:
        """Copy what no shard holds: what is carried, the base's activation scales and scales of a cache. A weight
        without elements has a scale, too.
        """
        file = File(self._base_of_output().store, layout.name)
        done = 0
        for span in layout.spans:
            if span.name not in self._beside:
                continue
            if self._fresh and span.name in self._empty:
                fresh = quantize.fresh_scales(np.zeros(span.numel, np.float32), span.dtype).view(np.uint8)
                files.of(layout.name).write(fresh, span.start)
            else:
                for start in range(span.start, span.stop, _COPIED):
                    stored = np.empty(min(_COPIED, span.stop - start), np.uint8)
                    file.read(start, stored)
                    files.of(layout.name).write(stored, start)
            done += span.nbytes
        return done


class _Task(NamedTuple):
    """What a rank must know: of how many it is one, and of which weight each of its weights shares the scale (units of
    two or more).
    """

    size: int
    leader: Mapping[str, str]


class _Plain(NamedTuple):
    """A piece of a tensor that is not quantized."""

    span: TensorSpan
    region: Region
    values: torch.Tensor


class _Writing:
    """One rank's part of one save."""

    def __init__(
        self, base: Checkpoint, task: _Task, plan: SavePlan, planner: SavePlanner, files: OutputFiles, fresh: bool
    ) -> None:
        self._base = base
        self._task = task
        self._plan = plan
        self._planner = planner
        self._files = files
        self._fresh = fresh
        self._threads = threads_of_this_rank()
        self._step = min(_LARGEST_STEP, max(_LEAST_STEP, BEYOND // self._threads // BYTES_OF_STEP))
        self._shards: list[Shard] = []
        self._plain: list[tuple[WriteItem, TensorSpan]] = []
        self._waiting = WaitingBlocks((), self._step)

    def run(self, ranks: Ranks) -> int:
        """Look, exchange, write; returns how many bytes. All ranks meet at each step, whatever each has to do."""
        looked = ranks.gather(self._look)
        self._refuse_nonfinite(ranks, [nonfinite for nonfinite, _ in looked])
        self._waiting.exchange(ranks, max(shared for _, shared in looked))
        wrote = ranks.gather(self._write)
        self._refuse_nonfinite(ranks, [nonfinite for nonfinite, _ in wrote])
        return wrote[ranks.rank][1]

    def _look(self) -> tuple[set[str], int]:
        numbers = number_blocks(self._base)
        for item in self._plan.items:
            name = item.index.fqn
            tensor = self._base.tensors[name]
            if tensor.scaled is not None:
                self._shards.append(
                    Shard(item, tensor.scaled, numbers[self._task.leader.get(name, name)], name in self._task.leader)
                )
            else:
                self._plain.append((item, tensor.span))
        self._waiting = WaitingBlocks(self._shards, self._step)
        quantizers = self._quantizers()
        share(self._cuts(cut_waiting), [quantizer.look for quantizer in quantizers])
        return set().union(*(quantizer.nonfinite for quantizer in quantizers)), self._waiting.shared

    def _write(self) -> tuple[set[str], int]:
        quantizers = self._quantizers()
        written: list[int] = []

        def write(quantizer: ShardQuantizer, piece: Cut | _Plain) -> None:
            if isinstance(piece, Cut):
                quantizer.write(piece)
            else:
                written.append(write_region(self._files, piece.span, piece.region, cast(piece.values, piece.span)))

        share(self._all_pieces(), [partial(write, quantizer) for quantizer in quantizers])
        self._files.flush()
        nonfinite = set().union(*(quantizer.nonfinite for quantizer in quantizers))
        return nonfinite, sum(written) + sum(quantizer.bytes_written for quantizer in quantizers)

    def _refuse_nonfinite(self, ranks: Ranks, met: list[set[str]]) -> None:
        """Where any rank met elements that are not finite, count those of the first such weight over all ranks, and
        refuse it.
        """
        names = set().union(*met)
        if names:
            tensor = next(tensor for tensor in self._base.quantized if tensor.name in names)
            counts = ranks.gather(lambda: self._count_nonfinite(tensor.name))
            found = f"{sum(counts)} of {tensor.numel} elements are NaN or infinite, and have no FP8 code"
            remedy = "find out where the training diverged"
            raise WeightValueError(found, tensor=tensor.name, expected="finite weights", remedy=remedy)

    def _count_nonfinite(self, name: str) -> int:
        shards = [shard for shard in self._shards if shard.weight.name == name]
        return sum(count_nonfinite(shard, resolved(self._planner, shard.item), self._step) for shard in shards)

    def _quantizers(self) -> list[ShardQuantizer]:
        return [
            ShardQuantizer(
                self._files,
                self._waiting,
                fresh=self._fresh,
                powers_of_two=states_powers_of_two(self._base.config),
                step=self._step,
            )
            for _ in range(self._threads)
        ]

    def _cuts(self, cut: Callable[[Shard, torch.Tensor, int], Iterator[Cut]]) -> Iterator[Cut]:
        for shard in self._shards:
            yield from cut(shard, resolved(self._planner, shard.item), self._step)

    def _all_pieces(self) -> Iterator[Cut | _Plain]:
        yield from self._cuts(cut_all)
        for item, span in self._plain:
            region, values = region_of(item), resolved(self._planner, item)
            for piece in pieces(region, self._step):
                yield _Plain(span, piece, values[within(piece, region)])

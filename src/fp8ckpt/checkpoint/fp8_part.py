"""One rank's part of a save to FP8: look at the blocks that are cut by the edges of shards; exchange what decides their
scales, where there are any; write. All ranks meet after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from math import prod
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from fp8ckpt.checkpoint.directory_writer import region_of, resolved, write_region
from fp8ckpt.checkpoint.rounds import Rounds
from fp8ckpt.checkpoint.save_report import Tallies
from fp8ckpt.checkpoint.shard_quantizing import BYTES_OF_STEP, Halves, ShardQuantizer, WaitingBlocks, count_nonfinite
from fp8ckpt.checkpoint.shards import Cut, Shard, cut_all, cut_unknown, number_blocks
from fp8ckpt.checkpoint.storage_writer import cast
from fp8ckpt.encodings.results import QuantizationReport
from fp8ckpt.encodings.rule import Rule
from fp8ckpt.errors import WeightValueError
from fp8ckpt.numerics.geometry import Region, pieces, within
from fp8ckpt.ranks import BEYOND, threads_of_this_rank
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import states_powers_of_two
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.workers import share

_LARGEST_STEP = 1 << 19  # elements that are worked on at once: with their codes they stay in a second-level cache
_LEAST_STEP = 1 << 16  # of a machine with a thousand cores


class Task(NamedTuple):
    """What a rank must know: of which weight each of its weights shares the one scale or the factor (units of two or
    more), and what is carried from the base.
    """

    leader: Mapping[str, str]
    carried: Collection[str]


class PartDone(NamedTuple):
    """``bytes_written`` by this rank; ``base_bytes_read``, codes, and the report, of all ranks together."""

    bytes_written: int
    base_bytes_read: int
    report: QuantizationReport | None


class _Wrote(NamedTuple):
    nonfinite: set[str]
    bytes_written: int
    base_bytes_read: int


class _Plain(NamedTuple):
    """A piece of a tensor that is not quantized."""

    span: TensorSpan
    region: Region
    values: torch.Tensor


class Part:
    """What one rank does in one save. ``fresh``: no scale is kept. ``report``: count what quantizing does."""

    def __init__(
        self,
        base: Checkpoint,
        task: Task,
        planner: SavePlanner,
        rounds: Rounds,
        *,
        fresh: bool,
        report: bool,
    ) -> None:
        self._base = base
        self._task = task
        self._planner = planner
        self._rounds = rounds
        self._fresh = fresh
        self._threads = threads_of_this_rank()
        self._step = min(_LARGEST_STEP, max(_LEAST_STEP, BEYOND // self._threads // BYTES_OF_STEP))
        self._shards: list[Shard] = []  # of all rounds
        self._waiting = WaitingBlocks((), self._step)
        self._tallies = Tallies(base, fresh=fresh) if report else None
        self._halves = Halves(base)

    def run(self) -> PartDone:
        """Look, exchange, write. All ranks meet at each step, whatever each has to do."""
        ranks = self._rounds.ranks
        looked = ranks.gather(self._look)
        self._refuse_nonfinite([nonfinite for nonfinite, _ in looked])
        self._waiting.exchange(ranks, max(shared for _, shared in looked))
        written = base_bytes_read = 0
        for wrote in self._rounds.write(self._write):
            self._refuse_nonfinite([one.nonfinite for one in wrote])
            written += wrote[ranks.rank].bytes_written + self._settle()
            base_bytes_read += sum(one.base_bytes_read for one in wrote)
        report = None if self._tallies is None else self._tallies.report(ranks, self._task.carried)
        return PartDone(written, base_bytes_read, report)

    def _settle(self) -> int:
        """Write the bytes that lie in two pieces."""
        ranks, files = self._rounds.ranks, self._rounds.files
        settled = self._halves.settle(ranks, files)
        if self._halves:
            ranks.gather(files.flush)
        return settled

    def _look(self) -> tuple[set[str], int]:
        self._shards = list(self._shards_of(item for items in self._rounds.items for item in items))
        self._waiting = WaitingBlocks(self._shards, self._step)
        quantizers = self._quantizers()
        share(self._cuts(self._shards, cut_unknown), [quantizer.look for quantizer in quantizers])
        return set().union(*(quantizer.nonfinite for quantizer in quantizers)), self._waiting.shared

    def _shards_of(self, items: Iterable[WriteItem]) -> Iterator[Shard]:
        for item in items:
            tensor = self._base.tensors[item.index.fqn]
            if tensor.scaled is not None:
                yield self._shard(item, tensor.scaled, self._numbers)

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return number_blocks(self._base)

    def _shard(self, item: WriteItem, weight: QuantizedTensor, numbers: Mapping[str, int]) -> Shard:
        name = weight.name
        leader = self._task.leader.get(name, name)
        if weight.second is None:
            return Shard(item, weight, numbers[leader], name in self._task.leader)
        of_leader = self._base.tensors[leader].scaled
        assert of_leader is not None
        return Shard(item, weight, numbers[name], False, numbers[leader] + prod(of_leader.grid.shape))

    def _write(self, items: Sequence[WriteItem]) -> _Wrote:
        quantizers, files = self._quantizers(), self._rounds.files
        written: list[int] = []

        def write(quantizer: ShardQuantizer, piece: Cut | _Plain) -> None:
            if isinstance(piece, Cut):
                quantizer.write(piece)
            else:
                written.append(write_region(files, piece.span, piece.region, cast(piece.values, piece.span)))

        share(self._all_pieces(items), [partial(write, quantizer) for quantizer in quantizers])
        nonfinite = set().union(*(quantizer.nonfinite for quantizer in quantizers))
        return _Wrote(
            nonfinite,
            sum(written) + sum(quantizer.bytes_written for quantizer in quantizers),
            sum(quantizer.base_bytes_read for quantizer in quantizers),
        )

    def _refuse_nonfinite(self, met: list[set[str]]) -> None:
        """Where any rank met elements that are not finite, count those of the first such weight over all ranks, and
        refuse it.
        """
        names = set().union(*met)
        if names:
            tensor = next(tensor for tensor in self._base.quantized if tensor.name in names)
            counts = self._rounds.ranks.gather(lambda: self._count_nonfinite(tensor.name))
            raise WeightValueError.of_nonfinite(tensor.name, None, sum(counts), tensor.numel)

    def _count_nonfinite(self, name: str) -> int:
        shards = [shard for shard in self._shards if shard.weight.name == name]
        values = ((shard, shard.in_order(resolved(self._planner, shard.item))) for shard in shards)
        return sum(count_nonfinite(shard, of_shard, self._step) for shard, of_shard in values)

    def _quantizers(self) -> list[ShardQuantizer]:
        return [
            ShardQuantizer(
                self._rounds.files,
                self._waiting,
                self._tallies,
                self._halves,
                rule_of=self._rule_of,
                step=self._step,
            )
            for _ in range(self._threads)
        ]

    @cached_property
    def _rule_of(self) -> Callable[[QuantizedTensor], Rule]:
        powers_of_two, remedy = states_powers_of_two(self._base.config), "save in bf16, and choose a --scheme"

        @lru_cache(maxsize=4 * self._threads)
        def rule_of(weight: QuantizedTensor) -> Rule:
            file = weight.scale.file
            return Rule.like(weight, fresh=self._fresh, powers_of_two=powers_of_two, file=file, remedy=remedy)

        return rule_of

    def _cuts(self, shards: Iterable[Shard], cut: Callable[[Shard, torch.Tensor, int], Iterator[Cut]]) -> Iterator[Cut]:
        for shard in shards:
            yield from cut(shard, shard.in_order(resolved(self._planner, shard.item)), self._step)

    def _all_pieces(self, items: Sequence[WriteItem]) -> Iterator[Cut | _Plain]:
        yield from self._cuts(self._shards_of(items), cut_all)
        for item in items:
            tensor = self._base.tensors[item.index.fqn]
            if tensor.scaled is None:
                region, values = region_of(item), resolved(self._planner, item)
                for piece in pieces(region, self._step):
                    yield _Plain(tensor.span, piece, values[within(piece, region)])

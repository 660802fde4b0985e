"""One rank's part of a save to FP8: look at the blocks that are cut by the edges of shards; exchange what decides their
scales, where there are any; write. All ranks meet after each step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from fp8ckpt.checkpoint.directory_writer import resolved
from fp8ckpt.checkpoint.exchanged import Halves, WaitingBlocks
from fp8ckpt.checkpoint.rounds import Rounds
from fp8ckpt.checkpoint.shard_quantizing import BYTES_OF_STEP, ShardQuantizer, count_nonfinite
from fp8ckpt.checkpoint.shards import Cut, Shard, cut_all, cut_unknown, number_blocks
from fp8ckpt.checkpoint.storage_writer import write_plain
from fp8ckpt.encodings.facts import WeightFacts, report_of
from fp8ckpt.encodings.results import QuantizationReport
from fp8ckpt.encodings.rule import Rule
from fp8ckpt.errors import WeightValueError
from fp8ckpt.numerics import quantize
from fp8ckpt.ranks import BEYOND, threads_of_this_rank
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import states_powers_of_two
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.workers import share

_LARGEST_STEP = 1 << 19  # elements that are worked on at once: with their codes they stay in a second-level cache
_LEAST_STEP = 1 << 16  # of a machine with a thousand cores
_REMEDY = "save in bf16, and choose a --scheme"
_EXCHANGED = 1 << 14  # weights whose facts the ranks exchange at once, over all of them: some 500 bytes each


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
        self._halves = Halves(base)
        self._numbers = number_blocks(base)
        rule = partial(Rule.like, fresh=fresh, powers_of_two=states_powers_of_two(base.config), remedy=_REMEDY)
        self._rule_of = lru_cache(maxsize=4 * self._threads)(lambda weight: rule(weight, weight.scale.file))
        self._counting = report
        self._facts: dict[str, WeightFacts] = {}
        self._lock = threading.Lock()

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
        return PartDone(written, base_bytes_read, self._report() if self._counting else None)

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
                yield self._shard(item, tensor.scaled)

    def _shard(self, item: WriteItem, weight: QuantizedTensor) -> Shard:
        name, numbers = weight.name, self._numbers
        leader = self._task.leader.get(name, name)
        if weight.second is None:
            return Shard(item, weight, numbers[leader], name in self._task.leader)
        of_leader = self._base.tensors[leader].scaled
        assert of_leader is not None
        return Shard(item, weight, numbers[name], False, numbers[leader] + prod(of_leader.grid.shape))

    def _write(self, items: Sequence[WriteItem]) -> _Wrote:
        quantizers = self._quantizers()
        share(self._cuts(self._shards_of(items), cut_all), [quantizer.write for quantizer in quantizers])
        tensors = ((item, self._base.tensors[item.index.fqn]) for item in items)
        plain = ((item, tensor.span) for item, tensor in tensors if tensor.scaled is None)
        written = write_plain(self._rounds.files, self._planner, plain, self._step)
        return _Wrote(
            set().union(*(quantizer.nonfinite for quantizer in quantizers)),
            written + sum(quantizer.bytes_written for quantizer in quantizers),
            sum(quantizer.base_bytes_read for quantizer in quantizers),
        )

    def _count(self, name: str, facts: WeightFacts) -> None:
        with self._lock:
            self._facts.setdefault(name, WeightFacts()).add(facts)

    def _report(self) -> QuantizationReport:
        """What all ranks did together. Counts and maxima are exact however the weights are sharded; mean errors are
        sums, whose last digits are not.
        """
        ranks, total = self._rounds.ranks, dict[str, WeightFacts]()
        weights = [weight for weight in self._base.quantized if weight.name not in self._task.carried]
        at_once = max(1, _EXCHANGED // ranks.size)
        for start in range(0, len(weights), at_once):
            names = [weight.name for weight in weights[start : start + at_once]]
            total |= {name: WeightFacts() for name in names}
            for found in ranks.gather(partial(self._facts_of, names)):
                for name, facts in found.items():
                    total[name].add(facts)
        for weight in weights:
            if not weight.numel and weight.scale.nbytes:  # no shard holds any of it, and it has a scale
                scales = prod(quantize.block_shape(weight.grid))
                total[weight.name].kept, total[weight.name].made = (0, scales) if self._fresh else (scales, 0)
        return report_of(total, self._task.carried, has_base=True)

    def _facts_of(self, names: Sequence[str]) -> dict[str, WeightFacts]:
        return {name: self._facts[name] for name in names if name in self._facts}

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
        count = self._count if self._counting else None
        of_each = self._rounds.files, self._waiting, self._halves
        return [
            ShardQuantizer(*of_each, rule_of=self._rule_of, count=count, step=self._step) for _ in range(self._threads)
        ]

    def _cuts(self, shards: Iterable[Shard], cut: Callable[[Shard, torch.Tensor, int], Iterator[Cut]]) -> Iterator[Cut]:
        for shard in shards:
            yield from cut(shard, shard.in_order(resolved(self._planner, shard.item)), self._step)

"""One rank's part of a save to FP8: look at the blocks that shard edges cut, exchange what decides their scales, and
write. All ranks meet after each step.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from fp8ckpt.checkpoint.exchanged import Halves, WaitingBlocks, in_turn
from fp8ckpt.checkpoint.items import Rounds, resolved
from fp8ckpt.checkpoint.shard_quantizing import BYTES_OF_STEP, ShardQuantizer, values_of_part
from fp8ckpt.checkpoint.shards import Cut, Shard, cut, number_blocks
from fp8ckpt.checkpoint.storage_writer import write_plain
from fp8ckpt.encodings.facts import WeightFacts, report_of
from fp8ckpt.encodings.results import QuantizationReport
from fp8ckpt.encodings.rule import Rule
from fp8ckpt.errors import WeightValueError
from fp8ckpt.numerics import quantize
from fp8ckpt.numerics.geometry import pieces, within
from fp8ckpt.ranks import BEYOND, threads_of_this_rank
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import states_powers_of_two
from fp8ckpt.workers import share

_LARGEST_STEP = 1 << 19  # elements that are worked on at once: with their codes they stay in a second-level cache
_LEAST_STEP = 1 << 16  # on a machine with a thousand cores
_REMEDY = "save in bf16, and choose a --scheme"
_EXCHANGED = 1 << 14  # weights whose facts are exchanged at once, over all ranks; some 500 bytes each


class Task(NamedTuple):
    """What a rank must know. ``leader``: for each weight of a unit (two or more that share one scale or factor), the
    unit's first weight; ``carried``: the tensors that are taken from the base.
    """

    leader: Mapping[str, str]
    carried: Collection[str]


class Part:
    """What one rank does in one save. ``fresh``: keep no scale. ``report``: count what quantizing changes.

    After `run`, the ``report``, if one was asked for, and ``base_bytes_read`` (codes) are those of all ranks together.
    """

    def __init__(
        self, base: Checkpoint, task: Task, planner: SavePlanner, rounds: Rounds, *, fresh: bool, report: bool
    ) -> None:
        self._base = base
        self._task = task
        self._planner = planner
        self._rounds = rounds
        self._fresh = fresh
        self._threads = threads_of_this_rank()
        self._step = min(_LARGEST_STEP, max(_LEAST_STEP, BEYOND // self._threads // BYTES_OF_STEP))
        self._halves = Halves(base)
        self._shards: list[Shard] = []  # of all rounds
        self._quantizers: list[ShardQuantizer] = []
        self._bytes_written = 0
        self._counting = report
        self.report: QuantizationReport | None = None
        self.base_bytes_read = 0
        self._facts: dict[str, WeightFacts] = {}
        self._lock = threading.Lock()

    def run(self) -> int:
        """Look, exchange, write; return how many bytes this rank wrote. All ranks meet at each step."""
        ranks = self._rounds.ranks
        waiting = ranks.together(self._plan)
        self._refuse_nonfinite(ranks.gather(self._look))
        waiting.exchange(ranks)
        for nonfinite in self._rounds.write(self._write):
            self._refuse_nonfinite(nonfinite)
            self._bytes_written += self._halves.settle(ranks, self._rounds.files)
        self.base_bytes_read = sum(ranks.gather(lambda: sum(one.base_bytes_read for one in self._quantizers)))
        self.report = self._report() if self._counting else None
        return self._bytes_written + sum(one.bytes_written for one in self._quantizers)

    def _plan(self) -> WaitingBlocks:
        """Find this rank's shards, and return those of their blocks that wait."""
        blocks, factors = number_blocks(self._base)
        for item in (item for items in self._rounds.items for item in items):
            weight = self._base.tensors[item.index.fqn].scaled
            if weight is not None:
                leader = self._task.leader.get(weight.name)
                factor = factors.get(leader or weight.name)
                number = blocks[weight.name if factor is not None else leader or weight.name]
                self._shards.append(Shard(item, weight, number, factor is None and leader is not None, factor))
        waiting = WaitingBlocks(self._shards, self._step)
        rule = partial(
            Rule.like, fresh=self._fresh, powers_of_two=states_powers_of_two(self._base.config), remedy=_REMEDY
        )
        rule_of = lru_cache(maxsize=4 * self._threads)(lambda weight: rule(weight, weight.scale.file))
        count = self._count if self._counting else None
        self._quantizers = [
            ShardQuantizer(self._rounds.files, waiting, self._halves, rule_of=rule_of, count=count, step=self._step)
            for _ in range(self._threads)
        ]
        return waiting

    def _look(self) -> set[str]:
        share(self._cuts(self._shards, waiting=True), [quantizer.look for quantizer in self._quantizers])
        return self._nonfinite()

    def _write(self, items: Sequence[WriteItem]) -> set[str]:
        now = {id(item) for item in items}
        shards = (shard for shard in self._shards if id(shard.item) in now)
        share(self._cuts(shards, waiting=False), [quantizer.write for quantizer in self._quantizers])
        tensors = ((item, self._base.tensors[item.index.fqn]) for item in items)
        plain = ((item, tensor.span) for item, tensor in tensors if tensor.scaled is None)
        self._bytes_written += write_plain(self._rounds.files, self._planner, plain, self._step)
        return self._nonfinite()

    def _nonfinite(self) -> set[str]:
        return set().union(*(quantizer.nonfinite for quantizer in self._quantizers))

    def _count(self, name: str, facts: WeightFacts) -> None:
        with self._lock:
            self._facts.setdefault(name, WeightFacts()).add(facts)

    def _report(self) -> QuantizationReport:
        """What all ranks did together. Counts and maxima are exact however the weights are sharded; mean errors come
        from sums of floats, whose last digits depend on the sharding.
        """
        ranks, total = self._rounds.ranks, dict[str, WeightFacts]()
        weights = [weight for weight in self._base.quantized if weight.name not in self._task.carried]
        for part in in_turn(ranks, len(weights), _EXCHANGED):
            names = [weight.name for weight in weights[part]]
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
        return {name: self._facts.pop(name) for name in names if name in self._facts}

    def _refuse_nonfinite(self, met: list[set[str]]) -> None:
        """If any rank met non-finite elements, count those of the first such weight over all ranks; refuse it."""
        names = set().union(*met)
        if names:
            tensor = next(tensor for tensor in self._base.quantized if tensor.name in names)
            counts = self._rounds.ranks.gather(lambda: self._count_nonfinite(tensor.name))
            raise WeightValueError.of_nonfinite(tensor.name, None, sum(counts), tensor.numel)

    def _count_nonfinite(self, name: str) -> int:
        shards = [shard for shard in self._shards if shard.weight.name == name]
        return sum(
            quantize.count_nonfinite(values_of_part(values[within(piece, shard.region)]))
            for shard in shards
            for values in [shard.in_order(resolved(self._planner, shard.item))]
            for piece in pieces(shard.region, self._step)
        )

    def _cuts(self, shards: Iterable[Shard], *, waiting: bool) -> Iterator[Cut]:
        """Yield the pieces of shards to write; if ``waiting``, to look at: all, if a factor is to be decided."""
        for shard in shards:
            values = shard.in_order(resolved(self._planner, shard.item))
            yield from cut(shard, values, self._step, waiting=waiting and shard.factor is None)

"""Carrying out a plan in at most two passes, with decisions between them.

The first pass writes everything, with two exceptions: a wide weight that the base's scale does not fit, and a weight
that outgrows the factor of its two-level scales, are only looked at. Once all of a unit (`Units`) is looked at, the
recorded facts decide the scales of its wide weights, or the factors. The second pass writes those weights while others
are still looked at: cores and disk work at once. Both passes resume by extent, and are shared among ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from fp8ckpt.encodings.facts import WeightFacts, combine, report_of, weights_of
from fp8ckpt.encodings.fp8 import QuantizingFiller, Stored
from fp8ckpt.encodings.recipes import QuantizingPlan
from fp8ckpt.encodings.results import QuantizationReport
from fp8ckpt.encodings.rule import Decided
from fp8ckpt.encodings.seen import Seen
from fp8ckpt.encodings.units import Units, decide, is_new, rule_of, scales_before
from fp8ckpt.engine import ExtentWriter, Progress, begin
from fp8ckpt.numerics import quantize
from fp8ckpt.numerics.codes import Factor
from fp8ckpt.output.extents import Extent
from fp8ckpt.output.files import OutputFile
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.tensors.reading import load_dequantizer

if TYPE_CHECKING:
    from fp8ckpt.ranks import Ranks


@dataclass(frozen=True)
class Written:
    """The outcome of a run. Sizes in bytes: ``bytes_read`` of the source, ``base_bytes_read`` of the base's codes.

    ``bytes_rewritten``: codes of wide weights that the first pass wrote with scales that did not fit.
    """

    plan: QuantizingPlan
    bytes_read: int
    base_bytes_read: int
    bytes_rewritten: int
    bytes_resumed: int
    report: QuantizationReport | None
    facts: Mapping[str, WeightFacts]
    seen: Seen

    @property
    def nan_codes(self) -> dict[str, int]:
        """How many NaN codes were carried over, by tensor."""
        return {name: facts.nan_codes for name, facts in sorted(self.facts.items()) if facts.nan_codes}


def run(
    make_plan: Callable[[], QuantizingPlan],
    output: PartialOutput,
    workers: int,
    progress: Progress | None,
    ranks: Ranks,
) -> Written:
    """Plan, write and publish, together with the other ranks."""
    plan = ranks.together(make_plan)
    first = plan.extents(output.goal.extent)
    units = Units(plan, first, in_parts=output.goal.in_parts)
    done = begin(plan.output, output, ranks, first, units.stale)
    units.begin(done)
    rules = lru_cache(maxsize=4 * workers)(partial(rule_of, plan))
    before = lru_cache(maxsize=4 * workers)(scales_before)
    # Neighbouring chunks belong to one tensor, and workers stay close together.
    dequantizer = lru_cache(maxsize=2 * workers)(load_dequantizer)
    outgrown: dict[tuple[str, ...], np.float32] = {}
    # Remote reads are announced in order, so the second pass must wait.
    near = all(checkpoint.store.at_once == 1 for checkpoint in plan.output.inputs)
    written = 0  # bytes written by the first pass, to which the second adds

    def write(extents: Mapping[int, Extent], done: Container[int]) -> tuple[int, int, Counter[str]]:
        nonlocal written
        left = [i for i in extents if i not in done]
        # Neighbours: a rank that has looked at all of a unit can decide it alone.
        part = slice(*(len(left) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1)))
        mine = {i: extents[i] for i in left[part]}
        filler = partial(QuantizingFiller, plan, rules, before, outgrown, dequantizer, units.scales)
        fillers = [filler() for _ in range(workers)]
        then = units.recorded if near else lambda *_: {}
        with plan.ahead(mine.values()):
            written = ExtentWriter(output, ranks.rank, mine, combine, then, progress, written).run(fillers)
        plan.output.refuse_changes()
        wrote = sum((filler.looked_and_wrote for filler in fillers), Counter())
        return sum(filler.bytes_read for filler in fillers), sum(filler.base_bytes_read for filler in fillers), wrote

    counts = ranks.gather(lambda: write(first, done))
    decided, now_done = ranks.first(lambda: (_decide(plan, output, first), {*output.records()}))
    units.use(decided)
    again = units.written_again()
    if not again.keys() <= now_done:  # left: units that several ranks looked at, or an earlier run
        counts += ranks.gather(lambda: write(again, now_done))
    rewritten = sum(wrote[name] for _, _, wrote in counts for name in decided)
    resumed = sum((first | again)[i].nbytes for i in done if i in first or i in again)
    facts, seen = ranks.first(lambda: _publish(plan, output, first, decided, again))
    read, base_read = (sum(column) for column in zip(*(count[:2] for count in counts), strict=True))
    report = _reported(plan, facts) if plan.report else None
    return Written(plan, read, base_read, rewritten, resumed, report, facts, seen)


def _facts(output: PartialOutput, extents: Mapping[int, object]) -> tuple[dict[str, WeightFacts], Seen]:
    """Return the recorded facts of these extents: by weight, and the counts."""
    recorded = [facts for i, facts in output.records().items() if i in extents]
    return weights_of(recorded), Seen.of(facts["seen"] for facts in recorded)


def _decide(plan: QuantizingPlan, output: PartialOutput, first: Mapping[int, Extent]) -> dict[str, Decided | Factor]:
    """Return the scales, or the factors, of the weights that must be written again. Write all scales that depend on the
    first pass.
    """
    facts, _ = _facts(output, first)
    decided: dict[str, Decided | Factor] = {}
    scales: dict[str, list[tuple[Stored, int]]] = {}  # by file
    for unit in plan.units:
        found = decide(plan, unit, facts)
        for weight in (plan.weights[name] for name in unit):
            if isinstance(found, Decided):
                span, stored = weight.scale, found.stored
            else:
                assert weight.factor is not None
                factor = found or rule_of(plan, weight.name).factor
                assert factor is not None
                span, stored = weight.factor, factor.value.reshape(1)
            scales.setdefault(span.file.name, []).append((stored, span.start))
            if found is not None and is_new(found) and weight.weight.nbytes:
                decided[weight.name] = found
    for name, written in scales.items():
        with closing(OutputFile(output.directory / name)) as file:
            for stored, start in written:
                file.write(np.ascontiguousarray(stored).view(np.uint8), start)
            file.flush()
    return decided


def _publish(
    plan: QuantizingPlan,
    output: PartialOutput,
    first: Mapping[int, Extent],
    decided: Mapping[str, Decided | Factor],
    second: Mapping[int, Extent],
) -> tuple[dict[str, WeightFacts], Seen]:
    """Take the last step: return the facts of the report, and the counts, from the records; then publish the output."""
    facts: dict[str, WeightFacts] = {}
    seen = Seen()
    if plan.report:
        facts, seen = _facts(output, first)
        for name in plan.unit_of:
            facts[name] = _wide_facts(plan, name, facts.get(name, WeightFacts()), decided)
        again, seen_again = _facts(output, second)
        for name, part in again.items():
            facts[name].tally, facts[name].arrival = part.tally, part.arrival
        for name in seen_again.changes:
            seen.changes.pop(name, None)
        seen.add(seen_again)
    plan.output.publish(output)
    return facts, seen


def _wide_facts(
    plan: QuantizingPlan, name: str, facts: WeightFacts, decided: Mapping[str, Decided | Factor]
) -> WeightFacts:
    """Return the facts of a weight of ``plan.units`` with its numbers of kept and new scales."""
    weight, found = plan.weights[name], decided.get(name)
    scales = prod(quantize.block_shape(weight.grid))
    if weight.factor is not None:
        if found is not None:
            facts.kept, facts.made, facts.factors = 0, scales, 1
        return facts
    if isinstance(found, Decided):
        facts.kept = int(np.count_nonzero(found.kept))
    else:
        facts.kept = 0 if plan.fresh else scales  # fresh: a weight without elements
    facts.made = scales - facts.kept
    return facts


def _reported(plan: QuantizingPlan, facts: Mapping[str, WeightFacts]) -> QuantizationReport:
    weights = {weight.before.name if weight.before else name: name for name, weight in plan.weights.items()}
    found = {name: facts.get(stored, WeightFacts()) for name, stored in weights.items()}
    return report_of(found, plan.carried, has_base=plan.base is not None)

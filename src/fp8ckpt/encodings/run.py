"""A plan carried out: two passes at most, with what is decided between them.

The first pass writes everything; a wide weight whose scale of before does not fit is only looked at, and so is one of
two levels of scales that outgrows its factor. Then, of the facts that were recorded, the scales of the wide weights and
the factors follow, and those weights are written. Both passes are resumed by their extents, and shared among ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from fp8ckpt.encodings.facts import WeightFacts, combine, report_of, weights_of
from fp8ckpt.encodings.fp8 import QuantizingFiller, Stored, rule_of, scales_before
from fp8ckpt.encodings.recipes import Quantization, QuantizingPlan
from fp8ckpt.encodings.results import QuantizationReport
from fp8ckpt.encodings.rule import Decided
from fp8ckpt.encodings.seen import Seen
from fp8ckpt.engine import ExtentWriter, Progress, begin
from fp8ckpt.numerics import quantize, scaling
from fp8ckpt.numerics.codes import F32, Factor
from fp8ckpt.output.extents import Extent
from fp8ckpt.output.files import OutputFile
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.tensors.reading import load_dequantizer, load_scales
from fp8ckpt.tensors.stored import TensorSpan

if TYPE_CHECKING:
    from fp8ckpt.ranks import Ranks


@dataclass(frozen=True)
class Written:
    """What a run did. Sizes are in bytes; ``bytes_read`` of the source, ``base_bytes_read`` of the base's codes.

    ``bytes_rewritten``: codes of wide weights that the first pass had written with scales that did not fit.
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
    first = plan.extents(output.extent)
    second = plan.second_pass(first, in_parts=output.in_parts)
    done = begin(plan.output, output, ranks, first)
    # Records may be lost in a power cut, and then the first pass writes over the second.
    if not first.keys() <= done.keys():
        done = {i: facts for i, facts in done.items() if i in first}
    rules = lru_cache(maxsize=4 * workers)(partial(rule_of, plan))
    before = lru_cache(maxsize=4 * workers)(scales_before)
    # Neighbouring chunks are of one tensor, and workers stay close together.
    dequantizer = lru_cache(maxsize=2 * workers)(load_dequantizer)
    outgrown: dict[tuple[str, ...], np.float32] = {}
    written = 0  # by the first pass, to which the second adds

    def write(
        extents: Mapping[int, Extent], decided: Mapping[str, F32 | Factor] | None
    ) -> tuple[int, int, Counter[str]]:
        nonlocal written
        mine = {i: extents[i] for i in [i for i in extents if i not in done][ranks.rank :: ranks.size]}
        filler = partial(QuantizingFiller, plan, rules, before, outgrown, dequantizer, decided)
        fillers = [filler() for _ in range(workers)]
        with plan.ahead(mine.values()):
            written = ExtentWriter(output, ranks.rank, mine, combine, progress, written).run(fillers)
        plan.output.refuse_changes()
        wrote = sum((filler.looked_and_wrote for filler in fillers), Counter())
        return sum(filler.bytes_read for filler in fillers), sum(filler.base_bytes_read for filler in fillers), wrote

    looked = ranks.gather(lambda: write(first, None))
    decided = ranks.first(lambda: _decide(plan, output, first))
    again = {i: extent for name in decided for i, extent in second[name].items()}
    scales = {name: found if isinstance(found, Factor) else found.scales.reshape(-1) for name, found in decided.items()}
    counts = looked + (ranks.gather(lambda: write(again, scales)) if again else [])
    rewritten = sum(wrote[name] for _, _, wrote in looked for name in decided)
    resumed = sum((first | again)[i].nbytes for i in done if i in first or i in again)
    facts, seen = ranks.first(lambda: _publish(plan, output, first, decided, second))
    read, base_read = (sum(column) for column in zip(*(count[:2] for count in counts), strict=True))
    report = _reported(plan, facts) if plan.report else None
    return Written(plan, read, base_read, rewritten, resumed, report, facts, seen)


def _facts(output: PartialOutput, extents: Mapping[int, object]) -> tuple[dict[str, WeightFacts], Seen]:
    """What was recorded of these extents: by weight, and what was seen."""
    recorded = [facts for i, facts in output.records().items() if i in extents]
    return weights_of(recorded), Seen.of(facts["seen"] for facts in recorded)


def _decide(plan: QuantizingPlan, output: PartialOutput, first: Mapping[int, Extent]) -> dict[str, Decided | Factor]:
    """The scales, or the factors, of the weights that must be written again; those of the others, which keep theirs,
    are written here.
    """
    facts, _ = _facts(output, first)
    decided: dict[str, Decided | Factor] = {}
    for unit in plan.units:
        members = [plan.weights[name] for name in unit]
        of_unit = [facts.get(name, WeightFacts()) for name in unit]
        if members[0].factor is not None:
            decided |= _factor_of_unit(plan, output, members, of_unit)
            continue
        found = _scales_of_unit(plan, members[0], of_unit)
        for weight in members:
            _write_scales(output, weight.scale, found.stored)
            if not found.kept.all():
                decided[weight.name] = found
    return {name: found for name, found in decided.items() if plan.weights[name].weight.nbytes}


def _factor_of_unit(
    plan: QuantizingPlan, output: PartialOutput, members: list[Quantization], facts: list[WeightFacts]
) -> dict[str, Factor]:
    """The new factor of the members of a unit; nothing where they keep theirs. Either is written here."""
    before = rule_of(plan, members[0].name).factor
    assert before is not None
    largest = np.float32(max(part.maxima.get(0, 0.0) for part in facts))
    exact = not any(part.inexact for part in facts)
    factor = scaling.choose_factor(largest, before, exact=exact, fresh=plan.fresh)
    kept = factor is before
    for weight in members:
        written = rule_of(plan, weight.name).factor if kept else factor
        assert weight.factor is not None
        assert written is not None
        _write_scales(output, weight.factor, written.value.reshape(1))
    return {} if kept else {weight.name: factor for weight in members}


def _scales_of_unit(plan: QuantizingPlan, weight: Quantization, facts: list[WeightFacts]) -> Decided:
    """The scales of each member of the unit of ``weight``, of the facts of all."""
    maxima: F32 = quantize.block_array(weight.grid, np.float32)
    flat = maxima.reshape(-1)
    for part in facts:
        for block, largest in part.maxima.items():
            flat[block] = max(flat[block], np.float32(largest))
    exact = np.ones(maxima.size, np.bool_)
    exact[[block for part in facts for block in part.inexact]] = False
    before = None if weight.before is None else load_scales(weight.before).reshape(maxima.shape)
    return rule_of(plan, weight.name).decide(maxima, before, exact.reshape(maxima.shape))


def _write_scales(output: PartialOutput, span: TensorSpan, stored: Stored) -> None:
    with closing(OutputFile(output.directory / span.file.name)) as file:
        file.write(np.ascontiguousarray(stored).view(np.uint8), span.start)
        file.flush()


def _publish(
    plan: QuantizingPlan,
    output: PartialOutput,
    first: Mapping[int, Extent],
    decided: Mapping[str, Decided | Factor],
    second: Mapping[str, Mapping[int, Extent]],
) -> tuple[dict[str, WeightFacts], Seen]:
    """The last step: the facts of a report, and what was seen, of the records before they go; and the name."""
    facts: dict[str, WeightFacts] = {}
    seen = Seen()
    if plan.report:
        facts, seen = _facts(output, first)
        for name in plan.unit_of:
            facts[name] = _wide_facts(plan, name, facts.get(name, WeightFacts()), decided)
        again, seen_again = _facts(output, {i: extent for name in decided for i, extent in second[name].items()})
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
    """How many scales of a weight of ``plan.units`` were kept, and made."""
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

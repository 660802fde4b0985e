"""Units: the weights of a plan that may be written twice. The scales, or the factor, of a unit are known once all of it
was looked at; if the base's do not fit, all its weights are written again in the second pass.

The findings are recorded with the extents of the first pass, so that a resumed run decides the same. What the second
pass wrote stays valid unless a part of its unit is looked at again, which overwrites it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import numpy as np

from fp8ckpt.encodings.facts import WeightFacts
from fp8ckpt.encodings.recipes import Quantization, QuantizingPlan, Unit
from fp8ckpt.encodings.rule import Decided, Rule
from fp8ckpt.numerics import quantize, scaling
from fp8ckpt.numerics.codes import F32, Factor
from fp8ckpt.output.extents import Extent
from fp8ckpt.output.state import Facts
from fp8ckpt.tensors.reading import load_dequantizer, load_scales


class Units:
    """The extents of the ``first`` pass that look at each unit of a plan, and those of the second that write it again:
    only the weights with new scales, or whole extents for an output that is written ``in_parts``.

    ``scales`` of the weights that are written again: the scales [n] of each wide weight, and the factors of others.
    """

    def __init__(self, plan: QuantizingPlan, first: Mapping[int, Extent], *, in_parts: bool) -> None:
        self._plan = plan
        self._first = first
        self._second = plan.second_pass(first, in_parts=in_parts)
        self._in_parts = in_parts
        self._units_in: dict[int, set[Unit]] = {}  # by extent of either pass; an extent can hold thousands
        self._looks: dict[Unit, set[int]] = {unit: set() for unit in plan.units}
        self._writes: dict[Unit, set[int]] = {unit: set() for unit in plan.units}
        for extents, of_unit in ((first, self._looks), (self._second, self._writes)):
            for i, extent in extents.items() if plan.units else ():
                self._units_in[i] = plan.units_in(extent)
                for unit in self._units_in[i]:
                    of_unit[unit].add(i)
        self.scales: dict[str, F32 | Factor] = {}
        self._left: dict[Unit, set[int]] = {}
        self._found: dict[str, WeightFacts] = {}
        self._decided: set[Unit] = set()
        self._lock = threading.Lock()

    def stale(self, done: Mapping[int, Facts]) -> set[int]:
        """Return the ``done`` extents of the second pass whose units will be looked at again."""
        again = (unit for unit, looks in self._looks.items() if not looks <= done.keys())
        return {i for unit in again for i in self._writes[unit]} & done.keys()

    def begin(self, done: Mapping[int, Facts]) -> None:
        """Start from the ``done`` extents. Units that are completely looked at are decided from the records."""
        self._left = {unit: left for unit, looks in self._looks.items() if (left := looks - done.keys())}
        for i in done.keys() & self._first.keys():
            self._take(done[i])

    def recorded(self, i: int, facts: Facts) -> dict[int, Extent]:
        """Take in the facts of an extent. If units can now be decided, return the extents that write them again: of a
        decided unit, nothing is left to be looked at.
        """
        if i in self._second or not self._left:
            return {}
        with self._lock:
            self._take(facts)
            last = [unit for unit in self._units_in[i] if self._is_last(i, unit)]
            for unit in last:
                found = {name: self._found.pop(name) for name in unit if name in self._found}
                self.use(dict.fromkeys(unit, decide(self._plan, unit, found)))
                self._decided.add(unit)
            written = {j for unit in last for j in self._writes[unit]}
            return self._again(j for j in written if self._units_in[j] <= self._decided)

    def written_again(self) -> dict[int, Extent]:
        """Return all extents that write weights with new ``scales``."""
        return self._again(i for name in self.scales for i in self._writes[self._plan.unit_of[name]])

    def _again(self, numbers: Iterable[int]) -> dict[int, Extent]:
        found: dict[int, Extent] = {}
        for i in sorted({*numbers}):
            extent = self._second[i]
            if not any(name in self.scales for unit in self._units_in[i] for name in unit):
                continue
            if not self._in_parts:
                spans = extent.layout.spans
                new = (chunk for chunk in extent.chunks if spans[chunk.first].name in self.scales)
                extent = extent._replace(chunks=tuple(new))
            found[i] = extent
        return found

    def use(self, decided: Mapping[str, Decided | Factor | None]) -> None:
        """Set the scales, or the factors, that weights are written again with, if they are new."""
        for name, found in decided.items():
            if found is not None and is_new(found):
                self.scales[name] = found if isinstance(found, Factor) else found.scales.reshape(-1)

    def _is_last(self, i: int, unit: Unit) -> bool:
        """Whether an extent was the last one that looks at a unit."""
        self._left[unit].discard(i)
        return not self._left[unit]

    def _take(self, facts: Facts) -> None:
        for name, part in facts["weights"].items():
            if self._plan.unit_of.get(name) in self._left:
                self._found.setdefault(name, WeightFacts()).add(WeightFacts.of(part))


def decide(plan: QuantizingPlan, unit: Unit, found: Mapping[str, WeightFacts]) -> Decided | Factor | None:
    """Return the scales of each member of a unit, or their factor, from the facts ``found`` for all of them. None: each
    keeps its own factor.
    """
    members = [plan.weights[name] for name in unit]
    facts = [found.get(name, WeightFacts()) for name in unit]
    if members[0].factor is None:
        return _scales_of_unit(plan, members[0], facts)
    before = rule_of(plan, unit[0]).factor
    assert before is not None
    largest = np.float32(max(part.maxima.get(0, 0.0) for part in facts))
    exact = not any(part.inexact for part in facts)
    factor = scaling.choose_factor(largest, before, exact=exact, fresh=plan.fresh)
    return None if factor is before else factor


def is_new(decided: Decided | Factor | None) -> bool:
    """Whether a weight with these scales, or this factor, must be written again."""
    return not decided.kept.all() if isinstance(decided, Decided) else decided is not None


def _scales_of_unit(plan: QuantizingPlan, weight: Quantization, facts: list[WeightFacts]) -> Decided:
    maxima: F32 = quantize.block_array(weight.grid, np.float32)
    flat = maxima.reshape(-1)
    for part in facts:
        for block, largest in part.maxima.items():
            flat[block] = max(flat[block], np.float32(largest))
    exact = np.ones(maxima.size, np.bool_)
    exact[[block for part in facts for block in part.inexact]] = False
    before = None if weight.before is None else load_scales(weight.before).reshape(maxima.shape)
    return rule_of(plan, weight.name).decide(maxima, before, exact.reshape(maxima.shape))


def rule_of(plan: QuantizingPlan, name: str) -> Rule:
    """Return the rule for a weight of a plan."""
    weight = plan.weights[name]
    if weight.before is None:
        return Rule(name, weight.scale.dtype)
    file, remedy = weight.source.span.file, "choose a --scheme instead of the base"
    return Rule.like(weight.before, file, fresh=plan.fresh, powers_of_two=plan.powers_of_two, remedy=remedy)


def scales_before(weight: Quantization) -> F32:
    """Return the base's scales of a wide weight as `fp8ckpt.numerics.quantize.block_shape`, or infinities."""
    shape = quantize.block_shape(weight.grid)
    if weight.before is None:
        return np.full(shape, np.inf, np.float32)
    return load_dequantizer(weight.before, "F32").scales.reshape(shape)

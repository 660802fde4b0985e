"""What is recorded of the weights of an output while they are made, part by part, added up later, and reported."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fp8ckpt.encodings.results import QuantizationReport, WeightReport
from fp8ckpt.encodings.seen import Seen
from fp8ckpt.numerics.arrival import Arrival
from fp8ckpt.numerics.quantize import Tally
from fp8ckpt.output.state import Facts


@dataclass(slots=True)
class WeightFacts:
    """What is recorded of a weight, or of a part of it.

    ``maxima`` (in the first pass: of wide weights by block, of those with a factor one for all) decide whether a scale
    fits; ``inexact`` are blocks of which some part is small for their scale, and is not given back by it exactly.
    ``made`` scales are new, and ``factors``, which is 1 or 0 for a weight. ``arrival``: of adapters that were merged;
    ``nan_codes``: that were carried over as NaN.
    """

    tally: Tally = field(default_factory=Tally)
    arrival: Arrival = field(default_factory=Arrival)
    nan_codes: int = 0
    kept: int = 0
    made: int = 0
    factors: int = 0
    maxima: dict[int, float] = field(default_factory=dict)
    inexact: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> WeightFacts:
        """From what was recorded: JSON, in which the numbers of blocks are text."""
        tally, arrival = Tally(**recorded["tally"]), Arrival(**recorded["arrival"])
        maxima = {int(block): largest for block, largest in recorded["maxima"].items()}
        return cls(**{**recorded, "tally": tally, "arrival": arrival, "maxima": maxima})

    def meet(self, block: int, largest: np.float32) -> None:
        """Take in the largest magnitude of some part of a block."""
        self.maxima[block] = max(self.maxima.get(block, 0.0), float(largest))

    def add(self, other: WeightFacts) -> None:
        self.tally.add(other.tally)
        self.arrival.add(other.arrival)
        self.nan_codes += other.nan_codes
        self.kept += other.kept
        self.made += other.made
        self.factors += other.factors
        for block, largest in other.maxima.items():
            self.maxima[block] = max(largest, self.maxima.get(block, 0.0))
        self.inexact = sorted({*self.inexact, *other.inexact})

    def report(self, name: str, *, has_base: bool) -> WeightReport:
        """What a user is told of it."""
        tally = self.tally
        return WeightReport(
            name=name,
            elements=tally.elements,
            moved=tally.moved if has_base else None,
            clipped=tally.clipped,
            outgrown=tally.outgrown if has_base else 0,
            scales=self.kept + self.made,
            fresh=self.made,
            mean_error=tally.error / tally.magnitude if tally.magnitude else 0.0,
            largest_error=tally.largest_error / tally.largest if tally.largest else 0.0,
            fresh_factors=self.factors,
        )


def report_of(weights: Mapping[str, WeightFacts], carried: Collection[str], *, has_base: bool) -> QuantizationReport:
    """The report of all weights; ``carried`` from the base are others."""
    total = WeightFacts()
    for facts in weights.values():
        total.add(facts)
    rows = tuple(facts.report(name, has_base=has_base) for name, facts in weights.items())
    return QuantizationReport(total.report("", has_base=has_base), rows, tuple(sorted(carried)))


def combine(facts: Iterable[Facts]) -> Facts:
    """The facts of all chunks together: by weight, and what was seen."""
    every = list(facts)
    weights = {name: asdict(part) for name, part in weights_of(every).items()}
    return {"weights": weights, "seen": Seen.of(one["seen"] for one in every).recorded()}


def weights_of(facts: Iterable[Facts]) -> dict[str, WeightFacts]:
    """The facts of each weight, of all that was recorded."""
    total: dict[str, WeightFacts] = {}
    for recorded in facts:
        for name, part in recorded["weights"].items():
            total.setdefault(name, WeightFacts()).add(WeightFacts.of(part))
    return total

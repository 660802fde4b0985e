"""The facts recorded for the weights of an output: part by part as they are made, then added up and reported."""

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
    """The facts of a weight, or of a part of it.

    ``maxima`` decide whether a scale fits; the first pass records them by block for wide weights, and one for the whole
    of a weight with a factor. ``inexact``: blocks with a part that is small for their scale, and that it does not give
    back exactly. ``made``: the number of new scales; ``factors``: of new factors, 1 or 0 for a weight. ``arrival``: how
    much of merged adapters arrived; ``nan_codes``: how many NaN codes were carried over.
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
        """Return the facts from recorded JSON, in which block numbers are text."""
        tally, arrival = Tally(**recorded["tally"]), Arrival(**recorded["arrival"])
        maxima = {int(block): largest for block, largest in recorded["maxima"].items()}
        return cls(**{**recorded, "tally": tally, "arrival": arrival, "maxima": maxima})

    def meet(self, block: int, largest: np.float32) -> None:
        """Take in the largest magnitude of a part of a block."""
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
        """Return the report for the user."""
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
    """Return the report of all weights. ``carried``: other tensors, which were copied from the base."""
    total = WeightFacts()
    for facts in weights.values():
        total.add(facts)
    rows = tuple(facts.report(name, has_base=has_base) for name, facts in weights.items())
    return QuantizationReport(total.report("", has_base=has_base), rows, tuple(sorted(carried)))


def combine(facts: Iterable[Facts]) -> Facts:
    """Return the facts of several chunks as one: by weight, and the counts."""
    every = list(facts)
    weights = {name: asdict(part) for name, part in weights_of(every).items()}
    return {"weights": weights, "seen": Seen.of(one["seen"] for one in every).recorded()}


def weights_of(facts: Iterable[Facts]) -> dict[str, WeightFacts]:
    """Return the facts of each weight, added up over all records."""
    total: dict[str, WeightFacts] = {}
    for recorded in facts:
        for name, part in recorded["weights"].items():
            total.setdefault(name, WeightFacts()).add(WeightFacts.of(part))
    return total

"""Merge LoRA adapters into a base, in the base's own layout: codes and factors in, codes out.

The model never exists in BF16. Each weight that an adapter changes is read once, merged in float32, and quantized with
the base's scale if that still fits; all other bytes are the base's. Memory is that of a conversion, plus the largest
pair of factors. The report says how much of each adapter arrived: codes of eight bits are coarse, and an adapter's
additions are small.

Like a conversion, a merge appears at its name once it is whole, and the same call resumes it; under torchrun the ranks
share the work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fp8ckpt.collector import collector_paused
from fp8ckpt.engine import Progress
from fp8ckpt.numerics.codes import E8M0_DTYPES, SCALES
from fp8ckpt.output.forecast import Forecast
from fp8ckpt.output.partial import PartialOutput, writing
from fp8ckpt.stores.local import kept_open
from fp8ckpt.stores.store import Store
from fp8ckpt.targets import FP8, refuse_count, refuse_other, target_of
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint

if TYPE_CHECKING:
    import torch

    from fp8ckpt.encodings.facts import WeightFacts
    from fp8ckpt.encodings.recipes import QuantizingPlan
    from fp8ckpt.encodings.run import Written

TO = (FP8, "bf16")
#: A directory that PEFT wrote, or several, each alone or as (directory, weight).
AdapterLike: TypeAlias = str | Path | Store | Sequence[str | Path | Store | tuple[str | Path | Store, float]]
_LITTLE = 0.5  # of the wanted addition


@dataclass(frozen=True)
class MergedWeight:
    """How much of an adapter is in one merged tensor, or in all.

    ``changed``: elements whose value differs from the base's. ``delta``: the norm of the wanted addition, relative to
    the base's. ``arrived``: the part of it in the stored values, 1 for all of it (None if the addition is zero).
    ``error``: the norm of the rest of the stored change, relative to that of the wanted addition. ``clipped``:
    magnitudes beyond their scale. ``fresh`` of ``scales`` are new; ``fresh_factors``: new second levels of scales
    (NVFP4).
    """

    name: str
    elements: int
    changed: int
    delta: float
    arrived: float | None
    error: float
    clipped: int
    scales: int
    fresh: int
    fresh_factors: int


@dataclass(frozen=True)
class MergeReport:
    """All tensors that an adapter changes together, and each."""

    total: MergedWeight
    weights: tuple[MergedWeight, ...]


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge. Sizes are in bytes.

    ``tensors`` in all, ``merged`` of which adapters change. ``bytes_read``: from the base. ``bytes_written``: of all
    files of weights, ``bytes_resumed`` of which an earlier run wrote. ``bytes_rewritten``: bytes written a second time,
    for weights whose one scale turned out not to fit. ``nan_codes``: how many NaN codes were carried over, by tensor.
    ``notes``: facts for the user.

    >>> result = fp8ckpt.merge("sample-fp8", "sample-lora", "merged-bf16", to="bf16")
    >>> result.merged, result.tensors, result.nan_codes
    (1, 45, {})
    """

    destination: Path | str
    to: str
    files: int
    tensors: int
    merged: int
    bytes_read: int
    bytes_written: int
    bytes_rewritten: int
    bytes_resumed: int
    nan_codes: dict[str, int]
    report: MergeReport
    notes: tuple[str, ...]
    seconds: float


@kept_open()
def merge(
    base: CheckpointLike,
    adapter: AdapterLike,
    destination: str | Path,
    *,
    to: str | torch.dtype | None = None,
    scales: str = "reuse",
    serving: bool = False,
    follow_index: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge ``adapter`` into ``base``, and write ``destination``.

    ``adapter``: the directory that PEFT wrote, or several, each alone or with a weight that multiplies its additions.
    ``to`` "fp8" (if the base is FP8) writes the base's own layout, as `fp8ckpt.convert` with ``like`` does; "bf16"
    dequantizes. Values are ``code * scale + scaling * (B @ A)`` in float32, rounded once. Tensors that no adapter
    changes are the base's, byte for byte. ``scales`` "reuse" keeps the scale of a block whose merged values fit it, and
    makes a new one otherwise, for a weight together with the siblings that share its scale; "fresh" makes the scales of
    all merged weights new. ``serving``, ``follow_index``, ``workers`` and ``progress``: as for `fp8ckpt.convert`.

    Raises `UnsupportedFormatError` for adapters that are not LoRA, or that no weights are equal to;
    `ModelMismatchError` for an adapter of another model; `WeightValueError` for one that is not finite; and what
    `fp8ckpt.convert` raises. All errors come before the first byte, except those of the disk and of values that do not
    fit.

    >>> result = fp8ckpt.merge("sample-fp8", "sample-lora", "merged-fp8")
    >>> result.merged, result.report.total.arrived > 0.99
    (1, True)
    """
    from fp8ckpt.encodings.run import run
    from fp8ckpt.ranks import ranks_of_this_job, threads_of_this_rank

    with writing(destination) as output, ranks_of_this_job() as ranks:
        begun = time.monotonic()
        how = ranks.together(partial(_checked, base, adapter, to, scales, serving, follow_index, workers))
        done = run(lambda: how.plan(output), output, threads_of_this_rank(workers), progress, ranks)
        return _result(done, output.destination, how.to, time.monotonic() - begun)


def _checked(
    base: CheckpointLike,
    adapter: AdapterLike,
    to: str | torch.dtype | None,
    scales: str,
    serving: bool,
    follow_index: bool,
    workers: int | None,
) -> _Merging:
    """Return the arguments in one form, with the base open. Raise `ValueError` if arguments do not go together."""
    several = adapter if isinstance(adapter, Sequence) and not isinstance(adapter, str) else [adapter]
    adapters = [one if isinstance(one, tuple) else (one, 1.0) for one in several]
    to = None if to is None else target_of(to, TO)
    refuse_count("workers", workers)
    refuse_other("scales", scales, SCALES)
    if to == "bf16" and (scales != "reuse" or serving):
        raise ValueError("scales and serving go with to='fp8', and not with to='bf16'")
    if not adapters:
        raise ValueError("adapter=[]; expected at least one")
    opened = open_checkpoint(base, follow_index=follow_index)
    return _Merging(opened, adapters, to or (FP8 if opened.quantized else "bf16"), scales == "fresh", serving)


@dataclass(frozen=True)
class _Merging:
    base: Checkpoint
    adapters: Sequence[tuple[str | Path | Store, float]]
    to: str
    fresh: bool
    serving: bool

    @collector_paused()
    def plan(self, output: PartialOutput) -> QuantizingPlan:
        from fp8ckpt.encodings.merging import plan_merging
        from fp8ckpt.serving.listing import served_config
        from fp8ckpt.tensors.adapters import open_adapter

        adapters = [open_adapter(path, weight) for path, weight in self.adapters]
        served = served_config if self.serving else None
        return plan_merging(self.base, adapters, output, self.to, fresh=self.fresh, served=served)


def plan_merge(
    base: CheckpointLike,
    adapter: AdapterLike,
    destination: str | Path,
    *,
    to: str | torch.dtype | None = None,
    scales: str = "reuse",
    serving: bool = False,
    follow_index: bool = False,
) -> Forecast:
    """Return what `merge` would do with the same arguments: files, bytes read and written, room, time. Writes nothing.

    Raises what `merge` raises before its first byte, except `NoRoomError`: ``fits`` says whether there is room.

    >>> fp8ckpt.plan_merge("sample-fp8", "sample-lora", "planned").fits
    True
    """
    from fp8ckpt.ranks import ranks_of_this_job

    output = PartialOutput(destination)
    with ranks_of_this_job() as ranks:
        how = partial(_checked, base, adapter, to, scales, serving, follow_index, None)
        return ranks.first(lambda: how().plan(output).forecast(output))


def _result(done: Written, destination: Path | str, to: str, seconds: float) -> MergeResult:
    report = _report(done)
    return MergeResult(
        destination=destination,
        to=to,
        files=len(done.plan.output.names),
        tensors=len(done.plan.source.tensors),
        merged=len(report.weights),
        bytes_read=done.bytes_read,
        bytes_written=done.plan.output.nbytes,
        bytes_rewritten=done.bytes_rewritten,
        bytes_resumed=done.bytes_resumed,
        nan_codes=done.nan_codes,
        report=report,
        notes=(*done.plan.notes, *_notes(report, to, done.plan)),
        seconds=seconds,
    )


def _report(done: Written) -> MergeReport:
    from fp8ckpt.encodings.facts import WeightFacts

    total, rows = WeightFacts(), []
    for name, facts in sorted(done.facts.items()):
        weight = done.plan.weights.get(name)
        before = weight.before if weight is not None else None
        if name in done.plan.merged and facts.arrival.elements:
            total.add(facts)
            rows.append(_row(before.name if before else name, facts))
    return MergeReport(_row("", total), tuple(rows))


def _row(name: str, facts: WeightFacts) -> MergedWeight:
    arrival = facts.arrival
    arrived = arrival.product / arrival.delta if arrival.delta else None
    beside = max(0.0, arrival.added - (arrival.product * arrived if arrived is not None else 0.0))
    return MergedWeight(
        name=name,
        elements=arrival.elements,
        changed=arrival.changed,
        delta=math.sqrt(arrival.delta / arrival.before) if arrival.before else 0.0,
        arrived=arrived,
        error=math.sqrt(beside / arrival.delta) if arrival.delta else 0.0,
        clipped=facts.tally.clipped,
        scales=facts.kept + facts.made,
        fresh=facts.made,
        fresh_factors=facts.factors,
    )


def _notes(report: MergeReport, to: str, plan: QuantizingPlan) -> list[str]:
    """Return notes if little of the adapters arrived, with what the user can do about it."""
    little = [row for row in report.weights if row.arrived is not None and row.arrived < _LITTLE]
    notes = []
    if to == FP8 and little:
        least = min(little, key=lambda row: row.arrived or 0.0)
        share = 100 * (least.arrived or 0.0)
        ways = ["ship BF16 (--to bf16)"]
        if not {row.name for row in little} <= _of_powers_of_two(plan):  # their grid stays, whatever their scale
            ways += [*([] if plan.fresh else ["try --scales fresh"]), "merge into a base in smaller blocks"]
        found = f"in {len(little)} of {len(report.weights)} merged tensors less than half of the change arrived"
        notes.append(f"{found} ({least.name}: {share:.2g} %): the rest is lost in rounding; {', or '.join(ways)}")
    if report.weights and report.total.arrived is None:
        notes.append("the adapters add nothing: their factors B are zero, as before training, or their weights are")
    return notes


def _of_powers_of_two(plan: QuantizingPlan) -> set[str]:
    weights = plan.weights.values()
    return {w.source.name for w in weights if plan.powers_of_two or w.scale.dtype in E8M0_DTYPES}

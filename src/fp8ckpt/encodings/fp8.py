"""Making the bytes of a quantized output: scales are kept or made from values, then codes and scales are written.

A chunk that holds whole blocks is quantized in memory. A chunk of a wide weight only shows how large its values are:
the first pass encodes it with the base's scale as long as that fits, and records facts that decide
(`fp8ckpt.encodings.units`). If the scale does not fit, the weight is read and written once more. The factor of a weight
with two levels of scales is decided in the same way, as if the weight were one block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.encodings.facts import WeightFacts
from fp8ckpt.encodings.passing import Passing, runs
from fp8ckpt.encodings.recipes import Quantization, QuantizingPlan
from fp8ckpt.encodings.rule import NotFinite, Rule
from fp8ckpt.encodings.runs import runs_of
from fp8ckpt.engine import Beside, Filled
from fp8ckpt.numerics import quantize, scaling
from fp8ckpt.numerics.codes import F32, SCALE_DTYPES, U8, Factor
from fp8ckpt.numerics.quantize import Mask, Tally
from fp8ckpt.output.extents import Chunk, Extent
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.stores.store import Bytes
from fp8ckpt.tensors.stored import DTYPE_BITS, TensorSpan
from fp8ckpt.tensors.tensor import DequantizerOf

Stored = npt.NDArray[Any]


class QuantizingFiller:
    """One worker's reading and quantizing, with its own buffers.

    ``outgrown`` is shared by the workers: the units with an element beyond the base's scale, and its magnitude, so that
    no worker encodes more of them in vain. ``decided`` grows: the scales [n] of each wide weight that is written again,
    and the factors of others.
    """

    def __init__(
        self,
        plan: QuantizingPlan,
        rule_of: Callable[[str], Rule],
        scales_before: Callable[[Quantization], F32],
        outgrown: dict[tuple[str, ...], np.float32],
        dequantizer: DequantizerOf,
        decided: Mapping[str, F32 | Factor],
    ) -> None:
        self._plan = plan
        self._rule_of = rule_of
        self._scales_before = scales_before
        self._outgrown = outgrown
        self._decided = decided
        self._passing = Passing(plan, dequantizer)
        self._scales: list[Beside] = []
        self.looked_and_wrote: Counter[str] = Counter()  # bytes of wide weights that the first pass wrote

    @property
    def bytes_read(self) -> int:
        """Bytes read of the tensors that are converted or carried."""
        return self._passing.reader.bytes_read

    @property
    def base_bytes_read(self) -> int:
        """Bytes read of the base's codes, for the report."""
        return self._passing.base_bytes_read

    def fill(self, extent: Extent, chunk: Chunk, out: Bytes) -> Filled:
        """Fill ``out`` with the bytes of a chunk of an extent. Return the facts of its weight, or of merged tensors,
        and the counts.
        """
        self._scales = []
        self._passing.begin(again=extent.again)
        facts, write, _ = self._fill(extent.layout, chunk, out)
        seen = self._passing.seen.recorded()
        if extent.again and facts.keys().isdisjoint(self._decided):
            facts, seen = {}, {}  # neighbours of a weight that is written again were counted in the first pass
        return Filled({"weights": facts, "seen": seen}, write, tuple(self._scales))

    def _fill(self, layout: FileLayout, chunk: Chunk, out: Bytes) -> Filled:
        weight = None
        if chunk.start >= len(layout.head) and chunk.first < len(layout.spans):
            weight = self._plan.weights.get(layout.spans[chunk.first].name)
        if weight is None:
            return Filled({name: asdict(facts) for name, facts in self._passing.copy(layout, chunk, out).items()})
        begin, count = (n * weight.per_byte for n in (chunk.start - weight.weight.start, chunk.nbytes))
        decided = weight.name in self._decided
        if not decided and not self._plan.fresh and self._plan.untouched(weight):
            make = self._carry
        elif not weight.wide:
            make = self._quantize
        else:
            make = self._encode_decided if decided else self._look
        try:
            return make(weight, begin, count, out)
        except NotFinite:
            raise self._passing.not_finite(weight) from None

    # ---------------------------------------------------------------- siblings of what is merged

    def _carry(self, weight: Quantization, begin: int, count: int, out: U8) -> Filled:
        """In the first pass, copy the bytes of a weight that no adapter changes, and record how large a scale or a
        factor that it shares must be for it.
        """
        before = weight.before
        assert before is not None
        rule, of_one = self._rule_of(weight.name), self._scales_before(weight) if weight.wide else None
        largest = np.float32(0)
        for run in runs(weight, begin, count):
            at = (run.first - begin) // weight.per_byte
            part = out[at : at + run.size // weight.per_byte]
            before.packed.read(part, run.first // weight.per_byte)
            codes = part if weight.per_byte == 1 else quantize.unpack(part)
            scales = of_one
            if scales is None:
                stored = self._read_scales(before.scale, run.blocks)
                self._write_scales(weight.scale, run.blocks.start, stored)
                scales = rule.before(stored)
            parts = quantize.parts_of_run(run.grid, run.start, run.size)
            scales = scales.reshape(quantize.block_shape(run.grid))
            largest = max(largest, quantize.largest_of_codes(parts, codes, scales, weight.coding).max(initial=0))
        self._passing.reader.bytes_read += out.nbytes
        self.looked_and_wrote[weight.name] += out.nbytes
        if not np.isfinite(largest):
            raise NotFinite
        return Filled({weight.name: asdict(WeightFacts(maxima={0: float(largest)}))})

    # ---------------------------------------------------------------- weights whose chunks hold whole blocks

    def _quantize(self, weight: Quantization, begin: int, count: int, out: U8) -> Filled:
        facts, rule = WeightFacts(), self._rule_of(weight.name)
        looking = rule.factor is not None and not self._passing.again
        if isinstance(new := self._decided.get(weight.name), Factor):
            rule = rule.under(new)
        for run, step, codes in self._passing.steps(rule, weight, begin, count, out):
            before = None
            if weight.before is not None:
                before = self._read_scales(weight.before.scale, run.blocks).reshape(step.shape)
            maxima, exact = step.look(before, codes)
            if looking:
                self._look_at_factor(facts, weight, rule, maxima, exact)
                if not self._may_keep(weight):
                    continue
            decided = rule.decide(maxima, before, exact)
            facts.kept += int(np.count_nonzero(decided.kept))
            facts.made += int(np.count_nonzero(~decided.kept))
            step.encode(decided.scales, codes)
            self._write_scales(weight.scale, run.blocks.start, decided.stored)
            self._passing.report(facts, weight, run, step, codes, decided.scales, decided.before)
        return self._looked(weight, facts, out) if looking else Filled({weight.name: asdict(facts)})

    def _look_at_factor(self, facts: WeightFacts, weight: Quantization, rule: Rule, maxima: F32, exact: Mask) -> None:
        """Record what decides whether the base's factor is kept."""
        largest = maxima.max(initial=0)
        facts.meet(0, largest)
        if not exact.all():
            facts.inexact = [0]
        if rule.factor is not None and scaling.outgrows(largest, rule.factor):
            self._outgrown[self._plan.unit_of[weight.name]] = largest

    # ---------------------------------------------------------------- the first pass

    def _may_keep(self, weight: Quantization) -> bool:
        """Whether the base's scales may still fit the whole unit, so that codes made with them may be of use."""
        return not self._plan.fresh and self._plan.unit_of[weight.name] not in self._outgrown

    def _note_outgrown(self, weight: Quantization, maxima: F32, before: F32) -> None:
        """Note a unit if these magnitudes are beyond the base's scales."""
        if not scaling.within(maxima, before, weight.coding).all():
            unit = self._plan.unit_of[weight.name]
            self._outgrown[unit] = max(self._outgrown.get(unit, np.float32(0)), maxima.max())

    def _looked(self, weight: Quantization, facts: WeightFacts, out: U8) -> Filled:
        """Return the first pass's result for a weight of a unit."""
        write = self._may_keep(weight)
        self.looked_and_wrote[weight.name] += out.nbytes if write else 0
        return Filled({weight.name: asdict(facts)}, write)

    # ---------------------------------------------------------------- wide weights

    def _look(self, weight: Quantization, begin: int, count: int, out: U8) -> Filled:
        """In the first pass, record how large the values are, and encode them in case the base's scales are kept."""
        facts, rule = WeightFacts(), self._rule_of(weight.name)
        if not self._may_keep(weight) and (largest := self._largest(weight, begin, count)):
            facts.meet(0, largest)
            return self._looked(weight, facts, out)
        before_all = self._scales_before(weight).reshape(-1)
        if not self._plan.fresh and (merged := self._merge(weight, begin, count, before_all, out)) is not None:
            here, before = np.array([*merged.maxima.values()], np.float32), before_all[[*merged.maxima]]
            if not rule.asks(here, before):
                self._note_outgrown(weight, here, before)
                return self._looked(weight, merged, out)
        for run, step, codes in self._passing.steps(rule, weight, begin, count, out):
            here = step.maxima()
            for block in np.flatnonzero(here):
                facts.meet(run.blocks.start + int(block), here.reshape(-1)[block])
            # A single scale is replaced once an element is beyond it. Several scales are decided block by block, so
            # each block is checked.
            if self._plan.fresh or (weight.grid.per_tensor and not self._may_keep(weight)):
                continue
            before = before_all[run.blocks].reshape(here.shape)
            step.encode(before, codes)
            if rule.asks(here, before):
                inexact = np.flatnonzero(~step.exact(before, codes))
                facts.inexact = sorted({*facts.inexact, *(run.blocks.start + int(block) for block in inexact)})
            self._note_outgrown(weight, here, before)
            if self._may_keep(weight):
                self._passing.report(facts, weight, run, step, codes, before, before)
        return self._looked(weight, facts, out)

    def _merge(self, weight: Quantization, begin: int, count: int, scales: F32, out: U8) -> WeightFacts | None:
        """Merge and encode with ``scales`` [n] in one step. Return the facts, or None if the weight cannot."""
        facts, before = WeightFacts(), self._scales_before(weight).reshape(-1)
        for run in runs_of(weight.grid, begin, count, count):
            block = run.blocks.start
            if weight.merged is None or not run.grid.per_tensor:
                return None
            codes = out[run.first - begin :][: run.size]
            merged = weight.merged.encode(run.first, codes, before[block], scales[block], self._passing.reader)
            if merged is None:
                return None
            if not np.isfinite(merged.largest):
                raise NotFinite
            if merged.largest:
                facts.meet(block, merged.largest)
            facts.arrival.add(merged.arrival)
            facts.tally.add(Tally(elements=run.size, clipped=merged.clipped))
        return facts

    def _largest(self, weight: Quantization, begin: int, count: int) -> np.float32:
        """Return the largest magnitude of a run of elements, or a value not above what is known of the unit, if the
        merged weight finds it from few elements; otherwise 0.
        """
        unit = self._plan.unit_of[weight.name]
        known = self._outgrown.get(unit, np.float32(0))
        found = None if weight.merged is None else weight.merged.largest(begin, count, known, self._passing.reader)
        if found is None or not np.isfinite(found):
            return np.float32(0)
        if unit in self._outgrown:
            self._outgrown[unit] = max(known, found)
        return found

    def _encode_decided(self, weight: Quantization, begin: int, count: int, out: U8) -> Filled:
        """In the second pass, make the codes with the decided scales."""
        facts, rule = WeightFacts(), self._rule_of(weight.name)
        before_all, scales_all = self._scales_before(weight).reshape(-1), self._decided[weight.name]
        assert not isinstance(scales_all, Factor)  # factors belong to weights with groups, which are not wide
        if (merged := self._merge(weight, begin, count, scales_all, out)) is not None:
            return Filled({weight.name: asdict(replace(merged, maxima={}))})
        for run, step, codes in self._passing.steps(rule, weight, begin, count, out):
            before, scales = (of_all[run.blocks].reshape(step.shape) for of_all in (before_all, scales_all))
            step.encode(scales, codes)
            self._passing.report(facts, weight, run, step, codes, scales, before)
        return Filled({weight.name: asdict(facts)})

    # ---------------------------------------------------------------- scales

    def _read_scales(self, span: TensorSpan, blocks: slice) -> Stored:
        """Return the scales of some blocks of the base, in their stored dtype."""
        itemsize = DTYPE_BITS[span.dtype] // 8
        stored = np.empty((blocks.stop - blocks.start) * itemsize, np.uint8)
        span.read(stored, blocks.start * itemsize)
        return stored.view(SCALE_DTYPES[span.dtype])

    def _write_scales(self, span: TensorSpan, first: int, stored: Stored) -> None:
        """Queue the scales from block ``first`` on for writing."""
        data = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        self._scales.append(Beside(span.file.name, span.start + first * stored.itemsize, data))

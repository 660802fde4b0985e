"""Making the bytes of a quantized output: values are read once, their scale is kept or made, and codes and scales are
written.

Where a chunk holds whole blocks all of this is done with the chunk in memory. Of a wide weight a chunk can only say how
large its values are: the first pass encodes it with the scale of before, as long as that still fits, and the facts that
it leaves decide. Where the scale does not fit, the weight is read and written once more (`fp8ckpt.encodings.run`).
The factor of a weight with two levels of scales is decided in the same way, as if it were one block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.encodings.facts import WeightFacts
from fp8ckpt.encodings.recipes import Quantization, QuantizingPlan
from fp8ckpt.encodings.rule import NotFinite, Rule, Step
from fp8ckpt.encodings.runs import Run, bands_of, runs_of
from fp8ckpt.encodings.seen import Seen, moved_bytes
from fp8ckpt.engine import Beside, Filled
from fp8ckpt.errors import Fp8CheckpointError, RangeError, WeightValueError
from fp8ckpt.numerics import quantize, scaling
from fp8ckpt.numerics.arrival import Arrival
from fp8ckpt.numerics.codes import F32, SCALE_DTYPES, TARGET_BYTES, U8, Factor
from fp8ckpt.numerics.dequantize import bits_dtype
from fp8ckpt.numerics.quantize import Mask, Tally, Values, values_of
from fp8ckpt.output.extents import Chunk, Extent, met
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.stores.store import Bytes
from fp8ckpt.tensors.reading import load_dequantizer
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import DTYPE_BITS, TensorSpan
from fp8ckpt.tensors.tensor import DequantizerOf, Reader, Tensor

#: Elements that are worked on at once: with their codes they stay close to a core (half or twice as many are slower).
STEP = 1 << 19
READ_AT_ONCE = 2 << 20  # bytes of codes: those of a chunk of bfloat16

Stored = npt.NDArray[Any]


class QuantizingFiller:
    """One worker's reading and quantizing, with buffers of its own.

    ``outgrown`` is shared by the workers: the units of which an element was found beyond the scale of before, with how
    large it is, so that nobody encodes more of them in vain. ``decided``, which grows: the scales [n] of each wide
    weight that is written again, and the factors of others.
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
        # Not touched, and not taken, before it is used: a band of the widest weight in the widest dtype.
        self._raw = np.empty(0, np.uint8)
        self._base_codes = np.empty(0, np.uint8)
        self._base_at: tuple[str, int, int] | None = None  # which they are
        self._again = False  # whether this is the second pass
        self._seen = Seen()
        self._unpacked = np.empty(0, np.uint8)
        self._scales: list[Beside] = []
        self._reader = Reader(READ_AT_ONCE, dequantizer)
        self._reader.passing = (lambda tensor, codes: self._seen.count(tensor, codes)) if plan.see else None
        self.base_bytes_read = 0
        self.looked_and_wrote: Counter[str] = Counter()  # bytes of wide weights that the first pass wrote

    @property
    def bytes_read(self) -> int:
        """Bytes of what is converted, and of what is carried."""
        return self._reader.bytes_read

    def fill(self, extent: Extent, chunk: Chunk, out: Bytes) -> Filled:
        """Fill ``out`` with the bytes of a chunk of an extent; the facts are those of the weight, if it is of one, or
        of what was merged; and what was seen.
        """
        self._seen, self._scales, self._again = Seen(), [], extent.again
        facts, write, _ = self._fill(extent.layout, chunk, out)
        seen = self._seen.recorded()
        if self._again and facts.keys().isdisjoint(self._decided):
            facts, seen = {}, {}  # beside what is written again: it was counted before
        return Filled({"weights": facts, "seen": seen}, write, tuple(self._scales))

    def _fill(self, layout: FileLayout, chunk: Chunk, out: Bytes) -> Filled:
        weight = None
        if chunk.start >= len(layout.head) and chunk.first < len(layout.spans):
            weight = self._plan.weights.get(layout.spans[chunk.first].name)
        if weight is None:
            return Filled({name: asdict(facts) for name, facts in self._copy(layout, chunk, out).items()})
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
            raise self._not_finite(weight) from None

    # ---------------------------------------------------------------- what is not quantized

    def _copy(self, layout: FileLayout, chunk: Chunk, out: Bytes) -> dict[str, WeightFacts]:
        if chunk.start < len(layout.head):
            head = layout.head[chunk.start : chunk.stop]
            out[: len(head)] = memoryview(head)
        facts: dict[str, WeightFacts] = {}
        for span, low, high in met(layout, chunk):
            target = out[low - chunk.start : high - chunk.start]
            self._store(self._plan.plain[span.name], span, low - span.start, target, facts)
            if self._plan.see:
                self._see_plain(span, low - span.start, target)
        return facts

    def _store(self, given: Tensor, span: TensorSpan, offset: int, out: Bytes, facts: dict[str, WeightFacts]) -> None:
        """Values as they are written: as they are stored, dequantized, merged or cast."""
        first, reader = offset * 8 // DTYPE_BITS[span.dtype], self._reader
        reader.merge = None
        reader.nonfinite.clear()
        reader.counting = True  # nowhere else are codes that are not finite carried over
        if span.dtype in given.dtypes():
            given.elements(first, span.dtype, out, reader)
        else:
            self._cast(given, first, span, out)
        reader.counting = False
        if reader.merge is not None:
            arrival = Arrival.of(*reader.merge, values_of(out, span.dtype).floats)
            if arrival.elements < reader.merge.before.size and (overflown := reader.merge.overflown):
                raise RangeError.of_merged(given, None, overflown, "F32")
            facts.setdefault(span.name, WeightFacts()).arrival.add(arrival)
        for name, count in reader.nonfinite.items():
            facts.setdefault(name, WeightFacts()).nan_codes += count

    def _see_plain(self, span: TensorSpan, offset: int, out: Bytes) -> None:
        """Count the codes of a weight that is the base's, and hold what else was stored against what the base has."""
        if (tensor := self._plan.by_codes.get(span.name)) is not None:
            self._seen.count(tensor, tensor.one_a_byte(out))
        elif (before := self._plan.compared(span)) is not None:
            old = np.empty_like(out)
            before.read(old, offset)
            if span.dtype in TARGET_BYTES:
                was, now = (values_of(part, span.dtype).floats for part in (old, out))
                self._seen.compare(span.name, was, now)
            else:
                self._seen.change(span.name, Tally(moved=moved_bytes(old, out, span.dtype)))

    def _cast(self, given: Tensor, first: int, span: TensorSpan, out: Bytes) -> None:
        itemsize = TARGET_BYTES[span.dtype]
        for begin in range(0, out.size // itemsize, STEP):
            part = out[begin * itemsize :][: STEP * itemsize]
            values = self._values(given, first + begin, part.size // itemsize)
            if overflown := quantize.round_to(values.floats, span.dtype, part.view(bits_dtype(span.dtype))):
                found = f"{overflown} finite values of {given.dtype} do not fit {span.dtype}"
                raise RangeError(
                    found, tensor=span.name, file=given.span.file, expected=f"{span.dtype}, as in the base"
                )

    # ---------------------------------------------------------------- siblings of what is merged

    def _carry(self, weight: Quantization, begin: int, count: int, out: U8) -> Filled:
        """The first pass over a weight that no adapter changes: its bytes as they are, and how large a scale or a
        factor that it shares must be for it.
        """
        before = weight.before
        assert before is not None
        rule, of_one = self._rule_of(weight.name), self._scales_before(weight) if weight.wide else None
        largest = np.float32(0)
        for run in _cut(weight, begin, count):
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
        self._reader.bytes_read += out.nbytes
        self.looked_and_wrote[weight.name] += out.nbytes
        if not np.isfinite(largest):
            raise NotFinite
        return Filled({weight.name: asdict(WeightFacts(maxima={0: float(largest)}))})

    # ---------------------------------------------------------------- weights whose chunks hold whole blocks

    def _quantize(self, weight: Quantization, begin: int, count: int, out: U8) -> Filled:
        facts, rule = WeightFacts(), self._rule_of(weight.name)
        looking = rule.factor is not None and not self._again
        if isinstance(new := self._decided.get(weight.name), Factor):
            rule = rule.under(new)
        for run, step, codes in self._steps(rule, weight, begin, count, out):
            self._see_base(weight, run)
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
            self._report(facts, weight, run, step, codes, decided.scales, decided.before)
        return self._looked(weight, facts, out) if looking else Filled({weight.name: asdict(facts)})

    def _look_at_factor(self, facts: WeightFacts, weight: Quantization, rule: Rule, maxima: F32, exact: Mask) -> None:
        """What decides whether the factor of before is kept."""
        largest = maxima.max(initial=0)
        facts.meet(0, largest)
        if not exact.all():
            facts.inexact = [0]
        if rule.factor is not None and scaling.outgrows(largest, rule.factor):
            self._outgrown[self._plan.unit_of[weight.name]] = largest

    # ---------------------------------------------------------------- the first pass

    def _may_keep(self, weight: Quantization) -> bool:
        """Whether the scales of before may still be those of all of a unit, and what is encoded with them of use."""
        return not self._plan.fresh and self._plan.unit_of[weight.name] not in self._outgrown

    def _note_outgrown(self, weight: Quantization, maxima: F32, before: F32) -> None:
        """Note a unit that these magnitudes show to have outgrown its scales of before."""
        if not scaling.within(maxima, before, weight.coding).all():
            unit = self._plan.unit_of[weight.name]
            self._outgrown[unit] = max(self._outgrown.get(unit, np.float32(0)), maxima.max())

    def _looked(self, weight: Quantization, facts: WeightFacts, out: U8) -> Filled:
        """What the first pass has of a weight of a unit."""
        write = self._may_keep(weight)
        self.looked_and_wrote[weight.name] += out.nbytes if write else 0
        return Filled({weight.name: asdict(facts)}, write)

    # ---------------------------------------------------------------- wide weights

    def _look(self, weight: Quantization, begin: int, count: int, out: U8) -> Filled:
        """The first pass: how large the values are, and the codes that they have if the scales of before are kept."""
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
        for run, step, codes in self._steps(rule, weight, begin, count, out):
            self._see_base(weight, run)
            here = step.maxima()
            for block in np.flatnonzero(here):
                facts.meet(run.blocks.start + int(block), here.reshape(-1)[block])
            # One scale is new once an element lies beyond it; of several, each is asked whether it gives its own block
            # back.
            if self._plan.fresh or (weight.grid.per_tensor and not self._may_keep(weight)):
                continue
            before = before_all[run.blocks].reshape(here.shape)
            step.encode(before, codes)
            if rule.asks(here, before):
                inexact = np.flatnonzero(~step.exact(before, codes))
                facts.inexact = sorted({*facts.inexact, *(run.blocks.start + int(block) for block in inexact)})
            self._note_outgrown(weight, here, before)
            if self._may_keep(weight):
                self._report(facts, weight, run, step, codes, before, before)
        return self._looked(weight, facts, out)

    def _merge(self, weight: Quantization, begin: int, count: int, scales: F32, out: U8) -> WeightFacts | None:
        """Codes with ``scales`` [n] by the short way, and their facts; None where there is none."""
        facts, before = WeightFacts(), self._scales_before(weight).reshape(-1)
        for run in runs_of(weight.grid, begin, count, count):
            block = run.blocks.start
            if weight.merged is None or not run.grid.per_tensor:
                return None
            codes = out[run.first - begin :][: run.size]
            merged = weight.merged.encode(run.first, codes, before[block], scales[block], self._reader)
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
        """The largest magnitude of some elements, or one that is not above what is known of the unit, by the short way;
        0 where there is none.
        """
        unit = self._plan.unit_of[weight.name]
        known = self._outgrown.get(unit, np.float32(0))
        found = None if weight.merged is None else weight.merged.largest(begin, count, known, self._reader)
        if found is None or not np.isfinite(found):
            return np.float32(0)
        if unit in self._outgrown:
            self._outgrown[unit] = max(known, found)
        return found

    def _encode_decided(self, weight: Quantization, begin: int, count: int, out: U8) -> Filled:
        """The second pass: the codes that the values have with scales that were decided on."""
        facts, rule = WeightFacts(), self._rule_of(weight.name)
        before_all, scales_all = self._scales_before(weight).reshape(-1), self._decided[weight.name]
        assert not isinstance(scales_all, Factor)  # which is of groups, that are not wide
        if (merged := self._merge(weight, begin, count, scales_all, out)) is not None:
            return Filled({weight.name: asdict(replace(merged, maxima={}))})
        for run, step, codes in self._steps(rule, weight, begin, count, out):
            before, scales = (of_all[run.blocks].reshape(step.shape) for of_all in (before_all, scales_all))
            step.encode(scales, codes)
            self._report(facts, weight, run, step, codes, scales, before)
        return Filled({weight.name: asdict(facts)})

    # ---------------------------------------------------------------- what both share

    def _steps(
        self, rule: Rule, weight: Quantization, begin: int, count: int, out: U8
    ) -> Iterator[tuple[Run, Step, U8]]:
        """What is worked on at once of a chunk: where it lies, its values, and where its codes are to be made, one a
        byte: in ``out``, or what is then packed there. Rows are whole bytes, and so are runs.
        """
        for run in _cut(weight, begin, count):
            parts = quantize.parts_of_run(run.grid, run.start, run.size)
            step = Step(rule, self._values(weight.source, run.first, run.size), parts, run.grid)
            target = out[(run.first - begin) // weight.per_byte :][: run.size // weight.per_byte]
            if weight.per_byte == 1:
                yield run, step, target
                continue
            if self._unpacked.size < run.size:
                self._unpacked = np.empty(run.size, np.uint8)
            codes = self._unpacked[: run.size]
            yield run, step, codes
            target[:] = quantize.pack(codes)

    def _report(
        self, facts: WeightFacts, weight: Quantization, run: Run, step: Step, codes: U8, scales: F32, before: F32
    ) -> None:
        if not self._plan.report:
            return
        if (merge := self._reader.merge) is not None:
            arrival, clipped = quantize.arrival(step.parts, *merge, codes, scales, weight.coding)
            facts.arrival.add(arrival)
            facts.tally.add(Tally(elements=codes.size, clipped=clipped))
            return
        old = None if weight.before is None else self._old(weight, weight.before, run)
        tally = step.tally(codes, scales, before, old)
        if weight.before is not None and old is not None:
            if self._plan.see:
                was, now = (quantize.decode(step.parts, *of, weight.coding) for of in ((old, before), (codes, scales)))
                self._seen.compare(weight.before.name, was, now, tally.moved)
        elif self._plan.see:
            self._seen.count_codes(weight.name, weight.coding.dtype, codes)
            values = step.values
            rounded = np.empty(values.bits.size, bits_dtype(values.dtype))
            quantize.round_to(quantize.decode(step.parts, codes, scales), values.dtype, rounded)
            self._seen.compare(weight.name, values.floats, values_of(rounded.view(np.uint8), values.dtype).floats)
        facts.tally.add(tally)

    def _see_base(self, weight: Quantization, run: Run) -> None:
        """Count the codes that a run of elements had, at first sight."""
        if self._plan.see and not self._again and weight.before is not None:
            self._seen.count(weight.before, self._old(weight, weight.before, run))

    def _old(self, weight: Quantization, before: QuantizedTensor, run: Run) -> U8:
        """The base's codes of a run of elements, one a byte; read once where they are asked for twice in a row."""
        nbytes = run.size // weight.per_byte
        if self._base_at != (at := (weight.name, run.first, run.size)):
            if self._base_codes.size < nbytes:
                self._base_codes = np.empty(nbytes, np.uint8)
            before.packed.read(self._base_codes[:nbytes], run.first // weight.per_byte)
            self.base_bytes_read += nbytes
            self._base_at = at
        return before.one_a_byte(self._base_codes[:nbytes])

    def _not_finite(self, weight: Quantization) -> Fp8CheckpointError:
        """The refusal of a weight with values that have no code: all of it is counted."""
        tensor, count, overflown = weight.source, 0, 0
        for first in range(0, tensor.numel, STEP):
            count += quantize.count_nonfinite(self._values(tensor, first, min(STEP, tensor.numel - first)))
            overflown += 0 if self._reader.merge is None else self._reader.merge.overflown
        if overflown:
            return RangeError.of_merged(weight.name, tensor.span.file, overflown, "F32")
        return WeightValueError.of_nonfinite(weight.name, tensor.span.file, count, tensor.numel)

    def _values(self, tensor: Tensor, first: int, count: int) -> Values:
        """Elements ``first`` to ``first + count`` of a tensor, good until the next call."""
        nbytes = count * TARGET_BYTES[tensor.dtype]
        if self._raw.size < nbytes:
            self._raw = np.empty(nbytes, np.uint8)
        raw = self._raw[:nbytes]
        self._reader.merge = None
        tensor.elements(first, tensor.dtype, raw, self._reader)
        return values_of(raw, tensor.dtype)

    def _read_scales(self, span: TensorSpan, blocks: slice) -> Stored:
        """The scales of some blocks of the base, as they are stored."""
        itemsize = DTYPE_BITS[span.dtype] // 8
        stored = np.empty((blocks.stop - blocks.start) * itemsize, np.uint8)
        span.read(stored, blocks.start * itemsize)
        return stored.view(SCALE_DTYPES[span.dtype])

    def _write_scales(self, span: TensorSpan, first: int, stored: Stored) -> None:
        """Have the scales from block ``first`` on written."""
        data = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        self._scales.append(Beside(span.file.name, span.start + first * stored.itemsize, data))


def _cut(weight: Quantization, begin: int, count: int) -> Iterator[Run]:
    return (runs_of if weight.wide else bands_of)(weight.grid, begin, count, STEP)


def rule_of(plan: QuantizingPlan, name: str) -> Rule:
    """What decides the scales of a weight of a plan."""
    weight = plan.weights[name]
    if weight.before is None:
        return Rule(name, weight.scale.dtype)
    file, remedy = weight.source.span.file, "choose a --scheme instead of the base"
    return Rule.like(weight.before, file, fresh=plan.fresh, powers_of_two=plan.powers_of_two, remedy=remedy)


def scales_before(weight: Quantization) -> F32:
    """The scales that a wide weight had, of `fp8ckpt.numerics.quantize.block_shape`; infinite where it has no base."""
    shape = quantize.block_shape(weight.grid)
    if weight.before is None:
        return np.full(shape, np.inf, np.float32)
    return load_dequantizer(weight.before, "F32").scales.reshape(shape)

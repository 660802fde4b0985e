"""The path of tensors through one worker: values to be quantized, tensors to be copied, and the counts of both for a
report or a page, compared with the base.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8ckpt.encodings.facts import WeightFacts
from fp8ckpt.encodings.recipes import Quantization, QuantizingPlan
from fp8ckpt.encodings.rule import Rule, Step
from fp8ckpt.encodings.runs import Run, bands_of, runs_of
from fp8ckpt.encodings.seen import Seen, moved_bytes
from fp8ckpt.errors import Fp8CheckpointError, RangeError, WeightValueError
from fp8ckpt.numerics import quantize
from fp8ckpt.numerics.arrival import Arrival
from fp8ckpt.numerics.codes import F32, TARGET_BYTES, U8
from fp8ckpt.numerics.dequantize import bits_dtype
from fp8ckpt.numerics.quantize import Tally, Values, values_of
from fp8ckpt.output.extents import Chunk, met
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.stores.store import Bytes
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import DTYPE_BITS, TensorSpan
from fp8ckpt.tensors.tensor import DequantizerOf, Reader, Tensor

#: Elements that are processed at once: with their codes they fit a core's cache (half or twice as many are slower).
STEP = 1 << 19
READ_AT_ONCE = 2 << 20  # bytes of codes: those of a chunk of bfloat16


class Passing:
    """One worker's buffers and counts. ``again``: whether values pass for the second time, and were counted before."""

    def __init__(self, plan: QuantizingPlan, dequantizer: DequantizerOf) -> None:
        self._plan = plan
        # Buffers grow on use: memory is that of a band of the widest weight in the widest dtype.
        self._raw = np.empty(0, np.uint8)
        self._base_codes = np.empty(0, np.uint8)
        self._base_at: tuple[str, int, int] | None = None  # the (name, first, size) of the codes in the buffer
        self._unpacked = np.empty(0, np.uint8)
        self.again = False
        self.seen = Seen()
        self.reader = Reader(READ_AT_ONCE, dequantizer)
        self.reader.passing = (lambda tensor, codes: self.seen.count(tensor, codes)) if plan.see else None
        self.base_bytes_read = 0

    def begin(self, *, again: bool) -> None:
        """Reset the counts for a new chunk."""
        self.seen, self.again = Seen(), again

    def values(self, tensor: Tensor, first: int, count: int) -> Values:
        """Return the elements ``first`` to ``first + count`` of a tensor, valid until the next call."""
        nbytes = count * TARGET_BYTES[tensor.dtype]
        if self._raw.size < nbytes:
            self._raw = np.empty(nbytes, np.uint8)
        raw = self._raw[:nbytes]
        self.reader.merge = None
        tensor.elements(first, tensor.dtype, raw, self.reader)
        return values_of(raw, tensor.dtype)

    def steps(
        self, rule: Rule, weight: Quantization, begin: int, count: int, out: U8
    ) -> Iterator[tuple[Run, Step, U8]]:
        """Yield the pieces of a chunk to process: the run, its values, and a buffer for its codes, one a byte. The
        buffer is ``out`` itself, or is packed into it afterwards. Rows and runs are whole bytes.
        """
        for run in runs(weight, begin, count):
            self._see_base(weight, run)
            parts = quantize.parts_of_run(run.grid, run.start, run.size)
            step = Step(rule, self.values(weight.source, run.first, run.size), parts, run.grid)
            target = out[(run.first - begin) // weight.per_byte :][: run.size // weight.per_byte]
            if weight.per_byte == 1:
                yield run, step, target
                continue
            if self._unpacked.size < run.size:
                self._unpacked = np.empty(run.size, np.uint8)
            codes = self._unpacked[: run.size]
            yield run, step, codes
            target[:] = quantize.pack(codes)

    def not_finite(self, weight: Quantization) -> Fp8CheckpointError:
        """Return the error for a weight with values that have no code. All of the weight is counted."""
        tensor, count, overflown = weight.source, 0, 0
        for first in range(0, tensor.numel, STEP):
            count += quantize.count_nonfinite(self.values(tensor, first, min(STEP, tensor.numel - first)))
            overflown += 0 if self.reader.merge is None else self.reader.merge.overflown
        if overflown:
            return RangeError.of_merged(weight.name, file=tensor.span.file, count=overflown, dtype="F32")
        return WeightValueError.of_nonfinite(weight.name, tensor.span.file, count, tensor.numel)

    # ---------------------------------------------------------------- what is not quantized

    def copy(self, layout: FileLayout, chunk: Chunk, out: Bytes) -> dict[str, WeightFacts]:
        """Fill ``out`` with tensors that are copied or cast. Return facts on merged ones, and on NaN codes."""
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
        """Fill ``out`` with the values of a tensor as they are written: copied, dequantized, merged or cast."""
        first, reader = offset * 8 // DTYPE_BITS[span.dtype], self.reader
        reader.merge = None
        reader.nonfinite.clear()
        reader.counting = True  # only here are codes that are not finite carried over
        if span.dtype in given.dtypes():
            given.elements(first, span.dtype, out, reader)
        else:
            self._cast(given, first, span, out)
        reader.counting = False
        if reader.merge is not None:
            arrival = Arrival.of(*reader.merge, values_of(out, span.dtype).floats)
            if arrival.elements < reader.merge.before.size and (overflown := reader.merge.overflown):
                raise RangeError.of_merged(given, file=None, count=overflown, dtype="F32")
            facts.setdefault(span.name, WeightFacts()).arrival.add(arrival)
        for name, count in reader.nonfinite.items():
            facts.setdefault(name, WeightFacts()).nan_codes += count

    def _cast(self, given: Tensor, first: int, span: TensorSpan, out: Bytes) -> None:
        itemsize = TARGET_BYTES[span.dtype]
        for begin in range(0, out.size // itemsize, STEP):
            part = out[begin * itemsize :][: STEP * itemsize]
            values = self.values(given, first + begin, part.size // itemsize)
            if overflown := quantize.round_to(values.floats, span.dtype, part.view(bits_dtype(span.dtype))):
                raise RangeError.of_base(span.name, given, (given.dtype, span.dtype), overflown)

    # ---------------------------------------------------------------- what is counted

    def report(
        self, facts: WeightFacts, weight: Quantization, run: Run, step: Step, codes: U8, scales: F32, before: F32
    ) -> None:
        """Count what the codes make of their values, compared with the base, if the plan asks for a report."""
        if not self._plan.report:
            return
        if (merge := self.reader.merge) is not None:
            arrival, clipped = quantize.arrival(step.parts, *merge, codes, scales, weight.coding)
            facts.arrival.add(arrival)
            facts.tally.add(Tally(elements=codes.size, clipped=clipped))
            return
        old = None if weight.before is None else self._old(weight, weight.before, run)
        tally = step.tally(codes, scales, before, old)
        if weight.before is not None and old is not None:
            if self._plan.see:
                was, now = (quantize.decode(step.parts, *of, weight.coding) for of in ((old, before), (codes, scales)))
                self.seen.compare(weight.before.name, was, now, tally.moved)
        elif self._plan.see:
            self.seen.count_codes(weight.name, weight.coding.dtype, codes)
            values = step.values
            rounded = np.empty(values.bits.size, bits_dtype(values.dtype))
            quantize.round_to(quantize.decode(step.parts, codes, scales), values.dtype, rounded)
            self.seen.compare(weight.name, values.floats, values_of(rounded.view(np.uint8), values.dtype).floats)
        facts.tally.add(tally)

    def _see_base(self, weight: Quantization, run: Run) -> None:
        """Count the base's codes of a run of elements, in the first pass only."""
        if self._plan.see and not self.again and weight.before is not None:
            self.seen.count(weight.before, self._old(weight, weight.before, run))

    def _see_plain(self, span: TensorSpan, offset: int, out: Bytes) -> None:
        """Count the codes of a weight that is carried from the base, or compare another tensor with the base's."""
        if (tensor := self._plan.by_codes.get(span.name)) is not None:
            self.seen.count(tensor, tensor.one_a_byte(out))
        elif (before := self._plan.compared(span)) is not None:
            old = np.empty_like(out)
            before.read(old, offset)
            if span.dtype in TARGET_BYTES:
                was, now = (values_of(part, span.dtype).floats for part in (old, out))
                self.seen.compare(span.name, was, now)
            else:
                self.seen.change(span.name, Tally(moved=moved_bytes(old, out, span.dtype)))

    def _old(self, weight: Quantization, before: QuantizedTensor, run: Run) -> U8:
        """Return the base's codes of a run of elements, one a byte. Two calls in a row for the same run read once."""
        nbytes = run.size // weight.per_byte
        if self._base_at != (at := (weight.name, run.first, run.size)):
            if self._base_codes.size < nbytes:
                self._base_codes = np.empty(nbytes, np.uint8)
            before.packed.read(self._base_codes[:nbytes], run.first // weight.per_byte)
            self.base_bytes_read += nbytes
            self._base_at = at
        return before.one_a_byte(self._base_codes[:nbytes])


def runs(weight: Quantization, begin: int, count: int) -> Iterator[Run]:
    """Yield the pieces to process of ``count`` elements of a weight from ``begin`` on."""
    return (runs_of if weight.wide else bands_of)(weight.grid, begin, count, STEP)

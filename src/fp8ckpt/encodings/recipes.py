"""What an output holds, tensor by tensor, as pure data: planned before the first byte is written.

An output in BF16, FP16 or FP32 has no weights that are quantized: its tensors are all ``plain``, and its files are cut
at pages. In FP8, each file is that of the base, or of the source where there is no base. Its weights are cut into
chunks that hold whole blocks, so that a chunk's scales can be made from the chunk alone; scales are written beside, by
whoever makes the codes. A weight whose blocks are larger than a chunk is *wide*: its scales depend on all of it, and
often on its siblings'.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

from fp8ckpt.encodings.rule import units_of
from fp8ckpt.errors import UnsupportedFormatError
from fp8ckpt.numerics.geometry import BlockGrid, as_matrices
from fp8ckpt.numerics.quantize import CODINGS, Coding
from fp8ckpt.output import extents as cutting
from fp8ckpt.output.extents import Chunk, Extent, extents_of, met, page_chunks, reads_of
from fp8ckpt.output.forecast import Forecast
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.merged import MergedTensor
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import Tensor, bytes_of_values

Unit = tuple[str, ...]  # the names of weights that have one scale, or one factor, together


class Quantization(NamedTuple):
    """A weight to be quantized: where it is read, where its codes and scales go, and what it was before, if known.

    ``factor``: where the second level of its scales goes, if it has one. ``merged``: the source, where it is one that
    may have short ways to its largest magnitude and its codes.
    """

    source: Tensor
    weight: TensorSpan
    scale: TensorSpan
    grid: BlockGrid
    before: QuantizedTensor | None
    factor: TensorSpan | None = None
    merged: MergedTensor | None = None

    @classmethod
    def like(cls, before: QuantizedTensor, source: Tensor, spans: Mapping[str, TensorSpan]) -> Quantization:
        """A weight that is written like one of a base; ``spans``: of the output, by name. Raises as `grid_of`."""
        weight, scale, *factor = (spans[span.name] for span in (before.weight, *before.scales))
        return cls(source, weight, scale, grid_of(before), before, factor[0] if factor else None)

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def coding(self) -> Coding:
        """How its codes are made: as the base's are, or in FP8."""
        return CODINGS[self.weight.dtype if self.before is None else self.before.code_dtype]

    @property
    def per_byte(self) -> int:
        return 1 if self.before is None else self.before.per_byte

    @property
    def band(self) -> int:
        """Elements of the fewest rows that hold whole blocks; 0 where blocks span matrices."""
        matrices = as_matrices(self.grid)
        if any(size > 1 for size in matrices.block_size[:-2]):
            return 0
        return min(matrices.block_size[-2], matrices.weight_shape[-2]) * matrices.weight_shape[-1]

    @property
    def wide(self) -> bool:
        """Whether a chunk may be too small for a block."""
        of_one_scale = self.grid.per_tensor and self.per_byte == 1  # what is packed has groups, if only one
        return of_one_scale or not 0 < self.band <= cutting.CHUNK


def grid_of(tensor: QuantizedTensor) -> BlockGrid:
    """The grid by which a weight is worked on: its own. Where there is a factor, and a chunk does not hold a row of it,
    a row is several of whole groups. Raises `UnsupportedFormatError` where groups do not divide such a row.
    """
    if tensor.second is None or tensor.shape[-1] <= cutting.CHUNK:
        return tensor.grid
    (*lead, cols), group = tensor.grid.weight_shape, tensor.grid.block_size[-1]
    if cols % group:
        raise UnsupportedFormatError.of_rows(tensor, cols, cutting.CHUNK)
    parts = next(n for n in range(2, cols + 1) if cols % (n * group) == 0 and cols // n <= max(cutting.CHUNK, group))
    return BlockGrid((prod(lead) * parts, cols // parts), (1, group))


@dataclass(frozen=True)
class QuantizingPlan:
    """An output, and what each of its stored tensors is made of.

    ``weights``: by name. ``plain``: where the stored tensors are read that are copied, or cast where the dtypes differ.
    ``units``: the wide weights, and those with a factor; together those that must have one scale, or one factor.
    ``fresh``: no scale is kept. ``powers_of_two``: of new scales. ``report``: count what training did; ``see``: and
    what a page shows. ``carried``: what is the base's, byte for byte; ``merged``: what adapters change, and how
    often it is read for that.
    """

    output: OutputPlan
    source: Checkpoint
    base: Checkpoint | None
    weights: Mapping[str, Quantization]
    plain: Mapping[str, Tensor]
    units: tuple[Unit, ...]
    fresh: bool
    report: bool
    see: bool = False
    powers_of_two: bool = False
    carried: tuple[str, ...] = ()
    merged: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def untouched(self, weight: Quantization) -> bool:
        """Whether no adapter changes a weight, which is here for the sake of its siblings alone."""
        return bool(self.merged) and weight.name not in self.merged

    @cached_property
    def unit_of(self) -> dict[str, Unit]:
        """The unit of each weight of ``units``."""
        return {name: unit for unit in self.units for name in unit}

    @cached_property
    def by_codes(self) -> dict[str, QuantizedTensor]:
        """The base's weights that are carried, by the names that their codes are stored under."""
        quantized = () if self.base is None else self.base.quantized
        return {tensor.weight.name: tensor for tensor in quantized if tensor.weight.name not in self.weights}

    def compared(self, span: TensorSpan) -> TensorSpan | None:
        """What the base has of a tensor that is not quantized; None where that is written, or no base is known."""
        tensor = None if self.base is None else self.base.tensors.get(span.name)
        return None if tensor is None or span.name in self.carried else tensor.span

    @contextmanager
    def ahead(self, extents: Collection[Extent]) -> Iterator[None]:
        """Announces what the extents will read: values to the source's store, what is carried or compared to the
        base's; where that is the source itself, with an adapter merged, nothing is compared.
        """
        sources = {name: weight.source for name, weight in self.weights.items()}
        codes = {name: weight.before.weight for name, weight in self.weights.items() if weight.before and self.report}
        with ExitStack() as announced:
            for checkpoint, tensors in ((self.source, sources), (self.base, codes)):
                if checkpoint is not None and (tensors is sources or checkpoint is not self.source):
                    reads = reads_of({**self.plain, **tensors}, extents, checkpoint.store)
                    announced.enter_context(checkpoint.store.ahead(reads))
            yield

    def extents(self, most: int) -> dict[int, Extent]:
        """All that is written in the first pass, by numbers, in extents of ``most`` bytes."""
        found: list[Extent] = []
        scales = {quantization.scale.name for quantization in self.weights.values()}
        scales |= {factor.name for name in self.unit_of if (factor := self.weights[name].factor) is not None}
        cut = bool(self.weights) or self.base is not None  # in a base's own files elements may begin anywhere
        for layout in self.output.layouts:
            for extent in extents_of(layout, self._chunks(layout, scales) if cut else page_chunks(layout), most):
                found.append(extent._replace(beside=tuple(sorted(self._beside(extent)))))
        return dict(enumerate(found))

    def forecast(self, output: PartialOutput) -> Forecast:
        """What writing it would take; see `fp8ckpt.output.plan.OutputPlan.forecast`."""
        return self.output.forecast(output, self.extents(output.goal.extent), self.made_of(), self.notes)

    def made_of(self) -> dict[str, int]:
        """Of how many bytes each tensor is made: values, which are read twice where it is known that no scale is kept,
        and the base's codes for the report.
        """
        made = {name: self.merged.get(name, 1) * bytes_of_values(tensor) for name, tensor in self.plain.items()}
        for name, weight in self.weights.items():
            of_whole = weight.wide or weight.factor is not None
            looks = 2 if of_whole and (self.fresh or weight.before is None) else 1
            compared = weight.before.weight.nbytes if weight.before is not None and self.report else 0
            made[name] = (looks + self.merged.get(name, 1) - 1) * bytes_of_values(weight.source) + compared
        return made

    def units_in(self, extent: Extent) -> set[Unit]:
        """The units of which an extent has some of the bytes."""
        names = (span.name for chunk in extent.chunks for span, _, _ in met(extent.layout, chunk))
        return {self.unit_of[name] for name in names if name in self.unit_of}

    def second_pass(self, first: Mapping[int, Extent], *, in_parts: bool) -> dict[int, Extent]:
        """The extents in which weights of ``units`` are written again if their scales turn out to be others, as far as
        they do; by numbers that go on from those of the ``first`` pass. ``in_parts``: an extent is written whole, with
        all that is in it.
        """
        if in_parts:
            found = [extent for extent in first.values() if self.units and self.units_in(extent)]
        else:
            found = []
            for layout in self.output.layouts:
                places = (place for place, span in enumerate(layout.spans) if span.name in self.unit_of)
                cut = (
                    Chunk(*piece, place)
                    for place in places
                    for piece in _cut_weight(self.weights[layout.spans[place].name])
                )
                for extent in extents_of(layout, cut, cutting.EXTENT):
                    found.append(extent._replace(beside=tuple(self._beside(extent))))
        return {i: extent._replace(again=True) for i, extent in enumerate(found, len(first))}

    def _beside(self, extent: Extent) -> set[str]:
        """The other files that the scales of an extent's weights lie in."""
        spans = extent.layout.spans
        met = {spans[chunk.first].name for chunk in extent.chunks if chunk.first < len(spans)}
        files = {self.weights[name].scale.file.name for name in met if name in self.weights}
        return files - {extent.layout.name}

    def _chunks(self, layout: FileLayout, scales: Collection[str]) -> Iterator[Chunk]:
        """The chunks of a file: small tensors together, large ones cut, ``scales`` left out; a weight is alone."""
        start = stop = first = 0  # of the small tensors that are gathered
        for low, high, place, alone in self._cut_file(layout, scales):
            if stop > start and (alone or low != stop or high - start > cutting.CHUNK):
                yield Chunk(start, stop, first)
                start = stop
            if alone:
                yield Chunk(low, high, place)
            elif stop > start:
                stop = high
            else:
                start, stop, first = low, high, place
        if stop > start:
            yield Chunk(start, stop, first)

    def _cut_file(self, layout: FileLayout, scales: Collection[str]) -> Iterator[tuple[int, int, int, bool]]:
        """The pieces of a file, each with which of its tensors it is of, and whether that is a weight."""
        for low, high in _pieces(0, len(layout.head), cutting.CHUNK):
            yield low, high, 0, False
        for place, span in enumerate(layout.spans):
            if span.name not in scales and span.nbytes:
                weight = self.weights.get(span.name)
                for low, high in _cut(span, cutting.CHUNK) if weight is None else _cut_weight(weight):
                    yield low, high, place, weight is not None


def _pieces(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, most):
        yield first, min(first + most, stop)


def _cut(span: TensorSpan, most: int) -> Iterator[tuple[int, int]]:
    """A tensor in pieces of whole elements."""
    return _pieces(span.start, span.stop, max(most // 8 * 8, 8))


def _cut_weight(quantization: Quantization) -> Iterator[tuple[int, int]]:
    """A weight in pieces that hold whole blocks: some matrices, or some bands of one; a wide one anywhere."""
    span = quantization.weight
    if quantization.wide:
        yield from _cut(span, cutting.CHUNK)
        return
    matrix, per_byte = prod(as_matrices(quantization.grid).weight_shape[-2:]), quantization.per_byte
    if matrix <= cutting.CHUNK:
        yield from _pieces(span.start, span.stop, cutting.CHUNK // matrix * matrix // per_byte)
        return
    bands = cutting.CHUNK // quantization.band * quantization.band // per_byte
    for start in range(span.start, span.stop, matrix // per_byte):
        yield from _pieces(start, start + matrix // per_byte, bands)


def beside_weights(
    base: Checkpoint, given: Mapping[str, Tensor], spans: Iterable[str], weights: Mapping[str, Quantization]
) -> dict[str, Tensor]:
    """Where all is read that an output in a base's layout stores besides ``weights`` and their scales: tensors that are
    ``given``, and the base's own bytes for the others.
    """
    made = {*weights, *(weight.scale.name for weight in weights.values())}
    stored = {span.name: span for header in base.files for span in header.spans}
    return {name: given.get(name, stored[name]) for name in spans if name not in made}


def source_tensors(source: Checkpoint, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The source's tensors by the names (``names``: source to output) that they are written under; all are plain."""
    found: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        if tensor.scaled is not None:
            raise UnsupportedFormatError.of_quantized(tensor)
        found[names[name]] = tensor
    return found


def joint_units(weights: Iterable[Quantization]) -> Iterator[Unit]:
    """The names of wide weights, and of those with a factor: those of one scale, or one factor, with the siblings that
    share it; each other is alone.
    """
    found = [weight for weight in weights if weight.scale.nbytes and (weight.wide or weight.factor)]
    names = {weight.before.name: weight.name for weight in found if weight.before}
    for unit in units_of(weight.before for weight in found if weight.before):
        yield tuple(names.pop(name) for name in unit)
    yield from ((name,) for name in names.values())

"""The contents of an output, tensor by tensor, as pure data: planned before the first byte is written.

An output in BF16, FP16 or FP32 has no quantized weights: its tensors are all ``plain``, and its files are cut at pages.
In FP8, each file is laid out as in the base, or as in the source without a base. Weights are cut into chunks of whole
blocks, so that a chunk alone decides its scales; the worker that makes the codes writes the scales, too. A weight whose
blocks are larger than a chunk is *wide*: its scales depend on all of it, and often on its siblings.
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

Unit = tuple[str, ...]  # the names of weights that share one scale, or one factor


class Quantization(NamedTuple):
    """A weight to be quantized: its source, the places of its codes and scales, and its tensor in the base, if any.

    ``factor``: the place of the second level of its scales, if it has one. ``merged``: the source, if adapters are
    merged into it: it may find its largest magnitude and its codes in a faster way.
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
        """Return a weight that is written like one of a base. ``spans``: the output's, by name. Raises as `grid_of`."""
        weight, scale, *factor = (spans[span.name] for span in (before.weight, *before.scales))
        return cls(source, weight, scale, grid_of(before), before, factor[0] if factor else None)

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def coding(self) -> Coding:
        """The coding of its codes: that of the base, or FP8."""
        return CODINGS[self.weight.dtype if self.before is None else self.before.code_dtype]

    @property
    def per_byte(self) -> int:
        return 1 if self.before is None else self.before.per_byte

    @property
    def band(self) -> int:
        """The number of elements of the fewest rows that hold whole blocks; 0 if blocks span matrices."""
        matrices = as_matrices(self.grid)
        if any(size > 1 for size in matrices.block_size[:-2]):
            return 0
        return min(matrices.block_size[-2], matrices.weight_shape[-2]) * matrices.weight_shape[-1]

    @property
    def wide(self) -> bool:
        """Whether a block may be larger than a chunk."""
        of_one_scale = self.grid.per_tensor and self.per_byte == 1  # a packed weight has groups, even if only one
        return of_one_scale or not 0 < self.band <= cutting.CHUNK


def grid_of(tensor: QuantizedTensor) -> BlockGrid:
    """Return the grid for quantizing a weight. It is its own, except that a row larger than a chunk becomes several
    rows of whole groups if there is a factor. Raise `UnsupportedFormatError` if groups do not divide such a row.
    """
    if tensor.second is None or tensor.shape[-1] <= cutting.CHUNK:
        return tensor.grid
    (*lead, cols), group = tensor.grid.weight_shape, tensor.grid.block_size[-1]
    if cols % group:
        raise UnsupportedFormatError.of_rows(tensor, size=cols, most=cutting.CHUNK)
    parts = next(n for n in range(2, cols + 1) if cols % (n * group) == 0 and cols // n <= max(cutting.CHUNK, group))
    return BlockGrid((prod(lead) * parts, cols // parts), (1, group))


@dataclass(frozen=True)
class QuantizingPlan:
    """An output, and the source of each of its stored tensors.

    ``weights``: by name. ``plain``: the sources of the tensors that are copied, or cast if the dtypes differ.
    ``units``: the wide weights and those with a factor, grouped by the scale or factor that they must share. ``fresh``:
    no scale is kept. ``powers_of_two``: new scales are powers of two. ``report``: count the effect of training;
    ``see``: count what the page shows. ``carried``: tensors copied from the base, byte for byte. ``merged``: tensors
    that adapters change, each with the number of times it is read.
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
        """Whether no adapter changes a weight: it is planned only because a sibling changes."""
        return bool(self.merged) and weight.name not in self.merged

    @cached_property
    def unit_of(self) -> dict[str, Unit]:
        """The unit of each weight in ``units``."""
        return {name: unit for unit in self.units for name in unit}

    @cached_property
    def by_codes(self) -> dict[str, QuantizedTensor]:
        """The base's weights that are carried, by the names of their codes."""
        quantized = () if self.base is None else self.base.quantized
        return {tensor.weight.name: tensor for tensor in quantized if tensor.weight.name not in self.weights}

    def compared(self, span: TensorSpan) -> TensorSpan | None:
        """Return the base's tensor to compare an unquantized one with; None if it is carried, or without a base."""
        tensor = None if self.base is None else self.base.tensors.get(span.name)
        return None if tensor is None or span.name in self.carried else tensor.span

    @contextmanager
    def ahead(self, extents: Collection[Extent]) -> Iterator[None]:
        """Announce the reads of the extents: those of values to the source's store, those of carried and compared
        tensors to the base's. If the base is the source itself, with an adapter merged, nothing is compared.
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
        """Return all extents of the first pass, of ``most`` bytes, by number."""
        found: list[Extent] = []
        scales = {quantization.scale.name for quantization in self.weights.values()}
        scales |= {factor.name for name in self.unit_of if (factor := self.weights[name].factor) is not None}
        cut = bool(self.weights) or self.base is not None  # in a base's own files elements may begin anywhere
        for layout in self.output.layouts:
            for extent in extents_of(layout, self._chunks(layout, scales) if cut else page_chunks(layout), most):
                found.append(extent._replace(beside=tuple(sorted(self._beside(extent)))))
        return dict(enumerate(found))

    def forecast(self, output: PartialOutput) -> Forecast:
        """Return the forecast of writing it; see `fp8ckpt.output.plan.OutputPlan.forecast`."""
        return self.output.forecast(output, self.extents(output.goal.extent), self.made_of(), self.notes)

    def made_of(self) -> dict[str, int]:
        """Return how many bytes are read for each tensor: its values (twice, if it is known that no scale is kept), and
        the base's codes for the report.
        """
        made = {name: self.merged.get(name, 1) * bytes_of_values(tensor) for name, tensor in self.plain.items()}
        for name, weight in self.weights.items():
            of_whole = weight.wide or weight.factor is not None
            looks = 2 if of_whole and (self.fresh or weight.before is None) else 1
            compared = weight.before.weight.nbytes if weight.before is not None and self.report else 0
            made[name] = (looks + self.merged.get(name, 1) - 1) * bytes_of_values(weight.source) + compared
        return made

    def units_in(self, extent: Extent) -> set[Unit]:
        """Return the units that an extent has bytes of."""
        names = (span.name for chunk in extent.chunks for span, _, _ in met(extent.layout, chunk))
        return {self.unit_of[name] for name in names if name in self.unit_of}

    def second_pass(self, first: Mapping[int, Extent], *, in_parts: bool) -> dict[int, Extent]:
        """Return the extents that write the weights of ``units`` again if they get new scales. The numbers go on from
        those of the ``first`` pass. ``in_parts``: an extent is written whole, including its other tensors.
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
        """Return the other files that hold the scales of an extent's weights."""
        spans = extent.layout.spans
        met = {spans[chunk.first].name for chunk in extent.chunks if chunk.first < len(spans)}
        files = {self.weights[name].scale.file.name for name in met if name in self.weights}
        return files - {extent.layout.name}

    def _chunks(self, layout: FileLayout, scales: Collection[str]) -> Iterator[Chunk]:
        """Yield the chunks of a file without ``scales``: small tensors share one, large ones are cut, weights alone."""
        start = stop = first = 0  # of the small tensors gathered so far
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
        """Yield the pieces of a file, each with the index of its tensor, and whether that is a weight."""
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
    """Yield a tensor in pieces of whole elements."""
    return _pieces(span.start, span.stop, max(most // 8 * 8, 8))


def _cut_weight(quantization: Quantization) -> Iterator[tuple[int, int]]:
    """Yield a weight in pieces of whole blocks: several matrices, or bands of one. A wide one is cut at any element."""
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
    """Return the sources of the tensors that an output in a base's layout stores besides ``weights`` and their scales:
    the ``given`` tensors, and the base's own bytes for the others.
    """
    made = {*weights, *(weight.scale.name for weight in weights.values())}
    stored = {span.name: span for header in base.files for span in header.spans}
    return {name: given.get(name, stored[name]) for name in spans if name not in made}


def source_tensors(source: Checkpoint, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the source's tensors by their names in the output (``names``: source to output). All must be plain."""
    found: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        if tensor.scaled is not None:
            raise UnsupportedFormatError.of_quantized(tensor)
        found[names[name]] = tensor
    return found


def joint_units(weights: Iterable[Quantization]) -> Iterator[Unit]:
    """Yield units of wide weights, and of weights with a factor: those that share a scale, or a factor, together, and
    every other weight alone.
    """
    found = [weight for weight in weights if weight.scale.nbytes and (weight.wide or weight.factor)]
    names = {weight.before.name: weight.name for weight in found if weight.before}
    for unit in units_of(weight.before for weight in found if weight.before):
        yield tuple(names.pop(name) for name in unit)
    yield from ((name,) for name in names.values())

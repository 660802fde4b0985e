"""Which scale belongs to which weight, by the table of formats.

Weights are found by dtype, in the headers, or by the table; scales by name, beside the weight
(`fp8ckpt.tensors.formats`). A failed pairing is a named defect: a missing, orphan or ambiguous scale, a scale that does
not tile its weight, or one of a foreign dtype. Integer and other packed weights are recognised and refused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from functools import cached_property, lru_cache, partial
from operator import itemgetter
from typing import NamedTuple

from fp8ckpt.errors import (
    AmbiguousScaleError,
    Fp8CheckpointError,
    HeaderError,
    MissingScaleError,
    OrphanScaleError,
    ScaleDtypeError,
    ScaleShapeError,
    UnsupportedFormatError,
)
from fp8ckpt.numerics.codes import F4, FP8_DTYPES, FP8_SCALES
from fp8ckpt.numerics.geometry import Shape, infer_grid, tiled
from fp8ckpt.tensors import formats
from fp8ckpt.tensors.blocks import BlockSizes
from fp8ckpt.tensors.scaled import QuantizedTensor, SecondLevel
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import Tensor

_Beside = tuple[formats.ScaleRow, TensorSpan]


class Pairing(NamedTuple):
    """The logical tensors in the order given, and every defect. Separate from them: the scales of attention and of its
    cache, which belong to no single weight, and the markers, which only say how the others are stored.
    """

    tensors: dict[str, Tensor]
    cache_scales: tuple[TensorSpan, ...]
    markers: tuple[TensorSpan, ...]
    defects: list[Fp8CheckpointError]


def pair(
    spans: Mapping[str, TensorSpan], blocks: BlockSizes, *, quantized: bool = False, complete: bool = True
) -> Pairing:
    """Pair every weight of codes of a checkpoint with its scale.

    ``spans`` are all stored tensors by name; ``blocks`` and ``quantized`` are the configuration's: the block size of
    each module, and whether it speaks of quantization at all (of the cache alone, for example). With ``complete`` false
    some files could not be read, and what is missing or left over is not held against the rest.
    """
    pairs = _Pairs(spans, blocks, complete=complete)
    pairs.refuse_packed()
    markers = pairs.set_markers_apart()
    weights = pairs.weights()
    pairs.pair(weights)
    tensors, cache_scales = pairs.sort_out(quantized=quantized or bool(weights), activations=bool(weights))
    return Pairing(tensors, cache_scales, markers, pairs.defects)


class _Pairs:
    """What of a checkpoint is paired so far, and every defect.

    ``made``: the tensors, by the names that their codes are stored under; and None, by that of what belongs to others.
    """

    def __init__(self, spans: Mapping[str, TensorSpan], blocks: BlockSizes, *, complete: bool) -> None:
        self.made: dict[str, Tensor | None] = {}
        self.defects: list[Fp8CheckpointError] = []
        self._spans, self._blocks, self._complete = spans, blocks, complete
        self._codes = {
            name: dtype
            for name, span in spans.items()
            if span.dtype in formats.MAY_BE_CODES and (dtype := formats.code_dtype(span, spans)) is not None
        }
        self._last_parts = "\n.".join(("", *{name[name.rfind(".") + 1 :] for name in spans}, ""))
        self._scales, self._activations = (
            [row for row in rows if self._occurs(row.scale)] for rows in (formats.SCALES, formats.ACTIVATIONS)
        )
        self._has_factors = self._occurs(*(ending for _, ending in formats.FACTORS))
        self._renamed, self._ordered = (self._occurs(*ends) for ends in (formats.RENAMING_ENDINGS, formats.ORDERED))
        self._block_size = None if blocks.grouped.values else blocks.common

    def _occurs(self, *endings: str) -> bool:
        """Whether any name ends so: most endings of the tables do not, and each lies in the last part of a name."""
        return any(ending + "\n" in self._last_parts for ending in endings)

    def _note(self, defect: Fp8CheckpointError) -> None:
        """What may lie in a file that could not be read is no defect."""
        if self._complete or not isinstance(defect, MissingScaleError | OrphanScaleError):
            self.defects.append(defect)

    def refuse_packed(self) -> None:
        """What is packed or integer is a defect each; it and all that stands beside it are no tensors of their own."""
        dtypes = {span.dtype for span in self._spans.values()}
        if not self._occurs(*formats.PACKED_WEIGHTS) and dtypes.isdisjoint(formats.MAY_BE_PACKED):
            return
        for name, span in self._spans.items():
            if name not in self._codes and _is_packed(span, self._spans):
                stem = name
                for ending in (".weight", *formats.PACKED_WEIGHTS, "_blocks", "_qdata"):
                    stem = stem.removesuffix(ending)
                self.made.update(dict.fromkeys((name, *(stem + ending for ending in formats.COMPANIONS))))
                self.defects.append(UnsupportedFormatError.of_packed(span))

    def set_markers_apart(self) -> tuple[TensorSpan, ...]:
        spans = self._spans.values() if self._occurs(*formats.MARKERS) else ()
        markers = tuple(span for span in spans if formats.is_marker(span.name, span.dtype, span.shape))
        self.made.update((span.name, None) for span in markers)
        return markers

    def weights(self) -> list[str]:
        """The names of all codes that may have scales; of four bits first: scales in FP8 are theirs, and no weights."""
        weights = [name for name in self._codes if name not in self.made]
        return sorted(weights, key=lambda name: self._codes[name] != F4) if F4 in self._codes.values() else weights

    def pair(self, weights: list[str]) -> None:
        """Pair the codes of these names with the tensors that stand beside them."""
        spans, codes, made, scales, activations = self._spans, self._codes, self.made, self._scales, self._activations
        for name in weights:
            if name in made:
                continue
            made[name] = None
            span, packed = spans[name], codes[name] == F4
            found = self._claim(name, scales, () if packed else FP8_DTYPES)
            beside = self._claim(name, activations, ()) if activations else ()
            factor = formats.factor_key(name, found[0][0]) if packed and len(found) == 1 else None
            if factor is not None:
                made.setdefault(factor)
            if self._has_factors and (second := _second_factor(name, spans, factor)) is not None:
                made.setdefault(second)
                self._note(UnsupportedFormatError.of_factor(span, second=second))
            elif len(found) == 1:
                self._take(span, packed, found[0], tuple(map(itemgetter(1), beside)) if beside else ())
            elif found:
                self._note(AmbiguousScaleError.of(span, [scale.name for _, scale in found]))
            else:
                self._note(_missing(span, self._near_scales))

    def _claim(self, name: str, rows: list[formats.ScaleRow], but: Collection[str]) -> list[_Beside]:
        """What stands beside codes by the rows of a table, but for some dtypes: it is no tensor of its own."""
        found = []
        for row in rows:
            if name.endswith(end := row.weight):
                span = self._spans.get(name.removesuffix(end) + row.scale)
                if span is not None and span.dtype not in but:
                    found.append((row, span))
                    self.made.setdefault(span.name)
        return found

    def _take(self, codes: TensorSpan, packed: bool, found: _Beside, activations: tuple[TensorSpan, ...]) -> None:
        """Make a tensor of codes and their one scale."""
        scale = found[1]
        name = formats.logical_name(codes.name) if self._renamed else codes.name
        made: QuantizedTensor | Fp8CheckpointError
        if self._ordered and formats.in_kernel_order(codes.name, scale.dtype, scale.shape, self._spans):
            made = UnsupportedFormatError.of_order(codes, scale=scale)
        elif packed:
            made = self._of_four_bits(name, codes, found, activations)
        else:
            stated = self._block_size or self._blocks.of(formats.module_of(name))
            made = _of_eight_bits(name, codes, scale, activations, stated)
        if isinstance(made, Fp8CheckpointError):
            self._note(made)
        elif name != codes.name and name in self._spans:
            self._note(HeaderError.of_two(self._spans[name], other=codes.name))
        else:
            self.made[codes.name] = made

    def _of_four_bits(
        self, name: str, weight: TensorSpan, found: _Beside, activations: tuple[TensorSpan, ...]
    ) -> QuantizedTensor | Fp8CheckpointError:
        """The dtype of the scales says how large their groups are, and whether there is a second level."""
        row, scale = found
        if scale.dtype not in formats.GROUPS:
            return ScaleDtypeError.of(weight, scale=scale, known=formats.GROUPS)
        shape, group = formats.weight_shape(row, weight, F4), (formats.GROUPS[scale.dtype],)
        grid = tiled(shape, group)
        if grid is None or shape[-1] % 2:
            return HeaderError.of_halves(weight)
        if grid.shape != scale.shape or (row.groups and 2 * weight.shape[-1] != group[0]):
            six = tiled((*shape[:-1], shape[-1] * 2 // 3), group)  # of 6 bits, a row of bytes holds fewer codes
            if weight.name.endswith(formats.PACKED_WEIGHTS) and six is not None and six.shape == scale.shape:
                return UnsupportedFormatError.of_packed(weight)
            return ScaleShapeError.of(weight, scale, group, grid.shape)
        stated = self._blocks.four_bits.of(formats.module_of(name))
        if stated is not None and stated[-1] != group[0]:
            return ScaleShapeError.of_group(weight, scale=scale, stated=stated[-1], group=group[0])
        second = self._second_level(weight, row, scale)
        if isinstance(second, Fp8CheckpointError):
            return second
        return QuantizedTensor(name, weight, scale, grid, activations, F4, second, row.across)

    def _second_level(
        self, weight: TensorSpan, row: formats.ScaleRow, scale: TensorSpan
    ) -> SecondLevel | Fp8CheckpointError | None:
        """The factor of the scales, None where their dtype has none."""
        key = formats.factor_key(weight.name, row)
        second = None if key is None else self._spans.get(key)
        if scale.dtype != formats.TWO_LEVELS:
            return None if second is None else UnsupportedFormatError.of_factor(weight, second=second.name)
        if second is None:
            return MissingScaleError.of(weight, key or scale.name, None)
        if second.dtype != "F32":
            return ScaleDtypeError.of(weight, scale=second, known=("F32",))
        return SecondLevel(second, row.divides) if second.numel == 1 else ScaleShapeError.of(weight, second, None, None)

    def sort_out(self, *, quantized: bool, activations: bool) -> tuple[dict[str, Tensor], tuple[TensorSpan, ...]]:
        """All tensors, and the scales of the cache, once the weights are paired. See `_meant_weights`."""
        tensors: dict[str, Tensor] = {}
        cache_scales: list[TensorSpan] = []
        spans, made = self._spans, self.made
        for name, span in spans.items():
            if (tensor := made.get(name, span)) is not span:
                if tensor is not None:
                    tensors[tensor.name] = tensor
            elif quantized and formats.is_attention_scale(name, span.shape, spans):
                cache_scales.append(span)
            elif (meant := _meant_weights(span, spans, activations=activations)) is not None:
                self._note(OrphanScaleError.of(span, meant, spans))
            else:
                tensors[name] = span
        return tensors, tuple(cache_scales)

    @cached_property
    def _near_scales(self) -> dict[str, list[str]]:
        """Names that speak of a scale, by the module they stand in: what a misnamed scale is looked for among."""
        names: dict[str, list[str]] = {}
        for name in sorted(self._spans):
            module, _, leaf = name.rpartition(".")
            if "scale" in leaf and not name.endswith(_ACTIVATION_ENDINGS):
                names.setdefault(module, []).append(name)
        return names


_ACTIVATION_ENDINGS = tuple(row.scale for row in formats.ACTIVATIONS)


def _second_factor(codes: str, spans: Mapping[str, TensorSpan], own: str | None) -> str | None:
    """Return the key of a further factor on the codes, besides their scale and ``own``, the factor of their format."""
    keys = (codes.removesuffix(end) + factor for end, factor in formats.FACTORS if codes.endswith(end))
    return next((key for key in keys if key in spans and key != own), None)


def _meant_weights(span: TensorSpan, spans: Mapping[str, TensorSpan], *, activations: bool) -> list[str] | None:
    """Return the weights that an unclaimed tensor may be the scale of, or None if it is not a scale.

    An activation scale counts as one only in an FP8 checkpoint (``activations``).
    """
    name = span.name
    rows = (*formats.SCALES, *formats.ACTIVATIONS) if "scale" in name else ()
    ends = [(end, row) for row in rows for end in (row.scale, row.factor) if end and name.endswith(end)]
    ends.sort(key=lambda found: -len(found[0]))  # the longest ending says most
    weights = [name.removesuffix(end) + row.weight for end, row in ends]
    if name.endswith(formats.ONLY_SCALES) or (activations and name.endswith(formats.ONLY_ACTIVATION_SCALES)):
        return weights
    beside = [name.removesuffix(end) + row.weight for end, row in ends if row.meant == formats.BESIDE]
    of_bytes = [row for _, row in ends if row.meant == formats.BYTES and span.dtype == "U8" and len(span.shape) > 1]
    return weights if of_bytes or any(weight in spans for weight in beside) else None


def _is_packed(span: TensorSpan, spans: Mapping[str, TensorSpan]) -> bool:
    name = span.name
    if span.dtype in formats.PACKED_DTYPES or name.endswith(formats.PACKED_WEIGHTS):
        return True
    if span.dtype not in formats.INTEGERS or len(span.shape) < 2:
        return False
    # A matrix of integers with its own scale is packed. The scale of an FP8 weight may be bytes too, and is no weight.
    stems = (name, name.removesuffix(".weight"), name.removesuffix("_qdata"))
    return any(stem + ending in spans for stem in stems for ending in formats.INTEGER_SCALES)


_grid = lru_cache(maxsize=4096)(infer_grid)  # a model has many tensors of few shapes
_made = partial(tuple.__new__, QuantizedTensor)  # takes a third of the time


def _of_eight_bits(
    name: str, weight: TensorSpan, scale: TensorSpan, activations: tuple[TensorSpan, ...], stated: Shape | None
) -> QuantizedTensor | Fp8CheckpointError:
    if scale.dtype not in FP8_SCALES:
        return ScaleDtypeError.of(weight, scale=scale, known=FP8_SCALES)
    block_size = stated or formats.even_block(weight.name, weight.shape, scale.shape)
    grid = _grid(weight.shape, scale.shape, block_size)
    if grid is not None:
        return _made((name, weight, scale, grid, activations, weight.dtype, None, False))
    fit = tiled(weight.shape, block_size) if block_size else None
    return ScaleShapeError.of(weight, scale, block_size, fit.shape if fit else None)


def _missing(weight: TensorSpan, near_scales: Mapping[str, list[str]]) -> MissingScaleError:
    module, _, leaf = weight.name.rpartition(".")
    names = near_scales.get(module, [])
    first = 0 if leaf == "weight" else bisect_left(names, weight.name)
    near = [name for name in names[first : first + 1] if leaf == "weight" or name.startswith(weight.name)]
    expected = weight.name + "_scale_inv"
    if formats.logical_name(weight.name) != weight.name:
        row = [row for row in formats.SCALES if weight.name.endswith(row.weight)][-1]
        expected = weight.name.removesuffix(row.weight) + row.scale
    return MissingScaleError.of(weight, expected, near[0] if near else None)

"""Which scale belongs to which weight, by the table of formats.

Weights are found by dtype, in the headers, or by the table; scales by name, beside the weight
(`fp8ckpt.tensors.formats`). A failed pairing is a named defect: a missing, orphan or ambiguous scale, a scale that does
not tile its weight, or one of a foreign dtype. Integer and other packed weights are recognised and refused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache, partial
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

    ``spans`` are all stored tensors by name. ``blocks`` and ``quantized`` come from the configuration: the block size
    of each module, and whether it mentions quantization at all (perhaps of the cache alone). ``complete`` is False if
    some files could not be read: missing and left-over tensors are then no defects.
    """
    last_parts = "\n.".join(("", *{name[name.rfind(".") + 1 :] for name in spans}, ""))

    def occurs(ending: str) -> bool:  # most endings of the tables do not; each is part of a name's last component
        return ending + "\n" in last_parts

    codes = {
        name: dtype
        for name, span in spans.items()
        if span.dtype in formats.MAY_BE_CODES and (dtype := formats.code_dtype(span, spans)) is not None
    }
    made: dict[str, Tensor | None] = {}  # by the name of the codes; None for tensors that belong to others
    defects: list[Fp8CheckpointError] = []
    dtypes = {span.dtype for span in spans.values()}
    if any(map(occurs, formats.PACKED_WEIGHTS)) or not dtypes.isdisjoint(formats.MAY_BE_PACKED):
        _refuse_packed(spans, codes, made, defects)
    marked = spans.values() if any(map(occurs, formats.MARKERS)) else ()
    markers = tuple(span for span in marked if formats.is_marker(span.name, span.dtype, span.shape))
    made.update((span.name, None) for span in markers)
    weights = [name for name in codes if name not in made]
    if F4 in codes.values():
        weights.sort(key=lambda name: codes[name] != F4)  # their FP8 scales are then no weights
    scales, activations = (
        [(row, row.weight, row.scale) for row in rows if occurs(row.scale)]
        for rows in (formats.SCALES, formats.ACTIVATIONS)
    )
    has_factors = any(occurs(ending) for _, ending in formats.FACTORS)
    renamed, ordered = (any(map(occurs, endings)) for endings in (formats.RENAMING_ENDINGS, formats.ORDERED))
    block_size = None if blocks.grouped.values else blocks.common
    near_scales: dict[str, list[str]] | None = None
    for name in weights:
        if name in made:
            continue
        made[name] = None
        span, packed, found, beside = spans[name], codes[name] == F4, [], []
        for row, end, ending in scales:
            scale = spans.get(name.removesuffix(end) + ending) if name.endswith(end) else None
            if scale is not None and (packed or scale.dtype not in FP8_DTYPES):
                found.append((row, scale))
                made.setdefault(scale.name)
        for _, end, ending in activations:
            scale = spans.get(name.removesuffix(end) + ending) if name.endswith(end) else None
            if scale is not None:
                beside.append(scale)
                made.setdefault(scale.name)
        factor = formats.factor_key(name, found[0][0]) if packed and len(found) == 1 else None
        if factor is not None:
            made.setdefault(factor)
        if has_factors and (second := _second_factor(name, spans, factor)) is not None:
            made.setdefault(second)
            defects.append(UnsupportedFormatError.of_factor(span, second))
        elif len(found) == 1:
            row, scale = found[0]
            result: QuantizedTensor | Fp8CheckpointError
            logical = formats.logical_name(name) if renamed else name
            if ordered and formats.in_kernel_order(name, scale.dtype, scale.shape, spans):
                result = UnsupportedFormatError.of_order(span, scale)
            elif packed:
                result = _of_four_bits(logical, span, row, scale, tuple(beside), spans, blocks)
            else:
                stated = block_size or blocks.of(formats.module_of(logical))
                result = _of_eight_bits(logical, span, scale, tuple(beside), stated)
            if isinstance(result, Fp8CheckpointError):
                if complete or not isinstance(result, MissingScaleError):
                    defects.append(result)
            elif logical != name and logical in spans:
                defects.append(HeaderError.of_two(spans[logical], name))
            else:
                made[name] = result
        elif found:
            defects.append(AmbiguousScaleError.of(span, [scale.name for _, scale in found]))
        elif complete:
            if near_scales is None:
                near_scales = _names_like_scales(spans)
            defects.append(_missing(span, near_scales))

    tensors: dict[str, Tensor] = {}
    cache_scales: list[TensorSpan] = []
    quantized = quantized or bool(weights)
    for name, span in spans.items():
        if (tensor := made.get(name, span)) is not span:
            if tensor is not None:
                tensors[tensor.name] = tensor
        elif quantized and formats.is_attention_scale(name, span.shape, spans):
            cache_scales.append(span)
        elif (meant := _meant_weights(span, spans, activations=bool(weights))) is not None:
            if complete:
                defects.append(
                    OrphanScaleError.of(span, meant[0], next((spans[key] for key in meant if key in spans), None))
                )
        else:
            tensors[name] = span
    return Pairing(tensors, tuple(cache_scales), markers, defects)


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


def _refuse_packed(
    spans: Mapping[str, TensorSpan],
    codes: Mapping[str, str],
    made: dict[str, Tensor | None],
    defects: list[Fp8CheckpointError],
) -> None:
    """Add a defect for each packed or integer weight. It and its companions are no tensors of the checkpoint."""
    for name, span in spans.items():
        if name not in codes and _is_packed(span, spans):
            stem = name
            for ending in (".weight", *formats.PACKED_WEIGHTS, "_blocks", "_qdata"):
                stem = stem.removesuffix(ending)
            made.update(dict.fromkeys((name, *(stem + ending for ending in formats.COMPANIONS))))
            defects.append(UnsupportedFormatError.of_packed(span))


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
        return ScaleDtypeError.of(weight, scale, FP8_SCALES)
    block_size = stated or formats.even_block(weight.name, weight.shape, scale.shape)
    grid = _grid(weight.shape, scale.shape, block_size)
    if grid is not None:
        return _made((name, weight, scale, grid, activations, weight.dtype, None, False))
    fit = tiled(weight.shape, block_size) if block_size else None
    return ScaleShapeError.of(weight, scale, block_size, fit.shape if fit else None)


def _of_four_bits(
    name: str,
    weight: TensorSpan,
    row: formats.ScaleRow,
    scale: TensorSpan,
    activations: tuple[TensorSpan, ...],
    spans: Mapping[str, TensorSpan],
    blocks: BlockSizes,
) -> QuantizedTensor | Fp8CheckpointError:
    """Pair codes of four bits. The dtype of the scales decides the group size, and whether there is a second level."""
    if scale.dtype not in formats.GROUPS:
        return ScaleDtypeError.of(weight, scale, formats.GROUPS)
    shape, group = formats.weight_shape(row, weight, F4), (formats.GROUPS[scale.dtype],)
    grid = tiled(shape, group)
    if grid is None or shape[-1] % 2:
        return HeaderError.of_halves(weight)
    if grid.shape != scale.shape or (row.groups and 2 * weight.shape[-1] != group[0]):
        return ScaleShapeError.of(weight, scale, group, grid.shape)
    key = formats.factor_key(weight.name, row)
    second = None if key is None else spans.get(key)
    stated = blocks.four_bits.of(formats.module_of(name))
    if stated is not None and stated[-1] != group[0]:
        return ScaleShapeError.of_group(weight, scale, stated[-1], group[0])
    if scale.dtype != formats.TWO_LEVELS:
        if second is not None:
            return UnsupportedFormatError.of_factor(weight, second.name)
        return QuantizedTensor(name, weight, scale, grid, activations, F4, across=row.across)
    if second is None:
        return MissingScaleError.of(weight, key or scale.name, None)
    if second.dtype != "F32":
        return ScaleDtypeError.of(weight, second, ("F32",))
    if second.numel != 1:
        return ScaleShapeError.of(weight, second, None, None)
    return QuantizedTensor(name, weight, scale, grid, activations, F4, SecondLevel(second, row.divides), row.across)


def _names_like_scales(spans: Mapping[str, TensorSpan]) -> dict[str, list[str]]:
    """Return the names that contain "scale", by module: the candidates for a misnamed scale."""
    names: dict[str, list[str]] = {}
    for name in sorted(spans):
        module, _, leaf = name.rpartition(".")
        if "scale" in leaf and not name.endswith(_ACTIVATION_ENDINGS):
            names.setdefault(module, []).append(name)
    return names


def _missing(weight: TensorSpan, near_scales: Mapping[str, list[str]]) -> MissingScaleError:
    module, _, leaf = weight.name.rpartition(".")
    names = near_scales.get(module, [])
    first = 0 if leaf == "weight" else bisect_left(names, weight.name)
    near = [name for name in names[first : first + 1] if leaf == "weight" or name.startswith(weight.name)]
    expected = weight.name + "_scale_inv"
    if formats.logical_name(weight.name) != weight.name:
        expected = formats.beside(formats.SCALES)(weight.name)[-1][1]
    return MissingScaleError.of(weight, expected, near[0] if near else None)

"""Which scale belongs to which weight: the one table of suffixes, and its rules.

Weights are found by dtype, in the headers; scales by name, beside the weight. A new family is a row in a table below.
What cannot be paired is a defect with a name: a missing, orphan or ambiguous scale, one that does not tile its weight,
or one of a foreign dtype. FP4 and other packed weights are recognised and refused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from fp8ckpt.errors import (
    AmbiguousScaleError,
    Fp8CheckpointError,
    MissingScaleError,
    OrphanScaleError,
    ScaleDtypeError,
    ScaleShapeError,
    UnsupportedFormatError,
    shown,
)
from fp8ckpt.numerics.codes import CODE_FORMATS, SCALE_DTYPES
from fp8ckpt.numerics.geometry import BlockGrid, infer_grid, tiled
from fp8ckpt.tensors.header import TensorSpan

# (ending of the weight's key, ending of its scale's key). An empty weight ending stands for any key: "X.weight" with
# "X.weight_scale_inv", and the fused experts' "X.gate_up_proj" with "X.gate_up_proj_scale_inv".
SCALE_SUFFIXES = (
    ("", "_scale_inv"),  # DeepSeek V3, Qwen3, Mistral3, MiniMax; fused experts of Mistral 4
    ("", "_scale"),  # compressed-tensors, ModelOpt, fbgemm_fp8 and its fused experts
    (".weight", ".qscale_weight"),  # Mistral native
    (".weight", ".scale"),  # DeepSeek V4
)
# A key of these endings is a scale or a mistake. Not so "_scale" and ".scale", which end the names of other tensors
# too.
_ONLY_SCALES = ("_scale_inv", ".weight_scale", ".qscale_weight")

# The same for the scales of activations: a conversion drops them, the way back carries them over.
ACTIVATION_SUFFIXES = (
    (".weight", ".activation_scale"),  # Mistral3 (static)
    (".weight", ".input_scale"),  # compressed-tensors, ModelOpt
    (".weight", ".qscale_act"),  # Mistral native
    ("", "_activation_scale"),  # fused experts
    ("", "_input_scale"),
)
_ONLY_ACTIVATION_SCALES = tuple(scale for _, scale in ACTIVATION_SUFFIXES)
# Scales of the key-value cache, which belong to no weight: ModelOpt and compressed-tensors, Mistral native.
_CACHE_SUFFIXES = (".k_scale", ".v_scale", "_fake_quantizer.qscale_act")

# Packed formats: dtypes, and endings of weights; then endings of what stands beside a packed weight.
_PACKED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")
_PACKED_WEIGHTS = (".weight_packed", ".qweight")  # compressed-tensors; GPTQ and AWQ
_PACKED_BLOCKS = ("_blocks", "_scales")  # gpt-oss MXFP4: a pair of keys
_INTEGERS = ("I8", "U8", "I32", "U32")
_INTEGER_SCALES = (*(scale for _, scale in SCALE_SUFFIXES), ".SCB")  # the last: bitsandbytes
_COMPANIONS = (
    ".weight_scale", ".weight_scale_inv", ".scale", ".weight_scale_2", ".weight_global_scale", ".weight_zero_point",
    ".weight_shape", ".input_scale", ".input_global_scale", ".SCB", ".scales", ".qzeros", ".g_idx",
    "_scale", "_scale_inv", "_scale_2", "_scales",
)  # fmt: skip
_BESIDE_FP8 = (
    ".weight_scale_2",
    ".weight_global_scale",
    ".weight_zero_point",
)  # a second factor, which we do not apply


class QuantizedTensor(NamedTuple):
    """One FP8 tensor of the logical checkpoint: codes, scales, and the grid by which the scales tile the codes."""

    name: str
    weight: TensorSpan
    scale: TensorSpan
    grid: BlockGrid
    activation_scales: tuple[TensorSpan, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.weight.numel


LogicalTensor = TensorSpan | QuantizedTensor


class Pairing(NamedTuple):
    """The logical tensors in the order given, the scales that belong to no one weight, and every defect."""

    tensors: dict[str, LogicalTensor]
    cache_scales: tuple[TensorSpan, ...]
    defects: list[Fp8CheckpointError]


def pair(spans: Mapping[str, TensorSpan], block_size: tuple[int, ...] | None, *, complete: bool = True) -> Pairing:
    """Pair every FP8 weight of a checkpoint with its scale.

    ``spans`` are all stored tensors by name; ``block_size`` is the configuration's. With ``complete`` false some files
    could not be read, and what is missing or left over is not held against the rest.
    """
    defects: list[Fp8CheckpointError] = []
    claimed: set[str] = set()
    for name, span in spans.items():
        if _is_packed(span, spans):
            stem = (
                name.removesuffix(".weight")
                .removesuffix(".weight_packed")
                .removesuffix(".qweight")
                .removesuffix("_blocks")
            )
            claimed.add(name)
            claimed.update(stem + ending for ending in _COMPANIONS)
            found = f"{span.dtype} {span.shape} is packed or integer (FP4, INT8, ...), which fp8ckpt does not read"
            remedy = "use the tool that wrote it"
            defects.append(
                UnsupportedFormatError(
                    found, tensor=name, file=span.file, expected="FP8, one byte an element", remedy=remedy
                )
            )

    weights = [span for name, span in spans.items() if span.dtype in CODE_FORMATS and name not in claimed]
    has_activation_scales = any(name.endswith(_ONLY_ACTIVATION_SCALES) for name in spans)
    paired: dict[str, LogicalTensor] = {}
    near_scales: dict[str, list[str]] | None = None
    for span in weights:
        name = span.name
        claimed.add(name)
        scales = [key for key in _keys(name, SCALE_SUFFIXES) if key in spans and spans[key].dtype not in CODE_FORMATS]
        activations = [key for key in _keys(name, ACTIVATION_SUFFIXES) if key in spans] if has_activation_scales else []
        claimed.update(scales, activations)
        second = next((key for ending in _BESIDE_FP8 if (key := name.removesuffix(".weight") + ending) in spans), None)
        if second is not None:
            found = f"{shown(second)} is a second factor or a zero point, which fp8ckpt does not apply"
            remedy = "use the tool that wrote it"
            defects.append(
                UnsupportedFormatError(found, tensor=name, file=span.file, expected="one scale", remedy=remedy)
            )
        elif len(scales) == 1:
            result = _checked(span, spans[scales[0]], tuple(spans[key] for key in activations), block_size)
            if isinstance(result, QuantizedTensor):
                paired[name] = result
            else:
                defects.append(result)
        elif scales:
            found = f"its scale could be any of {', '.join(shown(key) for key in scales)}"
            defects.append(
                AmbiguousScaleError(
                    found, tensor=name, file=span.file, expected="one scale", remedy="remove the others"
                )
            )
        elif complete:
            if near_scales is None:
                near_scales = _names_like_scales(spans)
            defects.append(_missing(span, near_scales))

    tensors: dict[str, LogicalTensor] = {}
    cache_scales: list[TensorSpan] = []
    for name, span in spans.items():
        if name in paired:
            tensors[name] = paired[name]
        elif name in claimed:
            continue
        elif weights and name.endswith(_CACHE_SUFFIXES) and span.numel == 1:
            cache_scales.append(span)
        elif name.endswith(_ONLY_SCALES) or (weights and name.endswith(_ONLY_ACTIVATION_SCALES)):
            if complete:
                defects.append(_orphan(span, spans))
        else:
            tensors[name] = span
    return Pairing(tensors, tuple(cache_scales), defects)


def _keys(weight: str, suffixes: tuple[tuple[str, str], ...]) -> list[str]:
    """The names that a weight's scale may have, by a table of suffixes."""
    return [weight[: len(weight) - len(end)] + scale for end, scale in suffixes if weight.endswith(end)]


def _is_packed(span: TensorSpan, spans: Mapping[str, TensorSpan]) -> bool:
    name = span.name
    if span.dtype in _PACKED_DTYPES or name.endswith(_PACKED_WEIGHTS):
        return True
    if span.dtype not in _INTEGERS or len(span.shape) < 2:
        return False
    blocks, scales = _PACKED_BLOCKS
    if name.endswith(blocks) and name.removesuffix(blocks) + scales in spans:
        return True
    # A matrix of integers with a scale of its own; but the scale of an FP8 weight may be one of bytes, and is no
    # weight.
    stem = name.removesuffix(".weight")
    return any(name + ending in spans or stem + ending in spans for ending in _INTEGER_SCALES)


_grid = lru_cache(maxsize=4096)(infer_grid)  # a model has many tensors of few shapes


def _checked(
    weight: TensorSpan, scale: TensorSpan, activations: tuple[TensorSpan, ...], block_size: tuple[int, ...] | None
) -> QuantizedTensor | Fp8CheckpointError:
    if scale.dtype not in SCALE_DTYPES:
        found = f"its scale {shown(scale.name)} in {shown(scale.file.name)} has dtype {scale.dtype}"
        expected = f"one of {', '.join(SCALE_DTYPES)}"
        return ScaleDtypeError(
            found, tensor=weight.name, file=weight.file, expected=expected, remedy="export the checkpoint again"
        )
    grid = _grid(weight.shape, scale.shape, block_size)
    if grid is not None:
        return QuantizedTensor(weight.name, weight, scale, grid, activations)
    found = f"scale shape {scale.shape} in {shown(scale.file.name)} does not fit weight {weight.shape}"
    fit = tiled(weight.shape, block_size) if block_size else None
    if fit is not None:
        found += f" with block size {block_size}"
        expected = str(fit.shape)
        remedy = "fetch the file again, or export the checkpoint again"
    else:
        expected = "one element, or one a row"
        remedy = "for scales of blocks, state weight_block_size in config.json"
    return ScaleShapeError(found, tensor=weight.name, file=weight.file, expected=expected, remedy=remedy)


def _names_like_scales(spans: Mapping[str, TensorSpan]) -> dict[str, list[str]]:
    """Names that speak of a scale, by the module that they stand in: what a misnamed scale is looked for among."""
    names: dict[str, list[str]] = {}
    for name in sorted(spans):
        module, _, leaf = name.rpartition(".")
        if "scale" in leaf and not name.endswith(_ONLY_ACTIVATION_SCALES):
            names.setdefault(module, []).append(name)
    return names


def _missing(weight: TensorSpan, near_scales: Mapping[str, list[str]]) -> Fp8CheckpointError:
    module, _, leaf = weight.name.rpartition(".")
    names = near_scales.get(module, [])
    first = 0 if leaf == "weight" else bisect_left(names, weight.name)
    near = [name for name in names[first : first + 1] if leaf == "weight" or name.startswith(weight.name)]
    found = f"{weight.dtype} weight without a scale" + (f" (is {shown(near[0])} its scale, misnamed?)" if near else "")
    remedy = "without it the codes are not values: fetch the checkpoint again, or give the scale its name"
    return MissingScaleError(
        found, tensor=weight.name, file=weight.file, expected=shown(weight.name + "_scale_inv"), remedy=remedy
    )


def _orphan(scale: TensorSpan, spans: Mapping[str, TensorSpan]) -> Fp8CheckpointError:
    endings = sorted((*SCALE_SUFFIXES, *ACTIVATION_SUFFIXES), key=lambda pair: -len(pair[1]))  # the longest says most
    weights = [scale.name.removesuffix(end) + weight for weight, end in endings if scale.name.endswith(end)]
    stored = next((spans[name] for name in weights if name in spans), None)
    found = (
        "a scale without a weight"
        if stored is None
        else f"the scale of a weight of dtype {stored.dtype}, which is not FP8"
    )
    expected = f"an FP8 tensor {shown(weights[0])}"
    return OrphanScaleError(
        found, tensor=scale.name, file=scale.file, expected=expected, remedy="remove the scale, or restore the weight"
    )

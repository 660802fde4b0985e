"""FP8 without a base: which tensors are quantized, by which grid, under which names, and how the configuration says so.

A scheme is a row. All are dynamic: activations are scaled as they come, and no activation scale is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fp8ckpt.encodings.recipes import Quantization, QuantizingPlan, source_tensors
from fp8ckpt.errors import UnsupportedFormatError
from fp8ckpt.families.siblings import equal_units
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.numerics.geometry import BlockGrid, Shape, tiled
from fp8ckpt.output.layout import TensorSpec, index_text, lay_out_again
from fp8ckpt.output.matching import refuse_dtype
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan, refuse_shared
from fp8ckpt.output.side_files import side_files
from fp8ckpt.serving.examine import serving_config
from fp8ckpt.tensors.checkpoint import INDEX, Checkpoint, is_native, open_checkpoint
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG, Json, dump_json, without_quantization
from fp8ckpt.tensors.header import TensorSpan
from fp8ckpt.tensors.pairing import LogicalTensor, QuantizedTensor

_BLOCK = (128, 128)


class Scheme(NamedTuple):
    """How weights are tiled, what their scales are called and shaped, and the ``quantization_config``."""

    grid: Callable[[Shape], BlockGrid]
    scale_ending: str
    scale_shape: Callable[[BlockGrid], Shape]
    config: Json


def _per_tensor(shape: Shape) -> BlockGrid:
    return BlockGrid(shape, (1,) * (len(shape) - 2) + shape[-2:])  # one a matrix: stacked experts have one each


def _blocks(shape: Shape) -> BlockGrid:
    grid = tiled(shape, _BLOCK)
    assert grid is not None  # weights have at least two dimensions
    return grid


def _channels(shape: Shape) -> BlockGrid:
    return BlockGrid(shape, (1,) * (len(shape) - 1) + shape[-1:])


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_TOKENS = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "float"}
_CHANNELS = {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}

SCHEMES = {
    "per-tensor": Scheme(
        _per_tensor,
        "_scale_inv",
        lambda grid: () if grid.per_tensor else grid.shape,
        {**_FP8, "weight_block_size": None},
    ),
    "block": Scheme(_blocks, "_scale_inv", lambda grid: grid.shape, {**_FP8, "weight_block_size": list(_BLOCK)}),
    "channel": Scheme(  # that of compressed-tensors: the one of this kind that engines serve
        _channels,
        "_scale",
        lambda grid: grid.shape,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _CHANNELS, "input_activations": _TOKENS}},
            "ignore": [],
        },
    ),
}

# What releases leave in BF16: parts of module names, and the names of whole modules.
_SKIPPED_PARTS = re.compile(
    r"embed|norm|conv|vision|visual|vit\b|image|audio|projector|merger|connector|mm_", re.IGNORECASE
)
_SKIPPED_MODULES = frozenset(
    {
        "lm_head",
        "output",
        "head",
        "score",
        "classifier",
        "gate",
        "router",
        "shared_expert_gate",
        "eh_proj",
        "weights_proj",
    }
)
_STACKED = re.compile(r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)$")


def is_quantized(span: TensorSpan) -> bool:
    """Whether a tensor is the weight of a Linear, or of stacked experts, of the language model's layers."""
    module = span.name.removesuffix(".weight")
    if span.dtype not in TARGET_BYTES or not span.numel or _SKIPPED_PARTS.search(module):
        return False
    if module == span.name:
        return len(span.shape) == 3 and _STACKED.search(span.name) is not None
    return len(span.shape) == 2 and module.rpartition(".")[2] not in _SKIPPED_MODULES


def plan_scheme(source: str | Path, scheme: str, output: PartialOutput, *, report: bool) -> QuantizingPlan:
    """Everything that can be known or refused before the first byte is written."""
    output.refuse_existing()
    given = open_checkpoint(source)
    refuse_shared(output, given, "source")
    tensors = source_tensors(given, {name: name for name in given.tensors})
    if all(is_native(header.file.name) for header in given.files):
        found = "Mistral's own layout, which states quantization in another way than a scheme does"
        raise UnsupportedFormatError(found, file=str(given.path), remedy="give the base that it came from: --like BASE")
    row = SCHEMES[scheme]
    grids = {name: row.grid(span.shape) for name, span in tensors.items() if is_quantized(span)}
    if not grids:
        found = "none of its tensors is the weight of a Linear that is quantized by a scheme"
        raise UnsupportedFormatError(found, file=str(given.path), remedy="give the base that it came from: --like BASE")
    layouts = []
    for header in given.files:
        specs = []
        for span in header.spans:
            if (grid := grids.get(span.name)) is None:
                specs.append(TensorSpec(span.name, span.dtype, span.shape))
            else:
                refuse_dtype(span)
                specs.append(TensorSpec(span.name, "F8_E4M3", span.shape))
                specs.append(TensorSpec(span.name + row.scale_ending, "F32", row.scale_shape(grid)))
        layouts.append(lay_out_again(header, specs))
    spans = {span.name: span for layout in layouts for span in layout.spans}
    weights = {
        name: Quantization(tensors[name], spans[name], spans[name + row.scale_ending], grid, None)
        for name, grid in grids.items()
    }
    planned: dict[str, LogicalTensor] = {
        name: QuantizedTensor(name, spans[name], weights[name].scale, grids[name], ()) if name in weights else span
        for name, span in tensors.items()
    }
    texts: dict[str, bytes] = {}
    copies = side_files(given)
    copies.pop(CONFIG, None)
    notes = []
    for name in (MODELOPT_CONFIG, MISTRAL_CONFIG):  # engines would believe them
        if copies.pop(name, None) is not None:
            notes.append(f"{name} speaks of other weights, and is not written")
    config = {**without_quantization(CONFIG, given.config, None), "quantization_config": row.config}
    written = Checkpoint(output.destination, (), planned, (), config, None, None, (), ())
    texts[CONFIG] = dump_json(serving_config(written, static=False))
    if given.index is not None or len(layouts) > 1:
        texts[given.index_name or INDEX] = index_text(layouts, given.index)
    return QuantizingPlan(
        output=OutputPlan(
            (given,), {"job": "quantize", "scheme": scheme, "report": report}, tuple(layouts), texts, copies
        ),
        source=given,
        base=None,
        weights=weights,
        plain={name: span for name, span in tensors.items() if name not in weights},
        units=tuple(
            # Engines join grids of blocks as they are; of whole tensors they need one scale.
            equal_units(
                {
                    name: b"" if scheme == "per-tensor" else name.encode()
                    for name, weight in weights.items()
                    if weight.wide
                }
            )
        ),
        fresh=True,
        report=report,
        notes=tuple(notes),
    )

"""FP8 without a base: which tensors are quantized, with which grid and names, and how the configuration says so.

A scheme is a row. All are dynamic: engines scale activations at run time, and no activation scale is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from fp8ckpt.encodings.asked import Asked
from fp8ckpt.encodings.recipes import Quantization, QuantizingPlan, source_tensors
from fp8ckpt.errors import UnsupportedFormatError, shown
from fp8ckpt.families.loaders import engines_that_rename_scales, misreads_stacks
from fp8ckpt.families.names import name_pattern
from fp8ckpt.families.parallel import equal_units, ragged, sibling_units
from fp8ckpt.families.roles import Roles
from fp8ckpt.families.tied import tied_heads
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.numerics.geometry import BlockGrid, Shape, tiled
from fp8ckpt.output.layout import FileLayout, TensorSpec, index_text, lay_out_again
from fp8ckpt.output.matching import refuse_dtype
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan
from fp8ckpt.output.side_files import notes_on_plain, side_files
from fp8ckpt.stores.memory import PLANNED
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG, Json, dump_json, without_quantization
from fp8ckpt.tensors.directory import INDEX, is_native
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.tensor import Tensor

_BLOCK = (128, 128)


class Scheme(NamedTuple):
    """A way to tile weights, the names and shapes of their scales, and the ``quantization_config``."""

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
_GROUPS = {**_TOKENS, "strategy": "group", "group_size": _BLOCK[1]}
_TILES = {**_CHANNELS, "strategy": "block", "block_structure": list(_BLOCK)}


def _compressed_tensors(weights: Json, activations: Json) -> Json:
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": [],
    }


SCHEMES = {
    "per-tensor": Scheme(
        _per_tensor, "_scale_inv", lambda g: () if g.per_tensor else g.shape, {**_FP8, "weight_block_size": None}
    ),
    "block": Scheme(_blocks, "_scale_inv", lambda grid: grid.shape, {**_FP8, "weight_block_size": list(_BLOCK)}),
    # In the names of compressed-tensors, the only format of this kind that engines serve.
    "channel": Scheme(_channels, "_scale", lambda grid: grid.shape, _compressed_tensors(_CHANNELS, _TOKENS)),
}
# Blocks in the names of compressed-tensors, for models whose loaders take "_scale_inv" for the scale of a tensor.
_BLOCKS_BY_OTHER_NAMES = Scheme(_blocks, "_scale", lambda grid: grid.shape, _compressed_tensors(_TILES, _GROUPS))


def scheme_for(scheme: str, config: Json) -> Scheme:
    """Return the row of a scheme, in the variant for a model of this configuration."""
    renamed = scheme == "block" and "vLLM 0.33" in engines_that_rename_scales(config)
    return _BLOCKS_BY_OTHER_NAMES if renamed else SCHEMES[scheme]


class Choice(NamedTuple):
    """The weights that a scheme quantizes, each with its grid, and the names of the others by the reason."""

    grids: dict[str, BlockGrid]
    left: dict[str, list[str]]


def choose(
    tensors: Mapping[str, Tensor], config: Json, scheme: str, *, only: str | None = None, skip: str | None = None
) -> Choice:
    """Choose the weights to quantize: those that releases do, if they match ``only`` and not ``skip`` (see `convert`).

    Weights that engines join are quantized together or not at all; in blocks, only if each consists of whole blocks.
    """
    roles = Roles({name: span.shape for name, span in tensors.items()}, config)
    wanted, unwanted = name_pattern("only", only), name_pattern("skip", skip)
    left: dict[str, list[str]] = {}
    chosen: dict[str, BlockGrid] = {}
    for name, span in tensors.items():
        if not roles.is_weight(name) or span.dtype not in TARGET_BYTES or not span.numel:
            continue
        reason = roles.left(name)
        if reason is None and wanted is not None and not wanted.search(name):
            reason = "not matched by --only"
        if reason is None and unwanted is not None and unwanted.search(name):
            reason = "matched by --skip"
        if reason is None:
            chosen[name] = SCHEMES[scheme].grid(span.shape)
        else:
            left.setdefault(reason, []).append(name)
    for reason, names in [*_apart(tensors, chosen, roles, scheme)]:
        left.setdefault(reason, []).extend(names)
        for name in names:
            del chosen[name]
    return Choice(chosen, left)


def _apart(
    tensors: Mapping[str, Tensor], chosen: Mapping[str, BlockGrid], roles: Roles, scheme: str
) -> Iterator[tuple[str, list[str]]]:
    """Yield the weights that cannot be joined as engines join them, in whole units, by reason."""
    cut_up: set[str] = set()
    if scheme == "block":
        shapes = {name: tensors[name].shape for name in chosen}
        cut_up = {part.name for part in ragged(shapes, dict.fromkeys(chosen, _BLOCK), 1, None)}
    weights = [name for name in tensors if roles.is_weight(name)]
    experts: dict[str, list[str]] = {}
    for name in weights:
        if (module := roles.experts_of(name)) is not None:
            experts.setdefault(module, []).append(name)
    one_layer = {name for unit in experts.values() for name in unit}
    joined = [unit for unit in sibling_units(weights) if not one_layer.issuperset(unit)]
    units = [*experts.values(), *joined, *([name] for name in cut_up if name not in one_layer.union(*joined))]
    ragged_units = [unit for unit in units if not cut_up.isdisjoint(unit)]
    torn_units = [unit for unit in units if unit not in ragged_units and not chosen.keys() >= {*unit}]
    for reason, found in (
        (f"joined by engines where they are not whole blocks of {_BLOCK[0]} rows", ragged_units),
        ("joined by engines with what is left", torn_units),
    ):
        if names := [name for unit in found for name in unit if name in chosen]:
            yield reason, names


def _left_notes(left: Mapping[str, list[str]]) -> Iterator[str]:
    for reason, names in left.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"left unquantized, {reason}: {shown(names[0])}{more}"


def plan_scheme(asked: Asked, output: PartialOutput, served: Callable[[Checkpoint], Json]) -> QuantizingPlan:
    """Plan the output, and refuse what can be refused, before the first byte is written.

    ``served`` makes the configuration with which engines serve the planned output.
    """
    assert asked.scheme is not None  # the caller checked it
    given = asked.opened_source(output)
    tensors = source_tensors(given, {name: name for name in given.tensors})
    if all(is_native(header.file.name) for header in given.files):
        raise UnsupportedFormatError.of_native(file=str(given.path))
    row = scheme_for(asked.scheme, given.config)
    grids, left = choose(tensors, given.config, asked.scheme, only=asked.only, skip=asked.skip)
    notes = [*_left_notes(left)]
    if not grids:
        raise UnsupportedFormatError.of_scheme(given.path, notes)
    layouts = tuple(_laid_out(given, tensors, grids, row))
    spans = {span.name: span for layout in layouts for span in layout.spans}
    weights = {
        name: Quantization(tensors[name], spans[name], spans[name + row.scale_ending], grid, None)
        for name, grid in grids.items()
    }
    texts = {CONFIG: dump_json(served(_planned(given, tensors, weights, row)))}
    if given.index is not None or len(layouts) > 1:
        texts[given.index_name or INDEX] = index_text(layouts, given.index)
    copies = side_files(given)
    dropped = [name for name in (CONFIG, MODELOPT_CONFIG, MISTRAL_CONFIG) if copies.pop(name, None) is not None]
    notes += (*notes_on_plain(given), *_notes(given, row, weights, dropped))
    # Engines join grids of blocks unchanged; tensors with one scale each must share it.
    wide = [name for name, weight in weights.items() if weight.wide]
    scales = {name: b"" if asked.scheme == "per-tensor" else name.encode() for name in wide}
    asking = {"scheme": asked.scheme, "report": asked.report, "only": asked.only, "skip": asked.skip}
    return QuantizingPlan(
        output=OutputPlan((given,), asked.arguments(job="quantize", **asking), layouts, texts, copies),
        source=given,
        base=None,
        weights=weights,
        plain={name: span for name, span in tensors.items() if name not in weights},
        units=tuple(equal_units(scales)),
        fresh=True,
        report=asked.report,
        see=asked.see,
        notes=tuple(notes),
    )


def _laid_out(
    given: Checkpoint, tensors: Mapping[str, Tensor], grids: Mapping[str, BlockGrid], row: Scheme
) -> Iterator[FileLayout]:
    """Lay out the files of the source, with the scales of each weight behind its codes."""
    for header in given.files:
        specs = []
        for span in (tensors[tensor.name] for tensor in given.tensors_in(header)):
            if (grid := grids.get(span.name)) is None:
                specs.append(TensorSpec(span.name, span.dtype, span.shape))
            else:
                refuse_dtype(span)
                specs.append(TensorSpec(span.name, "F8_E4M3", span.shape))
                specs.append(TensorSpec(span.name + row.scale_ending, "F32", row.scale_shape(grid)))
        yield lay_out_again(header, specs)


def _planned(
    given: Checkpoint, tensors: Mapping[str, Tensor], weights: Mapping[str, Quantization], row: Scheme
) -> Checkpoint:
    """Return the planned output as if it were written."""
    quantized = {
        name: QuantizedTensor(name, weight.weight, weight.scale, weight.grid, (), weight.weight.dtype)
        for name, weight in weights.items()
    }
    quantization = dict(row.config)
    if tied := tied_heads(given.config, tensors):  # Linears to an engine, which would look for scales
        quantization["ignore" if "ignore" in quantization else "modules_to_not_convert"] = tied
    config = {**without_quantization(CONFIG, given.config, None), "quantization_config": quantization}
    return Checkpoint(PLANNED, (), {**tensors, **quantized}, (), config, None, None, (), ())


def _notes(
    given: Checkpoint, row: Scheme, weights: Mapping[str, Quantization], dropped: Iterable[str]
) -> Iterator[str]:
    """Yield the notes on configurations that are ``dropped``, as engines would trust them, and on stacks of experts."""
    for name in dropped:
        if name != CONFIG:  # which is written anew
            yield f"{name} describes other weights, and is not written"
    stacks = [name for name, weight in weights.items() if len(weight.weight.shape) == 3]
    if stacks and (misread := misreads_stacks(given.config, row.config.get("quant_method"))) is not None:
        yield f"{len(stacks)} stacks of experts are quantized, {shown(stacks[0])} first: {misread}"

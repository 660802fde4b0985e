"""The block size of each module's weight, as the configuration states it: the one fact that headers lack.

There is one size for all modules (``weight_block_size``, or a ``quant_algo`` of ModelOpt that fixes it), or one for
each group of modules (`fp8ckpt.tensors.groups`). A module has the size of its group, or none if the group has no
blocks. Codes of four bits have groups that the dtype of their scales fixes: a stated size is only compared with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fp8ckpt.errors import ConfigError
from fp8ckpt.stores.store import Store
from fp8ckpt.tensors.config import (
    CONFIG,
    MODELOPT_CONFIG,
    Json,
    modelopt_quantization,
    quantization_config,
    quantization_configs,
)
from fp8ckpt.tensors.groups import LINEAR, ByModule, layers, weights_stated

Size = tuple[int, ...]

# Block sizes that a ModelOpt name fixes.
_ALGORITHMS = {"MXFP8": (1, 32), "FP8_PB_WO": (128, 128), "FP8_PB_REAL": (128, 128), "FP8_BLOCK_SCALES": (128, 128)}


@dataclass
class BlockSizes:
    """Stated block sizes. ``common``: of modules in no group; ``grouped``: of groups, None for a group without blocks;
    ``four_bits``: how many codes of four bits share a scale, where the configuration states that.
    """

    common: Size | None = None
    grouped: ByModule[Size | None] = field(default_factory=lambda: ByModule({}))
    four_bits: ByModule[Size | None] = field(default_factory=lambda: ByModule({}))

    @property
    def stated(self) -> bool:
        return self.common is not None or any(size is not None for size in self.grouped.values)

    def of(self, module: str) -> Size | None:
        return self.grouped.of(module) or self.common


def block_sizes(store: Store, config: Json) -> BlockSizes:
    """Return the sizes that the configuration states. Raise `ConfigError` for an invalid size, and if two are stated
    for the same modules.
    """
    quantization, modelopt = quantization_config(config), modelopt_quantization(store)
    grouped: ByModule[Size | None] = ByModule(quantization)
    stated: dict[str, Size | None] = {}
    for section in quantization_configs(config):
        _add(stated, LINEAR, section.get("weight_block_size"), CONFIG)
    for file, section in ((CONFIG, quantization), (MODELOPT_CONFIG, modelopt)):
        _add(stated, LINEAR, _of_layer(section), CONFIG)
        for module, layer in layers(section):
            _add(grouped.named, module, _of_layer(layer), file)
    for target, weights in weights_stated(quantization):
        _add(grouped.of_kind(target), target, _of_weights(weights), CONFIG)
    _add({**stated}, LINEAR, grouped.classes.get(LINEAR), CONFIG)  # both speak of all Linear modules
    common, sizes, four_bits = stated[LINEAR], {*grouped.values}, _of_four_bits(quantization, modelopt)
    if len(sizes) == 1 and common in (None, *sizes):  # the only size holds for all modules, named or not
        return BlockSizes(sizes.pop(), four_bits=four_bits)
    return BlockSizes(common, grouped, four_bits)


def _of_four_bits(quantization: Json, modelopt: Json) -> ByModule[Size | None]:
    sizes: ByModule[Size | None] = ByModule(quantization)
    for file, section in ((CONFIG, quantization), (MODELOPT_CONFIG, modelopt)):
        for target, stated in ((LINEAR, section), *layers(section), *weights_stated(section)):
            size = stated.get("group_size") if _has_four_bits(stated) else None
            _add(sizes.of_kind(target), target, [1, size] if size else None, file)
    return sizes


def _has_four_bits(stated: Json) -> bool:
    named = "FP4" in str(stated.get("quant_algo")) or "fp4" in str(stated.get("dtype"))
    return stated.get("num_bits") == 4 or named


def _add(sizes: dict[str, Size | None], target: str, stated: Any, file: str) -> None:
    size = _checked(stated, file)
    before = sizes.setdefault(target, size)
    if before is None:
        sizes[target] = size
    elif size not in (None, before):
        raise ConfigError.of_block_sizes(file, target, (before, size))


def _checked(stated: Any, file: str) -> Size | None:
    if stated is None:
        return None
    if not isinstance(stated, list | tuple) or not stated or not all(type(dim) is int and dim > 0 for dim in stated):
        raise ConfigError.of_block_size(file=file, stated=stated)
    return tuple(stated)


def _of_weights(weights: Json) -> Any:
    """Return the block size that a group of compressed-tensors, or a scheme of Quark, states."""
    size = weights.get("block_structure") or weights.get("block_size")
    if isinstance(size, str) and re.fullmatch(r"\d+(x\d+)+", size):  # "128x128", the older notation
        return [int(dim) for dim in size.split("x")]
    scheme = weights.get("strategy") or weights.get("qscheme") or "group"
    if size is None and scheme in ("group", "per_group") and weights.get("group_size"):
        return [1, weights["group_size"]]
    return size


def _of_layer(layer: Json) -> Any:
    """Return the block size that ModelOpt states for all modules, or for one of its ``quantized_layers``."""
    algorithm = layer.get("quant_algo")
    size = _ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None
    grouped = size is not None and size[0] == 1 and layer.get("group_size") is not None
    return (1, layer["group_size"]) if grouped else size

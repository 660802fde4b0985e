"""The block size of each module's weight, as the configuration states it: the one fact that headers do not hold.

One size for all (``weight_block_size``, or a ``quant_algo`` of ModelOpt that fixes it), or one for each group of
modules (``config_groups`` of compressed-tensors, ``quantized_layers`` of ModelOpt). A module's size is that of its own
group, none where that group has no blocks. Of several groups that speak of a module, one that names it goes before one
with a pattern, and that before one that names its class, as compressed-tensors and vLLM have it; of patterns, the first
that matches. What is listed in ``ignore`` belongs to no group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fp8ckpt.errors import ConfigError, shown
from fp8ckpt.stores.store import Store
from fp8ckpt.tensors.config import (
    CONFIG,
    MODELOPT_CONFIG,
    Json,
    ModuleList,
    ancestors,
    modelopt_quantization,
    quantization_config,
    skips,
)

Size = tuple[int, ...]

# Block sizes that a name of ModelOpt's fixes.
_ALGORITHMS = {"MXFP8": (1, 32), "FP8_PB_WO": (128, 128), "FP8_PB_REAL": (128, 128), "FP8_BLOCK_SCALES": (128, 128)}
_LINEAR = "Linear"  # the class that a group speaks of, where it does not say


@dataclass
class BlockSizes:
    """``common``: the size where no group speaks of a module. The others give the size of a group, or None: ``named``
    by a module's name, ``patterns`` and ``classes`` in the order of the groups.
    """

    common: Size | None = None
    named: dict[str, Size | None] = field(default_factory=dict)
    patterns: dict[str, Size | None] = field(default_factory=dict)
    classes: dict[str, Size | None] = field(default_factory=dict)
    ignored: ModuleList = field(default_factory=lambda: ModuleList(()))

    @property
    def stated(self) -> bool:
        """Whether any size is stated."""
        return self.common is not None or any(size is not None for size in self.of_groups)

    @property
    def of_groups(self) -> set[Size | None]:
        """The sizes of all groups."""
        return {*self.named.values(), *self.patterns.values(), *self.classes.values()}

    def of(self, module: str) -> Size | None:
        """The block size of a module's weight, or None."""
        grouped = (self.named or self.patterns or self.classes) and module not in self.ignored
        return (self._of_group(module) if grouped else None) or self.common

    def _of_group(self, module: str) -> Size | None:
        if module in self.named:
            return self.named[module]
        for pattern, size in self.patterns.items():
            if skips(pattern, module):
                return size
        for parent in ancestors(module):  # of fused experts, ModelOpt names the module that holds them
            if parent in self.named:
                return self.named[parent]
        return next((size for kind, size in self.classes.items() if _is_of_class(module, kind)), None)


def _is_of_class(module: str, kind: str) -> bool:
    """Whether a module may be of a class. The file does not say: all that is quantized is taken for a Linear, but for
    embeddings.
    """
    embeds = "embed" in module.rpartition(".")[2]
    return embeds if "embedding" in kind.lower() else not embeds


def block_sizes(store: Store, config: Json) -> BlockSizes:
    """What the configuration states. Raises `ConfigError` for a size that is none, and where two are stated for the
    same modules.
    """
    quantization, modelopt = quantization_config(config), modelopt_quantization(store)
    found = BlockSizes(ignored=ModuleList(_listed(quantization.get("ignore"))))
    common: dict[str, Size | None] = {}
    _add(common, _LINEAR, quantization.get("weight_block_size"), CONFIG)
    for file, section in ((CONFIG, quantization), (MODELOPT_CONFIG, modelopt)):
        _add(common, _LINEAR, _of_algorithm(section), CONFIG)
        for module, size in _layers(section.get("quantized_layers")):
            _add(found.named, module, size, file)
    for targets, size in _groups(quantization.get("config_groups")):
        for target in targets:
            patterned = target.startswith("re:") or "*" in target
            sizes = found.patterns if patterned else found.named if "." in target else found.classes
            _add(sizes, target, size, CONFIG)
    _add({**common}, _LINEAR, found.classes.get(_LINEAR), CONFIG)  # it speaks of as much
    found.common = common[_LINEAR]
    if len(found.of_groups) == 1 and found.common in (None, *found.of_groups):  # then it is that of all, named or not
        return BlockSizes(found.of_groups.pop())
    return found


def _add(sizes: dict[str, Size | None], target: str, stated: Any, file: str) -> None:
    size = _checked(stated, file)
    before = sizes.setdefault(target, size)
    if before is None:
        sizes[target] = size
    elif size not in (None, before):
        found = f"the configuration states several block sizes for {shown(target)}: {before} and {size}"
        raise ConfigError(found, file=file, expected="one", remedy="take the configuration of the release")


def _checked(stated: Any, file: str) -> Size | None:
    if stated is None:
        return None
    if not isinstance(stated, list | tuple) or not stated or not all(type(dim) is int and dim > 0 for dim in stated):
        expected = "positive whole numbers, such as [128, 128]"
        remedy = "take the configuration of the release"
        raise ConfigError(f"the block size is {shown(repr(stated))}", file=file, expected=expected, remedy=remedy)
    return tuple(stated)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _groups(groups: Any) -> Iterator[tuple[list[str], Any]]:
    """The (targets, block size) of each group of compressed-tensors."""
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            targets = [target for target in _listed(group.get("targets")) if isinstance(target, str)]
            size = weights.get("block_structure")
            if isinstance(size, str) and re.fullmatch(r"\d+(x\d+)+", size):  # "128x128", as it was first written
                size = [int(dim) for dim in size.split("x")]
            if size is None and weights.get("strategy", "group") == "group" and weights.get("group_size"):
                size = [1, weights["group_size"]]
            yield targets or [_LINEAR], size


def _layers(layers: Any) -> Iterator[tuple[str, Any]]:
    """The (module, block size) of each of ModelOpt's ``quantized_layers``."""
    for module, layer in layers.items() if isinstance(layers, dict) else ():
        if isinstance(layer, dict):
            size = _of_algorithm(layer)
            grouped = size is not None and size[0] == 1 and layer.get("group_size") is not None
            yield module, (1, layer["group_size"]) if grouped else size


def _of_algorithm(section: Json) -> Size | None:
    algorithm = section.get("quant_algo")
    return _ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None

"""What a configuration states for single modules: compressed-tensors by groups of targets, ModelOpt by layer names,
Quark by both.

If several statements match a module, its name takes precedence over a pattern, and a pattern over its class, as in
compressed-tensors and vLLM; the first matching pattern counts. A module listed in ``ignore`` belongs to no group.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import dropwhile
from typing import Generic, TypeVar

from fp8ckpt.tensors.config import Json, ModuleList, ancestors, skips

LINEAR = "Linear"  # the class that a group means if it names none

T = TypeVar("T")


class ByModule(Generic[T]):
    """Statements by target: names of modules, patterns, and classes, each in the order of the file."""

    def __init__(self, quantization: Json) -> None:
        self.named: dict[str, T] = {}
        self.classes: dict[str, T] = {}
        self._patterns: dict[str, T] = {}
        ignored = quantization.get("ignore")
        self._ignored = ModuleList(ignored if isinstance(ignored, list) else ())

    def of_kind(self, target: str) -> dict[str, T]:
        """Return the mapping for targets of the kind of ``target``: names, patterns or classes."""
        if target.startswith("re:") or "*" in target:
            return self._patterns
        return self.named if "." in target else self.classes

    @property
    def values(self) -> list[T]:
        return [*self.named.values(), *self._patterns.values(), *self.classes.values()]

    def of(self, module: str) -> T | None:
        if not (self.named or self._patterns or self.classes) or module in self._ignored:
            return None
        if module in self.named:
            return self.named[module]
        for pattern, value in self._patterns.items():
            if skips(pattern, module):
                return value
        for parent in ancestors(module):  # for fused experts, ModelOpt names the module that holds them
            if parent in self.named:
                return self.named[parent]
        if (layer := _in_its_model(module)) in self._by_layer:
            return self._by_layer[layer]
        return next((value for kind, value in self.classes.items() if _is_of_class(module, kind)), None)

    @cached_property
    def _by_layer(self) -> dict[str, T]:
        """The statements by name below the text model: a file may use other names than the configuration."""
        return {_in_its_model(module): value for module, value in self.named.items()}


def _in_its_model(module: str) -> str:
    """Return the name below the text model: "layers.0" of "model.layers.0" and of "language_model.model.layers.0"."""
    parts = module.split(".")
    return ".".join(dropwhile(lambda part: part in ("model", "language_model"), parts))


def _is_of_class(module: str, kind: str) -> bool:
    """Whether a module may be of a class. The file does not say: everything quantized counts as a Linear, except
    embeddings.
    """
    embeds = "embed" in module.rpartition(".")[2]
    return embeds if "embedding" in kind.lower() else not embeds


def groups(quantization: Json) -> Iterator[tuple[list[str], Json]]:
    """Yield (targets, group) for each group of compressed-tensors."""
    stated = quantization.get("config_groups")
    for group in stated.values() if isinstance(stated, dict) else ():
        if isinstance(group, dict):
            targets = group.get("targets")
            targets = [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []
            yield targets or [LINEAR], group


def one_by_one(quantization: Json) -> bool:
    """Whether modules have separate statements, so that they may differ."""
    return next(layers(quantization), None) is not None or len([*groups(quantization)]) > 1


def layers(quantization: Json) -> Iterator[tuple[str, Json]]:
    """Yield (module, layer) for each of ModelOpt's ``quantized_layers``."""
    stated = quantization.get("quantized_layers")
    for module, layer in stated.items() if isinstance(stated, dict) else ():
        if isinstance(layer, dict):
            yield module, layer


def weights_stated(quantization: Json) -> Iterator[tuple[str, Json]]:
    """Yield the (target, weights) of each group of compressed-tensors, and of each statement of Quark's: layers by name
    or pattern, classes, and the rest.
    """
    for targets, group in groups(quantization):
        yield from ((target, group["weights"]) for target in targets if isinstance(group.get("weights"), dict))
    classes = quantization.get("layer_type_quant_config")
    others = {LINEAR: quantization.get("global_quant_config"), **(classes if isinstance(classes, dict) else {})}
    for stated in (quantization.get("layer_quant_config"), others):
        for target, how in stated.items() if isinstance(stated, dict) else ():
            weights = how.get("weight") if isinstance(how, dict) else None
            for one in weights if isinstance(weights, list) else [weights]:  # a list holds several levels of scales
                if isinstance(one, dict):
                    yield target, one

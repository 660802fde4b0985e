"""What is examined: a checkpoint, and what its configuration states of quantization; the methods, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from fp8ckpt.errors import ConfigError, ServingError, shown
from fp8ckpt.families.names import KeyLayout, layout_on_disk
from fp8ckpt.numerics.codes import FP8_DTYPES
from fp8ckpt.tensors import config as configuration
from fp8ckpt.tensors.checkpoint import Checkpoint, is_native
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG, Json
from fp8ckpt.tensors.scaled import QuantizedTensor

Finding = ServingError | str  # a failure, or a note
SCHEMES = ("static", "dynamic")
_MISTRAL_STATIC = {"TENSOR": {True}, "NO_SCALES": {False}}  # qscheme_act in params.json
_NAMED = 3  # examples in a message


def _static_of_fp8(quantization: Json) -> set[bool]:
    scheme = quantization.get("activation_scheme")
    return {scheme == "static"} if scheme in SCHEMES else set()


def _static_of_groups(quantization: Json) -> set[bool]:
    groups = quantization.get("config_groups")
    stated = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    inputs = [group.get("input_activations") for group in stated]
    return {isinstance(activations, dict) and activations.get("dynamic") is False for activations in inputs}


def _static_of_quark(quantization: Json) -> set[bool]:
    stated = quantization.get("global_quant_config")
    inputs = stated.get("input_tensors") if isinstance(stated, dict) else None
    return {inputs.get("is_dynamic") is False} if isinstance(inputs, dict) else set()


def _static_of_modelopt(quantization: Json) -> set[bool]:
    layers = quantization.get("quantized_layers")
    stated = [layer for layer in layers.values() if isinstance(layer, dict)] if isinstance(layers, dict) else []
    dynamic = {layer.get("quant_algo") != "FP8" for layer in stated}  # FP8 has one scale an activation, others none
    return dynamic if len(dynamic) > 1 else set()


def _never_static(_: Json) -> set[bool]:
    return {False}


def _not_stated(_: Json) -> set[bool]:
    return set()


class Method(NamedTuple):
    """A ``quant_method`` that engines serve.

    ``lists``: the keys of its skip list; a new list is written under the first. ``static``: whether activation scales
    are to be stored, by what is stated: both where modules differ in it, neither where it is not stated.
    ``by_transformers``: its list is read by transformers as that of "fp8". ``both_forms``: it is a list of full names
    and of prefixes; any other is of names and patterns.
    """

    lists: tuple[str, ...]
    static: Callable[[Json], set[bool]]
    by_transformers: bool = False
    both_forms: bool = False


METHODS = {
    "fp8": Method(("modules_to_not_convert", "ignored_layers"), _static_of_fp8, True, True),
    "compressed-tensors": Method(("ignore",), _static_of_groups),
    "modelopt": Method(("exclude_modules", "ignore"), _static_of_modelopt),
    "fbgemm_fp8": Method(("modules_to_not_convert",), _never_static, True),
    "mxfp8": Method(("ignored_layers", "modules_to_not_convert"), _never_static, True),
    "quark": Method(("exclude",), _static_of_quark),
    "w8a8_fp8": Method((), _never_static),
    "ptpc_fp8": Method((), _never_static),
    "torchao": Method((), _not_stated),
    "auto-round": Method((), _not_stated),
    "quanto": Method((), _not_stated),
    "mistral": Method((), _not_stated),  # params.json, which has no quant_method
}
METHODS |= dict.fromkeys(("modelopt_fp8", "modelopt_mxfp8", "modelopt_mixed"), METHODS["modelopt"])
UNKNOWN = Method((), _not_stated)


class Stated(NamedTuple):
    """What is stated of quantization: in which file, by which method (None where that is not stated), and whether
    activation scales are to be stored, as `Method` has it.
    """

    file: str
    quantization: Json
    method: str | None
    static: set[bool]

    @property
    def row(self) -> Method:
        """The method; the one that the other statements are those of, where it is not stated."""
        return METHODS.get(self.method or guessed_method(self.quantization), UNKNOWN)


def guessed_method(quantization: Json) -> str:
    """The method that a configuration without ``quant_method`` speaks of."""
    if "config_groups" in quantization:
        return "compressed-tensors"
    return "modelopt" if "quant_algo" in quantization else "fp8"


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is examined, and what is stated of it. ``size``: the tensor-parallel size asked for."""

    checkpoint: Checkpoint
    size: int | None = None

    @cached_property
    def has_codes(self) -> bool:
        """Whether any tensor is FP8."""
        return any(span.dtype in FP8_DTYPES for header in self.checkpoint.files for span in header.spans)

    @cached_property
    def is_readable(self) -> bool:
        """Whether the configuration can be understood; all that rests on it would be named after it otherwise."""
        return not any(isinstance(defect, ConfigError) for defect in self.checkpoint.defects)

    @cached_property
    def is_native_only(self) -> bool:
        """Whether this is Mistral's own layout alone, which has no ``config.json`` and no index. What is only planned
        has no files.
        """
        files = self.checkpoint.files
        return bool(files) and all(is_native(header.file.name) for header in files) and not self.has_config

    @cached_property
    def has_config(self) -> bool:
        """Whether there is a ``config.json``."""
        return CONFIG in self.checkpoint.store.files()

    @cached_property
    def quantized(self) -> list[QuantizedTensor]:
        """The FP8 tensors."""
        return self.checkpoint.quantized

    @cached_property
    def layout(self) -> KeyLayout:
        """How the names on disk lead to the model's own, where they are Mistral's."""
        return layout_on_disk(self.checkpoint.tensors, self.checkpoint.config)

    def native(self, module: str) -> str:
        """The model's own name of a module on disk."""
        return self.layout.hf_to_native(f"{module}.").removesuffix(".")

    @cached_property
    def modelopt(self) -> Json:
        """The ``quantization`` of ModelOpt's own file; empty where there is none."""
        return configuration.modelopt_quantization(self.checkpoint.store)

    @cached_property
    def stated(self) -> Stated | None:
        """What is stated of quantization; None where nothing is."""
        if self.is_native_only:
            params = configuration.load_json(self.checkpoint.store, MISTRAL_CONFIG) or {}
            quantization = params.get("quantization")
            if not isinstance(quantization, dict):
                return None
            static = _MISTRAL_STATIC.get(str(quantization.get("qscheme_act")), set())
            return Stated(MISTRAL_CONFIG, quantization, "mistral", static)
        if quantization := configuration.quantization_config(self.checkpoint.config):
            method = quantization.get("quant_method")
            method = method if isinstance(method, str) else None
            stated = Stated(CONFIG, quantization, method, set())
            return stated._replace(static=stated.row.static(quantization))
        if self.modelopt:
            return Stated(MODELOPT_CONFIG, self.modelopt, "modelopt", set())
        return None

    @property
    def file(self) -> str:
        """The file that states quantization, or should."""
        return self.stated.file if self.stated else MISTRAL_CONFIG if self.is_native_only else CONFIG


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - _NAMED
    return ", ".join(shown(name) for name in names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def strings(value: Any) -> Sequence[str]:
    """The texts of a list; nothing where it is none."""
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []

"""What is examined: a checkpoint, and what its configuration states of quantization; the methods, as rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from fp8ckpt.errors import ConfigError, ServingError
from fp8ckpt.families.names import KeyLayout, layout_on_disk
from fp8ckpt.numerics.codes import FP8_DTYPES
from fp8ckpt.tensors import config as configuration
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG, Json
from fp8ckpt.tensors.directory import is_native
from fp8ckpt.tensors.groups import ByModule, groups, layers
from fp8ckpt.tensors.scaled import QuantizedTensor

Finding = ServingError | str  # a failure, or a note
SCHEMES = ("static", "dynamic")
_MISTRAL_STATIC = {"TENSOR": (True,), "NO_SCALES": (False,)}  # qscheme_act in params.json

#: Takes a module; {True} if it is stated to have an activation scale, {False} if to have none; both if statements
#: contradict each other, empty if nothing is stated.
Static = Callable[[str], frozenset[bool]]
_NOT_STATED = frozenset[bool]()


def _everywhere(*static: bool) -> Static:
    return lambda _: frozenset(static)


def _static_of_fp8(quantization: Json) -> Static:
    scheme = quantization.get("activation_scheme")
    return _everywhere(scheme == "static") if scheme in SCHEMES else _everywhere()


def _static_of_groups(quantization: Json) -> Static:
    stated: ByModule[frozenset[bool]] = ByModule(quantization)
    for targets, group in groups(quantization):
        inputs = group.get("input_activations")
        dynamic = inputs.get("dynamic") if isinstance(inputs, dict) else True
        static = _NOT_STATED if dynamic == "local" else frozenset((dynamic is False,))  # NVFP4 has a factor for all
        for target in targets:
            same = stated.of_kind(target)
            same[target] = same.get(target, _NOT_STATED) | static
    return lambda module: stated.of(module) or _NOT_STATED


def _static_of_quark(quantization: Json) -> Static:
    stated = quantization.get("global_quant_config")
    inputs = stated.get("input_tensors") if isinstance(stated, dict) else None
    return _everywhere(inputs.get("is_dynamic") is False) if isinstance(inputs, dict) else _everywhere()


def _static_of_modelopt(quantization: Json) -> Static:
    """Its "FP8" has an activation scale for each weight; its other 8-bit algorithms have none."""
    stated: ByModule[frozenset[bool]] = ByModule({})
    for module, layer in layers(quantization):
        stated.named[module] = _static_of_algorithm(layer.get("quant_algo"))
    common = _static_of_algorithm(quantization.get("quant_algo"))
    return lambda module: stated.of(module) or common


def _static_of_algorithm(name: object) -> frozenset[bool]:
    eight_bits = isinstance(name, str) and name.startswith(("FP8", "MXFP8"))
    return frozenset((name == "FP8",)) if eight_bits else _NOT_STATED


def _static_of_mistral(quantization: Json) -> Static:
    return _everywhere(*_MISTRAL_STATIC.get(str(quantization.get("qscheme_act")), ()))


def _not_stated(_: Json) -> Static:
    return _everywhere()


def _never_static(_: Json) -> Static:
    return _everywhere(False)


class Method(NamedTuple):
    """A ``quant_method`` that engines serve.

    ``lists``: the keys of its skip list; a new list is written under the first. ``static``: whether activation scales
    must be stored, by what is stated. ``by_transformers``: transformers reads its list like that of "fp8".
    ``both_forms``: the list has full names and prefixes; any other has names and patterns. ``heads``: the list must
    also name heads and routers, which transformers would quantize otherwise.
    """

    lists: tuple[str, ...]
    static: Callable[[Json], Static]
    by_transformers: bool = False
    both_forms: bool = False
    heads: bool = False


METHODS = {
    "fp8": Method(("modules_to_not_convert", "ignored_layers"), _static_of_fp8, True, True),
    "compressed-tensors": Method(("ignore",), _static_of_groups, heads=True),
    "modelopt": Method(("exclude_modules", "ignore"), _static_of_modelopt),
    "fbgemm_fp8": Method(("modules_to_not_convert",), _never_static, True),
    "mxfp4": Method((), _never_static),  # experts, and nothing else
    "mxfp8": Method(("ignored_layers", "modules_to_not_convert"), _never_static, True),
    "quark": Method(("exclude",), _static_of_quark),
    "w8a8_fp8": Method((), _never_static),
    "ptpc_fp8": Method((), _never_static),
    "torchao": Method((), _not_stated),
    "auto-round": Method((), _not_stated),
    "quanto": Method((), _not_stated),
    "mistral": Method((), _static_of_mistral),  # params.json, which has no quant_method
}
METHODS |= dict.fromkeys(("modelopt_fp8", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"), METHODS["modelopt"])
UNKNOWN = Method((), _not_stated)


class Stated(NamedTuple):
    """What is stated of quantization: in which ``file``, and by which ``method`` (None if none is stated)."""

    file: str
    quantization: Json
    method: str | None

    @property
    def row(self) -> Method:
        """The method's row; if none is stated, that of the method that the other statements belong to."""
        return METHODS.get(self.method or guessed_method(self.quantization), UNKNOWN)

    @property
    def static(self) -> Static:
        """Whether activation scales must be stored, by module."""
        return self.row.static(self.quantization)


def guessed_method(quantization: Json) -> str:
    """The method that a configuration without ``quant_method`` describes."""
    if "config_groups" in quantization:
        return "compressed-tensors"
    return "modelopt" if "quant_algo" in quantization else "fp8"


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is examined, and what is stated of it. ``size``: the requested tensor-parallel size."""

    checkpoint: Checkpoint
    size: int | None = None

    @cached_property
    def has_codes(self) -> bool:
        spans = (span for header in self.checkpoint.files for span in header.spans)
        return bool(self.quantized) or any(span.dtype in FP8_DTYPES for span in spans)

    @cached_property
    def is_readable(self) -> bool:
        """Whether the configuration can be understood; if not, checks that depend on it are not run."""
        return not any(isinstance(defect, ConfigError) for defect in self.checkpoint.defects)

    @cached_property
    def is_native_only(self) -> bool:
        """Whether this is Mistral's own layout alone, without ``config.json`` and index; a plan has no files."""
        files = self.checkpoint.files
        return bool(files) and all(is_native(header.file.name) for header in files) and not self.has_config

    @cached_property
    def has_config(self) -> bool:
        return CONFIG in self.checkpoint.store.files()

    @cached_property
    def quantized(self) -> list[QuantizedTensor]:
        return self.checkpoint.quantized

    @cached_property
    def layout(self) -> KeyLayout:
        """How names on disk map to the model's own, for Mistral's layout."""
        return layout_on_disk(self.checkpoint.tensors, self.checkpoint.config)

    def native(self, module: str) -> str:
        """The model's own name of a module on disk."""
        return self.layout.hf_to_native(f"{module}.").removesuffix(".")

    @cached_property
    def modelopt(self) -> Json:
        """The ``quantization`` of ModelOpt's own file; empty if there is none."""
        return configuration.modelopt_quantization(self.checkpoint.store)

    @cached_property
    def stated(self) -> Stated | None:
        """What is stated of quantization; None if nothing is."""
        if self.is_native_only:
            params = configuration.load_json(self.checkpoint.store, MISTRAL_CONFIG) or {}
            quantization = params.get("quantization")
            if not isinstance(quantization, dict):
                return None
            return Stated(MISTRAL_CONFIG, quantization, "mistral")
        if quantization := configuration.quantization_config(self.checkpoint.config):
            method = quantization.get("quant_method")
            method = method if isinstance(method, str) else None
            return Stated(CONFIG, quantization, method)
        if self.modelopt:
            return Stated(MODELOPT_CONFIG, self.modelopt, "modelopt")
        return None

    @property
    def file(self) -> str:
        """The file that states quantization, or should."""
        return self.stated.file if self.stated else MISTRAL_CONFIG if self.is_native_only else CONFIG


def strings(value: Any) -> Sequence[str]:
    """The strings of a list; empty if the value is not a list."""
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []

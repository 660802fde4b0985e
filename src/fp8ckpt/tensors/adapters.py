"""A PEFT directory as pairs of low-rank factors: the module and the scaling of each pair.

Headers and ``adapter_config.json`` are read, and no data. Settings that this module does not know are refused by name:
an adapter is merged as it was trained, or not at all.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fp8ckpt.errors import (
    CheckpointNotFoundError,
    ConfigError,
    HeaderError,
    ModelMismatchError,
    UnsupportedFormatError,
    WeightValueError,
)
from fp8ckpt.numerics.codes import F32, SCALE_DTYPES, TARGET_BYTES, scale_values
from fp8ckpt.stores.store import File, Store
from fp8ckpt.tensors.checkpoint import Checkpoint, raise_first, read_headers, spans_by_name, store_of
from fp8ckpt.tensors.config import Json, load_json
from fp8ckpt.tensors.directory import Findings
from fp8ckpt.tensors.reading import read_floats
from fp8ckpt.tensors.stored import TensorSpan

CONFIG = "adapter_config.json"
_WEIGHTS, _INDEX, _PICKLED = "adapter_model.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin"
_PART = re.compile(r"adapter_model-\d{5}-of-(\d{5})\.safetensors")
_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer"
# With bias="all", PEFT saves the biases of modules in modules_to_save twice: trained, and original.
_TRAINED, _BEFORE = ".modules_to_save", ".original_module."
_AT_ONCE = 1 << 20  # elements

#: Settings that change no weight, or are handled below.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_dora",
    "use_rslora",
}  # fmt: skip
#: Settings for which no merged weight is equivalent, or none is known here.
_REFUSED = {
    "alora_invocation_tokens": "aLoRA acts on some tokens only: no weights are equal to it",
    "arrow_config": "Arrow chooses an adapter for each token: no weights are equal to it",
    "lora_bias": "a bias was trained inside the adapter",
    "layer_replication": "the adapter is of a model with layers that the base does not have",
    "trainable_token_indices": "rows of an embedding were trained beside the adapter",
}
_OF_PEFT_ALONE = ("lora_bias", "trainable_token_indices")
#: Initializations that change the base before training: the factors include what was taken out of it.
_OF_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_FACTOR = re.compile(r"(.+?)((?:\.base_layer)*)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?")


class Pair(NamedTuple):
    """The factors of one module: ``a`` [rank, in] and ``b`` [out, rank], or those of experts, stacked.

    ``module``: its name in the trained model; ``depth``: the number of wrappers around it (PEFT wraps the parameters of
    one module one after the other). ``embedding``: the product is transposed. ``magnitude``: that of DoRA.
    """

    module: str
    depth: int
    a: TensorSpan
    b: TensorSpan
    embedding: bool = False
    magnitude: TensorSpan | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter with its ``weight``. ``checkpoint``: its files; ``tensors``: whole tensors that replace the base's, by
    their names in the model.
    """

    checkpoint: Checkpoint
    config: Json
    weight: float
    pairs: tuple[Pair, ...]
    tensors: Mapping[str, TensorSpan]

    def rank(self, key: str) -> int:
        """Return the rank for the PEFT key ``key``: a module, or a parameter of one."""
        return int(self._setting("rank_pattern", key, self.config.get("r", 8)))

    def scaling(self, key: str) -> float:
        """Return the factor on the product of ``key``, with ``weight`` included."""
        rank, alpha = self.rank(key), float(self._setting("alpha_pattern", key, self.config.get("lora_alpha", 8)))
        return self.weight * alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _setting(self, patterns: str, key: str, otherwise: float) -> float:
        stated: dict[str, float] = self.config.get(patterns) or {}
        return next((stated[pattern] for pattern in stated if re.match(rf"(.*\.)?({pattern})$", key)), otherwise)

    @property
    def fingerprint(self) -> str:
        """A hash of everything besides the factors that decides the output's bytes."""
        return hashlib.sha256(repr((sorted(self.config.items(), key=str), self.weight)).encode()).hexdigest()


def open_adapter(path: str | Path | Store, weight: float = 1.0) -> Adapter:
    """Open a PEFT directory, or a hub id in the local cache. Reads headers and the configuration only.

    Raises `UnsupportedFormatError` for what cannot be merged, by name; `ConfigError`, `HeaderError` and
    `ModelMismatchError` for files that are not an adapter.
    """
    if not abs(weight) <= float(np.finfo(np.float32).max):
        raise ValueError(f"weight={weight}; expected a finite number, in float32")
    store, single = store_of(path)
    if single is not None:
        raise CheckpointNotFoundError.of_file(file=str(path))
    config = load_json(store, CONFIG)
    if config is None:
        raise CheckpointNotFoundError.of_unconfigured(file=store.where, config=CONFIG)
    _check(config, File(store, CONFIG))
    found = Findings()
    headers = tuple(read_headers(store, _file_names(store), found))
    stored = spans_by_name(headers, None, found)
    raise_first(found.defects)
    for span in stored.values():
        if span.dtype not in TARGET_BYTES:
            raise UnsupportedFormatError.of_dtype(span.name, span.file, f"dtype {span.dtype}", TARGET_BYTES)
    checkpoint = Checkpoint(store, headers, stored, (), {}, None, None, (), ())
    pairs, tensors = _sorted_out(stored, dora=bool(config.get("use_dora")))
    if not pairs and not tensors:
        raise ModelMismatchError.of_empty_adapter(file=store.where)
    return Adapter(checkpoint, config, weight, tuple(pairs), tensors)


def refuse_nonfinite(adapter: Adapter) -> None:
    """Read all of an adapter once. Raise `WeightValueError` for NaN and infinite values."""
    for span in (span for header in adapter.checkpoint.files for span in header.spans):
        count = sum(int(np.count_nonzero(~np.isfinite(part))) for part in _floats(span))
        if count:
            raise WeightValueError.of_adapter(span, count=count, numel=span.numel)


def same_values(one: TensorSpan, other: TensorSpan) -> bool:
    """Whether two tensors have the same shape and the same values, in any floating-point dtypes."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= TARGET_BYTES.keys():
        return False
    pairs = zip(_floats(one), _floats(other), strict=True)
    return all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in pairs)


def _floats(span: TensorSpan) -> Iterator[F32]:
    """Yield all values of a floating-point tensor as float32, in parts."""
    itemsize = TARGET_BYTES[span.dtype]
    for start in range(0, span.numel, _AT_ONCE):
        raw = np.empty(min(_AT_ONCE, span.numel - start) * itemsize, np.uint8)
        span.read(raw, start * itemsize)
        stored: npt.NDArray[Any] = raw.view(SCALE_DTYPES[span.dtype])
        yield scale_values(stored, span.dtype)


def same_product(one: Pair, other: Pair) -> bool:
    """Whether two pairs add the same to one tensor. One may treat it as an embedding, and the other as a Linear."""
    turned = one.embedding != other.embedding
    pairs = ((one.a, other.b if turned else other.a), (one.b, other.a if turned else other.b))
    if one.magnitude is not None or other.magnitude is not None or any(a.numel != b.numel for a, b in pairs):
        return False
    return all(np.array_equal(read_floats(a), read_floats(b).T if turned else read_floats(b)) for a, b in pairs)


# ---------------------------------------------------------------- the configuration


def _check(config: Json, file: File) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise UnsupportedFormatError.of_kind(file=file, kind=kind)
    for key, why in _REFUSED.items():
        if config.get(key):
            raise UnsupportedFormatError.of_setting(file, key, why, mergeable=key in _OF_PEFT_ALONE)
    for key in sorted(config.keys() - _KNOWN - _REFUSED.keys()):
        if config[key]:
            raise UnsupportedFormatError.of_unknown_setting(file=file, key=key, stated=config[key])
    how = str(config.get("init_lora_weights", True)).lower()
    if how.startswith(_OF_ANOTHER_BASE):
        raise UnsupportedFormatError.of_start(file=file, how=how)
    _check_numbers(config, file)


def _check_numbers(config: Json, file: File) -> None:
    refuse = partial(ConfigError.of_adapter, file=file)

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        stated = config.get(patterns) or {}
        if not isinstance(stated, dict):
            raise refuse(key=patterns, stated=stated, expected="names or regular expressions, each with a number")
        for name, value in ((key, config.get(key, 8)), *((f"{patterns}[{name!r}]", stated[name]) for name in stated)):
            if not is_number(value) or (key == "r" and (value < 1 or value != int(value))):
                expected = "a rank of at least 1" if key == "r" else "a finite number"
                raise refuse(key=name, stated=value, expected=expected)
        for pattern in stated:
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, RecursionError, OverflowError) as error:
                what = f"{pattern}, no regular expression ({error})"
                raise refuse(key=patterns, stated=what, expected="names or regular expressions") from None
    if not isinstance(targets := config.get("target_parameters") or [], list) or not all(
        isinstance(target, str) for target in targets
    ):
        raise refuse(key="target_parameters", stated=targets, expected="a list of names")


# ---------------------------------------------------------------- the files


def _file_names(store: Store) -> list[str]:
    present = sorted(store.files())
    if (index := load_json(store, _INDEX)) is not None:
        weight_map = index.get("weight_map")
        named = {*weight_map.values()} if isinstance(weight_map, dict) else set()
        missing = sorted(str(name) for name in named if not isinstance(name, str) or name not in present)
        if not named or missing:
            raise HeaderError.of_index(File(store, _INDEX), missing[0] if missing else None)
        return sorted(named)
    if _WEIGHTS in present:
        return [_WEIGHTS]
    parts = [name for name in present if _PART.fullmatch(name)]
    if parts:
        count = int(_PART.fullmatch(parts[0])[1])  # type: ignore[index]  # it matched above
        if len(parts) != count:
            raise HeaderError.of_parts(file=store.where, there=len(parts), count=count)
        return parts
    raise CheckpointNotFoundError.of_lacking(store.where, _WEIGHTS, _PICKLED if _PICKLED in present else None)


# ---------------------------------------------------------------- the tensors


def _sorted_out(stored: Mapping[str, TensorSpan], *, dora: bool) -> tuple[list[Pair], dict[str, TensorSpan]]:
    """Return the pairs of factors, and the whole tensors."""
    found: dict[tuple[str, int], dict[str, TensorSpan]] = {}
    tensors: dict[str, TensorSpan] = {}
    for key, span in stored.items():
        name = key.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(name):
            module, wrappers, what = match.groups()
            found.setdefault((module, len(wrappers) // len(_BASE_LAYER)), {})[what] = span
        elif ".lora_" in name:
            raise UnsupportedFormatError.of_unknown(span)
        elif _BEFORE not in name:
            same = tensors.setdefault(name.replace(_BASE_LAYER, "").replace(_TRAINED, ""), span)
            if same is not span and not same_values(same, span):
                raise UnsupportedFormatError.of_unknown(span)
    return [_pair(module, depth, parts, dora=dora) for (module, depth), parts in found.items()], tensors


def _pair(module: str, depth: int, parts: dict[str, TensorSpan], *, dora: bool) -> Pair:
    kinds = ("A", "B") if not parts.keys() & {"embedding_A", "embedding_B"} else ("embedding_A", "embedding_B")
    a, b = (parts.get(kind) for kind in kinds)
    first = next(iter(parts.values()))
    if a is None or b is None:
        raise ModelMismatchError.of_lone_factor(first, module=module, lacks=kinds[0] if a is None else kinds[1])
    if extra := parts.keys() - {*kinds, "magnitude_vector"}:
        raise UnsupportedFormatError.of_unknown(parts[min(extra)])
    if dora != ("magnitude_vector" in parts):
        raise ModelMismatchError.of_magnitude(a, module, dora=dora)
    if len(a.shape) > 2:
        raise UnsupportedFormatError.of_convolution(a, b=b)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ModelMismatchError.of_unequal_ranks(a, b=b)
    return Pair(module, depth, a, b, kinds[0] != "A", parts.get("magnitude_vector"))

"""What a model's configuration files say about quantization, and the same files without it.

The configuration is asked for one fact only, the block sizes (`fp8ckpt.tensors.blocks`); everything else is in the
headers. Three files mention quantization: ``config.json`` (Hugging Face; at the top level and, for some multimodal
models, in ``text_config``), ``hf_quant_config.json`` (NVIDIA ModelOpt) and ``params.json`` (Mistral's own).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fp8ckpt.errors import ConfigError, StorageError
from fp8ckpt.stores.store import File, Store
from fp8ckpt.tensors.header import parse_json

CONFIG, MODELOPT_CONFIG, MISTRAL_CONFIG = "config.json", "hf_quant_config.json", "params.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second is the older name of the first
# Keys of a header's metadata about quantization: one of ComfyUI; for torchao one a tensor, and a list of these names.
_COMFY_METADATA, _TORCHAO_NAMES = "_quantization_metadata", "tensor_names"
_OF_EXPERTS = "expert_dtype"  # of DeepSeek V4; at the top level or inside the quantization config
_LONGEST_JSON = 256 << 20  # bytes; the index of a model of 92,000 tensors takes 9 MB
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_SKIPPED_BY_MODELOPT = "exclude_modules"
_SKIP_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", _SKIPPED_BY_MODELOPT, "exclude")

Json = dict[str, Any]


def load_json(store: Store, name: str) -> Json | None:
    """Return the JSON object in a file, or None if there is no such file."""
    file, stat = File(store, name), store.files().get(name)
    if stat is None:
        return None
    if stat.size > _LONGEST_JSON:
        raise ConfigError.of_long(file=file, most=_LONGEST_JSON)
    return parse_json(b"".join(piece.tobytes() for piece in file.pieces()), file, ConfigError)


def dump_json(value: Json, *, sort_keys: bool = False) -> bytes:
    """Return JSON as Hugging Face writes it: indented by two spaces, with a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n").encode()


def _sections(config: Json) -> list[Json]:
    nested = (value for key, value in config.items() if key.endswith("_config") and key not in QUANTIZATION_KEYS)
    return [config, *(value for value in nested if isinstance(value, dict))]


def quantization_configs(config: Json) -> list[Json]:
    """Return all quantization configs, at any level and under either key; the first is the one that counts. Raise
    `ConfigError` for one that is not an object.
    """
    return [
        _object(CONFIG, section[key]) for section in _sections(config) for key in QUANTIZATION_KEYS if section.get(key)
    ]


def quantization_config(config: Json) -> Json:
    """Return the ``quantization_config``, at any level and under either key; empty if there is none."""
    return next(iter(quantization_configs(config)), {})


def states_powers_of_two(config: Json) -> bool:
    """Whether scales must be powers of two whatever their dtype: ``scale_fmt`` "ue8m0" (DeepSeek V3.1).

    Engines take the exponents of such scales, and drop the mantissas.
    """
    formats = [found.get("scale_fmt") for found in quantization_configs(config)]
    return any(isinstance(found, str) and found.lower() == "ue8m0" for found in formats)


def states_quantization(store: Store, config: Json) -> bool:
    """Whether any configuration file mentions quantization, of weights or of the cache."""
    if quantization_config(config) or modelopt_quantization(store):
        return True
    return isinstance((load_json(store, MISTRAL_CONFIG) or {}).get("quantization"), dict)


def modelopt_quantization(store: Store) -> Json:
    """Return ``quantization`` of ModelOpt's own file, or an empty object. Raise `ConfigError` if it is no object."""
    return _object(MODELOPT_CONFIG, (load_json(store, MODELOPT_CONFIG) or {}).get("quantization") or {})


def _object(file: str, stated: object) -> Json:
    if not isinstance(stated, dict):
        raise ConfigError.of_quantization(file=file, stated=stated)
    return stated


def skip_patterns(store: Store, config: Json) -> tuple[str, ...]:
    """Return the modules that the configuration excludes: names, prefixes, wildcards, or ``re:`` patterns."""
    try:
        modelopt = modelopt_quantization(store)
    except (ConfigError, StorageError):  # a defect, which opening the checkpoint has listed
        modelopt = {}
    lists = [quantization_config(config).get(key) for key in _SKIP_LISTS] + [modelopt.get(_SKIPPED_BY_MODELOPT)]
    listed = [name for names in lists if isinstance(names, list) for name in names]
    return tuple(name for name in listed if isinstance(name, str))


def skips(pattern: str, module: str) -> bool:
    """Whether an entry of a skip list matches a module: by name, as an ancestor, as its last parts, or as a pattern."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    if "*" in pattern:
        return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), module) is not None
    return module == pattern or module.startswith(pattern + ".") or module.endswith("." + pattern)


def ancestors(module: str) -> Iterator[str]:
    """Yield the modules that contain a module, the nearest first."""
    while "." in module:
        module = module.rpartition(".")[0]
        yield module


class ModuleList:
    """A list of modules with fast look-up: a module is in it if an entry `skips` it."""

    def __init__(self, entries: Iterable[object]) -> None:
        texts = [entry for entry in entries if isinstance(entry, str)]
        self._patterns = [text for text in texts if text.startswith("re:") or "*" in text]
        self._names = frozenset(texts) - frozenset(self._patterns)

    def __contains__(self, module: str) -> bool:
        endings = (module[i + 1 :] for i, char in enumerate(module) if char == ".")
        named = any(name in self._names for name in (module, *ancestors(module), *endings))
        return named or any(skips(pattern, module) for pattern in self._patterns)


def without_quantization(name: str, config: Json, dtype: str | None) -> Json:
    """Return ``config.json`` or ``params.json`` without quantization. If ``dtype`` is given, dtype entries are set to
    it.
    """
    if name == MISTRAL_CONFIG:
        return {key: value for key, value in config.items() if key != "quantization"}
    result: Json = {}
    for key, value in config.items():
        if key in (*QUANTIZATION_KEYS, _OF_EXPERTS):
            continue
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            value = value if dtype is None else _DTYPE_NAMES[dtype]
        elif key.endswith("_config") and isinstance(value, dict):
            value = without_quantization(CONFIG, value, dtype)
        result[key] = value
    return result


def metadata_without_quantization(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the ``__metadata__`` of a header for weights that are not quantized."""
    try:
        names = json.loads(metadata.get(_TORCHAO_NAMES, "null"))
    except (ValueError, RecursionError):  # another use of that name
        names = None
    dropped = {_COMFY_METADATA, *QUANTIZATION_KEYS}
    if isinstance(names, list):
        dropped |= {_TORCHAO_NAMES, *(name for name in names if isinstance(name, str))} - {"format"}
    return {key: text for key, text in metadata.items() if key not in dropped}

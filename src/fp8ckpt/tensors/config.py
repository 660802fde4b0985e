"""What a model's configuration files say of quantization, and the same files without it.

The configuration is asked for one fact only, the block size; everything else is in the headers. Three files speak of
quantization: ``config.json`` (Hugging Face; at the top and, for some multimodal models, in ``text_config``),
``hf_quant_config.json`` (NVIDIA ModelOpt) and ``params.json`` (Mistral's own).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fp8ckpt.errors import ConfigError, StorageError
from fp8ckpt.tensors.header import parse_json

CONFIG, MODELOPT_CONFIG, MISTRAL_CONFIG = "config.json", "hf_quant_config.json", "params.json"
_LONGEST_JSON = 256 << 20  # bytes; the index of a model of 92,000 tensors takes 9 MB
_MODELOPT_BLOCKS = {"MXFP8": (1, 32), "FP8_PB_WO": (128, 128)}  # fixed by those formats
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

Json = dict[str, Any]


def load_json(file: Path, kind: type[ConfigError] = ConfigError) -> Json | None:
    """The JSON object in ``file``, or None where there is no such file."""
    try:
        with file.open("rb") as stream:
            text = stream.read(_LONGEST_JSON + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", file=file, remedy="restore the file") from error
    if len(text) > _LONGEST_JSON:
        raise kind("the file is longer than any configuration", file=file, expected=f"at most {_LONGEST_JSON} bytes")
    return parse_json(text, file, kind)


def dump_json(value: Json, *, sort_keys: bool = False) -> bytes:
    """JSON as Hugging Face writes it: two spaces, a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n").encode()


def _sections(config: Json) -> list[Json]:
    return [
        config,
        *(
            value
            for key, value in config.items()
            if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict)
        ),
    ]


def quantization_config(config: Json) -> Json:
    """The ``quantization_config``, wherever it stands; empty where there is none."""
    for section in _sections(config):
        found = section.get("quantization_config")
        if isinstance(found, dict):
            return found
    return {}


def states_powers_of_two(config: Json) -> bool:
    """Whether scales are to be powers of two in whatever dtype holds them: ``scale_fmt`` "ue8m0" (DeepSeek V3.1).

    Engines take such scales' exponents, and drop the rest.
    """
    stated = [section.get("quantization_config") for section in _sections(config)]
    formats = [found.get("scale_fmt") for found in stated if isinstance(found, dict)]
    return any(isinstance(found, str) and found.lower() == "ue8m0" for found in formats)


def block_size(directory: Path, config: Json) -> tuple[int, ...] | None:
    """The block size that the configuration states for the last dimensions of a weight, or None.

    Read from ``weight_block_size``; from the weights' ``block_structure`` or ``group_size`` in the ``config_groups`` of
    compressed-tensors; or fixed by ModelOpt's ``quant_algo``.
    """
    quantization = quantization_config(config)
    modelopt = (load_json(directory / MODELOPT_CONFIG) or {}).get("quantization")
    stated: list[Any] = [quantization.get("weight_block_size")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            stated.append(weights.get("block_structure"))
            if weights.get("strategy", "group") == "group" and weights.get("group_size"):
                stated.append([1, weights["group_size"]])
    for section in (quantization, modelopt):
        if isinstance(section, dict) and isinstance(section.get("quant_algo"), str):
            stated.append(_MODELOPT_BLOCKS.get(section["quant_algo"]))
    sizes = [tuple(size) if isinstance(size, list | tuple) else size for size in stated if size is not None]
    if not sizes:
        return None
    size = sizes[0]
    others = [other for other in sizes if other != size]
    if others:
        raise ConfigError(
            f"the configuration states several block sizes: {size} and {others[0]}",
            file=directory / CONFIG,
            expected="one for all weights",
        )
    if not isinstance(size, tuple) or not size or not all(type(dim) is int and dim > 0 for dim in size):
        raise ConfigError(
            f"the block size is {size!r}",
            file=directory / CONFIG,
            expected="positive whole numbers, such as [128, 128]",
        )
    return size


def skip_patterns(directory: Path, config: Json) -> tuple[str, ...]:
    """The modules that the configuration lists as not quantized: names, prefixes, wildcards, or ``re:`` patterns."""
    quantization = quantization_config(config)
    try:
        modelopt = (load_json(directory / MODELOPT_CONFIG) or {}).get("quantization")
    except ConfigError:  # a defect, which opening the checkpoint has listed
        modelopt = None
    listed: list[Any] = []
    for section, keys in (
        (quantization, ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")),
        (modelopt, ("exclude_modules",)),
    ):
        for key in keys:
            value = section.get(key) if isinstance(section, dict) else None
            listed += value if isinstance(value, list) else []
    return tuple(name for name in listed if isinstance(name, str))


def skips(pattern: str, module: str) -> bool:
    """Whether an entry of a skip list speaks of a module: by name, as its ancestor, as its leaf, or as a pattern."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    if "*" in pattern:
        return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), module) is not None
    return module == pattern or module.startswith(pattern + ".") or module.endswith("." + pattern)


def without_quantization(name: str, config: Json, dtype: str | None) -> Json:
    """``config.json`` or ``params.json`` for weights of ``dtype``: no quantization, and the dtype it names, if ours is
    one, set to it.
    """
    if name == MISTRAL_CONFIG:
        return {key: value for key, value in config.items() if key != "quantization"}
    result: Json = {}
    for key, value in config.items():
        if key == "quantization_config":
            continue
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            value = value if dtype is None else _DTYPE_NAMES[dtype]
        elif key.endswith("_config") and isinstance(value, dict):
            value = without_quantization(CONFIG, value, dtype)
        result[key] = value
    return result

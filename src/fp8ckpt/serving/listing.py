"""The skip list, compared with what is FP8 and what is not; and the ``config.json`` that lacks nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from fp8ckpt.errors import ServingError
from fp8ckpt.families.roles import is_built_plain
from fp8ckpt.output.like import has_activation_scales
from fp8ckpt.serving.skip_list import (
    Missing,
    SkipList,
    missing_in_both_forms,
    missing_in_patterns,
    unquantized_linears,
    unquantized_parts,
)
from fp8ckpt.serving.subject import METHODS, UNKNOWN, Finding, Method, Subject, guessed_method, strings
from fp8ckpt.tensors import config as configuration
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.formats import module_of
from fp8ckpt.tensors.scaled import QuantizedTensor

_NOTHING = ""  # an entry that names no module


def complete(subject: Subject) -> Iterator[Finding]:
    """Each unquantized Linear must be listed, in the form that each engine reads."""
    stated = subject.stated
    if stated is None or not stated.row.lists:
        return
    for key, entries in _lists(stated.quantization, stated.row.lists).items():
        missing = _missing(subject, stated.row, entries)
        by_name = ServingError.of_unlisted_names if stated.row.both_forms else ServingError.of_unlisted
        for unlisted, names in ((by_name, missing.names), (ServingError.of_unlisted_parts, missing.prefixes)):
            if names:
                yield unlisted(names[0], file=stated.file, key=key, names=names)


def true(subject: Subject) -> Iterator[Finding]:
    """No FP8 weight may be listed, however an engine reads the entries."""
    stated = subject.stated
    if stated is None or not stated.row.lists:
        return
    modules = [module_of(tensor.name) for tensor in subject.quantized]
    for key, entries in _lists(stated.quantization, stated.row.lists).items():
        skip_list = SkipList.of(entries)
        listed = [m for m in modules if skip_list.reaches(m) or skip_list.reaches(subject.native(m))]
        if listed:
            yield ServingError.of_listed(listed[0], file=stated.file, key=key, names=listed)
        if not stated.row.by_transformers:
            continue
        known = set(listed)
        others = [module for module in modules if module not in known]
        for version, part, like in (("5.18", "beginning", skip_list.begins), ("5.23", "end", skip_list.ends)):
            taken = [(m, entry) for m in others if (entry := like(m) or like(subject.native(m)))]
            if taken:
                names, entry = [name for name, _ in taken], taken[0][1]
                yield ServingError.of_misread_list(
                    names[0], file=stated.file, version=version, entry=entry, key=key, part=part, names=names
                )


def _lists(quantization: dict[str, Any], keys: Sequence[str]) -> dict[str, list[str]]:
    """The stated skip lists, by key: an engine reads one of them. An empty one if none is stated."""
    stated = {key: value for key in keys if isinstance(value := quantization.get(key), list) and value}
    return {key: [*strings(value)] for key, value in stated.items()} or {keys[0]: []}


def _missing(subject: Subject, row: Method, entries: Sequence[str]) -> Missing:
    checkpoint = subject.checkpoint
    linears = unquantized_linears(checkpoint.tensors)
    if row.both_forms:
        quantized = (module_of(tensor.name) for tensor in subject.quantized)
        return missing_in_both_forms(entries, linears, unquantized_parts(linears, quantized), subject.native)
    # ModelOpt may also state its list in a file of its own.
    listed = [*configuration.skip_patterns(checkpoint.store, checkpoint.config), *entries]
    return missing_in_patterns(listed, linears, heads=row.heads)


def served_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """`serving_config` for a checkpoint that has all of its activation scales, or is served without any."""
    return serving_config(checkpoint, static=bool(checkpoint.quantized) and has_activation_scales(checkpoint))


def serving_config(checkpoint: Checkpoint, *, static: bool) -> dict[str, Any]:
    """Return the checkpoint's ``config.json`` with what engines need added; equal to the existing one if nothing is
    missing.

    ``static``: every FP8 tensor has its activation scale. Added are ``quant_method``, ``activation_scheme``, and the
    missing entries of the skip list, after the existing ones. An FP8 checkpoint that states no quantization gets a
    ``quantization_config``.
    """
    subject = Subject(checkpoint)
    config = copy.deepcopy(checkpoint.config)
    if not subject.quantized or subject.is_native_only:
        return config
    quantization = configuration.quantization_config(config)
    if not quantization:
        if subject.modelopt:
            return config
        quantization = config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": None}
        quantization["weight_block_size"] = _common_block(subject.quantized)
    if quantization.get("quant_method") is None:
        quantization["quant_method"] = guessed_method(quantization)
    method = quantization["quant_method"]
    row = METHODS.get(method, UNKNOWN) if isinstance(method, str) else UNKNOWN  # it may be of any type
    if not row.lists:
        return config
    if method == "fp8":
        quantization["activation_scheme"] = "static" if static else "dynamic"
    codes = [module_of(tensor.name) for tensor in subject.quantized]
    for key, entries in _lists(quantization, row.lists).items():
        missing = _missing(subject, row, entries)
        if missing.names or missing.prefixes:
            if not entries:  # a new list also names what engines leave alone by themselves
                missing = _missing(subject, row, [_NOTHING])
            present = value if isinstance(value := quantization.get(key), list) else []
            names = [_exact(name, codes) if row.by_transformers else name for name in missing.names]
            added = [*(subject.native(prefix) for prefix in missing.prefixes), *names]
            quantization[key] = [*present, *dict.fromkeys(added)]
    return config


def _exact(module: str, codes: Sequence[str]) -> str:
    """The entry for a module: its name, with ``$`` for transformers 5.18 if the name of an FP8 tensor begins with it.
    Modules with such names are left unquantized by the other engines anyway.
    """
    if is_built_plain(module) and any(name.startswith(module) for name in codes):
        return f"{module}$"
    return module


def _common_block(quantized: Sequence[QuantizedTensor]) -> list[int] | None:
    """The one block size of all tensors with several blocks in a matrix; None if there is none, or several."""
    blocks = {tensor.grid.block_size[-2:] for tensor in quantized if any(count > 1 for count in tensor.grid.shape[-2:])}
    block = blocks.pop() if len(blocks) == 1 else ()
    return list(block) if len(block) == 2 else None

"""Which files of a directory belong to the model, with an index or without one. Contradictions are defects.

This module looks at no tensors, except to see whether a file holds any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import NamedTuple

from fp8ckpt.errors import (
    CheckpointNotFoundError,
    ConfigError,
    Fp8CheckpointError,
    IndexMismatchError,
    StorageError,
    listed,
)
from fp8ckpt.stores.store import File, Store
from fp8ckpt.tensors import config as configuration
from fp8ckpt.tensors.header import read_header
from fp8ckpt.tensors.stored import TensorSpan

INDEX = "model.safetensors.index.json"
NATIVE_INDEX = "consolidated.safetensors.index.json"
# Files that trainers and PEFT leave beside a model's own, and that no loader takes for a part of it.
_FOREIGN = ("adapter_*.safetensors", "optimizer*.safetensors", "training_*.safetensors")
# Endings of weights in other kinds of files, and the files of trainers with such endings that are not weights.
_OTHER_KINDS = (".bin", ".pth", ".pt", ".gguf", ".onnx", ".onnx_data", ".ckpt", ".h5", ".msgpack", ".nemo")
_OF_TRAINERS = ("training_args.bin", "optimizer.", "scheduler.", "scaler.", "random_states_", "rng_state")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass
class Findings:
    """What is found in opening a checkpoint: ``defects``; ``slips``, which harm no reader; ``notes`` for the user."""

    defects: list[Fp8CheckpointError] = field(default_factory=list)
    slips: list[Fp8CheckpointError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Index(NamedTuple):
    """The index file. ``content`` is empty if it is a defect."""

    name: str
    content: configuration.Json

    @property
    def weight_map(self) -> Mapping[str, str]:
        return self.content.get("weight_map") or {}

    @property
    def files(self) -> set[str]:
        """The names of files in it."""
        return {*self.weight_map.values()}


def read_index(store: Store, on_disk: list[str], found: Findings) -> Index | None:
    """Return the index, or None without one."""
    for name in (INDEX, NATIVE_INDEX):
        if name == NATIVE_INDEX and any(not is_native(file) for file in model_files(on_disk)):
            continue
        try:
            index = configuration.load_json(store, name)
        except (StorageError, ConfigError) as error:
            found.defects.append(error if isinstance(error, StorageError) else IndexMismatchError.of_json(name, error))
            return Index(name, {})
        if index is None:
            continue
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not {*map(type, weight_map.values())} <= {str}:
            found.defects.append(IndexMismatchError.of_kind(file=name))
            return Index(name, {})
        return Index(name, index)
    return None


def is_native(name: str) -> bool:
    """Whether a file belongs to Mistral's own copy of the weights, which may stand beside the Hugging Face copy."""
    return name.startswith("consolidated") and name.endswith(".safetensors")


def is_foreign(name: str) -> bool:
    """Whether a file is one that trainers and PEFT leave beside a model's own."""
    return any(fnmatch(name, pattern) for pattern in _FOREIGN)


def is_of_another_kind(name: str) -> bool:
    """Whether a file, at the top or in a folder, may hold weights and is no safetensors file."""
    return name.endswith(_OTHER_KINDS) and not name.rpartition("/")[2].startswith(_OF_TRAINERS)


def note_on_other_weights(store: Store) -> list[str]:
    """Return notes on weights that are not part of the checkpoint: in folders, or in other kinds of files."""
    nested = (name for name in store.files() if "/" in name and name.endswith(".safetensors"))
    found = sorted({*nested, *filter(is_of_another_kind, store.files())})
    if not found:
        return []
    count = f"{len(found)} other file{'s' if len(found) > 1 else ''}"
    copied = "are copied unchanged with the side files, quantized or not"
    return [f"weights in {count} are not part of the checkpoint, and {copied}: {listed(found)}"]


def safetensors_in(store: Store) -> list[str]:
    """Return the safetensors files at the top level. Lists the whole store, and raises here if it cannot be listed."""
    at_the_top = {name.partition("/")[0] for name in store.files()}  # such a folder is refused when read
    return sorted(name for name in at_the_top if name.endswith(".safetensors"))


def model_files(on_disk: list[str]) -> list[str]:
    """Return the safetensors files that may belong to the model. An adapter counts if there is nothing else, and so
    does Mistral's own copy.
    """
    own = [name for name in on_disk if not is_foreign(name)] or on_disk
    return [name for name in own if not is_native(name)] or own


def holds_tensors(file: File) -> bool:
    """Whether a file holds a tensor, or may hold one because its header has defects."""
    header, defects = read_header(file)
    return bool(defects) or (header is not None and bool(header.spans))


def file_names(store: Store, on_disk: list[str], index: Index | None, found: Findings) -> list[str]:
    """Return the files of the model. Raise `CheckpointNotFoundError` if there are none. Missing files that the index or
    the numbering of parts names are defects.
    """
    if index is None or not index.content:
        on_disk = model_files(on_disk)
        if not on_disk:
            raise CheckpointNotFoundError.of_lacking(store.where, "safetensors file")
        if index is None:
            _find_missing_parts(on_disk, found)
        return on_disk
    named: list[str] = []
    for name in sorted(index.files):
        if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            found.defects.append(IndexMismatchError.of_path(file=index.name, name=name))
        elif not _is_there(store, name):
            tensor = next(tensor for tensor, file in index.weight_map.items() if file == name)
            found.defects.append(IndexMismatchError.of_absent(tensor, file=index.name, name=name, where=store.where))
        else:
            named.append(name)
    return named


def _is_there(store: Store, name: str) -> bool:
    try:
        return name in store.files()
    except StorageError:  # it is there; reading it will raise the error
        return True


def refuse_part(store: Store, name: str) -> None:
    """Raise if the file is one of several, which lack each other's tensors, or if it is a configuration or an index."""
    if name.endswith(".json"):
        raise CheckpointNotFoundError.of_part(name, store.where)
    index = read_index(store, [name], Findings())
    files = set() if index is None else index.files
    match = _PART.fullmatch(name)
    count = len(files) if name in files else int(match.group(3)) if match else 1
    if count > 1:
        raise CheckpointNotFoundError.of_part(name, store.where, count)


def _find_missing_parts(on_disk: list[str], found: Findings) -> None:
    """Add a defect for each missing part. Without an index, ``model-00001-of-00003.safetensors`` gives their number."""
    for name in on_disk:
        if match := _PART.fullmatch(name):
            stem, _, count = match.groups()
            for part in range(1, min(int(count), 10_000) + 1):
                expected = f"{stem}-{part:05d}-of-{count}.safetensors"
                if expected not in on_disk:
                    found.defects.append(IndexMismatchError.of_part(file=name, part=expected, count=int(count)))
            return


def compare_index(index: Index, spans: Mapping[str, TensorSpan], complete: bool, found: Findings) -> None:
    """Add a defect for each tensor that the index places wrongly. A wrong total size is a slip: it harms no reader."""
    weight_map = index.weight_map
    stored = {name: span.file.name for name, span in spans.items()}
    if stored != weight_map:
        for name in sorted(weight_map.keys() | stored.keys()):
            listed, actual = weight_map.get(name), stored.get(name)
            if listed == actual or (actual is None and not complete):
                continue
            found.defects.append(IndexMismatchError.of_place(name, index.name, listed, actual))
    metadata = index.content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual_total = sum(span.stop - span.start for span in spans.values())
    if complete and total is not None and total != actual_total:
        found.slips.append(IndexMismatchError.of_size(file=index.name, stated=total, actual=actual_total))

"""Which files of a directory hold the model: as the index says, or without one. What does not fit is a defect.

No tensor is looked at here, but for whether a file holds any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

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
# What trainers and PEFT leave beside a model's own files, and no loader takes for a part of it.
_FOREIGN = ("adapter_*.safetensors", "optimizer*.safetensors", "training_*.safetensors")
# Weights in files of other kinds; and what trainers leave in such files that is none.
_OTHER_KINDS = (".bin", ".pth", ".pt", ".gguf", ".onnx", ".onnx_data", ".ckpt", ".h5", ".msgpack", ".nemo")
_OF_TRAINERS = ("training_args.bin", "optimizer.", "scheduler.", "scaler.", "random_states_", "rng_state")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def read_index(
    store: Store, on_disk: list[str], defects: list[Fp8CheckpointError]
) -> tuple[str | None, dict[str, Any] | None]:
    """The name of the index, None where there is none, and what it says, None where that is a defect."""
    for name in (INDEX, NATIVE_INDEX):
        if name == NATIVE_INDEX and any(not is_native(file) for file in model_files(on_disk)):
            continue
        try:
            index = configuration.load_json(store, name)
        except StorageError as error:
            defects.append(error)
            return name, None
        except ConfigError as error:
            defects.append(IndexMismatchError.of_json(name, error))
            return name, None
        if index is None:
            continue
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not {*map(type, weight_map.values())} <= {str}:
            defects.append(IndexMismatchError.of_kind(name))
            return name, None
        return name, index
    return None, None


def is_native(name: str) -> bool:
    """Whether a file belongs to Mistral's own copy of the weights, which stands beside the Hugging Face one."""
    return name.startswith("consolidated") and name.endswith(".safetensors")


def is_foreign(name: str) -> bool:
    """Whether a file is what trainers and PEFT leave beside a model's own."""
    return any(fnmatch(name, pattern) for pattern in _FOREIGN)


def is_of_another_kind(name: str) -> bool:
    """Whether a file, at the top or in a folder, may hold weights and is no safetensors file."""
    return name.endswith(_OTHER_KINDS) and not name.rpartition("/")[2].startswith(_OF_TRAINERS)


def note_on_other_weights(store: Store) -> list[str]:
    """What a user should know of weights that are no part of the checkpoint: in folders, or of another kind."""
    nested = (name for name in store.files() if "/" in name and name.endswith(".safetensors"))
    found = sorted({*nested, *filter(is_of_another_kind, store.files())})
    if not found:
        return []
    count = f"{len(found)} other file{'s' if len(found) > 1 else ''}"
    copied = "go where side files go, as they are, quantized or not"
    return [f"weights in {count} are no part of the checkpoint, and {copied}: {listed(found)}"]


def safetensors_in(store: Store) -> list[str]:
    """The safetensors files at the top. Lists all of the store: what cannot be listed is refused here."""
    at_the_top = {name.partition("/")[0] for name in store.files()}  # a folder so called is refused when it is read
    return sorted(name for name in at_the_top if name.endswith(".safetensors"))


def model_files(on_disk: list[str]) -> list[str]:
    """The safetensors files that may be of the model. A directory of nothing but an adapter holds that; and Mistral's
    own copy counts where it is the only one.
    """
    own = [name for name in on_disk if not is_foreign(name)] or on_disk
    return [name for name in own if not is_native(name)] or own


def holds_tensors(file: File) -> bool:
    """Whether a file holds a tensor, or may hold one."""
    header, defects = read_header(file)
    return bool(defects) or (header is not None and bool(header.spans))


def file_names(
    store: Store,
    on_disk: list[str],
    index_name: str | None,
    index: dict[str, Any] | None,
    defects: list[Fp8CheckpointError],
) -> list[str]:
    """The files of the model. Raises `CheckpointNotFoundError` where there is none; what the index names and is not
    there, and what the names of parts say is not, are defects.
    """
    if index is None:
        on_disk = model_files(on_disk)
        if not on_disk:
            found = "there is no safetensors file in it"
            raise CheckpointNotFoundError(found, file=store.where, remedy="check the path")
        if index_name is None:
            _find_missing_parts(on_disk, defects)
        return on_disk
    named: list[str] = []
    for name in sorted(set(index["weight_map"].values())):
        if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            defects.append(IndexMismatchError.of_path(index_name or INDEX, name))
        elif not _is_there(store, name):
            tensor = next(tensor for tensor, file in index["weight_map"].items() if file == name)
            defects.append(IndexMismatchError.of_absent(index_name or INDEX, tensor, name, store.where))
        else:
            named.append(name)
    return named


def _is_there(store: Store, name: str) -> bool:
    try:
        return name in store.files()
    except StorageError:  # it is there, and what it is will be said when it is read
        return True


def refuse_part(store: Store, name: str) -> None:
    """One file of several is no checkpoint: what it lacks lies in the others. A configuration or an index is none."""
    remedy = f"open the directory: {store.where}"
    if name.endswith(".json"):
        raise CheckpointNotFoundError("this holds no weights", file=name, remedy=remedy)
    named = read_index(store, [name], [])[1]
    files = set(named["weight_map"].values()) if named is not None else set()
    match = _PART.fullmatch(name)
    count = len(files) if name in files else int(match.group(3)) if match else 1
    if count > 1:
        raise CheckpointNotFoundError(f"this is 1 of {count} files of a checkpoint", file=name, remedy=remedy)


def _find_missing_parts(on_disk: list[str], defects: list[Fp8CheckpointError]) -> None:
    """Without an index, ``model-00001-of-00003.safetensors`` still says how many parts there are."""
    for name in on_disk:
        if match := _PART.fullmatch(name):
            stem, _, count = match.groups()
            for part in range(1, min(int(count), 10_000) + 1):
                expected = f"{stem}-{part:05d}-of-{count}.safetensors"
                if expected not in on_disk:
                    defects.append(IndexMismatchError.of_part(name, expected, int(count)))
            return


def compare_index(
    file: str,
    index: dict[str, Any],
    spans: Mapping[str, TensorSpan],
    complete: bool,
    defects: list[Fp8CheckpointError],
    slips: list[Fp8CheckpointError],
) -> None:
    """What the index says of another place than a tensor's own is a defect; a wrong sum of sizes harms no reader."""
    weight_map: dict[str, str] = index["weight_map"]
    stored = {name: span.file.name for name, span in spans.items()}
    if stored != weight_map:
        for name in sorted(weight_map.keys() | stored.keys()):
            listed, actual = weight_map.get(name), stored.get(name)
            if listed == actual or (actual is None and not complete):
                continue
            defects.append(IndexMismatchError.of_place(name, file, listed, actual))
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual_total = sum(span.stop - span.start for span in spans.values())
    if complete and total is not None and total != actual_total:
        slips.append(IndexMismatchError.of_size(file, total, actual_total))

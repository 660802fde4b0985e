"""A directory seen as plain tensors: the logical checkpoint.

`open_checkpoint` reads headers, the index and the configuration, and no data. Each FP8 weight with its scale is *one*
tensor, a `QuantizedTensor`; scale tensors do not exist. Whatever does not fit is refused before the first data byte is
read: `survey` collects every defect, `open_checkpoint` raises the first.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8ckpt.errors import (
    CheckpointNotFoundError,
    ConfigError,
    Fp8CheckpointError,
    HeaderError,
    IndexMismatchError,
    UnknownTensorError,
    shown,
)
from fp8ckpt.tensors import config as configuration
from fp8ckpt.tensors.header import Header, TensorSpan, read_header
from fp8ckpt.tensors.pairing import LogicalTensor, QuantizedTensor, pair

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
NATIVE_INDEX = "consolidated.safetensors.index.json"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A logical checkpoint. Immutable; holds no open file.

    ``path``: the directory. ``files``: the validated headers, in order. ``tensors``: every logical tensor by name.
    ``cache_scales``: scales of the key-value cache, which belong to no weight. ``config``: ``config.json``, empty where
    there is none. ``index_name`` and ``index``: the index file, or None. ``defects`` is empty in what `open_checkpoint`
    returns.
    """

    path: Path
    files: tuple[Header, ...]
    tensors: Mapping[str, LogicalTensor]
    cache_scales: tuple[TensorSpan, ...]
    config: dict[str, Any]
    index_name: str | None
    index: dict[str, Any] | None
    notes: tuple[str, ...]
    defects: tuple[Fp8CheckpointError, ...]

    @property
    def quantized(self) -> list[QuantizedTensor]:
        """The FP8 tensors."""
        return [tensor for tensor in self.tensors.values() if isinstance(tensor, QuantizedTensor)]

    def __getitem__(self, name: str) -> LogicalTensor:
        try:
            return self.tensors[name]
        except KeyError:
            found = "the checkpoint has no such tensor"
            raise UnknownTensorError(
                found, tensor=name, file=self.path, expected=f"one of its {len(self.tensors)} logical tensors"
            ) from None

    def read(
        self, name: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """One tensor, or the region at ``offsets`` of ``sizes`` in the coordinates of the full tensor.

        An FP8 tensor is dequantized to bfloat16; any other keeps its dtype. Reads no byte outside the region. Raises
        `UnknownTensorError`, `RegionError`, `StorageError`, and `ScaleValueError` for a scale that no value can be made
        of.
        """
        from fp8ckpt.tensors.reading import read_tensor

        return read_tensor(self[name], offsets, sizes)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory, a single safetensors file, or a hub id that is in huggingface_hub's local cache.

    Reads headers only. Raises the first defect found, as a named `Fp8CheckpointError`, and says how many more there
    are.
    """
    checkpoint = survey(path)
    raise_first(checkpoint.defects)
    return checkpoint


def raise_first(defects: Iterable[Fp8CheckpointError]) -> None:
    """Raise the first of ``defects``, if there is one, and mention the others."""
    defects = list(defects)
    if defects:
        first = defects[0]
        if len(defects) > 1:
            more = f"{len(defects) - 1} more defect{'s' if len(defects) > 2 else ''}: see fp8ckpt inspect"
            first.remedy = f"{first.remedy}; {more}" if first.remedy else more
            first = type(first)(
                first.found, tensor=first.tensor, file=first.file, expected=first.expected, remedy=first.remedy
            )
        raise first


def survey(path: str | Path) -> Checkpoint:
    """The checkpoint with all its defects listed; raises only where there is nothing to look at."""
    with collector_paused():
        return _survey(*_resolve(path))


@contextmanager
def collector_paused() -> Iterator[None]:
    """A large model is a few hundred thousand small tuples, none in a cycle: looking for cycles takes a third of the
    time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _survey(directory: Path, single: Path | None) -> Checkpoint:
    defects: list[Fp8CheckpointError] = []
    notes: list[str] = []
    try:
        config = configuration.load_json(directory / configuration.CONFIG) or {}
        block_size = configuration.block_size(directory, config)
    except ConfigError as error:
        defects.append(error)
        config, block_size = {}, None
    index_name, index = (None, None) if single else _read_index(directory, defects)
    if single:
        _refuse_part(directory, single.name)
    names = [single.name] if single else _file_names(directory, index_name, index, defects)
    headers: list[Header] = []
    complete = not defects
    for name in names:
        header, found = read_header(directory / name)
        defects += found
        complete = complete and not found
        if header is not None:
            headers.append(header)
    spans: dict[str, TensorSpan] = {}
    for header in headers:
        for span in header.spans:
            if span.name in spans:
                found_in = f"it is in {shown(spans[span.name].file.name)} as well"
                defects.append(
                    HeaderError(
                        found_in,
                        tensor=span.name,
                        file=span.file,
                        expected="each name once",
                        remedy="remove one of the files",
                    )
                )
            spans[span.name] = span
    if index is not None and index_name is not None:
        _compare_index(directory / index_name, index, spans, complete, defects, notes)
    pairing = pair(spans, block_size, complete=complete)
    defects += pairing.defects
    return Checkpoint(
        path=directory,
        files=tuple(headers),
        tensors=pairing.tensors,
        cache_scales=pairing.cache_scales,
        config=config,
        index_name=index_name,
        index=index,
        notes=tuple(notes),
        defects=tuple(defects),
    )


def _resolve(path: str | Path) -> tuple[Path, Path | None]:
    """The directory, and the file where one file was named."""
    local = Path(path)
    if os.path.isdir(local):  # noqa: PTH112 - Path.is_dir() raises for a name that is too long
        return local, None
    if os.path.isfile(local):  # noqa: PTH113 - as above
        return local.parent, local
    if not _is_hub_id(str(path)):
        raise CheckpointNotFoundError("there is no such directory or file", file=str(path), remedy="check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), local_files_only=True)), None
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
        remedy = f"fetch it first: hf download {path}"
        raise CheckpointNotFoundError(
            "neither a path nor a model in huggingface_hub's local cache", file=str(path), remedy=remedy
        ) from None


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None


def _read_index(directory: Path, defects: list[Fp8CheckpointError]) -> tuple[str | None, dict[str, Any] | None]:
    for name in (INDEX, NATIVE_INDEX):
        if name == NATIVE_INDEX and any(not is_native(file.name) for file in directory.glob("*.safetensors")):
            continue
        try:
            index = configuration.load_json(directory / name)
        except ConfigError as error:
            defects.append(
                IndexMismatchError(
                    error.found, tensor=error.tensor, file=name, expected=error.expected, remedy=error.remedy
                )
            )
            return name, None
        if index is None:
            continue
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            found = "it has no weight_map of names to files"
            defects.append(
                IndexMismatchError(
                    found, file=name, expected='{"weight_map": {tensor: file}}', remedy="fetch the file again"
                )
            )
            return name, None
        return name, index
    return None, None


def is_native(name: str) -> bool:
    """Whether a file belongs to Mistral's own copy of the weights, which stands beside the Hugging Face one."""
    return name.startswith("consolidated") and name.endswith(".safetensors")


def _file_names(
    directory: Path, index_name: str | None, index: dict[str, Any] | None, defects: list[Fp8CheckpointError]
) -> list[str]:
    on_disk = sorted(file.name for file in directory.glob("*.safetensors"))
    if any(not is_native(name) for name in on_disk):
        on_disk = [name for name in on_disk if not is_native(name)]
    if index is None:
        if not on_disk:
            raise CheckpointNotFoundError(
                "there is no safetensors file in it", file=str(directory), remedy="check the path"
            )
        if index_name is None:
            _find_missing_parts(on_disk, defects)
        return on_disk
    named: list[str] = []
    for name in sorted(set(index["weight_map"].values())):
        if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            remedy = "do not use this checkpoint unless you know who wrote it"
            found = f"it names the file {shown(name)}"
            defects.append(
                IndexMismatchError(
                    found, file=index_name, expected="the name of a file in the directory", remedy=remedy
                )
            )
        elif not os.path.isfile(directory / name):  # noqa: PTH113 - Path.is_file() raises for a name that is too long
            tensor = next(tensor for tensor, file in index["weight_map"].items() if file == name)
            found = f"the file {shown(name)} is not there"
            defects.append(
                IndexMismatchError(
                    found,
                    tensor=tensor,
                    file=index_name,
                    expected=f"{shown(name)} in {directory}",
                    remedy="fetch the file",
                )
            )
        else:
            named.append(name)
    for name in sorted(set(on_disk) - set(index["weight_map"].values())):
        header, found_in = read_header(directory / name)
        if found_in or (header is not None and header.spans):
            remedy = "fetch the index again, or move the file away"
            defects.append(
                IndexMismatchError(
                    f"the index {index_name} does not name this file",
                    file=name,
                    expected="every file in it",
                    remedy=remedy,
                )
            )
    return named


def _refuse_part(directory: Path, name: str) -> None:
    """One file of several is no checkpoint: what it lacks lies in the others."""
    named = _read_index(directory, [])[1]
    files = set(named["weight_map"].values()) if named is not None else set()
    match = _PART.fullmatch(name)
    count = len(files) if name in files else int(match.group(3)) if match else 1
    if count > 1:
        remedy = f"open the directory: {directory}"
        raise CheckpointNotFoundError(f"this is 1 of {count} files of a checkpoint", file=name, remedy=remedy)


def _find_missing_parts(on_disk: list[str], defects: list[Fp8CheckpointError]) -> None:
    """Without an index, ``model-00001-of-00003.safetensors`` still says how many parts there are."""
    for name in on_disk:
        if match := _PART.fullmatch(name):
            stem, _, count = match.groups()
            for part in range(1, min(int(count), 10_000) + 1):
                expected = f"{stem}-{part:05d}-of-{count}.safetensors"
                if expected not in on_disk:
                    found = f"the part {shown(expected)} is not there"
                    defects.append(
                        IndexMismatchError(
                            found, file=name, expected=f"all of the {int(count)} parts", remedy="fetch the file"
                        )
                    )
            return


def _compare_index(
    file: Path,
    index: dict[str, Any],
    spans: Mapping[str, TensorSpan],
    complete: bool,
    defects: list[Fp8CheckpointError],
    notes: list[str],
) -> None:
    weight_map: dict[str, str] = index["weight_map"]
    stored = {name: span.file.name for name, span in spans.items()}
    if stored != weight_map:
        for name in sorted(weight_map.keys() | stored.keys()):
            listed, actual = weight_map.get(name), stored.get(name)
            if listed == actual or (actual is None and not complete):
                continue
            if listed is None:
                found = f"{shown(actual)} holds a tensor that the index {file.name} does not list"
            elif actual is None:
                found = f"{shown(listed)} does not hold this tensor, and the index {file.name} says that it does"
            else:
                found = f"the index {file.name} says {shown(listed)}, and it is in {shown(actual)}"
            defects.append(
                IndexMismatchError(
                    found,
                    tensor=name,
                    file=file,
                    expected="the index and the headers to agree",
                    remedy="fetch both again",
                )
            )
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual_total = sum(span.nbytes for span in spans.values())
    if complete and total is not None and total != actual_total:
        notes.append(f"{file.name}: metadata.total_size is {shown(total)}; the tensors take {actual_total} bytes")

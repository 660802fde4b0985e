"""A directory seen as plain tensors: the logical checkpoint.

`open_checkpoint` reads headers, the index and the configuration, and no data. Each FP8 weight with its scale is *one*
tensor, a `QuantizedTensor`; scale tensors do not exist. Defects are refused before the first data byte is read:
`survey` collects all of them, `open_checkpoint` raises the first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fp8ckpt.collector import collector_paused
from fp8ckpt.errors import (
    CheckpointNotFoundError,
    ConfigError,
    Fp8CheckpointError,
    HeaderError,
    IndexMismatchError,
    ScaleShapeError,
    StorageError,
    UnknownTensorError,
    shown,
)
from fp8ckpt.stores.address import address_of
from fp8ckpt.stores.local import ABSENT, LocalStore, kept_open
from fp8ckpt.stores.store import File, Store
from fp8ckpt.tensors import config as configuration
from fp8ckpt.tensors import directory
from fp8ckpt.tensors.blocks import BlockSizes, block_sizes
from fp8ckpt.tensors.directory import Findings, Index
from fp8ckpt.tensors.formats import names_of
from fp8ckpt.tensors.header import Header, read_header
from fp8ckpt.tensors.pairing import pair
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import Tensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """A logical checkpoint. Immutable.

    ``store`` holds its files; ``path`` is its place. ``files``: the validated headers, in order. ``tensors``: every
    logical tensor by name. ``cache_scales``: scales of attention and of the key-value cache, which belong to no weight.
    ``config``: ``config.json``, empty if there is none. ``index_name`` and ``index``: the index file, or None.
    ``notes``: facts for the user; ``slips``: errors that harm no reader. ``defects`` is empty in the result of
    `open_checkpoint`. ``markers``: stored tensors that only say how the others are stored. ``beside``: safetensors
    files of the directory that are not part of the model; an output treats them as side files.

    >>> checkpoint = fp8ckpt.open_checkpoint("sample-fp8")
    >>> name = "model.language_model.layers.0.mlp.up_proj.weight"
    >>> checkpoint.read(name, offsets=(8, 0), sizes=(2, 128)).dtype
    torch.bfloat16
    """

    store: Store
    files: tuple[Header, ...]
    tensors: Mapping[str, Tensor]
    cache_scales: tuple[TensorSpan, ...]
    config: dict[str, Any]
    index_name: str | None
    index: dict[str, Any] | None
    notes: tuple[str, ...]
    defects: tuple[Fp8CheckpointError, ...]
    slips: tuple[Fp8CheckpointError, ...] = ()
    markers: tuple[TensorSpan, ...] = ()
    beside: tuple[str, ...] = ()

    def tensors_in(self, header: Header) -> list[Tensor]:
        """Return the logical tensors whose values (or codes) are in one of the files, in the order of its data."""
        found = ((span, self.tensors.get(name)) for span in header.spans for name in names_of(span.name))
        return [tensor for span, tensor in found if tensor is not None and tensor.span == span]

    @property
    def path(self) -> Path | str:
        """The directory, or the URL of a store that is not a local directory."""
        return self.store.path or self.store.where

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def quantized(self) -> list[QuantizedTensor]:
        """The FP8 tensors."""
        return [scaled for tensor in self.tensors.values() if (scaled := tensor.scaled) is not None]

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise UnknownTensorError.of(name, file=self.path, count=len(self.tensors)) from None

    def read(
        self, name: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Return one tensor, or the region at ``offsets`` of ``sizes`` in the coordinates of the full tensor.

        An FP8 tensor is dequantized to bfloat16; any other keeps its dtype. Reads no byte outside the region. Raises
        `UnknownTensorError`, `RegionError`, `StorageError`, and `ScaleValueError` for a scale that is not a valid one.
        """
        from fp8ckpt.tensors.reading import read_tensor

        return read_tensor(self[name], offsets, sizes)


#: A directory, a single safetensors file, a hub id in the local cache, the URL of a store (docs/stores.md), a store, or
#: an open `Checkpoint`.
CheckpointLike: TypeAlias = str | Path | Store | Checkpoint


def open_checkpoint(path: CheckpointLike, *, follow_index: bool = False) -> Checkpoint:
    """Open a directory, a single safetensors file, a hub id that is in huggingface_hub's local cache, the URL of a
    store (``s3://bucket/prefix``, ``hf://org/name@revision``), or a store. An open checkpoint is returned unchanged.

    Reads headers only. With ``follow_index``, tensors and files that the index does not list are ignored, as loaders
    do; without it they are a defect. Raises the first defect found, as a named `Fp8CheckpointError` that says how many
    more there are.

    >>> checkpoint = fp8ckpt.open_checkpoint("sample-fp8")
    >>> len(checkpoint.quantized)
    14
    """
    checkpoint = survey(path, follow_index=follow_index)
    raise_first(checkpoint.defects)
    return checkpoint


def raise_first(defects: Iterable[Fp8CheckpointError]) -> None:
    """Raise the first of ``defects``, if there is one, and mention how many more there are."""
    if found := [*defects]:
        raise found[0].among(len(found) - 1)


@kept_open()
def survey(path: CheckpointLike, *, follow_index: bool = False) -> Checkpoint:
    """Return the checkpoint with all its defects listed. Raises only if there is nothing to look at."""
    if isinstance(path, Checkpoint):
        return path
    with collector_paused():
        store, single = store_of(path)
        return _survey(store, single, follow_index)


def store_of(path: str | Path | Store) -> tuple[Store, str | None]:
    """Return the store of a directory, of a hub id in the local cache, or of a URL; and the file, if one was named.
    Raise `TypeError` for any other argument.
    """
    if isinstance(path, str | Path):
        return _resolve(path)
    if not hasattr(path, "files"):
        found = f"a {type(path).__name__} is no checkpoint"
        raise TypeError(f"{found}: give a directory, a single safetensors file, a hub id, a URL, or an open Checkpoint")
    return path, None


def _survey(store: Store, single: str | None, follow_index: bool) -> Checkpoint:
    found = Findings()
    config, blocks, quantized = _configuration(store, found)
    understood = not found.defects  # otherwise nobody knows the right block sizes
    on_disk = names = [single] if single else directory.safetensors_in(store)
    index = None
    if single:
        directory.refuse_part(store, single)
    else:
        index = directory.read_index(store, on_disk, found)
        names = directory.file_names(store, on_disk, index, found)
        found.notes += directory.note_on_other_weights(store)
    beside = [name for name in on_disk if name not in names and directory.is_foreign(name)]
    listing = index if index is not None and index.content else None
    if listing is not None:
        beside += _unnamed(listing, store, on_disk, follow_index, found)
    headers = tuple(read_headers(store, names, found))
    complete = not found.defects
    spans = spans_by_name(headers, listing.weight_map if listing is not None and follow_index else None, found)
    if listing is not None:
        directory.compare_index(listing, spans, complete, found)
    pairing = pair(spans, blocks, quantized=quantized, complete=complete)
    found.defects += [error for error in pairing.defects if understood or not isinstance(error, ScaleShapeError)]
    return Checkpoint(
        store=store,
        files=headers,
        tensors=pairing.tensors,
        cache_scales=pairing.cache_scales,
        config=config,
        index_name=None if index is None else index.name,
        index=None if listing is None else listing.content,
        notes=tuple(found.notes),
        defects=tuple(found.defects),
        slips=tuple(found.slips),
        markers=pairing.markers,
        beside=tuple(beside),
    )


def _configuration(store: Store, found: Findings) -> tuple[configuration.Json, BlockSizes, bool]:
    """Return ``config.json``, the block sizes, and whether any configuration speaks of quantization."""
    try:
        config = configuration.load_json(store, configuration.CONFIG) or {}
        return config, block_sizes(store, config), configuration.states_quantization(store, config)
    except (ConfigError, StorageError) as error:
        found.defects.append(error)
        return {}, BlockSizes(), False


def _unnamed(index: Index, store: Store, on_disk: list[str], follow_index: bool, found: Findings) -> Iterator[str]:
    """Yield the files of tensors that an index does not name, if it is followed; without that, they are defects."""
    listed = index.files
    for name in directory.model_files(on_disk):
        if name in listed or not directory.holds_tensors(File(store, name)):
            continue
        if follow_index:
            found.notes.append(f"{shown(name)}: {index.name} does not name it, so it is not part of the checkpoint")
            yield name
        else:
            found.defects.append(IndexMismatchError.of_unnamed(file=name, index=index.name))


def read_headers(store: Store, names: list[str], into: Findings) -> Iterator[Header]:
    """Yield the headers of files, but for those of which nothing can be used."""
    with ThreadPoolExecutor(store.at_once, "fp8ckpt") if store.at_once > 1 else nullcontext() as pool:
        for header, defects in (pool.map if pool else map)(read_header, [File(store, name) for name in names]):
            into.defects += defects
            if header is not None:
                yield header


def spans_by_name(headers: Iterable[Header], listed: Mapping[str, str] | None, into: Findings) -> dict[str, TensorSpan]:
    """Return all stored tensors by name, or only those in ``listed`` if it is given."""
    spans: dict[str, TensorSpan] = {}
    for header in headers:
        found = {span.name: span for span in header.spans}
        left_out = [] if listed is None else [name for name in found if name not in listed]
        for name in left_out:
            del found[name]
        for name in sorted(spans.keys() & found.keys()):
            into.defects.append(HeaderError.of_two(found[name], other=spans[name].file.name))
        spans.update(found)
        if left_out:
            names = f"{len(left_out)} tensors, of which the first is {shown(left_out[0])}"
            into.notes.append(f"{shown(header.file.name)}: the index does not list {names}; they are not read")
    return spans


def _resolve(path: str | Path) -> tuple[Store, str | None]:
    """Return the store, and the name of the file if a single file was named."""
    if (address := address_of(path)) is not None:
        from fp8ckpt.stores.opening import open_store

        return open_store(address)
    local = Path(path)
    if os.path.isdir(local):  # noqa: PTH112 - Path.is_dir() raises for a name that is too long
        return LocalStore(local), None
    if os.path.lexists(local):
        return LocalStore(local.parent, local.name), local.name
    _refuse_hidden(local)
    if not _is_hub_id(str(path)):
        raise CheckpointNotFoundError.of_path(file=str(path))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return LocalStore(snapshot_download(str(path), local_files_only=True)), None
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
        raise CheckpointNotFoundError.of_hub_id(path) from None


def _refuse_hidden(path: Path) -> None:
    """Raise if the operating system does not say whether the path exists."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno not in ABSENT:
            raise StorageError.of_reading(error, str(path)) from error
    except ValueError:  # a name that no file can have
        pass


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None

"""A storage reader that presents the logical checkpoint to torch's distributed checkpoint.

`FP8StorageReader` serves ``dcp.load(state_dict, storage_reader=...)``: the state dict holds plain BF16 (or FP16, FP32)
tensors, DTensors of any placement among them, by their names on disk, and no scales. The bytes of each requested region
are read once and dequantized straight into the planner's target: no FP8 placeholder, no second copy.

Its life cycle, as DCP calls it:

1. ``reset(path)``                      a new load begins
2. ``read_metadata()``                  headers only; every defect is found here, before the first data byte
3. ``set_up_storage_reader(...)``       on every rank
4. ``prepare_local_plan(plan)``         identifies this rank's copy; item regions are in coordinates of the full tensor
5. ``prepare_global_plan(plans)``       coordinator: check that all ranks read copies of one checkpoint
6. ``read_data(plan, planner)``         reads this rank's regions, with as many threads as the rank has cores
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from fp8ckpt.checkpoint.live import refuse_shared_memory
from fp8ckpt.checkpoint.regions import RegionLoader, dequantizers, rounds
from fp8ckpt.errors import Fp8CheckpointError, RegionError, shown
from fp8ckpt.numerics.geometry import Region, pieces, within
from fp8ckpt.output.plan import contents_of, refuse_unlike
from fp8ckpt.ranks import has_group, threads_of_this_rank
from fp8ckpt.stores.address import address_of
from fp8ckpt.stores.local import kept_open
from fp8ckpt.stores.store import ByteRange
from fp8ckpt.system import hint_huge_pages
from fp8ckpt.targets import refuse_count
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint
from fp8ckpt.tensors.reading import stored_dtype, torch_dtype
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import Tensor, with_scales
from fp8ckpt.workers import share

logger = logging.getLogger(__name__)

_PIECE = 32 << 20  # elements; what a thread takes at once, so that a large tensor is shared among threads


class FP8StorageReader(StorageReader):
    """A storage reader of the logical checkpoint at ``path``: a directory, a file, a hub id in the local cache, or an
    open `Checkpoint`.

    ``workers``: the number of threads; by default, this process's cores, divided by the ranks that torchrun started on
    the machine. ``threads`` is its former name. ``bytes_read`` counts the data bytes read so far, scales aside.

    A target of an FP8 dtype receives the codes, and the scales can be requested by their own names, so placeholders
    made by an adapter's ``to_hf(quantization=True)`` are filled, too. Any other tensor is cast to its target's dtype,
    as DCP does; a warning names those that this rounds.

    >>> import torch.distributed.checkpoint as dcp
    >>> name = "model.language_model.layers.0.mlp.up_proj.weight"
    >>> state_dict = {name: torch.empty(256, 128, dtype=torch.bfloat16)}
    >>> dcp.load(state_dict, storage_reader=fp8ckpt.FP8StorageReader("sample-fp8"))
    >>> state_dict[name].equal(fp8ckpt.open_checkpoint("sample-fp8").read(name))
    True
    """

    def __init__(self, path: CheckpointLike, *, workers: int | None = None, threads: int | None = None) -> None:
        self._path: CheckpointLike = path.path if isinstance(path, Checkpoint) else path
        self._checkpoint = path if isinstance(path, Checkpoint) else None
        if threads is not None:
            warnings.warn("threads= is now workers=, as in convert", DeprecationWarning, stacklevel=2)
        refuse_count("workers", workers)
        self._threads = workers or threads
        self.bytes_read = 0

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, opened at first use."""
        if self._checkpoint is None:
            self._checkpoint = open_checkpoint(self._path)
        return self._checkpoint

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a directory or file of that name exists, or it is the URL of a store."""
        return address_of(checkpoint_id) is not None or Path(checkpoint_id).exists()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, of another checkpoint if one is named."""
        if checkpoint_id is not None and str(checkpoint_id) != str(self._path):
            self._path, self._checkpoint = str(checkpoint_id), None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return every logical tensor as one chunk, FP8 ones as bfloat16; and the scales, by their own names.

        A defective checkpoint raises its error when the metadata is looked into: torch takes an error raised here as a
        sign that each rank has its own metadata, and drops it.
        """
        try:
            stored = self.checkpoint
        except Fp8CheckpointError as error:
            return _Refused(error)
        tensors: dict[str, Any] = {name: _metadata(tensor) for name, tensor in stored.tensors.items()}
        tensors.update({span.name: _metadata(span) for span in self._scales().values()})
        return Metadata(state_dict_metadata=tensors, storage_meta=StorageMeta(checkpoint_id=str(self._path)))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: every rank opens the checkpoint for itself."""

    @kept_open()
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan with the contents of this rank's copy of the checkpoint; for a single process, unchanged."""
        if not has_group():
            return plan
        return dataclasses.replace(plan, storage_data={"what is read": contents_of(self.checkpoint)})

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Coordinator: raise `RanksDifferError` if ranks would load parts of different checkpoints."""
        refuse_unlike([plan.storage_data or {} for plan in plans])
        return plans

    @kept_open()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Load every item of this rank's plan into its target. The first error stops all threads, and is raised."""
        threads = threads_of_this_rank(self._threads)
        targets = [(item, planner.resolve_tensor(item).detach()) for item in plan.items]
        self._warn_of_rounding(targets)
        storages = [target.untyped_storage() for _, target in targets if target.device.type == "cpu"]
        hint_huge_pages({(storage.data_ptr(), storage.nbytes()) for storage in storages})
        dequantizer = dequantizers(threads)
        loaders = [RegionLoader(dequantizer, threads) for _ in range(threads)]
        work = list(self._work(targets))
        try:
            with self.checkpoint.store.ahead(_reads(work)):
                share(work, [partial(_load, loader) for loader in loaders])
        finally:
            for loader in loaders:
                self.bytes_read += loader.bytes_read
        self.checkpoint.store.refuse_changes()
        for item, target in targets:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _warn_of_rounding(self, targets: list[tuple[ReadItem, torch.Tensor]]) -> None:
        tensors = self.checkpoint.tensors
        narrowed = {
            (source.name, source.dtype, target.dtype)
            for item, target in targets
            if (source := tensors.get(item.storage_index.fqn)) is not None
            and source.scaled is None
            and rounds(torch_dtype(source.dtype), target.dtype)
        }
        if narrowed:
            name, stored, dtype = min(narrowed, key=lambda entry: entry[0])
            logger.warning(
                "%d tensors of %s are rounded to narrower dtypes as they are loaded; the first is %s, from %s to %s",
                len(narrowed),
                self.checkpoint.path,
                shown(name),
                stored,
                dtype,
            )

    def _work(self, targets: list[tuple[ReadItem, torch.Tensor]]) -> Iterator[tuple[Tensor, Region, torch.Tensor]]:
        """Yield (tensor, region, target) in the order of the files, large regions in pieces."""
        scales = self._scales()
        found = []
        for item, target in targets:
            name = item.storage_index.fqn
            tensor = scales[name] if name in scales else self.checkpoint[name]
            region = (tuple(item.storage_offsets), tuple(item.lengths))
            if tuple(target.shape) != region[1]:
                raise RegionError.of_target(name, shape=tuple(target.shape), planned=region[1])
            refuse_shared_memory(name, target)
            found.append(((tensor.span.file.name, tensor.span.start), tensor, region, target))
        found.sort(key=lambda entry: entry[0])
        for _, tensor, region, target in found:
            for piece in pieces(region, _PIECE):
                yield tensor, piece, target[within(piece, region)]

    def _scales(self) -> dict[str, TensorSpan]:
        """The spans of scales, and of codes that are stored under a name other than their tensor's."""
        tensors = self.checkpoint.tensors
        spans = (
            span
            for tensor in self.checkpoint.quantized
            for span in (tensor.weight, tensor.scale, *tensor.activation_scales)
        )
        return {span.name: span for span in spans if span.name not in tensors}


class _Refused(Metadata):
    """The metadata of a checkpoint that cannot be opened."""

    def __init__(self, error: Fp8CheckpointError) -> None:
        self._error = error

    @property
    def state_dict_metadata(self) -> Any:  # type: ignore[override]  # a field of the base
        raise self._error


def _load(loader: RegionLoader, part: tuple[Tensor, Region, torch.Tensor]) -> None:
    loader.load(*part)


def _reads(work: Iterable[tuple[Tensor, Region, torch.Tensor]]) -> Iterator[list[ByteRange]]:
    """Yield what the work will read, in order: scales, once a tensor, and values."""

    def values() -> Iterator[tuple[Sequence[TensorSpan], list[ByteRange]]]:
        last = None
        for tensor, region, target in work:
            needed = tensor is not last and stored_dtype(target.dtype) != tensor.span.dtype
            yield tensor.scales if needed else (), list(tensor.reads(region))
            last = tensor

    return with_scales(values())


def _metadata(tensor: Tensor) -> TensorStorageMetadata:
    dtype = torch_dtype(tensor.dtype)
    size = torch.Size(tensor.shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=[chunk])

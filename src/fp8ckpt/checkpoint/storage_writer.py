"""A storage writer that makes torch's distributed checkpoint write final, consolidated Hugging Face files in one pass.

The coordinator lays out every file from the global plan, before any byte; every rank then writes its own regions at their
offsets; the coordinator adds headers, index and side files, flushes, and renames. Each byte is written once: nothing is saved
in shards and consolidated later. The rules of partial outputs are those of `fp8ckpt.storage.partial`.

Its life, as DCP calls it:

1. ``reset(path)``                      a new save begins
2. ``set_up_storage_writer(...)``       on every rank
3. ``prepare_local_plan(plan)``         nothing to add
4. ``prepare_global_plan(plans)``       coordinator: check that the plans cover each tensor once, lay out, create the files
5. ``write_data(plan, planner)``        this rank's regions, cast to the stored dtype, flushed to disk
6. ``finish(metadata, results)``        coordinator: headers, index, side files; then the name
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from fp8ckpt.checkpoint.ranks import threads_of_this_rank
from fp8ckpt.errors import Fp8CheckpointError, ModelMismatchError, OutputExistsError, UnsupportedFormatError, shown
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.storage.checkpoint import INDEX, Checkpoint
from fp8ckpt.storage.config import dump_json
from fp8ckpt.storage.files import OutputFile, Region, copy_whole, create, pieces, runs, within, write_whole
from fp8ckpt.storage.header import TensorSpan, tensor_nbytes
from fp8ckpt.storage.layout import FileLayout, TensorSpec, index_of, lay_out
from fp8ckpt.storage.pairing import QuantizedTensor
from fp8ckpt.storage.partial import PartialOutput
from fp8ckpt.storage.reading import bytes_of, stored_dtype, torch_dtype
from fp8ckpt.storage.workers import share

_PIECE = 4 << 20  # elements that are cast and written at once

DEFAULT_FILE_BYTES = 5_000_000_000  # the size at which Hugging Face begins another file, too


@dataclass(frozen=True)
class SideFiles:
    """Files that go beside the weights: by name, their bytes or the file to copy."""

    texts: Mapping[str, bytes] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)


class SafetensorsStorageWriter(StorageWriter):
    """Writes one directory of safetensors files.

    ``dtype``: that of every floating-point tensor, BF16, F16 or F32 (a safetensors name). ``base``: a checkpoint with the same
    logical tensors, which decides the file of each and the dtype of those that it does not hold as FP8. ``max_file_bytes``:
    without a base, where a new file begins. ``bytes_written`` counts this rank's tensor bytes.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str = "BF16",
        base: Checkpoint | None = None,
        side_files: SideFiles | None = None,
        max_file_bytes: int = DEFAULT_FILE_BYTES,
    ) -> None:
        self._output = PartialOutput(Path(path).absolute())
        self._dtype = dtype
        self._base = base
        self._side_files = side_files or SideFiles()
        self._max_file_bytes = max_file_bytes
        self._layouts: list[FileLayout] = []
        self.bytes_written = 0

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether nothing stands there yet."""
        return not os.path.lexists(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew, at another path where one is named."""
        if checkpoint_id is not None:
            self._output = PartialOutput(Path(checkpoint_id).absolute())
        self.bytes_written = 0

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse an existing destination before any planning."""
        self._output.refuse_existing()
        if self._base is not None and self._output.destination.resolve().is_relative_to(self._base.path.resolve()):
            found = f"the destination lies inside the base {self._base.path}"
            raise OutputExistsError(found, file=str(self._output.destination), expected="a path outside it", remedy="choose another one")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is; only tensors can be stored."""
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                remedy = "keep it out of the state dict"
                raise UnsupportedFormatError("it is no tensor", tensor=item.index.fqn, expected="tensors only", remedy=remedy)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Lay out the files, create them empty, and tell every rank where each tensor goes."""
        shapes, dtypes = self._checked(plans)
        specs = [TensorSpec(name, self._stored_dtype(name, dtypes[name]), shape) for name, shape in shapes.items()]
        self._layouts = self._partition(specs)
        texts = dict(self._side_files.texts)
        if len(self._layouts) > 1 or (self._base is not None and self._base.index is not None):
            texts[self._base.index_name or INDEX if self._base is not None else INDEX] = dump_json(
                index_of(self._layouts, {}), sort_keys=True
            )
        digest = hashlib.sha256(b"".join(layout.head for layout in self._layouts)).hexdigest()
        names = {layout.name for layout in self._layouts} | {*texts, *self._side_files.copies}
        self._output.begin({"format": 1, "job": "save", "planned": digest}, names)
        try:
            for layout in self._layouts:
                create(self._output.directory / layout.name, layout.size)
            for name, text in texts.items():
                write_whole(self._output.directory / name, text)
            for name, file in self._side_files.copies.items():
                copy_whole(file, self._output.directory / name)
        except Fp8CheckpointError:
            self._output.release()
            raise
        spans = {span.name: span for layout in self._layouts for span in layout.spans}
        return [dataclasses.replace(plan, storage_data={item.index.fqn: spans[item.index.fqn] for item in plan.items}) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's regions, with as many threads as it has cores, and flush them to disk."""
        spans: dict[str, TensorSpan] = plan.storage_data or {}
        files = {name: OutputFile(self._output.directory / name) for name in {span.file.name for span in spans.values()}}
        written: list[int] = []

        def work() -> Iterator[tuple[TensorSpan, Region, torch.Tensor]]:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)  # prepare_local_plan() refused all else
                for piece in pieces(_region(item), _PIECE):
                    yield spans[item.index.fqn], piece, tensor.detach()[within(piece, _region(item))]

        def write(part: tuple[TensorSpan, Region, torch.Tensor]) -> None:
            written.append(_write_piece(files[part[0].file.name], *part))

        try:
            share(work(), [write] * threads_of_this_rank())
            self.bytes_written += sum(written)
            for file in files.values():
                file.flush()
        finally:
            for file in files.values():
                file.close()
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [WriteResult(index=item.index, size_in_bytes=item.tensor_storage_size() or 0, storage_data=None) for item in plan.items]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the headers, and give the directory its name."""
        try:
            for layout in self._layouts:
                file = OutputFile(self._output.directory / layout.name)
                try:
                    file.write(np.frombuffer(layout.head, np.uint8), 0)
                    file.flush()
                finally:
                    file.close()
            self._output.publish()
        finally:
            self.release()

    def release(self) -> None:
        """Give up the destination's lock after a save that failed; what was written of it stays in ``.partial``."""
        self._output.release()

    def _checked(self, plans: Iterable[SavePlan]) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
        """Shapes and dtypes by name, in the order met; every element of every tensor must be planned exactly once."""
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        planned: dict[str, int] = {}
        for plan in plans:
            for item in plan.items:
                assert item.tensor_data is not None  # no BYTE_IO is left
                name = item.index.fqn
                shapes.setdefault(name, tuple(item.tensor_data.size))
                dtypes.setdefault(name, item.tensor_data.properties.dtype)
                planned[name] = planned.get(name, 0) + prod(item.tensor_data.chunk.sizes)
        for name, shape in shapes.items():
            if planned[name] != prod(shape):
                found = f"the ranks' plans hold {planned[name]} of its elements"
                raise ModelMismatchError(found, tensor=name, expected=f"{prod(shape)}", remedy="use a planner that saves each shard once")
        if self._base is not None:
            self._compare_with_base(self._base, shapes)
        return shapes, dtypes

    @staticmethod
    def _compare_with_base(base: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
        missing, extra = base.tensors.keys() - shapes.keys(), shapes.keys() - base.tensors.keys()
        if missing or extra:
            name, which = (
                (min(missing), "in the base, and not in the model") if missing else (min(extra), "in the model, and not in the base")
            )
            found = f"{len(missing)} tensors are only in the base, {len(extra)} only in the model; the first is {shown(name)}, {which}"
            remedy = "give the base that the model came from"
            raise ModelMismatchError(found, file=base.path, expected="the same logical tensors", remedy=remedy)
        for name, tensor in base.tensors.items():
            if tensor.shape != shapes[name]:
                raise ModelMismatchError(f"shape {shapes[name]} in the model", tensor=name, file=base.path, expected=f"{tensor.shape}")

    def _stored_dtype(self, name: str, dtype: torch.dtype) -> str:
        stored = stored_dtype(dtype)
        if stored is None:
            raise UnsupportedFormatError(f"dtype {dtype} has no place in a safetensors file", tensor=name, remedy="cast it first")
        tensor = self._base.tensors.get(name) if self._base is not None else None
        if isinstance(tensor, TensorSpan):
            return tensor.dtype
        return self._dtype if dtype.is_floating_point and (stored in TARGET_BYTES or stored == "F64") else stored

    def _partition(self, specs: list[TensorSpec]) -> list[FileLayout]:
        metadata = {"format": "pt"}
        if self._base is not None:
            home = {}
            for name, tensor in self._base.tensors.items():
                home[name] = (tensor.weight if isinstance(tensor, QuantizedTensor) else tensor).file.name
            found: dict[str, list[TensorSpec]] = {}
            for spec in specs:
                found.setdefault(home[spec.name], []).append(spec)
            return [lay_out(name, found[name], metadata) for name in sorted(found)]
        contents: list[list[TensorSpec]] = [[]]
        filled = 0
        for spec in specs:
            size = tensor_nbytes(spec.dtype, spec.shape)
            if filled + size > self._max_file_bytes and contents[-1]:
                contents.append([])
                filled = 0
            contents[-1].append(spec)
            filled += size
        if len(contents) == 1:
            return [lay_out("model.safetensors", contents[0], metadata)]
        return [lay_out(f"model-{i:05d}-of-{len(contents):05d}.safetensors", part, metadata) for i, part in enumerate(contents, 1)]


def _region(item: WriteItem) -> Region:
    assert item.tensor_data is not None
    return tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes)


def _write_piece(file: OutputFile, span: TensorSpan, piece: Region, values: torch.Tensor) -> int:
    """Cast a piece and write its runs of bytes at their places; returns how many."""
    stored = bytes_of(values.to(device="cpu", dtype=torch_dtype(span.dtype)).contiguous())
    itemsize = span.nbytes // max(1, span.numel)
    done = 0
    for first, count in runs(span.shape, *piece):
        file.write(stored[done : done + count * itemsize], span.start + first * itemsize)
        done += count * itemsize
    return done

"""A storage writer with which torch's distributed checkpoint writes final Hugging Face files in one dtype, in one pass.

The life cycle is that of `fp8ckpt.checkpoint.directory_writer`. The files are a base's, or as many as
``max_file_bytes`` requires; each region is cast to its stored dtype piece by piece as it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from fp8ckpt.checkpoint.directory_writer import DirectoryWriter, given_like
from fp8ckpt.checkpoint.items import Rounds, region_of, resolved, write_region
from fp8ckpt.checkpoint.regions import RegionLoader, dequantizers, rounds
from fp8ckpt.errors import RangeError, listed
from fp8ckpt.numerics import quantize
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.numerics.dequantize import bits_dtype
from fp8ckpt.numerics.geometry import Region, pieces, within
from fp8ckpt.output.layout import DEFAULT_FILE_BYTES, FileLayout, TensorSpec, index_text, lay_out_in_files
from fp8ckpt.output.like import PlainLayout
from fp8ckpt.output.matching import FLOATS, refuse_other_kinds
from fp8ckpt.output.plan import OutputPlan
from fp8ckpt.output.staging import Files
from fp8ckpt.ranks import threads_of_this_rank
from fp8ckpt.stores.local import local_file
from fp8ckpt.stores.store import Bytes
from fp8ckpt.targets import TARGETS, refuse_count, target_of
from fp8ckpt.tensors.checkpoint import CheckpointLike
from fp8ckpt.tensors.directory import INDEX
from fp8ckpt.tensors.reading import bytes_of, stored_dtype, torch_dtype
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.workers import share

logger = logging.getLogger(__name__)

_PIECE = 4 << 20  # elements that are cast and written at once


@dataclass(frozen=True)
class SideFiles:
    """Files that go beside the weights: by name, their bytes or the file to copy."""

    texts: Mapping[str, bytes] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)


class SafetensorsStorageWriter(DirectoryWriter):
    """A storage writer of one directory of safetensors files.

    ``dtype``: of every floating-point tensor, "bf16", "fp16" or "fp32", or torch's. ``like``: a checkpoint with the
    same logical tensors; it decides the files, the dtype of tensors that it does not hold as FP8, and the side files,
    as in ``convert(like, ..., to=dtype)``; ``base`` is its former name. ``carry``: names of tensors that are taken from
    it if the state dict lacks them; those of MTP layers always are. Without ``like``, ``side_files`` go beside the
    weights, a new file begins at ``max_file_bytes`` (default: 5 GB), the tensors that ``keep`` of any rank names keep
    their dtype, and a warning names those that are rounded. ``process_group``: the one that ``dcp.save`` is given;
    needed if ``path`` is a store's. ``bytes_written`` counts this rank's tensor bytes.

    Raises, on every rank: `ModelMismatchError` for tensors, shapes or kinds of values other than those of ``like``, and
    `RangeError` for finite values that the stored dtype cannot hold. ``dcp.save`` raises them inside torch's
    ``CheckpointException``.

    >>> import torch.distributed.checkpoint as dcp
    >>> writer = fp8ckpt.SafetensorsStorageWriter("weights", dtype="fp32")
    >>> _ = dcp.save({"x": torch.ones(2, 3)}, storage_writer=writer, no_dist=True)
    >>> fp8ckpt.open_checkpoint("weights").read("x").shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "bf16",
        like: CheckpointLike | None = None,
        carry: Collection[str] = (),
        keep: Collection[str] = (),
        side_files: SideFiles | None = None,
        max_file_bytes: int | None = None,
        process_group: ProcessGroup | None = None,
        base: CheckpointLike | None = None,
    ) -> None:
        super().__init__(path, given_like(like, base), carry, process_group)
        refuse_count("max_file_bytes", max_file_bytes)
        self._dtype = TARGETS[target_of(dtype, TARGETS, "dtype")]
        if self._like is not None and (max_file_bytes is not None or side_files is not None):
            raise ValueError("max_file_bytes and side_files go without like, which decides the files")
        self._keep = keep
        self._side_files = side_files or SideFiles()
        self._max_file_bytes = DEFAULT_FILE_BYTES if max_file_bytes is None else max_file_bytes

    def _said(self) -> dict[str, Any]:
        own = {"keep": self._keep, "dtype": self._dtype, "max_file_bytes": self._max_file_bytes}
        return {**super()._said(), **own}

    def _refuse_unlike(self, said: list[dict[str, Any]]) -> None:
        self._keep = {*chain.from_iterable(one.pop("keep", ()) for one in said)}  # stages hold different tensors
        super()._refuse_unlike(said)

    def _planned(self, tensors: dict[str, TensorSpec]) -> tuple[OutputPlan, Mapping[str, str]]:
        if (base := self._base_of_output()) is None:
            output = self._planned_alone(tensors)
        else:
            self._carried_from(base, tensors, "give the base that the model came from")
            refuse_other_kinds(tensors, base)
            output = OutputPlan((base,), {"job": "save"}, *PlainLayout.of(base, self._dtype))
        stored = (span.name for layout in output.layouts for span in layout.spans)
        return output, {name: name for name in stored if name not in self._carried}

    def _planned_alone(self, tensors: dict[str, TensorSpec]) -> OutputPlan:
        specs = [spec._replace(dtype=self._stored_dtype(spec)) for spec in tensors.values()]
        rounded = [
            spec.name for spec in specs if rounds(torch_dtype(tensors[spec.name].dtype), torch_dtype(spec.dtype))
        ]
        if rounded:
            self._notes.append(f"{len(rounded)} tensors are rounded to {self._dtype}: {listed(rounded)}")
            logger.warning("%s: %s", self._output.destination, self._notes[-1])
        layouts = lay_out_in_files(specs, self._max_file_bytes)
        texts = dict(self._side_files.texts)
        if len(layouts) > 1:
            texts[INDEX] = index_text(layouts)
        copies = {name: local_file(file) for name, file in self._side_files.copies.items()}
        return OutputPlan((), {"job": "save"}, tuple(layouts), texts, copies)

    def _shared_out(self, plans: list[SavePlan], output: OutputPlan) -> Iterator[dict[str, TensorSpan]]:
        spans = {span.name: span for layout in output.layouts for span in layout.spans}
        for plan in plans:
            yield {item.index.fqn: spans[item.index.fqn] for item in plan.items}

    def _write(self, own: dict[str, TensorSpan], planner: SavePlanner, rounds: Rounds) -> int:
        def write(items: Iterable[WriteItem]) -> int:
            return write_plain(rounds.files, planner, ((item, own[item.index.fqn]) for item in items), _PIECE)

        return sum(written[rounds.ranks.rank] for written in rounds.write(write))

    def _complete(self, layout: FileLayout, files: Files) -> int:
        """Write what is carried from the base."""
        base = self._base_of_output()
        carried = [span for span in layout.spans if span.name in self._carried]
        if base is None or not carried:
            return 0
        loader = RegionLoader(dequantizers(1), 1)
        for span in carried:
            for piece in pieces(((0,) * len(span.shape), span.shape), _PIECE):
                values = torch.empty(piece[1], dtype=torch_dtype(span.dtype))
                loader.load(base[span.name], piece, values)
                write_region(files, span, piece, bytes_of(values))
        return sum(span.nbytes for span in carried)

    def _stored_dtype(self, spec: TensorSpec) -> str:
        return self._dtype if spec.dtype in FLOATS and spec.name not in self._keep else spec.dtype


def write_plain(files: Files, planner: SavePlanner, items: Iterable[tuple[WriteItem, TensorSpan]], most: int) -> int:
    """Write what is not quantized, in pieces of at most ``most`` elements, with all threads of this rank; return the
    number of bytes.
    """
    written: list[int] = []

    def cut() -> Iterator[tuple[TensorSpan, Region, torch.Tensor]]:
        for item, span in items:
            region, values = region_of(item), resolved(planner, item)
            for piece in pieces(region, most):
                yield span, piece, values[within(piece, region)]

    def write(part: tuple[TensorSpan, Region, torch.Tensor]) -> None:
        span, piece, values = part
        written.append(write_region(files, span, piece, cast(values, span)))

    share(cut(), [write] * threads_of_this_rank())
    return sum(written)


def cast(values: torch.Tensor, span: TensorSpan) -> Bytes:
    """Return the bytes of a piece of a tensor in its stored dtype; if the dtypes differ, rounded as a conversion
    rounds.

    Raises `RangeError` if a finite value becomes infinite.
    """
    values = values.to("cpu").contiguous()
    given = stored_dtype(values.dtype) or ""
    if given == span.dtype:
        return bytes_of(values)
    beyond = 0  # values beyond float32
    if given not in TARGET_BYTES:  # float64, which no kernel takes
        finite = values.isfinite()
        values = values.to(torch.float32)
        beyond = int((finite & ~values.isfinite()).sum())
    stored = np.empty(values.numel(), bits_dtype(span.dtype))
    as_floats = quantize.values_of(bytes_of(values), stored_dtype(values.dtype) or "").floats
    overflown = beyond + quantize.round_to(as_floats, span.dtype, stored)
    if overflown:
        raise RangeError.of_cast(span, given, overflown, beyond_all=beyond > 0)
    return stored.view(np.uint8)

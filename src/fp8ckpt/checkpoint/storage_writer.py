"""A storage writer that makes torch's distributed checkpoint write final Hugging Face files in one dtype, in one pass.

Its life is that of `fp8ckpt.checkpoint.directory_writer`. The files are a base's, or as many as ``max_file_bytes``
makes; each region is cast to its stored dtype piece by piece as it is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from fp8ckpt.checkpoint.directory_writer import DirectoryWriter, region_of, resolved, write_region
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.numerics.geometry import Region, pieces, within
from fp8ckpt.output.files import OutputFiles
from fp8ckpt.output.layout import FileLayout, TensorSpec, index_text, lay_out
from fp8ckpt.output.matching import refuse_other_tensors
from fp8ckpt.output.plan import OutputPlan
from fp8ckpt.ranks import threads_of_this_rank
from fp8ckpt.tensors.checkpoint import INDEX, Checkpoint
from fp8ckpt.tensors.header import TensorSpan, tensor_nbytes
from fp8ckpt.tensors.pairing import QuantizedTensor
from fp8ckpt.tensors.reading import bytes_of, torch_dtype
from fp8ckpt.workers import share

_PIECE = 4 << 20  # elements that are cast and written at once

DEFAULT_FILE_BYTES = 5_000_000_000  # the size at which Hugging Face begins another file, too


@dataclass(frozen=True)
class SideFiles:
    """Files that go beside the weights: by name, their bytes or the file to copy."""

    texts: Mapping[str, bytes] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)


class SafetensorsStorageWriter(DirectoryWriter):
    """Writes one directory of safetensors files.

    ``dtype``: that of every floating-point tensor, BF16, F16 or F32 (a safetensors name). ``base``: a checkpoint with
    the same logical tensors, which decides the file of each and the dtype of those that it does not hold as FP8.
    ``max_file_bytes``: without a base, where a new file begins. ``bytes_written`` counts this rank's tensor bytes.
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
        super().__init__(path)
        self._dtype = dtype
        self._base = base
        self._side_files = side_files or SideFiles()
        self._max_file_bytes = max_file_bytes

    def _base_of_output(self) -> Checkpoint | None:
        return self._base

    def _planned(self, tensors: dict[str, TensorSpec]) -> OutputPlan:
        base = self._base
        if base is not None:
            refuse_other_tensors(tensors, base, "model", "give the base that the model came from")
        layouts = self._partition([spec._replace(dtype=self._stored_dtype(spec)) for spec in tensors.values()])
        texts = dict(self._side_files.texts)
        if len(layouts) > 1 or (base is not None and base.index is not None):
            name = base.index_name if base is not None else None
            texts[name or INDEX] = index_text(layouts)
        inputs = () if base is None else (base,)
        return OutputPlan(inputs, {"job": "save"}, tuple(layouts), texts, self._side_files.copies)

    def _shared_out(self, plans: list[SavePlan], output: OutputPlan) -> list[SavePlan]:
        spans = {span.name: span for layout in output.layouts for span in layout.spans}
        return [
            dataclasses.replace(plan, storage_data={item.index.fqn: spans[item.index.fqn] for item in plan.items})
            for plan in plans
        ]

    def _write(self, plan: SavePlan, planner: SavePlanner, files: OutputFiles) -> int:
        spans: dict[str, TensorSpan] = plan.storage_data or {}
        written: list[int] = []

        def work() -> Iterator[tuple[TensorSpan, Region, torch.Tensor]]:
            for item in plan.items:
                region, tensor = region_of(item), resolved(planner, item)
                for piece in pieces(region, _PIECE):
                    yield spans[item.index.fqn], piece, tensor[within(piece, region)]

        share(work(), [lambda part: written.append(_write_piece(files, *part))] * threads_of_this_rank())
        files.flush()
        return sum(written)

    def _stored_dtype(self, spec: TensorSpec) -> str:
        tensor = self._base.tensors[spec.name] if self._base is not None else None
        if isinstance(tensor, TensorSpan):
            return tensor.dtype
        return self._dtype if spec.dtype in TARGET_BYTES or spec.dtype == "F64" else spec.dtype

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
        return [
            lay_out(f"model-{i:05d}-of-{len(contents):05d}.safetensors", part, metadata)
            for i, part in enumerate(contents, 1)
        ]


def _write_piece(files: OutputFiles, span: TensorSpan, piece: Region, values: torch.Tensor) -> int:
    """Cast a piece and write it; returns how many bytes."""
    return write_region(
        files, span, piece, bytes_of(values.to(device="cpu", dtype=torch_dtype(span.dtype)).contiguous())
    )

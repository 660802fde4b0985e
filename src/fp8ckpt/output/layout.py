"""An output file as a pure function of names, dtypes and shapes: its header and every offset, before any byte is
written.

Tensors are ordered and the header is written as the safetensors library does it (wider dtypes first, then by name; data
from a multiple of 8 bytes on), so that a file of ours equals, byte for byte, the one that library would write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fp8ckpt.stores.memory import PLANNED
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.config import dump_json
from fp8ckpt.tensors.header import Header
from fp8ckpt.tensors.stored import TensorSpan, tensor_nbytes

# The library's own order, from the front of a file to its end; within one dtype, tensors are sorted by name.
_DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPE_ORDER)}


DEFAULT_FILE_BYTES = 5_000_000_000  # the default of Hugging Face, too


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class FileLayout(NamedTuple):
    """One output file. ``head`` is everything before the data; ``spans`` are in the order of the data, with `PLANNED`
    as the store of their file.
    """

    name: str
    head: bytes
    spans: tuple[TensorSpan, ...]
    size: int


def lay_out(name: str, tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    """Lay out one file."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    ordered = sorted(tensors, key=lambda tensor: (_RANK[tensor.dtype], tensor.name.encode()))
    offsets = []
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor_nbytes(tensor.dtype, tensor.shape)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        offsets.append((start, end))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    file = File(PLANNED, name)
    spans = tuple(
        TensorSpan(tensor.name, file, tensor.dtype, tensor.shape, len(head) + start, len(head) + stop)
        for tensor, (start, stop) in zip(ordered, offsets, strict=True)
    )
    return FileLayout(name, head, spans, len(head) + end)


def lay_out_in_files(tensors: Iterable[TensorSpec], most: int) -> list[FileLayout]:
    """Lay out tensors, in this order, in as few files of at most ``most`` bytes of data as that allows, each with at
    least one tensor, under Hugging Face's names.
    """
    metadata = {"format": "pt"}
    contents: list[list[TensorSpec]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor_nbytes(tensor.dtype, tensor.shape)
        if filled + size > most and contents[-1]:
            contents.append([])
            filled = 0
        contents[-1].append(tensor)
        filled += size
    if len(contents) == 1:
        return [lay_out("model.safetensors", contents[0], metadata)]
    names = (f"model-{i:05d}-of-{len(contents):05d}.safetensors" for i in range(1, len(contents) + 1))
    return [lay_out(name, part, metadata) for name, part in zip(names, contents, strict=True)]


def lay_out_again(header: Header, tensors: Iterable[TensorSpec]) -> FileLayout:
    """Lay out other tensors under the name of an existing file, with its metadata."""
    return lay_out(header.file.name, tensors, {**header.metadata, "format": header.metadata.get("format", "pt")})


def index_text(layouts: Iterable[FileLayout], before: Mapping[str, object] | None = None) -> bytes:
    """The bytes of the index of these files; the metadata of an index that was there ``before`` is kept."""
    metadata = (before or {}).get("metadata")
    return dump_json(index_of(layouts, metadata if isinstance(metadata, dict) else {}), sort_keys=True)


def index_of(layouts: Iterable[FileLayout], metadata: Mapping[str, object]) -> dict[str, object]:
    """The index of these files: ``total_size`` in bytes and the map of tensors to files; other ``metadata`` is kept."""
    layouts = list(layouts)
    spans = [span for layout in layouts for span in layout.spans]
    kept: dict[str, object] = {**metadata, "total_size": sum(span.nbytes for span in spans)}
    if "total_parameters" in kept:
        kept["total_parameters"] = sum(span.numel for span in spans)
    return {"metadata": kept, "weight_map": {span.name: layout.name for layout in layouts for span in layout.spans}}

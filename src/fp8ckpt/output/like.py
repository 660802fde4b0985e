"""An output directory in the layout of an existing checkpoint: with its names, order, headers and side files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fp8ckpt.errors import UnsupportedFormatError
from fp8ckpt.numerics.codes import CODE_FORMATS
from fp8ckpt.output.layout import (
    DEFAULT_FILE_BYTES,
    FileLayout,
    TensorSpec,
    index_text,
    lay_out_again,
    lay_out_in_files,
)
from fp8ckpt.output.side_files import plain_side_files, side_files
from fp8ckpt.stores.memory import PLANNED
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.blocks import block_sizes
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import (
    CONFIG,
    MISTRAL_CONFIG,
    Json,
    dump_json,
    metadata_without_quantization,
    modelopt_quantization,
    quantization_config,
)
from fp8ckpt.tensors.directory import INDEX
from fp8ckpt.tensors.groups import one_by_one
from fp8ckpt.tensors.header import Header
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.tensor import Tensor


def has_activation_scales(base: Checkpoint) -> bool:
    """Whether every FP8 weight has its activation scale: static scaling can be served only with all of them."""
    return all(tensor.activation_scales for tensor in base.quantized)


def with_needless_dimensions(base: Checkpoint) -> list[QuantizedTensor]:
    """The FP8 matrices whose one scale has shape ``[1, 1]``; except in block formats, and for matrices of one row,
    where that is right.
    """
    if block_sizes(base.store, base.config).stated:
        return []
    one = [tensor for tensor in base.quantized if tensor.scale.numel == 1 and len(tensor.scale.shape) > 1]
    return [tensor for tensor in one if len(tensor.shape) == 2 and tensor.shape[0] != 1]


class PlainLayout(NamedTuple):
    """The files of a checkpoint with its FP8 weights in another dtype: weight files, ``texts`` that are written anew,
    and ``copies`` of others.
    """

    layouts: tuple[FileLayout, ...]
    texts: dict[str, bytes]
    copies: dict[str, File]

    @classmethod
    def of(cls, base: Checkpoint, dtype: str) -> PlainLayout:
        """FP8 weights in ``dtype``, others in their own; no scales, and no quantization in the configuration."""
        layouts = []
        for header in base.files:
            logical = base.tensors_in(header)
            specs = [TensorSpec(t.name, dtype if dtype in t.dtypes() else t.dtype, t.shape) for t in logical]
            if specs or not header.spans:  # a file that held only scales is left out
                metadata = metadata_without_quantization(header.metadata)
                layouts.append(lay_out_again(header._replace(metadata=metadata), specs))
        texts, copies = plain_side_files(base, dtype)
        if base.index is not None or len(layouts) > 1:
            texts[base.index_name or INDEX] = index_text(layouts, base.index)
        return cls(tuple(layouts), texts, copies)

    @classmethod
    def of_tensors(cls, base: Checkpoint, tensors: Mapping[str, Tensor], dtype: str) -> PlainLayout:
        """The same for ``tensors`` made of the base's, in files of their own."""
        specs = []
        for name, tensor in tensors.items():
            if dtype not in tensor.dtypes() and any(span.dtype in CODE_FORMATS for span in tensor.spans):
                raise UnsupportedFormatError.of_codes_and_others(name, dtype=tensor.dtype)
            specs.append(TensorSpec(name, dtype if dtype in tensor.dtypes() else tensor.dtype, tensor.shape))
        layouts = lay_out_in_files(specs, DEFAULT_FILE_BYTES)
        texts, copies = plain_side_files(base, dtype)
        if len(layouts) > 1:
            texts[INDEX] = index_text(layouts)
        return cls(tuple(layouts), texts, copies)


class BaseLayout:
    """The files of an output in a base's layout: the base's own or, with a ``served`` configuration, corrected for
    engines.

    Corrected: scales of whole matrices of shape ``[1, 1]`` become ``[1]``; activation scales are left out if not all
    weights have them, unless modules are stated one by one; the configuration is the given one; several files get an
    index; Mistral's ``params.json`` is left out beside Hugging Face files. ``layouts``: weight files; ``texts``: files
    that are written anew; ``copies``: files that are copied.
    """

    def __init__(self, base: Checkpoint, *, served: Json | None = None) -> None:
        self._base = base
        quantized = base.quantized
        self._left_out: set[str] = set()
        self._flat: set[str] = set()
        if served is not None:
            stated = (quantization_config(base.config), modelopt_quantization(base.store))
            if not any(map(one_by_one, stated)) and not has_activation_scales(base):
                self._left_out = {span.name for tensor in quantized for span in tensor.activation_scales}
            self._flat = {tensor.scale.name for tensor in with_needless_dimensions(base)}
        self.layouts = tuple(self._layout(header) for header in base.files)
        self.texts: dict[str, bytes] = {}
        self.copies = side_files(base)
        self._add_index(always=served is not None)
        if served is not None and CONFIG in self.copies:
            self.copies.pop(MISTRAL_CONFIG, None)
            if served != base.config:
                del self.copies[CONFIG]
                self.texts[CONFIG] = dump_json(served)

    def _layout(self, header: Header) -> FileLayout:
        name = header.file.name
        if not any(span.name in self._left_out or span.name in self._flat for span in header.spans):
            head = len(header.text).to_bytes(8, "little") + header.text
            spans = tuple(span._replace(file=File(PLANNED, name)) for span in header.spans)
            return FileLayout(name, head, spans, header.size)
        specs = [
            TensorSpec(span.name, span.dtype, (1,) if span.name in self._flat else span.shape)
            for span in header.spans
            if span.name not in self._left_out
        ]
        return lay_out_again(header, specs)

    def _add_index(self, *, always: bool) -> None:
        name, index = self._base.index_name, self._base.index
        if name is not None and index is not None and not self._left_out:
            self.copies[name] = File(self._base.store, name)
        elif index is not None or (always and len(self.layouts) > 1):
            self.texts[name or INDEX] = index_text(self.layouts, index)

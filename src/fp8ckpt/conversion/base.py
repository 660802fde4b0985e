"""FP8 in the base's own layout: the base decides everything that a file can decide.

Which tensors are FP8, names, grids, scale dtypes and shapes, the dtypes of what is not quantized, files and their order, down to the
text of every header, configuration and side files. Only values are the source's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fp8ckpt.checkpoint.naming import find_layout
from fp8ckpt.conversion.planning import OutputPlan, refuse_inside
from fp8ckpt.conversion.quantizing import Quantization, QuantizingPlan, refuse_mismatches, source_tensors
from fp8ckpt.errors import UnsupportedFormatError
from fp8ckpt.storage.checkpoint import INDEX, Checkpoint, open_checkpoint, raise_first
from fp8ckpt.storage.config import CONFIG, MISTRAL_CONFIG, dump_json
from fp8ckpt.storage.files import LastFile, read_into
from fp8ckpt.storage.header import Header, TensorSpan
from fp8ckpt.storage.layout import FileLayout, TensorSpec, index_of, lay_out
from fp8ckpt.storage.pairing import QuantizedTensor
from fp8ckpt.storage.partial import PartialOutput
from fp8ckpt.storage.reading import scale_defects
from fp8ckpt.storage.siblings import sibling_units
from fp8ckpt.storage.side_files import side_files


def plan_like(source: str | Path, base: str | Path, output: PartialOutput, *, fresh: bool, report: bool, serving: bool) -> QuantizingPlan:
    """Everything that can be known or refused before the first byte is written."""
    output.refuse_existing()
    given, like = open_checkpoint(source), open_checkpoint(base)
    refuse_inside(output, given, "source")
    refuse_inside(output, like, "base")
    if not like.quantized:
        remedy = "give the FP8 checkpoint that the source came from, or choose a --scheme"
        raise UnsupportedFormatError("none of its tensors is FP8", file=str(like.path), expected="an FP8 base", remedy=remedy)
    raise_first(scale_defects(like.quantized, like.cache_scales))
    naming = find_layout(given.tensors, like.tensors)
    tensors = source_tensors(given, {name: naming.native_to_hf(name) for name in given.tensors})
    refuse_mismatches(given, tensors, like)
    changes = BaseLayout(like, serving=serving)
    spans = {span.name: span for layout in changes.layouts for span in layout.spans}
    weights = {
        tensor.name: Quantization(tensors[tensor.name], spans[tensor.name], spans[tensor.scale.name], tensor.grid, tensor)
        for tensor in like.quantized
    }
    scales = {tensor.scale.name for tensor in like.quantized}
    stored = {span.name: span for header in like.files for span in header.spans}
    plain = {name: tensors.get(name, stored[name]) for name in spans if name not in weights and name not in scales}
    arguments = {"job": "quantize", "fresh": fresh, "report": report}
    return QuantizingPlan(
        output=OutputPlan((given, like), arguments, changes.layouts, changes.texts, changes.copies),
        source=given,
        base=like,
        weights=weights,
        plain=plain,
        units=tuple(equal_units(weights.values())),
        fresh=fresh,
        report=report,
        notes=tuple(_side_file_notes(given, like)),
    )


class BaseLayout:
    """The files of an output in a base's layout: the base's own, or, ``serving``, with what engines trip over put right.

    Put right: scales of shape ``[1, 1]`` become ``[1]``; activation scales that are not there for all weights are left out; the skip
    list and the activation scheme of the configuration are completed; several files get an index; Mistral's ``params.json`` is left
    out beside Hugging Face files.
    """

    def __init__(self, base: Checkpoint, *, serving: bool) -> None:
        self._base = base
        quantized = base.quantized
        self._static = all(tensor.activation_scales for tensor in quantized)
        self._left_out: set[str] = set()
        self._flat: set[str] = set()
        if serving:
            if not self._static:
                self._left_out = {span.name for tensor in quantized for span in tensor.activation_scales}
            self._flat = {tensor.scale.name for tensor in quantized if tensor.grid.per_tensor and len(tensor.scale.shape) > 1}
        self.layouts = tuple(self._layout(header) for header in base.files)
        self.texts: dict[str, bytes] = {}
        self.copies = side_files(base)
        self._add_index(always=serving)
        if serving:
            self._correct()

    def _layout(self, header: Header) -> FileLayout:
        name = header.file.name
        if not any(span.name in self._left_out or span.name in self._flat for span in header.spans):
            head = len(header.text).to_bytes(8, "little") + header.text
            return FileLayout(name, head, tuple(span._replace(file=Path(name)) for span in header.spans), header.size)
        specs = [
            TensorSpec(span.name, span.dtype, (1,) if span.name in self._flat else span.shape)
            for span in header.spans
            if span.name not in self._left_out
        ]
        return lay_out(name, specs, {**header.metadata, "format": header.metadata.get("format", "pt")})

    def _add_index(self, *, always: bool) -> None:
        name, index = self._base.index_name, self._base.index
        if name is not None and index is not None and not self._left_out:
            self.copies[name] = self._base.path / name
        elif index is not None or (always and len(self.layouts) > 1):
            metadata = (index or {}).get("metadata")
            self.texts[name or INDEX] = dump_json(index_of(self.layouts, metadata if isinstance(metadata, dict) else {}), sort_keys=True)

    def _correct(self) -> None:
        from fp8ckpt.serving import serving_config

        if CONFIG not in self.copies:
            return
        self.copies.pop(MISTRAL_CONFIG, None)
        corrected = serving_config(self._base, static=self._static)
        if corrected != self._base.config:
            del self.copies[CONFIG]
            self.texts[CONFIG] = dump_json(corrected)


def equal_units(weights: Iterable[Quantization]) -> list[tuple[str, ...]]:
    """The wide weights, each alone or with those siblings whose one scale equals its own (or that have no scale yet)."""
    wide = {weight.name: weight for weight in weights if weight.wide}
    single = {name: weight for name, weight in wide.items() if weight.grid.per_tensor}
    units: list[tuple[str, ...]] = []
    file = LastFile()
    try:
        for siblings in sibling_units(single):
            by_scale: dict[bytes, list[str]] = {}
            for name in siblings:
                before = single[name].before
                by_scale.setdefault(_stored(before, file) if before is not None else b"", []).append(name)
            units += [tuple(names) for names in by_scale.values()]
    finally:
        file.close()
    together = {name for unit in units for name in unit}
    return units + [(name,) for name in wide if name not in together]


def _stored(tensor: QuantizedTensor, file: LastFile) -> bytes:
    span: TensorSpan = tensor.scale
    stored = np.empty(span.nbytes, np.uint8)
    read_into(file.descriptor(span.file), stored, span.start, span.file)
    return span.dtype.encode() + stored.tobytes()


def _side_file_notes(source: Checkpoint, base: Checkpoint) -> list[str]:
    """Side files of the source that the output will not have, since the base's go out."""
    ours, theirs = side_files(source), side_files(base)
    notes = []
    for name in sorted(ours.keys() - {CONFIG, MISTRAL_CONFIG}):
        if name not in theirs:
            notes.append(f"{name} is only in the source, and is not written")
        elif ours[name].stat().st_size != theirs[name].stat().st_size or ours[name].read_bytes() != theirs[name].read_bytes():
            notes.append(f"{name} differs in the source; the base's is written")
    return notes

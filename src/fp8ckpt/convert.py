"""Convert a directory of FP8 safetensors to the BF16 (or FP16, FP32) directory that a trainer can use.

Plan first, as pure data: the output's files, headers and offsets follow from the source's headers. Then dumb I/O: worker
threads take pieces of the output, fill each from the source (codes through a table look-up, everything else byte for byte)
and write it at its offset. Buffers are reused, so memory is a few MiB a worker whatever the checkpoint's size; every source
byte is read once and every output byte is written once.

The output appears at its name when it is whole and on disk. A run that was cut off is resumed by the same command and ends
with the same bytes. Under torchrun the ranks share the work: call `convert` on all of them.
"""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8ckpt.errors import OutputExistsError, RangeError, StorageError
from fp8ckpt.numerics.codes import TARGET_BYTES, TARGETS
from fp8ckpt.storage.checkpoint import INDEX, Checkpoint, open_checkpoint, raise_first
from fp8ckpt.storage.config import dump_json
from fp8ckpt.storage.files import Bytes, LastFile, copy_whole, create, opened, read_into, write_whole
from fp8ckpt.storage.header import TensorSpan
from fp8ckpt.storage.layout import FileLayout, TensorSpec, index_of, lay_out
from fp8ckpt.storage.pairing import QuantizedTensor
from fp8ckpt.storage.partial import PartialOutput
from fp8ckpt.storage.side_files import plain_side_files
from fp8ckpt.storage.writing import CHUNK, EXTENT, ExtentWriter, Progress, extents_of

if TYPE_CHECKING:
    from fp8ckpt.checkpoint.ranks import Ranks
    from fp8ckpt.numerics.dequantize import Dequantizer

_FP16_OVERFLOW = 65520.0  # the least magnitude that rounds to infinity in float16


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did. Sizes are in bytes; ``nan_codes`` counts, by tensor, the NaN codes that were carried over."""

    destination: Path
    to: str
    files: int
    tensors: int
    dequantized: int
    dropped_scales: int
    bytes_read: int
    bytes_written: int
    bytes_resumed: int
    nan_codes: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class _Plan:
    source: Checkpoint
    dtype: str
    layouts: tuple[FileLayout, ...]
    texts: dict[str, bytes]  # files that are written anew: index and configuration
    copies: dict[str, Path]  # files that are copied, by their path in the directory

    @property
    def names(self) -> set[str]:
        """Every file of the finished directory, by its path in it."""
        return {layout.name for layout in self.layouts} | set(self.texts) | set(self.copies)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a partial output to be taken up: the source's files, and every byte that is planned."""
        digest = hashlib.sha256()
        for layout in self.layouts:
            digest.update(layout.head)
        for name, text in sorted(self.texts.items()):
            digest.update(name.encode() + b"\0" + text)
        sources = {
            header.file.name: [header.size, header.file.stat().st_mtime_ns, hashlib.sha256(header.text).hexdigest()]
            for header in self.source.files
        }
        return {"format": 1, "job": "convert", "dtype": self.dtype, "extent": EXTENT, "sources": sources, "planned": digest.hexdigest()}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "bf16",
    workers: int | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Convert ``source`` to ``destination`` with every FP8 weight dequantized to ``to``: "bf16", "fp16" or "fp32".

    The same files hold the same tensors, less the scales; unquantized tensors keep their bytes. The configuration loses its
    ``quantization_config``, the index is made anew, and every other file is copied, but for Mistral's own copy of the
    weights (``consolidated*.safetensors``) and ``hf_quant_config.json``. ``workers`` (default: the cores of this process) changes speed
    and never output. ``progress`` is called with (bytes of this call's output written so far, in all).

    Raises the defect's own `Fp8CheckpointError` before anything is written; `OutputExistsError` where the destination
    exists; `StorageError` where the disk refuses, with what was written kept for the next run.
    """
    from fp8ckpt.checkpoint.ranks import ranks_of_this_job, threads_of_this_rank

    if to not in TARGETS:
        raise ValueError(f"to={to!r}; expected one of {', '.join(TARGETS)}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}; expected at least 1")
    output = PartialOutput(Path(destination).absolute())
    try:
        with ranks_of_this_job() as ranks:
            return _run(source, output, to, workers or threads_of_this_rank(), progress, ranks)
    except StorageError as error:
        if not output.directory.exists():
            raise
        remedy = f"{error.remedy}; what was written is in {output.directory}, and the same command goes on from there"
        raise StorageError(error.found, tensor=error.tensor, file=error.file, expected=error.expected, remedy=remedy) from error
    finally:
        output.release()


def _run(source: str | Path, output: PartialOutput, to: str, workers: int, progress: Progress | None, ranks: Ranks) -> ConvertResult:
    from fp8ckpt.storage.reading import load_dequantizer

    begun = time.monotonic()
    plan = ranks.together(lambda: _plan(source, output, TARGETS[to]))
    # What is done is what the first rank saw: others may be writing by the time that the last one looks.
    done = ranks.gather(lambda: _begin(plan, output) if ranks.rank == 0 else {})[0]
    extents = extents_of(plan.layouts)
    mine = [i for i in range(len(extents)) if i not in done][ranks.rank :: ranks.size]
    # Neighbouring chunks are of one tensor, and workers stay close together.
    dequantizer = lru_cache(maxsize=2 * workers)(partial(load_dequantizer, dtype=plan.dtype))
    fillers = [_Filler(plan, dequantizer) for _ in range(workers)]

    def write() -> int:
        ExtentWriter(output, ranks.rank, extents, mine, progress).run(fillers)
        return sum(filler.bytes_read for filler in fillers)

    bytes_read = sum(ranks.gather(write))
    nan_codes = ranks.gather(lambda: _publish(output) if ranks.rank == 0 else {})[0]
    quantized = plan.source.quantized
    return ConvertResult(
        destination=output.destination,
        to=to,
        files=len(plan.layouts) + len(plan.texts) + len(plan.copies),
        tensors=len(plan.source.tensors),
        dequantized=len(quantized),
        dropped_scales=sum(1 + len(tensor.activation_scales) for tensor in quantized) + len(plan.source.cache_scales),
        bytes_read=bytes_read,
        bytes_written=sum(layout.size for layout in plan.layouts),
        bytes_resumed=sum(extents[i].stop - extents[i].start for i in done),
        nan_codes=nan_codes,
        seconds=time.monotonic() - begun,
    )


def _plan(source: str | Path, output: PartialOutput, dtype: str) -> _Plan:
    """Everything that can be known or refused before the first byte is written."""
    from fp8ckpt.storage.reading import scale_defects

    output.refuse_existing()
    checkpoint = open_checkpoint(source)
    if output.destination.resolve().is_relative_to(checkpoint.path.resolve()):
        found = f"the destination lies inside the source {checkpoint.path}"
        raise OutputExistsError(found, file=str(output.destination), expected="a path outside it", remedy="choose another one")
    raise_first(scale_defects(checkpoint.quantized, checkpoint.cache_scales))
    if dtype == "F16":
        for tensor in checkpoint.quantized:
            if tensor.numel:
                _refuse_overflow(tensor)
    layouts = []
    for header in checkpoint.files:
        logical = [checkpoint.tensors[span.name] for span in header.spans if span.name in checkpoint.tensors]
        specs = [TensorSpec(t.name, dtype if isinstance(t, QuantizedTensor) else t.dtype, t.shape) for t in logical]
        if specs or not header.spans:  # a file of nothing but scales has nothing left to hold
            layouts.append(lay_out(header.file.name, specs, {**header.metadata, "format": header.metadata.get("format", "pt")}))
    texts, copies = plain_side_files(checkpoint, dtype)
    if checkpoint.index is not None or len(layouts) > 1:
        metadata = (checkpoint.index or {}).get("metadata")
        texts[checkpoint.index_name or INDEX] = dump_json(index_of(layouts, metadata if isinstance(metadata, dict) else {}), sort_keys=True)
    return _Plan(checkpoint, dtype, tuple(layouts), texts, copies)


def _refuse_overflow(tensor: QuantizedTensor) -> None:
    """Float16 ends at 65504. A tensor whose finite codes go beyond is refused; its codes are read only if its scales allow it."""
    import numpy as np

    from fp8ckpt.numerics.codes import code_values
    from fp8ckpt.storage.reading import load_dequantizer

    dequantizer = load_dequantizer(tensor, "F16")
    values = code_values(tensor.weight.dtype)
    largest = float(values[np.isfinite(values)].max())
    if float(dequantizer.scales.max(initial=0)) * largest < _FP16_OVERFLOW:
        return
    codes = np.empty(CHUNK // 2, np.uint8)
    halves = np.empty(codes.size, np.uint16)
    count = 0
    with opened(tensor.weight.file) as fd:
        for start in range(0, tensor.numel, codes.size):
            part = codes[: min(codes.size, tensor.numel - start)]
            read_into(fd, part, tensor.weight.start + start, tensor.weight.file)
            dequantizer.flat(part, start, halves[: part.size])
            count += int(np.count_nonzero(np.isinf(halves[: part.size].view(np.float16)) & np.isfinite(values[part])))
    if count:
        found = f"{count} elements go beyond 65504, the largest float16"
        raise RangeError(found, tensor=tensor.name, file=tensor.weight.file, remedy="convert to bf16 or fp32")


def _begin(plan: _Plan, output: PartialOutput) -> dict[int, dict[str, int]]:
    """What one process does for all: the directory, its empty files, and the small files. Returns what was done before."""
    output.begin(plan.fingerprint(), plan.names)
    for layout in plan.layouts:
        create(output.directory / layout.name, layout.size)
    for name, text in plan.texts.items():
        write_whole(output.directory / name, text)
    for name, file in plan.copies.items():
        copy_whole(file, output.directory / name)
    return output.records()


def _publish(output: PartialOutput) -> dict[str, int]:
    """The last step: the NaN codes of all extents, added up before their records go."""
    nan_codes: Counter[str] = Counter()
    for counts in output.records().values():
        nan_codes.update(counts)
    output.publish()
    return dict(sorted(nan_codes.items()))


class _Filler:
    """One worker's reading and dequantizing: fills pieces of the output from the source, with buffers of its own."""

    def __init__(self, plan: _Plan, dequantizer: Callable[[QuantizedTensor], Dequantizer]) -> None:
        import numpy as np

        self._tensors = plan.source.tensors
        self._dequantizer = dequantizer
        self._codes = np.empty(CHUNK // TARGET_BYTES[plan.dtype], np.uint8)
        self._file = LastFile()
        self.bytes_read = 0

    def fill(self, layout: FileLayout, start: int, stop: int, out: Bytes) -> dict[str, int]:
        """Fill ``out`` with the bytes ``[start, stop)`` of an output file; returns the NaN codes met, by tensor."""
        from fp8ckpt.numerics.dequantize import bits_dtype, count_nonfinite

        nan_codes: dict[str, int] = {}
        if start < len(layout.head):
            head = layout.head[start:stop]
            out[: len(head)] = memoryview(head)
        for k in range(bisect_right(layout.spans, start, key=lambda span: span.stop), len(layout.spans)):
            span = layout.spans[k]
            if span.start >= stop:
                break
            low, high = max(span.start, start), min(span.stop, stop)
            if low == high:  # a tensor without elements
                continue
            target = out[low - start : high - start]
            tensor = self._tensors[span.name]
            if isinstance(tensor, TensorSpan):
                self._read(tensor, low - span.start, target)
                continue
            itemsize = TARGET_BYTES[span.dtype]
            first, codes = (low - span.start) // itemsize, self._codes[: (high - low) // itemsize]
            self._read(tensor.weight, first, codes)
            self._dequantizer(tensor).flat(codes, first, target.view(bits_dtype(span.dtype)))
            if count := count_nonfinite(codes, tensor.weight.dtype):
                nan_codes[tensor.name] = count
        return nan_codes

    def _read(self, span: TensorSpan, offset: int, buffer: Bytes) -> None:
        """Fill ``buffer`` from byte ``offset`` of a tensor on."""
        read_into(self._file.descriptor(span.file), buffer, span.start + offset, span.file)
        self.bytes_read += buffer.nbytes

    def close(self) -> None:
        """Close the file that was read last."""
        self._file.close()

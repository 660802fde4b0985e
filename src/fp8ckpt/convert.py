"""Convert a directory of FP8 safetensors to the BF16 (or FP16, FP32) directory that a trainer can use.

Plan first, as pure data: the output's files, headers and offsets follow from the source's headers. Then dumb I/O: worker
threads take *chunks* of the output, page-aligned pieces of a few MiB, fill each from the source (codes through a table
look-up, everything else byte for byte) and write it at its offset. Buffers are reused, so memory is a few MiB a worker
whatever the checkpoint's size; every source byte is read once and every output byte is written once.

The output appears at its name when it is whole and on disk. A run that was cut off is resumed by the same command and ends
with the same bytes. Under torchrun the ranks share the work: call `convert` on all of them.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fp8ckpt.errors import Fp8CheckpointError, OutputExistsError, RangeError, StorageError
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.storage.checkpoint import INDEX, Checkpoint, open_checkpoint, raise_first
from fp8ckpt.storage.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG, dump_json, load_json, without_quantization
from fp8ckpt.storage.files import OutputFile, aligned_buffer, copy_whole, create, opened, read_into, write_whole
from fp8ckpt.storage.header import TensorSpan
from fp8ckpt.storage.layout import FileLayout, TensorSpec, index_of, lay_out
from fp8ckpt.storage.pairing import QuantizedTensor
from fp8ckpt.storage.partial import PartialOutput, partial_of
from fp8ckpt.storage.side_files import side_files

TARGETS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_CHUNK = 4 << 20  # bytes of output; with its codes it stays in a second-level cache, and a disk takes it in one request
_EXTENT = 16 * _CHUNK  # bytes of output between two flushes: what a resumed run may have to write again, per worker
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


class _Extent(NamedTuple):
    """A piece of an output file: the unit of sharing among ranks, of flushing, and of resuming."""

    layout: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Plan:
    source: Checkpoint
    dtype: str
    layouts: tuple[FileLayout, ...]
    texts: dict[str, bytes]  # files that are written anew: index and configuration
    copies: dict[str, Path]  # files that are copied, by their path in the directory

    @property
    def extents(self) -> list[_Extent]:
        return [
            _Extent(i, start, min(start + _EXTENT, layout.size))
            for i, layout in enumerate(self.layouts)
            for start in range(0, layout.size, _EXTENT)
        ]

    @property
    def names(self) -> set[str]:
        """The top-level entries of the finished directory."""
        return {layout.name for layout in self.layouts} | set(self.texts) | {name.split("/")[0] for name in self.copies}

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
        return {"format": 1, "job": "convert", "dtype": self.dtype, "extent": _EXTENT, "sources": sources, "planned": digest.hexdigest()}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "bf16",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertResult:
    """Convert ``source`` to ``destination`` with every FP8 weight dequantized to ``to``: "bf16", "fp16" or "fp32".

    The same files hold the same tensors, less the scales; unquantized tensors keep their bytes. The configuration loses its
    ``quantization_config``, the index is made anew, and every other file is copied, but for Mistral's own copy of the
    weights (``consolidated*``) and ``hf_quant_config.json``. ``workers`` (default: the cores of this process) changes speed
    and never output. ``progress`` is called with (bytes of this call's output written so far, in all).

    Raises the defect's own `Fp8CheckpointError` before anything is written; `OutputExistsError` where the destination
    exists; `StorageError` where the disk refuses, with what was written kept for the next run.
    """
    from fp8ckpt.checkpoint.ranks import ranks_of_this_job

    if to not in TARGETS:
        raise ValueError(f"to={to!r}; expected one of {', '.join(TARGETS)}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}; expected at least 1")
    begun = time.monotonic()
    output = PartialOutput(Path(destination).absolute())
    with ranks_of_this_job() as ranks:
        plan, error = None, None
        done: dict[int, dict[str, Any]] = {}
        try:
            plan = _plan(source, output, TARGETS[to])
            if ranks.rank == 0:
                _begin(plan, output)
                done = output.records()
        except Fp8CheckpointError as caught:
            error = caught
        try:
            done = ranks.agree(error, done)[0]  # as the first rank saw it: others may be writing already
            assert plan is not None  # agree() raised where it is
            extents = plan.extents
            mine = [i for i in range(len(extents)) if i not in done][ranks.rank :: ranks.size]
            job = _Job(plan, output, ranks.rank, mine, progress)
            try:
                job.run(workers or max(1, len(os.sched_getaffinity(0)) // ranks.local_size))
            except Fp8CheckpointError as caught:
                error = caught
            read = sum(ranks.agree(error, job.bytes_read))
            records = output.records()
            if ranks.rank == 0:
                try:
                    output.publish()
                except Fp8CheckpointError as caught:
                    error = caught
            ranks.agree(error)
        except StorageError as caught:
            if partial_of(output.destination).exists():
                caught.remedy = f"{caught.remedy}; what was written is in {output.directory}, and the same command goes on from there"
                raise StorageError(
                    caught.found, tensor=caught.tensor, file=caught.file, expected=caught.expected, remedy=caught.remedy
                ) from caught
            raise
        finally:
            output.release()
    nan_codes: Counter[str] = Counter()
    for record in records.values():
        nan_codes.update(record["nan_codes"])
    quantized = plan.source.quantized
    return ConvertResult(
        destination=output.destination,
        to=to,
        files=len(plan.names),
        tensors=len(plan.source.tensors),
        dequantized=len(quantized),
        dropped_scales=sum(1 + len(tensor.activation_scales) for tensor in quantized) + len(plan.source.cache_scales),
        bytes_read=read,
        bytes_written=sum(layout.size for layout in plan.layouts),
        bytes_resumed=sum(extents[i].stop - extents[i].start for i in done),
        nan_codes=dict(sorted(nan_codes.items())),
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
            _refuse_overflow(tensor)
    layouts = []
    for header in checkpoint.files:
        logical = [checkpoint.tensors[span.name] for span in header.spans if span.name in checkpoint.tensors]
        specs = [TensorSpec(t.name, dtype if isinstance(t, QuantizedTensor) else t.dtype, t.shape) for t in logical]
        if specs or not header.spans:  # a file of nothing but scales has nothing left to hold
            layouts.append(lay_out(header.file.name, specs, {**header.metadata, "format": header.metadata.get("format", "pt")}))
    texts, copies = _side_files(checkpoint, dtype)
    if checkpoint.index is not None or len(layouts) > 1:
        metadata = (checkpoint.index or {}).get("metadata")
        texts[checkpoint.index_name or INDEX] = dump_json(index_of(layouts, metadata if isinstance(metadata, dict) else {}), sort_keys=True)
    return _Plan(checkpoint, dtype, tuple(layouts), texts, copies)


def _side_files(checkpoint: Checkpoint, dtype: str) -> tuple[dict[str, bytes], dict[str, Path]]:
    """The configuration without quantization, and the files to copy."""
    texts: dict[str, bytes] = {}
    copies = side_files(checkpoint)
    copies.pop(MODELOPT_CONFIG, None)
    for name in (CONFIG, MISTRAL_CONFIG):
        if copies.pop(name, None) is not None:
            texts[name] = dump_json(without_quantization(name, load_json(checkpoint.path / name) or {}, dtype))
    return texts, copies


def _refuse_overflow(tensor: QuantizedTensor) -> None:
    """Float16 ends at 65504. A tensor whose finite codes go beyond is refused; its codes are read only if its scales allow it."""
    import numpy as np

    from fp8ckpt.numerics.codes import code_values
    from fp8ckpt.storage.reading import load_dequantizer

    dequantizer = load_dequantizer(tensor, "F16")
    values = code_values(tensor.weight.dtype)
    largest = float(values[np.isfinite(values)].max())
    if dequantizer.largest_scale * largest < _FP16_OVERFLOW:
        return
    codes = np.empty(_CHUNK // 2, np.uint8)
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


def _begin(plan: _Plan, output: PartialOutput) -> None:
    """What one process does for all: the directory, its empty files, and the small files."""
    output.begin(plan.fingerprint(), plan.names)
    for layout in plan.layouts:
        create(output.directory / layout.name, layout.size)
    for name, text in plan.texts.items():
        write_whole(output.directory / name, text)
    for name, file in plan.copies.items():
        copy_whole(file, output.directory / name)


@dataclass
class _Job:
    """The extents that this process writes."""

    plan: _Plan
    output: PartialOutput
    rank: int
    extents: list[int]
    progress: Callable[[int, int], None] | None
    bytes_read: int = 0
    _written: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, workers: int) -> None:
        """Write all of them; the first error stops every worker, and is raised."""
        from fp8ckpt.storage.reading import load_dequantizer

        self._all = self.plan.extents
        self._total = sum(self._all[i].stop - self._all[i].start for i in self.extents)
        self._chunks = self._each_chunk()
        self._open: dict[int, _OpenExtent] = {}
        # Neighbouring chunks are of one tensor, and workers stay close together.
        self._dequantizer = lru_cache(maxsize=2 * workers)(lambda tensor: load_dequantizer(tensor, self.plan.dtype))
        try:
            with ThreadPoolExecutor(workers, "fp8ckpt-convert") as pool:
                futures = [pool.submit(self._work) for _ in range(workers)]
                try:
                    for future in futures:
                        future.result()
                finally:  # an error of one worker, or Ctrl-C: the others end after their chunk
                    self._stop.set()
        finally:
            for extent in self._open.values():
                extent.file.close()

    def _each_chunk(self) -> Iterator[tuple[int, int, int]]:
        for i in self.extents:
            _, start, stop = self._all[i]
            for first in range(start, stop, _CHUNK):
                yield i, first, min(first + _CHUNK, stop)

    def _work(self) -> None:
        import numpy as np

        out = aligned_buffer(_CHUNK)
        codes = np.empty(_CHUNK // TARGET_BYTES[self.plan.dtype], np.uint8)
        reader = _Reader()
        try:
            while not self._stop.is_set():
                with self._lock:
                    chunk = next(self._chunks, None)
                    if chunk is None:
                        return
                    i, start, stop = chunk
                    extent = self._open.get(i)
                    if extent is None:
                        layout = self.plan.layouts[self._all[i].layout]
                        extent = self._open[i] = _OpenExtent(
                            OutputFile(self.output.directory / layout.name), -(-(self._all[i].stop - self._all[i].start) // _CHUNK)
                        )
                nan_codes = self._fill(reader, self.plan.layouts[self._all[i].layout], start, stop, out, codes)
                extent.file.write(out[: stop - start], start)
                with self._lock:
                    extent.nan_codes.update(nan_codes)
                    extent.chunks_left -= 1
                    last = extent.chunks_left == 0
                    self._written += stop - start
                    if self.progress is not None:
                        self.progress(self._written, self._total)
                if last:
                    extent.file.flush()
                    self.output.record(self.rank, i, {"nan_codes": dict(extent.nan_codes)})
                    with self._lock:
                        self._open.pop(i).file.close()
        except BaseException:
            self._stop.set()
            raise
        finally:
            reader.close()
            with self._lock:
                self.bytes_read += reader.bytes_read

    def _fill(self, reader: _Reader, layout: FileLayout, start: int, stop: int, out: Any, codes: Any) -> dict[str, int]:
        """Fill ``out`` with the bytes ``[start, stop)`` of an output file; returns the NaN codes met, by tensor."""
        from fp8ckpt.numerics.dequantize import bits_dtype, count_nonfinite

        nan_codes: dict[str, int] = {}
        if start < len(layout.head):
            head = layout.head[start:stop]
            out[: len(head)] = memoryview(head)
        first = bisect_right(layout.spans, start, key=lambda span: span.stop)
        for k in range(first, len(layout.spans)):
            span = layout.spans[k]
            if span.start >= stop:
                break
            low, high = max(span.start, start), min(span.stop, stop)
            target = out[low - start : high - start]
            tensor = self.plan.source.tensors[span.name]
            if isinstance(tensor, TensorSpan):
                reader.read(tensor, low - span.start, target)
                continue
            itemsize = TARGET_BYTES[span.dtype]
            part = codes[: (high - low) // itemsize]
            reader.read(tensor.weight, (low - span.start) // itemsize, part)
            self._dequantizer(tensor).flat(part, (low - span.start) // itemsize, target.view(bits_dtype(span.dtype)))
            if count := count_nonfinite(part, tensor.weight.dtype):
                nan_codes[tensor.name] = count
        return nan_codes


@dataclass
class _OpenExtent:
    file: OutputFile
    chunks_left: int
    nan_codes: Counter[str] = field(default_factory=Counter)


class _Reader:
    """Reads source bytes, and keeps the last file open: neighbouring tensors lie in the same one."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._file: Path | None = None
        self._fd = -1

    def read(self, span: TensorSpan, offset: int, buffer: Any) -> None:
        """Fill ``buffer`` from byte ``offset`` of a tensor on."""
        if not buffer.size:
            return
        if span.file != self._file:
            self.close()
            try:
                self._fd = os.open(span.file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise StorageError(f"cannot be opened: {error.strerror}", file=span.file, remedy="restore the file") from error
            self._file = span.file
        read_into(self._fd, buffer, span.start + offset, span.file)
        self.bytes_read += buffer.nbytes

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._fd)
            self._file = None

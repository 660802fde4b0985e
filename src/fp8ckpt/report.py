"""A report on one checkpoint, or on the change from one to another: a single HTML page that needs no network.

For one checkpoint it shows sizes, scales by layer and kind of module, the codes in use, and activation scales; for two,
also what moved. Everything is counted while the files are read once, in parallel; memory is a few MiB a worker, and the
page has a row for each kind and layer, not for each weight. `fp8ckpt.figures` draws it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fp8ckpt.encodings.seen import Seen, moved_bytes
from fp8ckpt.engine import Progress
from fp8ckpt.errors import OutputExistsError, StorageError
from fp8ckpt.families.kinds import Place, places
from fp8ckpt.numerics.codes import F32, SCALE_DTYPES, TARGET_BYTES, scale_values
from fp8ckpt.numerics.quantize import Tally
from fp8ckpt.output.files import write_whole
from fp8ckpt.output.forecast import refuse_unwritable, room_for
from fp8ckpt.output.partial import partial_of
from fp8ckpt.ranks import threads_of_this_rank
from fp8ckpt.stores.address import local_path
from fp8ckpt.stores.store import Bytes
from fp8ckpt.targets import refuse_count
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint, raise_first
from fp8ckpt.tensors.reading import load_factor, load_scales, scale_defects
from fp8ckpt.tensors.scale_ranges import ScaleRange, scale_range
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import DTYPE_BITS
from fp8ckpt.tensors.tensor import DequantizerOf, Reader, Tensor
from fp8ckpt.walk import CHUNK, Step, Walk


@dataclass(frozen=True)
class CodeUse:
    """How many of ``codes`` are zero, subnormal, of the largest magnitude, or nonfinite (NaN or infinite)."""

    codes: int
    zeros: int
    subnormals: int
    saturated: int
    nonfinite: int


@dataclass(frozen=True)
class WeightRow:
    """One FP8 weight: its scales, the greatest of its activation scales (None without any), its codes."""

    name: str
    kind: str
    layer: int | None
    dtype: str
    scales: ScaleRange
    activation_scale: float | None
    use: CodeUse


@dataclass(frozen=True)
class Change:
    """The difference of one tensor of the second checkpoint from the first's.

    ``moved``: elements with another code if both are FP8, otherwise with another value. Errors are those of the
    second's values: ``mean_error`` is relative to the first's mean magnitude, ``largest_error`` to its largest.
    ``fresh`` of ``scales`` differ; both are None unless both tensors are FP8 on one grid.
    """

    name: str
    kind: str
    layer: int | None
    elements: int
    moved: int
    mean_error: float
    largest_error: float
    fresh: int | None
    scales: int | None


@dataclass(frozen=True)
class SizeRow:
    """The bytes that the tensors of one kind and dtype take, with their scales."""

    kind: str
    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """The contents of a page. ``weights`` and ``codes`` (for each FP8 dtype, how often each code occurs) belong to the
    first checkpoint that has any. ``changes`` is None for a single checkpoint. ``apart``: names of tensors that only
    one of two has, or that have another shape or kind of dtype.

    >>> found = fp8ckpt.report("sample-fp8", output="page.html")
    >>> max(found.weights, key=lambda weight: weight.scales.greatest).kind
    'mlp.up_proj'
    """

    paths: tuple[Path | str, ...]
    tensors: int
    elements: int
    sizes: tuple[SizeRow, ...]
    weights: tuple[WeightRow, ...]
    codes: dict[str, tuple[int, ...]]
    changes: tuple[Change, ...] | None
    apart: tuple[str, ...]
    bytes_read: int


def report(
    a: CheckpointLike,
    b: CheckpointLike | None = None,
    *,
    output: str | Path = "report.html",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Look at one checkpoint, or compare a second with it, and write ``output``, a self-contained HTML page.

    ``progress`` is called with (bytes read so far, bytes in all, the current activity). Raises `MissingPackageError`
    without the extra ``report``, `OutputExistsError` if the page exists, and what `open_checkpoint` raises for a
    defective checkpoint.

    >>> found = fp8ckpt.report("sample-fp8", output="page.html")
    >>> found.bytes_read, found.changes
    (294912, None)
    """
    from fp8ckpt.figures import page_of

    refuse_count("workers", workers)
    page = refuse_page(output)
    sides = [open_checkpoint(path) for path in ((a,) if b is None else (a, b))]
    for side in sides:
        raise_first(scale_defects(side.quantized, side.cache_scales))
    job = _Job(sides, progress)
    job.walk.run(threads_of_this_rank(workers), job.step_of)
    found = job.found()
    _publish(page, page_of(found))
    return found


def draw(sides: Sequence[Checkpoint], seen: Seen, page: Path) -> None:
    """Write the page of two checkpoints that are counted already. Reads headers and scales only."""
    from fp8ckpt.figures import page_of

    _publish(page, page_of(_Job(sides, None, seen).found()))


def refuse_page(output: str | Path) -> Path:
    """Return the page's full path. Raise if the plotting library is missing, or if the page cannot or must not be
    written.
    """
    from fp8ckpt.figures import require_library

    require_library()
    page = local_path(output).absolute()
    for path in (page, partial_of(page)):  # the page is written to the second one first
        if os.path.lexists(path):
            raise OutputExistsError.of_page(file=str(path))
    refuse_unwritable(room_for({page: 0}).where)
    return page


def _publish(page: Path, text: str) -> None:
    """Write the page under another name, then rename it. An existing file is never replaced."""
    refuse_page(page)
    partial = partial_of(page)
    room_for({partial: len(text.encode())}).refuse_too_little()
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(partial, text.encode())
        partial.rename(page)
    except OSError as error:  # a named error of writing is an OSError too
        partial.unlink(missing_ok=True)
        raise error if isinstance(error, StorageError) else StorageError.of_writing(error, page) from error


class _Job:
    """A pass over one checkpoint or two, in chunks of elements, that counts; or the counts ``seen`` elsewhere."""

    def __init__(self, sides: Sequence[Checkpoint], progress: Progress | None, seen: Seen | None = None) -> None:
        self._sides = sides
        self._coded = next((side for side in sides if side.quantized), sides[0])
        self._seen = seen or Seen()
        self._apart: list[str] = []
        self._compared: list[str] = []
        for name in dict.fromkeys(name for side in sides for name in side.tensors):
            found = [side.tensors[name] for side in sides if name in side.tensors]
            if len(found) == 2 and _comparable(*found):
                self._compared.append(name)
            elif len(sides) == 2:
                self._apart.append(name)
        coded = {tensor.name: [self._coded.tensors[tensor.name]] for tensor in self._coded.quantized}
        self.walk = Walk(coded | {name: [side.tensors[name] for side in sides] for name in self._compared}, progress)

    def step_of(self, dequantizer: DequantizerOf) -> tuple[Step, list[Reader]]:
        """Return the step function of one worker and its readers. Each worker has its own buffers."""
        readers = [Reader(CHUNK, dequantizer) for _ in self._sides]
        buffers = [np.empty(CHUNK * 8, np.uint8) for _ in readers]

        def step(name: str, start: int, count: int) -> None:
            seen, tensors = Seen(), self.walk.tensors[name]
            parts = [_part(tensors, i, start, count, buffers[i], readers[i]) for i in range(len(tensors))]
            for tensor, part in zip(tensors, parts, strict=True):
                if tensor.scaled is not None and tensor is self._coded.tensors[name]:
                    seen.count(tensor.scaled, part.codes)
            if len(parts) == 2:
                _compare(seen, name, tensors, parts)
            with self.walk.lock:
                self._seen.add(seen)

        return step, readers

    def found(self) -> Report:
        """Return the report from the counts, headers and scales."""
        at = places(dict.fromkeys(name for side in self._sides for name in side.tensors))
        return Report(
            paths=tuple(side.path for side in self._sides),
            tensors=len(at),
            elements=sum(tensor.numel for tensor in self._sides[0].tensors.values()),
            sizes=tuple(_sizes(self._sides[0], at)),
            weights=tuple(self._weight(tensor, at[tensor.name]) for tensor in self._coded.quantized),
            codes={dtype: tuple(counts.tolist()) for dtype, counts in sorted(self._seen.codes.items())},
            changes=tuple(self._changes(at)) if len(self._sides) == 2 else None,
            apart=tuple(self._apart),
            bytes_read=self.walk.bytes_read,
        )

    def _weight(self, tensor: QuantizedTensor, place: Place) -> WeightRow:
        activations = [scale_range(span).greatest for span in tensor.activation_scales if span.dtype in SCALE_DTYPES]
        use = self._seen.use.get(tensor.name, Counter())
        return WeightRow(
            tensor.name,
            *place,
            tensor.code_dtype,
            scale_range(tensor.scale),
            max(activations, default=None),
            CodeUse(tensor.numel, use["zeros"], use["subnormals"], use["saturated"], use["nonfinite"]),
        )

    def _changes(self, at: dict[str, Place]) -> Iterator[Change]:
        for name in self._compared:
            tally = self._seen.changes.get(name, Tally())
            tensors = [side.tensors[name] for side in self._sides]
            yield Change(
                name,
                *at[name],
                tensors[0].numel,
                tally.moved,
                tally.error / tally.magnitude if tally.magnitude else 0.0,
                tally.largest_error / tally.largest if tally.largest else 0.0,
                *_fresh_scales(*tensors),
            )


class _Part(NamedTuple):
    """A chunk of one tensor: its values as stored in ``dtype``, and its codes, one a byte."""

    dtype: str
    values: Bytes
    codes: Bytes

    @property
    def floats(self) -> F32:
        return scale_values(self.values.view(SCALE_DTYPES[self.dtype]), self.dtype)


def _part(tensors: Sequence[Tensor], which: int, start: int, count: int, room: Bytes, reader: Reader) -> _Part:
    """Return a chunk of one of the tensors. For a single tensor, only the codes are read."""
    tensor, codes = tensors[which], list[Bytes]()
    reader.passing = lambda _, part: codes.append(part.reshape(-1).copy())
    dtype = tensor.dtype if tensor.scaled is None else _compared(tensors)
    values = room[: count * DTYPE_BITS[dtype] // 8]
    if len(tensors) == 2:
        tensor.elements(start, dtype, values, reader)
    elif tensor.scaled is not None:
        for _ in tensor.scaled.run(start, count, reader):
            pass
    return _Part(dtype, values, np.concatenate(codes) if codes else room[:0])


def _compare(seen: Seen, name: str, tensors: Sequence[Tensor], parts: Sequence[_Part]) -> None:
    a, b = parts
    if _floating(tensors[0]) is None:  # integers and the like: count elements with other bytes
        seen.change(name, Tally(moved=moved_bytes(a.values, b.values, a.dtype)))
        return
    coded = all(tensor.scaled is not None for tensor in tensors) and len({*map(_code_dtype, tensors)}) == 1
    seen.compare(name, a.floats, b.floats, int(np.count_nonzero(a.codes != b.codes)) if coded else None)


def _code_dtype(tensor: Tensor) -> str:
    """Return the dtype of a tensor's codes, or of its values if it has no codes."""
    return tensor.dtype if tensor.scaled is None else tensor.scaled.code_dtype


def _floating(tensor: Tensor) -> str | None:
    """Return the dtype in which a tensor's values are read as floats, or None if they are not floats."""
    if tensor.scaled is not None:
        return "F32"
    return tensor.dtype if tensor.dtype in TARGET_BYTES else None


def _comparable(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    floating = (_floating(a), _floating(b))
    if None in floating:
        return a.scaled is None and b.scaled is None and a.dtype == b.dtype
    return True


def _compared(tensors: Sequence[Tensor]) -> str:
    """Return the dtype for comparing FP8 values: the other side's, or float32 if there is none or both are FP8."""
    plain = [tensor.dtype for tensor in tensors if tensor.scaled is None]
    return plain[0] if len(plain) == 1 else "F32"


def _fresh_scales(a: Tensor, b: Tensor) -> tuple[int | None, int | None]:
    """Return (number of differing scales, number of scales), or Nones unless both are FP8 on one grid."""
    if a.scaled is None or b.scaled is None or a.scaled.grid != b.scaled.grid:
        return None, None
    left, right = (
        scale_values(load_scales(scaled), scaled.scale.dtype, load_factor(scaled)) for scaled in (a.scaled, b.scaled)
    )
    return int(np.count_nonzero(left != right)), left.size


def _sizes(side: Checkpoint, at: dict[str, Place]) -> Iterator[SizeRow]:
    """Yield the largest first."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, tensor in side.tensors.items():
        row = rows.setdefault((at[name].kind, _code_dtype(tensor)), [0, 0])
        row[0] += 1
        row[1] += sum(span.nbytes for span in tensor.spans)
    for (kind, dtype), (tensors, nbytes) in sorted(rows.items(), key=lambda item: -item[1][1]):
        yield SizeRow(kind, dtype, tensors, nbytes)

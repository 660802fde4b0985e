"""A picture of a checkpoint, or of what became of it: one HTML page that needs no network.

Of one: sizes, scales by layer and kind of module, which codes are in use, activation scales. Of two: also what moved.
All is counted while the files are read once, in parallel; memory is a few MiB a worker, and the page has a row for each
kind and layer, not for each weight. What is drawn, and how, is in `fp8ckpt.figures`.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fp8ckpt.engine import Progress
from fp8ckpt.errors import OutputExistsError, StorageError
from fp8ckpt.families.kinds import Place, places
from fp8ckpt.numerics.codes import CODE_FORMATS, F32, SCALE_DTYPES, TARGET_BYTES, code_values, scale_values
from fp8ckpt.numerics.dequantize import Dequantizer, bits_dtype
from fp8ckpt.numerics.kernels import count_codes
from fp8ckpt.numerics.quantize import unpack
from fp8ckpt.output.files import write_error, write_whole
from fp8ckpt.output.forecast import room_for
from fp8ckpt.output.partial import partial_of
from fp8ckpt.ranks import threads_of_this_rank
from fp8ckpt.stores.address import local_path
from fp8ckpt.stores.store import Bytes
from fp8ckpt.tensors.checkpoint import Checkpoint, open_checkpoint, raise_first
from fp8ckpt.tensors.reading import load_dequantizer, scale_defects
from fp8ckpt.tensors.scale_ranges import ScaleRange, scale_range
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import DTYPE_BITS
from fp8ckpt.tensors.tensor import Reader, Tensor
from fp8ckpt.workers import share

_CHUNK = 1 << 20  # elements


@dataclass(frozen=True)
class CodeUse:
    """How many codes are zero, subnormal, of the largest magnitude, NaN or infinite; of ``codes`` in all."""

    codes: int
    zeros: int
    subnormals: int
    saturated: int
    nonfinite: int


@dataclass(frozen=True)
class WeightFacts:
    """One FP8 weight: its scales, the greatest of its activation scales (None without one), its codes."""

    name: str
    kind: str
    layer: int | None
    dtype: str
    scales: ScaleRange
    activation_scale: float | None
    use: CodeUse


@dataclass(frozen=True)
class Change:
    """How one tensor of the second checkpoint differs from the first's.

    ``moved``: elements whose code differs where both are FP8, and whose value does elsewhere. Errors are those of the
    second's values: ``mean_error`` is relative to the first's mean magnitude, ``largest_error`` to its largest.
    ``fresh``: scales that differ, of ``scales``; None where not both are FP8 on one grid.
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
    """What the tensors of one kind and dtype take, in bytes, scales included."""

    kind: str
    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """What a page shows. ``weights`` and ``codes`` (by FP8 dtype, how often each of the 256 occurs) are of the first
    checkpoint that has any. ``changes`` is None for one checkpoint alone; ``apart``: names of tensors that only one of
    two has, or that are of another shape or kind of dtype.

    >>> found = fp8ckpt.report("sample-fp8", output="page.html")
    >>> max(found.weights, key=lambda weight: weight.scales.greatest).kind
    'mlp.up_proj'
    """

    paths: tuple[Path | str, ...]
    tensors: int
    elements: int
    sizes: tuple[SizeRow, ...]
    weights: tuple[WeightFacts, ...]
    codes: dict[str, tuple[int, ...]]
    changes: tuple[Change, ...] | None
    apart: tuple[str, ...]
    bytes_read: int


def report(
    a: str | Path,
    b: str | Path | None = None,
    *,
    output: str | Path = "report.html",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Look at one checkpoint, or hold a second against it, and write ``output``, an HTML page that is complete in
    itself.

    ``progress`` is called with (bytes read so far, in all, what is being done). Raises `MissingPackageError` without
    the extra ``report``, `OutputExistsError` where the page exists, and what `open_checkpoint` raises for a defective
    checkpoint.

    >>> found = fp8ckpt.report("sample-fp8", output="page.html")
    >>> found.bytes_read, found.changes
    (294912, None)
    """
    from fp8ckpt.figures import page_of

    page = refuse_page(output)
    sides = [open_checkpoint(path) for path in (a, b) if path is not None]
    for side in sides:
        raise_first(scale_defects(side.quantized, side.cache_scales))
    found = _Job(sides, progress).run(threads_of_this_rank(workers))
    _publish(page, page_of(found))
    return found


def refuse_page(output: str | Path) -> Path:
    """The page's full path, if there is what draws it, and nothing is there yet."""
    from fp8ckpt.figures import require_library

    require_library()
    page = local_path(output).absolute()
    for path in (page, partial_of(page)):  # it is written to the second one first
        if os.path.lexists(path):
            remedy = "move it away, or choose another name"
            raise OutputExistsError("there is something already", file=str(path), remedy=remedy)
    return page


def _publish(page: Path, text: str) -> None:
    """Nothing is seen at the page's name until it is whole, and nothing that is there is replaced."""
    refuse_page(page)
    partial = partial_of(page)
    room_for({partial: len(text.encode())}).refuse_too_little()
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(partial, text.encode())
        partial.rename(page)
    except OSError as error:  # a named error of writing is one, too
        partial.unlink(missing_ok=True)
        raise error if isinstance(error, StorageError) else write_error(error, page) from error


@dataclass
class _Tally:
    """What is added up of one tensor, over its chunks."""

    use: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    error: float = 0.0
    magnitude: float = 0.0
    largest_error: float = 0.0
    largest: float = 0.0
    fresh: int | None = None
    scales: int | None = None


class _Job:
    """Reads one side, or two, in chunks of elements, and counts."""

    def __init__(self, sides: list[Checkpoint], progress: Progress | None) -> None:
        self._sides = sides
        self._coded = next((side for side in sides if side.quantized), sides[0])
        self._progress = progress
        self._bytes_read = 0
        self._codes: dict[str, npt.NDArray[np.int64]] = {}
        self._lock = threading.Lock()
        self._apart: list[str] = []
        self._tallies: dict[str, _Tally] = {}
        for name in dict.fromkeys(name for side in sides for name in side.tensors):
            found = [side.tensors[name] for side in sides if name in side.tensors]
            if len(found) == 2 and _comparable(*found):
                self._tallies[name] = _Tally()
            elif len(sides) == 2:
                self._apart.append(name)
        for tensor in self._coded.quantized:
            self._tallies.setdefault(tensor.name, _Tally())

    def run(self, workers: int) -> Report:
        """Count all, and say what was found."""
        self._dequantizer = lru_cache(maxsize=4 * workers)(load_dequantizer)
        self._total = sum(side.tensors[name].span.nbytes for name in self._tallies for side in self._sides_with(name))
        chunks = (
            (name, start)
            for name in self._tallies
            for start in range(0, self._sides_with(name)[0].tensors[name].numel, _CHUNK)
        )
        with ExitStack() as announced:
            for side in self._sides:
                spans = (side.tensors[name].span for name in self._tallies if side in self._sides_with(name))
                announced.enter_context(side.store.ahead([span.whole] for span in spans))
            share(chunks, [self._counter() for _ in range(workers)])
        return self._found()

    def _sides_with(self, name: str) -> list[Checkpoint]:
        """The sides of which a tensor is read: both, or the one whose codes are counted."""
        if name in self._apart or len(self._sides) == 1:
            return [self._coded]
        return self._sides

    def _counter(self) -> Callable[[tuple[str, int]], None]:
        """One worker, with buffers of its own."""
        buffers = [(np.empty(_CHUNK * 8, np.uint8), np.empty(_CHUNK, np.uint8)) for _ in self._sides]
        counts = np.zeros((4, 256), np.int64)

        def count(chunk: tuple[str, int]) -> None:
            name, start = chunk
            sides = self._sides_with(name)
            tensors = [side.tensors[name] for side in sides]
            parts = [_Part(tensor, start, *buffers[i]) for i, tensor in enumerate(tensors)]
            for part in parts:
                self._read(part)
            for side, part in zip(sides, parts, strict=True):
                if side is self._coded and part.tensor.scaled is not None:
                    counts[:] = 0
                    count_codes(part.codes, counts)
                    self._add_codes(part.tensor.scaled, counts.sum(axis=0))
            if len(parts) == 2:
                self._compare(name, start, *parts)

        return count

    def _read(self, part: _Part) -> None:
        span = part.span
        span.read(part.stored, part.offset)
        with self._lock:
            self._bytes_read += part.stored.nbytes
            if self._progress is not None:
                self._progress(self._bytes_read, self._total, f"reading {span.file.name}")

    def _add_codes(self, tensor: QuantizedTensor, counts: npt.NDArray[np.int64]) -> None:
        classes = _code_classes(tensor.code_dtype)
        counts = counts[: classes["zeros"].size]
        with self._lock:
            self._codes.setdefault(tensor.code_dtype, np.zeros(counts.size, np.int64))[:] += counts
            self._tallies[tensor.name].use.update({what: int(counts[codes].sum()) for what, codes in classes.items()})

    def _compare(self, name: str, start: int, a: _Part, b: _Part) -> None:
        coded = a.tensor.scaled is not None and b.tensor.scaled is not None
        same = np.array_equal(a.stored, b.stored)
        if _floating(a.tensor) is None:  # integers and the like: bytes that differ say it all
            itemsize = max(1, a.stored.size // a.count)
            moved = int((a.stored != b.stored).reshape(-1, itemsize).any(axis=1).sum())
            with self._lock:
                self._tallies[name].moved += moved
            return
        dtype = _compared(a.tensor, b.tensor)
        left, right = (part.values(dtype, self._dequantizer) for part in (a, b))
        if coded and _code_dtype(a.tensor) == _code_dtype(b.tensor):
            moved = 0 if same else int(np.count_nonzero(a.codes != b.codes))
        else:
            moved = int(np.count_nonzero((left != right) & ~(np.isnan(left) & np.isnan(right))))
        magnitude = np.abs(left)
        distance = np.abs(left - right)
        finite = np.isfinite(magnitude) & np.isfinite(distance)
        if not finite.all():
            magnitude, distance = magnitude[finite], distance[finite]
        fresh, scales = _fresh_scales(a.tensor, b.tensor) if start == 0 else (None, None)
        with self._lock:
            tally = self._tallies[name]
            tally.moved += moved
            tally.error += float(distance.sum(dtype=np.float64))
            tally.magnitude += float(magnitude.sum(dtype=np.float64))
            tally.largest_error = max(tally.largest_error, float(distance.max(initial=0.0)))
            tally.largest = max(tally.largest, float(magnitude.max(initial=0.0)))
            if start == 0:
                tally.fresh, tally.scales = fresh, scales

    def _found(self) -> Report:
        at = places(dict.fromkeys(name for side in self._sides for name in side.tensors))
        return Report(
            paths=tuple(side.path for side in self._sides),
            tensors=len(at),
            elements=sum(tensor.numel for tensor in self._sides[0].tensors.values()),
            sizes=tuple(_sizes(self._sides[0], at)),
            weights=tuple(self._weight(tensor, at[tensor.name]) for tensor in self._coded.quantized),
            codes={dtype: tuple(int(count) for count in counts) for dtype, counts in self._codes.items()},
            changes=tuple(self._changes(at)) if len(self._sides) == 2 else None,
            apart=tuple(self._apart),
            bytes_read=self._bytes_read,
        )

    def _weight(self, tensor: QuantizedTensor, place: Place) -> WeightFacts:
        activations = [scale_range(span).greatest for span in tensor.activation_scales if span.dtype in SCALE_DTYPES]
        use = self._tallies[tensor.name].use
        return WeightFacts(
            tensor.name,
            *place,
            tensor.code_dtype,
            scale_range(tensor.scale),
            max(activations, default=None),
            CodeUse(tensor.numel, use["zeros"], use["subnormals"], use["saturated"], use["nonfinite"]),
        )

    def _changes(self, at: dict[str, Place]) -> Iterator[Change]:
        apart = set(self._apart)
        for name, tally in self._tallies.items():
            if name not in apart:
                yield Change(
                    name,
                    *at[name],
                    self._sides[0].tensors[name].numel,
                    tally.moved,
                    tally.error / tally.magnitude if tally.magnitude else 0.0,
                    tally.largest_error / tally.largest if tally.largest else 0.0,
                    tally.fresh,
                    tally.scales,
                )


class _Part:
    """A chunk of one tensor. ``stored``: its bytes, to be read from byte ``offset`` of ``span`` on."""

    def __init__(self, tensor: Tensor, start: int, room: Bytes, codes: Bytes) -> None:
        self.tensor = tensor
        self.start = start
        self.count = min(_CHUNK, tensor.numel - start)
        self._room = room
        self.span = tensor.span if tensor.scaled is None else tensor.scaled.packed
        bits = DTYPE_BITS[_code_dtype(tensor)]
        self.offset = start * bits // 8
        self.stored = (room if tensor.scaled is None else codes)[: self.count * bits // 8]

    @property
    def codes(self) -> Bytes:
        """Its codes, one a byte."""
        packed = self.tensor.scaled is not None and self.tensor.scaled.per_byte > 1
        return unpack(self.stored) if packed else self.stored

    def values(self, dtype: str, dequantizer: Callable[[QuantizedTensor, str], Dequantizer]) -> F32:
        """The values [n] as float32, rounded to ``dtype`` where they are FP8."""
        if (scaled := self.tensor.scaled) is not None:
            bits = self._room[: self.count * TARGET_BYTES[dtype]].view(bits_dtype(dtype))
            if scaled.across:  # in the order of its elements, which is not that of its codes
                scaled.elements(self.start, dtype, bits.view(np.uint8), Reader(_CHUNK, dequantizer))
            else:
                dequantizer(scaled, dtype).flat(self.stored, self.start, bits)
            return scale_values(bits.view(SCALE_DTYPES[dtype]), dtype)
        return scale_values(self.stored.view(SCALE_DTYPES[self.tensor.dtype]), self.tensor.dtype)


def _code_dtype(tensor: Tensor) -> str:
    """Of its codes, or of its values where it has none."""
    return tensor.dtype if tensor.scaled is None else tensor.scaled.code_dtype


def _floating(tensor: Tensor) -> str | None:
    """The dtype in which a tensor's values are read as floats, or None where they are none."""
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


def _compared(a: Tensor, b: Tensor) -> str:
    """The dtype that FP8 values are rounded to: the other side's, or float32 where there is none or both are FP8."""
    plain = [tensor.dtype for tensor in (a, b) if tensor.scaled is None]
    return plain[0] if len(plain) == 1 else "F32"


def _fresh_scales(a: Tensor, b: Tensor) -> tuple[int | None, int | None]:
    """(scales of the second that are not the first's, scales), or Nones where not both are FP8 on one grid."""
    if a.scaled is None or b.scaled is None or a.scaled.grid != b.scaled.grid:
        return None, None
    left, right = (load_dequantizer(scaled, "F32").scales for scaled in (a.scaled, b.scaled))
    return int(np.count_nonzero(left != right)), left.size


def _sizes(side: Checkpoint, at: dict[str, Place]) -> Iterator[SizeRow]:
    """Largest first."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, tensor in side.tensors.items():
        row = rows.setdefault((at[name].kind, _code_dtype(tensor)), [0, 0])
        row[0] += 1
        row[1] += sum(span.nbytes for span in tensor.spans)
    for (kind, dtype), (tensors, nbytes) in sorted(rows.items(), key=lambda item: -item[1][1]):
        yield SizeRow(kind, dtype, tensors, nbytes)


@lru_cache
def _code_classes(dtype: str) -> dict[str, npt.NDArray[np.bool_]]:
    """Which of the codes are of which class; a code may be of none."""
    values = np.abs(code_values(dtype))
    finite = np.isfinite(values)
    form = CODE_FORMATS[dtype]
    subnormal = (np.arange(values.size) >> form.mantissa_bits) % (1 << form.exponent_bits) == 0
    return {
        "zeros": values == 0,
        "subnormals": subnormal & finite & (values > 0),
        "saturated": values == values[finite].max(),
        "nonfinite": ~finite,
    }

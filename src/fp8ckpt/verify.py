"""Prove that one checkpoint is sound, or that two hold the same tensors, bit for bit.

Both are read as logical checkpoints, as streams and in parallel. An FP8 tensor is compared by the values of its codes
and scales, in the dtype of the other side. Where both sides are FP8 that dtype is float32, and their activation and
cache scales are compared too. Memory is a few MiB a worker. On request, the last checkpoint is also examined for what
serving engines need beyond that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8ckpt.engine import Progress
from fp8ckpt.errors import Fp8CheckpointError, ServingError
from fp8ckpt.families.between import translated
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.output.side_files import side_files
from fp8ckpt.ranks import threads_of_this_rank
from fp8ckpt.serving.examine import Servability, examine
from fp8ckpt.stores.local import kept_open
from fp8ckpt.stores.store import Bytes, File, same_bytes
from fp8ckpt.targets import refuse_count
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, survey
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG, load_json, without_quantization
from fp8ckpt.tensors.directory import is_native
from fp8ckpt.tensors.stored import DTYPE_BITS, TensorSpan
from fp8ckpt.tensors.tensor import DequantizerOf, Reader, Tensor
from fp8ckpt.walk import CHUNK, Step, Walk

if TYPE_CHECKING:
    from fp8ckpt.numerics.dequantize import Dequantizer


_PAIRS = 16  # pairs of tensors whose comparison of scales is cached for their other chunks


@dataclass(frozen=True)
class TensorDifference:
    """The difference of one tensor. ``elements`` is None if the tensors cannot be compared element by element.

    ``largest`` is the greatest ``|a - b|`` and ``largest_relative`` the greatest ``|a - b| / max(|a|, |b|)``, over the
    differing elements that are finite in both; None if there are none, or if the dtype is not a floating-point one.
    """

    name: str
    reason: str
    elements: int | None = None
    numel: int | None = None
    largest: float | None = None
    largest_relative: float | None = None


@dataclass(frozen=True)
class VerifyResult:
    """The result of `verify`. ``ok`` means: no defect, no difference, and nothing that makes a serving engine fail.

    ``nan_codes`` counts NaN codes by side and tensor. ``serving`` is None unless it was asked for. ``notes`` say how
    the two checkpoints were compared, if not tensor by tensor.

    >>> result = fp8ckpt.verify("sample-fp8")
    >>> result.tensors, result.defects
    (45, ())
    """

    paths: tuple[Path | str, ...]
    tensors: int
    bytes_read: int
    nan_codes: tuple[dict[str, int], ...]
    defects: tuple[Fp8CheckpointError, ...]
    tensor_differences: tuple[TensorDifference, ...]
    file_differences: tuple[str, ...]
    serving: Servability | None = None
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no defect, no difference and no serving failure."""
        unservable = self.serving is not None and self.serving.failures
        return not (self.defects or self.tensor_differences or self.file_differences or unservable)


@kept_open()
def verify(
    a: CheckpointLike,
    b: CheckpointLike | None = None,
    *,
    serving: bool = False,
    follow_index: bool = False,
    tensor_parallel: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Check every invariant of one checkpoint and count its NaN codes; or compare two bit for bit, with their
    configuration and side files.

    With ``serving``, also check whether vLLM, SGLang and transformers would serve the last checkpoint correctly, see
    `fp8ckpt.serving.examine`: on one GPU, or sharded over ``tensor_parallel`` GPUs. With ``follow_index``, tensors that
    an index does not list are ignored. ``progress`` is called with (bytes read so far, bytes in all, the current
    activity). Raises only if there is nothing to look at.

    >>> fp8ckpt.verify("sample-fp8").ok
    True
    >>> _ = fp8ckpt.convert("sample-fp8", "sample-bf16")
    >>> fp8ckpt.verify("sample-fp8", "sample-bf16").ok
    True
    """
    refuse_count("workers", workers)
    if tensor_parallel is not None and (not serving or tensor_parallel < 1):
        raise ValueError(f"tensor_parallel={tensor_parallel}; expected at least 1, with serving")
    sides = [survey(path, follow_index=follow_index) for path in ((a,) if b is None else (a, b))]
    by_side = [[*_defects(side)] for side in sides]
    unsound = any(by_side)
    defects = tuple(defect for side, found in zip(sides, by_side, strict=True) for defect in (*found, *side.slips))
    servability = examine(sides[-1], tensor_parallel=tensor_parallel) if serving else None
    if servability is not None and (count := len(by_side[-1])):
        failure = ServingError.of_unsound(file=sides[-1].path, defects=f"{count} defect{'s' if count > 1 else ''}")
        servability = replace(servability, failures=(*servability.failures, failure))
    notes: tuple[str, ...] = ()
    if len(sides) == 2 and not unsound:
        sides[1], notes = _as_in(*sides)
    if unsound:  # values mean nothing then; slips harm no reader
        return VerifyResult(
            tuple(side.path for side in sides), len(sides[0].tensors), 0, (), defects, (), (), servability
        )
    job = _Comparison(sides, progress)
    job.walk.run(threads_of_this_rank(workers), job.step_of)
    for side in sides:
        side.store.refuse_changes()
    return VerifyResult(
        paths=tuple(side.path for side in sides),
        tensors=len(set().union(*(side.tensors for side in sides))),
        bytes_read=job.walk.bytes_read,
        nan_codes=tuple(dict(sorted(counts.items())) for counts in job.nan_codes),
        defects=defects,
        tensor_differences=tuple(job.differences()),
        file_differences=tuple(_file_differences(*sides, renamed=bool(notes))) if len(sides) == 2 else (),
        serving=servability,
        notes=notes,
    )


def _as_in(a: Checkpoint, b: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return ``b`` with its tensors under the names and in the stackings of ``a``, and a note if these differ."""
    try:
        found = translated(b, a)
    except Fp8CheckpointError as error:
        return b, (f"tensors are compared by their names alone: {error}",)
    if found is None:
        return b, ()
    how = "are stacked, cut or named differently"
    note = f"{found.made} tensors {how} in {b.path}, and are compared as they are in {a.path}"
    return replace(b, tensors=found.tensors), (note,)


def _defects(side: Checkpoint) -> Iterator[Fp8CheckpointError]:
    from fp8ckpt.tensors.reading import scale_defects

    yield from side.defects
    yield from scale_defects(side.quantized, side.cache_scales)


def _compared_dtype(tensors: list[Tensor]) -> str | None:
    """Return the dtype in which the tensors are compared, or None if they have none in common. Codes can be read in
    several dtypes; float32 distinguishes all the values that codes and scales stand for.
    """
    common = set.intersection(*({*tensor.dtypes()} for tensor in tensors))
    return "F32" if "F32" in common else next(iter(common), None)


def _described(tensor: Tensor) -> str:
    dtype = tensor.dtype if tensor.scaled is None else tensor.scaled.code_dtype
    return f"{dtype} {list(tensor.shape)}"


@dataclass
class _Tally:
    """The differing elements of one tensor, summed over its chunks."""

    elements: int = 0
    largest: float | None = None
    largest_relative: float | None = None


class _Comparison:
    """The comparison of two sides, or the check of one."""

    def __init__(self, sides: list[Checkpoint], progress: Progress | None) -> None:
        self.nan_codes: list[Counter[str]] = [Counter() for _ in sides]
        self._incomparable: list[TensorDifference] = []
        self._tallies: dict[str, _Tally] = {}
        self._dtypes: dict[str, str] = {}  # by tensor name: the dtype in which it is compared
        self._alike = lru_cache(maxsize=_PAIRS)(_alike)
        for name in dict.fromkeys(name for side in sides for name in side.tensors):
            found = [side.tensors.get(name) for side in sides]
            present = [tensor for tensor in found if tensor is not None]
            dtype = _compared_dtype(present)
            if len(present) < len(found):
                self._incomparable.append(TensorDifference(name, f"only in {sides[0 if found[0] else 1].path}"))
            elif dtype is None or len({tensor.shape for tensor in present}) > 1:
                self._incomparable.append(
                    TensorDifference(name, " against ".join(_described(tensor) for tensor in present))
                )
            elif len(sides) == 2 or present[0].scaled:  # a single checkpoint is only checked for its codes
                self._dtypes[name] = dtype
        self.walk = Walk({name: [side.tensors[name] for side in sides] for name in self._dtypes}, progress)

    def step_of(self, dequantizer: DequantizerOf) -> tuple[Step, list[Reader]]:
        """Return the step function of one worker and its readers. Each worker has its own buffers."""
        import numpy as np

        readers = [Reader(CHUNK, dequantizer, counting=True) for _ in self.nan_codes]
        buffers = [np.empty(CHUNK * 8, np.uint8) for _ in readers]

        def step(name: str, start: int, count: int) -> None:
            tensors, dtype = self.walk.tensors[name], self._dtypes[name]
            if len(tensors) == 1 and tensors[0].scaled is not None:  # one side: look at its codes, not at its values
                for _ in tensors[0].scaled.run(start, count, readers[0]):
                    pass
            else:
                # F4 and F6 were refused earlier; 8 elements of any dtype are whole bytes.
                values = [buffer[: count * DTYPE_BITS[dtype] // 8] for buffer in buffers]
                if not _same(start, dtype, tensors, values, readers, self._alike):
                    self._differs(name, dtype, *values)
            with self.walk.lock:
                for reader, counts in zip(readers, self.nan_codes, strict=True):
                    counts.update(reader.nonfinite)
                    reader.nonfinite.clear()

        return step, readers

    def _differs(self, name: str, dtype: str, a: Any, b: Any) -> None:
        import numpy as np

        itemsize = max(1, DTYPE_BITS[dtype] // 8)
        unequal = (a.reshape(-1, itemsize) != b.reshape(-1, itemsize)).any(axis=1)
        largest = relative = None
        if dtype in (*TARGET_BYTES, "F64"):
            left, right = (_floats(side.reshape(-1, itemsize)[unequal].reshape(-1), dtype) for side in (a, b))
            finite = np.isfinite(left) & np.isfinite(right)
            if finite.any():
                with np.errstate(over="ignore"):  # of float64; JSON has no infinity
                    distance = np.minimum(np.abs(left[finite] - right[finite]), np.finfo(np.float64).max)
                size = np.maximum(np.abs(left[finite]), np.abs(right[finite]))
                largest = float(distance.max())
                relative = float(np.divide(distance, size, out=np.zeros_like(size), where=size > 0).max())
        with self.walk.lock:
            tally = self._tallies.setdefault(name, _Tally())
            tally.elements += int(np.count_nonzero(unequal))
            for attribute, value in (("largest", largest), ("largest_relative", relative)):
                if value is not None:
                    setattr(tally, attribute, max(value, getattr(tally, attribute) or 0.0))

    def differences(self) -> Iterator[TensorDifference]:
        """Yield the differing tensors: first those that cannot be compared, then the others, in the first side's
        order.
        """
        yield from self._incomparable
        for name, (tensor, *_) in self.walk.tensors.items():
            if tally := self._tallies.get(name):
                yield TensorDifference(
                    name, "values differ", tally.elements, tensor.numel, tally.largest, tally.largest_relative
                )


def _alike(a: Dequantizer, b: Dequantizer) -> bool:
    return a.alike(b)


def _same(
    start: int,
    dtype: str,
    tensors: Sequence[Tensor],
    out: list[Bytes],
    readers: list[Reader],
    alike: Callable[[Dequantizer, Dequantizer], bool],
) -> bool:
    """Whether two sides have the same elements from ``start`` on. If not, ``out`` has the elements of both.

    Codes are not dequantized if they equal the other side's codes and are scaled alike, or if decoding finds that they
    give the other side's values.
    """
    codes: dict[int, tuple[Dequantizer, Bytes]] = {}
    for i, (tensor, reader) in enumerate(zip(tensors, readers, strict=True)):
        if (scaled := tensor.scaled) is not None and not scaled.across:
            count = out[i].size // TARGET_BYTES[dtype]
            ((_, _, found),) = scaled.run(start, count, reader)  # in one piece: a reader has room for a chunk
            codes[i] = reader.dequantizer(scaled, dtype), found
    if len(codes) == 2 and alike(codes[0][0], codes[1][0]) and _equal(codes[0][1], codes[1][1]):
        return True
    last = min(codes, default=1)
    for i in (1 - last, last):
        if i not in codes:
            tensors[i].elements(start, dtype, out[i], readers[i])
            continue
        dequantizer, found = codes[i]
        bits, other = (out[side].view(f"u{TARGET_BYTES[dtype]}") for side in (i, 1 - i))
        if i == last and dequantizer.gives(found, start, other):
            return True
        dequantizer.flat(found, start, bits)
    return _equal(*out)


def _equal(a: Any, b: Any) -> bool:
    """Whether two byte arrays [n] are equal. Comparing eight bytes at a time takes half the time."""
    import numpy as np

    words = a.size // 8 * 8
    return np.array_equal(a[:words].view(np.uint64), b[:words].view(np.uint64)) and np.array_equal(a[words:], b[words:])


def _floats(stored: Any, dtype: str) -> Any:
    import numpy as np

    from fp8ckpt.numerics.codes import SCALE_DTYPES, scale_values

    if dtype == "F64":
        return stored.view(np.float64)
    return scale_values(stored.view(SCALE_DTYPES[dtype]), dtype).astype(np.float64)


def _file_differences(a: Checkpoint, b: Checkpoint, *, renamed: bool) -> Iterator[str]:
    """Yield the differences of configuration and side files. If the two sides quantize different things (weights, only
    the cache, or nothing), quantization is left out of the comparison.
    """
    mixed = _what_is_quantized(a) != _what_is_quantized(b)
    files = [_side_files(side, mixed) for side in (a, b)]
    for name in sorted(files[0] | files[1]):
        if name not in files[0] or name not in files[1]:
            yield f"{name}: only in {(a if name in files[0] else b).path}"
        elif name in (CONFIG, MISTRAL_CONFIG):
            configs = [load_json(side.store, name) or {} for side in (a, b)]
            if mixed:
                configs = [without_quantization(name, config, "BF16") for config in configs]
            for key in sorted(configs[0].keys() | configs[1].keys()):
                if [configs[0].get(key)] != [configs[1].get(key)]:  # lists compare by identity first: NaN equals NaN
                    yield f"{name}: {key} differs"
        elif not same_bytes(files[0][name], files[1][name]):
            yield f"{name}: differs"
    read = {header.file.name for side in (a, b) for header in side.files}
    for name in sorted(a.store.files().keys() & b.store.files().keys() - read):
        if is_native(name) and not same_bytes(*(File(side.store, name) for side in (a, b))):
            yield f"{name}: differs"
    if not mixed:
        yield from _other_scale_differences(a, b, renamed=renamed)


def _other_scale_differences(a: Checkpoint, b: Checkpoint, *, renamed: bool) -> Iterator[str]:
    """Yield the differences of the scales of activations, attention and its cache. These are no tensors of the logical
    checkpoint, but change what is served. Not compared: scales of tensors that are stacked differently, and of caches
    whose names exist on one side only.
    """
    import numpy as np

    from fp8ckpt.numerics.codes import SCALE_DTYPES, scale_values

    def values(spans: list[TensorSpan]) -> dict[TensorSpan, bytes]:
        """Return the scales of the spans of one side, read in one request, as float32 whatever their stored dtype."""
        stored = [np.empty(span.nbytes, np.uint8) for span in spans]
        if spans:
            spans[0].file.store.read([span.whole for span in spans], stored)
        for i, dtype in ((i, span.dtype) for i, span in enumerate(spans) if span.dtype in SCALE_DTYPES):
            stored[i] = scale_values(stored[i].view(SCALE_DTYPES[dtype]), dtype).view(np.uint8)
        return {span: raw.tobytes() for span, raw in zip(spans, stored, strict=True)}

    caches = [{span.name: (span,) for span in side.cache_scales} for side in (a, b)]
    names = [name for cache in caches for name in cache if not renamed or (name in caches[0] and name in caches[1])]
    pairs: list[tuple[tuple[TensorSpan, ...], ...]] = [
        tuple(cache.get(name, ()) for cache in caches) for name in dict.fromkeys(names)
    ]
    for name, tensor in a.tensors.items():
        other = b.tensors.get(name)
        if (one := tensor.scaled) is not None and other is not None and (its := other.scaled) is not None:
            pairs.append((one.activation_scales, its.activation_scales))
    together = [both for pair in pairs for both in zip_longest(*pair)]
    stored = [values([span for span in side if span is not None]) for side in zip(*together, strict=True)]
    for left, right in together:
        if left is None or right is None:
            yield f"{(left or right).name}: only in {(b if left is None else a).path}"
        elif stored[0][left] != stored[1][right]:
            yield f"{left.name}: differs"


def _what_is_quantized(side: Checkpoint) -> str:
    return "weights" if side.quantized else "the cache alone" if side.cache_scales else "nothing"


def _side_files(side: Checkpoint, mixed: bool) -> dict[str, File]:
    found = side_files(side)
    if mixed:
        found.pop(MODELOPT_CONFIG, None)
    return found

"""Reading logical tensors: scales are checked, and codes are looked up straight into a caller's buffer.

This is the only part of this room that touches tensor values. Memory is one small buffer of codes for any tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby, pairwise
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.errors import Fp8CheckpointError, RegionError, ScaleValueError, StorageError, TruncatedFileError
from fp8ckpt.numerics.codes import F32, SCALE_DTYPES, Factor, count_bad_scales, scale_values
from fp8ckpt.numerics.geometry import Region
from fp8ckpt.stores.local import kept_open
from fp8ckpt.stores.store import ByteRange
from fp8ckpt.tensors.formats import TWO_LEVELS
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import DTYPE_BITS, TensorSpan
from fp8ckpt.tensors.tensor import Reader, Tensor

if TYPE_CHECKING:
    import torch

    from fp8ckpt.numerics.dequantize import Bits, Dequantizer

CODES_BUFFER = 4 << 20  # bytes; several fit a second-level cache, and a disk read of this size is efficient
_SCALES_AT_ONCE = 1 << 20  # bytes for each read that a store does at once: neighbouring ranges stay in a cache


def checked_region(tensor: Tensor, offsets: tuple[int, ...] | None, sizes: tuple[int, ...] | None) -> Region:
    """Return the region; None stands for the whole tensor. Raise `RegionError` if it reaches outside."""
    shape = tensor.shape
    offsets = tuple(offsets) if offsets is not None else (0,) * len(shape)
    sizes = tuple(sizes) if sizes is not None else tuple(map(operator.sub, shape, offsets))
    if len(offsets) == len(sizes) == len(shape) and all(hasattr(n, "__index__") for n in (*offsets, *sizes)):
        sides = zip(offsets, sizes, shape, strict=True)
        if all(min(start, size) >= 0 and start + size <= dim for start, size, dim in sides):
            return offsets, sizes
    raise RegionError.of(tensor, (offsets, sizes))


def load_dequantizer(tensor: QuantizedTensor, dtype: str) -> Dequantizer:
    """Return the dequantizer of a tensor, with its scales read. Raise `ScaleValueError` if one is NaN, infinite, zero
    or negative.
    """
    from fp8ckpt.numerics.dequantize import Dequantizer  # callers that look at scales alone need none of its kernels

    scales, factor = load_scales(tensor), load_factor(tensor)
    return Dequantizer(tensor.grid, scales, tensor.scale.dtype, tensor.code_dtype, dtype, factor)


def load_scales(tensor: QuantizedTensor) -> npt.NDArray[Any]:
    """Return a tensor's scales [n] in their stored dtype. Raise `ScaleValueError` if one is NaN, infinite, zero or
    negative, by itself or with its second level applied.
    """
    scales = _stored(tensor.scale)
    factor = load_factor(tensor)
    for values in (_judged(scales, tensor.scale.dtype), _judged(scales, tensor.scale.dtype, factor)):
        if count_bad_scales(values):
            raise _bad_scale(tensor.scale, values)
    return scales


def load_factor(tensor: QuantizedTensor) -> Factor | None:
    """Return the second level of a tensor's scales, or None if there is one level. Raise `ScaleValueError` as above."""
    if tensor.second is None:
        return None
    value = read_floats(tensor.second.span).reshape(-1)
    if count_bad_scales(value):
        raise _bad_scale(tensor.second.span, value)
    return Factor(value[0], tensor.second.divides)


def _judged(stored: npt.NDArray[Any], dtype: str, factor: Factor | None = None) -> F32:
    """Return scales as float32 for validation. With two levels, a scale of the first may be zero, and counts as 1."""
    values = scale_values(stored, dtype, factor)
    return np.where(stored == 0, np.float32(1), values) if dtype == TWO_LEVELS else values


def _stored(span: TensorSpan) -> npt.NDArray[Any]:
    """Return scales [n] in their stored dtype, unchecked."""
    stored = np.empty(span.nbytes, np.uint8)
    span.read(stored)
    return stored.view(SCALE_DTYPES[span.dtype])


def read_floats(span: TensorSpan) -> F32:
    """Return all values of a tensor of scales, or of an adapter, as float32, exactly, in its shape."""
    return scale_values(_stored(span), span.dtype).reshape(span.shape)


def stored_scales(tensors: Iterable[QuantizedTensor]) -> dict[str, bytes]:
    """Return bytes that identify the scales of each weight by its name (with two levels, the second): equal bytes mean
    equal scales. For weights with few scales.
    """
    found: dict[str, bytes] = {}
    for tensor in tensors:
        span = tensor.scales[-1]
        found[tensor.name] = f"{span.dtype} {span.numel} ".encode() + _stored(span).tobytes()
    return found


def scale_defects(tensors: Iterable[QuantizedTensor], others: Iterable[TensorSpan] = ()) -> list[Fp8CheckpointError]:
    """Return a defect for every scale, activation scale and one of ``others`` that is NaN, infinite or not positive.

    All are in one store. The scales of many files are read in one request; memory is at most 32 MiB.
    """
    spans = [*others]
    for tensor in tensors:
        spans += tensor.scales
        spans += tensor.activation_scales
    alike: dict[tuple[str, str], list[TensorSpan]] = {}
    for span in spans:
        if span.dtype in SCALE_DTYPES and span.start < span.stop:
            alike.setdefault((span.dtype, span.file.name), []).append(span)
    buffer = np.empty(_SCALES_AT_ONCE * spans[0].file.store.at_once if spans else 0, np.uint8)
    defects: list[Fp8CheckpointError] = []
    suspects: dict[TensorSpan, None] = {}
    for dtype, keys in groupby(sorted(alike), key=itemgetter(0)):
        for batch in _batches((alike[key] for key in keys), buffer.size):
            ends = list(accumulate(part.stop - part.start for part in batch))
            parts = [buffer[first:last] for first, last in pairwise([0, *ends])]
            try:
                spans[0].file.store.read(batch, parts)
                if count_bad_scales(_judged(buffer[: ends[-1]].view(SCALE_DTYPES[dtype]), dtype)):
                    suspects |= dict.fromkeys(span for part in batch for span in alike[dtype, part.file])
            except (StorageError, TruncatedFileError) as error:
                defects.append(error)
    for span in suspects:
        values = _judged(_stored(span), span.dtype)
        if count_bad_scales(values):
            defects.append(_bad_scale(span, values))
    return defects


def _batches(groups: Iterable[list[TensorSpan]], most: int) -> Iterator[list[ByteRange]]:
    """Yield the ranges of scales in batches of at most ``most`` bytes. Each group has the spans of one file. Adjacent
    spans become one range; a longer range is split.
    """
    batch: list[ByteRange] = []
    size = 0
    for name, first, last in (run for group in groups for run in _runs(group)):
        for start in range(first, last, most):
            part = ByteRange(name, start, min(start + most, last))
            if size + part.stop - part.start > most:
                yield batch
                batch, size = [], 0
            batch.append(part)
            size += part.stop - part.start
    if batch:
        yield batch


def _runs(spans: list[TensorSpan]) -> Iterator[ByteRange]:
    """Yield ranges in which adjacent spans of a file are merged."""
    spans.sort(key=attrgetter("start"))
    start = stop = spans[0].start
    for span in spans:
        if span.start != stop:
            yield ByteRange(span.file.name, start, stop)
            start = span.start
        stop = span.stop
    yield ByteRange(spans[0].file.name, start, stop)


def _bad_scale(span: TensorSpan, values: F32) -> ScaleValueError:
    bad = np.flatnonzero(~((values > 0) & (values < np.inf)))
    where = tuple(int(i) for i in np.unravel_index(bad[0], span.shape))
    return ScaleValueError.of(span, (bad.size, values.size), values[bad[0]], where)


@kept_open()
def read_tensor(tensor: Tensor, offsets: tuple[int, ...] | None, sizes: tuple[int, ...] | None) -> torch.Tensor:
    """Return a logical tensor, or a region of it, as a new torch tensor: FP8 as bfloat16, all else as stored."""
    import torch

    region = checked_region(tensor, offsets, sizes)
    result = torch.empty(region[1], dtype=torch_dtype(tensor.dtype))
    if result.numel():
        reader = Reader(min(CODES_BUFFER, result.numel()), load_dequantizer)
        tensor.values(region, tensor.dtype, bits_of(result), reader)
    return result


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal bits, and neither is FP8. Memory is two buffers of codes."""
    if a.scaled is not None or b.scaled is not None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    reader, buffers = Reader(CODES_BUFFER, load_dequantizer), np.empty((2, CODES_BUFFER), np.uint8)
    step = CODES_BUFFER * 8 // DTYPE_BITS[a.dtype]
    for start in range(0, a.numel, step):
        left, right = buffers[:, : min(step, a.numel - start) * DTYPE_BITS[a.dtype] // 8]
        a.elements(start, a.dtype, left, reader)
        b.elements(start, a.dtype, right, reader)
        if not np.array_equal(left, right):
            return False
    return True


def bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return a flat numpy view of the bytes of a contiguous CPU tensor. A tensor of one element counts as contiguous
    with any strides.
    """
    import torch

    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def bits_of(tensor: torch.Tensor) -> Bits:
    """Return a numpy view, of any strides, of a CPU tensor's bit patterns, one unsigned number an element."""
    import torch

    itemsize = tensor.element_size()
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]
    bits: Bits = tensor.detach().view(signed).numpy().view(f"u{itemsize}")
    return bits


_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def torch_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype."""
    import torch

    found: torch.dtype = getattr(torch, _TORCH_NAMES[dtype])
    return found


def stored_dtype(dtype: torch.dtype) -> str | None:
    """Return the safetensors dtype of a torch dtype, or None if there is none."""
    name = str(dtype).removeprefix("torch.")
    return next((stored for stored, known in _TORCH_NAMES.items() if known == name), None)

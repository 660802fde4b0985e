"""Read a region of a logical tensor straight into a torch tensor, on any device, with any strides.

On the CPU, codes are looked up from a small buffer into the target itself. On another device, codes are copied as
bytes, through pinned memory for CUDA, and multiplied there: a float32 product and one rounding give the same bits.
Memory beyond the target is a few MiB a thread, and bounded for all threads together (`BEYOND`).
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np
import torch

from fp8ckpt.errors import UnsupportedFormatError
from fp8ckpt.numerics.dequantize import Dequantizer, wider_codes
from fp8ckpt.numerics.geometry import Region, pieces, within
from fp8ckpt.ranks import BEYOND
from fp8ckpt.stores.store import Bytes
from fp8ckpt.tensors.reading import bits_of, load_dequantizer, stored_dtype, torch_dtype
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.tensor import DequantizerOf, Reader, Tensor

_LARGEST_BUFFER = 4 << 20  # bytes; a larger one is not faster
# Bytes for each byte of the buffer: the code here and on the device, its float32 value, at most one float32 scale.
_TIMES_ON_DEVICE = 10
_LEAST_BUFFER = 64 << 10  # bytes, on a machine with a thousand cores


def dequantizers(threads: int) -> DequantizerOf:
    """Return a cached loader of dequantizers for ``threads`` threads, which work close together in a file."""
    return lru_cache(maxsize=2 * threads)(load_dequantizer)


def rounds(stored: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast from ``stored`` to ``target`` may lose information."""
    if stored == target:
        return False
    return stored.is_floating_point != target.is_floating_point or torch.promote_types(stored, target) != target


class RegionLoader:
    """A loader of regions for one thread, with a buffer of its own."""

    def __init__(self, dequantizer: DequantizerOf, threads: int) -> None:
        self._threads = threads
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._reader = Reader(0, dequantizer)

    @property
    def bytes_read(self) -> int:
        """Data bytes read, without scales."""
        return self._reader.bytes_read

    @torch.no_grad()
    def load(self, tensor: Tensor, region: Region, target: torch.Tensor) -> None:
        """Fill ``target``, which has the region's shape. An FP8 tensor is dequantized to the target's dtype; a target
        of the stored FP8 dtype gets the codes themselves. Any other tensor is cast if the dtypes differ, as DCP does.
        """
        dtype = stored_dtype(target.dtype)
        if tensor.scaled is not None and dtype == tensor.scaled.code_dtype:
            tensor = tensor.span
        buffer = self._scratch(target.device)
        if target.device.type == "cpu" and dtype in tensor.dtypes():
            if target.numel():
                tensor.values(region, dtype, bits_of(target), self._reader)
        elif tensor.scaled is None:
            stored = torch_dtype(tensor.dtype)
            for piece in pieces(region, buffer.numel() // stored.itemsize):
                part = buffer[: prod(piece[1]) * stored.itemsize].view(stored).reshape(piece[1])
                tensor.values(piece, tensor.dtype, bits_of(part), self._reader)
                target[within(piece, region)].copy_(part)  # not asynchronously: the buffer is used again
        elif dtype in tensor.dtypes():
            dequantizer = self._reader.dequantizer(tensor.scaled, dtype)
            region, out = tensor.scaled.of_codes(region), target.mT if tensor.scaled.across else target
            for piece, packed in tensor.scaled.codes(region, self._reader):
                codes = _codes_of(tensor.scaled, piece, packed, buffer)
                values = out[within(piece, region)]
                dequantize_on_device(codes.to(target.device), dequantizer, piece[0], values)
                if dequantizer.may_overflow:
                    tensor.scaled.refuse_overflow(count_overflown(codes.to(values.device), values), dtype)
        else:
            known = [str(torch_dtype(name)) for name in tensor.dtypes()]
            known += [f"{torch_dtype(tensor.span.dtype)} for the codes"] if tensor.scaled.per_byte == 1 else []
            what, remedy = f"a target of dtype {target.dtype} for a quantized tensor", "change the model's dtype"
            raise UnsupportedFormatError.of_dtype(tensor.name, tensor.span.file, what, known, remedy)

    def _scratch(self, device: torch.device) -> torch.Tensor:
        """Return the buffer, pinned if the device is CUDA; the reader's ``room`` is the same memory."""
        pin = device.type == "cuda"
        if not self._buffer.numel() or pin != self._buffer.is_pinned():
            share = BEYOND // self._threads // (1 if device.type == "cpu" else _TIMES_ON_DEVICE)
            size = min(_LARGEST_BUFFER, max(share, _LEAST_BUFFER)) & -8  # whole elements of any dtype
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
            self._reader.room = self._buffer.numpy()
        return self._buffer


def _codes_of(tensor: QuantizedTensor, piece: Region, stored: Bytes, buffer: torch.Tensor) -> torch.Tensor:
    """Return the codes of a piece, one an element: 8-bit codes as a view of the ``buffer`` that they were read into,
    4-bit codes as 8-bit codes of the same values.
    """
    if tensor.per_byte == 1:
        return buffer[: stored.size].view(torch_dtype(tensor.code_dtype)).reshape(piece[1])
    return torch.from_numpy(wider_codes(stored, *piece)).view(torch.float8_e4m3fn)


def dequantize_on_device(
    codes: torch.Tensor, dequantizer: Dequantizer, offsets: tuple[int, ...], target: torch.Tensor
) -> None:
    """``target = round(float32(codes) * float32(scales))`` with torch's own kernels, on the device of both.

    ``codes``: FP8, of a region at ``offsets`` in the full tensor; ``target``: of the same shape, bfloat16, float16 or
    float32.
    """
    values = codes.to(torch.float32)
    values *= expanded_scales(dequantizer, offsets, tuple(codes.shape), codes.device)
    target.copy_(values)


def count_overflown(codes: torch.Tensor, values: torch.Tensor) -> int:
    """The number of infinite values whose codes are finite; both tensors are on one device."""
    return int((values.isinf() & codes.to(torch.float32).isfinite()).sum())


def expanded_scales(
    dequantizer: Dequantizer, offsets: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """The float32 scales of a region, in a shape that broadcasts to it: 1 where a single block spans a dimension."""
    scales = dequantizer.scales
    grid = dequantizer.grid
    for axis, (start, size, block) in enumerate(zip(offsets, sizes, grid.block_size, strict=True)):
        first, last = start // block, (start + max(size, 1) - 1) // block
        index = [first] if first == last else np.arange(start, start + size) // block
        scales = np.take(scales, index, axis=axis)
    return torch.from_numpy(np.ascontiguousarray(scales)).to(device)

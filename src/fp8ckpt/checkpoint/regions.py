"""Read a region of a logical tensor straight into a torch tensor, on any device, with any strides.

On the CPU, codes are looked up from a small buffer into the target itself. Elsewhere the codes travel as bytes, through
pinned memory where the device is CUDA, and are multiplied there: float32 product, one rounding, the same bits. Memory
beyond the target is a few MiB a thread, and bounded for all threads together (`BEYOND`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod

import numpy as np
import torch

from fp8ckpt.errors import UnsupportedFormatError
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.numerics.dequantize import Dequantizer
from fp8ckpt.numerics.geometry import Region, pieces, within
from fp8ckpt.tensors.header import DTYPE_BITS, TensorSpan
from fp8ckpt.tensors.pairing import LogicalTensor, QuantizedTensor
from fp8ckpt.tensors.reading import (
    bits_of,
    bytes_of,
    load_dequantizer,
    read_dequantized,
    read_region,
    stored_dtype,
    torch_dtype,
)

BEYOND = 64 << 20  # bytes; what all threads of a rank together may take beyond the model
_LARGEST_BUFFER = 4 << 20  # bytes; more makes nothing faster
# Beside the buffer of codes: on a device the codes again, their float32 values, and at most as many float32 scales.
_TIMES_ON_DEVICE = 10
_LEAST_BUFFER = 64 << 10  # bytes; of a machine with a thousand cores

DequantizerOf = Callable[[QuantizedTensor, str], Dequantizer]


def dequantizers(threads: int) -> DequantizerOf:
    """A cache of the dequantizers that ``threads`` threads are using; they stay close together in a file."""
    return lru_cache(maxsize=2 * threads)(load_dequantizer)


def rounds(stored: torch.dtype, target: torch.dtype) -> bool:
    """Whether a tensor of the one dtype may lose something when it is cast to the other."""
    if stored == target:
        return False
    return stored.is_floating_point != target.is_floating_point or torch.promote_types(stored, target) != target


class RegionLoader:
    """One thread's means of loading: its buffer."""

    def __init__(self, dequantizer: DequantizerOf, threads: int) -> None:
        self.bytes_read = 0
        self._dequantizer = dequantizer
        self._threads = threads
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def load(self, tensor: LogicalTensor, region: Region, target: torch.Tensor) -> None:
        """Fill ``target``, which has the region's sizes. An FP8 tensor is dequantized to the target's dtype; a target
        of the stored FP8 dtype gets the codes themselves. Any other tensor is cast where the dtypes differ, as DCP
        does.
        """
        if isinstance(tensor, QuantizedTensor) and stored_dtype(target.dtype) == tensor.weight.dtype:
            self._load_plain(tensor.weight, region, target)
        elif isinstance(tensor, QuantizedTensor):
            self._load_quantized(tensor, region, target)
        else:
            self._load_plain(tensor, region, target)

    def _load_quantized(self, tensor: QuantizedTensor, region: Region, target: torch.Tensor) -> None:
        dtype = stored_dtype(target.dtype)
        if dtype not in TARGET_BYTES:
            found = f"a target of dtype {target.dtype} for an FP8 tensor"
            targets = ", ".join(str(torch_dtype(name)) for name in TARGET_BYTES)
            expected = f"one of {targets}, or {torch_dtype(tensor.weight.dtype)} for the codes"
            raise UnsupportedFormatError(
                found, tensor=tensor.name, file=tensor.weight.file, expected=expected, remedy="change the model's dtype"
            )
        dequantizer = self._dequantizer(tensor, dtype)
        buffer = self._scratch(target.device)
        if target.device.type == "cpu":
            read_dequantized(tensor, dequantizer, region, bits_of(target, dtype), buffer.numpy())
            self.bytes_read += prod(region[1])
            return
        for piece in pieces(region, buffer.numel()):
            codes = self._read(tensor.weight, piece, buffer)
            codes = codes.view(torch_dtype(tensor.weight.dtype)).reshape(piece[1])
            dequantize_on_device(codes.to(target.device), dequantizer, piece[0], target[within(piece, region)])

    def _load_plain(self, span: TensorSpan, region: Region, target: torch.Tensor) -> None:
        dtype = torch_dtype(span.dtype)
        if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
            if target.numel():
                read_region(span, *region, bytes_of(target))
                self.bytes_read += target.nbytes
            return
        buffer = self._scratch(target.device)
        for piece in pieces(region, buffer.numel() * 8 // DTYPE_BITS[span.dtype]):
            target[within(piece, region)].copy_(self._read(span, piece, buffer).view(dtype).reshape(piece[1]))

    def _read(self, span: TensorSpan, piece: Region, buffer: torch.Tensor) -> torch.Tensor:
        """Read a piece's bytes into the buffer. It is used again for the next piece: wait for copies out of it."""
        scratch = buffer[: prod(piece[1]) * DTYPE_BITS[span.dtype] // 8]
        read_region(span, *piece, scratch.numpy())
        self.bytes_read += scratch.nbytes
        return scratch

    def _scratch(self, device: torch.device) -> torch.Tensor:
        pin = device.type == "cuda"
        if not self._buffer.numel() or pin != self._buffer.is_pinned():
            share = BEYOND // self._threads // (1 if device.type == "cpu" else _TIMES_ON_DEVICE)
            size = min(_LARGEST_BUFFER, max(share, _LEAST_BUFFER)) & -8  # whole elements of any dtype
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        return self._buffer


def dequantize_on_device(
    codes: torch.Tensor, dequantizer: Dequantizer, offsets: tuple[int, ...], target: torch.Tensor
) -> None:
    """``target = round(float32(codes) * float32(scales))`` with torch's own kernels, on the device where both lie.

    ``codes``: FP8, of a region at ``offsets`` in the full tensor; ``target``: of the same shape, bfloat16, float16 or
    float32.
    """
    values = codes.to(torch.float32)
    values *= expanded_scales(dequantizer, offsets, tuple(codes.shape), codes.device)
    target.copy_(values)


def expanded_scales(
    dequantizer: Dequantizer, offsets: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """The scales f32 of a region, of a shape that broadcasts against it: 1 where one block spans a dimension."""
    scales = dequantizer.scales
    grid = dequantizer.grid
    for axis, (start, size, block) in enumerate(zip(offsets, sizes, grid.block_size, strict=True)):
        first, last = start // block, (start + max(size, 1) - 1) // block
        index = [first] if first == last else np.arange(start, start + size) // block
        scales = np.take(scales, index, axis=axis)
    return torch.from_numpy(np.ascontiguousarray(scales)).to(device)

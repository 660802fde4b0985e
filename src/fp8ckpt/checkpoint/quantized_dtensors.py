"""Dequantize and quantize torch tensors that may be shards: the part of the adapters that touches values.

A DTensor's local shard is worked on in the coordinates of the full tensor, so blocks need not align with the edges of
shards. Scales are small, and every rank has all of them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fp8ckpt.checkpoint.regions import count_overflown, dequantize_on_device
from fp8ckpt.encodings.rule import Rule
from fp8ckpt.errors import RangeError, ScaleShapeError, ScaleValueError, WeightValueError
from fp8ckpt.numerics.codes import F32, FP8_SCALES, SCALE_DTYPES, TARGET_BYTES, count_bad_scales, scale_values
from fp8ckpt.numerics.dequantize import Dequantizer
from fp8ckpt.numerics.geometry import BlockGrid, infer_grid, pieces, within
from fp8ckpt.numerics.quantize import E4M3, Mask, Scales
from fp8ckpt.tensors.reading import bits_of, bytes_of, stored_dtype, torch_dtype

_ON_DEVICE = 4 << 20  # elements; float32 temporaries take four times as many bytes

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def dequantize(
    name: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    block_size: tuple[int, ...] | None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return the values of FP8 codes, by the contract, as a new tensor with the weight's device and placements.

    ``scale``: of any dtype that scales have in files, one element or a grid of ``block_size``; a whole tensor or a
    DTensor. Raises `ScaleShapeError` and `ScaleValueError`, and `RangeError` if finite codes have values beyond
    ``dtype``.
    """
    whole = (scale.full_tensor() if isinstance(scale, DTensor) else scale).detach().cpu().contiguous()
    scale_dtype = stored_dtype(whole.dtype) or ""
    if scale_dtype not in FP8_SCALES:
        raise ScaleValueError.of_dtype(name, dtype=whole.dtype, known=", ".join(FP8_SCALES))
    grid = infer_grid(tuple(weight.shape), tuple(whole.shape), block_size)
    if grid is None:
        raise ScaleShapeError.of_grid(name, scale=tuple(whole.shape), weight=tuple(weight.shape), block=block_size)
    scales = bytes_of(whole).view(SCALE_DTYPES[scale_dtype])
    if bad := count_bad_scales(scale_values(scales, scale_dtype)):
        raise ScaleValueError.of_placeholders(name, count=bad, all=scales.size)
    target = stored_dtype(dtype) if stored_dtype(dtype) in TARGET_BYTES else "F32"
    dequantizer = Dequantizer(grid, scales, scale_dtype, stored_dtype(weight.dtype) or "", target or "F32")
    codes, offsets = local_shard(weight)
    values = torch.empty(codes.shape, dtype=torch.float32 if target == "F32" else dtype, device=codes.device)
    if codes.numel():
        if codes.device.type == "cpu":
            dequantizer.region(codes.contiguous().view(torch.uint8).numpy(), offsets, bits_of(values))
        else:
            region = (offsets, tuple(codes.shape))
            for piece in pieces(region, _ON_DEVICE):
                part = within(piece, region)
                dequantize_on_device(codes[part], dequantizer, piece[0], values[part])
        if dequantizer.may_overflow and (overflown := count_overflown(codes, values)):
            raise RangeError.of_codes(name, overflown, dequantizer.dtype)
    return like(weight, values.to(dtype))


def local_shard(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return this rank's part of a tensor, and its offsets in the full tensor."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.dim()
    # The protocol by which DCP asks a tensor where its shard lies; torch leaves it untyped.
    chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    local = tensor.to_local().detach()
    offsets = tuple(chunks[0].offsets) if chunks and local.numel() else (0,) * local.dim()
    return local, offsets


def like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return ``local`` as this rank's part of a tensor with the placements of ``tensor``."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _largest_of_all(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum of ``values`` over the ranks that hold parts of ``tensor``."""
    if isinstance(tensor, DTensor):
        for dim in range(tensor.device_mesh.ndim):
            dist.all_reduce(values, dist.ReduceOp.MAX, group=tensor.device_mesh.get_group(dim))
    return values


def quantize(
    rule: Rule, weight: torch.Tensor, block_size: tuple[int, ...] | None, before: Scales | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes e4m3fn, scales of the grid) of a weight, the same on every mesh; one 0-d scale without a block
    size.

    ``before``: the previous scales as stored, if any; each is kept if its block still fits it. Raises
    `WeightValueError`, on all ranks, if the weight is not finite on any of them, and `RangeError`.
    """
    blocks = _Blocks(weight, block_size)
    local = blocks.local
    maxima = blocks.largest(_finite_or_inf(local.abs())).cpu().numpy()
    if not np.isfinite(maxima).all():
        count = int((~local.isfinite()).sum())
        found = f"{count} elements are not finite" if count else "elements of another rank's part are not finite"
        raise WeightValueError.of(rule.name, file=None, found=found)
    exact = None
    if before is not None:
        before = before.reshape(maxima.shape)
        exact = blocks.given_back_by(kept) if rule.asks(maxima, kept := rule.before(before)) else None
    decided = rule.decide(maxima, before, exact)
    codes = _encode(local, blocks.spread(decided.scales))
    scales = torch.from_numpy(np.ascontiguousarray(decided.stored).reshape(-1).view(np.uint8))
    return like(weight, codes), scales.view(torch_dtype(rule.dtype)).reshape(blocks.shape).to(local.device)


class _Blocks:
    """This rank's part of a weight, and where its elements lie in the grid of blocks."""

    def __init__(self, weight: torch.Tensor, block_size: tuple[int, ...] | None) -> None:
        self.weight = weight
        self.local, offsets = local_shard(weight)
        self.shape: tuple[int, ...] = ()
        self._index: list[torch.Tensor] = []
        if block_size is not None:
            self.shape = BlockGrid(tuple(weight.shape), block_size).shape
            device = self.local.device
            self._index = [
                torch.arange(start, start + size, device=device) // block
                for start, size, block in zip(offsets, self.local.shape, block_size, strict=True)
            ]

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of ``values``, one non-negative value an element, in each block of the whole weight."""
        start = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        if values.numel() and self._index:
            index = self._index[0]
            for axis, block in enumerate(self._index[1:], 1):
                index = index.unsqueeze(-1) * self.shape[axis] + block
            start.view(-1).scatter_reduce_(0, index.reshape(-1), values.reshape(-1), "amax")
        elif values.numel():
            start = torch.maximum(start, values.max())
        return _largest_of_all(start, self.weight)

    def given_back_by(self, scales: F32) -> Mask:
        """Which blocks of the whole weight these scales give back exactly."""
        spread = self.spread(scales)
        values = (_encode(self.local, spread).to(torch.float32) * spread).to(self.local.dtype)
        exact: Mask = (self.largest(values.ne(self.local).to(torch.float32)) == 0).cpu().numpy()
        return exact

    def spread(self, scales: F32) -> torch.Tensor:
        """Scales of the grid, in a shape that broadcasts against this rank's elements."""
        spread = torch.from_numpy(np.ascontiguousarray(scales)).to(self.local.device)
        for axis, block in enumerate(self._index):
            spread = spread.index_select(axis, block)
        return spread


def _finite_or_inf(magnitudes: torch.Tensor) -> torch.Tensor:
    """The magnitudes as float32, with NaN made infinite: the maximum over ranks is not defined for NaN."""
    return magnitudes.to(torch.float32).nan_to_num(nan=np.inf, posinf=np.inf)


def _encode(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    most = float(E4M3.largest)
    return (values.to(torch.float32) / scales).clamp(-most, most).to(torch.float8_e4m3fn)

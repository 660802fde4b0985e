"""Dequantize and quantize torch tensors that may be shards: the part of the adapters that touches values.

A DTensor's local shard is worked on in the coordinates of the full tensor, so blocks need not meet the edges of shards. Scales
are small, and whole on every rank.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fp8ckpt.checkpoint.regions import dequantize_on_device
from fp8ckpt.errors import ScaleShapeError, ScaleValueError, WeightValueError
from fp8ckpt.numerics.codes import SCALE_DTYPES, TARGET_BYTES, count_bad_scales, scale_values
from fp8ckpt.numerics.dequantize import Dequantizer
from fp8ckpt.numerics.grid import BlockGrid, infer_grid
from fp8ckpt.storage.files import pieces, within
from fp8ckpt.storage.reading import bits_of, stored_dtype

LARGEST_CODE = 448.0  # of e4m3fn
_ON_DEVICE = 4 << 20  # elements; float32 temporaries take four times as many bytes

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def dequantize(
    name: str, weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, ...] | None, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The values of FP8 codes, by the contract, as a new tensor of the weight's device and placements.

    ``scale``: of any dtype that files have, one element or a grid of ``block_size``; whole, or a DTensor. Raises
    `ScaleShapeError` and `ScaleValueError`.
    """
    whole = (scale.full_tensor() if isinstance(scale, DTensor) else scale).detach().cpu().contiguous()
    scale_dtype = stored_dtype(whole.dtype) or ""
    if scale_dtype not in SCALE_DTYPES:
        raise ScaleValueError(f"a scale of dtype {whole.dtype}", tensor=name, expected=f"one of {', '.join(SCALE_DTYPES)}")
    grid = infer_grid(tuple(weight.shape), tuple(whole.shape), block_size)
    if grid is None:
        raise ScaleShapeError(
            f"scale shape {tuple(whole.shape)} does not fit weight {tuple(weight.shape)}",
            tensor=name,
            expected=f"a grid of blocks of {block_size}",
        )
    scales = whole.reshape(-1).view(torch.uint8).numpy().view(SCALE_DTYPES[scale_dtype])
    if bad := count_bad_scales(scale_values(scales, scale_dtype)):
        raise ScaleValueError(f"{bad} of {scales.size} scales are not finite and positive", tensor=name, remedy="was the scale loaded?")
    target = stored_dtype(dtype) if stored_dtype(dtype) in TARGET_BYTES else "F32"
    dequantizer = Dequantizer(grid, scales, scale_dtype, stored_dtype(weight.dtype) or "", target or "F32")
    codes, offsets = local_shard(weight)
    values = torch.empty(codes.shape, dtype=torch.float32 if target == "F32" else dtype, device=codes.device)
    if codes.numel():
        if codes.device.type == "cpu":
            dequantizer.region(codes.contiguous().view(torch.uint8).numpy(), offsets, bits_of(values, target or "F32"))
        else:
            region = (offsets, tuple(codes.shape))
            for piece in pieces(region, _ON_DEVICE):
                part = within(piece, region)
                dequantize_on_device(codes[part], dequantizer, piece[0], values[part])
    return like(weight, values.to(dtype))


def local_shard(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's part of a tensor, and its offsets in the full tensor."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.dim()
    # The protocol by which DCP asks a tensor where its shard lies; torch leaves it untyped.
    chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    local = tensor.to_local().detach()
    offsets = tuple(chunks[0].offsets) if chunks and local.numel() else (0,) * local.dim()
    return local, offsets


def like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """``local`` as this rank's part of a tensor that is placed as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _largest_of_all(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum of ``values`` over the ranks that hold parts of ``tensor``."""
    if isinstance(tensor, DTensor):
        for dim in range(tensor.device_mesh.ndim):
            dist.all_reduce(values, dist.ReduceOp.MAX, group=tensor.device_mesh.get_group(dim))
    return values


def quantize_per_tensor(name: str, weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3fn, 0-d scale) of a weight, the same on every mesh.

    Where some scale reproduces the weight exactly - it was FP8 before - that scale is found; otherwise it is ``amax / 448``,
    rounded up so that nothing clips, and 1 for a weight of zeros. Raises `WeightValueError` where the weight is not finite.
    """
    local, _ = local_shard(weight)
    amax = _largest_of_all(_amax(name, local, weight), weight)
    if not float(amax):
        scale = torch.ones((), dtype=scale_dtype, device=local.device)
        return like(weight, _encode(local, scale)), scale
    # A weight that was FP8 has as its largest element one of e4m3's seven largest values, times the scale
    # and a power of two.
    for significand in (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0):
        scale = (amax / significand).to(scale_dtype)
        if not float(scale) or not bool(scale.isfinite()):
            continue
        codes = _encode(local, scale)
        differs = (codes.to(torch.float32) * scale.to(torch.float32)).to(local.dtype).ne(local).any().to(torch.float32)
        if not float(_largest_of_all(differs, weight)):
            return like(weight, codes), scale
    scale = _rounded_up(amax / LARGEST_CODE, scale_dtype)
    return like(weight, _encode(local, scale)), scale


def quantize_blocks(name: str, weight: torch.Tensor, block_size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3fn, scales f32 of the grid, whole on every rank) of a weight, the same on every mesh."""
    grid = BlockGrid(tuple(weight.shape), block_size)
    local, offsets = local_shard(weight)
    amax = torch.zeros(grid.shape, dtype=torch.float32, device=local.device)
    blocks = [
        torch.arange(start, start + size, device=local.device) // block
        for start, size, block in zip(offsets, local.shape, block_size, strict=True)
    ]
    if local.numel():
        _amax(name, local, weight)  # refuses what is not finite
        index = blocks[0]
        for axis, block in enumerate(blocks[1:], 1):
            index = index.unsqueeze(-1) * grid.shape[axis] + block
        amax.view(-1).scatter_reduce_(0, index.reshape(-1), local.abs().to(torch.float32).reshape(-1), "amax")
    scales = _largest_of_all(amax, weight) / LARGEST_CODE
    scales[scales == 0] = 1.0
    expanded = scales
    for axis, block in enumerate(blocks):
        expanded = expanded.index_select(axis, block)
    return like(weight, _encode(local, expanded)), scales


def _amax(name: str, local: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude f32 of a shard; refuses NaN and infinity."""
    if not local.numel():
        return torch.zeros((), device=local.device)
    amax = local.abs().max().to(torch.float32)
    if not bool(amax.isfinite()):
        found = f"{int((~local.isfinite()).sum())} elements are not finite"
        raise WeightValueError(found, tensor=name, expected="finite weights", remedy="find out where the training diverged")
    return amax


def _encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values.to(torch.float32) / scale.to(torch.float32)).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn)


def _rounded_up(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The least value of ``dtype`` that is not below a positive float32."""
    rounded = value.to(dtype)
    return torch.where(rounded.to(torch.float32) < value, torch.nextafter(rounded, torch.full_like(rounded, np.inf)), rounded)

"""Dequantize and quantize torch tensors that may be shards: the part of the adapters that touches values.

A DTensor's local shard is worked on in the coordinates of the full tensor, so blocks need not meet the edges of shards.
Scales are small, and whole on every rank.
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
from fp8ckpt.numerics.geometry import BlockGrid, infer_grid, pieces, within
from fp8ckpt.tensors.reading import bits_of, bytes_of, stored_dtype

LARGEST_CODE = 448.0  # of e4m3fn
_LOOK = 1 << 16  # elements
_ON_DEVICE = 4 << 20  # elements; float32 temporaries take four times as many bytes

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def dequantize(
    name: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    block_size: tuple[int, ...] | None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """The values of FP8 codes, by the contract, as a new tensor of the weight's device and placements.

    ``scale``: of any dtype that files have, one element or a grid of ``block_size``; whole, or a DTensor. Raises
    `ScaleShapeError` and `ScaleValueError`.
    """
    whole = (scale.full_tensor() if isinstance(scale, DTensor) else scale).detach().cpu().contiguous()
    scale_dtype = stored_dtype(whole.dtype) or ""
    if scale_dtype not in SCALE_DTYPES:
        raise ScaleValueError(
            f"a scale of dtype {whole.dtype}", tensor=name, expected=f"one of {', '.join(SCALE_DTYPES)}"
        )
    grid = infer_grid(tuple(weight.shape), tuple(whole.shape), block_size)
    if grid is None:
        raise ScaleShapeError(
            f"scale shape {tuple(whole.shape)} does not fit weight {tuple(weight.shape)}",
            tensor=name,
            expected=f"a grid of blocks of {block_size}",
        )
    scales = bytes_of(whole).view(SCALE_DTYPES[scale_dtype])
    if bad := count_bad_scales(scale_values(scales, scale_dtype)):
        raise ScaleValueError(
            f"{bad} of {scales.size} scales are not finite and positive", tensor=name, remedy="was the scale loaded?"
        )
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
    name: str, weight: torch.Tensor, block_size: tuple[int, ...] | None, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3fn, scales of the grid) of a weight, the same on every mesh; without a block size one 0-d scale.

    Where a scale reproduces a block exactly - it was FP8 before - such a scale is found; otherwise it is ``amax /
    448``, rounded up so that nothing clips, and 1 for zeros. Raises `WeightValueError`, on all ranks, where the weight
    is not finite on any.
    """
    blocks = _Blocks(weight, block_size)
    local = blocks.local
    amax = blocks.largest(_finite_or_inf(local.abs()))
    if not bool(amax.isfinite().all()):
        count = int((~local.isfinite()).sum())
        found = f"{count} elements are not finite" if count else "elements of another rank's part are not finite"
        raise WeightValueError(
            found, tensor=name, expected="finite weights", remedy="find out where the training diverged"
        )
    scales = torch.where(
        amax > 0, _rounded_up(amax / LARGEST_CODE, scale_dtype), torch.ones_like(amax, dtype=scale_dtype)
    )
    if block_size is not None or not _has_moved(local, weight):
        scales = _reproducing(blocks, amax, scales)
    return like(weight, _encode(local, blocks.spread(scales))), scales


def _has_moved(local: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a weight with one scale cannot have been FP8: those have at most 126 magnitudes besides zero, and a look
    tells.
    """
    magnitudes = torch.unique(local.reshape(-1)[:_LOOK].abs())
    return bool(_largest_of_all(torch.tensor(float(magnitudes.numel() > 127), device=local.device), weight))


def _reproducing(blocks: _Blocks, amax: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``scales``, with those replaced for which another reproduces its block exactly.

    The largest element of a block that was FP8 is one of e4m3's eight significands, times its scale and a power of two,
    which gives all codes of the block; and each code bounds the scales with which it rounds to its element.
    """
    local = blocks.local
    value = local.abs().to(torch.float64)
    below = torch.nextafter(local.abs(), torch.zeros_like(local)).to(torch.float64)
    above = torch.nextafter(local.abs(), torch.full_like(local, np.inf)).to(torch.float64)
    open_blocks = amax > 0
    for significand in (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0):
        codes = _encode(local, blocks.spread(torch.where(amax > 0, amax / significand, torch.ones_like(amax))))
        magnitude = codes.to(torch.float64).abs()
        least = torch.where(magnitude > 0, (value + below) / 2 / magnitude, torch.zeros_like(value))
        most = torch.where(magnitude > 0, (value + above) / 2 / magnitude, torch.full_like(value, np.inf))
        middle = ((blocks.largest(least) - blocks.largest(-most, -np.inf)) / 2).to(torch.float32).to(scales.dtype)
        for scale in (
            middle,
            torch.nextafter(middle, torch.full_like(middle, np.inf)),
            torch.nextafter(middle, torch.zeros_like(middle)),
        ):
            product = codes.to(torch.float32) * blocks.spread(scale).to(torch.float32)
            differs = blocks.largest(product.to(local.dtype).ne(local).to(torch.float32))
            found = open_blocks & (differs == 0) & (scale > 0) & scale.isfinite()
            scales = torch.where(found, scale, scales)
            open_blocks = open_blocks & ~found
        if not bool(open_blocks.any()):
            break
    return scales


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

    def largest(self, values: torch.Tensor, least: float = 0.0) -> torch.Tensor:
        """The largest of ``values``, one an element, in each block of the whole weight, and not below ``least``."""
        start = torch.full(self.shape, least, dtype=values.dtype, device=values.device)
        if values.numel() and self._index:
            index = self._index[0]
            for axis, block in enumerate(self._index[1:], 1):
                index = index.unsqueeze(-1) * self.shape[axis] + block
            start.view(-1).scatter_reduce_(0, index.reshape(-1), values.reshape(-1), "amax")
        elif values.numel():
            start = torch.maximum(start, values.max())
        return _largest_of_all(start, self.weight)

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales of the grid, so that they meet this rank's elements."""
        for axis, block in enumerate(self._index):
            scales = scales.index_select(axis, block)
        return scales


def _finite_or_inf(magnitudes: torch.Tensor) -> torch.Tensor:
    """As float32, with NaN made infinite: a maximum over ranks is defined for the one, and not for the other."""
    return magnitudes.to(torch.float32).nan_to_num(nan=np.inf, posinf=np.inf)


def _encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (
        (values.to(torch.float32) / scale.to(torch.float32)).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn)
    )


def _rounded_up(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The least value of ``dtype`` that is not below a positive float32."""
    rounded = value.to(dtype)
    return torch.where(
        rounded.to(torch.float32) < value, torch.nextafter(rounded, torch.full_like(rounded, np.inf)), rounded
    )

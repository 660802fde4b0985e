"""Look at a checkpoint: what is FP8, with which scales, what is not and why, what it will take in BF16, what is wrong.

Headers and scales are read, no weights. Every defect is listed, not only the first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fp8ckpt.errors import Fp8CheckpointError
from fp8ckpt.families.kinds import starred
from fp8ckpt.numerics.geometry import BlockGrid
from fp8ckpt.stores.local import kept_open
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, collector_paused, survey
from fp8ckpt.tensors.config import skip_patterns, skips
from fp8ckpt.tensors.pairing import QuantizedTensor


@dataclass(frozen=True)
class Scheme:
    """FP8 tensors scaled in the same way. ``block`` names the block size, ``scale_shape`` a shape or "various"."""

    dtype: str
    block: str
    scale_dtype: str
    scale_shape: str
    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Unquantized:
    """Tensors of one dtype that are not FP8, and why; ``modules`` are examples, with layer numbers starred."""

    dtype: str
    reason: str
    tensors: int
    elements: int
    bytes: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. Sizes are in bytes; ``bf16_bytes`` is what the tensors will take once converted."""

    path: Path
    files: int
    tensors: int
    elements: int
    stored_bytes: int
    bf16_bytes: int
    schemes: tuple[Scheme, ...]
    unquantized: tuple[Unquantized, ...]
    activation_scales: int
    cache_scales: int
    notes: tuple[str, ...]
    defects: tuple[Fp8CheckpointError, ...]


@kept_open()
def inspect(path: CheckpointLike, *, follow_index: bool = False) -> Inspection:
    """Inspect a directory, a single file or a cached hub id. Raises only where there is nothing to look at."""
    with collector_paused():
        return _inspect(path, follow_index)


def _inspect(path: CheckpointLike, follow_index: bool) -> Inspection:
    from fp8ckpt.tensors.reading import scale_defects

    checkpoint = survey(path, follow_index=follow_index)
    quantized = checkpoint.quantized
    defects = [*checkpoint.defects, *scale_defects(quantized, checkpoint.cache_scales)]
    plain_bytes = sum(
        tensor.nbytes for tensor in checkpoint.tensors.values() if not isinstance(tensor, QuantizedTensor)
    )
    return Inspection(
        path=checkpoint.path,
        files=len(checkpoint.files),
        tensors=len(checkpoint.tensors),
        elements=sum(tensor.numel for tensor in checkpoint.tensors.values()),
        stored_bytes=sum(span.nbytes for header in checkpoint.files for span in header.spans),
        bf16_bytes=plain_bytes + sum(2 * tensor.numel for tensor in quantized),
        schemes=_schemes(quantized),
        unquantized=_unquantized(checkpoint, any_quantized=bool(quantized)),
        activation_scales=sum(len(tensor.activation_scales) for tensor in quantized),
        cache_scales=len(checkpoint.cache_scales),
        notes=(*(str(slip) for slip in checkpoint.slips), *checkpoint.notes),
        defects=tuple(defects),
    )


def _schemes(quantized: list[QuantizedTensor]) -> tuple[Scheme, ...]:
    groups: dict[tuple[str, str, str], list[QuantizedTensor]] = {}
    for tensor in quantized:
        groups.setdefault((tensor.weight.dtype, _block_name(tensor.grid), tensor.scale.dtype), []).append(tensor)
    schemes = []
    for (dtype, block, scale_dtype), tensors in groups.items():
        shapes = {tensor.scale.shape for tensor in tensors}
        shape = str(list(shapes.pop())) if len(shapes) == 1 else "various"
        elements = sum(tensor.numel for tensor in tensors)
        schemes.append(
            Scheme(
                dtype,
                block,
                scale_dtype,
                shape,
                len(tensors),
                elements,
                elements + sum(tensor.scale.nbytes for tensor in tensors),
            )
        )
    return tuple(sorted(schemes, key=lambda scheme: -scheme.elements))


@lru_cache(maxsize=4096)
def _block_name(grid: BlockGrid) -> str:
    """Either "per tensor", or the block size with "all" for a dimension that a block spans."""
    if grid.per_tensor:
        return "per tensor"
    return " x ".join(
        "all" if size == dim > 1 else str(size) for size, dim in zip(grid.block_size, grid.weight_shape, strict=True)
    )


def _unquantized(checkpoint: Checkpoint, *, any_quantized: bool) -> tuple[Unquantized, ...]:
    patterns = skip_patterns(checkpoint.store, checkpoint.config)
    groups: dict[tuple[str, str], list[int]] = {}
    modules: dict[tuple[str, str], Counter[str]] = {}
    reasons: dict[str, str] = {}  # by starred name: layers repeat
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            continue
        kind = starred(name)
        reason = reasons.get(kind)
        if reason is None:
            reason = reasons[kind] = _reason(name, len(tensor.shape), patterns, any_quantized)
        key = (tensor.dtype, reason)
        sums = groups.setdefault(key, [0, 0, 0])
        sums[0] += 1
        sums[1] += tensor.numel
        sums[2] += tensor.nbytes
        modules.setdefault(key, Counter())[kind] += 1
    rows = [
        Unquantized(
            dtype, reason, sums[0], sums[1], sums[2], tuple(name for name, _ in modules[dtype, reason].most_common(3))
        )
        for (dtype, reason), sums in groups.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.elements))


def _reason(name: str, rank: int, patterns: tuple[str, ...], any_quantized: bool) -> str:
    module = name.rpartition(".")[0]
    if not any_quantized:
        return "nothing is quantized"
    if any(skips(pattern, module) for pattern in patterns):
        return "in the configuration's skip list"
    if rank < 2:
        return "a vector (norm, bias)"
    if "embed" in module.rpartition(".")[2]:
        return "an embedding"
    return "stored without a scale"

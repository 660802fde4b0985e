"""Look at a checkpoint: what is FP8 and with which scales, what is not and why, its size in BF16, and its defects.

`inspect` reads headers and scales, and no weights. It lists every defect, not only the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fp8ckpt.collector import collector_paused
from fp8ckpt.errors import Fp8CheckpointError, UnknownTensorError
from fp8ckpt.families.kinds import places, starred
from fp8ckpt.families.names import name_pattern
from fp8ckpt.numerics.codes import SCALE_DTYPES
from fp8ckpt.numerics.geometry import BlockGrid, tiled
from fp8ckpt.stores.local import kept_open
from fp8ckpt.tensors.blocks import BlockSizes, block_sizes
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, survey
from fp8ckpt.tensors.config import skip_patterns, skips
from fp8ckpt.tensors.formats import module_of
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import Tensor

if TYPE_CHECKING:
    from fp8ckpt.tensors.scale_ranges import ScaleRange


@dataclass(frozen=True)
class Scheme:
    """Quantized tensors that are scaled in the same way. ``dtype`` is that of the codes (F4 for codes of four bits),
    ``block`` names the block size, ``scale_shape`` is a shape or "various".
    """

    dtype: str
    block: str
    scale_dtype: str
    scale_shape: str
    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Unquantized:
    """Tensors of one dtype that are not FP8, and the reason. ``modules`` are examples, with layer numbers starred."""

    dtype: str
    reason: str
    tensors: int
    elements: int
    bytes: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class TensorRow:
    """One tensor. The fields about scales are None if it is not FP8. ``scales`` is also None if one of the scales is a
    defect, and ``activation_scales`` if there are none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    block: str | None = None
    scale_dtype: str | None = None
    scale_shape: tuple[int, ...] | None = None
    scales: ScaleRange | None = None
    activation_scales: ScaleRange | None = None


@dataclass(frozen=True)
class KindOfScales:
    """The scales of all weights of one kind. ``outliers`` maps each weight whose scales stand out to the factor by
    which they do; see `fp8ckpt.tensors.scale_ranges`.
    """

    kind: str
    weights: int
    scales: ScaleRange
    outliers: dict[str, float]


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`. Sizes are in bytes; ``bf16_bytes`` is the size of the tensors once converted. ``listed``
    and ``scales`` are empty unless they were asked for.

    >>> found = fp8ckpt.inspect("sample-fp8")
    >>> found.stored_bytes < found.bf16_bytes
    True
    """

    path: Path | str
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
    listed: tuple[TensorRow, ...] = ()
    scales: tuple[KindOfScales, ...] = ()


@kept_open()
def inspect(
    path: CheckpointLike, *, follow_index: bool = False, tensor: str | None = None, scales: bool = False
) -> Inspection:
    """Inspect a directory, a single file or a cached hub id. Raises only if there is nothing to look at.

    ``tensor``: a regular expression; the tensors in whose names it is found are listed one by one, and
    `UnknownTensorError` is raised if there are none. ``scales``: also return the ranges of the scales of each kind of
    module.

    >>> found = fp8ckpt.inspect("sample-fp8", tensor="layers.0.mlp")
    >>> found.schemes[0].block, len(found.defects)
    ('per tensor', 0)
    >>> [(row.dtype, row.shape) for row in found.listed if "up_proj" in row.name]
    [('F8_E4M3', (256, 128))]
    """
    with collector_paused():
        return _inspect(path, follow_index, tensor, scales)


def _inspect(path: CheckpointLike, follow_index: bool, pattern: str | None, with_scales: bool) -> Inspection:
    from fp8ckpt.tensors.reading import scale_defects

    checkpoint = survey(path, follow_index=follow_index)
    quantized = checkpoint.quantized
    defects = [*checkpoint.defects, *scale_defects(quantized, checkpoint.cache_scales)]
    try:
        blocks = block_sizes(checkpoint.store, checkpoint.config)
    except Fp8CheckpointError:  # it is among the defects
        blocks = BlockSizes()
    schemes = _schemes(quantized, blocks)
    plain = [tensor for tensor in checkpoint.tensors.values() if tensor.scaled is None]
    elements = sum(scheme.elements for scheme in schemes)
    return Inspection(
        path=checkpoint.path,
        files=len(checkpoint.files),
        tensors=len(checkpoint.tensors),
        elements=elements + sum(tensor.numel for tensor in plain),
        stored_bytes=sum(span.stop - span.start for header in checkpoint.files for span in header.spans),
        bf16_bytes=2 * elements + sum(tensor.span.nbytes for tensor in plain),
        schemes=schemes,
        unquantized=_unquantized(checkpoint, any_quantized=bool(quantized)),
        activation_scales=sum(len(tensor.activation_scales) for tensor in quantized),
        cache_scales=len(checkpoint.cache_scales),
        notes=(*(str(slip) for slip in checkpoint.slips), *checkpoint.notes),
        defects=tuple(defects),
        listed=() if pattern is None else tuple(_listed(checkpoint, blocks, pattern)),
        scales=tuple(_kinds_of_scales(quantized)) if with_scales else (),
    )


def _schemes(quantized: list[QuantizedTensor], blocks: BlockSizes) -> tuple[Scheme, ...]:
    alike: dict[tuple[object, ...], list[QuantizedTensor]] = {}  # most tensors differ only in their names
    for tensor in quantized:
        name, _, scale, grid, _, code_dtype, second, _ = tensor
        key = (grid, blocks.of(module_of(name)), code_dtype, scale.dtype, scale.shape, second is None)
        alike.setdefault(key, []).append(tensor)
    groups: dict[tuple[str, str, str], list[tuple[QuantizedTensor, int]]] = {}
    for tensor, *others in alike.values():
        shared = (tensor.code_dtype, _block_of(tensor, blocks), tensor.scale.dtype)
        groups.setdefault(shared, []).append((tensor, 1 + len(others)))
    schemes = []
    for shared, tensors in groups.items():
        shapes = {tensor.scale.shape for tensor, _ in tensors}
        shape = str(list(shapes.pop())) if len(shapes) == 1 else "various"
        elements = sum(tensor.numel * count for tensor, count in tensors)
        size = sum(count * span.nbytes for tensor, count in tensors for span in (tensor.weight, *tensor.scales))
        schemes.append(Scheme(*shared, shape, sum(count for _, count in tensors), elements, size))
    return tuple(sorted(schemes, key=lambda scheme: -scheme.elements))


def _block_of(tensor: QuantizedTensor, blocks: BlockSizes) -> str:
    if tensor.per_byte > 1:  # of groups, though one may span a row
        return _block_name(tensor.grid, tensor.grid.block_size)
    one_for_all = len(tensor.scale.shape) < len(tensor.shape)  # [] or [1]: no block of any size has that
    return _block_name(tensor.grid, None if one_for_all else blocks.of(module_of(tensor.name)))


@lru_cache(maxsize=4096)
def _block_name(grid: BlockGrid, stated: tuple[int, ...] | None) -> str:
    """Return the stated block size if it fits the scales, even where one block spans a dimension. Otherwise return "per
    tensor", or the block size with "all" for each dimension that one block spans.
    """
    fit = tiled(grid.weight_shape, stated) if stated else None
    if fit is not None and fit.shape == grid.shape:
        return " x ".join(map(str, fit.block_size))
    if grid.per_tensor:
        return "per tensor"
    return " x ".join(
        "all" if size == dim > 1 else str(size) for size, dim in zip(grid.block_size, grid.weight_shape, strict=True)
    )


def _listed(checkpoint: Checkpoint, blocks: BlockSizes, pattern: str) -> Iterator[TensorRow]:
    wanted = name_pattern("tensor", pattern)
    names = [name for name in checkpoint.tensors if wanted is None or wanted.search(name)]
    if not names and checkpoint.tensors:
        raise UnknownTensorError.of_pattern(file=str(checkpoint.path), pattern=repr(pattern))
    for name in names:
        yield _row(checkpoint.tensors[name], blocks)


def _row(tensor: Tensor, blocks: BlockSizes) -> TensorRow:
    shape, file = tensor.shape, tensor.span.file.name
    if (scaled := tensor.scaled) is None:
        return TensorRow(tensor.name, tensor.dtype, shape, file)
    return TensorRow(
        tensor.name,
        scaled.code_dtype,
        shape,
        file,
        _block_of(scaled, blocks),
        scaled.scale.dtype,
        scaled.scale.shape,
        _range(scaled.scale),
        _joined(_range(span) for span in scaled.activation_scales),
    )


def _range(span: TensorSpan) -> ScaleRange | None:
    """Return the range of the scales, or None if they cannot be read or one is not a valid scale: that is a defect."""
    from fp8ckpt.tensors.scale_ranges import scale_range

    if span.dtype not in SCALE_DTYPES:
        return None
    try:
        found = scale_range(span)
    except Fp8CheckpointError:
        return None
    return found if found.least > 0 and found.greatest < float("inf") else None


def _joined(ranges: Iterable[ScaleRange | None]) -> ScaleRange | None:
    from fp8ckpt.tensors.scale_ranges import joined

    known = [each for each in ranges if each is not None]
    return joined(known) if known else None


def _kinds_of_scales(quantized: list[QuantizedTensor]) -> Iterator[KindOfScales]:
    from fp8ckpt.tensors.scale_ranges import joined, outliers

    at = places(tensor.name for tensor in quantized)
    kinds: dict[str, dict[str, ScaleRange]] = {}
    for tensor in quantized:
        found = _range(tensor.scale)
        if found is not None:
            kinds.setdefault(at[tensor.name].kind, {})[tensor.name] = found
    for kind, ranges in kinds.items():
        yield KindOfScales(kind, len(ranges), joined(ranges.values()), outliers(ranges))


def _unquantized(checkpoint: Checkpoint, *, any_quantized: bool) -> tuple[Unquantized, ...]:
    patterns = skip_patterns(checkpoint.store, checkpoint.config)
    groups: dict[tuple[str, str], list[int]] = {}
    modules: dict[tuple[str, str], Counter[str]] = {}
    reasons: dict[str, str] = {}  # by starred name: layers repeat
    for name, tensor in checkpoint.tensors.items():
        if tensor.scaled is not None:
            continue
        kind = starred(name)
        reason = reasons.get(kind)
        if reason is None:
            reason = reasons[kind] = _reason(name, len(tensor.shape), patterns, any_quantized)
        key = (tensor.dtype, reason)
        sums = groups.setdefault(key, [0, 0, 0])
        sums[0] += 1
        sums[1] += tensor.numel
        sums[2] += tensor.span.nbytes
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

"""Matching adapters with a base: which tensors of the base each pair of factors changes, and in which box.

An adapter names the parameters of the trained model. If the base has other names or stackings, its products go through
the assemblies between the two. A key without a counterpart in the base is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fp8ckpt.encodings.tying import as_one
from fp8ckpt.errors import ModelMismatchError, UnsupportedFormatError
from fp8ckpt.families.between import parts_of_model
from fp8ckpt.families.loaders import has_no_fp8_experts, is_transposed
from fp8ckpt.families.names import Shapes, answers
from fp8ckpt.families.tied import Tied
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.tensors.adapters import Adapter, Pair, same_values
from fp8ckpt.tensors.assembly import NEW, Assembly, Piece, reversed_assemblies
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import Json
from fp8ckpt.tensors.merged import Factor, KeptFloats, MergedTensor, Norms, Product
from fp8ckpt.tensors.stored import TensorSpan

#: The order in which models register the parameters of stacked experts, and PEFT wraps them.
_REGISTERED = ("gate_up_proj", "down_proj")
_ROOM = 64 << 20  # bytes of factors to cache, beyond the largest pair
_STRAIGHT_SINCE = (0, 19, 1)  # PEFT reads stacked experts as [E, out, in] since this version, as [E, in, out] before


class _Use(NamedTuple):
    """A pair of an adapter and its base tensor ``target`` in the trained model. ``key``: its name in PEFT's patterns;
    ``across``: the model uses that tensor as [in, out]; ``known``: for stacked experts, whether they are [out, in], if
    another pair of the module shows it; None leaves it to their own shapes.
    """

    adapter: Adapter
    pair: Pair
    target: str
    key: str
    across: bool = False
    known: bool | None = None

    def fits(self, shape: tuple[int, ...]) -> tuple[bool, bool]:
        """Whether the factors fit a tensor of this shape as [out, in], and whether as [in, out]."""
        sizes = (self.pair.b.shape[0], self.pair.a.shape[1])
        return sizes == shape[-2:], sizes[::-1] == shape[-2:]


def adapted(base: Checkpoint, adapters: Sequence[Adapter], tied: Sequence[Tied] = ()) -> dict[str, MergedTensor]:
    """Return the tensors of the base that adapters change, by name. ``tied``: tensors that are one in the model.

    Raises `ModelMismatchError` for a key without a counterpart in the base, or with other shapes;
    `UnsupportedFormatError` for what cannot be merged.
    """
    shapes = base.shapes
    for one in tied:
        adapters = [as_one(adapter, base, one) for adapter in adapters]
    uses = [use for adapter in adapters for use in _uses(adapter, _with_parameters(adapter, shapes, base), base.config)]
    spans = {name: span for adapter in adapters for name, span in adapter.tensors.items()}
    keys = {use.target: use.pair.a for use in uses} | spans
    parts = _answered(keys, shapes, base)
    floats = KeptFloats(max((4 * (use.pair.a.numel + use.pair.b.numel) for use in uses), default=0) + _ROOM)
    by_target: dict[str, list[_Use]] = {}
    for use in _known(uses, parts):
        by_target.setdefault(use.target, []).append(use)
    found: dict[str, MergedTensor] = {}
    for name, assembly in reversed_assemblies(parts, shapes).items():
        tensor = base.tensors[name]
        if tensor.scaled is None and tensor.dtype not in TARGET_BYTES:
            what = f"an adapter of a tensor of dtype {tensor.dtype}"
            raise UnsupportedFormatError.of_dtype(name, tensor.span.file, what, ["FP8", *TARGET_BYTES])
        found[name] = MergedTensor(tensor, tensor.dtype, (), floats)
        for piece in assembly.pieces:
            found[name] = _changed(found[name], piece, adapters, by_target.get(piece.source, ()), parts)
    for one in tied:
        if one.stored[0] in found:
            copies = {name: base.tensors[name] for name in one.stored if name not in found}
            found |= {name: replace(found[one.stored[0]], base=tensor) for name, tensor in copies.items()}
    return found


def _changed(
    merged: MergedTensor, piece: Piece, adapters: Sequence[Adapter], uses: Sequence[_Use], parts: Mapping[str, Assembly]
) -> MergedTensor:
    """Add what ``adapters``, and ``uses`` of their pairs, change in one piece."""
    whole = Assembly.whole(piece.source, merged.shape).pieces == (piece,)
    for adapter in adapters:
        span = adapter.tensors.get(piece.source)
        # PEFT saves embeddings beside their factors, trained or not.
        beside = whole and any(use.adapter is adapter for use in uses)
        if span is not None and not (beside and same_values(span, merged.span)):
            merged = _replaced(merged, adapter, span, whole=whole)
    for use in uses:
        products = _products(use, parts[use.target].shape, piece, len(merged.shape))
        merged = _scaled(replace(merged, products=(*merged.products, *products)), use, whole=whole)
    return merged


# ---------------------------------------------------------------- names


def _uses(adapter: Adapter, there: Collection[str], config: Json) -> Iterator[_Use]:
    """Yield each pair with its base tensor. ``there``: see `_with_parameters`; ``config``: the base's."""
    levels = Counter(pair.module for pair in adapter.pairs)
    for pair in adapter.pairs:
        leaves = _parameters(adapter, pair.module, there)
        if not leaves and levels[pair.module] == 1 and pair.depth == 0:
            across = pair.embedding or is_transposed(config, pair.module.rpartition(".")[2])
            yield _Use(adapter, pair, f"{pair.module}.weight", pair.module, across)
            continue
        if len(leaves) != levels[pair.module]:
            raise ModelMismatchError.of_pairs(
                pair.a, module=pair.module, pairs=levels[pair.module], parameters=len(leaves)
            )
        target = f"{pair.module}.{leaves[-1 - pair.depth]}"  # the parameter wrapped last is outermost
        yield _Use(adapter, pair, target, target)


def _known(uses: Sequence[_Use], parts: Mapping[str, Assembly]) -> Iterator[_Use]:
    """Yield the pairs with ``known`` set from the others of their module: PEFT reads all its stacks in one way."""
    ways: dict[tuple[int, str], set[bool]] = {}
    for use in uses:
        straight, across = use.fits(parts[use.target].shape)
        if straight != across and len(parts[use.target].shape) == 3:
            ways.setdefault((id(use.adapter), use.pair.module), set()).add(straight)
    for use in uses:
        known = ways.get((id(use.adapter), use.pair.module), set())
        yield use._replace(known=next(iter(known)) if len(known) == 1 else None)


def _with_parameters(adapter: Adapter, shapes: Shapes, base: Checkpoint) -> Collection[str]:
    """Return the existing parameters that bare names target. PEFT writes bare names, such as ``gate_up_proj`` for
    Linears that the model has stacked, and such a name does not say which modules have the parameter.
    """
    bare = [target for target in adapter.config.get("target_parameters") or () if "." not in target]
    return _parts({f"{pair.module}.{leaf}" for pair in adapter.pairs for leaf in bare}, shapes, base)


def _parameters(adapter: Adapter, module: str, there: Collection[str]) -> list[str]:
    """Return the parameters of a module that were targeted by name, in the order in which they were wrapped."""
    found = {
        leaf
        for target in adapter.config.get("target_parameters") or ()
        for leaf in (target.rpartition(".")[2],)
        if (f"{module}.{leaf}" in there if leaf == target else f".{module}.{leaf}".endswith(f".{target}"))
    }
    if len(found) > 1 and not found <= {*_REGISTERED}:
        raise UnsupportedFormatError.of_wrapping(module, found, _REGISTERED)
    return sorted(found, key=lambda leaf: _REGISTERED.index(leaf) if leaf in _REGISTERED else 0)


def _answered(keys: Mapping[str, TensorSpan], shapes: Shapes, base: Checkpoint) -> dict[str, Assembly]:
    """Return the trained tensors as assemblies of the base's. Raise `ModelMismatchError` if one has none."""
    parts = _parts(keys, shapes, base)
    missing = sorted(keys.keys() - parts.keys())
    if missing:
        raise ModelMismatchError.of_key(keys[missing[0]], missing[0], len(missing) - 1, base.path)
    return parts


def _parts(wanted: Collection[str], shapes: Shapes, base: Checkpoint) -> dict[str, Assembly]:
    """Return wanted tensors as assemblies of the base's: matched by name, or else through the base's model."""
    parts = answers(wanted, shapes)
    if has_no_fp8_experts(base.config):  # names do not say that their stacks are transposed, or interleave gate and up
        wholes = {name: Assembly.whole(made.pieces[0].source, made.shape) for name, made in parts.items()}
        parts = {name: made for name, made in parts.items() if made == wholes[name]}
    if len(parts) == len(wanted):
        return parts
    made = parts_of_model(base)
    return max(parts, {name: made[name] for name in wanted if name in made}, key=len)


# ---------------------------------------------------------------- products


def _products(use: _Use, shape: tuple[int, ...], piece: Piece, rank: int) -> Iterator[Product]:
    """Yield the products of a pair on one piece of a base tensor with ``rank`` dimensions. ``shape``: of the whole
    trained tensor.
    """
    left, right = _factors(use, shape, matrices=rank == 2 and piece.axes[-1] == len(shape) - 1)
    row, col = len(shape) - 2, len(shape) - 1
    if rank < 2 or {piece.axes[-2], piece.axes[-1]} != {row, col}:
        raise UnsupportedFormatError.of_parts(use.pair.a, shape=shape)
    if piece.axes[-2] == col:
        left, right, row, col = right, left, col, row
    starts = piece.source_offsets
    scaling = use.adapter.scaling(use.key)
    lead = len(piece.axes) - 2
    for index in np.ndindex(piece.sizes[:lead]):
        expert = starts[0] if len(shape) == 3 else 0
        for axis, at in zip(piece.axes[:lead], index, strict=True):
            expert += at if axis != NEW else 0
        offsets = tuple(start + at for start, at in zip(piece.offsets, index, strict=False)) + piece.offsets[lead:]
        sizes = (1,) * lead + piece.sizes[lead:]
        sides = (left._replace(start=starts[row], expert=expert), right._replace(start=starts[col], expert=expert))
        yield Product(offsets, sizes, *sides, scaling)


def _factors(use: _Use, shape: tuple[int, ...], *, matrices: bool) -> tuple[Factor, Factor]:
    """Return the sides of a pair's product as it is added to a tensor of ``shape``, [out, in] or [E, out, in].
    ``matrices``: the base holds one [out, in] for each expert.
    """
    a, b = use.pair.a, use.pair.b
    experts = shape[0] if len(shape) == 3 else 1
    rank = use.adapter.rank(use.key)
    if len(shape) not in (2, 3):
        raise UnsupportedFormatError.of_dimensions(a, shape=shape)
    if a.shape[0] != rank * experts:
        raise ModelMismatchError.of_rank(a, rank, experts if len(shape) == 3 else None)
    straight, across = use.fits(shape)
    if len(shape) == 2:
        turned = _lies_across(use, shape)
        straight, across = straight and not turned, across and turned
    elif straight and across:
        straight, across = _of_square_experts(use, matrices=matrices)
    if not straight and not across:
        raise ModelMismatchError.of_factors(a, b=b, target=use.target, shape=shape)
    inner, outer = Factor(a, True, experts=experts), Factor(b, False, experts=experts)
    return (outer, inner) if straight else (inner, outer)


def _lies_across(use: _Use, shape: tuple[int, ...]) -> bool:
    """Whether a matrix is stored as [in, out]. PEFT decides by the class of each module, but ``fan_in_fan_out`` records
    only that of the last: it is not used where the model or the shapes decide.
    """
    if use.across or not use.adapter.config.get("fan_in_fan_out"):
        return use.across
    if shape[0] == shape[1]:
        raise UnsupportedFormatError.of_square(use.pair.a)
    return (use.pair.a.shape[1], use.pair.b.shape[0]) == shape


def _of_square_experts(use: _Use, *, matrices: bool) -> tuple[bool, bool]:
    """Return (straight, across) for stacked experts with as many rows as columns. Their shapes do not decide; those of
    the other stack do, or PEFT's version, if the model is known not to transpose its stacks.
    """
    if use.known is not None:
        return use.known, not use.known
    version = str(use.adapter.config.get("peft_version") or "").split(".")
    numbers = tuple(int(part) for part in version[:3] if part.isdigit())
    if matrices and len(version) == 3 and numbers >= _STRAIGHT_SINCE:
        return True, False
    raise UnsupportedFormatError.of_square_experts(use.pair.a)


# ---------------------------------------------------------------- whole tensors, and DoRA


def _replaced(merged: MergedTensor, adapter: Adapter, span: TensorSpan, *, whole: bool) -> MergedTensor:
    """Return the tensor with its base replaced by a trained one. ``whole``: the base holds it as one tensor."""
    if not whole:
        raise UnsupportedFormatError.of_trained(span, shape=merged.shape)
    if span.shape != merged.shape:
        raise ModelMismatchError.of_other_shape(span, shape=span.shape, expected=f"{merged.shape}, as in the base")
    if adapter.weight != 1 or merged.replacement is not None:
        raise ModelMismatchError.of_replacement(span, adapter.weight)
    return replace(merged, replacement=span)


def _scaled(merged: MergedTensor, use: _Use, *, whole: bool) -> MergedTensor:
    """Return the tensor with DoRA's magnitudes, if the pair that was added last has them."""
    magnitude, shape = use.pair.magnitude, merged.shape
    if (merged.magnitude is not None or magnitude is not None) and len(merged.products) > 1:
        raise UnsupportedFormatError.of_several(use.pair.a)
    if magnitude is None:
        return merged
    if not whole or len(shape) != 2 or use.adapter.weight != 1:
        raise UnsupportedFormatError.of_magnitude(magnitude)
    columns = _lies_across(use, shape)  # one magnitude for each output
    if magnitude.numel != shape[columns]:
        raise ModelMismatchError.of_other_shape(magnitude, shape=magnitude.shape, expected=f"{shape[columns]} elements")
    return replace(merged, magnitude=magnitude, norms=Norms() if columns else None)

"""What a save writes: the tensors of a model, and how they become those on disk."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fp8ckpt.checkpoint.assembling import assemble
from fp8ckpt.checkpoint.live import laid_out_like, local_part, refuse_what_hides, tensors_of, tied_groups
from fp8ckpt.checkpoint.planners import AssemblySavePlanner
from fp8ckpt.checkpoint.regions import rounds
from fp8ckpt.collector import collector_paused
from fp8ckpt.errors import MissingScaleError, ModelMismatchError, listed
from fp8ckpt.families.names import name_pattern
from fp8ckpt.families.transformers_tables import Assembled
from fp8ckpt.output.layout import TensorSpec, lay_out
from fp8ckpt.tensors.assembly import Assembly
from fp8ckpt.tensors.blocks import BlockSizes
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.pairing import pair
from fp8ckpt.tensors.reading import stored_dtype, torch_dtype

logger = logging.getLogger(__name__)


class SavePlan(NamedTuple):
    """The plan of a save. ``state``: the tensors; ``planner``: cuts them into items; ``carry``: names of the base's
    tensors that may be taken from it. ``tied``: the tensors that are left out, each with the tensor that it is tied to
    and stored as; ``native``: all tensors of the model; ``scales``: without a base, what belongs to codes in FP8.
    """

    state: dict[str, torch.Tensor]
    planner: AssemblySavePlanner
    carry: set[str]
    tied: dict[str, str]
    native: dict[str, torch.Tensor]
    scales: set[str]

    def refuse_trained_apart(self) -> None:
        """Raise `ModelMismatchError` if a tensor that is left out differs from the one it is tied to. Comparing may
        move tensors between ranks, so all ranks call this, and compare all tensors before any raises.
        """
        differ = [name for name, kept in self.tied.items() if _differ(self.native[name], self.native[kept])]
        if differ:
            raise ModelMismatchError.of_apart(differ[0], kept=self.tied[differ[0]])


@collector_paused()
def plan_save(model: nn.Module, base: Checkpoint | None, carry: str | None) -> SavePlan:
    """Plan the tensors of ``model`` under the names and in the stackings of its base; of tied tensors only those that
    the base has, or else the first. ``carry``: a pattern of names that are taken from the base if the model lacks them.
    """
    remedy = "merge them first: model.merge_and_unload(); or save them with save_pretrained, for fp8ckpt merge"
    refuse_what_hides(model, remedy)
    native = tensors_of(model, "load it first: it has no values to save")
    adapter: Any = getattr(model, "state_dict_adapter", None)
    stored = base.shapes if base is not None else {}
    assembled = assemble(model, native, stored) if base is not None or adapter is None else None
    if assembled is not None:
        tensors = {name: {name: tensor} for name, tensor in native.items()}
        in_base = set(assembled.parts)
    elif not hasattr(adapter, "convert_single_tensor_to_hf"):
        raise ModelMismatchError.of_adapter()
    else:
        assembled = Assembled({}, stored)
        tensors = {name: dict(_renamed(adapter, name, tensor)) for name, tensor in native.items()}
        in_base = {name for name, made in tensors.items() if made.keys() <= stored.keys()}
    groups = tied_groups(model)
    if base is not None:
        _refuse_of_other_stages(groups, native, in_base)
    tied = _tied_elsewhere(groups, native, in_base)
    state = {hf: made for name, of_one in tensors.items() if name not in tied for hf, made in of_one.items()}
    # A tensor that the base lacks keeps its own name, and the writer refuses it.
    parts = {name: assembled.parts.get(name) or Assembly.whole(name, tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        if base is not None and parts[name].shape != tuple(tensor.shape):
            raise ModelMismatchError.of_shape(name, base.path, tuple(tensor.shape), parts[name].shape, "model")
    if base is not None:
        _warn_of_fewer_bits(state, parts, base)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    pattern = name_pattern("carry", carry)
    matching = {name for name in stored if pattern is not None and pattern.search(name)}
    planner = AssemblySavePlanner(parts, {**shapes, **stored})
    scales = _scales_of(state) if base is None else set()
    return SavePlan(state, planner, {*assembled.ignored, *matching}, tied, native, scales)


def _scales_of(state: Mapping[str, torch.Tensor]) -> set[str]:
    """Return what belongs to codes that are stored beside it. Refuse codes without scales: nothing could load them."""
    dtypes = {name: stored_dtype(tensor.dtype) for name, tensor in state.items()}
    specs = (TensorSpec(name, dtype, tuple(state[name].shape)) for name, dtype in dtypes.items() if dtype is not None)
    spans = {span.name: span for span in lay_out("", specs, {}).spans}
    pairing = pair(spans, BlockSizes())
    for defect in pairing.defects:
        if isinstance(defect, MissingScaleError) and defect.tensor is not None:
            raise ModelMismatchError.of_bare_codes(defect.tensor, dtype=state[defect.tensor].dtype)
    return spans.keys() - pairing.tensors.keys()


def _renamed(adapter: Any, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return adapter.convert_single_tensor_to_hf(name, tensor, quantization=False)  # type: ignore[no-any-return]  # a host's


def _refuse_of_other_stages(groups: list[list[str]], native: Collection[str], in_base: Collection[str]) -> None:
    """Refuse a tied tensor of this pipeline stage that the base stores only under the name that another stage holds."""
    for source, *targets in groups:
        mine = [name for name in targets if name in native]
        if mine and source not in native and not any(name in in_base for name in mine):
            raise ModelMismatchError.of_stage(mine[0], source=source)


def _tied_elsewhere(groups: list[list[str]], native: Collection[str], in_base: Collection[str]) -> dict[str, str]:
    """The tensors that are stored under another name of their group, with that name; in one order on all ranks."""
    left_out: dict[str, str] = {}
    for group in groups:
        present = [name for name in group if name in native]
        kept = [name for name in present if name in in_base] or present[:1]
        left_out |= {name: kept[0] for name in present if name not in kept}
    return left_out


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors differ in this rank's part of the first. Collective over all ranks that hold one of them."""
    if one is other:
        return False
    one, other = one.detach(), other.detach()
    if isinstance(other, DTensor) and not isinstance(one, DTensor):
        one, other = other, one
    one, other = local_part(one), local_part(laid_out_like(other, one))
    if one.data_ptr() == other.data_ptr():
        return False
    return not torch.equal(*(part.contiguous().view(torch.uint8) for part in (one, other.to(one.device))))


def _warn_of_fewer_bits(state: Mapping[str, torch.Tensor], parts: Mapping[str, Assembly], base: Checkpoint) -> None:
    """Warn of tensors that the base holds in more bits than the model: they have lost precision, trained or not."""
    fewer = {
        piece.source
        for name, assembly in parts.items()
        for piece in assembly.pieces
        if (tensor := base.tensors.get(piece.source)) is not None
        and tensor.scaled is None
        and rounds(torch_dtype(tensor.dtype), state[name].dtype)
    }
    if fewer:
        logger.warning("%d tensors have fewer bits in the model than in the base: %s", len(fewer), listed(fewer))

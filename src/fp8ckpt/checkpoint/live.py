"""A live model as it stands, whatever a trainer has wrapped round it or its layers (torch.compile, activation
checkpointing, DDP): its tensors under the names that they have without; which of them are one; and what keeps them from
being seen.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fp8ckpt.errors import ModelMismatchError
from fp8ckpt.families.tied import tied_sets
from fp8ckpt.families.transformers_tables import is_distributed

_INNER = ("_orig_mod", "_checkpoint_wrapped_module")
_IN_NAMES = re.compile(rf"(?<![^.])(?:{'|'.join(_INNER)})(?:\.|$)")


def plain_name(name: str) -> str:
    """The name that a tensor or a module has in the model that was wrapped."""
    return _IN_NAMES.sub("", name).removesuffix(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself; but for a wrapper that was given a ``state_dict_adapter``, which knows the wrapper's names.

    Raises `TypeError` for what is no module.
    """
    if not isinstance(model, nn.Module):
        found = f"the model is of type {type(model).__name__}, and no torch.nn.Module"
        raise TypeError(
            f"{found}: for a state dict, use dcp.load with FP8StorageReader, and dcp.save with "
            "SafetensorsStorageWriter or FP8StorageWriter"
        )
    while getattr(model, "state_dict_adapter", None) is None:
        inner = [child for name, child in model.named_children() if name in _INNER]
        if isinstance(model, DataParallel | DistributedDataParallel):
            inner = [model.module]
        if not inner:
            break
        [model] = inner
    return model


def refuse_what_hides(model: nn.Module, remedy: str) -> None:
    """Raise `ModelMismatchError` for a model that holds adapters of PEFT, or that DeepSpeed has taken the values of."""
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if getattr(model, "peft_config", None) or "BaseTunerLayer" in classes:
        raise ModelMismatchError.of_peft(remedy)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelMismatchError.of_deepspeed()


def tensors_of(model: nn.Module, remedy: str) -> dict[str, torch.Tensor]:
    """The tensors of a model's state dict, under the names that they have without wrappers.

    Raises `ModelMismatchError`, with the ``remedy``, where some have no values.
    """
    held = {plain_name(name): one for name, one in model.state_dict().items() if isinstance(one, torch.Tensor)}
    if sharded := [name for name, tensor in held.items() if type(tensor).__name__ == "ShardedTensor"]:
        raise ModelMismatchError.of_sharded(sharded)
    if on_meta := [name for name, tensor in held.items() if tensor.is_meta]:
        raise ModelMismatchError.of_meta(on_meta, remedy)
    return held


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Disjoint sets of names of parameters that are one, or that the configuration says should be; the source first.
    A stage of a pipeline need not hold all of a set.
    """
    named = model.named_parameters(remove_duplicate=False)
    return tied_sets(((plain_name(name), parameter) for name, parameter in named), model)


def tie(model: Any) -> None:
    """Make one tensor of what the configuration ties and `to_empty` has taken apart.

    Sharded parameters stay as the caller's parallelization made them: there it decides what is shared; but for those
    that transformers has sharded, which ties them afterwards.
    """
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    held = {plain_name(name): (name, one) for name, one in tensors}
    theirs = is_distributed(model)
    for group in tied_groups(model):
        here = [held[name] for name in group if name in held]
        for name, tensor in here[1:]:
            source = here[0][1]
            if tensor is not source and (theirs or not any(isinstance(one, DTensor) for one in (tensor, source))):
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, source)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

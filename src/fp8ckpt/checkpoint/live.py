"""A live model as it stands, whatever a trainer has wrapped round it or its layers (torch.compile, activation
checkpointing, DDP): its tensors under the names that they have without; which of them are one; what keeps them from
being seen; and its buffers that no checkpoint holds, such as rotary ``inv_freq``. Those ``to_empty`` leaves undefined,
and the model would run wrong: a transformers model gives them their values again, as in ``from_pretrained``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fp8ckpt.errors import ConfigError, ModelMismatchError
from fp8ckpt.families.tied import tied_sets
from fp8ckpt.families.transformers_tables import initialize_buffers, is_distributed, is_pretrained

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


def restore_buffers(model: nn.Module) -> None:
    """Give the non-persistent buffers of every transformers model in ``model`` the values that their configuration
    means.

    Other modules are left alone: their buffers cannot be known from outside. Raises `ConfigError` where a model's class
    does not know the value of one.
    """
    owners: dict[str, Any] = {}
    modules = dict(model.named_modules())
    lost: list[tuple[str, str]] = []
    for name, module in modules.items():
        owners[name] = module if is_pretrained(module) else owners.get(name.rpartition(".")[0])
        keys = module._non_persistent_buffers_set  # names of the state dict are not always those of modules
        own = [key for key, buffer in module.named_buffers(recurse=False) if key in keys]
        if owners[name] is not None and own:
            for key in own:  # what the class does not write again would stay what the memory happened to hold
                _marked(module.get_buffer(key)).fill_(_mark(module.get_buffer(key)))
            initialize_buffers(owners[name], module)
            lost += ((name, key) for key in own)
    asked: set[str] = set()
    for name, key in lost:
        for above in _above(name):  # a model may write the buffers of all its layers: Falcon-H1's mup_vector
            if owners[above] is None or not _is_left(modules[name].get_buffer(key)):
                break
            if above not in asked:
                asked.add(above)
                with suppress(AttributeError):  # a stage of a pipeline lacks some of the layers that are gone through
                    initialize_buffers(owners[above], modules[above])
        if _is_left(modules[name].get_buffer(key)):
            raise ConfigError(
                f"no checkpoint holds this buffer, and {type(owners[name]).__name__} does not make it anew",
                tensor=f"{name}.{key}".removeprefix("."),
                remedy="register it once the model is loaded",
            )


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_left(buffer: torch.Tensor) -> bool:
    mark, marked = _mark(buffer), _marked(buffer)
    return buffer.numel() > 0 and bool((marked.isnan() if mark != mark else marked == mark).all())


def _marked(buffer: torch.Tensor) -> torch.Tensor:
    """What is marked of it: of booleans, which may be both of their values, the bytes, which are 0 or 1."""
    return buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer


def _mark(buffer: torch.Tensor) -> float | int:
    """A value that no buffer consists of."""
    dtype = _marked(buffer).dtype
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max

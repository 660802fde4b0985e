"""A live model, without the wrappers that a trainer puts round it or its layers (torch.compile, activation
checkpointing, DDP): its tensors by their unwrapped names, which of them are tied, what keeps them from being seen, and
its non-persistent buffers, such as rotary ``inv_freq``. No checkpoint holds those and ``to_empty`` leaves them
undefined, so that the model would run wrong; a transformers model computes them again, as in ``from_pretrained``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fp8ckpt.errors import ConfigError, ModelMismatchError
from fp8ckpt.families.tied import tied_sets
from fp8ckpt.families.transformers_tables import initialize_buffers, is_distributed, is_pretrained

_INNER = ("_orig_mod", "_checkpoint_wrapped_module")
_IN_NAMES = re.compile(rf"(?<![^.])(?:{'|'.join(_INNER)})(?:\.|$)")


def plain_name(name: str) -> str:
    """The name of a tensor or module in the model without wrappers."""
    return _IN_NAMES.sub("", name).removesuffix(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers; a wrapper that has a ``state_dict_adapter``, which knows its names, is
    kept.

    Raises `TypeError` for anything but a module.
    """
    if not isinstance(model, nn.Module):
        found = f"the model is of type {type(model).__name__}, not a torch.nn.Module"
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
    """Raise `ModelMismatchError` for a model that holds PEFT adapters, or whose values DeepSpeed has taken."""
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if getattr(model, "peft_config", None) or "BaseTunerLayer" in classes:
        raise ModelMismatchError.of_peft(remedy=remedy)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelMismatchError.of_deepspeed()


def tensors_of(model: nn.Module, remedy: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's state dict, by their names without wrappers.

    Raises `ModelMismatchError`, with the ``remedy``, if some have no values.
    """
    held = {plain_name(name): one for name, one in model.state_dict().items() if isinstance(one, torch.Tensor)}
    if sharded := [name for name, tensor in held.items() if type(tensor).__name__ == "ShardedTensor"]:
        raise ModelMismatchError.of_sharded(sharded)
    if on_meta := [name for name, tensor in held.items() if tensor.is_meta]:
        raise ModelMismatchError.of_meta(names=on_meta, remedy=remedy)
    return held


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Disjoint sets of names of parameters that are one, or that the configuration ties, each with the source first. A
    pipeline stage need not hold all names of a set.
    """
    named = model.named_parameters(remove_duplicate=False)
    return tied_sets(((plain_name(name), parameter) for name, parameter in named), model)


def tie(model: Any) -> None:
    """Tie again what the configuration ties and ``to_empty`` has separated.

    Sharded parameters stay as the caller's parallelization made them, which decides what is shared. Those that
    transformers itself has sharded are tied: it ties them afterwards, too.
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
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refuse_shared_memory(name: str, local: torch.Tensor) -> None:
    """Raise `ModelMismatchError` if elements of a tensor that is to be filled share memory with each other."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    if local.numel() > max(reach, 0):  # one of no elements may have any strides
        raise ModelMismatchError.of_memory(name, numel=local.numel(), reach=reach)


def laid_out_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in the placements of ``other``. Collective over all ranks that hold one of them."""
    if isinstance(tensor, DTensor) and not (isinstance(other, DTensor) and other.device_mesh == tensor.device_mesh):
        tensor = tensor.full_tensor()  # rare, and only for embeddings
    if not isinstance(other, DTensor):
        return tensor
    if isinstance(tensor, DTensor):
        return tensor.redistribute(other.device_mesh, other.placements)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def restore_buffers(model: nn.Module) -> None:
    """Recompute the non-persistent buffers of every transformers model in ``model`` from its configuration.

    Other modules are left alone: their buffers cannot be known from outside. Raises `ConfigError` if a model's class
    does not compute one of them.
    """
    owners: dict[str, Any] = {}
    modules = dict(model.named_modules())
    lost: list[tuple[str, str]] = []
    for name, module in modules.items():
        owners[name] = module if is_pretrained(module) else owners.get(name.rpartition(".")[0])
        keys = module._non_persistent_buffers_set  # names of the state dict are not always those of modules
        own = [key for key, buffer in module.named_buffers(recurse=False) if key in keys]
        if owners[name] is not None and own:
            for key in own:  # shows later which ones the class did not write
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
                with suppress(AttributeError):  # a pipeline stage lacks some of the layers
                    initialize_buffers(owners[above], modules[above])
        if _is_left(modules[name].get_buffer(key)):
            raise ConfigError.of_buffer(f"{name}.{key}".removeprefix("."), owner=type(owners[name]).__name__)


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_left(buffer: torch.Tensor) -> bool:
    mark, marked = _mark(buffer), _marked(buffer)
    return buffer.numel() > 0 and bool((marked.isnan() if mark != mark else marked == mark).all())


def _marked(buffer: torch.Tensor) -> torch.Tensor:
    """The view of a buffer that is marked: the bytes of booleans, which are 0 or 1; any other buffer itself."""
    return buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer


def _mark(buffer: torch.Tensor) -> float | int:
    """A value that no whole buffer is filled with."""
    dtype = _marked(buffer).dtype
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max

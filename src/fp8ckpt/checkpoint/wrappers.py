"""What a trainer wraps round a model or its layers, and the names of tensors without it: torch.compile, activation
checkpointing, DDP; and what it puts into one that keeps its tensors from being seen.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fp8ckpt.errors import ModelMismatchError

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

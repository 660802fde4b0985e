"""What a trainer wraps round a model or its layers, and the names of tensors without it: torch.compile, activation
checkpointing, DDP.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_INNER = ("_orig_mod", "_checkpoint_wrapped_module")
_IN_NAMES = re.compile(rf"(?<![^.])(?:{'|'.join(_INNER)})(?:\.|$)")


def plain_name(name: str) -> str:
    """The name that a tensor or a module has in the model that was wrapped."""
    return _IN_NAMES.sub("", name).removesuffix(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself; but for a wrapper that was given a ``state_dict_adapter``, which knows the wrapper's names."""
    while getattr(model, "state_dict_adapter", None) is None:
        inner = [child for name, child in model.named_children() if name in _INNER]
        if isinstance(model, DistributedDataParallel):
            inner = [model.module]
        if not inner:
            break
        [model] = inner
    return model

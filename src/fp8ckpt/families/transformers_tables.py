"""What transformers knows about its own models, asked of the installed version. Nothing else of ours touches its
internals.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn


def is_pretrained(module: Any) -> bool:
    """Whether it is one of transformers' models, which have a configuration; it need not be imported for that."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__) and hasattr(module, "config")


def keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Make float32 of what ``from_pretrained(dtype=dtype)`` keeps in float32: the patterns that the model's classes
    list. The model is on the meta device.
    """
    patterns = {pattern.replace("*", ".*"): kept for pattern, kept in model._get_dtype_plan(dtype).items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = next((patterns[pattern] for pattern in patterns if re.search(pattern, name)), None)
        if kept is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(kept)


def initialize_buffers(model: Any, module: nn.Module) -> None:
    """Give the non-persistent buffers of one of the model's modules their values, as ``from_pretrained`` does after it
    has built a model on the meta device; what the state dict holds is left alone.
    """
    held = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}.values()
    flagged = [tensor for tensor in held if not vars(tensor).get("_is_hf_initialized")]
    for tensor in flagged:
        tensor._is_hf_initialized = True
    try:
        with torch.no_grad():
            model._init_weights(module)
    finally:
        for tensor in flagged:
            del tensor._is_hf_initialized

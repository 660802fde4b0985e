"""Buffers that no checkpoint holds, such as rotary ``inv_freq``: ``to_empty`` leaves them undefined, and the model
would run wrong.

A transformers model can give them their values again: that is how ``from_pretrained`` itself gets them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fp8ckpt.errors import ConfigError
from fp8ckpt.families.transformers_tables import initialize_buffers, is_pretrained


def restore_buffers(model: nn.Module) -> None:
    """Give the non-persistent buffers of every transformers model in ``model`` the values that their configuration
    means.

    Other modules are left alone: their buffers cannot be known from outside. Raises `ConfigError` where a model's class
    does not know the value of one.
    """
    owners: dict[str, Any] = {}
    for name, module in model.named_modules():
        owners[name] = module if is_pretrained(module) else owners.get(name.rpartition(".")[0])
        lost = {
            f"{name}.{key}".removeprefix("."): buffer
            for key, buffer in module.named_buffers(recurse=False)
            if key in module._non_persistent_buffers_set  # names of the state dict are not always those of modules
        }
        if owners[name] is not None and lost:
            _restore(owners[name], module, lost)


def _restore(owner: nn.Module, module: nn.Module, lost: dict[str, torch.Tensor]) -> None:
    """What the class does not write again would stay what the memory happened to hold: a mark shows it."""
    for buffer in lost.values():
        buffer.fill_(_mark(buffer.dtype))
    initialize_buffers(owner, module)
    for name, buffer in lost.items():
        mark = _mark(buffer.dtype)
        left = buffer.isnan() if mark != mark else buffer == mark
        if buffer.numel() and bool(left.all()):
            raise ConfigError(
                f"no checkpoint holds this buffer, and {type(owner).__name__} does not make it anew",
                tensor=name,
                remedy="build the model on its device, without to_empty()",
            )


def _mark(dtype: torch.dtype) -> float | int:
    """A value that no buffer consists of."""
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max

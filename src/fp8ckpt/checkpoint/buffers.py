"""Buffers that no checkpoint holds, such as rotary ``inv_freq``: ``to_empty`` leaves them undefined, and the model
would run wrong.

A transformers model can be made anew from its configuration; with its parameters on the meta device this costs no
memory, and the buffers of the new one have their true values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def restore_buffers(model: nn.Module) -> None:
    """Give the non-persistent buffers of every transformers model in ``model`` the values that their configuration
    means.

    Other modules are left alone: their buffers cannot be known from outside.
    """
    persistent = model.state_dict().keys()
    lost = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in persistent}
    if not lost:
        return
    for prefix, made in _pretrained_models(model):
        names = [name for name in lost if name.startswith(prefix)]
        if not names:
            continue
        # fully_shard() gives the model a class of its own; its configuration's class is the next one.
        own: Any = next(cls for cls in type(made).__mro__ if not issubclass(cls, FSDPModule))
        with _parameters_on_meta():
            true = dict(own(made.config).named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name in names:
                value = true.get(name.removeprefix(prefix))
                if value is not None and value.shape == lost[name].shape:
                    lost[name].copy_(value)


def _pretrained_models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(prefix, module) of the outermost transformers models."""
    found: list[str] = []
    for name, module in model.named_modules():
        prefix = name + "." if name else ""
        if any(prefix.startswith(outer) for outer in found):
            continue
        if any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__) and hasattr(module, "config"):
            found.append(prefix)
            yield prefix, module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it, each parameter goes to the meta device when a module registers it, and buffers stay real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]  # for the time of the context
    try:
        with torch.device("cpu"):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

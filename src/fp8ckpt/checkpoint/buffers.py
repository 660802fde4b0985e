"""Buffers that no checkpoint holds, such as rotary ``inv_freq``: ``to_empty`` leaves them undefined, and the model
would run wrong.

A transformers model can give them their values again: that is how ``from_pretrained`` itself gets them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
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
                remedy="build the model on its device, without to_empty()",
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

"""Parameters that are one, or that a transformers configuration says should be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fp8ckpt.checkpoint.wrappers import plain_name
from fp8ckpt.families.tied import tied_sets
from fp8ckpt.families.transformers_tables import is_distributed


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
    held = {plain_name(name): (name, one) for name, one in _tensors(model)}
    theirs = is_distributed(model)
    for group in tied_groups(model):
        here = [held[name] for name in group if name in held]
        for name, tensor in here[1:]:
            source = here[0][1]
            if tensor is not source and (theirs or not any(isinstance(one, DTensor) for one in (tensor, source))):
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, source)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))

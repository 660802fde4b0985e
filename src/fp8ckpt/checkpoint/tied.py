"""Parameters that are one, or that a transformers configuration says should be."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from fp8ckpt.checkpoint.wrappers import plain_name
from fp8ckpt.families.tied import tied_sets
from fp8ckpt.families.transformers_tables import is_distributed


def _tied_by_configuration(model: nn.Module) -> dict[str, str]:
    """The parameters that a transformers model ties, {target: source}; empty for any other."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Disjoint sets of names of parameters that are one, or that the configuration says should be; the source first."""
    named = model.named_parameters(remove_duplicate=False)
    return tied_sets(((plain_name(name), parameter) for name, parameter in named), model)


def tie(model: Any) -> None:
    """Make one parameter of what the configuration ties and `to_empty` has taken apart.

    Sharded parameters stay as the caller's parallelization made them: there it decides what is shared; but for those
    that transformers has sharded, which ties them afterwards.
    """
    parameters = {plain_name(name): one for name, one in model.named_parameters(remove_duplicate=False)}
    theirs = is_distributed(model)
    for target, source in _tied_by_configuration(model).items():
        a, b = parameters.get(target), parameters.get(source)
        if a is None or b is None or a is b:
            continue
        if theirs or not (isinstance(a, DTensor) or isinstance(b, DTensor)):
            model.tie_weights(recompute_mapping=not theirs)
            return

"""Which tensors of a model are one, and which of their names is the one to store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def tied_sets(parameters: Iterable[tuple[str, Any]], model: Any) -> list[list[str]]:
    """Disjoint sets of names of a model's ``parameters`` that are one, or that transformers' configuration of the
    ``model`` says should be; the source of each first, whose name is the one to store.
    """
    shared: dict[int, list[str]] = {}
    for name, parameter in parameters:
        shared.setdefault(id(parameter), []).append(name)
    configured: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    of_name: dict[str, list[str]] = {}
    for names in (*([source, target] for target, source in configured.items()), *shared.values()):
        joined = list(dict.fromkeys(one for name in names for one in of_name.get(name, [name])))
        of_name.update(dict.fromkeys(joined, joined))
    sets = {id(names): names for names in of_name.values() if len(names) > 1}.values()
    return [sorted(names, key=configured.__contains__) for names in sets]

"""Which tensors of a model are one, and which of their names is the one to store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def tied_sets(shared: Iterable[list[str]], configured: Mapping[str, str]) -> list[list[str]]:
    """Disjoint sets of names, the source of each first. ``shared``: names of what is one tensor already;
    ``configured``: {target: source}, what transformers ties.
    """
    of_name: dict[str, list[str]] = {}
    for names in (*([source, target] for target, source in configured.items()), *shared):
        joined = list(dict.fromkeys(one for name in names for one in of_name.get(name, [name])))
        of_name.update(dict.fromkeys(joined, joined))
    sets = {id(names): names for names in of_name.values() if len(names) > 1}.values()
    return [sorted(names, key=configured.__contains__) for names in sets]

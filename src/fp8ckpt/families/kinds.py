"""The kind and the layer of a tensor, by its name: what belongs together in a table or a picture.

``model.layers.3.mlp.experts.17.up_proj.weight`` is of layer 3, and of the kind ``mlp.experts.*.up_proj``. Where layers
stand in several parts of a model (text, vision), those of the smaller parts carry the part's name in theirs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class Place(NamedTuple):
    """``layer`` is None for what stands outside of the layers."""

    kind: str
    layer: int | None


def starred(name: str) -> str:
    """A name with a star for each number: tensors of one kind have one such name."""
    return _NUMBER.sub(".*", name)


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of each tensor, in the order given."""
    parts = {name: parts_of(name) for name in names}
    main = main_stem(parts)
    return {
        name: Place(kind if layer is None or stem == main else f"{stem}.*.{kind}", layer)
        for name, (stem, layer, kind) in parts.items()
    }


def main_stem(names: Iterable[str]) -> str:
    """What stands before the number of a layer in most of the names that have one."""
    stems = Counter(stem for stem, layer, _ in map(parts_of, names) if layer is not None)
    return stems.most_common(1)[0][0] if stems else ""


def parts_of(name: str) -> tuple[str, int | None, str]:
    """(what stands before the layer, the layer, what stands behind it)."""
    module = name.removesuffix(".weight")
    found = _NUMBER.search(module)
    if found is None:
        return "", None, module
    rest = starred(module[found.end() :]).removeprefix(".")
    return module[: found.start()], int(found.group()[1:]), rest or "*"

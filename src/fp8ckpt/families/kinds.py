"""The kind and the layer of a tensor, from its name, for tables and figures; and which tensors are carried.

``model.layers.3.mlp.experts.17.up_proj.weight`` is in layer 3, and of the kind ``mlp.experts.*.up_proj``. If several
parts of a model have layers (text, vision), the kinds of the smaller parts include the part's name.

Models have no place for the layers of a release that predict further tokens (MTP). These are carried: left out when a
model is loaded, and copied from the base, byte for byte, when one is written back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
#: The configuration keys for the number of MTP layers, which follow the others under the next layer numbers.
_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers", "num_mtp_modules")
_PREFIX = r"(?:model\.|language_model\.)*"
_LAYER = re.compile(_PREFIX + r"layers\.(\d+)\.")
_MTP = re.compile(_PREFIX + r"mtp[._]")


class Place(NamedTuple):
    """The kind and the layer of a tensor. ``layer`` is None for tensors outside of the layers."""

    kind: str
    layer: int | None


def starred(name: str) -> str:
    """Return a name with a star for each number: all tensors of a kind have the same starred name."""
    return _NUMBER.sub(".*", name)


def places(names: Iterable[str]) -> dict[str, Place]:
    """Return the place of each tensor, in the order given."""
    parts = {name: parts_of(name) for name in names}
    main = main_stem(parts)
    return {
        name: Place(kind if layer is None or stem == main else f"{stem}.*.{kind}", layer)
        for name, (stem, layer, kind) in parts.items()
    }


def main_stem(names: Iterable[str]) -> str:
    """Return the part before the layer number in most of the names that have one."""
    stems = Counter(stem for stem, layer, _ in map(parts_of, names) if layer is not None)
    return stems.most_common(1)[0][0] if stems else ""


def parts_of(name: str) -> tuple[str, int | None, str]:
    """Return (the part before the layer number, the layer, the part after it)."""
    module = name.removesuffix(".weight")
    found = _NUMBER.search(module)
    if found is None:
        return "", None, module
    rest = starred(module[found.end() :]).removeprefix(".")
    return module[: found.start()], int(found.group()[1:]), rest or "*"


def mtp_tensors(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Return the names that belong to MTP layers, by the name itself or by the number of layers in ``config``."""
    text = dict(config)
    if isinstance(inner := config.get("text_config"), Mapping):
        text |= inner
    layers = text.get("num_hidden_layers")
    more = max((count for key in _COUNTS if isinstance(count := text.get(key), int)), default=0)

    def beyond(name: str) -> bool:
        layer = _LAYER.match(name)
        return layer is not None and isinstance(layers, int) and layers <= int(layer[1]) < layers + more

    return {name for name in names if _MTP.match(name) or beyond(name)}


def carriable(
    given: Collection[str], base: Collection[str], config: Mapping[str, Any], pattern: re.Pattern[str] | None = None
) -> set[str]:
    """Return the base's names that may be copied from it if ``given``, the tensors to be written, lacks them: those in
    which ``pattern`` is found, and all of MTP unless some are given, which may have been trained.
    """
    mtp = mtp_tensors(base, config)
    named = {name for name in base if pattern is not None and pattern.search(name)}
    return named | (mtp if mtp.isdisjoint(given) else set())

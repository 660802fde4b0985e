"""Tensors of a release that models have no place for: the layers that predict further tokens (MTP). They are carried:
left out when a model is loaded, and taken from the base, byte for byte, when one is written back.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

#: How configurations call the number of MTP layers, which follow the others under the next layer numbers.
_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers", "num_mtp_modules")
_PREFIX = r"(?:model\.|language_model\.)*"
_LAYER = re.compile(_PREFIX + r"layers\.(\d+)\.")
_MTP = re.compile(_PREFIX + r"mtp[._]")


def mtp_tensors(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """The names that belong to MTP layers, by the name itself or by the number of layers in ``config``."""
    text = {**config, **(config.get("text_config") or {})}
    layers = text.get("num_hidden_layers")
    more = max((count for key in _COUNTS if isinstance(count := text.get(key), int)), default=0)

    def beyond(name: str) -> bool:
        layer = _LAYER.match(name)
        return layer is not None and isinstance(layers, int) and layers <= int(layer[1]) < layers + more

    return {name for name in names if _MTP.match(name) or beyond(name)}


def carriable(
    given: Collection[str], base: Collection[str], config: Mapping[str, Any], pattern: re.Pattern[str] | None = None
) -> set[str]:
    """Names of the base that are taken from it where ``given``, what is written, lacks them: those in which ``pattern``
    is found, and all MTP layers if none of them is given; where some of their tensors are, they may have been trained.
    """
    mtp = mtp_tensors(base, config)
    named = {name for name in base if pattern is not None and pattern.search(name)}
    return named | (mtp if mtp.isdisjoint(given) else set())

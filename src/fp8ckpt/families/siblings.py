"""Weights that are served as one: which matrices a serving engine joins before it multiplies, as data.

An engine that joins FP8 matrices has one scale for the whole. Where the parts' scales differ it requantizes the parts
to the largest of them, so what it serves is no longer what the file holds; equal scales are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

#: Leaf modules that are joined where they stand in the same module, in the order in which they are joined.
FUSED_LEAVES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("wq", "wk", "wv"),  # Mistral native
    ("w1", "w3"),  # Mistral native, and the experts of Mixtral and MiniMax
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek's latent attention
    ("in_proj_qkv", "in_proj_z"),  # gated delta nets
    ("in_proj_b", "in_proj_a"),
)
_LEAVES_WITH = {leaf: leaves for leaves in FUSED_LEAVES for leaf in leaves}
_WEIGHT = ".weight"


def sibling_units(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups among these names of tensors that engines join: two members or more, each in the order of the table.

    Only names that end in ``.weight`` take part. Groups come in the order in which the first of their members is met.
    """
    present: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for name in names:
        module = name.removesuffix(_WEIGHT)
        leaf = module.rpartition(".")[2]
        if module != name and (leaves := _LEAVES_WITH.get(leaf)):
            present.setdefault((module.removesuffix(leaf), leaves), set()).add(leaf)
    return [
        tuple(parent + leaf + _WEIGHT for leaf in leaves if leaf in found)
        for (parent, leaves), found in present.items()
        if len(found) > 1
    ]


def equal_units(scales: Mapping[str, bytes]) -> list[tuple[str, ...]]:
    """All weights of ``scales`` (what their scales are, as stored), each alone or with the siblings whose scale equals
    its own.

    A new scale of one of a unit is one of all: what was equal for the engine's sake stays equal.
    """
    units: list[tuple[str, ...]] = []
    for siblings in sibling_units(scales):
        by_scale: dict[bytes, list[str]] = {}
        for name in siblings:
            by_scale.setdefault(scales[name], []).append(name)
        units += [tuple(names) for names in by_scale.values()]
    together = {name for unit in units for name in unit}
    return units + [(name,) for name in scales if name not in together]

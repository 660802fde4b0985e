"""How trainers shard a model's tensors over ranks, from their names.

Pipeline stages: the layers of the text model in equal runs; tensors before them (embeddings, vision towers) on the
first stage, the last norm and the head on the last one. Tensor parallelism: rows or columns of the Linears of those
layers, by the rows of `fp8ckpt.families.parallel`, and rows of the head; everything else is whole on each rank. Expert
parallelism: the experts of a layer are one stack, in one tensor or many, and whole experts go to ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from fp8ckpt.families.kinds import main_stem, parts_of, starred
from fp8ckpt.families.parallel import SPLIT_COLUMNS, SPLIT_ROWS
from fp8ckpt.families.roles import Roles, in_tower
from fp8ckpt.tensors.formats import module_of

Shape = tuple[int, ...]
Cut = Literal["rows", "columns"]


class Sharing(NamedTuple):
    """How one tensor is sharded.

    ``layer``: of the text model, or None for a tensor outside of its layers, which is on the first stage or the
    ``last``. ``cut``: what tensor parallelism cuts of the matrix, or None. ``stack``: the experts that it is one of, or
    all of (``stacked``); None if it is no expert.
    """

    kind: str
    layer: int | None
    last: bool
    cut: Cut | None
    stack: str | None
    stacked: bool

    @property
    def rule(self) -> str:
        what = f"{'' if self.stack is None else 'experts, or '}{self.cut or 'whole'}"
        return what if self.layer is not None else f"{what}, on the {'last' if self.last else 'first'} stage"


def sharing(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Iterator[tuple[str, Sharing]]:
    """Yield how each tensor of a checkpoint is sharded, by name. ``config``: ``config.json``."""
    roles = Roles(shapes, config)
    stem = main_stem(name for name in shapes if not in_tower(module_of(name)))
    stacks = {name.rpartition(".")[0] for name in shapes if roles.is_stack(name)}
    for name, shape in shapes.items():
        module, (before, layer, kind) = module_of(name), parts_of(name)
        if layer is None or before != stem:
            head = roles.is_weight(name) and roles.left(name) == "heads"
            last = head or _is_last_norm(module, stem)
            yield name, Sharing(starred(module), None, last, "rows" if head else None, None, False)
            continue
        parent = name.rpartition(".")[0]
        stacked = roles.is_stack(name) or (parent in stacks and len(shape) > 1)
        experts = roles.experts_of(name) or (parent if stacked else None)
        stack = name if stacked or experts is None else f"{experts}.{_behind_number(name, experts)}"
        cut = _cut(module, len(shape) - stacked)
        yield name, Sharing(kind, layer, False, cut, None if experts is None else stack, stacked)


def _cut(module: str, rank: int) -> Cut | None:
    """Return what tensor parallelism cuts. A bias is cut with the rows of its weight."""
    leaf = re.sub(r"[._]bias$", "", module).rpartition(".")[2]
    if leaf in SPLIT_ROWS:
        return "rows"
    return "columns" if leaf in SPLIT_COLUMNS and rank > 1 else None


def _is_last_norm(module: str, stem: str) -> bool:
    """Whether a module is the norm after the last layer, beside the layers."""
    parent, _, leaf = module.rpartition(".")
    return parent == stem.rpartition(".")[0] and "norm" in leaf.lower() and "embed" not in leaf.lower()


def _behind_number(name: str, experts: str) -> str:
    return name.removeprefix(f"{experts}.").partition(".")[2]

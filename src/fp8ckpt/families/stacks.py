"""Stacked experts by their names alone: what one tensor of a model is, of the tensors of its release, and the reverse.

A model of transformers 5 holds ``experts.gate_up_proj [E, 2 I, H]`` and ``experts.down_proj [E, H, I]``; most releases
hold a matrix an expert.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from fp8ckpt.families.names import LAYOUTS, KeyLayout
from fp8ckpt.tensors.assembly import Assembly

Shapes = Mapping[str, tuple[int, ...]]

#: What a stack is called, and the leaves of one expert that it concatenates; in each of the families' ways.
STACKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_WITH = {leaf: (stack, leaves) for stack, ways in STACKS.items() for leaves in ways for leaf in leaves}
#: The matrix of one expert: what holds the experts, the expert's number, the leaf.
ONE_EXPERT = re.compile(r"(.+)\.(\d+)\.(\w+)\.weight")


def answers(wanted: Collection[str], stored: Shapes) -> dict[str, Assembly]:
    """How the tensors ``wanted`` of a model are made of those ``stored``, under the layout of names that answers most;
    without those that none answers.
    """
    found = [dict(_answered(wanted, stored, layout)) for layout in LAYOUTS]
    return max(found, key=len)


def _answered(wanted: Collection[str], stored: Shapes, layout: KeyLayout) -> Iterator[tuple[str, Assembly]]:
    for name in wanted:
        hf = layout.native_to_hf(name)
        made = Assembly.whole(hf, stored[hf]) if hf in stored else stacked(hf, stored) or unstacked(hf, stored)
        if made is not None:
            yield name, made


def stacked(name: str, stored: Shapes) -> Assembly | None:
    """The stack of this name, of the matrices of its experts; None where they are not all there."""
    stem, _, leaf = name.rpartition(".")
    for leaves in STACKS.get(leaf, ()):
        count = 0
        while f"{stem}.{count}.{leaves[0]}.weight" in stored:
            count += 1
        names = [[f"{stem}.{i}.{part}.weight" for i in range(count)] for part in leaves]
        if count and all(part in stored for of_leaf in names for part in of_leaf):
            stacks = [Assembly.stack([Assembly.whole(part, stored[part]) for part in of_leaf]) for of_leaf in names]
            return Assembly.concatenate(stacks, 1)
    return None


def stack_with(name: str) -> str | None:
    """The stack that the matrix of one expert is a part of; None for what is none."""
    one = ONE_EXPERT.fullmatch(name)
    return f"{one[1]}.{_WITH[one[3]][0]}" if one is not None and one[3] in _WITH else None


def unstacked(name: str, stored: Shapes) -> Assembly | None:
    """The matrix of one expert, of a stack [E, out, in]; None where there is none."""
    one, stack = ONE_EXPERT.fullmatch(name), stack_with(name)
    if one is None or stack is None:
        return None
    expert, leaf, leaves = int(one[2]), one[3], _WITH[one[3]][1]
    shape = stored.get(stack, ())
    if len(shape) != 3 or expert >= shape[0] or shape[1] % len(leaves):
        return None
    return Assembly.whole(stack, shape).narrow(0, expert, 1).squeeze(0).chunk(len(leaves))[leaves.index(leaf)]

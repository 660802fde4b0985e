"""How engines join weights, and shard them over GPUs, by leaf module, as rows; and what that requires of blocks.

An engine that joins FP8 matrices has one scale for the whole. If the scales of the parts differ, it requantizes them to
the largest, so it no longer serves what the file holds; equal scales stay unchanged.

With tensor parallelism of size N, each GPU has 1/N of the rows of some Linears, and 1/N of the columns of those that
sum up their results; every other weight is whole on each GPU. Engines refuse a weight in blocks if its rows are joined
or sharded and a part is not whole blocks (vLLM 0.33 and SGLang 0.5 while they build the layer).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from fp8ckpt.errors import shown

#: Leaf modules that are joined if they have the same parent, in the order of joining.
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
#: Rows are sharded.
SPLIT_ROWS = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "wq", "wk", "wv", "q_b_proj", "kv_b_proj", "wq_b", "wkv_b"),
        *("gate_proj", "up_proj", "gate_up_proj", "gate_up", "w1", "w3", "w13", "input_linear", "fc1"),
        *("in_proj_qkvz", "in_proj_qkv", "in_proj_z"),
    }
)
#: Columns are sharded.
SPLIT_COLUMNS = frozenset({"o_proj", "wo", "down_proj", "w2", "output_linear", "fc2", "out_proj"})
#: Rows are sharded by whole heads of keys and values: if there are more GPUs than heads, each GPU has one.
KEY_VALUE_ROWS = frozenset({"k_proj", "v_proj", "wk", "wv"})
#: Weights that are joined in the file already: the number of parts with equal rows.
JOINED_ALREADY = {"gate_up_proj": 2, "gate_up": 2, "w13": 2, "input_linear": 2}
#: The same with parts of different sizes: the rows of queries, keys and values, by heads.
QUERIES_KEYS_VALUES = frozenset({"qkv_proj"})

Shape = tuple[int, ...]
Block = tuple[int, int]  # rows, columns


class Heads(NamedTuple):
    """The numbers of heads of a model's attention."""

    queries: int
    keys: int


class Ragged(NamedTuple):
    """A part of a weight, on one GPU, that is not whole blocks: ``size`` rows or columns (``dimension``)."""

    name: str
    dimension: str
    size: int
    block: int

    def __str__(self) -> str:
        return f"{shown(self.name)} has {self.size} {self.dimension}, and its blocks {self.block}"


def sibling_units(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of these names that engines join: at least two members each, in the order of the table.

    Only names that end in ``.weight`` take part. Groups are ordered by the first occurrence of a member.
    """
    present: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for name in names:
        module = name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        if module != name and (leaves := _LEAVES_WITH.get(leaf)):
            present.setdefault((module.removesuffix(leaf), leaves), set()).add(leaf)
    return [
        tuple(parent + leaf + ".weight" for leaf in leaves if leaf in found)
        for (parent, leaves), found in present.items()
        if len(found) > 1
    ]


def equal_units(scales: Mapping[str, bytes]) -> list[tuple[str, ...]]:
    """Return the weights in ``scales`` (name to stored scale) in units: siblings with equal scales, and others alone.

    A new scale is one for the whole group: scales that are equal for the engine's sake stay equal.
    """
    units: list[tuple[str, ...]] = []
    for siblings in sibling_units(scales):
        by_scale: dict[bytes, list[str]] = {}
        for name in siblings:
            by_scale.setdefault(scales[name], []).append(name)
        units += [tuple(names) for names in by_scale.values()]
    together = {name for unit in units for name in unit}
    return units + [(name,) for name in scales if name not in together]


def ragged(
    shapes: Mapping[str, Shape],
    blocks: Mapping[str, Block],
    size: int,
    heads: Heads | None,
    every: Collection[str] = (),
) -> Iterator[Ragged]:
    """Yield what engines refuse with tensor parallelism of ``size``: the first such part of each weight in ``blocks``.

    ``shapes`` and ``blocks`` are of matrices or of stacks of them. ``heads``: of the model, if known. ``every``:
    weights that must be whole blocks even if they are neither joined nor sharded.
    """
    joined = {name for unit in sibling_units(blocks) for name in _aligned(unit)}
    for name, (block_rows, block_columns) in blocks.items():
        rows, columns = shapes[name][-2:]
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        parts = _parts(leaf, rows, size, heads)
        cut = [part for part in parts if part % block_rows]
        if cut and (name in joined or name in every or leaf in QUERIES_KEYS_VALUES or parts != [rows]):
            yield Ragged(name, "rows", int(cut[0]), block_rows)
            continue
        part = columns / (size if leaf in SPLIT_COLUMNS else 1)
        if (part != columns or name in every) and part % block_columns:
            yield Ragged(name, "columns", int(part), block_columns)


def _parts(leaf: str, rows: int, size: int, heads: Heads | None) -> list[float]:
    """Return the rows of each part of a weight on one GPU."""
    shares = size if leaf in SPLIT_ROWS else 1
    if leaf in QUERIES_KEYS_VALUES and heads is not None:
        head = rows / (heads.queries + 2 * heads.keys)
        keys = head * heads.keys / min(size, heads.keys)
        return [head * heads.queries / size, keys, keys]
    if leaf in KEY_VALUE_ROWS and heads is not None:
        shares = min(size, heads.keys)
    parts = JOINED_ALREADY.get(leaf, 1)
    return [rows / parts / shares] * parts


def _aligned(unit: tuple[str, ...]) -> tuple[str, ...]:
    """Return the members of a unit that must be whole blocks: all, except the last if rows are not sharded."""
    leaf = unit[0].removesuffix(".weight").rpartition(".")[2]
    return unit if leaf in SPLIT_ROWS else unit[:-1]

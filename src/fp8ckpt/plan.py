"""Plan what a load puts on each rank of a cluster, from headers alone: no process group, no model, no transformers.

The name of a tensor decides how it is sharded (`fp8ckpt.families.sharing`). The size of each shard follows DTensor's
arithmetic, uneven sizes included: a dimension of n on a mesh of p is cut every ``ceil(n / p)``, and ranks beyond its
end have nothing. Ranks are numbered as in a mesh of (stage, data, tensor), the last index fastest. Data-parallel ranks
cut the first dimension of what tensor parallelism left (FSDP2). With expert parallelism, each group of ``ep``
consecutive ranks of a stage cuts the stacked experts instead, and the ranks with the same part cut it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from fp8ckpt.collector import collector_paused
from fp8ckpt.families.kinds import mtp_tensors
from fp8ckpt.families.sharing import Shape, Sharing, sharing
from fp8ckpt.families.tied import ties_embeddings
from fp8ckpt.ranks import BEYOND
from fp8ckpt.stores.local import kept_open
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint
from fp8ckpt.tensors.stored import tensor_nbytes


@dataclass(frozen=True)
class RankPlan:
    """One rank: its index in each dimension of the mesh, and its bytes. ``held``: what it will hold; ``read``: what it
    reads from the files, without scales; ``peak``: its greatest memory use, without the interpreter.
    """

    rank: int
    pp: int
    dp: int
    tp: int
    ep: int
    tensors: int
    held: int
    read: int
    peak: int


@dataclass(frozen=True)
class SharedKind:
    """The tensors of one kind, and the rule that shards them."""

    kind: str
    rule: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The result of `plan`. Sizes are in bytes, without scales.

    ``stored``: size of all tensors in the files. ``left_out``: names of the tensors that models have no place for, and
    ``left`` their size. ``again``: bytes that are read more than once because several ranks hold them. All ranks
    together read ``stored - left + again``.

    >>> found = fp8ckpt.plan("sample-fp8", ranks=8, tp=2)
    >>> found.dp, max(rank.read for rank in found.ranks) < found.stored / 4
    (4, True)
    """

    path: Path | str
    pp: int
    dp: int
    tp: int
    ep: int
    stored: int
    left: int
    again: int
    read: int
    left_out: tuple[str, ...]
    kinds: tuple[SharedKind, ...]
    ranks: tuple[RankPlan, ...]


_MOST_RANKS = 1 << 17  # each is planned by itself


class _Mesh(NamedTuple):
    pp: int
    dp: int
    tp: int
    ep: int

    def places(self) -> Iterator[_Mesh]:
        """Yield the indices of each rank, in the order of ranks. The ``ep`` index follows from ``dp`` and ``tp``."""
        for stage in range(self.pp):
            for number in range(self.dp * self.tp):
                yield _Mesh(stage, number // self.tp, number % self.tp, number % self.ep)


class _Unit(NamedTuple):
    """Tensors of one shape that are cut together: a tensor, or the experts of a stack with one tensor each. ``shape``:
    of the whole, with the experts first. ``stored`` and ``held``: bytes of the whole in the files and in memory.
    """

    sharing: Sharing
    tensors: int
    shape: Shape
    stored: int
    held: int
    stages: tuple[int, ...]

    def cuts(self, mesh: _Mesh) -> Iterator[tuple[int, int, str]]:
        """Yield (dimension, number of parts, index that selects the part) of each cut, in order."""
        stack = self.sharing.stack is not None
        if stack and mesh.ep > 1:
            yield 0, mesh.ep, "ep"
            yield 0, mesh.dp * mesh.tp // mesh.ep, "rest"
            return
        rank = len(self.shape) - stack
        if self.sharing.cut is not None:
            yield len(self.shape) - (2 if self.sharing.cut == "rows" and rank > 1 else 1), mesh.tp, "tp"
        if self.shape:
            yield 0, mesh.dp, "dp"

    def part(self, mesh: _Mesh, place: _Mesh) -> Shape:
        """Return the shape of the part that the rank at ``place`` holds. The rank is in one of the unit's stages."""
        sizes = list(self.shape)
        at = {"ep": place.ep, "rest": (place.dp * mesh.tp + place.tp) // mesh.ep, "tp": place.tp, "dp": place.dp}
        for dimension, parts, by in self.cuts(mesh):
            sizes[dimension] = part_of(sizes[dimension], parts, at[by])
        return tuple(sizes)

    def copies(self, mesh: _Mesh) -> int:
        """Return how many ranks hold each element."""
        return len(self.stages) * mesh.dp * mesh.tp // prod(parts for _, parts, _ in self.cuts(mesh))


def part_of(size: int, parts: int, index: int) -> int:
    """Return the length of part ``index`` when DTensor's ``Shard`` or ``torch.chunk`` cuts a dimension of ``size``."""
    step = -(-size // parts)
    return max(0, min(step, size - step * index))


@kept_open()
@collector_paused()
def plan(path: CheckpointLike, *, ranks: int, tp: int = 1, pp: int = 1, ep: int = 1) -> Plan:
    """Plan what each of ``ranks`` ranks holds, reads and needs in memory when the checkpoint is loaded as bfloat16.

    ``tp``, ``pp``, ``ep``: sizes of tensor, pipeline and expert parallelism; the remaining factor of ``ranks`` is
    data-parallel and shards what it holds (FSDP2). Tensors that are not FP8 keep their dtype. Reads headers only.
    Raises `ValueError` for sizes that do not fit each other or the model, and what `open_checkpoint` raises.

    >>> found = fp8ckpt.plan("sample-fp8", ranks=4, tp=2, pp=2)
    >>> [rank.read for rank in found.ranks]
    [527104, 527104, 140032, 140032]
    >>> found.read == found.stored + found.again
    True
    """
    checkpoint = open_checkpoint(path)
    mesh = _mesh(ranks, tp, pp, ep)
    left_out = mtp_tensors(checkpoint.tensors, checkpoint.config)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name not in left_out}
    shared = dict(sharing(shapes, checkpoint.config))
    units = list(_units(checkpoint, shared, mesh))
    if ep > 1 and all(one.stack is None for one in shared.values()):
        raise ValueError(f"ep is {ep}, and the model has no experts")
    found = tuple(_ranks(units, mesh))
    return Plan(
        path=checkpoint.path,
        **mesh._asdict(),
        stored=sum(tensor.span.nbytes for tensor in checkpoint.tensors.values()),
        left=sum(checkpoint[name].span.nbytes for name in left_out),
        again=sum(unit.stored * (unit.copies(mesh) - 1) for unit in units),
        read=sum(rank.read for rank in found),
        left_out=tuple(sorted(left_out)),
        kinds=tuple(_kinds(units)),
        ranks=found,
    )


def _mesh(ranks: int, tp: int, pp: int, ep: int) -> _Mesh:
    for name, size in (("ranks", ranks), ("tp", tp), ("pp", pp), ("ep", ep)):
        if size < 1:
            raise ValueError(f"{name} is {size}; expected 1 or more")
    if ranks > _MOST_RANKS:
        raise ValueError(f"ranks is {ranks}; expected at most {_MOST_RANKS}")
    if ranks % (tp * pp):
        raise ValueError(f"{ranks} ranks are no multiple of tp * pp = {tp * pp}")
    if ranks // pp % ep:
        raise ValueError(f"ep is {ep}; expected a divisor of the {ranks // pp} ranks of a stage")
    return _Mesh(pp, ranks // (tp * pp), tp, ep)


def _units(checkpoint: Checkpoint, shared: dict[str, Sharing], mesh: _Mesh) -> Iterator[_Unit]:
    layers = sorted({one.layer for one in shared.values() if one.layer is not None})
    if mesh.pp > max(1, len(layers)):
        raise ValueError(f"pp is {mesh.pp}, and the model has {len(layers)} layers")
    starts = [len(layers) * stage // mesh.pp for stage in range(mesh.pp + 1)]
    stage_of = {layer: stage for stage in range(mesh.pp) for layer in layers[starts[stage] : starts[stage + 1]]}
    headless = ties_embeddings(checkpoint.config) and not any(one.last and one.cut for one in shared.values())
    stacks: dict[tuple[object, ...], list[str]] = {}
    for name, one in shared.items():
        tensor = checkpoint[name]
        key = (one.stack, tensor.shape, tensor.span.dtype) if one.stack and not one.stacked else (name,)
        stacks.setdefault(key, []).append(name)
    for names in stacks.values():
        one, tensor = shared[names[0]], checkpoint[names[0]]
        stages = [stage_of[one.layer] if one.layer is not None else mesh.pp - 1 if one.last else 0]
        if headless and one.layer is None and one.kind.endswith(_EMBEDDINGS):
            stages.append(mesh.pp - 1)  # the head is the embedding
        shape = (len(names), *tensor.shape) if one.stack and not one.stacked else tensor.shape
        held = 2 * tensor.numel if tensor.scaled is not None else tensor_nbytes(tensor.dtype, tensor.shape)
        count = len(names)
        yield _Unit(one, count, shape, count * tensor.span.nbytes, count * held, tuple(dict.fromkeys(stages)))


_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte", "word_embeddings")


def _ranks(units: Sequence[_Unit], mesh: _Mesh) -> Iterator[RankPlan]:
    of_stage: dict[int, list[_Unit]] = {stage: [] for stage in range(mesh.pp)}
    for unit in units:
        for stage in unit.stages:
            of_stage[stage].append(unit)
    for rank, place in enumerate(mesh.places()):
        tensors = held = read = 0
        for unit in of_stage[place.pp]:
            part, whole = unit.part(mesh, place), max(1, prod(unit.shape))
            if prod(part):
                tensors += part[0] if unit.tensors > 1 else 1
            held += unit.held * prod(part) // whole
            read += unit.stored * prod(part) // whole
        yield RankPlan(rank, *place, tensors=tensors, held=held, read=read, peak=held + BEYOND)


def _kinds(units: Sequence[_Unit]) -> Iterator[SharedKind]:
    found: dict[tuple[str, str], list[_Unit]] = {}
    for unit in units:
        found.setdefault((unit.sharing.kind, unit.sharing.rule), []).append(unit)
    for (kind, rule), same in found.items():
        yield SharedKind(kind, rule, sum(unit.tensors for unit in same), sum(unit.stored for unit in same))

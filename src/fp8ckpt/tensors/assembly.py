"""Assemblies: the pieces of other tensors that a tensor is made of, as pure data.

A model may hold as one tensor what a file holds as several, or the reverse. Each *piece* is one box of the tensor and
one box of a source, with its axes in any order. Stacked experts, fused gate and up projections, chunks of a fused one,
transposed and renamed tensors are all assemblies. They are made from names and shapes, before the first byte is read.

    gate_up = Assembly.concatenate(
        [
            Assembly.stack([Assembly.whole(f"experts.{i}.gate_proj.weight", (I, H)) for i in range(E)], 0),
            Assembly.stack([Assembly.whole(f"experts.{i}.up_proj.weight", (I, H)) for i in range(E)], 0),
        ],
        axis=1,
    )  # [E, 2 I, H], of 2 E pieces
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import NamedTuple

from fp8ckpt.numerics.geometry import Region, Shape

NEW = -1  # an axis of a joined tensor that its source lacks, of length 1 in a piece


class Piece(NamedTuple):
    """One box of a joined tensor, which is one box of ``source``.

    ``source_offsets``: where the box begins in the source, one an axis of the source; ``offsets`` and ``sizes``: the
    box in the joined tensor; ``axes``: for each axis of the joined tensor the source's axis, or `NEW`. An axis of the
    source that is not listed has length 1 in the box.

    >>> piece = fp8ckpt.Piece("experts.1.w1.weight", (0, 0), (1, 0, 0), (1, 4, 8), (-1, 0, 1))
    >>> piece.region, piece.source_region
    (((1, 0, 0), (1, 4, 8)), ((0, 0), (4, 8)))
    """

    source: str
    source_offsets: Shape
    offsets: Shape
    sizes: Shape
    axes: tuple[int, ...]

    @property
    def region(self) -> Region:
        return self.offsets, self.sizes

    @property
    def source_region(self) -> Region:
        sizes = [1] * len(self.source_offsets)
        for axis, size in zip(self.axes, self.sizes, strict=True):
            if axis != NEW:
                sizes[axis] = size
        return self.source_offsets, tuple(sizes)

    def cut(self, region: Region) -> Piece | None:
        """Return the part inside a region of the joined tensor, in the same coordinates; None if there is none."""
        offsets, sizes, source = [], [], list(self.source_offsets)
        for axis, start, size, low, length in zip(self.axes, self.offsets, self.sizes, *region, strict=True):
            first, last = max(start, low), min(start + size, low + length)
            if first >= last:
                return None
            offsets.append(first)
            sizes.append(last - first)
            if axis != NEW:
                source[axis] += first - start
        return Piece(self.source, tuple(source), tuple(offsets), tuple(sizes), self.axes)

    def reversed(self, name: str) -> Piece:
        """Return the same two boxes with their roles swapped: the source has a piece of the joined tensor ``name``."""
        offsets, sizes = self.source_region
        axes = [NEW] * len(offsets)
        for mine, axis in enumerate(self.axes):
            if axis != NEW:
                axes[axis] = mine
        return Piece(name, self.offsets, offsets, sizes, tuple(axes))

    def through(self, other: Piece) -> Piece | None:
        """Return this box with its source replaced by that of ``other``, a piece of the source. None without an
        overlap.
        """
        part = self.reversed("").cut(other.region)
        inner = part and other.cut(part.region)
        if part is None or inner is None:
            return None
        offsets, sizes = part.source_region
        axes = tuple(NEW if axis == NEW else other.axes[axis] for axis in self.axes)
        return Piece(other.source, inner.source_offsets, offsets, sizes, axes)


class Assembly(NamedTuple):
    """The pieces that a tensor of ``shape`` is made of. Pieces do not overlap, and cover it.

    >>> experts = [fp8ckpt.Assembly.whole(f"experts.{i}.w1.weight", (4, 8)) for i in range(2)]
    >>> stack = fp8ckpt.Assembly.stack(experts)
    >>> stack.shape, [piece.source for piece in stack.pieces]
    ((2, 4, 8), ['experts.0.w1.weight', 'experts.1.w1.weight'])
    """

    shape: Shape
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Assembly:
        """Return an assembly of the whole tensor ``name``, which may get another name."""
        shape = tuple(shape)
        zero = (0,) * len(shape)
        return cls(shape, (Piece(name, zero, zero, shape, tuple(range(len(shape)))),))

    @classmethod
    def stack(cls, parts: Sequence[Assembly], axis: int = 0) -> Assembly:
        """Stack tensors of one shape along a new axis."""
        _same_shape("stacked", [part.shape for part in parts])
        put = partial(_put, axis=axis % (len(parts[0].shape) + 1), over=0)
        pieces = [
            Piece(p.source, p.source_offsets, put(p.offsets, i), put(p.sizes, 1), put(p.axes, NEW))
            for i, part in enumerate(parts)
            for p in part.pieces
        ]
        return cls(put(parts[0].shape, len(parts)), tuple(pieces))

    @classmethod
    def concatenate(cls, parts: Sequence[Assembly], axis: int = 0) -> Assembly:
        """Concatenate tensors along an axis."""
        axis %= len(parts[0].shape)
        _same_shape("concatenated", [(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts])
        pieces, at = [], 0
        for part in parts:
            pieces += [p._replace(offsets=_put(p.offsets, p.offsets[axis] + at, axis=axis)) for p in part.pieces]
            at += part.shape[axis]
        return cls(_put(parts[0].shape, at, axis=axis), tuple(pieces))

    def renamed(self, names: Mapping[str, str]) -> Assembly:
        """Return the same assembly with its sources renamed."""
        return Assembly(self.shape, tuple(p._replace(source=names[p.source]) for p in self.pieces))

    def permute(self, order: Sequence[int]) -> Assembly:
        """Permute the axes."""
        order = [axis % len(self.shape) for axis in order]

        def moved(values: Shape) -> Shape:
            return tuple(values[axis] for axis in order)

        return self._moved(moved)

    def transpose(self, first: int, second: int) -> Assembly:
        """Swap two axes."""
        order = list(range(len(self.shape)))
        order[first], order[second] = order[second], order[first]
        return self.permute(order)

    def cut(self, region: Region) -> Iterator[Piece]:
        """Yield the pieces of a region, each in the coordinates of the whole."""
        return (part for piece in self.pieces if (part := piece.cut(region)) is not None)

    def narrow(self, axis: int, start: int, size: int) -> Assembly:
        """Return a part along an axis, as a tensor of its own."""
        axis %= len(self.shape)
        region = _put((0,) * len(self.shape), start, axis=axis), _put(self.shape, size, axis=axis)
        pieces = [p._replace(offsets=_put(p.offsets, p.offsets[axis] - start, axis=axis)) for p in self.cut(region)]
        return Assembly(region[1], tuple(pieces))

    def split(self, sizes: Sequence[int], axis: int = 0) -> tuple[Assembly, ...]:
        """Cut into parts of these sizes along an axis."""
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self.narrow(axis, start, size) for start, size in zip(starts, sizes, strict=True))

    def chunk(self, count: int, axis: int = 0) -> tuple[Assembly, ...]:
        """Cut into ``count`` parts along an axis as ``torch.chunk`` does: the last part may be smaller."""
        length = self.shape[axis]
        size = -(-length // count)
        return self.split([min(size, length - at) for at in range(0, length, size)], axis)

    def squeeze(self, axis: int) -> Assembly:
        """Remove an axis of length 1."""
        axis %= len(self.shape)
        if self.shape[axis] != 1:
            raise ValueError(f"axis {axis} of {self.shape} is not of length 1")
        return self._moved(partial(_put, axis=axis))

    def _moved(self, put: Callable[[Shape], Shape]) -> Assembly:
        """Return the assembly with other axes: ``put`` is applied to each shape, offsets, sizes and axes."""
        pieces = (p._replace(offsets=put(p.offsets), sizes=put(p.sizes), axes=put(p.axes)) for p in self.pieces)
        return Assembly(put(self.shape), tuple(pieces))

    def reshape(self, shape: Sequence[int]) -> Assembly:
        """Return the same elements in row-major order under another shape. Axes are split and merged, which may make
        more pieces.
        """
        shape = tuple(shape)
        if -1 in shape:
            shape = _put(shape, prod(self.shape) // -prod(shape), axis=shape.index(-1))
        if prod(shape) != prod(self.shape):
            raise ValueError(f"{self.shape} cannot be reshaped to {shape}")
        result, axis = self, 0
        while result.shape != shape:
            if axis == len(shape):
                result = result.squeeze(axis)
            elif axis == len(result.shape):
                result = Assembly.stack([result], axis)
            elif result.shape[axis] == shape[axis]:
                axis += 1
            elif shape[axis] and result.shape[axis] % shape[axis] == 0 and result.shape[axis] > shape[axis]:
                result = result._split_axis(axis, result.shape[axis] // shape[axis])
            else:
                result = result._merge_axes(axis)
        return result

    def _split_axis(self, axis: int, columns: int) -> Assembly:
        """Split one axis into rows and columns. A piece that spans several rows becomes one piece a row."""
        put = partial(_put, axis=axis)
        pieces = []
        for p in self.pieces:
            start, stop = p.offsets[axis], p.offsets[axis] + p.sizes[axis]
            for row in range(start // columns, -(-stop // columns)):
                part = p.cut((_put(p.offsets, row * columns, axis=axis), _put(p.sizes, columns, axis=axis)))
                if part is not None:
                    offsets = put(part.offsets, row, part.offsets[axis] - row * columns)
                    sizes, axes = put(part.sizes, 1, part.sizes[axis]), put(part.axes, NEW, part.axes[axis])
                    pieces.append(part._replace(offsets=offsets, sizes=sizes, axes=axes))
        return Assembly(put(self.shape, self.shape[axis] // columns, columns), tuple(pieces))

    def _merge_axes(self, axis: int) -> Assembly:
        """Merge an axis with the next one. A piece becomes one piece a row."""
        if axis + 1 == len(self.shape):
            raise ValueError(f"axis {axis} of {self.shape} has no next one to be merged with")
        columns = self.shape[axis + 1]
        if columns == 1:
            return self.squeeze(axis + 1)
        joined, pieces = partial(_put, axis=axis, over=2), []
        for p in self.pieces:
            for row in range(p.offsets[axis], p.offsets[axis] + p.sizes[axis]):
                part = p.cut((_put(p.offsets, row, axis=axis), _put(p.sizes, 1, axis=axis)))
                assert part is not None  # the row is one of its rows
                offsets = joined(part.offsets, row * columns + part.offsets[axis + 1])
                sizes, axes = joined(part.sizes, part.sizes[axis + 1]), joined(part.axes, part.axes[axis + 1])
                pieces.append(part._replace(offsets=offsets, sizes=sizes, axes=axes))
        return Assembly(joined(self.shape, self.shape[axis] * columns), tuple(pieces))

    def defect(self, shapes: Mapping[str, Shape]) -> str | None:
        """Return what is wrong with the assembly for sources of these shapes: a source that is missing, a piece that
        leaves its source, or pieces that overlap or leave a gap. None if it is sound.
        """
        corners: Counter[Shape] = Counter()
        for piece in self.pieces:
            shape = shapes.get(piece.source)
            if shape is None:
                return f"a piece of {piece.source}, which is not there"
            if len(shape) != len(piece.source_offsets) or not _inside(piece.source_region, shape):
                return f"a piece {piece.source_region} of {piece.source}, which has shape {tuple(shape)}"
            _add_corners(corners, piece.region)
        # Signed corners add up: those of the pieces equal those of the whole if and only if the pieces cover each
        # element once.
        _add_corners(corners, ((0,) * len(self.shape), self.shape), -1)
        if any(corners.values()):
            return "pieces that overlap, or do not cover it"
        return None


class Ordered:
    """An assembly with its pieces sorted along the first axis: a cut looks at nearby pieces, not at thousands."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._pieces = sorted(assembly.pieces, key=lambda piece: piece.offsets[:1])
        self._starts = [piece.offsets[0] for piece in self._pieces] if assembly.shape else []
        self._most = max((piece.sizes[0] for piece in self._pieces), default=0) if assembly.shape else 0

    def cut(self, region: Region) -> Iterator[Piece]:
        if not self._assembly.shape:
            yield from self._assembly.cut(region)
            return
        low, high = region[0][0], region[0][0] + region[1][0]
        for piece in self._pieces[bisect_right(self._starts, low - self._most) : bisect_left(self._starts, high)]:
            if (part := piece.cut(region)) is not None:
                yield part


def reversed_assemblies(parts: Mapping[str, Assembly], shapes: Mapping[str, Shape]) -> dict[str, Assembly]:
    """Return the sources as assemblies of the joined tensors, for saving. ``shapes`` are those of the sources."""
    found: dict[str, list[Piece]] = {}
    for name, assembly in parts.items():
        for piece in assembly.pieces:
            found.setdefault(piece.source, []).append(piece.reversed(name))
    return {source: Assembly(tuple(shapes[source]), tuple(pieces)) for source, pieces in found.items()}


def composed(parts: Mapping[str, Assembly], inner: Mapping[str, Assembly]) -> dict[str, Assembly]:
    """Return the assemblies with each source replaced by its own in ``inner``; without those of other sources."""
    ordered: dict[str, Ordered] = {}
    found = {}
    for name, assembly in parts.items():
        sources = {piece.source for piece in assembly.pieces}
        if not sources <= inner.keys():
            continue
        ordered.update((source, Ordered(inner[source])) for source in sources - ordered.keys())
        pieces = [
            made
            for piece in assembly.pieces
            for other in ordered[piece.source].cut(piece.source_region)
            if (made := piece.through(other)) is not None
        ]
        found[name] = Assembly(assembly.shape, tuple(pieces))
    return found


def _put(values: Shape, *new: int, axis: int, over: int = 1) -> Shape:
    """Return the values with ``new`` ones in the place of as many as ``over`` from an axis on."""
    return (*values[:axis], *new, *values[axis + over :])


def _same_shape(verb: str, shapes: Iterable[Shape]) -> None:
    if len(set(shapes)) != 1:
        raise ValueError(f"tensors of different shapes cannot be {verb}")


def _inside(region: Region, shape: Shape) -> bool:
    return all(start >= 0 and start + size <= dim for start, size, dim in zip(*region, shape, strict=True))


def _add_corners(corners: Counter[Shape], region: Region, sign: int = 1) -> None:
    if not prod(region[1]):
        return
    for ends in product(*(((start, 1), (start + size, -1)) for start, size in zip(*region, strict=True))):
        corners[tuple(at for at, _ in ends)] += sign * prod(way for _, way in ends)

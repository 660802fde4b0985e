"""Joined tensors, whose values are those of other tensors, put together by an assembly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from fp8ckpt.errors import UnsupportedFormatError
from fp8ckpt.numerics.geometry import Region, Shape, within
from fp8ckpt.stores.store import ByteRange, Bytes
from fp8ckpt.tensors.assembly import NEW, Assembly, Ordered
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import elements_by_region

if TYPE_CHECKING:
    from fp8ckpt.numerics.dequantize import Bits
    from fp8ckpt.tensors.tensor import Reader, Tensor


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a key
class JoinedTensor:
    """A `fp8ckpt.tensors.tensor.Tensor` whose values are those of its pieces' ``sources``, by name. It is not scaled
    itself, even if its sources are; they give their values in a common dtype.
    """

    name: str
    assembly: Assembly
    sources: Mapping[str, Tensor]

    @property
    def shape(self) -> Shape:
        return self.assembly.shape

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @cached_property
    def _made_of(self) -> tuple[Tensor, ...]:
        return tuple(self.sources[name] for name in dict.fromkeys(piece.source for piece in self.assembly.pieces))

    @property
    def dtype(self) -> str:
        return self._made_of[0].dtype

    @property
    def span(self) -> TensorSpan:
        return self._made_of[0].span

    @property
    def spans(self) -> tuple[TensorSpan, ...]:
        return tuple(span for source in self._made_of for span in source.spans)

    @property
    def scales(self) -> tuple[TensorSpan, ...]:
        return tuple(scale for source in self._made_of for scale in source.scales)

    @property
    def scaled(self) -> None:
        return

    def dtypes(self) -> tuple[str, ...]:
        others = [source.dtypes() for source in self._made_of[1:]]
        return tuple(dtype for dtype in self._made_of[0].dtypes() if all(dtype in other for other in others))

    def reads(self, region: Region) -> Iterator[ByteRange]:
        """As `fp8ckpt.tensors.tensor.Tensor.reads`, piece by piece."""
        for piece in self._pieces.cut(region):
            yield from self.sources[piece.source].reads(piece.source_region)

    def values(self, region: Region, dtype: str, out: Bits, reader: Reader) -> None:
        for piece in self._pieces.cut(region):
            axes = [axis for axis in piece.axes if axis != NEW]
            view = out[within(piece.region, region)][(*(0 if axis == NEW else slice(None) for axis in piece.axes), ...)]
            view = view.transpose(sorted(range(len(axes)), key=axes.__getitem__))
            view = view[(*(slice(None) if axis in axes else None for axis in range(len(piece.source_offsets))), ...)]
            self.sources[piece.source].values(piece.source_region, dtype, view, reader)

    def elements(self, start: int, dtype: str, out: Bytes, reader: Reader) -> None:
        elements_by_region(self, start, dtype, out, reader)

    @cached_property
    def _pieces(self) -> Ordered:
        return Ordered(self.assembly)


def joined_tensors(parts: Mapping[str, Assembly], sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the assemblies ``parts``. An assembly of one whole source is that source itself.

    Raises `UnsupportedFormatError` if the pieces of a tensor have no dtype in common.
    """
    found: dict[str, Tensor] = {}
    for name, assembly in parts.items():
        first = sources[assembly.pieces[0].source] if assembly.pieces else None
        if first is not None and assembly == Assembly.whole(assembly.pieces[0].source, first.shape):
            found[name] = first
            continue
        tensor = found[name] = JoinedTensor(name, assembly, sources)
        if not tensor.dtypes():
            raise UnsupportedFormatError.of_pieces(name, {sources[piece.source].dtype for piece in assembly.pieces})
    return found

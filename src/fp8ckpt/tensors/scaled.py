"""Tensors that are stored as codes with scales: the values are ``code * scale``, over a grid of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fp8ckpt.errors import RangeError
from fp8ckpt.numerics.codes import CODE_FORMATS, TARGET_BYTES
from fp8ckpt.numerics.geometry import BlockGrid, Region, Shape, bytes_of_region, bytes_of_run, pieces, within
from fp8ckpt.stores.store import ByteRange, Bytes
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import elements_by_region

if TYPE_CHECKING:
    from fp8ckpt.numerics.dequantize import Bits
    from fp8ckpt.tensors.tensor import Reader

_LOGICAL = "BF16"


def turned(shape: Shape) -> Shape:
    """Return a shape with its last two dimensions swapped."""
    return (*shape[:-2], shape[-1], shape[-2])


class SecondLevel(NamedTuple):
    """The one value that multiplies or divides all scales of a tensor."""

    span: TensorSpan
    divides: bool


class QuantizedTensor(NamedTuple):
    """One quantized tensor of the logical checkpoint: codes, scales, and the grid by which the scales tile the codes.

    ``name``: of the logical tensor; the codes may be stored under another (``weight.name``). ``code_dtype``: of the
    codes; if several share a byte, ``weight`` has the dtype and the shape of bytes. ``second``: the second level of
    scales. ``across``: the tensor's last two dimensions are those of the codes swapped; grid, spans, ``codes`` and
    ``run`` have the codes' order. A `fp8ckpt.tensors.tensor.Tensor` of bfloat16, or of any other target.

    >>> tensor = fp8ckpt.open_checkpoint("sample-fp8").quantized[0]
    >>> tensor.weight.dtype, tensor.scale.dtype, tensor.grid.per_tensor
    ('F8_E4M3', 'BF16', True)
    """

    name: str
    weight: TensorSpan
    scale: TensorSpan
    grid: BlockGrid
    activation_scales: tuple[TensorSpan, ...]
    code_dtype: str
    second: SecondLevel | None = None
    across: bool = False

    @property
    def dtype(self) -> str:
        """The dtype of its values if the caller asks for no other."""
        return _LOGICAL

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return turned(self.grid.weight_shape) if self.across else self.grid.weight_shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def span(self) -> TensorSpan:
        return self.weight

    @property
    def spans(self) -> tuple[TensorSpan, ...]:
        return (self.weight, *self.scales, *self.activation_scales)

    @property
    def scales(self) -> tuple[TensorSpan, ...]:
        return (self.scale,) if self.second is None else (self.scale, self.second.span)

    @property
    def per_byte(self) -> int:
        return CODE_FORMATS[self.code_dtype].per_byte

    @property
    def packed(self) -> TensorSpan:
        """The codes as bytes, with one dimension for each dimension of the weight."""
        if self.per_byte == 1:
            return self.weight
        *lead, last = self.grid.weight_shape
        return self.weight._replace(dtype="U8", shape=(*lead, last // self.per_byte))

    @property
    def scaled(self) -> QuantizedTensor:
        return self

    def one_a_byte(self, stored: Bytes) -> Bytes:
        """Return the codes in the bytes [n] of the weight, one code a byte."""
        from fp8ckpt.numerics.quantize import unpack

        return stored if self.per_byte == 1 else unpack(stored)

    def dtypes(self) -> tuple[str, ...]:
        return tuple(TARGET_BYTES)

    def reads(self, region: Region) -> Iterator[ByteRange]:
        return self.packed.reads(bytes_of_region(self.of_codes(region), self.per_byte))

    def of_codes(self, region: Region) -> Region:
        """Return a region of the tensor in the codes' order of dimensions."""
        return (turned(region[0]), turned(region[1])) if self.across else region

    def values(self, region: Region, dtype: str, out: Bits, reader: Reader) -> None:
        """As `fp8ckpt.tensors.tensor.Tensor.values`: one multiplication in float32, one rounding."""
        dequantizer = reader.dequantizer(self, dtype)
        region, out = self.of_codes(region), out.swapaxes(-1, -2) if self.across else out
        for piece, codes in self.codes(region, reader):
            at: tuple[Any, ...] = (*within(piece, region), ...)  # a view, also of no dimensions
            dequantizer.region(codes, piece[0], out[at])
            if dequantizer.may_overflow:
                self.refuse_overflow(dequantizer.count_overflown(codes, out[at]), dtype)

    def elements(self, start: int, dtype: str, out: Bytes, reader: Reader) -> None:
        if self.across:
            elements_by_region(self, start, dtype, out, reader)
            return
        bits, dequantizer = out.view(f"u{TARGET_BYTES[dtype]}"), reader.dequantizer(self, dtype)
        for first, count, codes in self.run(start, bits.size, reader):
            part = bits[first - start :][:count]
            dequantizer.flat(codes, first, part)
            if dequantizer.may_overflow:
                self.refuse_overflow(dequantizer.count_overflown(codes, part), dtype)

    def refuse_overflow(self, count: int, dtype: str) -> None:
        """Raise `RangeError` if finite codes have values beyond a dtype (``count`` of them)."""
        if count:
            raise RangeError.of_codes(self, count, dtype)

    def run(self, start: int, count: int, reader: Reader) -> Iterator[tuple[int, int, Bytes]]:
        """Yield the bytes of the codes of a run of elements in row-major order, in pieces (first element, elements,
        bytes).
        """
        packed = self.packed
        for first in range(start, start + count, reader.room.size):
            size = min(reader.room.size, start + count - first)
            at, nbytes = bytes_of_run(first, size, self.per_byte)
            codes = reader.room[:nbytes]
            packed.read(codes, at)
            self._met(codes, reader)
            if reader.passing is not None:
                reader.passing(self, self.one_a_byte(codes))
            yield first, size, codes

    def codes(self, region: Region, reader: Reader) -> Iterator[tuple[Region, Bytes]]:
        """Yield the bytes of a region's codes in pieces, each in an array of the shape that
        `fp8ckpt.numerics.geometry.bytes_of_region` gives. A piece is valid until the next one is asked for.
        """
        packed = self.packed
        for piece in pieces(region, reader.room.size):
            of_bytes = bytes_of_region(piece, self.per_byte)
            codes = reader.room[: prod(of_bytes[1])]
            packed.read_region(of_bytes, codes)
            self._met(codes, reader)
            if reader.passing is not None:  # without the other code of a byte that the piece shares with its neighbour
                first = piece[0][-1] % self.per_byte if piece[0] else 0
                cols = self.one_a_byte(codes).reshape(*of_bytes[1][:-1], -1)
                reader.passing(self, cols[..., first : first + piece[1][-1]] if piece[1] else cols)
            yield piece, codes.reshape(of_bytes[1])

    def _met(self, codes: Bytes, reader: Reader) -> None:
        from fp8ckpt.numerics.dequantize import count_nonfinite

        reader.bytes_read += codes.nbytes
        if reader.counting and (count := count_nonfinite(codes, self.code_dtype)):
            reader.nonfinite[self.name] += count

    def count_overflown(self, reader: Reader) -> int:
        """Return how many finite codes have values beyond float16. Codes are read only if the scales allow for any."""
        dequantizer = reader.dequantizer(self, "F16")
        if not dequantizer.may_overflow:
            return 0
        halves = np.empty(reader.room.size, np.uint16)
        count = 0
        shape = self.grid.weight_shape
        for piece, codes in self.codes(((0,) * len(shape), shape), reader):
            bits = halves[: prod(piece[1])].reshape(piece[1])
            dequantizer.region(codes, piece[0], bits)
            count += dequantizer.count_overflown(codes, bits)
        return count

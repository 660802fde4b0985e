"""What is stored as codes with scales: one tensor, whose values are ``code * scale`` by a grid of blocks."""

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
    """With the last two in the other order."""
    return (*shape[:-2], shape[-1], shape[-2])


class SecondLevel(NamedTuple):
    """What all scales of a tensor are multiplied by, or divided: one value."""

    span: TensorSpan
    divides: bool


class QuantizedTensor(NamedTuple):
    """One quantized tensor of the logical checkpoint: codes, scales, and the grid by which the scales tile the codes.

    ``name``: the logical tensor's, which the codes need not be stored under (``weight.name``). ``code_dtype``: of the
    codes, several of which lie in a byte where they have fewer bits; then ``weight`` is of bytes, and of another shape.
    ``second``: the second level of scales. ``across``: the tensor's last two dimensions are the codes' in the other
    order; what speaks of codes (grid, spans, ``codes``, ``run``) has theirs. A `fp8ckpt.tensors.tensor.Tensor` of
    bfloat16, or of whichever target is asked for.

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
        """What it is rounded to where nobody asks for another dtype."""
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
        """The codes as bytes, one dimension for each of the weight's."""
        if self.per_byte == 1:
            return self.weight
        *lead, last = self.grid.weight_shape
        return self.weight._replace(dtype="U8", shape=(*lead, last // self.per_byte))

    @property
    def scaled(self) -> QuantizedTensor:
        return self

    def one_a_byte(self, stored: Bytes) -> Bytes:
        """The codes that bytes [n] of the weight hold."""
        from fp8ckpt.numerics.quantize import unpack

        return stored if self.per_byte == 1 else unpack(stored)

    def dtypes(self) -> tuple[str, ...]:
        return tuple(TARGET_BYTES)

    def reads(self, region: Region) -> Iterator[ByteRange]:
        return self.packed.reads(bytes_of_region(self.of_codes(region), self.per_byte))

    def of_codes(self, region: Region) -> Region:
        """A region of the tensor in the order of its codes' dimensions."""
        return (turned(region[0]), turned(region[1])) if self.across else region

    def values(self, region: Region, dtype: str, out: Bits, reader: Reader) -> None:
        """As `fp8ckpt.tensors.tensor.Tensor.values`: one multiplication in float32, one rounding."""
        dequantizer = reader.dequantizer(self, dtype)
        region, out = self.of_codes(region), out.swapaxes(-1, -2) if self.across else out
        for piece, codes in self.codes(region, reader):
            at: tuple[Any, ...] = (*within(piece, region), ...)  # a view, of no dimensions too
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
        """Raise `RangeError` where finite codes have values beyond a dtype."""
        if count:
            raise RangeError.of_codes(self, count, dtype)

    def run(self, start: int, count: int, reader: Reader) -> Iterator[tuple[int, int, Bytes]]:
        """The bytes of the codes of a run of elements in row-major order, piece by piece: (first element, elements,
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
        """The bytes of the codes of a region, piece by piece, each good until the next, in an array of their own sizes:
        see `fp8ckpt.numerics.geometry.bytes_of_region`.
        """
        packed = self.packed
        for piece in pieces(region, reader.room.size):
            of_bytes = bytes_of_region(piece, self.per_byte)
            codes = reader.room[: prod(of_bytes[1])]
            packed.read_region(of_bytes, codes)
            self._met(codes, reader)
            if reader.passing is not None:  # without a byte's other code, where the piece begins or ends within it
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
        """How many finite codes have values beyond float16. Codes are read only if the scales allow that any has."""
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

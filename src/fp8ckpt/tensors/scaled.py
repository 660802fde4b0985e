"""What is stored as codes with scales: one tensor, whose values are ``code * scale`` by a grid of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.numerics.geometry import BlockGrid, Region, pieces, within
from fp8ckpt.stores.store import ByteRange, Bytes
from fp8ckpt.tensors.stored import TensorSpan

if TYPE_CHECKING:
    from fp8ckpt.numerics.dequantize import Bits
    from fp8ckpt.tensors.tensor import Reader

_LOGICAL = "BF16"
_FP16_OVERFLOW = 65520.0  # the least magnitude that rounds to infinity in float16


class QuantizedTensor(NamedTuple):
    """One FP8 tensor of the logical checkpoint: codes, scales, and the grid by which the scales tile the codes.

    ``name``: the logical tensor's, which the codes need not be stored under (``weight.name``). A
    `fp8ckpt.tensors.tensor.Tensor` of bfloat16, or of whichever target is asked for.

    >>> tensor = fp8ckpt.open_checkpoint("sample-fp8").quantized[0]
    >>> tensor.weight.dtype, tensor.scale.dtype, tensor.grid.per_tensor
    ('F8_E4M3', 'BF16', True)
    """

    name: str
    weight: TensorSpan
    scale: TensorSpan
    grid: BlockGrid
    activation_scales: tuple[TensorSpan, ...]

    @property
    def dtype(self) -> str:
        """What it is rounded to where nobody asks for another dtype."""
        return _LOGICAL

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.grid.weight_shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def span(self) -> TensorSpan:
        """Where its codes lie."""
        return self.weight

    @property
    def spans(self) -> tuple[TensorSpan, ...]:
        """Codes, scales, scales of activations."""
        return (self.weight, self.scale, *self.activation_scales)

    @property
    def scaled(self) -> QuantizedTensor:
        """Itself."""
        return self

    def dtypes(self) -> tuple[str, ...]:
        """The targets of dequantizing."""
        return tuple(TARGET_BYTES)

    def reads(self, region: Region) -> Iterator[ByteRange]:
        """As `fp8ckpt.tensors.tensor.Tensor.reads`."""
        return self.weight.reads(region)

    def values(self, region: Region, dtype: str, out: Bits, reader: Reader) -> None:
        """As `fp8ckpt.tensors.tensor.Tensor.values`: one multiplication in float32, one rounding."""
        dequantizer = reader.dequantizer(self, dtype)
        for piece, codes in self.codes(region, reader):
            at: tuple[Any, ...] = (*within(piece, region), ...)  # a view, of no dimensions too
            dequantizer.region(codes.reshape(piece[1]), piece[0], out[at])

    def elements(self, start: int, dtype: str, out: Bytes, reader: Reader) -> None:
        """As `fp8ckpt.tensors.tensor.Tensor.elements`."""
        bits = out.view(f"u{TARGET_BYTES[dtype]}")
        dequantizer = reader.dequantizer(self, dtype)
        for first, codes in self.run(start, bits.size, reader):
            dequantizer.flat(codes, first, bits[first - start :][: codes.size])

    def run(self, start: int, count: int, reader: Reader) -> Iterator[tuple[int, Bytes]]:
        """The codes of a run of elements in row-major order, piece by piece: (first element, codes)."""
        for first in range(start, start + count, reader.room.size):
            codes = reader.room[: start + count - first]
            self.weight.read(codes, first)
            self._met(codes, reader)
            yield first, codes

    def codes(self, region: Region, reader: Reader) -> Iterator[tuple[Region, Bytes]]:
        """The codes of a region, piece by piece, each good until the next."""
        for piece in pieces(region, reader.room.size):
            codes = reader.room[: prod(piece[1])]
            self.weight.read_region(piece, codes)
            self._met(codes, reader)
            yield piece, codes

    def _met(self, codes: Bytes, reader: Reader) -> None:
        from fp8ckpt.numerics.dequantize import count_nonfinite

        reader.bytes_read += codes.nbytes
        if reader.counting and (count := count_nonfinite(codes, self.weight.dtype)):
            reader.nonfinite[self.name] += count

    def count_overflown(self, reader: Reader) -> int:
        """How many finite codes have values beyond float16. Codes are read only if the scales allow that any has."""
        from fp8ckpt.numerics.codes import code_values

        dequantizer = reader.dequantizer(self, "F16")
        values = code_values(self.weight.dtype)
        finite = np.isfinite(values)
        if float(dequantizer.scales.max(initial=0)) * float(values[finite].max()) < _FP16_OVERFLOW:
            return 0
        halves = np.empty(reader.room.size, np.uint16)
        count = 0
        for piece, codes in self.codes(((0,) * len(self.shape), self.shape), reader):
            bits = halves[: codes.size]
            dequantizer.region(codes.reshape(piece[1]), piece[0], bits.reshape(piece[1]))
            count += int(np.count_nonzero(np.isinf(bits.view(np.float16)) & finite[codes]))
        return count

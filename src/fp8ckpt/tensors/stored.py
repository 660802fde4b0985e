"""Tensors that are stored directly: their dtypes, and the place of their bytes in a file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from fp8ckpt.numerics.geometry import Region, pieces, runs, within
from fp8ckpt.stores.store import ByteRange, Bytes, File

if TYPE_CHECKING:
    from fp8ckpt.numerics.dequantize import Bits
    from fp8ckpt.tensors.tensor import Reader

#: Bits per element. safetensors 0.8 writes these and no others.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

_RANGES_AT_ONCE = 1 << 14


class TensorSpan(NamedTuple):
    """The place of one tensor's bytes: ``[start, stop)`` in ``file``, in bytes from the beginning of the file.

    It is a `fp8ckpt.tensors.tensor.Tensor` whose values are those bytes.

    >>> span = fp8ckpt.open_checkpoint("sample-fp8")["lm_head.weight"]
    >>> span.file.name, span.dtype, span.shape, span.nbytes
    ('model-00002-of-00003.safetensors', 'BF16', (512, 128), 131072)
    """

    name: str
    file: File
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def span(self) -> TensorSpan:
        return self

    @property
    def spans(self) -> tuple[TensorSpan, ...]:
        return (self,)

    @property
    def scaled(self) -> None:
        return

    @property
    def scales(self) -> tuple[TensorSpan, ...]:
        return ()

    @property
    def whole(self) -> ByteRange:
        return ByteRange(self.file.name, self.start, self.stop)

    def dtypes(self) -> tuple[str, ...]:
        return (self.dtype,)

    def read(self, out: Bytes, offset: int = 0) -> None:
        """Fill ``out`` with the tensor's bytes from ``offset`` on."""
        self.file.read(self.start + offset, out)

    def reads(self, region: Region) -> Iterator[ByteRange]:
        """As `fp8ckpt.tensors.tensor.Tensor.reads`: one range a run of the region. Elements must be whole bytes."""
        itemsize, name = DTYPE_BITS[self.dtype] // 8, self.file.name
        for first, count in runs(self.shape, *region):
            start = self.start + first * itemsize
            yield ByteRange(name, start, start + count * itemsize)

    def read_region(self, region: Region, out: Bytes) -> None:
        """Read a region into ``out`` (flat, contiguous, row-major), in requests of thousands of ranges."""
        ranges, done = self.reads(region), 0
        while wanted := list(islice(ranges, _RANGES_AT_ONCE)):
            parts = []
            for _, start, stop in wanted:
                parts.append(out[done : done + stop - start])
                done += stop - start
            self.file.store.read(wanted, parts)

    def values(self, region: Region, dtype: str, out: Bits, reader: Reader) -> None:
        """As `fp8ckpt.tensors.tensor.Tensor.values`: the stored bytes; ``dtype`` must be the tensor's own."""
        assert dtype == self.dtype  # the caller asked dtypes()
        if out.flags.c_contiguous:
            self.read_region(region, out.reshape(-1).view("u1"))
            reader.bytes_read += out.nbytes
            return
        for piece in pieces(region, reader.room.size // out.itemsize):
            scratch = reader.room[: prod(piece[1]) * out.itemsize]
            self.read_region(piece, scratch)
            reader.bytes_read += scratch.nbytes
            out[within(piece, region)] = scratch.view(out.dtype).reshape(piece[1])

    def elements(self, start: int, dtype: str, out: Bytes, reader: Reader) -> None:
        """As `fp8ckpt.tensors.tensor.Tensor.elements`: its bytes. A run of packed elements begins at a whole byte."""
        assert dtype == self.dtype  # the caller asked dtypes()
        self.read(out, start * DTYPE_BITS[dtype] // 8)
        reader.bytes_read += out.nbytes


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor takes on disk."""
    return prod(shape) * DTYPE_BITS[dtype] // 8

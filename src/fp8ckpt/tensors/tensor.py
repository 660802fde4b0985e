"""What every logical tensor can do: say which bytes its values come from, and give them.

Nobody asks which one it has. There are the stored (a `TensorSpan`: its bytes are its values), the scaled (a
`QuantizedTensor`: codes and scales), and whatever else can be read by region.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from fp8ckpt.numerics.codes import F32
from fp8ckpt.numerics.geometry import Region, Shape, boxes
from fp8ckpt.stores.store import ByteRange, Bytes
from fp8ckpt.tensors.stored import DTYPE_BITS

if TYPE_CHECKING:
    from fp8ckpt.numerics.dequantize import Bits, Dequantizer
    from fp8ckpt.tensors.scaled import QuantizedTensor
    from fp8ckpt.tensors.stored import TensorSpan

_SCALES_AT_ONCE = 1 << 20  # bytes
_READS_AT_ONCE = 256

DequantizerOf = Callable[["QuantizedTensor", str], "Dequantizer"]


class Tensor(Protocol):
    """One tensor of the logical checkpoint."""

    @property
    def name(self) -> str:
        """The tensor's name in the logical checkpoint."""

    @property
    def dtype(self) -> str:
        """What its values are rounded to where nobody asks for another: BF16 for what is scaled."""

    @property
    def shape(self) -> Shape:
        """The shape of its values."""

    @property
    def numel(self) -> int:
        """Number of its values."""

    @property
    def span(self) -> TensorSpan:
        """The place of its values, or of their codes, on disk."""

    @property
    def spans(self) -> tuple[TensorSpan, ...]:
        """All that is stored of it, `span` first."""

    @property
    def scaled(self) -> QuantizedTensor | None:
        """How its codes are scaled; None for what is stored as it is."""

    @property
    def scales(self) -> tuple[TensorSpan, ...]:
        """What is read whole, beside codes, for any of its values."""

    def dtypes(self) -> tuple[str, ...]:
        """What `values` can give."""

    def reads(self, region: Region) -> Iterator[ByteRange]:
        """The bytes that its values in a region come from, in order, scales aside."""

    def values(self, region: Region, dtype: str, out: Bits, reader: Reader) -> None:
        """Fill ``out``, which has the region's sizes and any strides, with the values' bit patterns in ``dtype``."""

    def elements(self, start: int, dtype: str, out: Bytes, reader: Reader) -> None:
        """Fill the bytes ``out`` with a run of elements in row-major order, from element ``start`` on."""


def reads_of_run(tensor: Tensor, start: int, stop: int) -> Iterator[ByteRange]:
    """The bytes that its elements ``[start, stop)`` come from, in row-major order, scales aside."""
    stored = tensor.span
    if tensor is stored:  # packed ones begin and end at whole bytes
        first, last = (stored.start + at * stored.nbytes // stored.numel for at in (start, stop))
        yield ByteRange(stored.file.name, first, last)
        return
    for region in boxes(tensor.shape, start, stop - start):
        yield from tensor.reads(region)


def elements_by_region(tensor: Tensor, start: int, dtype: str, out: Bytes, reader: Reader) -> None:
    """`Tensor.elements` of one whose values come by region."""
    bits, done = out.view(f"u{DTYPE_BITS[dtype] // 8}"), 0
    for region in boxes(tensor.shape, start, bits.size):
        size = prod(region[1])
        tensor.values(region, dtype, bits[done : done + size].reshape(region[1]), reader)
        done += size


def with_scales(values: Iterable[tuple[Sequence[TensorSpan], list[ByteRange]]]) -> Iterator[list[ByteRange]]:
    """Reads of values, each with the scales that it needs, as a store is told of them in advance: scales lie near each
    other, and not near the values, so those of many tensors are one read before all of their values.
    """
    scales: dict[ByteRange, None] = {}
    held: list[list[ByteRange]] = []
    size = 0
    for spans, wanted in values:
        for span in spans:
            size += 0 if span.whole in scales else span.nbytes
            scales[span.whole] = None
        held.append(wanted)
        if size >= _SCALES_AT_ONCE or len(held) >= _READS_AT_ONCE:
            yield from (list(scales), *held)
            scales, held, size = {}, [], 0
    yield from (list(scales), *held)


def bytes_of_values(tensor: Tensor) -> int:
    """How many bytes all its values come from, scales aside."""
    return sum(stop - start for _, start, stop in tensor.reads(((0,) * len(tensor.shape), tensor.shape)))


class Merge(NamedTuple):
    """Values of a merged tensor as float32: what its base has, and what it is to have."""

    before: F32
    after: F32

    @property
    def overflown(self) -> int:
        """How many finite values became none: sums beyond float32."""
        return int(np.count_nonzero(np.isfinite(self.before) & ~np.isfinite(self.after)))


class Reader:
    """One thread's means of reading values: room for codes, the scales in use, and what it met so far.

    ``room``: bytes, the most codes that are read at once. ``dequantizer``: `fp8ckpt.tensors.reading.load_dequantizer`,
    of which a cache is shared among threads. ``counting``: whether codes that are not finite are counted, by tensor, in
    ``nonfinite``. ``merge``: the last run of a merged tensor that was read. ``passing``: is called with codes, one a
    byte, as they are read.
    """

    def __init__(self, room: int | Bytes, dequantizer: DequantizerOf, *, counting: bool = False) -> None:
        self.room: Bytes = np.empty(room, np.uint8) if isinstance(room, int) else room
        self.dequantizer = dequantizer
        self.counting = counting
        self.nonfinite: Counter[str] = Counter()
        self.bytes_read = 0
        self.merge: Merge | None = None
        self.passing: Callable[[QuantizedTensor, Bytes], None] | None = None
        self._floats: dict[str, F32] = {}

    def floats(self, what: str, count: int) -> F32:
        """Room for float32 values [count], which is used again when ``what`` is asked for once more."""
        if (found := self._floats.get(what)) is None or found.size < count:
            found = self._floats[what] = np.empty(count, np.float32)
        return found[:count]

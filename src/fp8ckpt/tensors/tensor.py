"""The interface of every logical tensor: it tells which bytes its values come from, and gives its values.

Callers never ask which kind they have: a stored tensor (`TensorSpan`: its bytes are its values), a scaled one
(`QuantizedTensor`: codes and scales), or any other tensor that can be read by region.
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
        """The dtype of its values if the caller asks for no other: BF16 for a scaled tensor."""

    @property
    def shape(self) -> Shape:
        """The shape of its values."""

    @property
    def numel(self) -> int:
        """The number of its values."""

    @property
    def span(self) -> TensorSpan:
        """The place of its values, or of their codes, in a file."""

    @property
    def spans(self) -> tuple[TensorSpan, ...]:
        """All stored tensors that it is made of, `span` first."""

    @property
    def scaled(self) -> QuantizedTensor | None:
        """The tensor of codes and scales, or None if the values are stored directly."""

    @property
    def scales(self) -> tuple[TensorSpan, ...]:
        """The scales that are read whole, beside codes, for any of its values."""

    def dtypes(self) -> tuple[str, ...]:
        """Return the dtypes that `values` can give."""

    def reads(self, region: Region) -> Iterator[ByteRange]:
        """Yield the byte ranges that the values of a region come from, in order, without those of scales."""

    def values(self, region: Region, dtype: str, out: Bits, reader: Reader) -> None:
        """Fill ``out``, which has the region's sizes and any strides, with the values' bit patterns in ``dtype``."""

    def elements(self, start: int, dtype: str, out: Bytes, reader: Reader) -> None:
        """Fill the bytes ``out`` with a run of elements in row-major order, from element ``start`` on."""


def reads_of_run(tensor: Tensor, start: int, stop: int) -> Iterator[ByteRange]:
    """Yield the byte ranges of the elements ``[start, stop)`` in row-major order, without those of scales."""
    stored = tensor.span
    if tensor is stored:  # a run of packed elements begins and ends at whole bytes
        first, last = (stored.start + at * stored.nbytes // stored.numel for at in (start, stop))
        yield ByteRange(stored.file.name, first, last)
        return
    for region in boxes(tensor.shape, start, stop - start):
        yield from tensor.reads(region)


def elements_by_region(tensor: Tensor, start: int, dtype: str, out: Bytes, reader: Reader) -> None:
    """Fill ``out`` as `Tensor.elements` does, for a tensor that gives its values by region."""
    bits, done = out.view(f"u{DTYPE_BITS[dtype] // 8}"), 0
    for region in boxes(tensor.shape, start, bits.size):
        size = prod(region[1])
        tensor.values(region, dtype, bits[done : done + size].reshape(region[1]), reader)
        done += size


def with_scales(values: Iterable[tuple[Sequence[TensorSpan], list[ByteRange]]]) -> Iterator[list[ByteRange]]:
    """Yield reads for a store to fetch in advance, made of pairs (scales, ranges of values). Scales lie near each other
    and far from the values, so the scales of many tensors come first, as one read, and all their values after it.
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
    """Return how many bytes all values of a tensor come from, without scales."""
    return sum(stop - start for _, start, stop in tensor.reads(((0,) * len(tensor.shape), tensor.shape)))


class Merge(NamedTuple):
    """The values of a merged tensor as float32: those of its base, and those after merging."""

    before: F32
    after: F32

    @property
    def overflown(self) -> int:
        """The number of finite values that merging made infinite or NaN: sums beyond float32."""
        return int(np.count_nonzero(np.isfinite(self.before) & ~np.isfinite(self.after)))


class Reader:
    """The reading state of one thread: a buffer for codes, the scales in use, and counts of what it read.

    ``room``: bytes, the most codes that are read at once. ``dequantizer``: `fp8ckpt.tensors.reading.load_dequantizer`,
    or a cache of it that threads share. ``counting``: whether to count the codes that are not finite, by tensor, in
    ``nonfinite``. ``merge``: the last run that was read of a merged tensor. ``passing``: a function that is called with
    the codes, one a byte, as they are read.
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
        """Return a float32 buffer [count]. The next call with the same ``what`` uses the same memory."""
        if (found := self._floats.get(what)) is None or found.size < count:
            found = self._floats[what] = np.empty(count, np.float32)
        return found[:count]

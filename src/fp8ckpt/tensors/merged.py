"""Tensors whose values are a base's with adapters added: computed in float32, and rounded once.

    value = base + scaling * (left @ right) + ...       base = float32(code) * float32(scale), or what is stored
    value = magnitude / norm of the row * value         with DoRA; norm of the column if the weight is [in, out]

A base tensor may be part of a trained one (one expert of a stack), or the reverse: a `Product` is added to one box of
the tensor. An element's bits depend only on its base, its row of ``left`` and its column of ``right``.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fp8ckpt.errors import RangeError, WeightValueError
from fp8ckpt.numerics.codes import F32, SCALE_DTYPES, TARGET_BYTES, scale_values
from fp8ckpt.numerics.geometry import BlockGrid, Region, boxes, windows, within
from fp8ckpt.stores.store import ByteRange, Bytes
from fp8ckpt.tensors.assembly import Assembly
from fp8ckpt.tensors.joined import JoinedTensor
from fp8ckpt.tensors.reading import read_floats
from fp8ckpt.tensors.scaled import turned
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import Merge, Reader, Tensor

if TYPE_CHECKING:
    from fp8ckpt.numerics.dequantize import Bits
    from fp8ckpt.numerics.products import MergedCodes

_AT_ONCE = 1 << 19  # elements: norms of columns are computed in steps of this size

_VECTORS = 4096  # vectors: norms are computed in steps of this size
_ORDERED = ("F8_E4M3",)  # codes whose magnitudes have the order of their values, with NaN last

FloatsOf = Callable[[TensorSpan], F32]
Places = npt.NDArray[np.int64]


class Factor(NamedTuple):
    """One side of a product: vectors of ``rank`` elements, starting with vector ``start`` of ``span``.

    ``across``: the vectors are columns (lora_A, [rank, in]), else rows (lora_B, [out, rank]). With several ``experts``,
    only those of ``expert``: PEFT stacks the ranks of experts, one expert after the other in A and interleaved in B.
    """

    span: TensorSpan
    across: bool
    start: int = 0
    experts: int = 1
    expert: int = 0

    @property
    def rank(self) -> int:
        """The number of elements of a vector."""
        return self.span.shape[0 if self.across else 1] // self.experts

    def vectors(self, first: int, count: int, floats: FloatsOf) -> F32:
        """Return some of the vectors [count, rank], of any strides."""
        whole, part = floats(self.span), slice(self.start + first, self.start + first + count)
        if self.across:
            return whole[self.expert * self.rank : (self.expert + 1) * self.rank, part].T
        return whole[part, self.expert :: self.experts]

    def largest_norm(self, count: int, floats: FloatsOf) -> float:
        """Return the largest norm of the first ``count`` vectors."""
        squares = 0.0
        for first in range(0, count, _VECTORS):
            some = self.vectors(first, min(_VECTORS, count - first), floats).astype(np.float64)
            squares = max(squares, float((some * some).sum(axis=1).max(initial=0)))
        return math.sqrt(squares)


class Product(NamedTuple):
    """``scaling * (left @ right)``, and the box of one matrix that it is added to, in a tensor of at least two
    dimensions.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    left: Factor
    right: Factor
    scaling: float

    def turned(self) -> Product:
        """Return the product for the tensor with its last two dimensions swapped."""
        return Product(turned(self.offsets), turned(self.sizes), self.right, self.left, self.scaling)

    def add_to(self, region: Region, out: F32, floats: FloatsOf) -> None:
        """Add the part inside a region to ``out``, the values of the region."""
        from fp8ckpt.numerics.products import add_product

        lows = tuple(map(max, self.offsets, region[0]))
        highs = tuple(map(min, _ends(self.offsets, self.sizes), _ends(*region)))
        sizes = tuple(high - low for low, high in zip(lows, highs, strict=True))
        if min(sizes) <= 0:
            return
        view = out[within((lows, sizes), region)].reshape(sizes[-2:])
        part = np.ascontiguousarray(view)
        row, col = (low - at for low, at in zip(lows[-2:], self.offsets[-2:], strict=True))
        left = np.ascontiguousarray(self.left.vectors(row, sizes[-2], floats))
        right = np.ascontiguousarray(self.right.vectors(col, sizes[-1], floats).T)
        add_product(left, right, np.float32(self.scaling), part)
        if part is not view:
            view[...] = part

    def add_bound(self, first: int, bounds: npt.NDArray[np.float64], most: float, floats: FloatsOf) -> None:
        """Add an upper bound of the product's magnitude, rounding included, to ``bounds`` [R]: one a row of a matrix,
        from row ``first`` on. ``most``: the largest norm of the right side's vectors.
        """
        low, high = max(self.offsets[-2], first), min(self.offsets[-2] + self.sizes[-2], first + bounds.size)
        if low >= high:
            return
        left = self.left.vectors(low - self.offsets[-2], high - low, floats).astype(np.float64)
        slack = abs(self.scaling) * (1 + (self.left.rank + 8) * 2.0**-22)
        bounds[low - first : high - first] += slack * most * np.sqrt((left * left).sum(axis=1))

    def add_at(self, rows: Places, cols: Places, out: F32, floats: FloatsOf) -> None:
        """Add the values at the places [n] of a matrix to ``out`` [n], with the bits of `add_to`."""
        from fp8ckpt.numerics.products import add_product_at

        row, col = rows - self.offsets[-2], cols - self.offsets[-1]
        inside = np.flatnonzero((row >= 0) & (row < self.sizes[-2]) & (col >= 0) & (col < self.sizes[-1]))
        if inside.size:
            left = self.left.vectors(0, self.sizes[-2], floats)
            right = self.right.vectors(0, self.sizes[-1], floats)
            part = out[inside]
            add_product_at(left, right, row[inside], col[inside], np.float32(self.scaling), part)
            out[inside] = part


def _ends(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(start + size for start, size in zip(offsets, sizes, strict=True))


@dataclass(frozen=True)
class MergedTensor:
    """``base`` with ``products`` added; a `fp8ckpt.tensors.tensor.Tensor` of ``dtype``, or of any target.

    ``replacement``: gives the values instead of the base, if the adapter trained all of them. ``magnitude``: DoRA's,
    with one element a row, or one a column; the ``norms`` of columns take a pass of their own over the whole tensor.
    ``floats`` reads factors, and caches some.
    """

    base: Tensor
    dtype: str
    products: tuple[Product, ...]
    floats: FloatsOf
    replacement: Tensor | None = None
    magnitude: TensorSpan | None = None
    norms: Norms | None = None

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def numel(self) -> int:
        return self.base.numel

    @property
    def span(self) -> TensorSpan:
        return self.base.span

    @property
    def spans(self) -> tuple[TensorSpan, ...]:
        return self.base.spans

    @property
    def scales(self) -> tuple[TensorSpan, ...]:
        return self.base.scales

    @property
    def scaled(self) -> None:
        """None: its values are in no file."""
        return

    @property
    def passes(self) -> int:
        """How often the base is read to get all values: norms of columns take a second pass."""
        return 1 if self.norms is None else 2

    def dtypes(self) -> tuple[str, ...]:
        return tuple(TARGET_BYTES)

    def reads(self, region: Region) -> Iterator[ByteRange]:
        """As `fp8ckpt.tensors.tensor.Tensor.reads`, for the base, without the factors."""
        return self.base.reads(region)

    def values(self, region: Region, dtype: str, out: Bits, reader: Reader) -> None:
        """As `fp8ckpt.tensors.tensor.Tensor.values`. Raises `RangeError` for finite values that do not fit."""
        bits = np.empty(prod(region[1]), out.dtype)
        self._round(self._merge(region, reader).after, dtype, bits)
        out[...] = bits.reshape(region[1])

    def elements(self, start: int, dtype: str, out: Bytes, reader: Reader) -> None:
        """As `fp8ckpt.tensors.tensor.Tensor.elements`. ``reader.merge`` holds the merged run until the next one."""
        bits = out.view(f"u{TARGET_BYTES[dtype]}")
        before = reader.floats("before", bits.size)
        after = bits.view(np.float32) if dtype == "F32" else reader.floats("after", bits.size)
        if self.magnitude is None:
            self._add_to_run(start, before, after, reader)
        else:
            done = 0
            for region in boxes(self.shape, start, bits.size):
                part = slice(done, done + prod(region[1]))
                for flat, values in zip((before, after), self._merge(region, reader), strict=True):
                    flat[part] = values.reshape(-1)
                done = part.stop
        reader.merge = Merge(before, after)
        if dtype != "F32":
            self._round(after, dtype, bits)

    def _add_to_run(self, start: int, before: F32, after: F32, reader: Reader) -> None:
        """Fill in a run of elements, before and after merging."""
        _read_run(self.base, start, before, reader)
        if self.replacement is None:
            np.copyto(after, before)
        else:
            _read_run(self.replacement, start, after, reader)
        done = 0
        for region in boxes(self.shape, start, after.size) if self.products else ():
            matrices = _as_matrices(region)
            part = after[done : done + prod(region[1])].reshape(matrices[1])
            for product in self.products:
                product.add_to(matrices, part, self.floats)
            done += part.size

    def largest(self, start: int, count: int, at_least: np.float32, reader: Reader) -> np.float32 | None:
        """Return the largest magnitude in a run of elements, or a value not above ``at_least`` if there is none above
        it. Few elements are computed: codes and bounds of the products prove that the others are smaller. None if the
        bounds do not exclude enough elements.
        """
        base = self.base.scaled
        if base is None or base.across or not base.grid.per_tensor or base.code_dtype not in _ORDERED:
            return None
        if self.magnitude is not None or self.replacement is not None or len(self.shape) != 2:
            return None
        from fp8ckpt.numerics.products import FewLargest

        scale = float(reader.dequantizer(base, "F32").scales.reshape(-1)[0])
        few = FewLargest(scale, base.code_dtype, at_least)
        cols = self.shape[1]
        for first, size, codes in base.run(start, count, reader):
            rows = (first // cols, (first + size - 1) // cols + 1)
            bounds = np.zeros(rows[1] - rows[0])
            for product, most in zip(self.products, self._norms_of_right, strict=True):
                product.add_bound(rows[0], bounds, most, self.floats)
            if (found := few.candidates(codes, first % cols, cols, bounds)) is None:
                return None
            at, values = found
            row, col = divmod(at + first % cols, cols)
            for product in self.products:
                product.add_at(row + rows[0], col, values, self.floats)
            few.raise_to(values)
        return few.largest

    def encode(
        self, start: int, codes: Bytes, before: np.float32, scale: np.float32, reader: Reader
    ) -> MergedCodes | None:
        """Fill ``codes`` [n] with the codes of a run of elements at ``scale``, with the bits of encoding its
        `elements`. ``before`` is the base's scale. None unless the base is of e4m3 and products of whole matrices are
        all that is added.
        """
        base, products_of = self.base.scaled, self._whole_products
        if base is None or base.across or base.code_dtype not in _ORDERED or products_of is None:
            return None
        from fp8ckpt.numerics.products import MergedCodes, merge_codes

        into = Reader(codes, reader.dequantizer)
        for _ in base.run(start, codes.size, into):
            pass
        reader.bytes_read += into.bytes_read
        done = MergedCodes()
        for part in windows(BlockGrid(self.shape, (1,) * len(self.shape)), start, codes.size):
            *lead, row, col = map(int, np.unravel_index(start + part.elements.start, self.shape))
            products = products_of.get(tuple(lead), ())
            left = [product.left.vectors(row, part.rows, self.floats) for product in products]
            right = [product.right.vectors(col, part.cols, self.floats).T for product in products]
            scalings = [product.scaling for product in products]
            here = codes[part.elements].reshape(part.rows, part.cols)
            done.add(merge_codes(here, before, left, right, scalings, scale))
        return done

    @cached_property
    def _whole_products(self) -> dict[tuple[int, ...], list[Product]] | None:
        """The products of each matrix, or None if one of them covers only a part of its matrix."""
        found: dict[tuple[int, ...], list[Product]] = {}
        for product in self.products:
            if product.sizes[-2:] != self.shape[-2:] or prod(product.sizes[:-2]) != 1:
                return None
            found.setdefault(product.offsets[:-2], []).append(product)
        return None if self.magnitude is not None or self.replacement is not None or len(self.shape) < 2 else found

    @cached_property
    def _norms_of_right(self) -> list[float]:
        return [product.right.largest_norm(product.sizes[-1], self.floats) for product in self.products]

    def turned(self) -> MergedTensor:
        """Return the tensor with its last two dimensions swapped; not with DoRA."""
        assert self.magnitude is None  # DoRA's magnitude is one of matrices
        return replace(
            self,
            base=_turned(self.base),
            products=tuple(product.turned() for product in self.products),
            replacement=None if self.replacement is None else _turned(self.replacement),
        )

    def _merge(self, region: Region, reader: Reader) -> Merge:
        """Return the values of a region, before and after merging, in the shape of the region."""
        if self.magnitude is None:
            return self._add(region, reader)
        if self.norms is not None:
            merge = self._add(region, reader)
            sums = self.norms.of(lambda: self._sums_of_columns(reader))
            merge.after[...] *= self._factors(sums, "column")[region[0][1] :][: region[1][1]]
            return merge
        from fp8ckpt.numerics.products import sum_squares

        rows = (region[0][0], 0), (region[1][0], self.shape[1])  # DoRA needs whole rows
        before, after = self._add(rows, reader)
        sums = np.empty(region[1][0])
        sum_squares(after, sums)
        after *= self._factors(sums, "row", region[0][0])[:, None]
        part = within(region, rows)
        return Merge(before[part], after[part])

    def _add(self, region: Region, reader: Reader) -> Merge:
        before = _read(self.base, region, reader)
        after = before.copy() if self.replacement is None else _read(self.replacement, region, reader)
        matrices = _as_matrices(region)
        for product in self.products:
            product.add_to(matrices, after.reshape(matrices[1]), self.floats)
        return Merge(before, after)

    def _sums_of_columns(self, reader: Reader) -> npt.NDArray[np.float64]:
        """Return the sum of squares of each column after merging, added up row by row."""
        from fp8ckpt.numerics.products import add_squares

        rows, cols = self.shape
        sums, step = np.zeros(cols), max(1, _AT_ONCE // max(1, cols))
        for start in range(0, rows, step):
            add_squares(self._add(((start, 0), (min(step, rows - start), cols)), reader).after, sums)
        return sums

    def _factors(self, sums: npt.NDArray[np.float64], what: str, first: int = 0) -> F32:
        """Return DoRA's multipliers of the rows or columns from ``first`` on: magnitude / norm, rounded once from
        float64.
        """
        assert self.magnitude is not None
        if not sums.all():
            raise WeightValueError.of_direction(self, what=what, index=first + int(np.flatnonzero(sums == 0)[0]))
        magnitude = self.floats(self.magnitude).reshape(-1)[first:][: sums.size]
        factors: F32 = (magnitude.astype(np.float64) / np.sqrt(sums)).astype(np.float32)
        return factors

    def _round(self, values: F32, dtype: str, out: npt.NDArray[np.unsignedinteger]) -> None:
        from fp8ckpt.numerics.quantize import round_to

        if overflown := round_to(np.ascontiguousarray(values).reshape(-1), dtype, out):
            raise RangeError.of_merged(self, file=None, count=overflown, dtype=dtype)


class Norms:
    """The sums of squares of a tensor's columns, computed once. Thread-safe."""

    def __init__(self) -> None:
        self._sums: npt.NDArray[np.float64] | None = None
        self._lock = threading.Lock()

    def of(self, find: Callable[[], npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        """Return the result of the first call of ``find``."""
        with self._lock:
            if self._sums is None:
                self._sums = find()
            return self._sums


def _turned(tensor: Tensor) -> Tensor:
    rank = len(tensor.shape)
    assembly = Assembly.whole(tensor.name, tensor.shape).transpose(rank - 2, rank - 1)
    return JoinedTensor(tensor.name, assembly, {tensor.name: tensor})


def _read(tensor: Tensor, region: Region, reader: Reader) -> F32:
    """Return the values of a region as float32, in its shape. Stored values convert exactly."""
    dtype = "F32" if "F32" in tensor.dtypes() else tensor.dtype
    bits: npt.NDArray[np.generic] = np.empty(region[1], SCALE_DTYPES[dtype])
    tensor.values(region, dtype, bits, reader)
    return scale_values(bits, dtype)


def _as_matrices(region: Region) -> Region:
    """Return a region of at least two dimensions: one of fewer gets leading dimensions of length 1."""
    lift = max(0, 2 - len(region[0]))
    return (0,) * lift + region[0], (1,) * lift + region[1]


def _read_run(tensor: Tensor, start: int, out: F32, reader: Reader) -> None:
    """Read a run of elements as float32."""
    if "F32" in tensor.dtypes():
        tensor.elements(start, "F32", out.view(np.uint8), reader)
        return
    stored = np.empty(out.size * TARGET_BYTES[tensor.dtype], np.uint8)
    tensor.elements(start, tensor.dtype, stored, reader)
    out[...] = scale_values(stored.view(SCALE_DTYPES[tensor.dtype]), tensor.dtype)


class KeptFloats:
    """A reader of adapters' tensors with a cache of the last used: at most ``room`` bytes, or a single tensor.
    Thread-safe.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: OrderedDict[TensorSpan, F32] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, span: TensorSpan) -> F32:
        with self._lock:
            if (found := self._kept.get(span)) is not None:
                self._kept.move_to_end(span)
                return found
        floats = read_floats(span)
        with self._lock:
            self._kept[span] = floats
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self._room:
                self._kept.popitem(last=False)
        return floats

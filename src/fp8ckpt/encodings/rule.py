"""The one way back: which scales the blocks of a weight get, and which codes its values have with them.

A conversion, a save from shards and an adapter differ in where values come from, how they are cut up, and where codes
go. What decides a scale does not differ: the largest magnitude of its block, and whether the scale of before gives back
every element. Both are maxima, so that parts of a block may be looked at anywhere, and combined in any order. The
numbers are those of `fp8ckpt.numerics.scaling`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fp8ckpt.errors import RangeError
from fp8ckpt.families.parallel import equal_units
from fp8ckpt.numerics import quantize, scaling
from fp8ckpt.numerics.codes import F32, U8, Factor, count_bad_scales, scale_values
from fp8ckpt.numerics.geometry import BlockGrid
from fp8ckpt.numerics.quantize import CODINGS, E4M3, Coding, Mask, Part, Scales, Tally, Values
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.reading import load_factor, stored_scales
from fp8ckpt.tensors.scaled import QuantizedTensor


class NotFinite(Exception):
    """Some of the values have no code. Whoever has all of the weight says how many: `WeightValueError`."""


class Decided(NamedTuple):
    """The scales of some blocks, as they are stored and as float32; which of them are ``kept``; and those of
    ``before``, infinite where there are none.
    """

    stored: Scales
    scales: F32
    kept: Mask
    before: F32


@dataclass(frozen=True)
class Rule:
    """What decides the scales of the weight ``name``, which are stored in ``dtype``.

    ``factor``: of all of them, where they have a second level, and ``factor_before``. ``fresh``: none of before is
    kept. ``powers_of_two``: of new ones. ``file`` and ``remedy``: what is said where the dtype cannot hold a new one.
    """

    name: str
    dtype: str
    coding: Coding = E4M3
    factor: Factor | None = None
    factor_before: Factor | None = None
    fresh: bool = False
    powers_of_two: bool = False
    file: File | None = None
    remedy: str | None = None

    @classmethod
    def like(cls, base: QuantizedTensor, file: File, *, fresh: bool, powers_of_two: bool, remedy: str) -> Rule:
        """The rule of a weight that is written like one of a base. Reads the second level of its scales, if any."""
        factor, coding = load_factor(base), CODINGS[base.code_dtype]
        return cls(base.name, base.scale.dtype, coding, factor, factor, fresh, powers_of_two, file, remedy)

    def under(self, factor: Factor | None) -> Rule:
        """The same rule with another second level of scales, under which no scale is kept."""
        return self if factor is self.factor else replace(self, factor=factor, fresh=True)

    def decide(self, maxima: F32, stored: Scales | None, exact: Mask | None) -> Decided:
        """The scales of blocks of these largest magnitudes. ``stored``: those of before, of the same shape, if any;
        ``exact``: which blocks these give back, as far as that was asked.

        Raises `RangeError` where the dtype could not hold a new one.
        """
        chosen, keep = scaling.choose_scales(
            maxima, None if self.fresh else stored, self.dtype, exact,
            powers_of_two=self.powers_of_two, coding=self.coding, factor=self.factor,
        )  # fmt: skip
        scales = scale_values(chosen, self.dtype, self.factor)
        if count_bad_scales(scales[~keep]):
            raise RangeError.of_scale(self.dtype, self.name, self.file, self.remedy, factor=self.factor is not None)
        before = np.full(maxima.shape, np.inf, np.float32) if stored is None else self.before(stored)
        return Decided(chosen, scales, keep, before)

    def before(self, stored: Scales) -> F32:
        """Stored scales of before as float32."""
        return scale_values(stored, self.dtype, self.factor_before)

    def asks(self, maxima: F32, before: F32) -> bool:
        """Whether it matters if the scales of before give back every element: a block, or all, is small for them."""
        if self.fresh:
            return False
        small = self.factor is not None and scaling.small_for(maxima.max(initial=0), self.factor)
        return small or bool(scaling.may_fit(maxima, before, self.coding).any())


class Step(NamedTuple):
    """Values of a weight that are worked on at once, and where they lie among the blocks of ``grid``. What is said of
    blocks is as of `fp8ckpt.numerics.quantize.block_shape`.
    """

    rule: Rule
    values: Values
    parts: Sequence[Part]
    grid: BlockGrid

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of arrays with a value for each block."""
        return quantize.block_shape(self.grid)

    def maxima(self) -> F32:
        """The largest magnitudes. Raises `NotFinite`."""
        maxima: F32 = quantize.block_array(self.grid, np.float32)
        quantize.raise_maxima(self.parts, self.values, maxima)
        if not np.isfinite(maxima).all():  # NaN and infinity are above all
            raise NotFinite
        return maxima

    def look(self, stored: Scales | None, room: U8) -> tuple[F32, Mask]:
        """What decides the scales: the largest magnitudes, and which blocks the ``stored`` scales of before give back,
        as far as they are here; all, where nobody asks. Codes are made in ``room``.
        """
        maxima = self.maxima()
        if stored is None or not self.rule.asks(maxima, before := self.rule.before(stored)):
            return maxima, np.ones(maxima.shape, np.bool_)
        codes = room[: self.values.bits.size]
        self.encode(before, codes)
        return maxima, self.exact(before, codes)

    def encode(self, scales: F32, codes: U8) -> None:
        """Fill ``codes``, one a byte, which lie as the values do."""
        quantize.encode(self.parts, self.values, scales, codes, self.rule.coding)

    def exact(self, scales: F32, codes: U8) -> Mask:
        """Which blocks give back all values that are here."""
        found: Mask = quantize.count_inexact(self.parts, self.values, codes, scales, self.rule.coding) == 0
        return found

    def tally(self, codes: U8, scales: F32, before: F32, old: U8 | None) -> Tally:
        """What the codes lose of the values, and how many are not those of before, ``old``, if there were any."""
        found = quantize.tally(self.parts, self.values, codes, scales, before, self.rule.coding)
        if old is not None:
            found.moved = int(np.count_nonzero(old.reshape(-1) != codes.reshape(-1)))
        return found


def units_of(weights: Iterable[QuantizedTensor]) -> list[tuple[str, ...]]:
    """The names of those weights that have one scale, or a factor, each alone or with the siblings whose scale or
    factor is the same: a new one is one of all. Grids are joined by engines as they are.
    """
    of_one = (
        weight
        for weight in weights
        if weight.scale.nbytes and (weight.second or (weight.grid.per_tensor and weight.per_byte == 1))
    )
    return equal_units(stored_scales(of_one))

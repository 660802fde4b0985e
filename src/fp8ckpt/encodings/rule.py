"""The rule of quantizing: which scales the blocks of a weight get, and which codes its values have with them.

A conversion, a save from shards and an adapter differ in where values come from, how they are cut, and where codes go.
The rule is the same: two facts decide a scale, the largest magnitude of its block, and whether the base's scale gives
back every element. Both are maxima, so parts of a block can be looked at anywhere, and combined in any order. The
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
    """Some values have no code. The caller that has the whole weight counts them: `WeightValueError`."""


class Decided(NamedTuple):
    """The scales of some blocks, in their stored dtype and as float32; a mask of those ``kept`` from the base; and the
    base's scales, ``before``, infinite if there are none.
    """

    stored: Scales
    scales: F32
    kept: Mask
    before: F32


@dataclass(frozen=True)
class Rule:
    """The rule that decides the scales of the weight ``name``, which are stored in ``dtype``.

    ``factor`` and ``factor_before``: the second level of the scales, here and in the base. ``fresh``: no scale is kept.
    ``powers_of_two``: of new scales. ``file`` and ``remedy``: for the error if the dtype cannot hold a new scale.
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
        """Return the rule of a weight that is written like one of a base. Reads its second level of scales."""
        factor, coding = load_factor(base), CODINGS[base.code_dtype]
        return cls(base.name, base.scale.dtype, coding, factor, factor, fresh, powers_of_two, file, remedy)

    def under(self, factor: Factor | None) -> Rule:
        """Return the same rule with another second level of scales. With a new one, no scale is kept."""
        return self if factor is self.factor else replace(self, factor=factor, fresh=True)

    def decide(self, maxima: F32, stored: Scales | None, exact: Mask | None) -> Decided:
        """Return the scales of blocks with these largest magnitudes. ``stored``: the base's scales, of the same shape,
        if any; ``exact``: the blocks that these give back, as far as that was asked.

        Raises `RangeError` if the dtype cannot hold a new scale.
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
        """Return stored scales of the base as float32."""
        return scale_values(stored, self.dtype, self.factor_before)

    def asks(self, maxima: F32, before: F32) -> bool:
        """Whether it matters if the base's scales are exact: some block, or the whole, is small for them."""
        if self.fresh:
            return False
        small = self.factor is not None and scaling.small_for(maxima.max(initial=0), self.factor)
        return small or bool(scaling.may_fit(maxima, before, self.coding).any())


class Step(NamedTuple):
    """Values of a weight that are processed together, and their place among the blocks of ``grid``. Arrays with a value
    for each block have the shape `fp8ckpt.numerics.quantize.block_shape`.
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
        """Return the largest magnitude of each block. Raise `NotFinite` if one is not finite."""
        maxima: F32 = quantize.block_array(self.grid, np.float32)
        quantize.raise_maxima(self.parts, self.values, maxima)
        if not np.isfinite(maxima).all():  # NaN and infinity exceed all finite magnitudes
            raise NotFinite
        return maxima

    def look(self, stored: Scales | None, room: U8) -> tuple[F32, Mask]:
        """Return what decides the scales: the largest magnitude of each block, and a mask of the blocks whose values
        here the base's ``stored`` scales give back (all, if the rule does not ask). ``room`` is a buffer for codes.
        """
        maxima = self.maxima()
        if stored is None or not self.rule.asks(maxima, before := self.rule.before(stored)):
            return maxima, np.ones(maxima.shape, np.bool_)
        codes = room[: self.values.bits.size]
        self.encode(before, codes)
        return maxima, self.exact(before, codes)

    def encode(self, scales: F32, codes: U8) -> None:
        """Fill ``codes``, one a byte, in the order of the values."""
        quantize.encode(self.parts, self.values, scales, codes, self.rule.coding)

    def exact(self, scales: F32, codes: U8) -> Mask:
        """Return a mask of the blocks whose values here the codes give back."""
        found: Mask = quantize.count_inexact(self.parts, self.values, codes, scales, self.rule.coding) == 0
        return found

    def tally(self, codes: U8, scales: F32, before: F32, old: U8 | None) -> Tally:
        """Return what the values lose as codes, and how many codes differ from the base's, ``old``, if given."""
        found = quantize.tally(self.parts, self.values, codes, scales, before, self.rule.coding)
        if old is not None:
            found.moved = int(np.count_nonzero(old.reshape(-1) != codes.reshape(-1)))
        return found


def units_of(weights: Iterable[QuantizedTensor]) -> list[tuple[str, ...]]:
    """Return the names of weights with one scale, or a factor: each alone, or together with the siblings that have the
    same one, since a new one is for all of them. Engines join grids of blocks unchanged, so these need no unit.
    """
    of_one = (
        weight
        for weight in weights
        if weight.scale.nbytes and (weight.second or (weight.grid.per_tensor and weight.per_byte == 1))
    )
    return equal_units(stored_scales(of_one))

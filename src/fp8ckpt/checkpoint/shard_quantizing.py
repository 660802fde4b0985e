"""Quantize the shards of a weight, with the scales that the whole weight would have.

Blocks that do not wait (`fp8ckpt.checkpoint.shards`) are decided and written in one step, and nothing of them is kept.
Waiting blocks are looked at first. What decides their scale - the largest magnitude, and whether the previous scale
gives back every element - is combined over the pieces, and over the ranks. Both are maxima, so it does not matter how a
weight is cut. The factor of a weight with two levels of scales is one more such block: all of the weight is looked at
before any of it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fp8ckpt.checkpoint.exchanged import Halves, WaitingBlocks
from fp8ckpt.checkpoint.items import write_region
from fp8ckpt.checkpoint.shards import PIECE, Cut, Shard
from fp8ckpt.encodings.facts import WeightFacts
from fp8ckpt.encodings.rule import NotFinite, Rule, Step
from fp8ckpt.numerics import quantize, scaling
from fp8ckpt.numerics.codes import SCALE_DTYPES, U8, Factor
from fp8ckpt.numerics.geometry import Region, Surroundings, bytes_of_region, first_elements, runs, surroundings, within
from fp8ckpt.numerics.quantize import Scales, Values
from fp8ckpt.output.files import ALIGNMENT, aligned_buffer
from fp8ckpt.output.staging import Files
from fp8ckpt.tensors.reading import bytes_of, stored_dtype
from fp8ckpt.tensors.scaled import QuantizedTensor

# Bytes that a worker holds for each element of its step: the value as given and as 32 bits, its code, the base's code,
# and a piece of eight steps.
BYTES_OF_STEP = 18


class ShardQuantizer:
    """A worker that looks at pieces and writes them, with buffers of its own.

    ``rule_of``: gives the rule that decides a weight's scales. ``count``: takes what was done to a weight; None without
    a report, which alone needs the base's codes. ``nonfinite``: the weights with elements that have no code; an output
    with one of them is never completed.
    """

    def __init__(
        self,
        files: Files,
        waiting: WaitingBlocks,
        halves: Halves,
        *,
        rule_of: Callable[[QuantizedTensor], Rule],
        count: Callable[[str, WeightFacts], None] | None,
        step: int,
    ) -> None:
        self._files = files
        self._waiting = waiting
        self._halves = halves
        self._rule_of = rule_of
        self._count = count
        self._step = step
        self._codes = aligned_buffer(PIECE * step + ALIGNMENT)  # takes no memory before it is used
        self._scratch = np.empty(step, np.uint8)
        self._base_codes = np.empty(0 if count is None else step, np.uint8)
        self.nonfinite: set[str] = set()
        self.bytes_written = 0
        self.base_bytes_read = 0

    def look(self, cut: Cut) -> None:
        """Find what decides the scales of a piece's waiting blocks, and the weight's factor."""
        with self._noting(cut):
            rule, factor = self._rule_of(cut.shard.weight), cut.shard.factor
            for region in cut.steps(self._step):
                step, around, before = self._taken(cut, region, rule)
                maxima, exact = step.look(before, self._scratch)
                if not cut.whole:
                    self._waiting.take_in(cut.shard.numbers(*around.region), maxima.reshape(-1), exact.reshape(-1))
                if factor is not None:
                    largest, all_exact = (np.array([of_all]) for of_all in (maxima.max(), exact.all()))
                    self._waiting.take_in(np.array([factor]), largest, all_exact)

    def write(self, cut: Cut) -> None:
        """Write a piece's codes, and the scales of the blocks that begin in it."""
        with self._noting(cut):
            weight, rule = cut.shard.weight, self._with_factor(cut.shard)
            first = next(runs(weight.grid.weight_shape, *cut.region))[0]
            # Aligned as on disk, if a code is a byte, so that it can be written directly.
            flat = self._codes[(weight.weight.start + first) % ALIGNMENT :][: prod(cut.region[1])]
            codes = flat.reshape(cut.region[1])
            for region in cut.steps(self._step):
                target = _part_of(codes, within(region, cut.region))
                out = target if target.flags.c_contiguous else self._scratch[: target.size].reshape(target.shape)
                self._encode(cut, region, rule, out)
                if out is not target:
                    target[...] = out
            if weight.per_byte == 1:
                self.bytes_written += write_region(self._files, weight.weight, cut.region, flat)
            else:
                self._write_packed(weight, cut.region, codes)

    def _encode(self, cut: Cut, region: Region, rule: Rule, codes: U8) -> None:
        """Fill ``codes`` with those of a step, and write the scales of the blocks that begin in it."""
        weight = cut.shard.weight
        step, around, before = self._taken(cut, region, rule)
        if cut.whole:
            maxima, exact = step.look(before, self._scratch)
        else:
            maxima, exact = self._waiting.of(cut.shard.numbers(*around.region), step.shape)
        decided = rule.decide(maxima, before, exact)
        step.encode(decided.scales, codes)
        owned = first_elements(weight.grid, *region)
        begins = prod(owned[1]) > 0 and not any(owned[0])
        stored, kept = (
            _part_of(of_all.reshape(around.grid.shape), within(owned, around.region))
            for of_all in (decided.stored, decided.kept)
        )
        self._write_scales(weight, owned, stored, rule.factor if begins else None)
        if self._count is not None:
            tally = step.tally(codes, decided.scales, decided.before, self._old(weight, region))
            made, factors = int(np.count_nonzero(~kept)), int(begins and rule.factor is not rule.factor_before)
            self._count(weight.name, WeightFacts(tally, kept=kept.size - made, made=made, factors=factors))

    def _write_packed(self, weight: QuantizedTensor, region: Region, codes: U8) -> None:
        """Write the bytes that have both halves in a region, and pass on the halves at its edges."""
        (*lead, first), (*sizes, count) = region
        odd = first % 2
        whole = (count - odd) // 2 * 2
        if whole:
            packed = quantize.pack(np.ascontiguousarray(codes[..., odd : odd + whole]).reshape(-1))
            of_bytes = bytes_of_region(((*lead, first + odd), (*sizes, whole)), weight.per_byte)
            self.bytes_written += write_region(self._files, weight.packed, of_bytes, packed)
        if odd:
            self._halves.add(weight, ((*lead, first), (*sizes, 1)), codes[..., 0], high=True)
        if odd + whole < count:
            self._halves.add(weight, ((*lead, first + count - 1), (*sizes, 1)), codes[..., -1], high=False)

    def _with_factor(self, shard: Shard) -> Rule:
        """The rule under the factor that is written, the base's or a new one; all must have been looked at."""
        rule = self._rule_of(shard.weight)
        if rule.factor is None or shard.factor is None:
            return rule
        largest, exact = self._waiting.of(np.array([shard.factor]), (1,))
        return rule.under(scaling.choose_factor(largest[0], rule.factor, exact=bool(exact[0]), fresh=rule.fresh))

    def _taken(self, cut: Cut, region: Region, rule: Rule) -> tuple[Step, Surroundings, Scales]:
        """The values of a step, the blocks that it meets, and the scales that these have in the base, as stored."""
        weight = cut.shard.weight
        around = surroundings(weight.grid, *region)
        parts = quantize.parts_of_region(around.grid, around.offsets, region[1])
        step = Step(rule, values_of_part(cut.values[within(region, cut.shard.region)]), parts, around.grid)
        before = np.empty(step.shape, SCALE_DTYPES[rule.dtype])
        of_grid = weight.scale._replace(shape=weight.grid.shape)
        of_grid.read_region(around.region, before.reshape(-1).view(np.uint8))
        return step, around, before

    @contextmanager
    def _noting(self, cut: Cut) -> Iterator[None]:
        """Note the name of a weight that has values without a code."""
        try:
            yield
        except NotFinite:
            self.nonfinite.add(cut.shard.weight.name)

    def _old(self, weight: QuantizedTensor, region: Region) -> U8:
        """The base's codes of a region, one a byte."""
        of_bytes = bytes_of_region(region, weight.per_byte)
        old = self._base_codes[: prod(of_bytes[1])]
        weight.packed.read_region(of_bytes, old)
        self.base_bytes_read += old.nbytes
        if weight.per_byte > 1:
            odd = region[0][-1] % 2
            old = quantize.unpack(old).reshape(*of_bytes[1][:-1], -1)[..., odd : odd + region[1][-1]]
        return old

    def _write_scales(self, weight: QuantizedTensor, owned: Region, stored: Scales, factor: Factor | None) -> None:
        """Write the scales of the blocks that begin in a step, and the ``factor`` if one is given."""
        data = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        self.bytes_written += write_region(self._files, weight.scale._replace(shape=weight.grid.shape), owned, data)
        if factor is not None and weight.second is not None:
            file = self._files.of(weight.second.span.file.name)
            file.write(factor.value.reshape(1).view(np.uint8), weight.second.span.start)
            self.bytes_written += weight.second.span.nbytes


def values_of_part(part: torch.Tensor) -> Values:
    """The values of a part, contiguous and on the CPU; copies no more than the part."""
    part = part.to("cpu").contiguous()
    return quantize.values_of(bytes_of(part), stored_dtype(part.dtype) or "")


def _part_of(array: npt.NDArray[Any], index: tuple[slice, ...]) -> npt.NDArray[Any]:
    """A view of a part of an array, also of a 0-d one."""
    return array[index] if index else array

"""Quantize the shards of a weight where they lie, with the scales that the whole weight would have.

Blocks that do not wait (`fp8ckpt.checkpoint.shards`) are decided and written in one go, with nothing kept of them.
Waiting blocks are looked at first; what decides their scale - the largest magnitude, and whether the scale of before
gives back every element - is combined over the pieces, and over the ranks for those that more than one rank may meet.
Both are maxima, so that it does not matter how a weight was cut. The factor of a weight with two levels of scales is
one more such block: all of the weight is looked at before any of it is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fp8ckpt.checkpoint.directory_writer import write_region
from fp8ckpt.checkpoint.save_report import Tallies
from fp8ckpt.checkpoint.shards import PIECE, Cut, Numbers, Shard, elements_of_block, numbers_of
from fp8ckpt.encodings.rule import Decided, Rule, Step
from fp8ckpt.numerics import quantize, scaling
from fp8ckpt.numerics.codes import F32, SCALE_DTYPES, U8, Factor
from fp8ckpt.numerics.geometry import (
    Region,
    Surroundings,
    bytes_of_region,
    first_elements,
    pieces,
    runs,
    surroundings,
    whole_blocks,
    within,
)
from fp8ckpt.numerics.quantize import Mask, Scales, Values
from fp8ckpt.output.files import ALIGNMENT, aligned_buffer
from fp8ckpt.output.staging import Files
from fp8ckpt.ranks import Ranks
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.reading import bytes_of, stored_dtype
from fp8ckpt.tensors.scaled import QuantizedTensor

# What a worker holds, in bytes an element of its step: the values as they come and as 32 bits, codes, those of the
# base, and a piece of eight steps.
BYTES_OF_STEP = 18
_EXCHANGED = 1 << 20  # blocks that the ranks exchange at once, over all of them: 13 bytes each


class WaitingBlocks:
    """What decides the scales of the blocks that wait, by their numbers; for any number of threads."""

    def __init__(self, shards: Iterable[Shard], step: int) -> None:
        waiting: list[Numbers] = []
        own: list[Numbers] = []
        for shard in shards:
            grid = shard.weight.grid
            for part in shard.waiting(step):
                around = surroundings(grid, *part)
                waiting.append(shard.numbers(*around.region))
            if shard.factor is not None:
                waiting.append(np.array([shard.factor]))
            whole = whole_blocks(grid, *shard.region)
            if not shard.joined and elements_of_block(grid) > step and 0 not in whole[1]:
                around = surroundings(grid, *whole)
                own.append(shard.numbers(*around.region))
        self._numbers: Numbers = np.unique(np.concatenate([np.empty(0, np.int64), *waiting]))
        self._maxima: F32 = np.zeros(self._numbers.size, np.float32)
        self._inexact: Mask = np.zeros(self._numbers.size, np.bool_)
        self._shared = np.flatnonzero(~np.isin(self._numbers, np.concatenate([np.empty(0, np.int64), *own])))
        self._lock = threading.Lock()

    @property
    def shared(self) -> int:
        """How many of them other ranks, or other weights, may have a part in."""
        return self._shared.size

    def raise_to(self, numbers: Numbers, maxima: F32, inexact: Mask) -> None:
        """Take in what was found in a part of some blocks."""
        at = np.searchsorted(self._numbers, numbers)
        with self._lock:
            self._maxima[at] = np.maximum(self._maxima[at], maxima)
            self._inexact[at] |= inexact

    def of(self, numbers: Numbers) -> tuple[F32, Mask]:
        """The largest magnitude of each block, and whether the scale of before gives back all of it."""
        at = np.searchsorted(self._numbers, numbers)
        return self._maxima[at], ~self._inexact[at]

    def exchange(self, ranks: Ranks, most: int) -> None:
        """Combine the shared ones over the ranks, none of which has more than ``most``; memory is bounded."""
        if ranks.size == 1:
            return
        at_once = max(1, _EXCHANGED // ranks.size)
        for start in range(0, most, at_once):
            for numbers, maxima, inexact in ranks.gather(partial(self._part, slice(start, start + at_once))):
                ours = np.isin(numbers, self._numbers)
                self.raise_to(numbers[ours], maxima[ours], inexact[ours])

    def _part(self, part: slice) -> tuple[Numbers, F32, Mask]:
        at = self._shared[part]
        return self._numbers[at], self._maxima[at], self._inexact[at]


class Halves:
    """Codes of four bits whose byte is not all in one piece: the low half may be one thread's or rank's, the high half
    another's. The rank of the low one writes the byte. For any number of threads.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._weights = [tensor for tensor in base.quantized if tensor.per_byte > 1]
        ends = np.cumsum([0, *(tensor.packed.numel for tensor in self._weights)])
        self._starts = dict(zip((tensor.name for tensor in self._weights), ends.tolist(), strict=False))
        self._ends = ends
        self._found: dict[bool, list[tuple[Numbers, U8]]] = {False: [], True: []}  # low ones, high ones
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether the base has any such weight."""
        return bool(self._weights)

    def add(self, weight: QuantizedTensor, region: Region, codes: U8, *, high: bool) -> None:
        """Take in codes of a region of one column, which are the high halves of their bytes, or the low ones."""
        offsets, sizes = bytes_of_region(region, weight.per_byte)
        at = numbers_of(weight.packed.shape, offsets, sizes) + self._starts[weight.name]
        with self._lock:
            self._found[high].append((at, codes.reshape(-1).copy()))

    def settle(self, ranks: Ranks, files: Files) -> int:
        """Write all bytes whose low half this rank has, together with the other ranks; returns how many."""
        if not self._weights:
            return 0
        lows, highs = (self._sorted(high=high) for high in (False, True))
        self._found = {False: [], True: []}
        at_once = max(1, _EXCHANGED // ranks.size)
        written = 0
        for start in range(0, max(ranks.gather(lambda: highs[0].size)), at_once):
            for at, codes in ranks.gather(partial(_part, highs, slice(start, start + at_once))):
                ours = np.isin(at, lows[0])
                place = np.searchsorted(lows[0], at[ours])
                written += self._write(at[ours], lows[1][place] | codes[ours] << np.uint8(4), files)
        return written

    def _sorted(self, *, high: bool) -> tuple[Numbers, U8]:
        found = self._found[high]
        at = np.concatenate([np.empty(0, np.int64), *(numbers for numbers, _ in found)])
        order = np.argsort(at)
        return at[order], np.concatenate([np.empty(0, np.uint8), *(codes for _, codes in found)])[order]

    def _write(self, at: Numbers, values: U8, files: Files) -> int:
        for number, value in zip(at.tolist(), values, strict=True):
            weight = self._weights[int(np.searchsorted(self._ends, number, side="right")) - 1]
            place = weight.weight.start + number - self._starts[weight.name]
            files.of(weight.weight.file.name).write(np.array([value], np.uint8), place)
        return int(at.size)


def _part(found: tuple[Numbers, U8], part: slice) -> tuple[Numbers, U8]:
    return found[0][part], found[1][part]


class ShardQuantizer:
    """One worker's means of looking at pieces and of writing them, with buffers of its own.

    ``rule_of``: what decides the scales of a weight. ``tallies``: where what was done is counted, if it is; the base's
    codes are read for that alone. ``nonfinite``: weights with elements that have no code; with one of them the output
    is never whole.
    """

    def __init__(
        self,
        files: Files,
        waiting: WaitingBlocks,
        tallies: Tallies | None,
        halves: Halves,
        *,
        rule_of: Callable[[QuantizedTensor], Rule],
        step: int,
    ) -> None:
        self._files = files
        self._waiting = waiting
        self._tallies = tallies
        self._halves = halves
        self._rule_of = rule_of
        self._step = step
        self._codes = aligned_buffer(PIECE * step + ALIGNMENT)  # takes no memory before it is used
        self._scratch = np.empty(step, np.uint8)
        self._base_codes = np.empty(0 if tallies is None else step, np.uint8)
        self.nonfinite: set[str] = set()
        self.bytes_written = 0
        self.base_bytes_read = 0

    def look(self, cut: Cut) -> None:
        """Find what decides the scales of a piece's waiting blocks, and the factor."""
        rule = self._rule_of(cut.shard.weight)
        for region in cut.steps(self._step):
            step, around, before = self._taken(cut, region, rule)
            if (maxima := self._maxima(step)) is None:
                continue
            exact = step.look(maxima, before, self._scratch)
            inexact = np.zeros(maxima.shape, np.bool_) if exact is None else ~exact
            if not cut.whole:
                numbers = cut.shard.numbers(*around.region)
                self._waiting.raise_to(numbers, maxima.reshape(-1), inexact.reshape(-1))
            if cut.shard.factor is not None:
                largest = maxima.max(keepdims=True).reshape(1)
                self._waiting.raise_to(np.array([cut.shard.factor]), largest, inexact.any(keepdims=True).reshape(1))

    def write(self, cut: Cut) -> None:
        """Write a piece's codes, and the scales of the blocks that begin in it."""
        weight, rule = cut.shard.weight, self._with_factor(cut.shard)
        first = next(runs(weight.grid.weight_shape, *cut.region))[0]
        # As it lies on disk, where a byte is a code, so that it can be written directly.
        flat = self._codes[(weight.weight.start + first) % ALIGNMENT :][: prod(cut.region[1])]
        codes = flat.reshape(cut.region[1])
        for region in cut.steps(self._step):
            step, around, before = self._taken(cut, region, rule)
            if (decided := self._decide(cut, step, around, before)) is None:
                continue
            target = _part_of(codes, within(region, cut.region))
            out = target if target.flags.c_contiguous else self._scratch[: target.size].reshape(target.shape)
            step.encode(decided.scales, out)
            if out is not target:
                target[...] = out
            owned = first_elements(weight.grid, *region)
            if self._tallies is not None:
                found = step.tally(out, decided.scales, decided.before)
                found.moved = self._moved(weight, region, out)
                keep = _part_of(decided.kept.reshape(around.grid.shape), within(owned, around.region))
                kept = int(np.count_nonzero(keep)) if prod(owned[1]) else 0
                factors = int(rule.factor is not rule.factor_before and not any(owned[0]) and prod(owned[1]) > 0)
                self._tallies.add(weight.name, found, kept, prod(owned[1]) - kept, factors)
            self._write_scales(weight, owned, around, decided.stored, rule.factor)
        if weight.per_byte == 1:
            self.bytes_written += write_region(self._files, weight.weight, cut.region, flat)
        else:
            self._write_packed(weight, cut.region, codes)

    def _write_packed(self, weight: QuantizedTensor, region: Region, codes: U8) -> None:
        """Write the bytes that lie in a region with both halves, and hand on the halves at its edges."""
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
        """With the second level of scales that is written, once all has been looked at: the base's, if that is kept."""
        rule = self._rule_of(shard.weight)
        if rule.factor is None or shard.factor is None:
            return rule
        largest, exact = self._waiting.of(np.array([shard.factor]))
        return rule.under(scaling.choose_factor(largest[0], rule.factor, exact=bool(exact[0]), fresh=rule.fresh))

    def _taken(self, cut: Cut, region: Region, rule: Rule) -> tuple[Step, Surroundings, Scales]:
        """A step's values, where they lie among blocks, and the scales that these have in the base, as stored."""
        weight = cut.shard.weight
        around = surroundings(weight.grid, *region)
        parts = quantize.parts_of_region(around.grid, around.offsets, region[1])
        step = Step(rule, _values(cut.values[within(region, cut.shard.region)]), parts, around.grid)
        before = np.empty(step.shape, SCALE_DTYPES[rule.dtype])
        of_grid = weight.scale._replace(shape=weight.grid.shape)
        of_grid.read_region(around.region, before.reshape(-1).view(np.uint8))
        return step, around, before

    def _decide(self, cut: Cut, step: Step, around: Surroundings, before: Scales) -> Decided | None:
        """The scales of a step's blocks; None where values are not finite."""
        if not cut.whole:
            largest, exact = self._waiting.of(cut.shard.numbers(*around.region))
            return step.rule.decide(largest.reshape(step.shape), before, exact.reshape(step.shape))
        if (maxima := self._maxima(step)) is None:
            return None
        return step.rule.decide(maxima, before, step.look(maxima, before, self._scratch))

    def _maxima(self, step: Step) -> F32 | None:
        """The largest magnitudes; None where a value is not finite, and the name is noted."""
        maxima = step.maxima()
        if np.isfinite(maxima).all():
            return maxima
        self.nonfinite.add(step.rule.name)
        return None

    def _moved(self, weight: QuantizedTensor, region: Region, codes: U8) -> int:
        """How many codes of a region are not the base's."""
        of_bytes = bytes_of_region(region, weight.per_byte)
        old = self._base_codes[: prod(of_bytes[1])]
        weight.packed.read_region(of_bytes, old)
        self.base_bytes_read += old.nbytes
        if weight.per_byte > 1:
            odd = region[0][-1] % 2
            old = quantize.unpack(old).reshape(*of_bytes[1][:-1], -1)[..., odd : odd + region[1][-1]]
        return int(np.count_nonzero(old.reshape(-1) != codes.reshape(-1)))

    def _write_scales(
        self, weight: QuantizedTensor, owned: Region, around: Surroundings, stored: Scales, factor: Factor | None
    ) -> None:
        """Write the scales of the blocks that begin in a step, and the factor with the first."""
        if prod(owned[1]):
            if factor is not None and weight.second is not None and not any(owned[0]):
                file = self._files.of(weight.second.span.file.name)
                file.write(factor.value.reshape(1).view(np.uint8), weight.second.span.start)
                self.bytes_written += weight.second.span.nbytes
            found = _part_of(stored.reshape(around.grid.shape), within(owned, around.region))
            data = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
            self.bytes_written += write_region(self._files, weight.scale._replace(shape=weight.grid.shape), owned, data)


def count_nonfinite(shard: Shard, values: torch.Tensor, step: int) -> int:
    """How many elements of a shard are NaN or infinite."""
    return sum(
        quantize.count_nonfinite(_values(values[within(piece, shard.region)])) for piece in pieces(shard.region, step)
    )


def _values(part: torch.Tensor) -> Values:
    """Contiguous and on the CPU; no more than the part is copied."""
    part = part.to("cpu").contiguous()
    return quantize.values_of(bytes_of(part), stored_dtype(part.dtype) or "")


def _part_of(array: npt.NDArray[Any], index: tuple[slice, ...]) -> npt.NDArray[Any]:
    """A view, also of an array of no dimensions."""
    return array[index] if index else array

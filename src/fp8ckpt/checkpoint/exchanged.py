"""The blocks and bytes of a save to FP8 that several ranks hold parts of, and how the ranks exchange them.

Each has a number among those of the base, the same on every rank. A bounded number is exchanged at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from fp8ckpt.checkpoint.shards import Numbers, Shard, numbers_of
from fp8ckpt.numerics.codes import F32, U8
from fp8ckpt.numerics.geometry import Region, bytes_of_region, surroundings
from fp8ckpt.numerics.quantize import Mask
from fp8ckpt.output.staging import Files
from fp8ckpt.ranks import Ranks
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.scaled import QuantizedTensor

_EXCHANGED = 1 << 20  # blocks, or bytes, exchanged at once over all ranks; 13 bytes each


class WaitingBlocks:
    """What decides the scales of the blocks that wait, by their numbers. Thread-safe."""

    def __init__(self, shards: Iterable[Shard], step: int) -> None:
        waiting: list[Numbers] = [np.empty(0, np.int64)]
        for shard in shards:
            waiting += (shard.numbers(*surroundings(shard.weight.grid, *part).region) for part in shard.waiting(step))
            if shard.factor is not None:
                waiting.append(np.array([shard.factor]))
        self._numbers: Numbers = np.unique(np.concatenate(waiting))
        self._maxima: F32 = np.zeros(self._numbers.size, np.float32)
        self._exact: Mask = np.ones(self._numbers.size, np.bool_)
        self._lock = threading.Lock()

    def take_in(self, numbers: Numbers, maxima: F32, exact: Mask) -> None:
        """Combine what was found in parts of some blocks with what is known of them."""
        at = np.searchsorted(self._numbers, numbers)
        with self._lock:
            self._maxima[at] = np.maximum(self._maxima[at], maxima)
            self._exact[at] &= exact

    def of(self, numbers: Numbers, shape: tuple[int, ...]) -> tuple[F32, Mask]:
        """Return the largest magnitude of each block, and whether the base's scale gives it all back, in this shape."""
        at = np.searchsorted(self._numbers, numbers)
        return self._maxima[at].reshape(shape), self._exact[at].reshape(shape)

    def exchange(self, ranks: Ranks) -> None:
        """Combine them over the ranks, in bounded memory."""
        if ranks.size == 1:
            return
        for part in in_turn(ranks, self._numbers.size):
            for numbers, maxima, exact in ranks.gather(partial(self._part, part)):
                ours = np.isin(numbers, self._numbers)
                self.take_in(numbers[ours], maxima[ours], exact[ours])

    def _part(self, part: slice) -> tuple[Numbers, F32, Mask]:
        return self._numbers[part], self._maxima[part], self._exact[part]


class Halves:
    """Codes of four bits whose byte is split: one thread or rank may have its low half, another its high half. The rank
    that has the low half writes the byte. Thread-safe.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._weights = [tensor for tensor in base.quantized if tensor.per_byte > 1]
        self._ends = np.cumsum([0, *(tensor.packed.numel for tensor in self._weights)])
        self._starts = {tensor.name: int(start) for tensor, start in zip(self._weights, self._ends, strict=False)}
        self._found: tuple[list[tuple[Numbers, U8]], list[tuple[Numbers, U8]]] = [], []  # low halves, high halves
        self._lock = threading.Lock()

    def add(self, weight: QuantizedTensor, region: Region, codes: U8, *, high: bool) -> None:
        """Take in the codes of a region of one column: the ``high`` halves of their bytes, or the low ones."""
        offsets, sizes = bytes_of_region(region, weight.per_byte)
        at = numbers_of(weight.packed.shape, offsets, sizes) + self._starts[weight.name]
        with self._lock:
            self._found[high].append((at, codes.reshape(-1).copy()))

    def settle(self, ranks: Ranks, files: Files) -> int:
        """Write, with the other ranks, all bytes whose low half this rank has, and flush; return their number."""
        if not self._weights:
            return 0
        lows, highs = map(_in_order, self._found)
        self._found = [], []
        written = 0
        for part in in_turn(ranks, highs[0].size):
            for at, codes in ranks.gather(partial(_part, highs, part)):
                ours = np.isin(at, lows[0])
                place = np.searchsorted(lows[0], at[ours])
                written += self._write(at[ours], lows[1][place] | codes[ours] << np.uint8(4), files)
        ranks.gather(files.flush)
        return written

    def _write(self, at: Numbers, values: U8, files: Files) -> int:
        for number, value in zip(at.tolist(), values, strict=True):
            weight = self._weights[int(np.searchsorted(self._ends, number, side="right")) - 1]
            place = weight.weight.start + number - self._starts[weight.name]
            files.of(weight.weight.file.name).write(np.array([value], np.uint8), place)
        return int(at.size)


def in_turn(ranks: Ranks, count: int, most: int = _EXCHANGED) -> Iterator[slice]:
    """Yield slices until each rank has had all of its ``count`` elements; ``most`` at once, over all ranks."""
    at_once = max(1, most // ranks.size)
    for start in range(0, max(ranks.gather(lambda: count)), at_once):
        yield slice(start, start + at_once)


def _in_order(found: list[tuple[Numbers, U8]]) -> tuple[Numbers, U8]:
    at = np.concatenate([np.empty(0, np.int64), *(numbers for numbers, _ in found)])
    order = np.argsort(at)
    return at[order], np.concatenate([np.empty(0, np.uint8), *(codes for _, codes in found)])[order]


def _part(found: tuple[Numbers, U8], part: slice) -> tuple[Numbers, U8]:
    return found[0][part], found[1][part]

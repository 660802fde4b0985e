"""How several ranks write files that go to a store, where a part of a file is sent once, and complete.

A part may hold bytes of several tensors and several ranks. So the work is cut into rounds (`schedule`). In each round,
every rank writes what it has of the round's tensors into files on this machine, one per part, which all ranks see, and
meets the others. Then the parts that no later round adds to are sent, each by one rank, beside the work of the next
round, and removed. So the disk holds two rounds, and what is sent at the end: headers, and bytes that are not made from
any rank's tensors.

Each rank advances through its own tensors: a tensor begins once every rank that holds some of it is done with the
tensors before it. If that would keep too many parts waiting for each other, the rounds follow the files.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, islice
from typing import NamedTuple

from fp8ckpt.output import extents
from fp8ckpt.output.files import OutputFile, OutputFiles
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.places import Sent
from fp8ckpt.output.sending import Sending
from fp8ckpt.stores.store import Bytes
from fp8ckpt.stores.upload import AT_ONCE

#: Bytes of a round, over all ranks; a single tensor may be larger.
STAGED = 1 << 30
_MOST_OPEN = 128  # files of parts


class Part(NamedTuple):
    """Bytes ``[start, stop)`` of a file, its part ``number``; ``place``: its number among the parts of all files.

    It is written in the rounds from ``first`` to ``last``, and complete after ``last``.
    """

    name: str
    number: int
    start: int
    stop: int
    place: int
    first: int
    last: int


class Schedule(NamedTuple):
    """The number of ``rounds``, the round of each tensor, and the ``parts`` of all files, each complete after one of
    the rounds or, if ``last == rounds``, at the end.
    """

    rounds: int
    round_of: Mapping[str, int]
    parts: Sequence[Part]

    @property
    def most(self) -> int:
        """The most bytes of parts that are here at once: a part is sent in the round after its last."""
        change: Counter[int] = Counter()
        for part in self.parts:
            change[part.first] += part.stop - part.start
            change[part.last + 2] -= part.stop - part.start
        return max(accumulate(change[k] for k in range(self.rounds + 1)))

    @property
    def ending(self) -> Mapping[str, Sequence[Part]]:
        """The parts of each file that are complete only at the end."""
        found: dict[str, list[Part]] = defaultdict(list)
        for part in self.parts:
            if part.last == self.rounds:
                found[part.name].append(part)
        return found

    def stages(self, layouts: Iterable[FileLayout], rank: int, ranks: int, names: Iterable[str]) -> Stages:
        """What one of the ``ranks`` must know, which writes items of the tensors ``names``."""
        complete: list[list[Part]] = [[] for _ in range(self.rounds)]
        for part in self.parts:
            if part.last < self.rounds:
                complete[part.last].append(part)
        done = accumulate(sum(part.stop - part.start for part in parts) for parts in complete)
        first = {part.name: part.place for part in reversed(self.parts)}
        files = {layout.name: (first[layout.name], _size(layout)) for layout in layouts}
        sent = tuple(tuple(parts[rank::ranks]) for parts in complete)
        return Stages(tuple(self.round_of[name] for name in names), files, sent, tuple(done))


class Stages(NamedTuple):
    """One rank's part of a schedule: the round of each of its items; for each file, the place of its first part and the
    size of its parts; what the rank ``sends`` after each round, and how many bytes all ranks have sent by then.
    """

    round_of: Sequence[int]
    files: Mapping[str, tuple[int, int]]
    sends: Sequence[Sequence[Part]]
    done: Sequence[int]


def schedule(
    layouts: Sequence[FileLayout], makers: Mapping[str, str], held: Mapping[str, Mapping[int, int]], ranks: int
) -> Schedule:
    """Return the rounds of an output. ``makers``: the tensor that each stored tensor is made from, if ranks make it;
    ``held``: the bytes of each tensor that each rank has.
    """
    stored = (span.name for layout in layouts for span in layout.spans)
    names = list(dict.fromkeys(makers[name] for name in stored if name in makers))
    found = _scheduled(layouts, makers, _rounds(names, held, max(1, STAGED // ranks)))
    if found.most > 4 * STAGED:
        together = {name: {0: sum(held[name].values())} for name in names}
        found = _scheduled(layouts, makers, _rounds(names, together, STAGED))
    return found


def _rounds(names: Iterable[str], held: Mapping[str, Mapping[int, int]], most: int) -> dict[str, int]:
    """Number rounds of at most ``most`` bytes a rank, except for a tensor that exceeds them alone."""
    written: Counter[int] = Counter()
    found: dict[str, int] = {}
    for name in names:
        start = max((written[rank] for rank in held[name]), default=0)
        found[name] = start // most
        written.update(dict.fromkeys(held[name], 0))
        for rank, nbytes in held[name].items():
            written[rank] = start + nbytes
    numbers = {number: i for i, number in enumerate(sorted(set(found.values())))}  # a large tensor spans several
    return {name: numbers[number] for name, number in found.items()}


def _scheduled(layouts: Iterable[FileLayout], makers: Mapping[str, str], round_of: Mapping[str, int]) -> Schedule:
    rounds = max(round_of.values(), default=0) + 1
    parts: list[Part] = []
    for layout in layouts:
        spans = [span for span in layout.spans if span.nbytes]
        k = 0
        for number, start in enumerate(range(0, layout.size, _size(layout)), 1):
            stop = min(start + _size(layout), layout.size)
            while k < len(spans) and spans[k].stop <= start:
                k += 1
            met = [rounds] if start < len(layout.head) else []
            for span in islice(spans, k, None):
                if span.start >= stop:
                    break
                met.append(round_of[makers[span.name]] if span.name in makers else rounds)
            parts.append(Part(layout.name, number, start, stop, len(parts), min(met), max(met)))
    return Schedule(rounds, round_of, parts)


def _size(layout: FileLayout) -> int:
    """The bytes of a file's parts."""
    return extents.part_of(layout.size, extents.PART)


class Staging:
    """The files of an output that goes to a store, as one rank of a save writes them; like `OutputFiles`, with these
    differences. ``writer`` identifies the rank.
    """

    def __init__(self, output: PartialOutput, stages: Stages, writer: int) -> None:
        assert isinstance(output.goal, Sending)  # otherwise there are no stages
        self._goal = output.goal
        self._output = output
        self._stages = stages
        self._writer = writer
        self._open: dict[int, OutputFile] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_ONCE, "fp8ckpt-sending")
        self._sending: list[Future[None]] = []

    def of(self, name: str) -> _StagedFile:
        return _StagedFile(self, *self._stages.files[name])

    def write(self, place: int, data: Bytes, offset: int) -> None:
        """Write some bytes of a part."""
        with self._lock:
            file = self._open.get(place)
            if kept := file is not None or len(self._open) < _MOST_OPEN:
                file = self._open[place] = file or OutputFile(self._output.state.staged(place), passing=True)
        file = file or OutputFile(self._output.state.staged(place), passing=True)
        file.write(data, offset)
        if not kept:
            file.close()

    def send(self, parts: Iterable[Part]) -> None:
        """Begin to send parts that are complete, and that all ranks have flushed."""
        self._sending += [self._pool.submit(self._send, part) for part in parts]

    def flush(self) -> None:
        """Return when all ranks can see what was written, and the parts being sent are in the store."""
        while self._open:
            self._open.popitem()[1].close()
        while self._sending:
            self._sending.pop(0).result()

    def close(self) -> None:
        """Release what is held; parts that are not sent yet are not sent."""
        self._pool.shutdown(cancel_futures=True)
        while self._open:
            self._open.popitem()[1].close()

    def _send(self, part: Part) -> None:
        file = self._output.state.staged(part.place)
        there = self._goal.send(part.name, part.number, file.read_bytes())
        sent = Sent(part.name, part.number, part.start, part.stop, *there)
        self._output.record(self._writer, part.place, {}, sent)
        file.unlink()


#: The files of an output as a rank writes them, by their names. Thread-safe.
Files = OutputFiles | Staging


class _StagedFile:
    """A file in parts of ``size`` bytes."""

    def __init__(self, staging: Staging, first: int, size: int) -> None:
        self._staging = staging
        self._first = first
        self._size = size

    def write(self, data: Bytes, offset: int) -> None:
        while data.nbytes:
            number, at = divmod(offset, self._size)
            part = data[: self._size - at]
            self._staging.write(self._first + number, part, at)
            data, offset = data[part.nbytes :], offset + part.nbytes

"""The rounds in which the ranks of a save write together (`fp8ckpt.output.staging`); into a directory it is one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch.distributed.checkpoint.planner import WriteItem

from fp8ckpt.output.staging import Files, Stages, Staging
from fp8ckpt.ranks import Ranks

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Shared(NamedTuple):
    """What each rank is told: of how many it is one, whose ``turn`` it is to write, what its writer must know
    (``own``), and in which rounds it writes what; None where the output is a directory, and there is one.
    """

    ranks: int
    turn: str
    own: Any
    stages: Stages | None


class Rounds(NamedTuple):
    """The rounds in which a rank writes its ``items``, together with the others."""

    items: Sequence[Sequence[WriteItem]]
    ranks: Ranks
    files: Files
    stages: Stages | None

    @classmethod
    def of(cls, items: Iterable[WriteItem], ranks: Ranks, files: Files, stages: Stages | None) -> Rounds:
        """The rounds of a rank's items; one of all of them, where there are no stages."""
        if stages is None:
            return cls([list(items)], ranks, files, None)
        of_round: list[list[WriteItem]] = [[] for _ in stages.sends]
        for item, number in zip(items, stages.round_of, strict=True):
            of_round[number].append(item)
        return cls(of_round, ranks, files, stages)

    def write(self, step: Callable[[Sequence[WriteItem]], T]) -> Iterator[list[T]]:
        """Take a step with the items of each round, and flush; what it gave on all ranks, where they must meet.

        A round is over once the caller asks for the next.
        """
        for number, items in enumerate(self.items):
            yield self.ranks.gather(partial(self._flushed, step, items))
            if self.stages is not None and isinstance(self.files, Staging):
                self.files.send(self.stages.sends[number])
                if self.ranks.rank == 0:
                    logger.info("%d of %d bytes are on their way", self.stages.done[number], self.stages.done[-1])
        if self.stages is not None:
            self.ranks.gather(self.files.flush)

    def _flushed(self, step: Callable[[Sequence[WriteItem]], T], items: Sequence[WriteItem]) -> T:
        done = step(items)
        self.files.flush()
        return done

"""The ranks that share one job, whether torchrun started them or the caller's process group is there already.

A single process pays nothing for this: torch is not imported.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from fp8ckpt.errors import Fp8CheckpointError, RankLostError
from fp8ckpt.system import cores

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE = 15.0  # seconds
_ALONE = "start it on each of them, or unset WORLD_SIZE to run it alone"

BEYOND = 64 << 20  # bytes; what all threads of a rank together may take beyond what is loaded or saved


class Ranks:
    """One process of ``size`` that run the same job together; by default the only one."""

    rank = 0
    size = 1

    def together(self, step: Callable[[], T]) -> T:
        """Take a step on every rank, and meet. Returns this rank's result, or raises the first error that any rank met
        with.
        """
        return step()

    def gather(self, step: Callable[[], T]) -> list[T]:
        """Take a step on every rank as `together` does, and return the results of all ranks, which are pickled."""
        return [step()]

    def first(self, step: Callable[[], T]) -> T:
        """Have the first rank take a step, and meet. Returns its result on every rank, or raises its error."""
        return self.gather(lambda: step() if self.rank == 0 else None)[0]  # type: ignore[return-value]  # rank 0's is a T


class GroupRanks(Ranks):
    """The ranks of a torch process group; by default of the default one."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._group = group

    def together(self, step: Callable[[], T]) -> T:
        own: list[T] = []
        self.gather(lambda: own.append(step()))
        return own[0]

    def gather(self, step: Callable[[], T]) -> list[T]:
        import torch.distributed as dist

        result, error = None, None
        try:
            result = step()
        except Exception as caught:  # whatever it is, the other ranks must hear of it, or they wait for ever
            error = caught
        met: list[Any] = [None] * self.size
        with lost_ranks_named(error):
            dist.all_gather_object(met, (_portable(error), result), group=self._group)
        for rank, (other, _) in enumerate(met):
            if other is not None:
                raise error if rank == self.rank and error is not None else other  # one's own has its traceback
        return [result for _, result in met]


@contextmanager
def lost_ranks_named(own: Exception | None = None) -> Iterator[None]:
    """Around collectives: a rank that is gone, of which torch says only how it noticed, is a `RankLostError`. What this
    rank met before, its ``own`` error, stays its cause.
    """
    try:
        yield
    except Fp8CheckpointError:
        raise
    except RuntimeError as error:
        raise RankLostError.of(error) from (own or error)


def has_group() -> bool:
    """Whether a process group is initialized. Does not import torch: who has one has imported it."""
    dist: Any = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def ranks_of_group(group: ProcessGroup | None = None) -> Ranks:
    """The ranks of a process group, by default of the default one; a single one where none is initialized."""
    return GroupRanks(group) if has_group() else Ranks()


def _portable(error: Exception | None) -> Exception | None:
    """The error as the other ranks can be told of it: some of other libraries cannot be pickled, or made anew."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


_MOST_THREADS = 256  # each has some MiB of buffers; no disk is faster with more


def threads_of_this_rank(asked: int | None = None) -> int:
    """As many threads as were asked for, within reason; by default the cores of this machine that are this rank's: an
    equal share of them with the other ranks here.

    torchrun says how many those are; without it, all ranks of the process group are taken to be on this machine.
    """
    if asked:
        return min(asked, _MOST_THREADS)
    here = os.environ.get("LOCAL_WORLD_SIZE")
    if here is None and has_group():
        here = str(GroupRanks().size)
    return max(1, cores() // max(1, int(here or 1)))


def _join(size: int) -> None:
    """Meet the ranks of torchrun. One that waits alone says for what: torch waits for half an hour, without a word, and
    the variables may be those of a job that this one was only started in.
    """
    import torch.distributed as dist

    expected = f"WORLD_SIZE says that {size} ranks run this together"
    waiting = threading.Timer(_PATIENCE, logger.warning, (f"waiting for other ranks: {expected}; {_ALONE}",))
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group("gloo")
    except RuntimeError as error:
        raise RankLostError.of(error).but(expected=expected, remedy=_ALONE) from error
    finally:
        waiting.cancel()


@contextmanager
def ranks_of_this_job() -> Iterator[Ranks]:
    """The ranks of the initialized process group; else those of torchrun, joined for the time of the job; else one."""
    if has_group():
        ranks = GroupRanks()
        yield ranks if ranks.size > 1 else Ranks()
    elif (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        import torch.distributed as dist

        _join(size)
        try:
            yield GroupRanks()
        finally:
            dist.destroy_process_group()
    else:
        yield Ranks()

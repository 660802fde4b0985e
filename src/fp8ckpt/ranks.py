"""The ranks that share one job: those that torchrun started, or those of the caller's process group.

A single process pays nothing for this: torch is not imported.
"""

from __future__ import annotations

import logging
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from fp8ckpt.errors import Fp8CheckpointError, RankLostError
from fp8ckpt.system import cores, ranks_stated

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE = 15.0  # seconds
_LONGEST_WAIT = timedelta(days=1)  # for a slower rank; one that ended is noticed at once, one that hangs then
_ALONE = "start it on each of them, or unset WORLD_SIZE to run it alone"

BEYOND = 64 << 20  # bytes that all threads of a rank together may take beyond what is loaded or saved


class Ranks:
    """One of ``size`` processes that run the same job together; this class is a single process."""

    rank = 0
    size = 1

    def together(self, step: Callable[[], T]) -> T:
        """Take a step on every rank, and synchronize. Return this rank's result, or raise the first error of any
        rank.
        """
        return step()

    def gather(self, step: Callable[[], T]) -> list[T]:
        """Take a step on every rank as `together` does, and return the pickled results of all ranks."""
        return [step()]

    def first(self, step: Callable[[], T]) -> T:
        """Take a step on the first rank, and synchronize. Return its result on every rank, or raise its error."""
        return self.gather(lambda: step() if self.rank == 0 else None)[0]  # type: ignore[return-value]  # rank 0's is a T


class GroupRanks(Ranks):
    """The ranks of a torch process group; without an argument those of the default group."""

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
        except Exception as caught:  # the other ranks must learn of any error, or they wait forever
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
    """Around collectives, raise `RankLostError` if a rank is gone: torch only says how it noticed. An earlier error of
    this rank, ``own``, becomes the cause.
    """
    try:
        yield
    except Fp8CheckpointError:
        raise
    except RuntimeError as error:
        raise RankLostError.of(error) from (own or error)


def has_group() -> bool:
    """Whether a process group is initialized. Does not import torch: a caller with a group has imported it."""
    dist: Any = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def ranks_of_group(group: ProcessGroup | None = None) -> Ranks:
    """Return the ranks of a process group, by default of the default one; a single one if none is initialized."""
    return GroupRanks(group) if has_group() else Ranks()


def _portable(error: Exception | None) -> Exception | None:
    """Return the error in a form that can be pickled: errors of other libraries may fail to pickle or to unpickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


_MOST_THREADS = 256  # each has some MiB of buffers; no disk is faster with more


def threads_of_this_rank(asked: int | None = None) -> int:
    """Return the number of threads for this rank: ``asked``, up to a limit, or by default this rank's equal share of
    the cores of this machine.

    torchrun says how many ranks are on this machine; without it, all ranks of the process group are taken to be.
    """
    if asked:
        return min(asked, _MOST_THREADS)
    here = ranks_stated("LOCAL_WORLD_SIZE")
    if here is None and has_group():
        here = GroupRanks().size
    return max(1, cores() // max(1, here or 1))


def _join(size: int) -> None:
    """Join the ranks of torchrun. A rank that waits alone logs what it waits for: torch waits silently for half an
    hour, and the variables may belong to a job that only started this one.
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
    except ValueError as error:  # a variable that is not set, or is no number
        raise ValueError(f"{expected}, and they cannot meet ({error}); {_ALONE}") from error
    finally:
        waiting.cancel()


@contextmanager
def ranks_of_this_job() -> Iterator[Ranks]:
    """Yield the ranks of the initialized process group; else join those of torchrun for this job; else a single one."""
    if has_group():
        ranks = GroupRanks()
        yield ranks if ranks.size > 1 else Ranks()
    elif (size := ranks_stated("WORLD_SIZE") or 1) > 1:
        import torch.distributed as dist

        _join(size)
        try:
            yield GroupRanks(dist.new_group(timeout=_LONGEST_WAIT))
        finally:
            dist.destroy_process_group()
    else:
        yield Ranks()

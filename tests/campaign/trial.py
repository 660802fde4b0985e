"""One trial: a job in a process of its own, with a fault; and the count of what came of all."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fp8ckpt.errors import Fp8CheckpointError

SECONDS = 120  # after which a trial counts as hung; the slowest takes a second

# Every call that changes the disk.
STEPS = ("mkdir", "unlink", "rmdir", "rename", "ftruncate", "pwrite", "fdatasync", "fsync", "write")


class Outcome(NamedTuple):
    """How a trial ended: "done", "named" or "unnamed" (an error), "killed" or "hung"; ``text`` says more."""

    kind: str
    text: str = ""


@dataclass
class Count:
    """What came of one kind of trials. ``lost``: something that was read, or whole, is no longer what it was;
    ``silent``: wrong bytes without an error; ``hung``; ``unnamed``: an error without a name, or a traceback.
    """

    what: str
    trials: int = 0
    faults: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)

    def see(self, outcome: Outcome, trial: str) -> None:
        """Count how a trial ended."""
        self.trials += 1
        self.faults += outcome.kind == "killed"
        self.refused += outcome.kind == "named"
        if outcome.kind in ("hung", "unnamed"):
            getattr(self, outcome.kind).append(f"{trial}: {outcome.text}")

    @property
    def wrong(self) -> list[str]:
        """All that must not have been."""
        return [*self.lost, *self.silent, *self.hung, *self.unnamed]

    def __str__(self) -> str:
        figures = {"trials": self.trials, "faults": self.faults, "refused by name": self.refused}
        figures |= {kind: len(getattr(self, kind)) for kind in ("lost", "silent", "hung", "unnamed")}
        return f"{self.what}: " + ", ".join(f"{count:,} {name}" for name, count in figures.items())


class Trial:
    """A job in a forked process, which has begun."""

    def __init__(self, job: Callable[[], object]) -> None:
        end, begin = os.pipe()
        self._child = os.fork()
        if not self._child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            try:
                outcome = Outcome("done", str(job()))
            except Fp8CheckpointError as error:
                outcome = Outcome("named", f"{type(error).__name__}: {error}")
            except BaseException as error:
                outcome = Outcome("unnamed", f"{type(error).__name__}: {error}")
            os.writev(begin, [pickle.dumps(outcome)])
            os._exit(0)
        os.close(begin)
        self._told = end

    def outcome(self) -> Outcome:
        """Wait for its end."""
        with os.fdopen(self._told, "rb") as stream:
            told = stream.read()
        status = os.waitpid(self._child, 0)[1]
        if told:
            return Outcome(*pickle.loads(told))
        by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return Outcome({signal.SIGKILL: "killed", signal.SIGALRM: "hung"}.get(by, "unnamed"), f"signal {by}")


def apart(job: Callable[[], object]) -> Outcome:
    """Do a job in a process of its own, and wait for its end."""
    return Trial(job).outcome()


def digests(directory: Path) -> dict[str, str]:
    """Every file below a directory, by its SHA-256, hidden ones included."""
    found = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                found[file.relative_to(directory).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def at_step(
    number: int, fault: Callable[[], object], names: tuple[str, ...] = STEPS, patch: Callable[..., None] = setattr
) -> Callable[[], int]:
    """Have this process meet with a fault before its ``number``-th call of these functions of os: with the first half
    of the data written, if it is a write. Returns a function that says how many calls there were.
    """
    taken = itertools.count(1)  # of all threads

    def counted(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        if next(taken) == number:
            if real.__name__ in ("pwrite", "write") and number % 2:
                with suppress(OSError):  # half of a direct write is none
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
            fault()
        return real(*arguments, **more)

    for name in names:
        patch(os, name, partial(counted, getattr(os, name)))
    return lambda: next(taken) - 1


def die() -> None:
    """As by the kernel, out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)

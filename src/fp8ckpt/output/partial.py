"""An output directory that is not seen until it is whole.

Everything is written in ``DST.partial/output/``; its rename to ``DST`` comes last, after every file has been flushed to
disk. A small state folder beside it, ``DST.partial/.fp8ckpt/``, says that the directory is ours, and records what the
output is of (`fingerprint`), and which *extents* - numbered pieces of the output files, the same for every process that
makes the same plan - are on disk. It goes only after the rename, so whatever a run leaves behind is known for its own.

A run that was cut off is resumed by a run with the same fingerprint; any other is refused, and nothing is touched. What
stands at ``DST.partial`` without our state is somebody else's, and refused as well, unless it is an empty folder, in
which nothing can be lost: that is what a run leaves that ended before its first file.

Where ``DST`` is the URL of a store, ``s3://bucket/models/name``, extents go there as they are made
(`fp8ckpt.output.places`), the state and the small files are in ``name.partial/`` in the working directory, by the same
rules, and completing the uploads (`fp8ckpt.stores.upload`) stands for the rename.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path, PurePosixPath
from typing import Any

from fp8ckpt.errors import (
    OutputBusyError,
    RangeError,
    ResumeMismatchError,
    SourceChangedError,
    StorageError,
    WeightValueError,
    shown,
)
from fp8ckpt.output import standing
from fp8ckpt.output.files import writing_to
from fp8ckpt.output.goal import Directory, flush_parent
from fp8ckpt.output.places import Sent
from fp8ckpt.output.sending import Sending
from fp8ckpt.output.standing import OUTPUT
from fp8ckpt.output.state import LOCK, STATE, WRITERS, Facts, State
from fp8ckpt.stores.address import address_of
from fp8ckpt.stores.upload import destination_of
from fp8ckpt.system import lock


def partial_of(destination: str | os.PathLike[str]) -> Path:
    """Where ``destination`` is written until it is whole; for the URL of a store, in the working directory."""
    address = address_of(destination)
    place = _place(destination) if address is None else Path(PurePosixPath(address.rest).name)
    return place.parent / (place.name + ".partial")


def _place(destination: str | os.PathLike[str]) -> Path:
    """The path without "..", before which there may be nothing: no folder is made for being left again."""
    place = Path(destination)
    return Path(os.path.realpath(place.parent), place.name) if ".." in place.parent.parts else place


class PartialOutput:
    """The life of one output: `begin` (one process), `record` (any process, any thread), `publish` (one process).

    ``destination`` is ``DST``, a path or the URL of a store, ``partial`` is ``DST.partial``, and ``directory`` the
    folder in it that becomes ``DST``; ``state`` is what runs know of each other.
    """

    def __init__(self, destination: str | os.PathLike[str]) -> None:
        self._lock: int | None = None
        self.turn = ""  # of the run that `begin` began
        self.partial = partial_of(destination).absolute()
        self.directory = self.partial / OUTPUT
        self.state = State(self.partial / STATE)
        self.goal: Directory | Sending
        if (address := address_of(destination)) is None:
            self.goal = Directory(_place(destination).absolute(), self.partial, self.state)
        else:
            self.goal = Sending(destination_of(address, self.state.uploads), self.state, self.partial)
        self.destination = self.goal.where

    def begin(self, fingerprint: Mapping[str, Any], names: Collection[str], in_parts: Collection[str] = ()) -> None:
        """Create the partial output, or take up the one that is there; hold its lock until `release`.

        ``names`` are the files that the finished directory will have, by their paths in it; a store gets those of
        ``in_parts`` extent by extent. Raises `OutputExistsError` where the destination is there, or something that is
        not ours where it would be written; `OutputBusyError` where another process writes it, and
        `ResumeMismatchError` where the partial output is of another fingerprint or holds anything else.
        """
        try:
            with self._named():
                self._begin(fingerprint, names)
                self.goal.begin(in_parts)
        except BaseException:
            self.release()
            raise

    def _begin(self, fingerprint: Mapping[str, Any], names: Collection[str]) -> None:
        self.look(fingerprint, names)
        if not os.path.lexists(self.partial.parent):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
        flush_parent(self.partial)  # as after the rename: what may not be read cannot be flushed
        self.state.at.mkdir(parents=True, exist_ok=True)
        self._lock = self.state.locked(LOCK)
        if self._lock is None or (writers := self.state.locked(WRITERS)) is None:
            raise OutputBusyError.of(self.partial)
        try:
            self.turn = uuid.uuid4().hex
            os.write(writers, self.turn.encode())
        finally:
            os.close(writers)
        self.look(fingerprint, names)  # whoever held the lock before may have finished, or begun something else
        if not self.directory.exists():  # nothing was written yet, or all was, and has its name
            self.state.forget()
            self.state.keep_plan({**fingerprint, **self.goal.told})
            self.directory.mkdir()

    def look(self, fingerprint: Mapping[str, Any], names: Collection[str]) -> None:
        """Raise what `begin` would, but for `OutputBusyError`. Nothing is made or changed, but for the state that a run
        left which died after its last step.
        """
        with self._named():
            self.goal.refuse_existing()
            standing.refuse_foreign(self.partial, names)
            if os.path.lexists(self.directory) and not self.state.has_plan:
                raise self._mismatch("its state is gone")
            now = {**fingerprint, **self.goal.told}
            if self.directory.exists() and (before := self._recorded_plan()) != now:
                if self._lock is None and self.state.is_locked():  # then nobody is told to delete what is there
                    raise OutputBusyError.of(self.partial)
                raise self._differs(before, now)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the operating system get their names."""
        with writing_to(self.partial):
            try:
                yield
            except FileNotFoundError:  # another run, which we raced, has just published
                self.goal.refuse_existing()
                raise

    @contextmanager
    def taking_part(self, turn: str) -> Iterator[None]:
        """While a rank of the run of this ``turn`` writes: it may outlive the process that began, and with it the lock,
        so no other run begins meanwhile. Raises `OutputBusyError` where one has, `OutputExistsError` where it is done.
        """
        with self._named():
            held = os.open(self.state.at / WRITERS, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            lock(held, wait=True, shared=True)
            if os.pread(held, len(turn), 0) != turn.encode():
                raise OutputBusyError.of(self.partial)
            yield
        finally:
            os.close(held)

    def _recorded_plan(self) -> Any:
        try:
            return self.state.plan()
        except (JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise self._mismatch("its state cannot be read") from None

    def _mismatch(self, found: str) -> ResumeMismatchError:
        return ResumeMismatchError.of_other(self.partial, f"{self.partial}{self.goal.beside}", found)

    def _differs(self, before: Any, now: Mapping[str, Any]) -> ResumeMismatchError:
        other = before.get("destination") if isinstance(before, dict) else None
        if isinstance(before, dict) and other != now.get("destination"):
            goes = shown(other) if other else str(self.partial.with_suffix(""))
            return ResumeMismatchError.of_elsewhere(self.partial, goes)
        return self._mismatch(_difference(before, now))

    def records(self) -> dict[int, Facts]:
        """The facts that were recorded of each extent that is on disk, by all processes so far; in the order of the
        extents.
        """
        return {extent: facts for extent, (facts, _) in self.state.records().items()}

    def record(self, writer: int, extent: int, facts: Facts, sent: Sent | None = None) -> None:
        """Record that an extent is on disk, or in the store; call it after the flush. ``writer`` tells processes
        apart.
        """
        self.state.record(writer, extent, facts, sent)

    def forget(self, extents: Collection[int]) -> None:
        """Take these extents for not written; by the process that begins, before any of them is."""
        self.state.keep_only({i: one for i, one in self.state.records().items() if i not in extents})

    def publish(self) -> None:
        """Have the output appear, whose files are all flushed, and remove the state."""
        self.goal.publish()
        shutil.rmtree(self.partial, ignore_errors=True)  # nothing of the output is in it any more, or all is elsewhere

    def discard(self) -> None:
        """Remove a partial output that can never become whole; by the process that holds its lock, and no other."""
        if self._lock is not None:
            self.goal.give_up()
            shutil.rmtree(self.partial, ignore_errors=True)
            self.release()

    def __del__(self) -> None:
        self.release()  # of an output whose owner met an error

    def release(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def writing(destination: str | os.PathLike[str]) -> Iterator[PartialOutput]:
    """The output of a job: what it wrote goes where it can never become whole, and is kept for the next run where the
    disk refuses; its `StorageError` says so.
    """
    output = PartialOutput(destination)
    try:
        yield output
    except (WeightValueError, RangeError, SourceChangedError):
        output.discard()
        raise
    except StorageError as error:
        if not os.path.exists(output.directory):  # noqa: PTH110 - Path.exists() raises for a name that is too long
            raise
        remedy = f"what was written is in {output.partial}, and the same command goes on from there"
        raise error.advising(remedy) from error
    finally:
        output.release()


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    """Why a partial output is not taken up: a file that has changed since, if others have not."""
    general = "it is of another source, another target dtype, other options or another version"
    if not isinstance(before, dict) or {**before, "sources": None} != {**now, "sources": None}:
        return general
    pairs = zip(before["sources"], now["sources"], strict=False) if isinstance(before.get("sources"), list) else ()
    same = {name: old.get(name) == new[name] for old, new in pairs if isinstance(old, dict) for name in new}
    changed = [name for name in same if not same[name]]
    return f"{changed[0]}, which it is made from, has changed since" if 0 < len(changed) < len(same) else general

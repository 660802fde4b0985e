"""An output directory that appears only once it is complete.

Every file is written in ``DST.partial/output/``, which is renamed to ``DST`` last, after every file was flushed to
disk. A small state folder beside it, ``DST.partial/.fp8ckpt/``, marks the directory as ours. It records what the output
is made from (its fingerprint), and which *extents* are on disk: numbered pieces of the output files, the same in every
process that makes the same plan. It is removed only after the rename, so that what a run leaves behind is always
recognized.

A run resumes an interrupted one that has the same fingerprint; with another fingerprint it is refused, and changes
nothing. A ``DST.partial`` without our state is someone else's and refused too, except an empty folder: a run that ends
before its first file leaves one.

If ``DST`` is the URL of a store, ``s3://bucket/models/name``, extents are sent there as they are made
(`fp8ckpt.output.places`), the state and the small files are in ``name.partial/`` in the working directory, by the same
rules, and completing the uploads (`fp8ckpt.stores.upload`) takes the place of the rename.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
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
    """Where ``destination`` is written until it is complete; for a store's URL, in the working directory."""
    address = address_of(destination)
    place = _place(destination) if address is None else Path(PurePosixPath(address.rest).name)
    return place.parent / (place.name + ".partial")


def _place(destination: str | os.PathLike[str]) -> Path:
    """The path with ".." resolved, so that no folder is created only for ".." to leave it again."""
    place = Path(destination)
    return Path(os.path.realpath(place.parent), place.name) if ".." in place.parent.parts else place


class PartialOutput:
    """The life of one output: `begin` (one process), `record` (any process, any thread), `publish` (one process).

    ``destination`` is ``DST``, a path or the URL of a store; ``partial`` is ``DST.partial``; ``directory`` is the
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
        """Create the partial output, or resume the existing one, and hold its lock until `release`.

        ``names``: the files of the finished directory, by their paths in it; a store gets those of ``in_parts`` extent
        by extent. Raises `OutputExistsError` if the destination exists, or something that is not ours stands in the
        way; `OutputBusyError` if another process writes it; `ResumeMismatchError` if the partial output has another
        fingerprint or holds other files.
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
        flush_parent(self.partial)  # fails here, not after the rename, if the folder may not be read
        self.state.at.mkdir(parents=True, exist_ok=True)
        self._lock = self.state.locked(LOCK)
        if self._lock is None or (writers := self.state.locked(WRITERS)) is None:
            raise OutputBusyError.of(file=str(self.partial))
        try:
            self.turn = uuid.uuid4().hex
            os.write(writers, self.turn.encode())
        finally:
            os.close(writers)
        self.look(fingerprint, names)  # the previous holder of the lock may have finished, or begun something else
        if not self.directory.exists():  # nothing was written yet, or everything was, and has been renamed
            self.state.forget()
            self.state.keep_plan({**fingerprint, **self.goal.told})
            self.directory.mkdir()

    def look(self, fingerprint: Mapping[str, Any], names: Collection[str]) -> None:
        """Raise what `begin` would raise, except `OutputBusyError`. Creates and changes nothing, except that it removes
        the state of a run that died after its rename.
        """
        with self._named():
            self.goal.refuse_existing()
            standing.refuse_foreign(self.partial, names)
            if os.path.lexists(self.directory) and not self.state.has_plan:
                raise self._mismatch(ResumeMismatchError.of_gone)
            now = {**fingerprint, **self.goal.told}
            if self.directory.exists() and (before := self._recorded_plan()) != now:
                if self._lock is None and self.state.is_locked():  # or the remedy would be to delete its files
                    raise OutputBusyError.of(file=str(self.partial))
                raise self._differs(before, now)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Raise errors of the operating system as `StorageError`."""
        with writing_to(self.partial):
            try:
                yield
            except FileNotFoundError:  # a concurrent run has just published
                self.goal.refuse_existing()
                raise

    @contextmanager
    def taking_part(self, turn: str) -> Iterator[None]:
        """Hold a shared lock while a rank of the run ``turn`` writes: it may outlive the process that began the run and
        held its lock. Raises `OutputBusyError` if another run has begun, `OutputExistsError` if one has published.
        """
        with self._named():
            held = os.open(self.state.at / WRITERS, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            lock(held, wait=True, shared=True)
            if os.pread(held, len(turn), 0) != turn.encode():
                raise OutputBusyError.of(file=str(self.partial))
            yield
        finally:
            os.close(held)

    def _recorded_plan(self) -> Any:
        try:
            return self.state.plan()
        except (JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise self._mismatch(ResumeMismatchError.of_unreadable) from None

    def _mismatch(self, said: Callable[..., ResumeMismatchError], **facts: str) -> ResumeMismatchError:
        return said(file=str(self.partial), begun=f"{self.partial}{self.goal.beside}", **facts)

    def _differs(self, before: Any, now: Mapping[str, Any]) -> ResumeMismatchError:
        """Why a partial output is not taken up: it goes elsewhere, or a file has changed since, if others have not."""
        if not isinstance(before, dict):
            return self._mismatch(ResumeMismatchError.of_other)
        if (other := before.get("destination")) != now.get("destination"):
            where = shown(other) if other else str(self.partial.with_suffix(""))
            return ResumeMismatchError.of_elsewhere(file=str(self.partial), where=where)
        if {**before, "sources": None} != {**now, "sources": None}:
            return self._mismatch(ResumeMismatchError.of_other)
        pairs = zip(before["sources"], now["sources"], strict=False) if isinstance(before.get("sources"), list) else ()
        same = {name: old.get(name) == new[name] for old, new in pairs if isinstance(old, dict) for name in new}
        changed = [name for name in same if not same[name]]
        if 0 < len(changed) < len(same):
            return self._mismatch(ResumeMismatchError.of_changed, name=changed[0])
        return self._mismatch(ResumeMismatchError.of_other)

    def records(self) -> dict[int, Facts]:
        """The facts recorded of each extent on disk, by all processes so far, in the order of the extents."""
        return {extent: facts for extent, (facts, _) in self.state.records().items()}

    def record(self, writer: int, extent: int, facts: Facts, sent: Sent | None = None) -> None:
        """Record that an extent is on disk, or in the store, after its flush. ``writer`` identifies the process."""
        self.state.record(writer, extent, facts, sent)

    def forget(self, extents: Collection[int]) -> None:
        """Mark these extents as not written. Called by the process that begins, before it writes any of them."""
        self.state.keep_only({i: one for i, one in self.state.records().items() if i not in extents})

    def publish(self) -> None:
        """Make the output appear, whose files are all flushed, and remove the state."""
        self.goal.publish()
        shutil.rmtree(self.partial, ignore_errors=True)  # the output was moved out of it, or is in the store

    def discard(self) -> None:
        """Remove a partial output that can never become complete; only the process that holds its lock does so."""
        if self._lock is not None:
            self.goal.give_up()
            shutil.rmtree(self.partial, ignore_errors=True)
            self.release()

    def __del__(self) -> None:
        self.release()  # for an output whose owner met an error

    def release(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def writing(destination: str | os.PathLike[str]) -> Iterator[PartialOutput]:
    """Yield the output of a job. If it can never become complete, it is removed; if the disk fails, it is kept for the
    next run, and the `StorageError` says so.
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
        remedy = f"what was written is in {output.partial}, and the same command continues from there"
        raise error.advising(remedy) from error
    finally:
        output.release()

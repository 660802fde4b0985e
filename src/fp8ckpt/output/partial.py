"""An output directory that is not seen until it is whole.

Everything is written in ``DST.partial/``; the rename to ``DST`` comes last, after every file has been flushed to disk.
A small state folder inside records what the output is of (`fingerprint`), and which *extents* - numbered pieces of the
output files, the same for every process that makes the same plan - are on disk. A run that was cut off is resumed by a
run with the same fingerprint; any other is refused, and nothing is touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fp8ckpt.errors import OutputBusyError, OutputExistsError, ResumeMismatchError
from fp8ckpt.output.files import flush_directory, write_error, write_whole

_STATE = ".fp8ckpt"
_PLAN = "plan.json"
_LOCK = "lock"


def partial_of(destination: Path) -> Path:
    """Where ``destination`` is written until it is whole."""
    return destination.with_name(destination.name + ".partial")


class PartialOutput:
    """The life of one output: `begin` (one process), `record` (any process, any thread), `publish` (one process)."""

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.directory = partial_of(destination)
        self._state = self.directory / _STATE
        self._lock: int | None = None

    def begin(self, fingerprint: Mapping[str, Any], names: Collection[str]) -> None:
        """Create the partial output, or take up the one that is there; hold its lock until `release`.

        ``names`` are the files that the finished directory will have, by their paths in it. Raises `OutputExistsError`
        where the destination is there, `OutputBusyError` where another process writes it, and `ResumeMismatchError`
        where the partial output is of another fingerprint or holds anything else.
        """
        try:
            self._begin(fingerprint, names)
        except BaseException:
            self.release()
            raise

    def _begin(self, fingerprint: Mapping[str, Any], names: Collection[str]) -> None:
        self.refuse_existing()
        begin_anew = f"delete {self.directory} to begin anew, or choose another destination"
        try:
            fresh = not self.directory.exists()
            if not fresh:
                files = {
                    file.relative_to(self.directory).as_posix()
                    for file in self.directory.rglob("*")
                    if not file.is_dir()
                }
                strange = sorted(name for name in files - set(names) if not name.startswith(_STATE + "/"))
                if strange:
                    found = f"it holds {strange[0]}, which this output does not have"
                    raise ResumeMismatchError(found, file=str(self.directory), remedy=begin_anew)
            self._state.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._state / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputBusyError(
                    "another process is writing it", file=str(self.directory), remedy="wait for it to end"
                ) from None
            self.refuse_existing()  # whoever held the lock before may have finished
            plan = self._state / _PLAN
            if plan.exists():
                if json.loads(plan.read_text()) != fingerprint:
                    found = "it is of another source, another target dtype or another version"
                    raise ResumeMismatchError(found, file=str(self.directory), remedy=begin_anew)
            else:
                # Nothing was recorded yet, or all was done and only the rename is missing. Either way, each file that
                # is there is one of ours, and is written again.
                for record in self._state.glob("done-*"):
                    record.unlink()
                draft = self._state / (_PLAN + ".draft")
                write_whole(draft, json.dumps(fingerprint).encode())
                draft.rename(plan)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise ResumeMismatchError("its state cannot be read", file=str(self.directory), remedy=begin_anew) from None
        except OSError as error:
            if isinstance(error, OutputExistsError):
                raise
            raise write_error(error, self.directory) from error

    def refuse_existing(self) -> None:
        """Raise `OutputExistsError` where anything stands at the destination, a broken link included."""
        if os.path.lexists(self.destination):
            found = "the destination exists"
            raise OutputExistsError(
                found, file=str(self.destination), expected="no such path", remedy="choose another one, or move it away"
            )

    def records(self) -> dict[int, dict[str, Any]]:
        """The facts that were recorded of each extent that is on disk, by all processes so far; in the order of the
        extents.
        """
        done: dict[int, dict[str, Any]] = {}
        for file in sorted(self._state.glob("done-*")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    record = json.loads(line)
                    done[record["extent"]] = record["facts"]
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue  # cut off while it was written: the extent is written again
        return dict(sorted(done.items()))

    def record(self, writer: int, extent: int, facts: Mapping[str, Any]) -> None:
        """Record that an extent is on disk; call it after the flush. ``writer`` tells processes apart."""
        # The first newline ends a line that was cut off.
        line = memoryview(("\n" + json.dumps({"extent": extent, "facts": facts}) + "\n").encode())
        try:
            fd = os.open(self._state / f"done-{writer}", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                while line:
                    line = line[os.write(fd, line) :]  # a disk that fills up may take a part
            finally:
                os.close(fd)
        except OSError as error:
            raise write_error(error, self._state) from error

    def publish(self) -> None:
        """Remove the state and rename the directory to its final name. All its files must have been flushed."""
        try:
            for file in self._state.iterdir():
                file.unlink()
            self._state.rmdir()
            for directory, _, _ in os.walk(self.directory):
                flush_directory(Path(directory))
            self.refuse_existing()  # rename() would replace an empty directory
            self.directory.rename(self.destination)
            flush_directory(self.destination.parent)
        except OSError as error:
            if isinstance(error, OutputExistsError):
                raise
            raise write_error(error, self.directory) from error

    def discard(self) -> None:
        """Remove a partial output that can never become whole; by the process that holds its lock, and no other."""
        if self._lock is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.release()

    def __del__(self) -> None:
        self.release()  # of an output whose owner met an error

    def release(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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

import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fp8ckpt.errors import (
    Fp8CheckpointError,
    OutputBusyError,
    OutputExistsError,
    RangeError,
    ResumeMismatchError,
    SourceChangedError,
    StorageError,
    WeightValueError,
    shown,
)
from fp8ckpt.output import extents
from fp8ckpt.output.extents import Extent
from fp8ckpt.output.files import OutputFile, flush_directory, open_to_write, write_error, write_whole
from fp8ckpt.output.places import Kept, Part, Place, Sent
from fp8ckpt.stores.address import address_of
from fp8ckpt.stores.local import read_whole
from fp8ckpt.stores.upload import AT_ONCE, LOCK, Destination, There, destination_of
from fp8ckpt.system import lock

_OUTPUT = "output"
Facts = dict[str, Any]  # what is recorded of an extent; JSON

_STATE = ".fp8ckpt"
_PLAN = "plan.json"
_DRAFT = "plan.json.draft"
_LOCK = "lock"
_WRITERS = (
    "writers"  # the last run that began; locked by all ranks of a save while they write, and by a run that begins
)
_STAGED = "part-"
_RECORDS = "done-"
_RUN = "run"  # what a store is told of who writes there
_SEEN = "seen"  # the destination and the parts of its files, from before the first is seen until the last is


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
    folder in it that becomes ``DST``.
    """

    def __init__(self, destination: str | os.PathLike[str]) -> None:
        self._lock: int | None = None
        self.turn = ""  # of the run that `begin` began
        address = address_of(destination)
        self._far = None if address is None else destination_of(address)
        self.destination = _place(destination).absolute() if self._far is None else self._far.where
        self.partial = partial_of(destination).absolute()
        self.directory = self.partial / _OUTPUT
        self._state = self.partial / _STATE
        self._uploads: Collection[str] = ()

    @property
    def in_parts(self) -> bool:
        """Whether an extent that was written can only be written again as a whole."""
        return self._far is not None

    @property
    def at_once(self) -> int:
        """How many extents are flushed sooner at once, beside the work, than one after the other in it."""
        return AT_ONCE if self._far is not None else 0

    @property
    def extent(self) -> int:
        """Bytes of an extent."""
        return extents.EXTENT if self._far is None else extents.PART

    def place(self, extent: Extent) -> Place:
        """Where the bytes of an extent are written."""
        if self._far is None:
            return OutputFile(self.directory / extent.layout.name)
        return Part(self._far, extent) if extent.whole else Kept(self.directory / extent.layout.name, extent)

    def elsewhere(self, written: Iterable[Extent]) -> int:
        """Bytes of these extents that no disk of this machine will hold."""
        return 0 if self._far is None else sum(extent.nbytes for extent in written if extent.whole)

    def begin(self, fingerprint: Mapping[str, Any], names: Collection[str], in_parts: Collection[str] = ()) -> None:
        """Create the partial output, or take up the one that is there; hold its lock until `release`.

        ``names`` are the files that the finished directory will have, by their paths in it; a store gets those of
        ``in_parts`` extent by extent. Raises `OutputExistsError`
        where the destination is there, or something that is not ours where it would be written; `OutputBusyError` where
        another process writes it, and `ResumeMismatchError` where the partial output is of another fingerprint or holds
        anything else.
        """
        try:
            with self._named():
                self._begin(fingerprint, names)
                if self._far is not None:
                    self._uploads = in_parts
                    self._begin_far(self._far)
        except BaseException:
            self.release()
            raise

    def _begin(self, fingerprint: Mapping[str, Any], names: Collection[str]) -> None:
        self.look(fingerprint, names)
        if not os.path.lexists(self.partial.parent):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
        _flush_parent(self.partial)  # as after the rename: what may not be read cannot be flushed
        self._state.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked(_LOCK)
        if self._lock is None or (writers := self._locked(_WRITERS)) is None:
            raise self._busy()
        try:
            self.turn = uuid.uuid4().hex
            os.write(writers, self.turn.encode())
        finally:
            os.close(writers)
        self.look(fingerprint, names)  # whoever held the lock before may have finished, or begun something else
        if not self.directory.exists():  # nothing was written yet, or all was, and has its name
            self.forget()
            write_whole(self._state / _DRAFT, json.dumps(self._told(fingerprint)).encode())
            (self._state / _DRAFT).rename(self._state / _PLAN)
            flush_directory(self._state)
            self.directory.mkdir()

    def _begin_far(self, far: Destination) -> None:
        run = self._state / _RUN
        if new := not run.is_file():
            write_whole(run, uuid.uuid4().hex.encode())
        try:
            far.hold(read_whole(run).decode())
        except Fp8CheckpointError:  # another run's place, or one where we may not write
            if new:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        if self._seen() is None:
            far.begin(self._uploads)
            self._drop_lost(far)

    def _drop_lost(self, far: Destination) -> None:
        """Drop the records of what the store does not have, or no longer. Of a part that was sent again, the last."""
        recorded = self._recorded()
        last = {(sent.name, sent.number): sent.etag for _, sent in recorded.values() if sent is not None}
        lost = {part for part, etag in last.items() if etag and far.there(part[0]).get(part[1]) != etag}
        if lost:
            kept = [(i, *one) for i, one in recorded.items() if one[1] is None or one[1][:2] not in lost]
            write_whole(self._state / _DRAFT, b"".join(_record(*one) for one in kept))
            (self._state / _DRAFT).rename(self._state / f"{_RECORDS}0")
            for file in self._state.glob(_RECORDS + "*"):
                if file.name != f"{_RECORDS}0":
                    file.unlink()

    def look(self, fingerprint: Mapping[str, Any], names: Collection[str]) -> None:
        """Raise what `begin` would, but for `OutputBusyError`. Nothing is made or changed, but for the state that a run
        left which died after its last step.
        """
        with self._named():
            self.refuse_existing()
            self.refuse_foreign(names)
            now = self._told(fingerprint)
            if self.directory.exists() and (before := self._recorded_plan()) != now:
                raise self._busy() if self._is_held() else self._mismatch(_difference(before, now))

    def _told(self, fingerprint: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fingerprint, and where in a store it goes: of that, ``DST.partial`` has only the last name."""
        return fingerprint if self._far is None else {**fingerprint, "destination": self._far.where.rstrip("/")}

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the operating system get their names."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError):  # another run, which we raced, has just published
                self.refuse_existing()
            if isinstance(error, Fp8CheckpointError):
                raise
            raise write_error(error, self.partial) from error

    @contextmanager
    def taking_part(self, turn: str) -> Iterator[None]:
        """While a rank of the run of this ``turn`` writes: it may outlive the process that began, and with it the lock,
        so no other run begins meanwhile. Raises `OutputBusyError` where one has, `OutputExistsError` where it is done.
        """
        with self._named():
            held = os.open(self._state / _WRITERS, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            lock(held, wait=True, shared=True)
            if os.pread(held, len(turn), 0) != turn.encode():
                raise self._busy()
            yield
        finally:
            os.close(held)

    def _locked(self, name: str) -> int | None:
        """A lock, held; None where another process holds it."""
        held = open_to_write(self._state / name, os.O_RDWR | os.O_CREAT)
        try:
            if lock(held):
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)
        return None

    def refuse_foreign(self, names: Collection[str]) -> None:
        """Raise where something stands at ``DST.partial`` that we did not make, or that holds more than we made.

        ``names`` as for `begin`. Nothing is followed, made or changed.
        """
        if not os.path.lexists(self.partial):
            return
        if not stat.S_ISDIR(os.lstat(self.partial).st_mode):
            raise self._foreign("it is no directory")
        if os.path.ismount(self.partial):
            raise self._foreign("another file system is mounted there, out of which no output can be renamed")
        top = set(os.listdir(self.partial))
        if top and not (_STATE in top and stat.S_ISDIR(os.lstat(self._state).st_mode)):
            raise self._foreign(f"fp8ckpt did not make it: it holds {min(top)}, and no {_STATE}/")
        ours = {f"{_OUTPUT}/{name}" for name in names}
        folders = {parent.as_posix() for name in (*ours, f"{_STATE}/{_LOCK}") for parent in PurePosixPath(name).parents}
        for entry, found in self._entries():
            if stat.S_ISDIR(found.st_mode):
                known = entry in folders
            else:
                known = stat.S_ISREG(found.st_mode) and (entry in ours or _is_state(entry))
            if not known:
                raise self._strange(f"it holds {entry.removeprefix(_OUTPUT + '/')}, which this output does not have")
            if found.st_nlink > 1 and stat.S_ISREG(found.st_mode):
                raise self._strange(f"{entry.removeprefix(_OUTPUT + '/')} in it is a file of another name as well")
        if _OUTPUT in top and not (self._state / _PLAN).exists():
            raise self._mismatch("its state is gone")

    def _recorded_plan(self) -> Any:
        try:
            return json.loads(read_whole(self._state / _PLAN))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise self._mismatch("its state cannot be read") from None

    def identities(self) -> set[tuple[int, int]]:
        """The device and inode numbers of ``DST.partial``, and of all that is in it."""
        try:
            found = [os.lstat(self.partial)] if os.path.lexists(self.partial) else []
            if found and stat.S_ISDIR(found[0].st_mode):
                found += [status for _, status in self._entries()]
        except OSError as error:
            raise write_error(error, self.partial) from error
        return {(one.st_dev, one.st_ino) for one in found}

    def _entries(self, folder: str = "") -> Iterator[tuple[str, os.stat_result]]:
        """All that is in ``DST.partial``, by its path in it; links are not followed."""
        with os.scandir(self.partial / folder) as entries:
            found = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in entries)
        for name, status in found:
            yield folder + name, status
            if stat.S_ISDIR(status.st_mode):
                yield from self._entries(f"{folder}{name}/")

    def _foreign(self, found: str) -> OutputExistsError:
        expected = "a path that is free, to write to until the output is whole"
        remedy = "move it away, or choose another destination"
        return OutputExistsError(found, file=str(self.partial), expected=expected, remedy=remedy)

    def _strange(self, found: str) -> ResumeMismatchError:
        remedy = "move it away, or choose another destination"
        return ResumeMismatchError(found, file=str(self.partial), remedy=remedy)

    def _is_held(self) -> bool:
        """Whether another process is writing: then nobody is told to delete what is there."""
        if self._lock is not None:
            return False
        for name in (_LOCK, _WRITERS):
            with suppress(OSError), (self._state / name).open("rb") as file:
                if not lock(file.fileno()):
                    return True
        return False

    def _busy(self) -> OutputBusyError:
        remedy = "wait for it to end"
        return OutputBusyError("another process is writing it", file=str(self.partial), remedy=remedy)

    def _mismatch(self, found: str) -> ResumeMismatchError:
        begun = self.partial if self._far is None else f"{self.partial} and {self._far.where.rstrip('/')}/{LOCK}"
        remedy = f"choose another destination, or delete {begun} to begin anew, without what that run had done"
        return ResumeMismatchError(found, file=str(self.partial), remedy=remedy)

    def refuse_existing(self) -> None:
        """Raise `OutputExistsError` where anything stands at the destination, a broken link included; in a store, but
        for what a run of ours was cut off in completing.
        """
        if self._far is not None:
            if self._seen() is None:
                self._far.refuse_existing()
        elif os.path.lexists(self.destination) or Path(self.destination).name == "..":
            self._tidy()
            remedy = "choose another one, or move it away"
            raise OutputExistsError(
                "the destination exists", file=str(self.destination), expected="no such path", remedy=remedy
            )

    def _tidy(self) -> None:
        """Remove what a run left that died between its last step, the rename, and its end: state, and nothing else; or
        the empty folder where that was.
        """
        with suppress(OSError):  # the destination stands there, and that is what the caller hears of
            found = {entry: status.st_mode for entry, status in self._entries()}
            if not found:
                self.partial.rmdir()
            if not stat.S_ISDIR(found.pop(_STATE, 0)):
                return
            if not all(stat.S_ISREG(mode) and _is_state(entry) for entry, mode in found.items()):
                return
            if (held := self._locked(_LOCK)) is not None:
                shutil.rmtree(self.partial, ignore_errors=True)
                os.close(held)

    def records(self) -> dict[int, Facts]:
        """The facts that were recorded of each extent that is on disk, by all processes so far; in the order of the
        extents.
        """
        return {extent: facts for extent, (facts, _) in self._recorded().items()}

    def _recorded(self) -> dict[int, tuple[Facts, Sent | None]]:
        done: dict[int, tuple[Facts, Sent | None]] = {}
        for file in sorted(self._state.glob(_RECORDS + "*")):
            for line in read_whole(file).split(b"\n"):
                check, _, text = line.partition(b" ")
                if check == _check(text):  # otherwise cut off while it was written, or damaged: it is written again
                    extent, facts, sent = json.loads(text)
                    done[extent] = facts, None if sent is None else Sent(*sent)
        return dict(sorted(done.items()))

    def record(self, writer: int, extent: int, facts: Facts, sent: Sent | None = None) -> None:
        """Record that an extent is on disk, or in the store; call it after the flush. ``writer`` tells processes
        apart.
        """
        line = memoryview(_record(extent, facts, sent))
        try:
            fd = open_to_write(self._state / f"{_RECORDS}{writer}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                while line:
                    line = line[os.write(fd, line) :]  # a disk that fills up may take a part
            finally:
                os.close(fd)
        except StorageError:
            raise
        except OSError as error:
            raise write_error(error, self._state) from error

    def forget(self) -> None:
        """Take no extent for written: the files that the records speak of are not there."""
        for file in (*self._state.glob(_RECORDS + "*"), *self._state.glob(_STAGED + "*")):
            file.unlink()

    def staged(self, place: int) -> Path:
        """Where a part is while ranks write it, by its place among the parts of all files."""
        return self._state / f"{_STAGED}{place}"

    def send(self, name: str, number: int, data: bytes) -> There:
        """Send a part of a file; any process, any thread. Raises `ResumeMismatchError` where a run
        was cut off in completing other ones.
        """
        assert self._far is not None
        if (seen := self._seen_before) is None:
            return self._far.send(name, number, data)
        if hashlib.md5(data).hexdigest() != seen[name][number - 1].md5:
            place = self._far.where
            found = f"a run before was cut off while its files appeared in {place}: other weights, by their MD5s"
            remedy = f"choose another destination, or save the weights of that run, which {self.partial} is of"
            raise ResumeMismatchError(found, file=name, remedy=remedy)
        return seen[name][number - 1]

    @cached_property
    def _seen_before(self) -> dict[str, list[There]] | None:
        return self._seen()

    def publish(self) -> None:
        """Rename the directory to its final name, or upload it, and remove the state. All its files must have been
        flushed.
        """
        if self._far is not None:
            self._upload(self._far)
        else:
            self._rename(Path(self.destination))
        shutil.rmtree(self.partial, ignore_errors=True)  # nothing of the output is in it any more, or all is elsewhere

    def _upload(self, far: Destination) -> None:
        found = [path for path in self.directory.rglob("*") if path.is_file()]
        names = sorted((path.relative_to(self.directory).as_posix() for path in found), key=_last)
        seen = self._seen()
        if new := seen is None:
            far.refuse_existing()
            seen = self._send_rest(far, [name for name in names if name.endswith(".safetensors")])
            write_whole(self._state / _SEEN, json.dumps([far.where, seen]).encode())
        etags = {name: [part.etag for part in parts] for name, parts in seen.items()}
        if not new:
            far.refuse_others(etags)
        for name, of_parts in etags.items():
            far.finish(name, of_parts)
        for name in names:
            if name not in etags:
                far.put(name, (self.directory / name).read_bytes())
        far.release()

    def _send_rest(self, far: Destination, names: Collection[str]) -> dict[str, list[There]]:
        """Send what is kept here, and return all parts of all files."""
        far.begin(names)
        parts: dict[str, dict[int, Sent]] = {name: {} for name in names}
        for _, sent in self._recorded().values():
            if sent is not None:
                parts[sent.name][sent.number] = sent

        def send(sent: Sent) -> None:
            data = _read(self.directory / sent.name, sent.start, sent.stop)
            parts[sent.name][sent.number] = sent._replace(**far.send(sent.name, sent.number, data)._asdict())

        kept = [sent for of_file in parts.values() for sent in of_file.values() if not sent.etag]
        far.each(kept, send)
        return {name: [There(*of_file[k][-2:]) for k in range(1, len(of_file) + 1)] for name, of_file in parts.items()}

    def _seen(self) -> dict[str, list[There]] | None:
        """The parts of each file, where objects at the destination may be ours: a run was cut off between
        the first and the last of them.
        """
        place = self._state / _SEEN
        if self._far is None or not place.is_file():
            return None
        where, seen = json.loads(read_whole(place))
        if where != self._far.where:
            return None
        return {name: [There(*part) for part in parts] for name, parts in seen.items()}

    def _rename(self, destination: Path) -> None:
        try:
            for directory, _, _ in os.walk(self.directory):
                flush_directory(Path(directory))
            self.refuse_existing()  # rename() would replace an empty directory
            self.directory.rename(destination)
            _flush_parent(destination)
        except OSError as error:
            if isinstance(error, OutputExistsError):
                raise
            raise write_error(error, self.directory) from error

    def discard(self) -> None:
        """Remove a partial output that can never become whole; by the process that holds its lock, and no other."""
        if self._lock is not None:
            if self._far is not None:
                with suppress(StorageError):  # the caller hears of what came before
                    self._far.give_up(self._uploads)
                self._far.release()
            shutil.rmtree(self.partial, ignore_errors=True)
            self.release()

    def __del__(self) -> None:
        self.release()  # of an output whose owner met an error

    def release(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _flush_parent(path: Path) -> None:
    """Return when a name is on disk, in the folder that the user named, which may be a link."""
    flush_directory(Path(os.path.realpath(path.parent, strict=True)))


def _record(extent: int, facts: Facts, sent: Sent | None) -> bytes:
    text = json.dumps([extent, facts, sent]).encode()
    return b"\n" + _check(text) + b" " + text + b"\n"  # the first newline ends a line that was cut off


def _read(file: Path, start: int, stop: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


def _check(text: bytes) -> bytes:
    """What stands before a record, so that none is believed that is not as it was written."""
    return hashlib.sha256(text).hexdigest()[:16].encode()


def _is_state(entry: str) -> bool:
    """Whether a path in ``DST.partial`` is that of a file of our state."""
    return entry.startswith((f"{_STATE}/{_RECORDS}", f"{_STATE}/{_STAGED}")) or entry in {
        f"{_STATE}/{name}" for name in (_PLAN, _DRAFT, _LOCK, _WRITERS, _RUN, _SEEN)
    }


def _last(name: str) -> tuple[bool, bool, str]:
    """Sorts what makes a checkpoint of files behind all else: the index, then the configuration."""
    return name == "config.json", name.endswith(".index.json"), name


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
    if isinstance(before, dict) and (other := before.get("destination")) != now.get("destination"):
        return f"it goes to {shown(other) if other else 'this machine'}"
    if not isinstance(before, dict) or {**before, "sources": None} != {**now, "sources": None}:
        return general
    pairs = zip(before["sources"], now["sources"], strict=False) if isinstance(before.get("sources"), list) else ()
    same = {name: old.get(name) == new[name] for old, new in pairs if isinstance(old, dict) for name in new}
    changed = [name for name in same if not same[name]]
    return f"{changed[0]}, which it is made from, has changed since" if 0 < len(changed) < len(same) else general

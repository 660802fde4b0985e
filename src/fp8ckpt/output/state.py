"""The state of a partial output: ``DST.partial/.fp8ckpt/``, a small folder that says which plan it has, what is done,
and who is writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fp8ckpt.output.files import flush_directory, open_to_write, write_whole, writing_to
from fp8ckpt.output.places import Sent
from fp8ckpt.stores.local import read_whole
from fp8ckpt.stores.upload import There
from fp8ckpt.system import lock

Facts = dict[str, Any]  # recorded of an extent; JSON
Records = Mapping[int, tuple[Facts, Sent | None]]  # by extent

STATE = ".fp8ckpt"
LOCK = "lock"  # held by the run that writes
#: Names the last run that began; locked by all ranks of a save while they write, and by a run that begins.
WRITERS = "writers"
_PLAN = "plan.json"
_DRAFT = "plan.json.draft"
_STAGED = "part-"
_RECORDS = "done-"
_RUN = "run"  # the run's name in the store's lock
_UPLOADS = "uploads"  # the uploads of ours in a store
_SEEN = "seen"  # the destination and the parts of its files, while uploads are completed


def is_state(entry: str) -> bool:
    """Whether a path in ``DST.partial`` is a file of our state."""
    return entry.startswith((f"{STATE}/{_RECORDS}", f"{STATE}/{_STAGED}")) or entry in {
        f"{STATE}/{name}" for name in (_PLAN, _DRAFT, LOCK, WRITERS, _RUN, _UPLOADS, _SEEN)
    }


class State:
    """The files of the folder ``at``, which exists once a run has begun."""

    def __init__(self, at: Path) -> None:
        self.at = at

    @property
    def has_plan(self) -> bool:
        return (self.at / _PLAN).exists()

    def plan(self) -> Any:
        """The recorded plan. Raises a `ValueError` of JSON, or `RecursionError`, if it is damaged."""
        return json.loads(read_whole(self.at / _PLAN))

    def keep_plan(self, told: Mapping[str, Any]) -> None:
        """Record the plan, completely or not at all."""
        write_whole(self.at / _DRAFT, json.dumps(told).encode())
        (self.at / _DRAFT).rename(self.at / _PLAN)
        flush_directory(self.at)

    def locked(self, name: str) -> int | None:
        """Take a lock and return its descriptor, which holds it until closed; None if another process holds it."""
        held = open_to_write(self.at / name, os.O_RDWR | os.O_CREAT)
        try:
            if lock(held):
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)
        return None

    def is_locked(self) -> bool:
        """Whether any process is writing, this one included."""
        for name in (LOCK, WRITERS):
            with suppress(OSError), (self.at / name).open("rb") as file:
                if not lock(file.fileno()):
                    return True
        return False

    def records(self) -> dict[int, tuple[Facts, Sent | None]]:
        """What was recorded of each extent on disk, or in the store, in the order of the extents."""
        done: dict[int, tuple[Facts, Sent | None]] = {}
        for file in sorted(self.at.glob(_RECORDS + "*")):
            for line in read_whole(file).split(b"\n"):
                check, _, text = line.partition(b" ")
                if check == _check(text):  # otherwise incomplete or damaged, and the extent is written again
                    extent, facts, sent = json.loads(text)
                    done[extent] = facts, None if sent is None else Sent(*sent)
        return dict(sorted(done.items()))

    def record(self, writer: int, extent: int, facts: Facts, sent: Sent | None) -> None:
        """Record an extent. ``writer`` identifies the process."""
        line = memoryview(_record(extent, facts, sent))
        with writing_to(self.at):
            fd = open_to_write(self.at / f"{_RECORDS}{writer}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                while line:
                    line = line[os.write(fd, line) :]  # a disk that fills up may write only a part
            finally:
                os.close(fd)

    def keep_only(self, records: Records) -> None:
        """Replace all records by these."""
        write_whole(self.at / _DRAFT, b"".join(_record(i, *one) for i, one in records.items()))
        (self.at / _DRAFT).rename(self.at / f"{_RECORDS}0")
        for file in self.at.glob(_RECORDS + "*"):
            if file.name != f"{_RECORDS}0":
                file.unlink()
        flush_directory(self.at)  # no old record may come back after a crash

    def forget(self) -> None:
        """Mark every extent as not written: the files that the records describe are gone."""
        with writing_to(self.at):
            for file in (*self.at.glob(_RECORDS + "*"), *self.at.glob(_STAGED + "*")):
                file.unlink()
            flush_directory(self.at)  # none comes back after what follows

    def staged(self, place: int) -> Path:
        """The file of a part while ranks write it, by the part's place among the parts of all files."""
        return self.at / f"{_STAGED}{place}"

    def run(self) -> tuple[str, bool]:
        """The name of this run, and whether it is new."""
        if new := not (self.at / _RUN).is_file():
            write_whole(self.at / _RUN, uuid.uuid4().hex.encode())
        return read_whole(self.at / _RUN).decode(), new

    @property
    def uploads(self) -> Path:
        """The file in which a `fp8ckpt.stores.upload.Destination` records which uploads are ours."""
        return self.at / _UPLOADS

    def seen(self, where: str) -> dict[str, list[There]] | None:
        """The parts of each file, if objects at ``where`` may be ours; otherwise None."""
        if not (self.at / _SEEN).is_file():
            return None
        of, seen = json.loads(read_whole(self.at / _SEEN))
        return {name: [There(*part) for part in parts] for name, parts in seen.items()} if of == where else None

    def keep_seen(self, where: str, seen: Mapping[str, list[There]]) -> None:
        """Record the parts, before the first object appears."""
        write_whole(self.at / _SEEN, json.dumps([where, seen]).encode())


def _record(extent: int, facts: Facts, sent: Sent | None) -> bytes:
    text = json.dumps([extent, facts, sent]).encode()
    return b"\n" + _check(text) + b" " + text + b"\n"  # the first newline ends an incomplete line


def _check(text: bytes) -> bytes:
    """The checksum before a record, so that a damaged record is not trusted."""
    return hashlib.sha256(text).hexdigest()[:16].encode()

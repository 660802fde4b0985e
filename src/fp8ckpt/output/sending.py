"""An output that goes to a store: what is kept of it here while its parts are sent, and how its files appear there.

Parts are sent as they are made, and no object is visible before all are there. Then the uploads are completed, file by
file, with the files that identify a checkpoint last. If a run is interrupted in that, a later run with the same parts
continues.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from fp8ckpt.errors import Fp8CheckpointError, ResumeMismatchError, StorageError
from fp8ckpt.output import extents
from fp8ckpt.output.extents import Extent
from fp8ckpt.output.places import Kept, Part, Place, Sent
from fp8ckpt.output.standing import OUTPUT
from fp8ckpt.output.state import State
from fp8ckpt.stores.upload import AT_ONCE, LOCK, Destination, There


class Sending:
    """A place in a store, ``far``, with the methods of `fp8ckpt.output.goal.Directory`; ``partial`` is on this disk."""

    in_parts = True
    at_once = AT_ONCE

    def __init__(self, far: Destination, state: State, partial: Path) -> None:
        self._far = far
        self._state = state
        self._directory = partial / OUTPUT
        self._partial = partial
        self._uploads: Collection[str] = ()

    @property
    def where(self) -> str:
        return self._far.where

    @property
    def extent(self) -> int:
        return extents.PART

    @property
    def told(self) -> Mapping[str, str]:
        return {"destination": self.where.rstrip("/")}

    @property
    def beside(self) -> str:
        return f" and {self.where.rstrip('/')}/{LOCK}"

    def place(self, extent: Extent) -> Place:
        return Part(self._far, extent) if extent.whole else Kept(self._directory / extent.layout.name, extent)

    def begin(self, in_parts: Collection[str]) -> None:
        self._uploads = in_parts
        run, new = self._state.run()
        try:
            self._far.hold(run)
        except Fp8CheckpointError:  # the place is another run's, or we may not write there
            if new:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        if self.seen() is None:
            self._far.begin(in_parts)
            self._drop_lost()

    def _drop_lost(self) -> None:
        """Drop the records of parts that the store lacks. If a part was sent again, its last record counts."""
        recorded = self._state.records()
        last = {(sent.name, sent.number): sent.etag for _, sent in recorded.values() if sent is not None}
        lost = {part for part, etag in last.items() if etag and self._far.there(part[0]).get(part[1]) != etag}
        if lost:
            self._state.keep_only({i: one for i, one in recorded.items() if one[1] is None or one[1][:2] not in lost})

    def refuse_existing(self) -> None:
        if self.seen() is None:
            self._far.refuse_existing()

    def seen(self) -> dict[str, list[There]] | None:
        """The parts of each file, if objects at the destination may be ours: a run was interrupted between the first
        and the last of them.
        """
        return self._state.seen(self._far.where)

    @cached_property
    def _seen_before(self) -> dict[str, list[There]] | None:
        return self.seen()

    def send(self, name: str, number: int, data: bytes) -> There:
        """Send a part of a file. Raises `ResumeMismatchError` if an interrupted run was completing other parts."""
        if (seen := self._seen_before) is None:
            return self._far.send(name, number, data)
        if hashlib.md5(data).hexdigest() != seen[name][number - 1].md5:
            raise ResumeMismatchError.of_other_weights(file=name, where=self._far.where, partial=self._partial)
        return seen[name][number - 1]

    def publish(self) -> None:
        """Send what is still here, and make all files appear."""
        found = [path for path in self._directory.rglob("*") if path.is_file()]
        names = sorted((path.relative_to(self._directory).as_posix() for path in found), key=_last)
        seen = self.seen()
        if new := seen is None:
            self._far.refuse_existing()
            seen = self._send_rest([name for name in names if name.endswith(".safetensors")])
            self._state.keep_seen(self._far.where, seen)
        etags = {name: [part.etag for part in parts] for name, parts in seen.items()}
        if not new:
            self._far.refuse_others(etags)
        for name, of_parts in etags.items():
            self._far.finish(name, of_parts)
        small = [name for name in names if name not in etags]
        first = [name for name in small if not any(_last(name)[:2])]
        self._far.each(first, lambda name: self._far.put(name, self._directory / name))
        for name in small[len(first) :]:
            self._far.put(name, self._directory / name)
        self._far.release()

    def _send_rest(self, names: Collection[str]) -> dict[str, list[There]]:
        """Send what is kept here, and return all parts of all files."""
        self._far.begin(names)
        parts: dict[str, dict[int, Sent]] = {name: {} for name in names}
        for _, sent in self._state.records().values():
            if sent is not None:
                parts[sent.name][sent.number] = sent

        def send(sent: Sent) -> None:
            data = _read(self._directory / sent.name, sent.start, sent.stop)
            parts[sent.name][sent.number] = sent._replace(**self._far.send(sent.name, sent.number, data)._asdict())

        kept = [sent for of_file in parts.values() for sent in of_file.values() if not sent.etag]
        self._far.each(kept, send)
        return {name: [There(*of_file[k][-2:]) for k in range(1, len(of_file) + 1)] for name, of_file in parts.items()}

    def give_up(self) -> None:
        with suppress(StorageError):  # the caller hears of the first error
            self._far.give_up(self._uploads)
        self._far.release()


def _read(file: Path, start: int, stop: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


def _last(name: str) -> tuple[bool, bool, str]:
    """A sort key that puts the files which identify a checkpoint last: the index, then the configuration."""
    return name == "config.json", name.endswith(".index.json"), name

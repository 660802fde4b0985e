"""Where an output goes, and how it appears there once it is complete: a directory on this machine, by a rename. A store
(`fp8ckpt.output.sending.Sending`) has the same methods, and `fp8ckpt.output.partial.PartialOutput` never asks which.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from fp8ckpt.errors import OutputExistsError
from fp8ckpt.output import extents
from fp8ckpt.output.extents import Extent
from fp8ckpt.output.files import OutputFile, flush_directory, writing_to
from fp8ckpt.output.places import Place
from fp8ckpt.output.standing import OUTPUT, entries
from fp8ckpt.output.state import LOCK, STATE, State, is_state


class Directory:
    """The directory ``where``; the output folder in ``partial`` is renamed to it.

    ``in_parts``: whether an extent, once written, can only be rewritten as a whole. ``at_once``: the number of extents
    that are flushed concurrently, beside the work; 0 flushes each within it. ``told``: what a fingerprint says of a
    goal whose ``partial`` has only its last name. ``beside``: what a run leaves at the goal, beside ``partial``.
    """

    in_parts = False
    at_once = 0
    told: Mapping[str, str] = {}
    beside = ""

    def __init__(self, where: Path, partial: Path, state: State) -> None:
        self.where = where
        self._partial = partial
        self._state = state

    @property
    def extent(self) -> int:
        """Bytes of an extent."""
        return extents.EXTENT

    def place(self, extent: Extent) -> Place:
        """Where the bytes of an extent are written."""
        return OutputFile(self._partial / OUTPUT / extent.layout.name)

    def begin(self, in_parts: Collection[str]) -> None:
        """Begin or resume an output; ``in_parts``: the files that a store gets extent by extent."""

    def refuse_existing(self) -> None:
        """Raise `OutputExistsError` if anything stands there, a broken link included; in a store, anything but the
        objects of an interrupted run of ours.
        """
        if os.path.lexists(self.where) or self.where.name == "..":
            self._tidy()
            raise OutputExistsError.of_destination(file=str(self.where))

    def _tidy(self) -> None:
        """Remove what a run left that died between its last step, the rename, and its end: our state and nothing else,
        or an empty folder.
        """
        with suppress(OSError):  # the destination exists, and the caller hears of that
            found = {entry: status.st_mode for entry, status in entries(self._partial)}
            if not found:
                self._partial.rmdir()
            if not stat.S_ISDIR(found.pop(STATE, 0)):
                return
            if not all(stat.S_ISREG(mode) and is_state(entry) for entry, mode in found.items()):
                return
            if (held := self._state.locked(LOCK)) is not None:
                shutil.rmtree(self._partial, ignore_errors=True)
                os.close(held)

    def publish(self) -> None:
        """Make the files appear, which are complete and flushed."""
        output = self._partial / OUTPUT
        with writing_to(output):
            for directory, _, _ in os.walk(output):
                flush_directory(Path(directory))
            self.refuse_existing()  # rename() would replace an empty directory
            output.rename(self.where)
            flush_parent(self.where)

    def give_up(self) -> None:
        """Remove what the goal has of an output that can never become complete."""


def flush_parent(path: Path) -> None:
    """Return when a name is on disk, in the folder that the user named, which may be a link."""
    flush_directory(Path(os.path.realpath(path.parent, strict=True)))

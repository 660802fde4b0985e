"""What stands where an output would be written: ours, as a run left it, or someone else's. No link is followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from fp8ckpt.errors import OutputExistsError, ResumeMismatchError
from fp8ckpt.output.files import writing_to
from fp8ckpt.output.state import LOCK, STATE, is_state

OUTPUT = "output"  # the folder that is renamed to the destination


def refuse_foreign(partial: Path, names: Collection[str]) -> None:
    """Raise if what stands at ``partial`` is not ours, or holds more than we wrote. ``names``: the files of the output.
    Creates and changes nothing.
    """
    if not os.path.lexists(partial):
        return
    if not stat.S_ISDIR(os.lstat(partial).st_mode):
        raise OutputExistsError.of_no_directory(file=str(partial))
    if os.path.ismount(partial):
        raise OutputExistsError.of_mount(file=str(partial))
    top = set(os.listdir(partial))
    if top and not (STATE in top and stat.S_ISDIR(os.lstat(partial / STATE).st_mode)):
        raise OutputExistsError.of_foreign(file=str(partial), holds=min(top), state=STATE)
    ours = {f"{OUTPUT}/{name}" for name in names}
    folders = {parent.as_posix() for name in (*ours, f"{STATE}/{LOCK}") for parent in PurePosixPath(name).parents}
    for entry, status in entries(partial):
        if stat.S_ISDIR(status.st_mode):
            known = entry in folders
        else:
            known = stat.S_ISREG(status.st_mode) and (entry in ours or is_state(entry))
        shown = entry.removeprefix(OUTPUT + "/")
        if not known:
            raise ResumeMismatchError.of_strange(file=str(partial), holds=shown)
        if status.st_nlink > 1 and stat.S_ISREG(status.st_mode):
            raise ResumeMismatchError.of_linked(file=str(partial), holds=shown)


def identities(partial: Path) -> set[tuple[int, int]]:
    """The device and inode numbers of ``partial``, and of everything in it."""
    with writing_to(partial):
        found = [os.lstat(partial)] if os.path.lexists(partial) else []
        if found and stat.S_ISDIR(found[0].st_mode):
            found += [status for _, status in entries(partial)]
    return {(one.st_dev, one.st_ino) for one in found}


def entries(directory: Path, folder: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Yield everything in a directory, by its path in it; links are not followed."""
    with os.scandir(directory / folder) as scanned:
        found = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in scanned)
    for name, status in found:
        yield folder + name, status
        if stat.S_ISDIR(status.st_mode):
            yield from entries(directory, f"{folder}{name}/")

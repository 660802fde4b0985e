"""What the machine, its packages or a store do not give. No remedy can lose anything."""

from __future__ import annotations

import errno
from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError

# What helps, by what the operating system says: anywhere, where something is read, and where it is written.
_UNREACHABLE = "see that the file server answers, and run it again"
_ANYWHERE = {
    errno.EIO: "check the disk",
    errno.ESTALE: "the file server has something else there by now: run it again",
    **dict.fromkeys((errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN), _UNREACHABLE),
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the limit on open files",
    errno.ELOOP: "mend the links",
}
_READING = {**_ANYWHERE, **dict.fromkeys((errno.EACCES, errno.EPERM), "get the permission to read it")}
_WRITING = {
    **_ANYWHERE,
    errno.ENOSPC: "free some space (or inodes, if there is space)",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EACCES: "get the permission, or choose another place",
    errno.EPERM: "get the permission, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose a place below a directory",
    errno.ELOOP: "mend the links, or choose another place",
    errno.EFBIG: "raise the limit on the size of files, or choose a file system that takes larger ones",
}


class UnsupportedSystemError(Fp8CheckpointError, ImportError):
    """The operating system does not promise of files what is needed."""

    expected = "Linux or macOS"
    remedy = "on Windows, run it in WSL, the Windows Subsystem for Linux"

    @classmethod
    def of(cls, system: str) -> Self:
        return cls(f"fp8ckpt does not run on {system}")


class MissingPackageError(Fp8CheckpointError, ImportError):
    """A package is needed that only an extra of this one brings."""

    @classmethod
    def of(cls, doing: str, file: object, package: str, install: str) -> Self:
        return cls(f"{doing} needs {package}", file=file, remedy=f"pip install {install}")


class UnsupportedStoreError(Fp8CheckpointError, ValueError):
    """The URL of a store that is not known, or that cannot do what is asked of it."""


class StorageError(Fp8CheckpointError, OSError):
    """The disk refused a read or a write, and the message has the operating system's reason; or there is a FIFO, a
    device, a folder, or a link that leads away, where a file should be.
    """

    @classmethod
    def of_reading(cls, error: OSError, file: object, failed: str = "cannot be opened") -> Self:
        remedy = _READING.get(error.errno or 0, "restore the file")
        return cls(f"{failed}: {error.strerror}", file=file, remedy=remedy)

    @classmethod
    def of_writing(cls, error: OSError, file: object) -> Self:
        """The message has all of the path: its last part may be ours, and unknown to the user."""
        otherwise = "see that files can be made there and that nothing else changes them, and run it again"
        remedy = _WRITING.get(error.errno or 0, otherwise)
        return cls(f"writing failed: {error.strerror}", file=str(file), remedy=remedy)


class NoRoomError(StorageError):
    """The disk has less room than the output needs. Nothing was written."""

    remedy = "free some space, or choose another destination"

    @classmethod
    def of(cls, where: str, needed: int, free: int) -> Self:
        """``where``: a directory of the file system; it needs so many bytes, and so many are free."""
        return cls(f"the output needs {needed:,} bytes more, and {free:,} are free in its file system", file=where)

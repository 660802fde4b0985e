"""What a disk or a store does not give or take. No remedy can lose anything."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Protocol, Self

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
_URL = "check the URL"


class URL(Protocol):
    """What a user gave: the URL of a store, without secrets where it is shown."""

    @property
    def scheme(self) -> str: ...

    @property
    def rest(self) -> str: ...


class UnsupportedStoreError(Fp8CheckpointError, ValueError):
    """The URL of a store that is not known, or that cannot do what is asked of it."""

    @classmethod
    def of_form(cls, given: URL) -> Self:
        found, expected = "it looks like a store's URL, and is none", "scheme://..., as s3://bucket/prefix"
        return cls(found, file=str(given), expected=expected, remedy="for a local path, write ./ before it")

    @classmethod
    def of_kind(cls, where: str, what: str, expected: str, remedy: str | None = None) -> Self:
        """``what`` its scheme leads to, which the rest of the URL does not name."""
        return cls(f"it is no {what}", file=where, expected=expected, remedy=remedy)

    @classmethod
    def of_slashes(cls, where: str, bucket: str) -> Self:
        found, remedy = "two slashes follow each other in its prefix", "write one slash"
        remedy += "; objects whose keys have an empty part are not read"
        return cls(found, file=where, expected=f"s3://{bucket}/prefix", remedy=remedy)

    @classmethod
    def of_scheme(cls, where: str, scheme: str) -> Self:
        remedy = "for a folder of that name, give its absolute path"
        return cls(f"no store is known as {scheme}://", file=where, remedy=remedy)

    @classmethod
    def of_local(cls, given: URL) -> Self:
        return cls("it is on this machine", file=str(given), expected="a path", remedy=_itself(given))

    @classmethod
    def of_output(cls, given: URL, expected: str) -> Self:
        """A store that no output goes to."""
        remedy = "write to a local directory, and copy it there with the store's own client"
        if given.scheme == "hf":
            remedy = "write to a local directory, and upload it: hf upload"
        elif given.scheme in ("file", "local"):
            remedy = _itself(given)
        return cls(f"fp8ckpt writes nothing to {given.scheme}://", file=str(given), expected=expected, remedy=remedy)


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

    @classmethod
    def of_kind(cls, file: object, kind: str, remedy: str = "move it away") -> Self:
        """``kind``: what is there, and no file."""
        return cls(f"it is {kind}", file=file, expected="a file", remedy=remedy)

    @classmethod
    def of_link(cls, file: str) -> Self:
        found, expected = "it is a link that leads out of the directory", "a file, or a link to one inside"
        remedy = "put the file itself there, if you know who made the link"
        return cls(found, file=file, expected=expected, remedy=remedy)

    @classmethod
    def of_absent(cls, file: str) -> Self:
        return cls("there is no such file", file=file, remedy="restore the file")

    # ---------------------------------------------------------------- stores that are far away

    @classmethod
    def of_no_object(cls, file: str, where: str) -> Self:
        return cls("there is no such object", file=file, expected=f"one below {where}")

    @classmethod
    def of_request(cls, where: str, error: ValueError) -> Self:
        """A URL that is none, or a token that no header can hold: nothing was asked."""
        found = f"no request can be made of it ({type(error).__name__})"
        return cls(found, file=where, remedy=f"{_URL}, where its server leads to, and the token")

    @classmethod
    def of_client(cls, where: str, client: str, error: Exception, examples: str = "") -> Self:
        """A client that refuses, and may say with a secret why; ``examples`` of what sets it up."""
        remedy = f"see how {client if examples else 'it'} is set up here{examples}"
        return cls(f"{client} refuses ({type(error).__name__})", file=where, remedy=remedy)

    @classmethod
    def of_instance(cls, where: str) -> Self:
        """As Databricks', whose client is made with an instance and a token."""
        remedy = "copy it here, or mount it, and give the path"
        return cls("its client takes more than a URL", file=where, remedy=remedy)

    @classmethod
    def of_offline(cls, where: str) -> Self:
        remedy = "unset HF_HUB_OFFLINE, or give a local copy"
        return cls("huggingface_hub is told to stay offline", file=where, remedy=remedy)

    @classmethod
    def of_certificate(cls, where: str) -> Self:
        remedy = "name the certificates of who signed its own in SSL_CERT_FILE (for s3://, in AWS_CA_BUNDLE)"
        return cls("the server's certificate is not trusted", file=where, remedy=remedy)

    @classmethod
    def of_redirects(cls, file: str, most: int) -> Self:
        return cls(f"more than {most} redirects", file=file, remedy=_URL)

    @classmethod
    def of_scheme(cls, file: str, where: str, scheme: str) -> Self:
        """A redirect to what anybody on the way can read, or change, or to another protocol."""
        found, expected = f"{where} leads from https to {scheme}", "a redirect to https"
        return cls(found, file=file or None, expected=expected, remedy="ask who runs the server")

    @classmethod
    def of_regions(cls, where: str, remedy: str) -> Self:
        return cls("the store leads to another region, over and over", file=where, remedy=remedy)

    @classmethod
    def of_page(cls, where: str) -> Self:
        return cls("its index page is longer than any", file=where, remedy=_URL)

    @classmethod
    def of_answer(cls, file: str | None, answered: str, remedy: str) -> Self:
        """``answered``: who, and what."""
        return cls(answered, file=file or None, remedy=remedy)

    @classmethod
    def of_version(cls, file: str, where: str) -> Self:
        found = f"{where} gives no size, or no version (ETag, Last-Modified)"
        return cls(found, file=file, remedy="fetch the files: what changes under way could not be seen")

    @classmethod
    def of_ranges(cls, file: str, where: str) -> Self:
        return cls(f"{where} serves no ranges", file=file, remedy="fetch the files, or serve them with ranges")

    @classmethod
    def of_attempts(cls, file: str | None, doing: str, count: int, error: Exception, remedy: str) -> Self:
        """``error``: what the last attempt came to."""
        return cls(f"{doing} failed at attempt {count}: {error}", file=file, remedy=remedy)

    @classmethod
    def of_aborted(cls, file: str, where: str) -> Self:
        remedy = "begin anew, with another destination"
        return cls(f"its upload to {where} was aborted", file=file, remedy=remedy)


class NoRoomError(StorageError):
    """The disk has less room than the output needs. Nothing was written."""

    remedy = "free some space, or choose another destination"

    @classmethod
    def of(cls, where: str, needed: int, free: int) -> Self:
        """``where``: a directory of the file system; it needs so many bytes, and so many are free."""
        return cls(f"the output needs {needed:,} bytes more, and {free:,} are free in its file system", file=where)


def _itself(given: URL) -> str:
    return f"give the path itself: {Path('/', given.rest)}"

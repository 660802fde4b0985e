"""What a disk or a store refuses. No remedy can lose anything."""

from __future__ import annotations

import errno
from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Says

# Remedies by the operating system's errno: for any access, for reading, and for writing.
_UNREACHABLE = "check that the file server answers, and run it again"
_ANYWHERE = {
    errno.EIO: "check the disk",
    errno.ESTALE: "the file was replaced on the file server: run it again",
    **dict.fromkeys((errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN), _UNREACHABLE),
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the limit on open files",
    errno.ELOOP: "correct the links, which form a circle",
}
_READING = {**_ANYWHERE, **dict.fromkeys((errno.EACCES, errno.EPERM), "get the permission to read it")}
_WRITING = {
    **_ANYWHERE,
    errno.ENOSPC: "free some space (or inodes, if there is space)",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EACCES: "get the permission to write there, or choose another place",
    errno.EPERM: "get the permission to write there, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose a place below a directory",
    errno.ELOOP: "correct the links, which form a circle, or choose another place",
    errno.EFBIG: "raise the limit on the size of files, or choose a file system that takes larger ones",
}
_URL = "check the URL"
_ITSELF = "give the path itself: /{rest}"
_TO_WRITE = {"hf": "write to a local directory, and upload it: hf upload", "file": _ITSELF, "local": _ITSELF}
_TO_COPY = "write to a local directory, and copy it there with the store's own client"


class UnsupportedStoreError(Fp8CheckpointError, ValueError):
    """The URL of a store that is not known, or that cannot do what is requested."""

    # fmt: off
    of_form = Says("it looks like a store's URL, but is not one", "scheme://..., such as s3://bucket/prefix",
        "for a local path, write ./ before it")
    of_directory = Says("it is not the URL of a directory", "{scheme}://host/directory")
    of_hub = Says("it is not a model of the Hub", "hf://org/name or hf://org/name@revision")
    of_bucket = Says("it is not a bucket and a prefix", "s3://bucket/prefix",
        "give credentials and endpoint as boto3 takes them (AWS_PROFILE, AWS_ENDPOINT_URL, ...)")
    of_slashes = Says("two slashes follow each other in its prefix", "s3://{bucket}/prefix",
        "write one slash; objects whose keys have an empty part are not read")
    of_scheme = Says("no store is known as {scheme}://", remedy="for a folder of that name, give its absolute path")
    of_local = Says("it is on this machine", "a path", _ITSELF)
    # fmt: on

    @classmethod
    def of_output(cls, url: object, scheme: str, rest: str, expected: str) -> Self:
        """A store that outputs cannot go to."""
        remedy = _TO_WRITE.get(scheme, _TO_COPY).format(rest=rest)
        return cls(f"fp8ckpt cannot write to {scheme}://", file=str(url), expected=expected, remedy=remedy)


class StorageError(Fp8CheckpointError, OSError):
    """A read or a write failed, with the operating system's reason in the message; or a FIFO, a device, a folder, or a
    link that leads away is in the place of a file.
    """

    # fmt: off
    of_kind = Says("it is {kind}", "a file", "move it away")
    of_any_link = Says("it is a link", "a file", "move it away, and run it again")
    of_link = Says("it is a link that leads out of the directory", "a file, or a link to one inside",
        "if you trust the link, put the file itself in its place")
    of_absent = Says("there is no such file", remedy="restore the file")

    # ---------------------------------------------------------------- remote stores
    of_another_hand = Says("it was changed after it was written", "{size} bytes",
        "find out what changes it, and run it again")
    of_web_page = Says("the endpoint is not such a store", "a listing of objects",
        "check the endpoint ({variable})")
    of_no_object = Says("there is no such object", "an object below {where}")
    of_request = Says("no request can be made with it ({error.__class__.__name__})",
        remedy=f"{_URL}, the redirects of its server, and the token")
    # A client may say with a secret why it refuses.
    of_client = Says("its client raised an error ({error.__class__.__name__})",
        remedy="check how the client is configured on this machine")
    of_boto3 = Says("boto3 raised an error ({error.__class__.__name__})",
        remedy="check how boto3 is configured on this machine (AWS_PROFILE, AWS_ENDPOINT_URL, ...)")
    of_instance = Says("its client needs more than a URL",
        remedy="copy it to this machine, or mount it, and give the path")
    of_offline = Says("huggingface_hub is in offline mode", remedy="unset HF_HUB_OFFLINE, or give a local copy")
    of_certificate = Says("the server's certificate is not trusted",
        remedy="set SSL_CERT_FILE (for s3://, AWS_CA_BUNDLE) to a file with its issuer's certificates")
    of_redirects = Says("more than {most} redirects", remedy=_URL)
    of_http = Says("{where} redirects from https to {scheme}", "a redirect to https",
        "ask the administrator of the server")
    of_regions = Says("the store redirects to other regions without end", remedy="{remedy}")
    of_page = Says("its index page is too long", remedy=_URL)
    of_answer = Says("{who} answered {answer}", remedy="{remedy}")
    of_version = Says("{where} states no size, or no version (ETag, Last-Modified)",
        remedy="fetch the files first: a change during the read could not be noticed")
    of_ranges = Says("{where} does not serve byte ranges",
        remedy="fetch the files first, or serve them with byte ranges")
    of_attempts = Says("{doing} failed at attempt {count}: {error}", remedy="{error.remedy}")
    of_aborted = Says("its upload to {where} was aborted", remedy="start again with another destination")
    # fmt: on

    @classmethod
    def of_reading(cls, error: OSError, file: object, failed: str = "cannot be opened") -> Self:
        remedy = _READING.get(error.errno or 0, "restore the file")
        return cls(f"{failed}: {error.strerror}", file=file, remedy=remedy)

    @classmethod
    def of_writing(cls, error: OSError, file: object) -> Self:
        """The message has the whole path: its last part may be ours, and unknown to the user."""
        otherwise = "check that files can be created there and that nothing else changes them, and run it again"
        remedy = _WRITING.get(error.errno or 0, otherwise)
        return cls(f"writing failed: {error.strerror}", file=str(file), remedy=remedy)


class NoRoomError(StorageError):
    """The disk has less space than the output needs. Nothing was written."""

    remedy = "free some space, or choose another destination"

    # ``where``: a directory of the file system; ``needed`` and ``free`` bytes there.
    of = Says("the output needs {needed:,} bytes more, and {free:,} are free in its file system")

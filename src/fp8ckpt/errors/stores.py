"""What a disk or a store refuses. No remedy can lose anything."""

from __future__ import annotations

import errno
from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Says

# Remedies by the operating system's errno: for any access, for reading, and for writing.
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
_ITSELF = "give the path itself: /{rest}"
_TO_WRITE = {"hf": "write to a local directory, and upload it: hf upload", "file": _ITSELF, "local": _ITSELF}
_TO_COPY = "write to a local directory, and copy it there with the store's own client"


class UnsupportedStoreError(Fp8CheckpointError, ValueError):
    """The URL of a store that is not known, or that cannot do what is requested."""

    # fmt: off
    of_form = Says("it looks like a store's URL, and is none", "scheme://..., as s3://bucket/prefix",
        "for a local path, write ./ before it")
    of_directory = Says("it is no directory", "{scheme}://host/directory")
    of_hub = Says("it is no model of the Hub", "hf://org/name or hf://org/name@revision")
    of_bucket = Says("it is no bucket and prefix", "s3://bucket/prefix",
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
        return cls(f"fp8ckpt writes nothing to {scheme}://", file=str(url), expected=expected, remedy=remedy)


class StorageError(Fp8CheckpointError, OSError):
    """A read or a write failed, with the operating system's reason in the message; or a FIFO, a device, a folder, or a
    link that leads away is in the place of a file.
    """

    # fmt: off
    of_kind = Says("it is {kind}", "a file", "move it away")
    of_any_link = Says("it is a link", "a file", "move it away, and run it again")
    of_link = Says("it is a link that leads out of the directory", "a file, or a link to one inside",
        "put the file itself there, if you know who made the link")
    of_absent = Says("there is no such file", remedy="restore the file")

    # ---------------------------------------------------------------- remote stores
    of_another_hand = Says("it was changed after it was written", "{size} bytes",
        "see what changes it, and run it again")
    of_web_page = Says("what answers there is no such store", "a listing", "check the endpoint ({variable})")
    of_no_object = Says("there is no such object", "one below {where}")
    of_request = Says("no request can be made of it ({error.__class__.__name__})",
        remedy=f"{_URL}, where its server leads to, and the token")
    # A client may say with a secret why it refuses.
    of_client = Says("its client refuses ({error.__class__.__name__})", remedy="see how it is set up here")
    of_boto3 = Says("boto3 refuses ({error.__class__.__name__})",
        remedy="see how boto3 is set up here (AWS_PROFILE, AWS_ENDPOINT_URL, ...)")
    of_instance = Says("its client takes more than a URL", remedy="copy it here, or mount it, and give the path")
    of_offline = Says("huggingface_hub is told to stay offline", remedy="unset HF_HUB_OFFLINE, or give a local copy")
    of_certificate = Says("the server's certificate is not trusted",
        remedy="name the certificates of who signed its own in SSL_CERT_FILE (for s3://, in AWS_CA_BUNDLE)")
    of_redirects = Says("more than {most} redirects", remedy=_URL)
    of_http = Says("{where} leads from https to {scheme}", "a redirect to https", "ask who runs the server")
    of_regions = Says("the store leads to another region, over and over", remedy="{remedy}")
    of_page = Says("its index page is longer than any", remedy=_URL)
    of_answer = Says("{who} answered {answer}", remedy="{remedy}")
    of_version = Says("{where} gives no size, or no version (ETag, Last-Modified)",
        remedy="fetch the files: what changes under way could not be seen")
    of_ranges = Says("{where} serves no ranges", remedy="fetch the files, or serve them with ranges")
    of_attempts = Says("{doing} failed at attempt {count}: {error}", remedy="{error.remedy}")
    of_aborted = Says("its upload to {where} was aborted", remedy="begin anew, with another destination")
    # fmt: on

    @classmethod
    def of_reading(cls, error: OSError, file: object, failed: str = "cannot be opened") -> Self:
        remedy = _READING.get(error.errno or 0, "restore the file")
        return cls(f"{failed}: {error.strerror}", file=file, remedy=remedy)

    @classmethod
    def of_writing(cls, error: OSError, file: object) -> Self:
        """The message has the whole path: its last part may be ours, and unknown to the user."""
        otherwise = "see that files can be made there and that nothing else changes them, and run it again"
        remedy = _WRITING.get(error.errno or 0, otherwise)
        return cls(f"writing failed: {error.strerror}", file=str(file), remedy=remedy)


class NoRoomError(StorageError):
    """The disk has less space than the output needs. Nothing was written."""

    remedy = "free some space, or choose another destination"

    # ``where``: a directory of the file system; ``needed`` and ``free`` bytes there.
    of = Says("the output needs {needed:,} bytes more, and {free:,} are free in its file system")

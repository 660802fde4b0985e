"""A finished directory goes to a store: weights in parts, everything else after them, what makes a checkpoint last.

Each file of weights is one multipart upload, its parts those in which it was written; none of it is seen before all
parts of all files are there. Then the files are completed, then the small ones are put, and the index and the
configuration at the end: until then, nothing there looks like a checkpoint.

A run that was cut off is gone on with: a part that is there already, and whose ETag is the MD5 of what is to be there,
is not sent again. So whatever an upload holds that another run left, the result holds our bytes. The store compares
the MD5 of each part and of each file with what it got.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from fp8ckpt.errors import OutputExistsError, UnsupportedStoreError
from fp8ckpt.stores.address import Address
from fp8ckpt.stores.remote import ATTEMPTS, attempted
from fp8ckpt.workers import share

T = TypeVar("T")

_AT_ONCE = 3  # parts; each is in memory


class Uploads(Protocol):
    """The client of a store that takes files in parts. Each call is one attempt, as `fp8ckpt.stores.remote.Objects`."""

    @property
    def where(self) -> str:
        """The place as messages show it."""

    def is_empty(self) -> bool:
        """Whether there is no object below the place."""

    def etag(self, name: str) -> str | None:
        """Of an object that is there."""

    def begun(self) -> Mapping[str, str]:
        """Uploads that were not finished, by the name of the object."""

    def begin(self, name: str) -> str:
        """Begin an upload."""

    def parts(self, name: str, upload: str) -> Mapping[int, str]:
        """The ETags of the parts that are there, by their numbers, from 1 on."""

    def put_part(self, name: str, upload: str, number: int, data: bytes) -> str:
        """Send a part, and return its ETag."""

    def finish(self, name: str, upload: str, etags: Sequence[str]) -> None:
        """Make an object of all parts."""

    def etag_of_parts(self, etags: Sequence[str]) -> str:
        """The ETag of an object of these parts."""

    def put(self, name: str, data: bytes) -> None:
        """Make an object at once."""


class _Part(NamedTuple):
    name: str
    number: int
    start: int
    stop: int


class Destination:
    """The place of an output in a store."""

    def __init__(self, client: Uploads) -> None:
        self._client = client

    @property
    def where(self) -> str:
        """The URL, without secrets."""
        return self._client.where

    def refuse_existing(self) -> None:
        """Raise `OutputExistsError` where any object is there."""
        if not self._do("looking at", self._client.is_empty):
            remedy = "choose another one, or move them away"
            raise OutputExistsError("there are objects below it", file=self.where, expected="none", remedy=remedy)

    def upload(
        self, directory: Path, names: Sequence[str], part: int, before_any_is_seen: Callable[[], None], *, again: bool
    ) -> None:
        """Upload files of a directory; those of weights in parts, the others after them in their order.

        ``part``: bytes. ``again``: some may be there already, whole, from a run that was cut off.
        """
        weights = {name: _cut(directory, name, part) for name in names if name.endswith(".safetensors")}
        if again:
            weights = {name: parts for name, parts in weights.items() if not self._is_there(directory, name, parts)}
        uploads, there = {}, {}
        begun = self._do("looking at", self._client.begun)
        for name in weights:
            if (upload := begun.get(name)) is not None:
                there[name] = self._do("looking at", self._client.parts, name, upload)
            uploads[name] = upload or self._do("writing", self._client.begin, name)
        etags: dict[str, dict[int, str]] = {name: {} for name in weights}

        def send(piece: _Part) -> None:
            data = _read(directory, piece)
            etag = _md5(data)
            if there.get(piece.name, {}).get(piece.number) != etag:
                doing = f"writing bytes {piece.start}-{piece.stop - 1} of"
                etag = self._do(doing, self._client.put_part, piece.name, uploads[piece.name], piece.number, data)
            etags[piece.name][piece.number] = etag

        share((piece for parts in weights.values() for piece in parts), [send] * _AT_ONCE)
        before_any_is_seen()
        for name, upload in uploads.items():
            self._do("writing", self._client.finish, name, upload, [etag for _, etag in sorted(etags[name].items())])
        for name in names:
            if not name.endswith(".safetensors"):
                self._do("writing", self._client.put, name, (directory / name).read_bytes())

    def _is_there(self, directory: Path, name: str, parts: Sequence[_Part]) -> bool:
        """Whether an object is the one that a run before made. Raises `OutputExistsError` where it is another one."""
        found = self._do("looking at", self._client.etag, name)
        if found is None:
            return False
        if found != self._client.etag_of_parts([_md5(_read(directory, piece)) for piece in parts]):
            remedy = "choose another destination, or move away what is there"
            other = f"there is another object of this name below {self.where}"
            raise OutputExistsError(other, file=name, expected="what the run before made", remedy=remedy)
        return True

    def _do(self, doing: str, step: Callable[..., T], *arguments: Any) -> T:
        name = arguments[0] if arguments else None
        return attempted(partial(step, *arguments), ATTEMPTS, f"{doing} {self.where}", name)


def _cut(directory: Path, name: str, part: int) -> list[_Part]:
    size = (directory / name).stat().st_size
    starts = range(0, size, part)
    return [_Part(name, number, start, min(start + part, size)) for number, start in enumerate(starts, 1)]


def _read(directory: Path, piece: _Part) -> bytes:
    with (directory / piece.name).open("rb") as stream:
        stream.seek(piece.start)
        return stream.read(piece.stop - piece.start)


def _md5(data: bytes) -> str:
    """As the ETag of a part."""
    return f'"{hashlib.md5(data).hexdigest()}"'


def destination_of(address: Address) -> Destination:
    """The place of a URL. Raises `UnsupportedStoreError` where a store takes no files in parts."""
    if address.scheme in ("s3", "s3a"):
        from fp8ckpt.stores.s3 import S3Objects

        return Destination(S3Objects(address._replace(scheme="s3")))
    remedy = "write to a local directory, and copy it there with the store's own client"
    if address.scheme == "hf":
        remedy = "write to a local directory, and upload it: hf upload"
    if address.scheme in ("file", "local"):
        remedy = f"give the path itself: {Path('/', address.rest)}"
    raise UnsupportedStoreError(
        f"fp8ckpt writes nothing to {address.scheme}://",
        file=str(address),
        expected="a local path, or s3://bucket/prefix",
        remedy=remedy,
    )

"""How an output gets into a store: weight files part by part while they are made, the files that identify a checkpoint
last.

Each weight file is one multipart upload, and its parts are the extents in which it is made; no object is visible before
all parts of all files are there. Then the uploads are completed, then the small files are put, and last the index and
the configuration: until then, nothing there looks like a checkpoint.

A run resumes an interrupted one. The uploads that a run begins are recorded here; any other upload belongs to someone
else and is left alone. A part is not sent again if the store has it and its ETag is the MD5 of the bytes to send. The
store checks the MD5 of each part and each file that it receives. A store that encrypts may give other ETags; then a
part counts as sent if the state says so, and a file as ours if it names our run as the one that began its upload.

The run that writes holds the object `LOCK`, which names the run and is created only if absent (``If-None-Match``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fp8ckpt.errors import OutputBusyError, OutputExistsError, StorageError, UnsupportedStoreError
from fp8ckpt.stores.address import Address
from fp8ckpt.stores.remote import ATTEMPTS, attempted
from fp8ckpt.workers import share

if TYPE_CHECKING:
    from fp8ckpt.stores.s3 import S3Objects

T = TypeVar("T")
Data = bytes | bytearray

logger = logging.getLogger(__name__)

AT_ONCE = 6  # parts in flight; each is in memory
LOCK = ".fp8ckpt-lock"


class There(NamedTuple):
    """A part that a store has: its ETag, and the MD5 of its bytes, which the ETag is unless the store encrypts."""

    etag: str
    md5: str


class Destination:
    """The place of an output in a store; the file ``own`` records which uploads are ours. Thread-safe."""

    def __init__(self, client: S3Objects, own: Path) -> None:
        self._client = client
        self._own = own
        self._lock = threading.Lock()
        self._uploads: dict[str, str] = {}
        self._there: dict[str, Mapping[int, str]] = {}
        self._run = ""
        self._knows_conditions = True

    def __reduce__(self) -> tuple[Any, ...]:  # for the process of an asynchronous save
        return Destination, (self._client, self._own)

    @property
    def where(self) -> str:
        """The URL, without secrets."""
        return self._client.where

    def refuse_existing(self) -> None:
        """Raise `OutputExistsError` if any object exists there, except the lock."""
        if not self._do("looking at", None, self._client.is_empty, LOCK):
            raise OutputExistsError.of_objects(file=self.where)

    def hold(self, run: str) -> None:
        """Keep other runs away until `release`; a ``run`` that holds the place keeps it. Raises `OutputBusyError`."""
        self._run, text = run, run.encode()
        held = self._do("looking at", LOCK, self._client.text, LOCK)
        if held is None and self._do("writing", LOCK, self._client.put_new, LOCK, text):
            if self._do("writing", LOCK, self._client.put_new, LOCK, text):
                self._knows_conditions = False
                logger.warning("%s does not support conditional writes: see that no other run writes there", self.where)
            held = text
        elif held is None:
            held = self._do("looking at", LOCK, self._client.text, LOCK)
        if held != text:
            raise OutputBusyError.of_lock(file=f"{self.where}/{LOCK}")

    def release(self) -> None:
        """Let other runs write there: delete the lock."""
        try:
            self._do("writing", LOCK, self._client.delete, LOCK)
        except StorageError as error:  # who may write may not always delete; the checkpoint is complete
            logger.warning("%s/%s could not be deleted: %s", self.where, LOCK, error)

    def begin(self, names: Collection[str]) -> None:
        """Begin those uploads that were not begun yet."""
        begun = self._begun()

        def begin(name: str) -> None:
            upload = self._do("writing", name, self._client.begin, name, self._run)
            with self._lock:
                self._uploads[name] = upload
                try:
                    with self._own.open("a") as file:
                        file.write(f"\n{json.dumps([name, upload])}\n")  # the first newline ends an incomplete line
                except OSError as error:
                    raise StorageError.of_writing(error, self._own) from error

        self.each((name for name in names if name not in begun), begin)

    def give_up(self, names: Collection[str]) -> None:
        """Abort the uploads."""
        begun = self._begun()
        for name in names:
            if name in begun:
                self._do("writing", name, self._client.abort, name, begun[name])

    def there(self, name: str) -> Mapping[int, str]:
        """The ETags of the parts of a file that an earlier run has sent, by part number."""
        begun = self._begun()
        with self._lock:
            if name not in self._there:
                upload = begun.get(name)
                parts = {} if upload is None else self._do("looking at", name, self._client.parts, name, upload)
                self._there[name] = parts
            return self._there[name]

    def send(self, name: str, number: int, data: Data, *, again: bool = False) -> There:
        """Send a part, unless an earlier run did. ``again``: this run has sent it before, with other bytes."""
        digest = hashlib.md5(data)
        etag = f'"{digest.hexdigest()}"'
        if again or self.there(name).get(number) != etag:
            step = partial(self._client.put_part, name, self._begun()[name], number, data, digest.digest())
            etag = self._do(f"writing part {number} of", name, step)
        return There(etag, digest.hexdigest())

    def refuse_others(self, etags: Mapping[str, Sequence[str]]) -> None:
        """Raise `OutputExistsError` if there is an object that is not made of the file's parts."""
        self.each(etags.items(), lambda file: self._is_made(*file))

    def finish(self, name: str, etags: Sequence[str]) -> None:
        """Complete a file's upload, unless an earlier run did. Raises like `refuse_others`."""
        upload = self._begun().get(name)
        new = self._knows_conditions
        if upload is not None and self._do("writing", name, partial(self._client.finish, new=new), name, upload, etags):
            return
        if not self._is_made(name, etags):
            raise StorageError.of_aborted(file=name, where=self.where)

    def _is_made(self, name: str, etags: Sequence[str]) -> bool:
        found = self._do("looking at", name, self._client.made_by, name)
        if found is not None and found[0] != self._client.etag_of_parts(etags) and found[1] != self._run:
            raise OutputExistsError.of_other(file=name, where=self.where)
        return found is not None

    def put(self, name: str, file: Path) -> None:
        """Put a file as an object in one request, without holding it in memory."""
        with file.open("rb") as opened:
            self._do("writing", name, self._client.put, name, opened)

    def each(self, items: Iterable[T], step: Callable[[T], object]) -> None:
        """Take a step for each item, `AT_ONCE` at a time."""
        share(items, [step] * AT_ONCE)

    def _begun(self) -> Mapping[str, str]:
        """Our uploads that are not completed, by the names of their objects."""
        with self._lock:
            if not self._uploads and self._own.exists():
                own: dict[str, str] = {}
                for line in self._own.read_text().splitlines():
                    with suppress(ValueError):
                        own.update([json.loads(line)])
                there = set(self._do("looking at", None, self._client.begun))
                self._uploads = {name: upload for name, upload in own.items() if (name, upload) in there}
            return self._uploads

    def _do(self, doing: str, name: str | None, step: Callable[..., T], *arguments: Any) -> T:
        return attempted(partial(step, *arguments), ATTEMPTS, f"{doing} {self.where}", name)


def destination_of(address: Address, own: Path) -> Destination:
    """Return the destination of a URL; ``own`` records which uploads are ours. Raises `UnsupportedStoreError` for a
    store without multipart uploads.
    """
    if address.scheme in ("s3", "s3a"):
        from fp8ckpt.stores.s3 import S3Objects

        return Destination(S3Objects(address), own)
    raise UnsupportedStoreError.of_output(address, *address, "a local path, or s3://bucket/prefix")

"""Objects of S3, and of any other store with its protocol, through boto3: the extra ``s3``.

Credentials, region and endpoint are boto3's own (``AWS_*``, ``~/.aws``, the machine's role). Without credentials,
requests are not signed, as public buckets require. Every range is requested with ``If-Match``.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO
from typing import Any, BinaryIO

from fp8ckpt.errors import (
    CheckpointNotFoundError,
    MissingPackageError,
    SourceChangedError,
    StorageError,
    UnsupportedStoreError,
)
from fp8ckpt.stores.address import Address
from fp8ckpt.stores.remote import AT_ONCE, TIMEOUT, Broken, met, refuse_other_range
from fp8ckpt.stores.store import Stat
from fp8ckpt.stores.unlogged import heed

_PIECE = 1 << 19  # bytes; each longer one would take fresh memory
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-_]{1,254}", re.IGNORECASE)
_MD5 = re.compile(r'"?[0-9a-f]{32}"?')
_RUN = "fp8ckpt-run"  # the metadata key with the run that began an object's upload
_LATER = {
    "BadDigest", "RequestTimeout", "SlowDown", "Throttling", "RequestTimeTooSkewed", "InternalError",
    "ServiceUnavailable", "ConditionalRequestConflict", "OperationAborted",
}  # fmt: skip
_REGION = "set AWS_DEFAULT_REGION to the region of the bucket"
_REMEDIES = {
    "ExpiredToken": "renew the credentials, and run it again",
    "InvalidAccessKeyId": "check the credentials: the store does not know this key",
    "SignatureDoesNotMatch": "check the credentials: the secret does not belong to the key",
    "RequestTimeTooSkewed": "set this machine's clock, and run it again",
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "NoSuchBucket": "check the URL, or make the bucket first",
}
_making = threading.Lock()  # boto3's sessions are not thread-safe


class S3Objects:
    """The objects of ``s3://bucket/prefix`` below the prefix."""

    def __init__(self, address: Address) -> None:
        bucket, _, prefix = address.rest.partition("/")
        self.where = str(address._replace(scheme="s3"))
        if not _BUCKET.fullmatch(bucket) or set("?#;") & set(prefix):
            raise UnsupportedStoreError.of_bucket(file=self.where)
        self.bucket, self.prefix = bucket, prefix.rstrip("/")
        if self.prefix.startswith("/") or "//" in self.prefix:
            raise UnsupportedStoreError.of_slashes(file=self.where, bucket=bucket)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Objects, (Address("s3", f"{self.bucket}/{self.prefix}"),)

    def key(self, name: str) -> str:
        """An object's key in the bucket."""
        return f"{self.prefix}/{name}" if self.prefix else name

    @cached_property
    def client(self) -> Any:
        """boto3's client, without retries of its own."""
        try:
            import boto3
            from botocore import UNSIGNED
            from botocore.config import Config
        except ImportError as error:
            raise MissingPackageError.of_boto3(file=self.where) from error
        with _making, self.errors(None, making=True):
            session = boto3.Session()
            unsigned = {} if session.get_credentials() else {"signature_version": UNSIGNED}
            config = Config(
                max_pool_connections=2 * AT_ONCE,
                connect_timeout=TIMEOUT,
                read_timeout=TIMEOUT,
                retries={"total_max_attempts": 1, "mode": "standard"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                **unsigned,
            )
            client = session.client("s3", config=config)
            heed(name for name in list(logging.root.manager.loggerDict) if name.startswith("botocore"))
            return client

    def list(self) -> Mapping[str, Stat]:
        """As `fp8ckpt.stores.remote.Objects.list`; a folder marker, as consoles make it, is no object."""
        entries = self._entries("list_objects_v2", "Contents", Prefix=self.key(""))
        found = {
            entry["Key"].removeprefix(self.key("")): Stat(entry["Size"], entry["ETag"])
            for entry in entries
            if not entry["Key"].endswith("/")
        }
        if not found:
            raise CheckpointNotFoundError.of_empty(file=self.where)
        return found

    def get(self, name: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        with self.errors(name):
            answer = self.client.get_object(
                Bucket=self.bucket, Key=self.key(name), Range=f"bytes={start}-{stop - 1}", IfMatch=stat.version
            )
            try:
                if answer.get("ETag", stat.version) != stat.version:
                    raise SourceChangedError.of(file=name)
                refuse_other_range(answer.get("ContentRange"), start, stop, name, stat)
                while piece := answer["Body"].read(_PIECE):
                    yield piece
            finally:
                answer["Body"].close()

    # ---------------------------------------------------------------- an output, as fp8ckpt.stores.upload asks for it

    def is_empty(self, but: str) -> bool:
        """Whether there is no object below the prefix except ``but``, and none of the prefix's own name; consoles'
        folder markers do not count.
        """
        below = self._entries("list_objects_v2", "Contents", Prefix=self.key(""))
        if any(not entry["Key"].endswith("/") and entry["Key"] != self.key(but) for entry in below):
            return False
        named = self._entries("list_objects_v2", "Contents", Prefix=self.prefix) if self.prefix else iter(())
        return next(named, {"Key": None})["Key"] != self.prefix

    def made_by(self, name: str) -> tuple[str, str] | None:
        """The ETag of an object and the run that began its upload; None if there is no such object."""
        found = self._ask("head_object", name, unless=(404,))
        return None if found == 404 else (str(found["ETag"]), str(found.get("Metadata", {}).get(_RUN, "")))

    def begun(self) -> Collection[tuple[str, str]]:
        """The uploads that are not completed, whoever began them, with the names of their objects."""
        entries = self._entries("list_multipart_uploads", "Uploads", Prefix=self.key(""))
        return [(entry["Key"].removeprefix(self.key("")), entry["UploadId"]) for entry in entries]

    def begin(self, name: str, run: str) -> str:
        """Begin an upload, and return its id; the object's metadata will name the run."""
        return str(self._ask("create_multipart_upload", name, Metadata={_RUN: run})["UploadId"])

    def parts(self, name: str, upload: str) -> Mapping[int, str]:
        """The ETags of the parts of an upload that are there, by part number, from 1 on."""
        entries = self._entries("list_parts", "Parts", name, Key=self.key(name), UploadId=upload)
        return {part["PartNumber"]: part["ETag"] for part in entries}

    def put_part(self, name: str, upload: str, number: int, data: bytes | bytearray, md5: bytes) -> str:
        """Send a part, and return its ETag; the store checks its MD5."""
        of: dict[str, Any] = {"UploadId": upload, "PartNumber": number, "ContentMD5": base64.b64encode(md5).decode()}
        return str(self._ask("upload_part", name, **of, Body=data)["ETag"])

    def finish(self, name: str, upload: str, etags: Sequence[str], *, new: bool) -> bool:
        """Make an object of all parts. False if there is no such upload, which an earlier attempt may have completed;
        or, if the object must be ``new``, if there is one.
        """
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        of: dict[str, Any] = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
        if new:
            of["IfNoneMatch"] = "*"
        return self._ask("complete_multipart_upload", name, unless=(404, 412), **of) not in (404, 412)

    def abort(self, name: str, upload: str) -> None:
        """Abort an upload and delete its parts; again if a part was in flight, which S3 keeps until told twice."""
        if self._ask("abort_multipart_upload", name, unless=(404,), UploadId=upload) == 404:
            return
        left = self._ask("list_parts", name, unless=(404,), UploadId=upload)
        if left != 404 and left.get("Parts"):
            raise Broken("parts that were on their way are there")

    def etag_of_parts(self, etags: Sequence[str]) -> str | None:
        """The ETag of an object made of these parts; None if their ETags are not MD5s."""
        if not all(_MD5.fullmatch(etag) for etag in etags):
            return None
        digests = b"".join(bytes.fromhex(etag.strip('"')) for etag in etags)
        return f'"{hashlib.md5(digests).hexdigest()}-{len(etags)}"'

    def put(self, name: str, file: BinaryIO) -> None:
        """Put an object in one request."""
        file.seek(0)
        md5 = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()  # type: ignore[arg-type]
        file.seek(0)
        self._ask("put_object", name, Body=file, ContentMD5=md5)

    def put_new(self, name: str, data: bytes) -> bool:
        """Put an object if there is none; False if there is one. A store without conditional writes puts it anyway."""
        answer = self._ask("put_object", name, unless=(412, 501), Body=data, IfNoneMatch="*")
        if answer == 501:
            self.put(name, BytesIO(data))
        return bool(answer != 412)

    def text(self, name: str) -> bytes | None:
        """The bytes of a small object, or None."""
        with self.errors(name, writing=True):
            found = self._ask("get_object", name, unless=(404,))
            return None if found == 404 else bytes(found["Body"].read())

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._ask("delete_object", name)

    # ---------------------------------------------------------------- requests

    def _ask(self, operation: str, name: str, *, unless: Collection[int] = (), **more: Any) -> Any:
        """Return the answer about an object of an output; its status alone, if that is one of ``unless``."""
        with self.errors(name, writing=True):
            try:
                return getattr(self.client, operation)(Bucket=self.bucket, Key=self.key(name), **more)
            except self.client.exceptions.ClientError as error:
                if (status := _status(error)) not in unless:
                    raise
                return status

    def _entries(self, operation: str, of: str, name: str | None = None, **more: str) -> Iterator[Any]:
        """Yield the entries ``of`` all pages of a listing; of one object, if ``name`` is given."""
        with self.errors(name, writing=name is not None):
            for page in self.client.get_paginator(operation).paginate(Bucket=self.bucket, **more):
                if page.keys() <= {"ResponseMetadata"}:  # some other text, in which boto3 finds nothing
                    raise StorageError.of_web_page(file=self.where, variable="AWS_ENDPOINT_URL")
                yield from page.get(of, ())

    @contextmanager
    def errors(self, name: str | None, *, writing: bool = False, making: bool = False) -> Iterator[None]:
        """Raise what boto3 raises in our own words: its texts may hold URLs with credentials. ``making``: the client is
        being made, which raises `ValueError` for a bad endpoint.
        """
        try:
            yield
        except RecursionError:  # boto3 follows redirects without end if no region is set
            raise StorageError.of_regions(file=self.where, remedy=_REGION) from None
        except Exception as error:
            own = type(error).__module__.startswith(("botocore", "boto3", "urllib3"))
            if not (own or (making and isinstance(error, ValueError))):
                raise
            raise self._worded(error, name, writing) from None

    def _worded(self, error: Any, name: str | None, writing: bool) -> Exception:
        if not isinstance(getattr(error, "response", None), dict):
            from botocore import exceptions

            broken = exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError
            if isinstance(error, broken) or "urllib3" in str(type(error)):
                cause = getattr(error, "kwargs", {}).get("error")  # if it is urllib3's, it says more
                return met(cause if isinstance(cause, Exception) else error, self.where)
            return StorageError.of_boto3(file=self.where, error=error)
        code, status = str(error.response.get("Error", {}).get("Code", "")), _status(error)
        answer = f"{status} {'' if code == str(status) else code}".rstrip()
        if (status >= 500 and status != 501) or status in (408, 429) or code in _LATER:
            after = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after")
            return Broken(f"the store answered {answer}", _REMEDIES.get(code), after=after)
        if name is not None and not writing and status in (404, 412, 416):
            return SourceChangedError.of(file=name)
        remedy = _REMEDIES.get(code) or ("check the URL" if status == 404 else self._permission(writing))
        if status == 404 and not writing:
            return CheckpointNotFoundError.of_store(file=self.where, answer=answer, remedy=remedy)
        place = self.where if name is None else f"{self.where}/{name}"
        return StorageError.of_answer(file=place, who="the store", answer=answer, remedy=remedy)

    def _permission(self, writing: bool) -> str:
        """The remedy where the store refuses without saying why."""
        from botocore import UNSIGNED

        if self.client.meta.config.signature_version is UNSIGNED:
            return "set AWS_PROFILE: no credentials were found, and the bucket is not public"
        needed = "list, get, put and delete objects, and to upload in parts" if writing else "list and get objects"
        return f"check the credentials and the region; the permissions to {needed} are needed"


def _status(error: Any) -> int:
    """The HTTP status of an error that boto3 raised."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))

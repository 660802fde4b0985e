"""Objects of S3, and of whatever else speaks its protocol, through boto3: the extra ``s3``.

Credentials, region and endpoint are boto3's own (``AWS_*``, ``~/.aws``, the machine's role); without any credentials,
requests are not signed, as public buckets want it. Every range is asked for with ``If-Match``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from fp8ckpt.errors import (
    CheckpointNotFoundError,
    MissingPackageError,
    SourceChangedError,
    StorageError,
    UnsupportedStoreError,
)
from fp8ckpt.stores.address import Address
from fp8ckpt.stores.remote import AT_ONCE, TIMEOUT, Broken
from fp8ckpt.stores.store import Stat

_PIECE = 1 << 20  # bytes
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-_]{1,254}", re.IGNORECASE)
_LATER = ("RequestTimeout", "SlowDown", "Throttling", "RequestTimeTooSkewed", "InternalError", "ServiceUnavailable")
_making = threading.Lock()  # boto3's sessions are not for several threads


class S3Objects:
    """The objects of ``s3://bucket/prefix`` below the prefix."""

    def __init__(self, address: Address) -> None:
        bucket, _, prefix = address.rest.partition("/")
        self.where = str(address)
        if not _BUCKET.fullmatch(bucket) or "?" in prefix or "#" in prefix:
            remedy = "give credentials and endpoint as boto3 takes them (AWS_PROFILE, AWS_ENDPOINT_URL, ...)"
            raise UnsupportedStoreError(
                "it is no bucket and prefix", file=self.where, expected="s3://bucket/prefix", remedy=remedy
            )
        self.bucket, self.prefix = bucket, prefix.strip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Objects, (Address("s3", f"{self.bucket}/{self.prefix}"),)

    def key(self, name: str) -> str:
        """An object's key in the bucket."""
        return f"{self.prefix}/{name}" if self.prefix else name

    @cached_property
    def client(self) -> Any:
        """boto3's; it makes each request once."""
        try:
            import boto3
            from botocore import UNSIGNED
            from botocore.config import Config
        except ImportError as error:
            remedy = "pip install 'fp8ckpt[s3]'"
            raise MissingPackageError("reading s3:// needs boto3", file=self.where, remedy=remedy) from error
        with _making, self.errors(None):
            session = boto3.Session()
            unsigned = {} if session.get_credentials() else {"signature_version": UNSIGNED}
            config = Config(
                max_pool_connections=2 * AT_ONCE,
                connect_timeout=TIMEOUT,
                read_timeout=TIMEOUT,
                retries={"total_max_attempts": 1, "mode": "standard"},
                response_checksum_validation="when_required",
                **unsigned,
            )
            return session.client("s3", config=config)

    def list(self) -> Mapping[str, Stat]:
        """As `fp8ckpt.stores.remote.Objects.list`."""
        below = f"{self.prefix}/" if self.prefix else ""
        found: dict[str, Stat] = {}
        with self.errors(None):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=below):
                for entry in page.get("Contents", ()):
                    if not entry["Key"].endswith("/"):  # a folder, as consoles make them
                        found[entry["Key"].removeprefix(below)] = Stat(entry["Size"], entry["ETag"])
        if not found:
            raise CheckpointNotFoundError("there is no object below it", file=self.where, remedy="check the URL")
        return found

    def get(self, name: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        """As `fp8ckpt.stores.remote.Objects.get`."""
        with self.errors(name):
            answer = self.client.get_object(
                Bucket=self.bucket, Key=self.key(name), Range=f"bytes={start}-{stop - 1}", IfMatch=stat.version
            )
            try:
                if answer["ETag"] != stat.version or not answer.get("ContentRange", "").endswith(f"/{stat.size}"):
                    raise SourceChangedError.of(name)
                while piece := answer["Body"].read(_PIECE):
                    yield piece
            finally:
                answer["Body"].close()

    def errors(self, name: str | None) -> _Errors:
        """Turns what boto3 raises into our own words: its texts may hold URLs with credentials."""
        return _Errors(self.where, name)


class _Errors:
    def __init__(self, where: str, name: str | None) -> None:
        self._where = where
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None or not kind.__module__.startswith(("botocore", "boto3", "urllib3")):
            return
        response = getattr(error, "response", None)
        if not isinstance(response, dict):
            from botocore import exceptions

            if isinstance(error, exceptions.HTTPClientError | exceptions.IncompleteReadError) or "urllib3" in str(kind):
                raise Broken(f"no whole answer ({kind.__name__})") from None
            raise StorageError(
                f"boto3 refuses ({kind.__name__})", file=self._where, remedy="see how boto3 is set up here"
            ) from None
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if status >= 500 or status in (408, 429) or code in _LATER:
            raise Broken(f"the store answered {status} {code}") from None
        if self._name is not None and status in (404, 412, 416):
            raise SourceChangedError.of(self._name) from None
        if status == 404:
            raise CheckpointNotFoundError(
                f"the store answered {status} {code}", file=self._where, remedy="check the URL"
            ) from None
        raise StorageError(
            f"the store answered {status} {code}",
            file=self._where if self._name is None else f"{self._where}/{self._name}",
            remedy="check the credentials, the region and their permissions",
        ) from None

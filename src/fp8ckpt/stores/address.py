"""What a user names: a path on this machine, or the URL of a store. The form alone decides which.

``scheme:/`` begins a URL, with one slash or two (a `Path` of a URL has lost the second). Other forms that look like a
store are refused: a scheme with a colon alone, anything that ends in a colon before the first slash, nested URLs
(``simplecache::s3://``), ARNs. A folder with such a name is given with ``./``, or by its absolute path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from fp8ckpt.errors import UnsupportedStoreError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)
_ODD = re.compile(
    r"((?:s3[an]?|gs|gcs|az|abfss?|hf|https?|file|dbfs|hdfs|s?ftp|arn|(?:simple|file|block)cache|zip|tar)(?=:)"
    r"|[^/]+(?=:/)(?<!^.)):+/*(.*)", re.DOTALL | re.IGNORECASE
)  # fmt: skip
_CHAINED = re.compile(r"::[A-Za-z][A-Za-z0-9+.-]+:/")
_HAS_CONTAINERS = ("hf", "abfs", "abfss")  # before the "@" stands a container or a model, not a secret


class Address(NamedTuple):
    """The URL of a store; ``rest`` is what follows ``scheme://``."""

    scheme: str
    rest: str

    def __str__(self) -> str:
        """The URL as messages, logs and files may show it: without user, password and query. If it is unclear which
        part is a password, no part is shown.
        """
        authority, slash, path = self.rest.partition("/")
        user, at, host = authority.rpartition("@")
        if re.search(r"[?#;]", user) or ("@" in path and (at or ":" in authority)):
            return f"{self.scheme}://..."
        named = self.scheme in _HAS_CONTAINERS and ":" not in user and not user.startswith("hf_")  # as tokens do
        shown = f"{authority if named else host}{slash}{path}"
        return f"{self.scheme}://{re.split('[?#;]', shown, maxsplit=1)[0]}"


def address_of(path: str | os.PathLike[str]) -> Address | None:
    """Return the store's URL that a user gave, or None for a path on this machine. Raises for any other form."""
    text = os.fspath(path)
    match = _URL.fullmatch(text)
    if match is not None and not _CHAINED.search(text):
        return Address(match[1].lower(), match[3])
    if match is None and (match := _ODD.fullmatch(text)) is None:
        return None
    scheme = match[1].rpartition("@")[2].lower()
    raise UnsupportedStoreError.of_form(file=Address(scheme, match[match.re.groups]))


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a path on this machine. Raises `UnsupportedStoreError` for the URL of a store."""
    if (address := address_of(path)) is None:
        return Path(path)
    raise UnsupportedStoreError.of_output(address, *address, "a local path")

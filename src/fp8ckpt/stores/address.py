"""What a user names: a path of this machine, or the URL of a store. It is the one or the other by its form alone.

``scheme:/`` begins a URL, with one slash or two (a `Path` of a URL has lost the second); so does the scheme of a
well-known store with a colon. A folder that is really called so is named by its absolute path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from fp8ckpt.errors import UnsupportedStoreError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)
_WITHOUT_SLASHES = re.compile(r"(s3a?|gs|gcs|az|abfss?|hf|https?|file):(.*)", re.DOTALL | re.IGNORECASE)


class Address(NamedTuple):
    """The URL of a store; ``rest`` is what follows ``scheme://``."""

    scheme: str
    rest: str

    def __str__(self) -> str:
        """The URL as messages, logs and files may show it: without a user, a password and a query."""
        rest = re.split(r"[?#]", self.rest, maxsplit=1)[0]
        authority, slash, path = rest.partition("/")
        return f"{self.scheme}://{authority.rpartition('@')[2] if self.scheme != 'hf' else authority}{slash}{path}"


def address_of(path: str | os.PathLike[str]) -> Address | None:
    """The store's URL that a user gave; None for a path of this machine."""
    text = os.fspath(path)
    if (match := _URL.fullmatch(text)) is not None:
        return Address(match[1].lower(), match[3])
    if (match := _WITHOUT_SLASHES.fullmatch(text)) is not None:
        address = Address(match[1].lower(), match[2])
        found, remedy = f"it begins with {match[1]}: and is no URL", "for a local path, write ./ before it"
        raise UnsupportedStoreError(found, file=str(address), expected=f"{address.scheme}://...", remedy=remedy)
    return None


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path of what is on this machine. Raises `UnsupportedStoreError` for the URL of a store."""
    if (address := address_of(path)) is None:
        return Path(path)
    if address.scheme == "file":
        remedy = f"give the path itself: /{address.rest}"
    else:
        remedy = "write to a local directory, and copy it there with the store's own client"
    raise UnsupportedStoreError(
        f"fp8ckpt writes nothing to {address.scheme}://", file=str(address), expected="a local path", remedy=remedy
    )

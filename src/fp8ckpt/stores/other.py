"""Objects of any other store that fsspec knows (``gs://``, ``az://``, ``sftp://`` and so on), through its client for
it.

fsspec cannot request one version of an object. A change during a job is found when the store is listed again, before
anything is published or returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from fp8ckpt.errors import CheckpointNotFoundError, MissingPackageError, StorageError, UnsupportedStoreError
from fp8ckpt.stores.address import Address
from fp8ckpt.stores.remote import Broken, stat_of
from fp8ckpt.stores.store import Stat

_PACKAGES = {"smbclient": "smbprotocol", "libarchive": "libarchive-c"}  # where the module has another name
# The keys under which clients give the version of an object, the most reliable first.
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "md5", "LastModified", "last_modified", "updated",
             "mtime", "modified", "created")  # fmt: skip


class OtherObjects:
    """The objects below a URL of any scheme."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self.where = str(address).rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return OtherObjects, (self._address,)

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """fsspec's client, and the client's path of the place."""
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations

        scheme = self._address.scheme
        if scheme not in known_implementations:
            raise UnsupportedStoreError.of_scheme(file=self.where, scheme=scheme)
        try:
            client, path = url_to_fs(f"{scheme}://{self._address.rest}", use_listings_cache=False)
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None) or error.name or known_implementations[scheme]["class"]
            module = missing.partition(".")[0]
            package = _PACKAGES.get(module, module)
            raise MissingPackageError.of_client(file=self.where, scheme=scheme, package=package) from error
        except TypeError:
            raise StorageError.of_instance(file=self.where) from None
        except Exception as error:
            raise StorageError.of_client(file=self.where, error=error) from None
        return client, path.rstrip("/")

    def list(self) -> Mapping[str, Stat]:
        client, path = self._place
        try:
            client.invalidate_cache()
            entries: dict[str, dict[str, Any]] = client.find(path, detail=True)
        except Exception as error:
            raise _worded(error) from None
        found = {}
        for name, info in entries.items():
            version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
            found[name[len(path) :].lstrip("/")] = stat_of(self.where, name, info.get("size"), version)
        if not found:
            raise CheckpointNotFoundError.of_empty(file=self.where)
        return found

    def get(self, name: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        client, path = self._place
        try:
            yield client.cat_file(f"{path}/{name}", start=start, end=stop)
        except Exception as error:
            raise _worded(error) from None


def _worded(error: Exception) -> Broken:
    """An error in our own words: a client's text may hold a secret."""
    return Broken(f"its client met {type(error).__name__}")

"""Files of a model on the Hub, read in place: ``hf://org/name[@revision][/folder]``, through huggingface_hub.

Listing the store resolves the revision to its commit, whose contents never change, and every range is requested of that
commit. A file's version is its blob id. The token is huggingface_hub's own (``hf auth login``, ``HF_TOKEN``) and is
sent to the Hub alone, not to the servers that the Hub redirects to for large files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any
from urllib.parse import unquote, urlsplit

from fp8ckpt.errors import CheckpointNotFoundError, SourceChangedError, StorageError, UnsupportedStoreError
from fp8ckpt.stores.address import Address
from fp8ckpt.stores.http import HttpObjects
from fp8ckpt.stores.remote import Broken, met
from fp8ckpt.stores.store import Stat

_PLACE = re.compile(r"([^/@]+(?:/[^/@]+)?)(?:@(refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/([^@]*))?")


class HubObjects(HttpObjects):
    """The files of a model on the Hub, or of a folder of it."""

    permission = "check name and revision; for what is private or gated, ask for access on its page, and hf auth login"

    def __init__(self, address: Address, commit: str | None = None) -> None:
        self._address = address
        self.where = str(address).rstrip("/")
        match = _PLACE.fullmatch(address.rest.strip("/"))
        if match is None:
            raise UnsupportedStoreError.of_hub(file=self.where)
        self.model, revision, folder = match.groups()
        self.revision = unquote(revision) if revision else None
        self._folder = f"{folder}/" if folder else ""
        self._commit = commit
        self._leads = {}
        self._etags: dict[tuple[str, str | None], str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return HubObjects, (self._address, self._commit)

    def url(self, name: str) -> str:
        """The URL of a file of the commit."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.model, self._folder + name, revision=self._commit)

    def headers(self) -> dict[str, str]:
        """The headers with the token."""
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there

        headers: dict[str, str] = build_hf_headers(library_name="fp8ckpt")
        return headers

    def list(self) -> Mapping[str, Stat]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with self._errors():
            api = HfApi(library_name="fp8ckpt")
            if self._commit is None:
                self._commit = api.model_info(self.model, revision=self.revision).sha
            tree = api.list_repo_tree(
                self.model, self._folder.rstrip("/") or None, recursive=True, revision=self._commit
            )
            found = {}
            for entry in tree:
                if isinstance(entry, RepoFile):
                    version = entry.lfs.sha256 if entry.lfs else entry.blob_id
                    found[entry.path.removeprefix(self._folder)] = Stat(entry.size, version)
            return found

    def refuse_other(self, name: str, stat: Stat, headers: Mapping[str, str]) -> None:
        """Raise `SourceChangedError` for another commit than ours, or another ETag than the same host gave before."""
        etag, by = headers.get("ETag", "").removeprefix("W/"), (name, urlsplit(self._leads.get(name, "")).hostname)
        if headers.get("X-Repo-Commit", self._commit) != self._commit or self._etags.setdefault(by, etag) != etag:
            raise SourceChangedError.of(file=name)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        try:
            yield
        except OfflineModeIsEnabled:
            raise StorageError.of_offline(file=self.where) from None
        except HFValidationError:
            raise UnsupportedStoreError.of_hub(file=self.where) from None
        except (JSONDecodeError, KeyError, TypeError, AttributeError):  # what answers there is another server
            raise StorageError.of_web_page(file=self.where, variable="HF_ENDPOINT") from None
        except ValueError as error:
            raise StorageError.of_request(file=self.where, error=error) from None
        except HfHubHTTPError as error:
            status, kind = error.response.status_code, type(error).__name__.removesuffix("Error")
            if status >= 500 or status in (408, 429):
                raise Broken(f"the Hub answered {status}") from None
            raise CheckpointNotFoundError.of_hub(file=self.where, store=self, status=status, kind=kind) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "ssl"):
                raise
            raise met(error, self.where) from None

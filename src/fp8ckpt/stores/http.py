"""Files of a web server: a directory whose index page lists them (``https://host/directory/``).

The client is urllib3: huggingface_hub's takes five times as much processor time for TLS, all of it under Python's
global lock. Proxies and certificates come from the environment (``HTTPS_PROXY``, ``NO_PROXY``, ``SSL_CERT_FILE``). Each
range is requested with ``If-Match`` if the server gives strong ETags, and the version in every answer is compared. A
user and password in the URL are sent to that host alone; a redirect to another host is followed without them, and never
from https to http. The target of a file's redirect is kept while it works, so that a range is one request.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from fp8ckpt.errors import CheckpointNotFoundError, SourceChangedError, StorageError, UnsupportedStoreError
from fp8ckpt.stores.address import Address
from fp8ckpt.stores.remote import AT_ONCE, TIMEOUT, Broken, met, refuse_other_range, stat_of
from fp8ckpt.stores.store import Stat
from fp8ckpt.stores.unlogged import THREADS

_PIECE = 1 << 19  # bytes
_MOST_REDIRECTS = 5
_DEEPEST = 8  # folders
_LONGEST_PAGE = 16 << 20  # bytes
_ENCODED = {"Accept-Encoding": "identity"}  # ranges must count the bytes of the file


class HttpObjects:
    """The files below a URL."""

    permission = "check the URL, and the user and the password in it"

    def __init__(self, address: Address) -> None:
        self._address = address
        self._leads: dict[str, str] = {}  # redirect targets, by file
        self.where = str(address).rstrip("/")
        self._base = f"{address.scheme}://{address.rest.rstrip('/')}/"
        if not urlsplit(self._base).hostname or "?" in address.rest or "#" in address.rest:
            raise UnsupportedStoreError.of_directory(file=self.where, scheme=address.scheme)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._address,)

    def url(self, name: str) -> str:
        """The URL of a file."""
        return self._base + quote(name)

    def headers(self) -> dict[str, str]:
        """Headers that are sent to the named host, and to no other."""
        return {}

    def list(self) -> Mapping[str, Stat]:
        """As `fp8ckpt.stores.remote.Objects.list`: from the index pages, and a HEAD request for each file."""
        names = list(dict.fromkeys(self._names("", 0)))
        if not names:
            raise CheckpointNotFoundError.of_page(file=self.where)
        with ThreadPoolExecutor(AT_ONCE, THREADS) as pool:
            return dict(zip(names, pool.map(self._stat, names), strict=True))

    def get(self, name: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        condition = {"If-Match": stat.version} if stat.version.startswith('"') else {}
        asked = {"Range": f"bytes={start}-{stop - 1}", **condition}
        with self.answer("GET", name, asked, listed=True) as response:
            if response.status != 206:
                raise StorageError.of_ranges(file=name, where=self.where)
            refuse_other_range(response.headers.get("Content-Range"), start, stop, name, stat)
            self.refuse_other(name, stat, response.headers)
            yield from response.stream(_PIECE, decode_content=False)

    def refuse_other(self, name: str, stat: Stat, headers: Mapping[str, str]) -> None:
        """Raise `SourceChangedError` if an answer is of another version."""
        if _version(headers) != stat.version:
            raise SourceChangedError.of(file=name)

    @contextmanager
    def answer(self, method: str, name: str, asked: Mapping[str, str], *, listed: bool) -> Iterator[Any]:
        """Yield the server's answer, or that of the server it redirects to, before its body is read; errors are in our
        own words.

        ``listed``: whether the listing had the file, so that its absence is a change.
        """
        from urllib3.exceptions import HTTPError

        led = self._leads.get(name)
        try:
            url, named = led or self.url(name), _origin(self.url(name))
            for _ in range(_MOST_REDIRECTS):
                own = self.headers() if _origin(url) == named else {}
                with closing(_asked(method, url, {**own, **_ENCODED, **asked})) as response:
                    if location := response.get_redirect_location():
                        response.drain_conn()
                        url = self._led_to(url, location, name)
                        continue
                    if led is not None and response.status >= 400:  # redirect targets expire
                        if self._leads.get(name) == led:
                            del self._leads[name]
                        raise Broken(f"the server answered {response.status}, where it had led to before")
                    self._refuse(response, name, listed)
                    if listed and _origin(url) != named:
                        self._leads[name] = url
                    yield response
                    return
        except ValueError as error:
            raise StorageError.of_request(file=self.where, error=error) from None
        except HTTPError as error:
            raise met(error, self.where) from None
        raise StorageError.of_redirects(file=name or self.where, most=_MOST_REDIRECTS)

    def _led_to(self, url: str, location: str, name: str) -> str:
        target = urlsplit(urljoin(url, location))
        if target.scheme not in ("http", "https") or (url.startswith("https:") and target.scheme == "http"):
            raise StorageError.of_http(file=name or None, where=self.where, scheme=target.scheme)
        if _origin(url) == _origin(target.geturl()):  # the URL's user and password stay with the host
            return target._replace(netloc=urlsplit(url).netloc).geturl()
        return target.geturl()

    def _refuse(self, response: Any, name: str, listed: bool) -> None:
        status = response.status
        if status in (408, 429) or status >= 500:
            raise Broken(f"the server answered {status}", after=response.headers.get("Retry-After"))
        if listed and status in (404, 410, 412, 416):
            raise SourceChangedError.of(file=name)
        if status in (404, 410):
            raise CheckpointNotFoundError.of_answer(file=self.where, status=status)
        if status >= 300:
            raise StorageError.of_answer(file=name or None, who=self.where, answer=status, remedy=self.permission)

    def _stat(self, name: str) -> Stat:
        with self.answer("HEAD", name, {}, listed=False) as response:
            version = _version(response.headers)
            response.drain_conn()
            return stat_of(self.where, name, response.headers.get("Content-Length"), version)

    def _names(self, folder: str, depth: int) -> Iterator[str]:
        """Yield the files that an index page links to, and those of the folders below."""
        page = _Links()
        with self.answer("GET", folder, {}, listed=False) as response:
            if "html" not in response.headers.get("Content-Type", ""):
                return
            held = b""
            for piece in response.stream(_PIECE, decode_content=False):
                held += piece
                if len(held) > _LONGEST_PAGE:
                    raise StorageError.of_page(file=self.where)
        page.feed(held.decode(errors="replace"))
        here = urlsplit(self.url(folder))
        for link in page.found:
            target = urlsplit(urljoin(here.geturl(), link))
            below = unquote(target.path.removeprefix(here.path))
            if _origin(target.geturl()) != _origin(here.geturl()) or not target.path.startswith(here.path) or not below:
                continue
            if not re.fullmatch(r"[^/\\\0]+/?", below) or target.query or below.startswith("."):
                continue
            if not below.endswith("/"):
                yield folder + below
            elif depth < _DEEPEST:
                yield from self._names(folder + below, depth + 1)


def _asked(method: str, url: str, headers: Mapping[str, str]) -> Any:
    """The answer to one request, before its body is read. The connection is kept if the body is read to its end."""
    from urllib3.util import make_headers

    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    own = make_headers(basic_auth=unquote(user)) if user else {}
    proxies = {} if proxy_bypass(host) else getproxies()
    pool = _pool(proxies.get(parts.scheme) or proxies.get("all", ""), os.getpid())
    place = parts._replace(netloc=host).geturl()
    return pool.request(
        method, place, headers={**own, **headers}, timeout=TIMEOUT, retries=False, redirect=False, preload_content=False
    )


@cache
def _pool(proxy: str, process: int) -> Any:
    """The connections of a process: those of the process that it was forked from are not its own."""
    import urllib3

    of_hub = import_module("httpx2" if find_spec("httpx2") else "httpx")  # for the certificates of the Hub's client
    known: dict[str, Any] = {"maxsize": AT_ONCE, "ssl_context": of_hub.create_ssl_context()}
    if not proxy:
        return urllib3.PoolManager(**known)
    parts = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
    own = urllib3.util.make_headers(proxy_basic_auth=unquote(parts.auth)) if parts.auth else None
    return urllib3.ProxyManager(parts._replace(auth=None).url, proxy_headers=own, **known)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _version(headers: Mapping[str, str]) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if tag == "a" and key == "href" and value]

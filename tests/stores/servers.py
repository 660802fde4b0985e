"""Servers on loopback: an S3 server (moto's), a Hub, a web server; and faults on the way to any of them."""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app


class Asked(NamedTuple):
    """A request. Header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def ranged(self) -> int:
        """How many bytes a range asks for; 0 without one."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return int(match[2]) - int(match[1]) + 1 if match else 0


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Server:
    """Answers requests in threads. ``asked``: all of them; ``fault``: what goes wrong with one, if anything does;
    "lost": it is done, and the answer does not say so; "other": what is given, and said to be, is another range.
    """

    FAULTS = ("503", "reset", "short", "stall", "other")

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        self.asked: list[Asked] = []
        self.fault: Callable[[Asked], str | None] = lambda asked: None
        self.delay = threading.Event()  # never set: only waited for
        self.latency = 0.0
        self.answer = answer
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked = Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                server.asked.append(asked)
                if server.latency:
                    server.delay.wait(server.latency)
                fault = server.fault(asked)
                if fault == "other" and asked.ranged:
                    first, last = map(int, asked.headers["range"].removeprefix("bytes=").split("-"))
                    by = -1 if first else 1
                    asked = asked._replace(headers={**asked.headers, "range": f"bytes={first + by}-{last + by}"})
                answer = Answer(503, {}, b"") if fault == "503" else server.answer(asked)
                with suppress(ConnectionError):
                    self._send(Answer(503, {}, b"") if fault == "lost" else answer, fault)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815 - the base class's names

            def _send(self, answer: Answer, fault: str | None) -> None:
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for key, value in answer.headers.items():
                    if key.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(key, value)
                length = answer.headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(answer.body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault in ("short", "stall"):
                    self.wfile.write(answer.body[: len(answer.body) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        self.connection.recv(1)  # until the other side has had enough
                    self.close_connection = True
                    return
                self.wfile.write(answer.body)

            def log_message(self, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up: that is what is tried
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def fetched(self) -> int:
        """Bytes that ranges asked for so far."""
        return sum(asked.ranged for asked in self.asked)

    def forget(self) -> None:
        """Count from here on, and let nothing go wrong."""
        self.asked.clear()
        self.fault = lambda asked: None

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(answer: Callable[[Asked], Answer]) -> Iterator[Server]:
    """A server for as long as the context lasts."""
    server = Server(answer)
    try:
        yield server
    finally:
        server.close()


def moto() -> Callable[[Asked], Answer]:
    """What moto's S3 server answers, without a connection to it."""
    app = DomainDispatcherApplication(create_backend_app)

    def answer(asked: Asked) -> Answer:
        place, started = urlsplit(asked.path), list[Any]()
        environ = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in asked.headers.items()}
        environ |= {
            "REQUEST_METHOD": asked.method, "PATH_INFO": unquote(place.path, "latin-1"), "QUERY_STRING": place.query,
            "RAW_URI": asked.path, "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_LENGTH": str(len(asked.body)), "CONTENT_TYPE": asked.headers.get("content-type", ""),
            "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(asked.body),
        }  # fmt: skip
        body = b"".join(app(environ, lambda status, headers, *_: started.extend((int(status[:3]), dict(headers)))))
        return Answer(started[0], started[1], body)

    return answer


def ranged(data: bytes, etag: str, asked: Asked, headers: Mapping[str, str] = {}) -> Answer:
    """A file, or a range of it, on its condition."""
    headers = {"ETag": etag, "Accept-Ranges": "bytes", **headers}
    if asked.headers.get("if-match", etag) != etag:
        return Answer(412, headers, b"")
    if asked.method == "HEAD":
        return Answer(200, {**headers, "Content-Length": str(len(data))}, b"")
    if (match := re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers.get("range", ""))) is None:
        return Answer(200, headers, data)
    start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
    return Answer(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop])


def web(files: Mapping[str, bytes]) -> Callable[[Asked], Answer]:
    """A web server with index pages; ``files`` by path."""

    def answer(asked: Asked) -> Answer:
        path = unquote(urlsplit(asked.path).path).lstrip("/")
        if path in files:
            return ranged(files[path], etag_of(files[path]), asked)
        below = {name[len(path) :].partition("/") for name in files if name.startswith(path)}
        if not below or (path and not path.endswith("/")):
            return Answer(404, {}, b"")
        links = "".join(f'<a href="{head}{slash}">{head}</a>' for head, slash, _ in sorted(below))
        page = f'<a href="../">..</a><a href="?sort=size">size</a><a href="https://elsewhere/">x</a>{links}'
        return Answer(200, {"Content-Type": "text/html"}, page.encode())

    return answer


def etag_of(data: bytes) -> str:
    """A strong one."""
    return f'"{hashlib.sha256(data).hexdigest()}"'


class Hub:
    """A Hub with one commit a model. Large files are elsewhere (``cdn``), as the Hub's are, at signed URLs."""

    LARGE = 4096  # bytes
    TOKEN = "hf_secret"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.commit = "0123456789abcdef0123456789abcdef01234567"
        self.cdn = Server(self._large)
        self.hub = Server(self._small)
        self.private = False
        self.signature = "1"

    def close(self) -> None:
        """Stop both servers."""
        self.hub.close()
        self.cdn.close()

    def _small(self, asked: Asked) -> Answer:
        if self.private and asked.headers.get("authorization") != f"Bearer {self.TOKEN}":
            return Answer(401, {"X-Error-Code": "RepoNotFound"}, b"")
        path = urlsplit(asked.path).path
        if re.fullmatch(r"/api/models/org/name(/revision/(main|v1|[0-9a-f]{40}))?", path):
            return Answer(200, {}, json.dumps({"id": "org/name", "sha": self.commit, "siblings": []}).encode())
        if path == f"/api/models/org/name/tree/{self.commit}":
            return Answer(200, {}, json.dumps([self._entry(name) for name in sorted(self.files)]).encode())
        name = unquote(path.removeprefix(f"/org/name/resolve/{self.commit}/"))
        if name not in self.files:
            return Answer(404, {"X-Error-Code": "RevisionNotFound" if "/revision/" in path else "RepoNotFound"}, b"")
        if len(self.files[name]) < self.LARGE:
            headers = {"X-Repo-Commit": self.commit}
            return ranged(self.files[name], f'"{self._blob(name)}"', asked, headers)
        location = f"{self.cdn.url}/{self._blob(name)}/{name}?Signature={self.signature}"
        return Answer(302, {"Location": location, "X-Repo-Commit": self.commit}, b"")

    def _large(self, asked: Asked) -> Answer:
        place = urlsplit(asked.path)
        name = unquote(place.path).partition("/")[2].partition("/")[2]
        if place.query != f"Signature={self.signature}":
            return Answer(403, {}, b"")
        return ranged(self.files[name], f'"{self._blob(name)}"', asked)

    def _entry(self, name: str) -> dict[str, object]:
        data = self.files[name]
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": self._blob(name)}
        if len(data) >= self.LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _blob(self, name: str) -> str:
        return hashlib.sha1(self.files[name]).hexdigest()

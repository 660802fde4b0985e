"""Stores with the same checkpoint in each, on loopback; nothing leaves the machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pytest
from huggingface_hub import constants

from fp8ckpt.stores.address import address_of
from fp8ckpt.stores.opening import objects_of
from fp8ckpt.stores.remote import RemoteStore
from tests.oracle import tree
from tests.stores import servers
from tests.stores.servers import Hub, Server, serving, web

BUCKET = "bucket"
NAMED = {
    "s3": "s3://bucket/models/x",
    "hub": "hf://org/name@v1",
    "web": "http://user:secret@HOST/dir",
    "other": "memory://x",
}


@dataclass
class Far:
    """One kind of store, with the files of a checkpoint. ``server`` is where data comes from, if it is a server's."""

    kind: str
    url: str
    server: Server
    pauses: list[float] = field(default_factory=list)
    hub: Hub | None = None
    s3: Any = None

    def store(self) -> RemoteStore:
        """Opened anew; its pauses take no time."""
        address = address_of(self.url)
        assert address is not None
        return RemoteStore(objects_of(address), self.pauses.append)


@pytest.fixture(scope="session", autouse=True)
def descriptions() -> Iterator[None]:
    """What boto3 knows of S3 is megabytes of JSON, which it reads anew for each client: here once."""
    from botocore.loaders import JSONFileLoader

    read = functools.cache(JSONFileLoader().load_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", lambda _, path: read(path))
        yield


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    """An S3 server to which nothing happens."""
    with serving(servers.moto()) as server:
        yield server


@pytest.fixture
def s3(moto: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An S3 server with an empty bucket; boto3 finds it, and credentials, in its environment."""
    import boto3

    server = Server(moto.answer)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAUSER", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url, "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=moto.url)
    client.create_bucket(Bucket=BUCKET)
    yield server
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)
    server.close()


@pytest.fixture
def far(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    """``(kind, files)`` as a store of that kind."""
    kind, directory = request.param if isinstance(request.param, tuple) else (request.param, None)
    files = tree(directory or request.getfixturevalue("sample_fp8"))
    yield from _far(kind, files, request, monkeypatch)


def _far(
    kind: str, files: Mapping[str, bytes], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Far]:
    if kind == "s3":
        import boto3

        server, client = request.getfixturevalue("s3"), boto3.client("s3")
        for name, data in files.items():
            client.put_object(Bucket=BUCKET, Key=f"models/x/{name}", Body=data)
        server.forget()
        yield Far(kind, NAMED[kind], server, s3=client)
    elif kind == "hub":
        hub = Hub(files)
        point_at(hub, monkeypatch)
        yield Far(kind, NAMED[kind], hub.cdn, hub=hub)
        hub.close()
    elif kind == "web":
        server = Server(web({f"dir/{name}": data for name, data in files.items()}))
        yield Far(kind, NAMED[kind].replace("HOST", server.url.removeprefix("http://")), server)
        server.close()
    else:
        memory = fsspec.filesystem("memory")
        for name, data in files.items():
            memory.pipe(f"/x/{name}", data)
        yield Far(kind, NAMED[kind], Server(web({})))
        memory.rm("/x", recursive=True)


def point_at(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_TOKEN do before huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.hub.url)
    template = hub.hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", Hub.TOKEN)

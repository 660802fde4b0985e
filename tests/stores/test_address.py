"""A store's URL is never taken for a path: what cannot be served is refused by name, and nothing is made."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp8ckpt import (
    FP8StorageReader,
    FP8StorageWriter,
    SafetensorsStorageWriter,
    convert,
    inspect,
    load_model,
    load_pretrained,
    open_checkpoint,
    report,
    sample,
    save_model,
    verify,
)
from fp8ckpt.errors import Fp8CheckpointError, MissingPackageError, StorageError, UnsupportedStoreError
from fp8ckpt.stores.address import Address, address_of, local_path
from fp8ckpt.stores.opening import objects_of
from fp8ckpt.stores.remote import RemoteStore
from tests.conftest import Run

URLS = [
    "nowhere://bucket/out", "nowhere:/bucket/out", "NOWHERE://bucket/out", "s3:bucket/out", "hf:org/name",
    "file:///tmp/x", "a+b.c-1://x", "9p://x", " s3://b/x", "'s3://b/x", "user@host:/x", "arn:aws:s3:::bucket/prefix",
    "simplecache::s3://b/out", "filecache::gs:/b/out", "zip://x::s3://b/y.zip", "dbfs:x",
]  # fmt: skip
WRITTEN: list[str | Path] = ["gs://b/out", "hf://org/name", "https://host/out", Path("gs://b/out")]

READING: dict[str, Callable[[str, Path], object]] = {
    "open_checkpoint": lambda url, _: open_checkpoint(url),
    "inspect": lambda url, _: inspect(url),
    "convert": lambda url, _: convert(url, "out"),
    "convert --like": lambda url, fp8: convert(fp8, "out", to="fp8", like=url),
    "verify": lambda url, _: verify(url),
    "verify, the second": lambda url, fp8: verify(fp8, url),
    "report": lambda url, _: report(url),
    "load_model": lambda url, _: load_model(torch.nn.Linear(1, 1), url),
    "load_pretrained": lambda url, _: load_pretrained(url),
    "FP8StorageReader": lambda url, _: FP8StorageReader(url).checkpoint,
    "save_model, like": lambda url, _: save_model(torch.nn.Linear(1, 1), "out", like=url),
}
WRITING: dict[str, Callable[[str | Path, Path], object]] = {
    "convert": lambda url, fp8: convert(fp8, url),
    "convert --like": lambda url, fp8: convert(fp8, url, to="fp8", like=fp8),
    "report": lambda url, fp8: report(fp8, output=url),
    "sample": lambda url, _: sample(url),
    "save_model": lambda url, _: save_model(torch.nn.Linear(1, 1), url),
    "SafetensorsStorageWriter": lambda url, _: SafetensorsStorageWriter(url),
    "SafetensorsStorageWriter.reset": lambda url, _: SafetensorsStorageWriter("out").reset(url),
    "FP8StorageWriter": lambda url, fp8: FP8StorageWriter(url, like=fp8),
}


@pytest.mark.parametrize("url", URLS)
def test_every_form_of_a_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown scheme, a slash or two, none, any case."""
    monkeypatch.chdir(tmp_path)
    for refused in (lambda: open_checkpoint(url), lambda: sample(url)):
        with pytest.raises(UnsupportedStoreError, match=r"://"):
            refused()
    assert os.listdir() == []


@pytest.mark.parametrize("name", READING)
def test_sources(name: str, sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is a URL which is not served, also where a local folder has that very name."""
    (tmp_path / "nowhere:" / "bucket" / "out").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedStoreError, match=r"://"):
        READING[name]("nowhere://bucket/out", sample_fp8)
    assert os.listdir() == ["nowhere:"]


@pytest.mark.parametrize("name", WRITING)
def test_destinations(name: str, sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that is a URL: a local folder of the name is never made."""
    monkeypatch.chdir(tmp_path)
    for url in WRITTEN:
        with pytest.raises(UnsupportedStoreError, match=r"://"):
            WRITING[name](url, sample_fp8)
    assert os.listdir() == []


@pytest.mark.parametrize("arguments", ["convert {fp8} gs://b/out", "convert x://b/fp8 out", "sample s3://b/out"])
def test_the_command_line(arguments: str, sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """One line, exit code 1, and nothing is there."""
    done = cli(*arguments.format(fp8=sample_fp8).split(), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "://b/" in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "path", ["a", "./s3:/x", "/s3:/x", "c:/x", "./a:b", "model:v2", "m::v2", "a/b://c", "s3", "://x"]
)
def test_local_paths(path: str) -> None:
    """What is no URL stays a path."""
    assert address_of(path) is None
    assert local_path(path) == Path(path)


_SECRETS = [
    "nowhere://user:secret@b/x?X-Amz-Signature=secret#secret", "nowhere://secret@b/x", "s3://AKIA:ab/secret@bucket/p",
    "sftp://u:secret/x@host/y", "https://user:secret#x@h/d", "https://user:a?secret@h/d", "https://user:12/secret@h/d",
    "https://h:1/x?sig=secret@b", "https://u:x@secret/secret@h/d", "gs://c/p;sig=secret", "hf://user:secret@a/b@c/d@e",
    "hf://hf_secret@org/name@x", "abfs://key:secret@account/x", "u:secret@host:/x", " s3://k:secret@b/x",
    "zip://u:secret@x::s3://k:secret@b", "simplecache::s3://k:secret@b/x",
]  # fmt: skip


@pytest.mark.parametrize("url", _SECRETS)
def test_no_credentials_are_shown(url: str, sample_fp8: Path) -> None:
    """A user, a password, a token, a signed query and a fragment are in no message, however odd the URL is."""
    for refused in (open_checkpoint, lambda url: convert(sample_fp8, f"{url};secret")):
        with pytest.raises(Fp8CheckpointError, match=r"://") as caught:
            refused(url)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["hf://org/name@v1", "hf://gpt2@v1/x", "s3://b/a@v1/x", "abfs://c@account/x", "gs://h:80/x"]
)
def test_what_is_no_secret_is_shown(url: str) -> None:
    """Revisions, containers, ports: two places are never shown as one."""
    assert str(address_of(url)) == url


def test_what_is_not_shown_tells_stores_apart() -> None:
    """Two users of one host may see different files."""
    stores = [RemoteStore(objects_of(Address("memory", f"{user}:x@host/y"))) for user in "aba"]
    assert stores[0] == stores[2] != stores[1]
    assert stores[0].where == stores[1].where


def test_the_client_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not fsspec, which names it; and a client that takes more than a URL is no puzzle."""
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(MissingPackageError, match=r"sftp:// needs paramiko; pip install paramiko"):
        open_checkpoint("sftp://host/x")
    pytest.importorskip("requests")
    with pytest.raises(StorageError, match=r"dbfs://x: its client needs more than a URL; copy it to this machine"):
        open_checkpoint("dbfs:/x")

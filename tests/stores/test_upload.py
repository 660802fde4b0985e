"""Outputs in a store: whole or not there, in parts that a second run goes on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
import torch

from fp8ckpt import convert, save_model, verify
from fp8ckpt.errors import (
    CheckpointNotFoundError,
    OutputExistsError,
    ResumeMismatchError,
    SourceChangedError,
    StorageError,
)
from fp8ckpt.output import extents
from tests.stores.conftest import BUCKET, contents
from tests.stores.servers import Asked, Server

URL = f"s3://{BUCKET}/models/out"
PART = 16384  # bytes


@pytest.fixture
def client(s3: Server, moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """To look at what is there. Parts are small, pauses take no time, and the working directory is empty."""
    from moto.s3 import models

    monkeypatch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr(extents, "CHUNK", 4096)
    monkeypatch.setattr(extents, "EXTENT", PART)
    monkeypatch.setattr("fp8ckpt.stores.remote.wait", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    return boto3.client("s3", endpoint_url=moto)


def _there(client: Any) -> dict[str, bytes]:
    listed = client.list_objects_v2(Bucket=BUCKET).get("Contents", ())
    keys = [entry["Key"] for entry in listed]
    return {key.removeprefix("models/out/"): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def _parts(server: Server) -> Counter[tuple[str, str]]:
    """How often each part was sent."""
    sent = [asked for asked in server.asked if asked.method == "PUT" and "partNumber" in asked.path]
    return Counter((urlsplit(a.path).path, parse_qs(urlsplit(a.path).query)["partNumber"][0]) for a in sent)


@pytest.fixture(scope="module")
def converted(sample_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample in BF16."""
    output = tmp_path_factory.mktemp("bf16") / "out"
    convert(sample_fp8, output)
    return output


def test_there_and_back(s3: Server, client: Any, sample_fp8: Path, converted: Path) -> None:
    """To BF16, and back to FP8, from one place of the store to another: each byte is fetched once,
    and nothing is left on this machine.
    """
    result = convert(sample_fp8, URL)
    assert (result.destination, os.listdir()) == (URL, [])
    assert _there(client) == contents(converted)
    assert max(_parts(s3).values()) == 1
    assert sum(_parts(s3).values()) > 20
    s3.forget()
    convert(URL, f"s3://{BUCKET}/back", to="fp8", like=sample_fp8)
    assert s3.fetched <= 1.1 * sum(len(data) for data in contents(converted).values())
    assert verify(f"s3://{BUCKET}/back", sample_fp8).ok
    assert os.listdir() == []


def test_a_model_is_saved(client: Any) -> None:
    """`save_model`, too."""
    model = torch.nn.Linear(300, 200).to(torch.bfloat16)
    save_model(model, URL)
    save_model(model, "near")
    assert _there(client) == contents(Path("near"))


def test_the_order_of_what_is_seen(s3: Server, client: Any, sample_fp8: Path) -> None:
    """No file is there before all parts of all files are; the index and the configuration come last."""
    convert(sample_fp8, URL)
    writes = [asked for asked in s3.asked if asked.method in ("PUT", "POST")]
    seen = [a for a in writes if "partNumber" not in a.path and not urlsplit(a.path).query.startswith("uploads")]
    last_part = max(i for i, asked in enumerate(writes) if "partNumber" in asked.path)
    assert writes.index(seen[0]) > last_part
    names = [Path(urlsplit(asked.path).path).name for asked in seen]
    assert all(name.endswith(".safetensors") for name in names[:3])
    assert names[-2:] == ["model.safetensors.index.json", "config.json"]


@pytest.mark.parametrize("at", [0, 1, 10, 25, 26, 28, 30])
def test_a_kill_and_a_second_run(s3: Server, client: Any, at: int, sample_fp8: Path, converted: Path) -> None:
    """Killed at a request of the upload, among the parts, the completions, the small files: the same bytes, and no part
    is sent twice but those that were on the way.
    """
    count = 0

    def kill(asked: Asked) -> None:
        nonlocal count
        is_write = asked.method == "PUT" or "uploadId" in asked.path
        if is_write and asked.method in ("PUT", "POST") and count == at:
            raise KeyboardInterrupt
        count += is_write and asked.method in ("PUT", "POST")

    _interrupted(s3, kill, lambda: convert(sample_fp8, URL))
    assert "config.json" not in _there(client)
    s3.fault = lambda asked: None
    convert(sample_fp8, URL)
    assert _there(client) == contents(converted)
    assert os.listdir() == []
    twice = [part for part, times in _parts(s3).items() if times > 1]
    assert len(twice) <= 4
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)


def _interrupted(server: Server, at: Any, step: Any) -> None:
    """Take a step whose requests, from one on, all fail: what a death leaves behind."""
    dead = False

    def fault(asked: Asked) -> str | None:
        nonlocal dead
        try:
            at(asked)
        except KeyboardInterrupt:
            dead = True
        return "503" if dead else None

    server.fault = fault
    with pytest.raises(StorageError, match=r"failed at attempt 8.*out\.partial, and the same command goes on"):
        step()


def test_a_process_that_is_killed(s3: Server, client: Any, sample_fp8: Path, converted: Path) -> None:
    """By the system, in the middle of its parts."""
    code = "from fp8ckpt.output import extents; extents.CHUNK, extents.EXTENT = 4096, 16384\n"
    code += f"from fp8ckpt import convert; convert({str(sample_fp8)!r}, {URL!r})"
    child = subprocess.Popen([sys.executable, "-c", code])
    s3.fault = lambda asked: os.kill(child.pid, signal.SIGKILL) if "partNumber=12&" in f"{asked.path}&" else None
    assert child.wait(60) == -signal.SIGKILL
    s3.forget()
    convert(sample_fp8, URL)
    assert _there(client) == contents(converted)
    assert sum(_parts(s3).values()) < sum(-(-path.stat().st_size // PART) for path in converted.glob("*.safetensors"))


def test_answers_that_are_lost(s3: Server, client: Any, sample_fp8: Path, converted: Path) -> None:
    """Each request is done, and its first answer is lost: it is asked again, and nothing is there twice or not."""
    seen: set[tuple[str, str]] = set()

    def lose(asked: Asked) -> str | None:
        key = asked.method, asked.path
        return "lost" if key not in seen and not seen.add(key) else None  # type: ignore[func-returns-value]

    s3.fault = lose
    convert(sample_fp8, URL)
    assert _there(client) == contents(converted)


def test_parts_of_another_run_are_not_taken(s3: Server, client: Any, sample_fp8: Path, converted: Path) -> None:
    """An upload that somebody else began: its parts are compared, and what differs is sent."""
    key = "models/out/model-00001-of-00003.safetensors"
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
    client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * PART)
    convert(sample_fp8, URL)
    assert _there(client) == contents(converted)


@pytest.mark.parametrize("name", ["config.json", "x/y"])
def test_nothing_is_overwritten(s3: Server, client: Any, name: str, sample_fp8: Path) -> None:
    """A destination below which there is anything is refused before anything is written; a neighbour is not meant."""
    client.put_object(Bucket=BUCKET, Key=f"models/out/{name}", Body=b"x")
    with pytest.raises(OutputExistsError, match="there are objects below it"):
        convert(sample_fp8, URL)
    assert os.listdir() == []
    assert _there(client) == {name: b"x"}
    convert(sample_fp8, URL + "-2")


def test_what_came_between(s3: Server, client: Any, sample_fp8: Path) -> None:
    """An object that another process made while a run was cut off in completing: it is kept, and named."""
    _interrupted(s3, _at_first_completion(), lambda: convert(sample_fp8, URL))
    s3.forget()
    client.put_object(Bucket=BUCKET, Key="models/out/model-00002-of-00003.safetensors", Body=b"theirs")
    with pytest.raises(OutputExistsError, match="there is another object of this name below"):
        convert(sample_fp8, URL)
    assert _there(client) == {"model-00002-of-00003.safetensors": b"theirs"}


def _at_first_completion() -> Any:
    def at(asked: Asked) -> None:
        if asked.method == "POST" and "uploadId" in asked.path:
            raise KeyboardInterrupt

    return at


def test_another_conversion_is_not_gone_on_with(s3: Server, client: Any, sample_fp8: Path) -> None:
    """What a cut-off run left here is of its own plan alone."""
    _interrupted(s3, _at_first_completion(), lambda: convert(sample_fp8, URL))
    s3.forget()
    with pytest.raises(ResumeMismatchError):
        convert(sample_fp8, URL, to="fp32")
    assert _there(client) == {}


def test_a_source_that_changes(s3: Server, client: Any, tmp_path: Path, sample_fp8: Path) -> None:
    """It is found before anything is seen; and nothing is left here."""
    import shutil

    from fp8ckpt import open_checkpoint

    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    checkpoint = open_checkpoint(source)
    (source / "config.json").touch()
    with pytest.raises(SourceChangedError):
        convert(checkpoint, URL)
    assert _there(client) == {}
    assert os.listdir() == ["fp8"]


def test_a_bucket_that_is_not_there(client: Any, sample_fp8: Path) -> None:
    """It is named before anything is made."""
    with pytest.raises(CheckpointNotFoundError, match="s3://none/out: the store answered 404 NoSuchBucket"):
        convert(sample_fp8, "s3://none/out")
    assert os.listdir() == []

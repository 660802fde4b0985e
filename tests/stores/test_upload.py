"""Outputs in a store: whole or not there, in parts that a second run goes on with."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8ckpt import convert, plan_convert, save_model, verify
from fp8ckpt.encodings.results import Fp8Result
from fp8ckpt.errors import (
    CheckpointNotFoundError,
    OutputBusyError,
    OutputExistsError,
    ResumeMismatchError,
    SourceChangedError,
    StorageError,
    UnsupportedStoreError,
    WeightValueError,
)
from fp8ckpt.output import extents
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.stores import remote, upload
from fp8ckpt.stores.address import Address
from fp8ckpt.stores.s3 import S3Objects
from fp8ckpt.stores.upload import LOCK
from tests.distributed import Launched
from tests.oracle import tree
from tests.stores.conftest import BUCKET
from tests.stores.servers import Answer, Asked, Server
from tests.test_four_bits import FAMILIES, write_plain
from tests.test_four_bits import trained as trained_in_four_bits
from tests.test_to_fp8_runs import outgrown

URL = f"s3://{BUCKET}/models/out"
PART = 32768  # bytes


@pytest.fixture
def client(s3: Server, moto: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """To look at what is there. Parts are small, pauses take no time, and the working directory is empty."""
    from moto.s3 import models

    monkeypatch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr(extents, "CHUNK", 8192)
    monkeypatch.setattr(extents, "PART", PART)
    monkeypatch.setattr("fp8ckpt.stores.remote.wait", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    return boto3.client("s3", endpoint_url=moto.url)


def _there(client: Any, prefix: str = "models/out/") -> dict[str, bytes]:
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
    keys = [entry["Key"] for entry in listed if not entry["Key"].endswith(LOCK)]
    return {key.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def _parts(server: Server) -> Counter[tuple[str, str]]:
    """How often each part was sent."""
    sent = [asked for asked in server.asked if asked.method == "PUT" and "partNumber" in asked.path]
    return Counter((urlsplit(a.path).path, parse_qs(urlsplit(a.path).query)["partNumber"][0]) for a in sent)


def test_there_and_back(s3: Server, client: Any, sample_fp8: Path, sample_bf16: Path) -> None:
    """To BF16, and back to FP8, from one place of the store to another: each byte is fetched once, the first 128 KiB of
    each of the three files for their headers aside, and nothing is left on this machine.
    """
    result = convert(sample_fp8, URL)
    assert (result.destination, os.listdir()) == (URL, [])
    assert _there(client) == tree(sample_bf16)
    assert max(_parts(s3).values()) == 1
    assert sum(_parts(s3).values()) > 20
    s3.forget()
    convert(URL, f"s3://{BUCKET}/back", to="fp8", like=sample_fp8)
    assert s3.fetched <= 1.1 * sum(len(data) for data in tree(sample_bf16).values()) + 3 * (128 << 10)
    assert verify(f"s3://{BUCKET}/back", sample_fp8).ok
    assert os.listdir() == []


def test_a_model_is_saved(client: Any) -> None:
    """`save_model`, too."""
    model = torch.nn.Linear(300, 200).to(torch.bfloat16)
    save_model(model, URL)
    save_model(model, "near")
    assert _there(client) == tree(Path("near"))


def test_the_order_of_what_is_seen(s3: Server, client: Any, sample_fp8: Path) -> None:
    """No file is there before all parts of all files are; the index and the configuration come last."""
    convert(sample_fp8, URL)
    writes = [asked for asked in s3.asked if asked.method in ("PUT", "POST") and not asked.path.endswith(LOCK)]
    seen = [a for a in writes if "partNumber" not in a.path and not urlsplit(a.path).query.startswith("uploads")]
    last_part = max(i for i, asked in enumerate(writes) if "partNumber" in asked.path)
    assert writes.index(seen[0]) > last_part
    names = [Path(urlsplit(asked.path).path).name for asked in seen]
    assert all(name.endswith(".safetensors") for name in names[:3])
    assert names[-2:] == ["model.safetensors.index.json", "config.json"]


PUTS = ("PUT", "partNumber="), ("POST", "uploadId="), ("PUT", ".json")  # parts, completions, small files


@pytest.mark.parametrize(("what", "at"), [(0, 0), (0, 30), (1, 1), (2, 0), (2, 3)], ids=lambda value: str(value))
def test_a_cut_and_a_second_run(
    s3: Server, client: Any, what: int, at: int, sample_fp8: Path, sample_bf16: Path
) -> None:
    """Cut off at any request, the rerun ends with the same bytes, and sends no part again that had arrived."""
    method, path = PUTS[what]
    count = 0

    def kill(asked: Asked) -> None:
        nonlocal count
        if asked.method == method and path in asked.path and (count := count + 1) > at:
            raise KeyboardInterrupt

    _interrupted(s3, kill, lambda: convert(sample_fp8, URL))
    assert "config.json" not in _there(client)
    s3.fault = lambda asked: None
    before = _parts(s3)
    convert(sample_fp8, URL)
    assert _there(client) == tree(sample_bf16)
    assert os.listdir() == []
    assert client.list_objects_v2(Bucket=BUCKET, Prefix="models/out/.").get("Contents", ()) == ()
    assert len([part for part in _parts(s3) if _parts(s3)[part] > before[part] > 0]) <= 2 * upload.AT_ONCE
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)


GOES_ON = r"failed at attempt 8.*out.*\.partial, and the same command continues"


def _interrupted(server: Server, at: Any, step: Any, match: str = GOES_ON) -> None:
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
    with pytest.raises(StorageError, match=match):
        step()


def test_a_process_that_is_killed(s3: Server, client: Any, sample_fp8: Path, sample_bf16: Path) -> None:
    """By the system, in the middle of its parts."""
    code = "from fp8ckpt.output import extents; extents.CHUNK, extents.PART = 8192, 32768\n"
    code += f"from fp8ckpt import convert; convert({str(sample_fp8)!r}, {URL!r})"
    child = subprocess.Popen([sys.executable, "-c", code])
    s3.fault = lambda asked: os.kill(child.pid, signal.SIGKILL) if "partNumber=12&" in f"{asked.path}&" else None
    assert child.wait(60) == -signal.SIGKILL
    s3.forget()
    convert(sample_fp8, URL)
    assert _there(client) == tree(sample_bf16)
    everything = sum(-(-path.stat().st_size // PART) for path in sample_bf16.glob("*.safetensors"))
    assert sum(_parts(s3).values()) <= everything - 12 + upload.AT_ONCE


def test_answers_that_are_lost(s3: Server, client: Any, sample_fp8: Path, sample_bf16: Path) -> None:
    """Each request is done, and its first answer is lost: it is asked again, and nothing is there twice or not."""
    seen: set[tuple[str, str]] = set()

    def lose(asked: Asked) -> str | None:
        key = asked.method, asked.path
        return "lost" if key not in seen and not seen.add(key) else None  # type: ignore[func-returns-value]

    s3.fault = lose
    convert(sample_fp8, URL)
    assert _there(client) == tree(sample_bf16)


def opaque(server: Server) -> None:
    """As stores that encrypt with keys of their own do it: no ETag is an MD5."""
    answer, of_parts = server.answer, dict[bytes, bytes]()

    def replaced(text: bytes, by: dict[bytes, bytes]) -> bytes:
        for old, new in by.items():
            text = text.replace(old, new)
        return text

    def encrypted(asked: Asked) -> Answer:
        ours = {new: old for old, new in of_parts.items()}
        found = answer(asked._replace(body=replaced(asked.body, ours)) if asked.method == "POST" else asked)
        etag = found.headers.get("ETag", "").strip('"')
        if asked.method == "PUT" and "partNumber" in asked.path and etag:
            of_parts[etag.encode()] = b"z" + etag[1:].encode()
        headers = {**found.headers, "ETag": f'"z{etag[1:]}"'} if etag else found.headers
        return Answer(found.status, headers, replaced(found.body, of_parts) if "uploadId" in asked.path else found.body)

    server.answer = encrypted


def test_etags_that_are_no_digests(s3: Server, client: Any, sample_fp8: Path, sample_bf16: Path) -> None:
    """Cut off at a part, at a completion, at its answer: parts are not sent again, nor others' objects taken."""
    opaque(s3)
    _interrupted(s3, _at_part(20), lambda: convert(sample_fp8, URL))
    s3.fault = lambda asked: None
    before, lost = _parts(s3), [False]

    def at(asked: Asked) -> None:
        if asked.method == "POST" and "uploadId" in asked.path and "00002" in asked.path:
            raise KeyboardInterrupt

    _interrupted(s3, at, lambda: convert(sample_fp8, URL))
    assert len([part for part in _parts(s3) if _parts(s3)[part] > before[part] > 0]) <= 2 * upload.AT_ONCE
    assert len(_there(client)) == 1
    sent = _parts(s3)

    def lose(asked: Asked) -> str | None:
        first = not lost[0] and asked.method == "POST" and "uploadId" in asked.path
        lost[0] = lost[0] or first
        return "lost" if first else None

    s3.fault = lose
    convert(sample_fp8, URL)
    assert (_there(client), _parts(s3), lost) == (tree(sample_bf16), sent, [True])
    _interrupted(s3, _at_first_completion(), lambda: convert(sample_fp8, URL + "-2"))
    s3.fault = lambda asked: None
    client.put_object(Bucket=BUCKET, Key="models/out-2/model-00001-of-00003.safetensors", Body=b"theirs")
    with pytest.raises(OutputExistsError, match="there is another object of this name"):
        convert(sample_fp8, URL + "-2")


def test_a_bucket_that_may_be_read_only(s3: Server, client: Any, sample_fp8: Path) -> None:
    """Nothing is left here of what could not begin there; nor where a prefix is none."""
    answer = s3.answer
    s3.answer = lambda asked: Answer(403, {}, b"") if asked.method == "PUT" else answer(asked)
    with pytest.raises(StorageError, match="the store answered 403"):
        convert(sample_fp8, URL)
    for url in (f"s3://{BUCKET}//models/out", f"s3://{BUCKET}/models//out"):
        with pytest.raises(UnsupportedStoreError, match="two slashes follow each other in its prefix"):
            convert(sample_fp8, url)
    assert os.listdir() == []


def _of_a_stranger(client: Any, key: str, body: bytes) -> str:
    of = {"Bucket": BUCKET, "Key": key}
    upload = client.create_multipart_upload(**of, ContentType="text/x-theirs", Metadata={"owner": "they"})["UploadId"]
    client.upload_part(**of, UploadId=upload, PartNumber=1, Body=body)
    return str(upload)


def test_uploads_of_others_are_left_alone(
    s3: Server, client: Any, sample_fp8: Path, sample_bf16: Path, trained: Path
) -> None:
    """Nothing of other uploads gets into the result, and giving up ours does not end theirs."""
    key = "models/out/model-00001-of-00003.safetensors"
    body = (sample_bf16 / Path(key).name).read_bytes()[:PART]
    theirs = {_of_a_stranger(client, key, body)}
    _interrupted(s3, _at_part(20), lambda: convert(sample_fp8, URL))
    s3.forget()
    theirs.add(_of_a_stranger(client, key, body))
    everything = sum(-(-path.stat().st_size // PART) for path in sample_bf16.glob("*.safetensors"))
    convert(sample_fp8, URL)
    made = client.head_object(Bucket=BUCKET, Key=key)
    assert (_there(client), list(made["Metadata"])) == (tree(sample_bf16), ["fp8ckpt-run"])
    assert made["ContentType"] != "text/x-theirs"
    assert everything - 20 <= sum(_parts(s3).values()) <= everything - 20 + upload.AT_ONCE
    theirs.add(_of_a_stranger(client, "models/bad/model.safetensors", body))
    with pytest.raises(WeightValueError):
        convert(_not_finite(trained), f"s3://{BUCKET}/models/bad", to="fp8", scheme="per-tensor")
    left = client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert {one["UploadId"] for one in left} == theirs
    for one in left:
        client.abort_multipart_upload(Bucket=BUCKET, Key=one["Key"], UploadId=one["UploadId"])


@pytest.mark.parametrize("name", ["config.json", "x/y"])
def test_nothing_is_overwritten(s3: Server, client: Any, name: str, sample_fp8: Path) -> None:
    """A destination below which there is anything is refused before anything is written; a neighbour is not meant."""
    client.put_object(Bucket=BUCKET, Key=f"models/out/{name}", Body=b"x")
    with pytest.raises(OutputExistsError, match="there are objects below it"):
        convert(sample_fp8, URL)
    assert os.listdir() == []
    assert _there(client) == {name: b"x"}
    for folder in ("", "assets/"):  # as consoles make them; they are no files of a checkpoint
        client.put_object(Bucket=BUCKET, Key=f"models/out-2/{folder}", Body=b"")
    convert(sample_fp8, URL + "-2")
    with pytest.raises(OutputExistsError, match="inside the source s3://bucket/models/out-2"):
        convert(f"{URL}-2/", URL + "-2/within")  # what is below a source is taken for its own
    convert(URL + "-2", URL + "-2-again")


def test_a_place_of_the_same_last_name_does_not_go_on(
    s3: Server, client: Any, sample_fp8: Path, sample_bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State is found by the last name: parts sent elsewhere are not lost, and locks of others stay."""
    _interrupted(s3, _at_first_completion(), lambda: convert(sample_fp8, URL))
    s3.forget()
    for other in (f"s3://{BUCKET}/elsewhere/out", "out"):
        with pytest.raises(
            ResumeMismatchError, match=r"writes to s3://bucket/models/out; run this in another"
        ) as caught:
            convert(sample_fp8, other)
        assert "delete" not in str(caught.value)
    convert(sample_fp8, URL + "/")
    assert _there(client) == tree(sample_bf16)
    with monkeypatch.context() as patch:
        patch.setattr(PartialOutput, "publish", _raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(sample_fp8, "here")
    here = Path("here").absolute()
    with pytest.raises(ResumeMismatchError, match=f"writes to {here}; run this in another") as caught:
        convert(sample_fp8, f"s3://{BUCKET}/here")
    assert "delete" not in str(caught.value)
    convert(sample_fp8, "here")
    assert tree(Path("here")) == tree(sample_bf16)


def test_small_files_are_copied_several_at_once(s3: Server, client: Any, sample_fp8: Path) -> None:
    """From a store and to it; what makes a checkpoint of them comes last, one after the other."""
    _put(client, sample_fp8)
    for i in range(8):
        client.put_object(Bucket=BUCKET, Key=f"models/src/notes/{i}", Body=b"x" * (i + 1))
    pair = threading.Barrier(2, timeout=5)

    def wait_for_another(asked: Asked) -> None:
        if "/notes/" in asked.path:
            pair.wait()

    s3.fault = wait_for_another
    convert(f"s3://{BUCKET}/models/src", URL)
    there = _there(client)
    assert [there[f"notes/{i}"] for i in range(8)] == [b"x" * (i + 1) for i in range(8)]
    put = [asked.path.partition("?")[0].rpartition("/")[2] for asked in s3.asked if asked.method == "PUT"]
    assert put[-2:] == ["model.safetensors.index.json", "config.json"]


def test_what_no_job_reads_may_change(s3: Server, client: Any, sample_fp8: Path) -> None:
    """A log below the prefix that grows: nothing to verify; but a conversion copies it."""
    _put(client, sample_fp8)
    client.put_object(Bucket=BUCKET, Key="models/src/train.log", Body=b"1")
    source, seen = f"s3://{BUCKET}/models/src", [b"1"]

    def grow(asked: Asked) -> None:
        if asked.ranged:
            seen.append(b"1")
            client.put_object(Bucket=BUCKET, Key="models/src/train.log", Body=b"".join(seen))

    s3.fault = grow
    assert verify(source).ok
    assert len(seen) > 5
    with pytest.raises(SourceChangedError, match=r"train\.log"):
        convert(source, "out")


def _put(client: Any, directory: Path) -> None:
    for name, data in tree(directory).items():
        client.put_object(Bucket=BUCKET, Key=f"models/src/{name}", Body=data)


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


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


# ---------------------------------------------------------------- what this machine holds, and who else writes there


def _on_disk() -> int:
    """Bytes of the files of weights that the disk holds: holes are none."""
    return sum(path.stat().st_blocks * 512 for path in Path().glob("*.partial/output/*.safetensors"))


def _watched(server: Server) -> list[int]:
    """What `_on_disk` was at each part that is sent."""
    seen: list[int] = []

    def watch(asked: Asked) -> None:
        if "partNumber=" in asked.path:
            seen.append(_on_disk())

    server.fault = watch
    return seen


def test_no_disk_for_the_data(s3: Server, client: Any, sample_fp8: Path, sample_bf16: Path) -> None:
    """Parts go there as they are made: none of the data is on this machine's disk, and none is asked for."""
    near, far = plan_convert(sample_fp8, "near"), plan_convert(sample_fp8, URL)
    size = sum(path.stat().st_size for path in sample_bf16.glob("*.safetensors"))
    assert near.bytes_needed - far.bytes_needed == size
    assert near.bytes_to_write == far.bytes_to_write == far.bytes_to_upload
    assert (near.bytes_to_upload, far.seconds) == (0, None)
    seen, told = _watched(s3), []
    convert(sample_fp8, URL, progress=lambda *now: told.append((*now, sum(_parts(s3).values()))))
    assert set(seen) == {0}
    assert len(seen) > 30
    assert told[-1][:2] == (size, size)
    assert all(done <= parts * PART and doing.startswith("sending") for done, _, doing, parts in told)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As of `outgrown`."""
    return outgrown(tmp_path_factory.mktemp("trained"))


def test_scales_are_kept_until_they_are_known(s3: Server, client: Any, trained: Path) -> None:
    """To FP8, only extents with scales wait on this machine's disk; a part goes again where its scale turned out to be
    another one, and the report is that of a conversion to a directory. One worker: of several, each may meet what has
    outgrown a scale before any part of it was sent.
    """
    seen = _watched(s3)
    far = convert(trained / "trained", URL, to="fp8", like=trained / "fp8", workers=1)
    near = convert(trained / "trained", "near", to="fp8", like=trained / "fp8")
    assert far.report == near.report
    assert _there(client) == tree(trained / "undisturbed") == tree(Path("near"))
    assert max(seen) <= 4 * PART
    assert sum(path.stat().st_size for path in (trained / "undisturbed").glob("*.safetensors")) > 10 * PART
    assert max(_parts(s3).values()) == 2
    assert {kept for kept, times in _parts(s3).items() if times == 1}


def test_a_cut_among_the_passes(s3: Server, client: Any, trained: Path) -> None:
    """Cut off in the first pass, or in the second: the same bytes, and what was sent in its last form is not again."""

    def run(url: str) -> None:
        convert(trained / "trained", url, to="fp8", like=trained / "fp8")

    run(URL + "-clean")
    everything = sum(_parts(s3).values())
    for at in (everything // 2, everything - 4):
        _interrupted(s3, _at_part(at), lambda at=at: run(f"{URL}-{at}"))
        s3.forget()
        run(f"{URL}-{at}")
        assert _there(client, f"models/out-{at}/") == tree(trained / "undisturbed")
        assert max(_parts(s3).values()) <= 2
        assert sum(_parts(s3).values()) <= everything - at + 2 * upload.AT_ONCE


def test_parts_that_were_aborted_meanwhile(s3: Server, client: Any, sample_fp8: Path, sample_bf16: Path) -> None:
    """What the state here says was sent, and is not there any more, is made again."""
    _interrupted(s3, _at_part(20), lambda: convert(sample_fp8, URL))
    s3.forget()
    for entry in client.list_multipart_uploads(Bucket=BUCKET)["Uploads"][:1]:
        client.abort_multipart_upload(Bucket=BUCKET, Key=entry["Key"], UploadId=entry["UploadId"])
    convert(sample_fp8, URL)
    assert _there(client) == tree(sample_bf16)


def _at_part(at: int) -> Any:
    left = at

    def kill(asked: Asked) -> None:
        nonlocal left
        left -= "partNumber=" in asked.path
        if left < 0:
            raise KeyboardInterrupt

    return kill


def test_two_runs_at_once(s3: Server, client: Any, sample_fp8: Path, sample_bf16: Path, tmp_path: Path) -> None:
    """From two machines: the second is refused, and the first one's output is its own. Where the state of a run was
    lost, its lock is what says so; without it, another run begins anew.
    """
    _interrupted(s3, _at_part(20), lambda: convert(sample_fp8, URL))
    s3.forget()
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    with pytest.raises(OutputBusyError, match=rf"{URL}/{LOCK}.*another run is writing there.*delete this object"):
        convert(sample_fp8, URL, to="fp32")
    assert (os.listdir(), _parts(s3)) == ([], Counter())
    client.delete_object(Bucket=BUCKET, Key=f"models/out/{LOCK}")
    everything = sum(-(-path.stat().st_size // PART) for path in sample_bf16.glob("*.safetensors"))
    convert(sample_fp8, URL)
    assert _there(client) == tree(sample_bf16)
    assert sum(_parts(s3).values()) == everything
    for one in client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]:  # of the first
        client.abort_multipart_upload(Bucket=BUCKET, Key=one["Key"], UploadId=one["UploadId"])


@pytest.mark.parametrize("known", ["no", "refused"])
def test_a_store_without_conditions(
    known: str, s3: Server, client: Any, sample_fp8: Path, sample_bf16: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is written to, and a warning says that nothing keeps others away."""
    answer = s3.answer

    def without(asked: Asked) -> Answer:
        if "if-none-match" not in asked.headers:
            return answer(asked)
        headers = {key: value for key, value in asked.headers.items() if key != "if-none-match"}
        return Answer(501, {}, b"") if known == "refused" else answer(asked._replace(headers=headers))

    s3.answer = without
    convert(sample_fp8, URL)
    assert _there(client) == tree(sample_bf16)
    assert "does not support conditional writes" in caplog.text


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_another_request_at_the_same_moment(code: str, s3: Server, client: Any) -> None:
    """A store that is busy with another condition on the same object says 409, and is asked again."""
    answer, busy = s3.answer, [Answer(409, {}, f"<Error><Code>{code}</Code></Error>".encode())]
    s3.answer = lambda asked: busy.pop() if busy and "if-none-match" in asked.headers else answer(asked)
    uploads = S3Objects(Address("s3", f"{BUCKET}/x"))
    upload.Destination(uploads, Path("own")).hold("run")
    assert (busy, uploads.text(LOCK)) == ([], b"run")


def test_what_can_never_be_whole_is_taken_away(s3: Server, client: Any, trained: Path) -> None:
    """A weight that is not finite: the parts that are there are aborted, and others may write there."""
    with pytest.raises(WeightValueError):
        convert(_not_finite(trained), URL, to="fp8", scheme="per-tensor")
    assert os.listdir() == ["bad"]
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)
    assert "Contents" not in client.list_objects_v2(Bucket=BUCKET)


def test_a_part_that_comes_after_its_upload_was_aborted(s3: Server, client: Any) -> None:
    """S3 may keep what was on its way: it is looked for, and the upload aborted again until nothing is there."""
    uploads = S3Objects(Address("s3", f"{BUCKET}/x"))
    late = uploads.begin("late", "run")
    uploads.put_part("late", late, 1, b"abc", hashlib.md5(b"abc").digest())
    answer, aborts = s3.answer, 0

    def keeping(asked: Asked) -> Answer:
        nonlocal aborts
        aborts += asked.method == "DELETE"
        return Answer(204, {}, b"") if asked.method == "DELETE" and aborts < 3 else answer(asked)

    s3.answer = keeping
    Path("own").write_text(f'["late", "{late}"]')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "wait", lambda seconds: None)
        upload.Destination(uploads, Path("own")).give_up(["late"])
    assert aborts == 3
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)


def _not_finite(trained: Path) -> Path:
    tensors = load_file(next((trained / "trained").glob("*.safetensors")))
    name = max(name for name in tensors if name.endswith("proj.weight"))
    tensors[name][0, 0] = torch.nan
    Path("bad").mkdir()
    save_file(tensors, "bad/model.safetensors")
    return Path("bad")


def test_ranks_write_one_output(s3: Server, client: Any, trained: Path) -> None:
    """Two ranks, each its own parts: the same bytes."""
    code = "from fp8ckpt.output import extents; extents.CHUNK, extents.PART = 8192, 32768\n"
    code += f"from fp8ckpt import convert; convert({str(trained / 'trained')!r}, {URL!r}, to='fp8', "
    code += f"like={str(trained / 'fp8')!r})"
    Path("job.py").write_text(code)
    named = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    status, _, stderr = Launched(Path("ranks"), 2, "job.py", **named).ended()
    assert status == 0, stderr
    assert _there(client) == tree(trained / "undisturbed")


def test_as_many_parts_as_a_store_takes() -> None:
    """A file of any size has at most 10,000 parts, none but the last below 5 MiB, and none over 5 GiB."""
    for size in (1, 10 << 30, 5 << 40):
        layout = FileLayout("model.safetensors", b"", (), size)
        starts = range(0, size, max(extents.CHUNK, size // 100_000))
        chunks = [extents.Chunk(start, min(start + starts.step, size), 0) for start in starts]
        parts = [extent.stop - extent.start for extent in extents.extents_of(layout, chunks, extents.PART)]
        assert (sum(parts), len(parts) <= 10_000) == (size, True)
        assert all(5 << 20 <= part <= 5 << 30 for part in parts[:-1])


def test_factors_are_kept_until_they_are_known(s3: Server, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of two levels, weights that outgrow the second one, and others beside them: the bytes of a directory."""
    monkeypatch.setattr(extents, "CHUNK", 1024)
    monkeypatch.setattr(extents, "PART", 1024)
    family = FAMILIES["ModelOpt NVFP4"]
    base = family.write(Path("fp4"))
    source = write_plain(Path("source"), trained_in_four_bits(family, np.random.default_rng(1), "BF16"))
    near, far = (convert(source, to, like=base) for to in ("near", URL))
    assert isinstance(near, Fp8Result)
    assert isinstance(far, Fp8Result)
    assert near.report is not None
    assert near.report.total.fresh
    assert (far.report, _there(client)) == (near.report, tree(Path("near")))

"""Checkpoints that are far away: every way in gives what a local copy gives, in few requests, whatever happens."""

from __future__ import annotations

import base64
import gc
import json
import logging
import os
import pickle
import random
import signal
import ssl
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import urllib3
from safetensors.torch import save_file

from fp8ckpt import (
    FP8StorageReader,
    convert,
    inspect,
    load_model,
    load_pretrained,
    merge,
    open_checkpoint,
    report,
    sample,
    verify,
)
from fp8ckpt.errors import (
    CheckpointNotFoundError,
    Fp8CheckpointError,
    MissingPackageError,
    SourceChangedError,
    StorageError,
    UnsupportedStoreError,
)
from fp8ckpt.numerics.geometry import Region
from fp8ckpt.sample import DeepseekSizes
from fp8ckpt.stores import ahead, http, remote, shared
from fp8ckpt.stores import s3 as s3_module
from fp8ckpt.stores.ahead import Window
from fp8ckpt.stores.store import ByteRange, Stat
from fp8ckpt.tensors import header
from tests.distributed import bits
from tests.oracle import tree
from tests.stores.conftest import BUCKET, Far
from tests.stores.servers import Answer, Asked, Hub, Server, ranged, serving, web

ALL = pytest.mark.parametrize("far", ["s3", "hub", "web", "other"], indirect=True)
SERVED = pytest.mark.parametrize("far", ["s3", "hub", "web"], indirect=True)
S3 = pytest.mark.parametrize("far", ["s3"], indirect=True)
HUB = pytest.mark.parametrize("far", ["hub"], indirect=True)
WEB = pytest.mark.parametrize("far", ["web"], indirect=True)


# ---------------------------------------------------------------- every way in


@ALL
def test_every_command(far: Far, sample_fp8: Path, sample_bf16: Path, tmp_path: Path) -> None:
    """inspect, convert, convert --like, verify: by the URL, and the same as of the directory."""
    found = inspect(far.url, scales=True)
    assert (found.defects, found.tensors, found.scales) == ((), *_of(inspect(sample_fp8, scales=True)))
    assert "secret" not in str(found.path)
    convert(far.url, tmp_path / "bf16")
    assert tree(tmp_path / "bf16") == tree(sample_bf16)
    convert(sample_bf16, tmp_path / "fp8", to="fp8", like=far.url)
    assert tree(tmp_path / "fp8") == tree(sample_fp8)
    assert verify(far.url, sample_fp8).ok
    assert verify(sample_bf16, far.url).ok


@S3
def test_a_report(far: Far, sample_fp8: Path, tmp_path: Path) -> None:
    """Of two sides, one of them far away."""
    found = report(far.url, sample_fp8, output=tmp_path / "page.html")
    assert {row.moved for row in found.changes or ()} == {0}


def _of(found: Any) -> tuple[int, Any]:
    return found.tensors, found.scales


@ALL
def test_every_reader(far: Far, sample_fp8: Path) -> None:
    """Checkpoint.read, FP8StorageReader and load_model; a checkpoint that is open may go to another process."""
    near, checkpoint = open_checkpoint(sample_fp8), open_checkpoint(far.url)
    name = near.quantized[0].name
    assert checkpoint.read(name, (3, 5), (7, 11)).equal(near.read(name, (3, 5), (7, 11)))
    assert pickle.loads(pickle.dumps(checkpoint)).read(name).equal(near.read(name))
    state = {key: torch.zeros(tensor.shape, dtype=near.read(key).dtype) for key, tensor in near.tensors.items()}
    assert FP8StorageReader.validate_checkpoint_id(far.url)
    dcp.load(state, storage_reader=FP8StorageReader(far.url), no_dist=True)
    assert all(bits(value) == bits(near.read(key)) for key, value in state.items())
    model = torch.nn.Module()
    model.register_parameter("lm_head_weight", torch.nn.Parameter(torch.zeros(512, 128, dtype=torch.bfloat16)))
    model._parameters["lm_head.weight"] = model._parameters.pop("lm_head_weight")
    load_model(model, far.url, partial=True)
    assert model._parameters["lm_head.weight"].equal(near.read("lm_head.weight"))


@HUB
def test_load_pretrained(far: Far, sample_fp8: Path) -> None:
    """A transformers model is built from the configuration there."""
    loaded, expected = (load_pretrained(path).state_dict() for path in (far.url, sample_fp8))
    assert all(value.equal(expected[name]) for name, value in loaded.items())


@SERVED
def test_a_single_file(far: Far, sample_fp8: Path) -> None:
    """A URL may name one file."""
    name = next(iter(open_checkpoint(sample_fp8).files)).file.name
    with pytest.raises(CheckpointNotFoundError, match="1 of 3 files"):
        open_checkpoint(f"{far.url}/{name}")


# ---------------------------------------------------------------- few requests


def _data(far: Far) -> list[Asked]:
    """The ranges of files of weights."""
    weights = [asked for asked in far.server.asked if urlsplit(asked.path).path.endswith(".safetensors")]
    return [asked for asked in weights if asked.ranged]


@SERVED
def test_requests_of_opening(far: Far) -> None:
    """One range a file, two where the header is longer, many files at once; one request a configuration."""
    checkpoint = open_checkpoint(far.store())
    assert len(_data(far)) == len(checkpoint.files)
    far.server.asked.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(header, "_FIRST", 100)
        patch.setattr(remote, "_BLOCK", 100)
        assert open_checkpoint(far.store()).files == checkpoint.files
    assert len(_data(far)) == 2 * len(checkpoint.files)
    assert sum(asked.ranged for asked in _data(far)) == sum(8 + len(one.text) for one in checkpoint.files)
    assert far.pauses == []


def test_headers_are_read_at_once() -> None:
    """As many as the store takes: as many are on the way at the same time."""
    barrier = threading.Barrier(remote.AT_ONCE, timeout=10)
    head = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'

    class Waiting:
        where = "test://"

        def list(self) -> dict[str, remote.Stat]:
            names = [f"model-{i + 1:05d}-of-{remote.AT_ONCE:05d}.safetensors" for i in range(remote.AT_ONCE)]
            return {name: remote.Stat(8 + len(head), "1") for name in names}

        def get(self, name: str, start: int, stop: int, stat: remote.Stat) -> Any:
            barrier.wait()
            yield (len(head).to_bytes(8, "little") + head)[start:stop]

    with pytest.raises(Fp8CheckpointError, match=r"it is also in model-00001-of-00032\.safetensors"):
        open_checkpoint(remote.RemoteStore(Waiting()))  # all hold one name: it is only opened


@SERVED
def test_each_byte_is_fetched_once(far: Far, tmp_path: Path) -> None:
    """A conversion fetches the data once, in requests that join what lies together; what is
    read over is little."""
    store = far.store()
    checkpoint = open_checkpoint(store)
    size = sum(header.size - 8 - len(header.text) for header in checkpoint.files)
    far.server.asked.clear()
    convert(checkpoint, tmp_path / "out", workers=2)
    fetched = sum(asked.ranged for asked in _data(far))
    assert fetched <= (1 + 1 / 16) * size
    assert len(_data(far)) < len(checkpoint.tensors)


@pytest.mark.parametrize("job", ["stacks", "merge"])
def test_what_is_made_of_others_is_fetched_ahead(
    job: str, s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All reads of codes were announced, and each byte is fetched once, of stacks and of merges."""
    base = sample(tmp_path / "base", DeepseekSizes(layers=2, experts=4))
    for name, data in tree(base).items():
        boto3.client("s3").put_object(Bucket=BUCKET, Key=f"base/{name}", Body=data)
    checkpoint = open_checkpoint(f"s3://{BUCKET}/base")
    asked: list[ByteRange] = []
    take = ahead.Window.take

    def watched(window: ahead.Window, reads: Any) -> Any:
        rest = take(window, reads)
        asked.extend(wanted for wanted, _ in rest)
        return rest

    monkeypatch.setattr(ahead.Window, "take", watched)
    s3.forget()
    if job == "stacks":
        convert(checkpoint, tmp_path / "far", layout="model", workers=1)
        convert(base, tmp_path / "near", layout="model")
    else:
        adapter = _adapter(tmp_path / "adapter", base)
        merge(checkpoint, adapter, tmp_path / "far", workers=1)
        merge(base, adapter, tmp_path / "near")
    assert tree(tmp_path / "far") == tree(tmp_path / "near")
    codes = [tensor.weight for tensor in checkpoint.quantized]  # scales are read again where they are decided on
    assert not [
        w for w in asked for span in codes if span.file.name == w.file and w.start < span.stop and span.start < w.stop
    ]
    size = sum(header.size - 8 - len(header.text) for header in checkpoint.files)
    assert sum(asked.ranged for asked in s3.asked if ".safetensors" in asked.path) <= (1 + 1 / 16) * size


def _adapter(directory: Path, base: Path) -> Path:
    """A LoRA of all projections of two dimensions."""
    draw, tensors, names = np.random.default_rng(1), {}, []
    for tensor in open_checkpoint(base).quantized:
        module = tensor.name.removesuffix(".weight")
        names.append(module.rpartition(".")[2])
        for factor, shape in {"A": (2, tensor.shape[1]), "B": (tensor.shape[0], 2)}.items():
            values = torch.from_numpy(draw.standard_normal(shape, np.float32))
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": sorted(set(names))}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@S3
@pytest.mark.parametrize(("axis", "ranks"), [(0, 2), (0, 4), (1, 2)])
def test_shards_over_ranks(far: Far, sample_fp8: Path, axis: int, ranks: int) -> None:
    """Rows shared out: each byte once over all ranks. Columns: at most what the strips span."""
    fetched, read, near = 0, 0, open_checkpoint(sample_fp8)
    for rank in range(ranks):
        checkpoint = open_checkpoint(far.store())
        matrices = [tensor for tensor in checkpoint.quantized if len(tensor.shape) == 2]
        far.server.asked.clear()
        items = [(tensor, _shard(tensor.shape, axis, rank, ranks)) for tensor in matrices]
        with checkpoint.store.ahead(list(tensor.reads(region)) for tensor, region in items):
            for tensor, region in items:
                out = np.empty(region[1][0] * region[1][1], np.uint8)
                tensor.weight.read_region(region, out)
                assert bytes(out) == _codes(near[tensor.name], region)
        fetched += far.server.fetched
        read += sum(region[1][0] * region[1][1] for _, region in items)
    assert read == sum(tensor.numel for tensor in matrices)
    if axis == 0:
        assert fetched == read
    else:
        assert read < fetched <= ranks * read


@S3
@pytest.mark.parametrize(("full", "edge"), [(False, 1), (False, 512), (True, 1)])
def test_ranks_of_one_machine_share_what_they_read_over(
    far: Far, full: bool, edge: int, sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns shared out to two ranks at once: each byte is fetched once over both, the values are right, and nothing
    is left behind; where there is no room to share, each fetches for itself.
    """
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(shared, "_MEMORY", tmp_path)
    monkeypatch.setattr(shared, "BLOCK", 16 << 10)
    monkeypatch.setattr(shared, "_EDGE", edge)
    monkeypatch.setattr(shared, "SHARED", 0 if full else 1 << 20)
    checkpoints, near = [open_checkpoint(far.store()) for _ in range(2)], open_checkpoint(sample_fp8)
    matrices = [tensor.name for tensor in near.quantized if len(tensor.shape) == 2]
    far.server.asked.clear()

    def rank(number: int) -> None:
        tensors = [checkpoints[number].tensors[name].scaled for name in matrices]
        items = [(tensor, _shard(tensor.shape, 1, number, 2)) for tensor in tensors if tensor is not None]
        with checkpoints[number].store.ahead(list(tensor.reads(region)) for tensor, region in items):
            for tensor, region in items:
                out = np.empty(region[1][0] * region[1][1], np.uint8)
                tensor.weight.read_region(region, out)
                assert bytes(out) == _codes(near[tensor.name], region)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))
    size = sum(near[name].numel for name in matrices)
    gaps = len(matrices) * (64 + 8 * edge)
    assert (far.server.fetched > 1.5 * size) if full else (size <= far.server.fetched <= size + gaps)
    assert list(next(tmp_path.glob("fp8ckpt-*")).iterdir()) == []


def _shard(shape: tuple[int, ...], axis: int, rank: int, ranks: int) -> Region:
    size = shape[axis] // ranks
    offsets, sizes = [0, 0], list(shape)
    offsets[axis], sizes[axis] = rank * size, size
    return tuple(offsets), tuple(sizes)


def _codes(tensor: Any, region: Region) -> Any:
    whole = np.empty(tensor.numel, np.uint8)
    tensor.weight.read(whole)
    (top, left), (rows, columns) = region
    return whole.reshape(tensor.shape)[top : top + rows, left : left + columns].tobytes()


# ---------------------------------------------------------------- the window


class _Counting:
    """Objects in memory."""

    where = "test://"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.ranges: list[tuple[int, int]] = []

    def list(self) -> dict[str, remote.Stat]:
        return {name: remote.Stat(len(data), "1") for name, data in self.files.items()}

    def get(self, name: str, start: int, stop: int, stat: remote.Stat) -> Any:
        self.ranges.append((start, stop))
        for at in range(start, stop, 7):
            yield self.files[name][at : min(at + 7, stop)]


@pytest.mark.parametrize("seed", range(30))
def test_what_is_announced_and_what_is_read(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is announced, and whatever is read then, in any order, by any number of threads: the right bytes; and
    what is announced and read once in order is fetched once, in bounded memory.
    """
    draw = random.Random(seed)
    monkeypatch.setattr(ahead, "REQUEST", 64)
    monkeypatch.setattr(ahead, "AHEAD", 256)
    monkeypatch.setattr(ahead, "GAP", draw.choice([0, 8]))
    monkeypatch.setattr(ahead, "_BATCH", draw.choice([1, 100, 1000]))
    monkeypatch.setattr(remote, "_BLOCK", 32)
    objects = _Counting({name: draw.randbytes(3000) for name in "ab"})
    store = remote.RemoteStore(objects)
    cuts = [sorted(draw.sample(range(3001), 60)) for _ in "ab"]
    reads = [[ByteRange(name, *cut[i : i + 2])] for name, cut in zip("ab", cuts, strict=True) for i in range(59)]
    in_order = draw.random() < 0.5
    todo = [wanted for [wanted] in reads] * (1 if in_order else 2)
    if not in_order:
        draw.shuffle(todo)
    with store.ahead([read for read in reads if in_order or draw.random() < 0.7]):
        [window] = store._windows

        def work(part: list[ByteRange]) -> None:
            for wanted in part:
                out = np.zeros(wanted.stop - wanted.start, np.uint8)
                store.read([wanted], [out])
                assert bytes(out) == objects.files[wanted.file][wanted.start : wanted.stop]
                assert window._held <= 256

        threads = 1 if in_order else 3
        apart = [threading.Thread(target=work, args=(todo[i::threads],)) for i in range(1, threads)]
        for thread in apart:
            thread.start()
        work(todo[::threads])
        for thread in apart:
            thread.join()
        if in_order:
            assert window._held == 0
    if in_order:
        size = sum(wanted.stop - wanted.start for [wanted] in reads)
        assert sum(stop - start for start, stop in objects.ranges) <= (1 + 1 / 16) * size


# ---------------------------------------------------------------- faults


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stall is one soon."""
    monkeypatch.setattr(http, "TIMEOUT", 0.3)
    monkeypatch.setattr(s3_module, "TIMEOUT", 0.3)


@SERVED
@pytest.mark.parametrize("fault", Server.FAULTS)
@pytest.mark.usefixtures("impatient")
def test_each_fault_is_retried(far: Far, fault: str, sample_fp8: Path) -> None:
    """The first requests of each file break: the bytes are right."""
    most = 1 if fault == "stall" else 3
    seen: dict[str, int] = {}

    def break_it(asked: Asked) -> str | None:
        seen[asked.path] = seen.get(asked.path, 0) + bool(asked.ranged)
        return fault if asked.ranged and seen[asked.path] <= most else None

    far.server.fault = break_it
    name = open_checkpoint(sample_fp8).quantized[0].name
    assert open_checkpoint(far.store()).read(name).equal(open_checkpoint(sample_fp8).read(name))
    assert far.pauses


@SERVED
@pytest.mark.parametrize("fault", ["503", "reset", "short", "other"])
def test_what_never_comes_is_named(far: Far, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last attempt: store, object, range and attempt; and no secret. The pauses before it grow."""
    monkeypatch.setattr(remote, "_BLOCK", 1)
    checkpoint = open_checkpoint(far.store())
    tensor = next(t for t in checkpoint.quantized if t.numel > 1000)
    end = str(tensor.weight.stop - 1)
    far.server.fault = lambda asked: fault if asked.headers.get("range", "").endswith(end) else None
    with pytest.raises(StorageError) as caught:
        checkpoint.read(tensor.name)
    assert caught.value.file == tensor.weight.file.name
    message = str(caught.value)
    assert f"bytes {tensor.weight.start}-{tensor.weight.stop - 1} of {checkpoint.path} failed at attempt 8" in message
    assert "secret" not in message
    assert len(far.pauses) == 7
    assert all(2 * far.pauses[i + 2] > 3 * far.pauses[i] for i in range(4))


@S3
@pytest.mark.parametrize("times", [2, 1000])
def test_an_answer_with_all_of_the_object(far: Far, times: int, sample_bf16: Path, tmp_path: Path) -> None:
    """In place of a range: it is asked for again, and in the end named; what was written is kept."""
    store, left = far.store(), [times]
    answer = far.server.answer

    def whole(asked: Asked) -> Answer:
        if asked.ranged and left[0] > 0 and (tmp_path / "out.partial").exists():
            left[0] -= 1
            asked = asked._replace(headers={key: value for key, value in asked.headers.items() if key != "range"})
        return answer(asked)

    checkpoint = open_checkpoint(store)
    far.server.answer = whole
    if times == 2:
        convert(checkpoint, tmp_path / "out")
        assert tree(tmp_path / "out") == tree(sample_bf16)
    else:
        with pytest.raises(StorageError, match="attempt 8: the answer is not a range"):
            convert(checkpoint, tmp_path / "out")
        assert os.listdir(tmp_path) == ["out.partial"]


def test_what_brings_something_is_no_failed_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that shortens every answer takes as many requests as it takes, without pauses that grow."""
    monkeypatch.setattr(remote, "_PROGRESS", 10)
    objects, pauses = _Counting({"a": bytes(range(200))}), list[float]()
    get = objects.get
    monkeypatch.setattr(objects, "get", lambda name, start, stop, stat: get(name, start, min(stop, start + 10), stat))
    out = np.zeros(200, np.uint8)
    remote.RemoteStore(objects, pauses.append).read([ByteRange("a", 0, 200)], [out])
    assert bytes(out) == objects.files["a"]
    assert len(pauses) == 19
    assert max(pauses) <= 0.25


@pytest.mark.parametrize(("said", "pause"), [("40", 40.0), ("86400", 300.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0)])
@pytest.mark.parametrize("far", ["s3", "web"], indirect=True)
def test_a_server_that_wants_to_be_left_alone(far: Far, said: str, pause: float, sample_fp8: Path) -> None:
    """What Retry-After asks for is waited for, within reason."""
    store, left, answer = far.store(), [1], far.server.answer
    store.files()

    def busy(asked: Asked) -> Answer:
        left[0] -= 1
        return Answer(429, {"Retry-After": said}, b"") if left[0] >= 0 else answer(asked)

    far.server.answer = busy
    assert open_checkpoint(store).tensors.keys() == open_checkpoint(sample_fp8).tensors.keys()
    assert len(far.pauses) == 1
    assert pause <= far.pauses[0] <= max(pause, 1.0)


@pytest.mark.parametrize("far", ["s3", "web"], indirect=True)  # huggingface_hub asks again by itself
def test_faults_of_the_listing(far: Far) -> None:
    """The list, too, is asked for again; and in the end it is a named error."""
    far.server.fault = lambda asked: "503"
    with pytest.raises(StorageError, match=r"listing .* failed at attempt 4"):
        far.store().files()


@SERVED
def test_many_random_faults(far: Far, sample_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 faults in one conversion: the same bytes, and nothing of it is lost."""
    monkeypatch.setattr(ahead, "REQUEST", 8192)
    monkeypatch.setattr(remote, "_BLOCK", 8192)
    draw, count = random.Random(1), [0]
    streak: dict[tuple[str, str], int] = {}

    def break_it(asked: Asked) -> str | None:
        key = asked.path, asked.headers.get("range", "").partition("-")[2]
        if not asked.ranged or count[0] == 200 or streak.get(key, 0) >= 5 or draw.random() < 0.1:
            return None
        count[0] += 1
        streak[key] = streak.get(key, 0) + 1
        return draw.choice(["503", "reset", "short", "other"])

    store = far.store()
    store.files()
    far.server.fault = break_it
    convert(store, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(sample_bf16)
    assert count[0] == 200


def _overwrite(far: Far, name: str) -> None:
    if far.kind == "s3":
        body = far.s3.get_object(Bucket=BUCKET, Key=f"models/x/{name}")["Body"].read()
        far.s3.put_object(Bucket=BUCKET, Key=f"models/x/{name}", Body=body[:-1] + bytes([body[-1] ^ 1]))
    elif far.hub is not None:
        data = far.hub.files[name]
        far.hub.files[name] = data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("far", ["s3", "hub"], indirect=True)
def test_an_object_that_changes(far: Far, tmp_path: Path) -> None:
    """Of the same size, after it was opened: an error, and no output, whole or partial."""
    store = far.store()
    checkpoint = open_checkpoint(store)
    checkpoint.read(checkpoint.quantized[0].name)
    _overwrite(far, checkpoint.files[-1].file.name)
    with pytest.raises(SourceChangedError, match="changed after it was opened"):
        convert(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["gone", "shorter", "other"])
def test_a_file_of_a_web_server_that_changes(what: str, sample_fp8: Path) -> None:
    """Also where the server knows no conditions, and only says what it gives."""
    files = {f"dir/{name}": data for name, data in tree(sample_fp8).items()}
    changed = False

    def answer(asked: Asked) -> Answer:
        if changed and asked.ranged:
            name = asked.path.lstrip("/")
            data = {"gone": b"", "shorter": files[name][:-1], "other": files[name]}[what]
            plain = asked._replace(headers={"range": asked.headers["range"]})
            return Answer(404, {}, b"") if what == "gone" else ranged(data, "W/new", plain)
        return web(files)(asked)

    with serving(answer) as server:
        checkpoint = open_checkpoint(f"{server.url}/dir")
        changed = True
        with pytest.raises(SourceChangedError):
            checkpoint.read("lm_head.weight")


# ---------------------------------------------------------------- resuming


@S3
def test_ctrl_c_while_the_store_is_silent(far: Far, tmp_path: Path) -> None:
    """What waits for it is not waited for: exit 130, and what was written is named."""
    out = tmp_path / "out"
    code = "from fp8ckpt.cli import main, printing; printing._GRACE = 0.1\n"
    code += f"import sys; sys.argv = ['fp8ckpt', 'convert', {far.url!r}, {str(out)!r}]\n"
    code += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); main()"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)

    def silent(asked: Asked) -> str | None:
        if not asked.ranged or not (tmp_path / "out.partial").exists():
            return None
        os.kill(child.pid, signal.SIGINT)
        return "stall"

    far.server.fault = silent
    _, said = child.communicate(timeout=25)  # a stall is one after thirty seconds
    assert child.returncode == 130
    written = f"what was written is in {out}.partial, and the same command continues from there"
    assert said == f"fp8ckpt: interrupted; {written}\n"


@S3
def test_a_kill_and_a_second_run(far: Far, sample_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle, by the request that it makes then: the second run ends with the same bytes."""
    code = "from fp8ckpt.output import extents; extents.CHUNK = 4096; extents.EXTENT = 16384\n"
    code += f"from fp8ckpt import convert; convert({far.url!r}, {str(tmp_path / 'out')!r}, workers=1)"
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ})
    records = tmp_path / "out.partial" / ".fp8ckpt"
    far.server.fault = lambda asked: os.kill(child.pid, signal.SIGKILL) if list(records.glob("done-*")) else None
    assert child.wait(60) == -signal.SIGKILL
    far.server.forget()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "out") == tree(sample_bf16)


@SERVED
def test_what_a_resume_compares(far: Far, sample_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ETags or blob ids: the same objects are taken up again, by whoever opens them; the state holds no secret."""
    monkeypatch.setattr(remote, "_BLOCK", 8192)
    far.server.fault = lambda asked: "503" if asked.ranged > 20_000 and "=0-" not in asked.headers["range"] else None
    with pytest.raises(StorageError, match="the same command continues from there"):
        convert(far.store(), tmp_path / "out")
    state = (tmp_path / "out.partial" / ".fp8ckpt" / "plan.json").read_text()
    assert "secret" not in state
    assert "hf_" not in state
    far.server.forget()
    convert(far.url, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(sample_bf16)


class _Bytes:
    """An object of any bytes."""

    where = "memory://x"

    def list(self) -> dict[str, Stat]:
        return {"x": Stat(1 << 30, "1")}

    def get(self, name: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        yield bytes(stop - start)


def test_what_was_taken_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when Python comes to look for circles: what is held and what is not freed yet stay within the bound."""
    monkeypatch.setattr(ahead, "AHEAD", 1 << 20)
    monkeypatch.setattr(ahead, "REQUEST", 1 << 18)
    memory, made, most = Window._memory, [], 0

    def watched(window: Window, size: int) -> Any:
        found = memory(window, size)
        made.append((weakref.ref(found), found.nbytes))
        return found

    monkeypatch.setattr(Window, "_memory", watched)
    sizes = [(100 + 37 * i % 150) << 10 for i in range(60)]  # the memory of one is not that of another
    stops = np.cumsum([size + (1 << 20) for size in sizes]).tolist()
    ranges = [ByteRange("x", stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    gc.disable()
    try:
        store = remote.RemoteStore(_Bytes())
        with store.ahead([one] for one in ranges):
            for one in ranges:
                store.read([one], [np.empty(one.stop - one.start, np.uint8)])
                live = {id(found): size for ref, size in made if (found := ref()) is not None}
                most = max(most, sum(live.values()))
    finally:
        gc.enable()
    assert (1 << 19) < most <= (1 << 20) + (1 << 18)


# ---------------------------------------------------------------- secrets, and who gets them


@SERVED
def test_no_log_holds_what_clients_sign_and_send(
    far: Far, sample_fp8: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not theirs at DEBUG, either, whoever asks for it: but what they do for others is logged as ever."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-secret")
    caplog.set_level(logging.DEBUG)
    checkpoint = open_checkpoint(far.url)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    assert far.server.fetched
    basic = base64.b64encode(b"user:secret").decode()
    shown = [one for one in ("secret", "Signature", "AKIAUSER", basic, Hub.TOKEN) if one in caplog.text]
    assert shown == []
    if far.kind == "s3":
        far.s3.list_objects_v2(Bucket=BUCKET)
        assert "AKIAUSER" in caplog.text
    else:
        urllib3.request("HEAD", far.server.url)
        assert "HEAD / " in caplog.text


@HUB
def test_the_token_goes_to_the_hub_alone(far: Far, sample_fp8: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Large files lie elsewhere, and whoever keeps them is not told the token; nor are the logs."""
    assert far.hub is not None
    far.hub.private = True
    with caplog.at_level(logging.DEBUG, "fp8ckpt"):
        assert verify(far.url, sample_fp8).ok
    assert all("authorization" not in asked.headers for asked in far.hub.cdn.asked)
    asked_hub = [asked for asked in far.hub.hub.asked if "name" in asked.path]
    assert all(asked.headers["authorization"] == f"Bearer {Hub.TOKEN}" for asked in asked_hub)
    assert Hub.TOKEN not in caplog.text
    assert "Signature" not in caplog.text


@HUB
def test_a_signed_place_that_holds_no_more(far: Far, sample_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the Hub led to is used until it is refused, and asked for again then."""
    assert far.hub is not None
    checkpoint, near = open_checkpoint(far.store()), open_checkpoint(sample_fp8)
    before = len(far.hub.hub.asked)
    name = checkpoint.quantized[0].name
    assert checkpoint.read(name).equal(near.read(name))
    assert len(far.hub.hub.asked) == before
    far.hub.signature = "2"
    meet, left = threading.Barrier(2, timeout=20), [2]

    def together(asked: Asked) -> None:
        left[0] -= 1
        if left[0] >= 0:
            meet.wait()

    far.server.fault = together
    monkeypatch.setattr(remote, "_BLOCK", 1)
    file = checkpoint.quantized[0].weight.file
    several = [tensor.name for tensor in checkpoint.quantized if tensor.weight.file == file]
    with ThreadPoolExecutor(2) as pool:
        for name, read in zip(several[:2], pool.map(checkpoint.read, several[:2]), strict=True):
            assert read.equal(near.read(name))


@WEB
def test_a_redirect_to_another_host(far: Far, monkeypatch: pytest.MonkeyPatch, sample_fp8: Path) -> None:
    """It is followed without the user and the password that the URL has."""

    def elsewhere(asked: Asked) -> Answer:
        return Answer(302, {"Location": far.server.url + asked.path}, b"")

    with serving(elsewhere) as first:
        url = f"http://user:secret@{first.url.removeprefix('http://')}/dir/model.safetensors.index.json"
        objects = remote.RemoteStore(http.HttpObjects(_address(url.rpartition("/")[0])))
        objects._listing = {"config.json": far.store().files()["config.json"]}
        out = np.zeros(10, np.uint8)
        far.server.asked.clear()
        objects.read([ByteRange("config.json", 0, 10)], [out])
        assert bytes(out) == (sample_fp8 / "config.json").read_bytes()[:10]
        assert "authorization" in first.asked[0].headers
    assert all("authorization" not in asked.headers for asked in far.server.asked)


def test_a_proxy_of_the_environment(sample_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for hosts that no exception names, with its own user and password, and is not told the host's."""
    files = {f"dir/{name}": data for name, data in tree(sample_fp8).items()}
    with serving(web(files)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:pass@{proxy.url.removeprefix('http://')}")
        monkeypatch.setenv("no_proxy", "elsewhere.invalid")
        assert open_checkpoint("http://far.invalid/dir").files
        assert {asked.headers["proxy-authorization"] for asked in proxy.asked} == {"Basic bWU6cGFzcw=="}
        assert all(asked.path.startswith("http://far.invalid/dir/") for asked in proxy.asked)
        monkeypatch.setattr(remote, "wait", lambda seconds: None)
        with pytest.raises(StorageError, match="the host name cannot be resolved"):
            open_checkpoint("http://elsewhere.invalid/dir")


def test_a_certificate_is_trusted_or_refused(sample_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that its server signed is refused at once, by name, until ``SSL_CERT_FILE`` names it."""
    own = Path(__file__).with_name("localhost.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    files = {f"dir/{name}": data for name, data in tree(sample_fp8).items()}
    with serving(web(files)) as server:
        server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
        url = server.url.replace("http:", "https:") + "/dir"
        with pytest.raises(StorageError, match=r"certificate is not trusted.*SSL_CERT_FILE"):
            open_checkpoint(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(own))
        http._pool.cache_clear()
        assert verify(url, sample_fp8).ok
    http._pool.cache_clear()


def _address(url: str) -> Any:
    from fp8ckpt.stores.address import address_of

    return address_of(url)


REFUSALS = {
    "AccessDenied": (403, "the permissions to list and get objects"),
    "AuthorizationHeaderMalformed": (400, "set AWS_DEFAULT_REGION to the region of the bucket"),
    "ExpiredToken": (400, "renew the credentials"),
    "RequestTimeTooSkewed": (403, "set this machine's clock"),
    "PermanentRedirect": (301, "set AWS_DEFAULT_REGION to the region of the bucket"),
}


@S3
@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_says_what_to_do_and_holds_no_secret(far: Far, code: str) -> None:
    """What the store answers, in the midst of it, is named by its code alone."""
    status, remedy = REFUSALS[code]
    checkpoint = open_checkpoint(far.store())
    answer = far.server.answer
    body = f"<Error><Code>{code}</Code><Message>AKIAUSER secret</Message></Error>".encode()
    far.server.answer = lambda asked: answer(asked) if "list-type" in asked.path else Answer(status, {}, body)
    with pytest.raises(StorageError, match=remedy) as caught:
        checkpoint.read("lm_head.weight")
    assert "secret" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize(("endpoint", "said"), [
    ("nonsense", "boto3 raised an error .*AWS_ENDPOINT_URL"),
    ("http://127.0.0.1:1", "at attempt 4: the host does not answer; check"),
])  # fmt: skip
def test_an_endpoint_that_is_none(endpoint: str, said: str, s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error is named at once, what does not answer after some attempts."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(remote, "wait", lambda seconds: None)
    with pytest.raises(StorageError, match=said):
        open_checkpoint(f"s3://{BUCKET}/x")


def test_an_endpoint_that_is_a_web_page(s3: Server) -> None:
    """boto3 makes an empty listing of it."""
    s3.answer = lambda asked: Answer(200, {"Content-Type": "text/html"}, b"<html><body/></html>")
    with pytest.raises(StorageError, match=r"the endpoint is not such a store.*AWS_ENDPOINT_URL"):
        open_checkpoint(f"s3://{BUCKET}/x")


@HUB
@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"id": "org/name", "sha": "1"}'])
def test_a_hub_that_is_another_server(far: Far, body: bytes) -> None:
    """Whatever it answers."""
    assert far.hub is not None
    far.hub.hub.answer = lambda asked: Answer(200, {}, body)
    with pytest.raises(StorageError, match=r"the endpoint is not such a store.*HF_ENDPOINT"):
        open_checkpoint(far.url)


# ---------------------------------------------------------------- what cannot be served

REFUSED: dict[str, tuple[type[Fp8CheckpointError], str]] = {
    "gs://bucket/x": (MissingPackageError, "pip install gcsfs"),
    "az://bucket/x": (MissingPackageError, "pip install adlfs"),
    "nowhere://x": (UnsupportedStoreError, "no store is known as nowhere://"),
    "s3://": (UnsupportedStoreError, "expected s3://bucket/prefix"),
    "s3://AKIA:secret@bucket/x": (UnsupportedStoreError, "AWS_PROFILE"),
    "hf://a/b@c@d": (UnsupportedStoreError, "hf://org/name@revision"),
    "https://": (UnsupportedStoreError, "https://host/directory"),
    "file:///tmp/x": (UnsupportedStoreError, "give the path itself: /tmp/x"),
    "hf://org/name": (StorageError, "unset HF_HUB_OFFLINE"),
    "memory://nothing": (CheckpointNotFoundError, "no objects below this URL"),
}


@pytest.mark.parametrize("url", REFUSED)
def test_refusals(url: str) -> None:
    """By name, with what to do; and never with a secret."""
    kind, text = REFUSED[url]
    with pytest.raises(kind) as caught:
        open_checkpoint(url)
    assert text in str(caught.value)
    assert "secret" not in str(caught.value)


def test_boto3_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, the error says what to install."""
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'fp8ckpt\[s3\]'"):
        open_checkpoint("s3://bucket/x")


@pytest.mark.parametrize(
    ("far", "url"), [("s3", "s3://bucket/none"), ("s3", "s3://none/x"), ("hub", "hf://org/none")], indirect=["far"]
)
def test_nothing_there(far: Far, url: str) -> None:
    """No bucket, no prefix, no model."""
    with pytest.raises(CheckpointNotFoundError, match=url):
        open_checkpoint(url)


def test_a_hub_id_says_how_to_stream() -> None:
    """A plain id is the local cache's; what is not there can be fetched, or read there."""
    with pytest.raises(CheckpointNotFoundError, match=r"hf download org/none; or read it there: hf://org/none"):
        open_checkpoint("org/none")


def test_a_server_without_ranges() -> None:
    """It is refused by name: the whole file for each tensor would be read."""

    def answer(asked: Asked) -> Answer:
        if asked.path.endswith("/"):
            return Answer(200, {"Content-Type": "text/html"}, b'<a href="model.safetensors">x</a>')
        return Answer(200, {"ETag": '"x"', "Content-Length": "100"}, b"x" * 100)

    with serving(answer) as server, pytest.raises(StorageError, match="does not serve byte ranges"):
        open_checkpoint(f"{server.url}/dir")

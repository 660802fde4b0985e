"""Saves that go to a store: from any sharding the bytes of a directory, over a bounded part of the disk; or nothing."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.multiprocessing import ProcessExitedException

from fp8ckpt import FP8StorageWriter, SafetensorsStorageWriter, convert, open_checkpoint, save_model
from fp8ckpt.errors import ResumeMismatchError, StorageError, WeightValueError
from fp8ckpt.output import extents, staging
from fp8ckpt.output.layout import TensorSpec, lay_out
from tests.checkpoint.test_one_rank_fails import Held, plain
from tests.distributed import mesh, run
from tests.oracle import tree
from tests.stores.conftest import BUCKET
from tests.stores.servers import Asked, Server
from tests.stores.test_upload import (
    PART,
    URL,
    _at_first_completion,
    _interrupted,
    _parts,
    _there,
    client,
    opaque,
    trained,
)
from tests.test_four_bits import FAMILIES, write_plain
from tests.test_four_bits import trained as trained_in_four_bits

__all__ = ["client", "trained"]  # fixtures

STAGED = 1 << 16  # bytes; of some MB


@pytest.fixture(autouse=True)
def _small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "STAGED", STAGED)
    monkeypatch.setattr(extents, "PART", PART)


def _on_disk() -> int:
    """Bytes of weights that the disk holds here, of whatever files."""
    found = 0
    for path in Path().rglob("*.partial/**/*"):
        with suppress(FileNotFoundError):  # sent by now
            found += path.stat().st_blocks * 512 if path.is_file() and path.suffix != ".json" else 0
    return found


def _watched(server: Server) -> list[int]:
    """What `_on_disk` was at each part that is sent."""
    seen: list[int] = []
    server.fault = lambda asked: seen.append(_on_disk()) if "partNumber=" in asked.path else None
    return seen


Cut = Callable[[torch.Tensor], Any]
CUTS: dict[str, Cut] = {  # what a rank has of a tensor that all have the whole of
    "rows": lambda tensor: distribute_tensor(tensor, mesh(), [Shard(0)]),
    "columns": lambda tensor: distribute_tensor(tensor, mesh(), [Shard(tensor.ndim - 1)]),
    "whole": lambda tensor: distribute_tensor(tensor, mesh(), [Replicate()]),
    "apart": lambda tensor: tensor if tensor.numel() % dist.get_world_size() == dist.get_rank() else None,
}


def _state(path: Path, cut: Cut) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    found = {name: cut(checkpoint.read(name).contiguous()) for name in checkpoint.tensors}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _as_here(environment: dict[str, str], folder: Path) -> None:
    """What a test patched, on a rank."""
    os.environ.update(environment)
    os.chdir(folder)
    extents.CHUNK, extents.PART, staging.STAGED = 8192, PART, STAGED


def _save_all(environment: dict[str, str], folder: Path, base: Path, source: Path, cuts: tuple[str, ...]) -> None:
    _as_here(environment, folder)
    for kind in cuts:
        state = _state(source, CUTS[kind])
        save_model(Held(state), f"{URL}-{kind}", to="fp8", like=base)
        if kind != "whole":
            dcp.save(state, storage_writer=SafetensorsStorageWriter(f"{URL}-{kind}-16", like=base))


def test_every_sharding(s3: Server, client: Any, trained: Path, tmp_path: Path) -> None:
    """Rows, columns, whole tensors of one rank or another: the bytes that a conversion writes, each part sent once; and
    the disk holds two rounds, and one part or two a file, of what is four times as much and more.
    """
    seen = _watched(s3)
    cuts = tuple(CUTS)
    run(3, _save_all, dict(os.environ), tmp_path, trained / "fp8", trained / "trained", cuts)
    for kind in cuts:
        assert _there(client, f"models/out-{kind}/") == tree(trained / "undisturbed"), kind
        assert _there(client, f"models/out-{kind}-16/") == ({} if kind == "whole" else tree(trained / "trained"))
    assert set(_parts(s3).values()) == {1}
    whole = sum(path.stat().st_size for path in (trained / "undisturbed").glob("*.safetensors"))
    assert max(seen) < whole // 2
    assert os.listdir() == []


def _save_halves(environment: dict[str, str], folder: Path, base: Path, source: Path) -> None:
    _as_here(environment, folder)
    extents.CHUNK = extents.PART = staging.STAGED = 512
    dcp.save(_state(source, CUTS["columns"]), storage_writer=FP8StorageWriter(URL, like=base))


def test_bytes_of_two_ranks(s3: Server, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of four bits in columns of odd widths: a byte is known once its two ranks met, in each round."""
    family = FAMILIES["ModelOpt NVFP4"]
    base = family.write(Path("fp4"))
    source = write_plain(Path("source"), trained_in_four_bits(family, np.random.default_rng(1), "BF16"))
    convert(source, "near", like=base)
    run(3, _save_halves, dict(os.environ), Path.cwd(), base, source)
    assert _there(client) == tree(Path("near"))
    assert not list(Path().glob("*.partial"))


def _save_and_fail(environment: dict[str, str], folder: Path, base: Path, source: Path, kind: str) -> str:
    _as_here(environment, folder)
    state, last = _state(source, CUTS["rows"]), dist.get_rank() == dist.get_world_size() - 1
    if kind == "disk" and last:
        write = staging.Staging.write

        def full(self: Any, place: int, data: Any, offset: int) -> None:
            if place > 15:
                raise StorageError("writing failed: no space left on device")
            write(self, place, data, offset)

        staging.Staging.write = full  # type: ignore[method-assign]
    if kind == "values" and last:
        state[open_checkpoint(base).quantized[-1].name].to_local().fill_(torch.nan)
    group = dist.new_group([0, 1]) if kind == "group" else None
    other = dist.new_group([0]) if kind == "group" else None
    try:
        plain(
            lambda: dcp.save(
                state,
                storage_writer=FP8StorageWriter(URL, like=base)
                if kind == "values"
                else SafetensorsStorageWriter(URL, like=base, process_group=None if last else other),
                process_group=group,
            )
        )
    except Exception as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.parametrize(("kind", "error"), [("disk", StorageError), ("values", WeightValueError)])
def test_a_rank_that_fails(
    kind: str, error: type[Exception], s3: Server, client: Any, trained: Path, tmp_path: Path
) -> None:
    """All ranks raise it, and nothing is seen: the same save goes on with what was sent in the rounds before; what can
    never be whole is taken away.
    """
    ranks = run(2, _save_and_fail, dict(os.environ), tmp_path, trained / "fp8", trained / "trained", kind)
    assert ranks == [error.__name__] * 2
    assert _there(client) == {}
    if kind == "values":
        assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)
    else:
        assert len(_parts(s3)) > 4
        save_model(Held(_state(trained / "trained", lambda tensor: tensor)), URL, like=trained / "fp8")
        assert max(_parts(s3).values()) == 1
        assert _there(client) == tree(trained / "trained")
    assert os.listdir() == []


def _save_in_a_process(environment: dict[str, str], folder: Path, trained: Path, told: Connection) -> None:
    _as_here(environment, folder)
    told.send(os.getpid())
    save_model(Held(_state(trained / "trained", lambda tensor: tensor)), URL, like=trained / "fp8")


def test_a_save_that_is_killed(s3: Server, client: Any, trained: Path, tmp_path: Path) -> None:
    """By the system, among its parts: the same again gives the same bytes, and sends what is not there."""
    left, (told, tell) = [20], multiprocessing.Pipe(duplex=False)

    def kill(asked: Asked) -> None:
        left[0] -= "partNumber=" in asked.path
        if not left[0]:
            os.kill(told.recv(), signal.SIGKILL)

    s3.fault = kill
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run(1, _save_in_a_process, dict(os.environ), tmp_path, trained, tell)
    assert _there(client) == {}
    sent = sum(_parts(s3).values())
    s3.forget()
    save_model(Held(_state(trained / "trained", lambda tensor: tensor)), URL, like=trained / "fp8")
    assert _there(client) == tree(trained / "trained")
    everything = sum(-(-path.stat().st_size // PART) for path in (trained / "trained").glob("*.safetensors"))
    assert sum(_parts(s3).values()) <= everything - sent + 8
    assert os.listdir() == []


def test_many_random_faults(
    s3: Server, client: Any, trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """200 of them in one save, of every kind of request, done or not: the same bytes, and no secret in what is said."""
    monkeypatch.setattr(extents, "PART", 8192)
    draw, count, streak = random.Random(3), [0], Counter[tuple[str, str]]()
    caplog.set_level(logging.DEBUG, "fp8ckpt")

    def break_it(asked: Asked) -> str | None:
        key = asked.method, asked.path
        if count[0] == 200 or streak[key] >= 3 or draw.random() < 0.2:
            return None
        count[0] += 1
        streak[key] += 1
        return draw.choice(["503", "reset", "lost"])

    s3.fault = break_it
    save_model(Held(_state(trained / "trained", lambda tensor: tensor)), URL, like=trained / "fp8")
    assert (_there(client), count) == (tree(trained / "trained"), [200])
    assert "AKIAUSER" not in caplog.text
    assert os.listdir() == []


@pytest.mark.parametrize("encrypted", [False, True])
def test_other_values_after_a_cut_in_completing(
    encrypted: bool, s3: Server, client: Any, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a run was cut off in making visible is completed by the same save, and by no other, also where ETags are no
    digests; and the log says how far a save is.
    """
    if encrypted:
        opaque(s3)
    state = _state(trained / "trained", lambda tensor: tensor)
    caplog.set_level(logging.INFO, "fp8ckpt.checkpoint")
    at = _at_first_completion()
    _interrupted(s3, at, lambda: save_model(Held(state), URL, like=trained / "fp8"), "failed at attempt 8")
    s3.forget()
    assert len([record for record in caplog.records if "bytes are being sent" in record.message]) > 4
    other = {name: tensor + 1 for name, tensor in state.items()}
    with pytest.raises(
        ResumeMismatchError,
        match=r"earlier run was interrupted while .*, and its weights differ \(MD5\).*choose another",
    ):
        save_model(Held(other), URL, like=trained / "fp8")
    save_model(Held(state), URL, like=trained / "fp8")
    assert _parts(s3) == {}
    assert _there(client) == tree(trained / "trained")


def test_a_writer_travels(s3: Server) -> None:
    """To the process of an asynchronous save."""
    writer = pickle.loads(pickle.dumps(SafetensorsStorageWriter(URL)))
    assert writer._output.destination == URL


# ---------------------------------------------------------------- the rounds, without a byte


def _layout(count: int, size: int) -> Any:
    return lay_out("model.safetensors", [TensorSpec(f"{i:04}", "U8", (size,)) for i in range(count)], {})


def _planned(layout: Any, held: dict[str, dict[int, int]], ranks: int) -> staging.Schedule:
    return staging.schedule([layout], {span.name: span.name for span in layout.spans}, held, ranks)


def test_ranks_that_hold_different_tensors_work_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of a pipeline: as many rounds as one of them needs."""
    monkeypatch.setattr(staging, "STAGED", 16 * PART)
    layout = _layout(64, PART)
    held = {span.name: {i // 16: span.nbytes} for i, span in enumerate(layout.spans)}
    found = _planned(layout, held, 4)
    assert found.rounds == 4
    assert found.most <= 2 * (16 + 4 + 1) * PART
    assert [found.round_of[f"{16 * rank + 3:04}"] for rank in range(4)] == [found.round_of["0003"]] * 4


def test_parts_that_would_wait_for_each_other() -> None:
    """Small tensors of two ranks in turn, behind large ones of the first: the rounds follow the file, and the disk is
    bounded all the same.
    """
    layout = _layout(1024, PART // 4)
    held = {span.name: {int(i > 512 and i % 2): span.nbytes} for i, span in enumerate(layout.spans)}
    found = _planned(layout, held, 2)
    assert found.most <= 2 * STAGED + 3 * PART < layout.size // 8
    assert sorted(found.round_of.values()) == list(found.round_of.values())
    assert sum(part.stop - part.start for part in found.parts) == layout.size

"""Where one rank cannot go on, no other waits for it: all ranks raise the same named error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import Replicate, distribute_tensor

from fp8ckpt import (
    FP8StorageReader,
    FP8StorageWriter,
    convert,
    load_model,
    load_pretrained,
    open_checkpoint,
    save_model,
)
from tests.distributed import mesh, run

Job = Callable[[Path, Path], object]  # of a checkpoint, and a destination


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, replicated on all ranks."""
    checkpoint, over = open_checkpoint(path), mesh()
    return {
        name: distribute_tensor(checkpoint.read(name), over, [Replicate()] * over.ndim) for name in checkpoint.tensors
    }


class Held(nn.Module):
    """A model of these tensors."""

    def __init__(self, held: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._tensors = held
        for i, tensor in enumerate(held.values()):
            self.register_buffer(str(i), tensor)

    def state_dict(self, *arguments: object, **more: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return self._tensors


def plain(job: Callable[[], object]) -> None:
    """A call of torch's own, whose error tells what each rank met with."""
    try:
        job()
    except CheckpointException as error:
        raise min(error.failures.items())[1][0] from error


def good(path: Path) -> Path:
    """The same checkpoint, at the path where every rank can open it."""
    return path.with_name("fp8")


def only_last_rank_refuses(path: Path) -> Any:
    """What a user does to shard a model, which fails on the last rank."""

    def parallelize(model: nn.Module) -> nn.Module:
        if dist.get_rank():
            raise ValueError("no such mesh")
        return model

    return load_pretrained(good(path), parallelize=parallelize)


def only_last_rank_is_wrong(path: Path, out: Path) -> None:
    """An argument that is no argument, on the last rank."""
    save_model(Held(tensors(good(path))), out, to="fp9" if dist.get_rank() else "bf16")


def last(other: Any, first: Any) -> Any:
    """What the last rank is asked for, and what the first is."""
    return other if dist.get_rank() else first


def bf16(path: Path) -> Path:
    """The same checkpoint in bf16."""
    return path.with_name("bf16")


def copies(path: Path) -> Path:
    """Copies of one checkpoint, each at its own path, of which the last rank's is stale: other codes, equal scales."""
    return path.with_name("stale") if dist.get_rank() else good(path)


DIFFER: dict[str, Job] = {
    "load_model, a stale copy": lambda path, out: load_model(Held(tensors(good(path))), copies(path)),
    "load_pretrained, a stale copy": lambda path, out: load_pretrained(copies(path)),
    "FP8StorageReader, a stale copy": lambda path, out: plain(
        lambda: load(tensors(good(path)), storage_reader=FP8StorageReader(copies(path)))
    ),
    "convert, a stale copy": lambda path, out: convert(copies(path), out),
    "save_model, a stale base": lambda path, out: save_model(
        Held(tensors(good(path))), out, to="fp8", like=copies(path)
    ),
    "convert, another dtype": lambda path, out: convert(good(path), out, to=last("fp16", "bf16")),
    "convert, another destination": lambda path, out: convert(good(path), last(out.with_name("other"), out)),
    "convert, another source": lambda path, out: convert(last(bf16(path), good(path)), out),
    "convert, the other way": lambda path, out: (
        convert(bf16(path), out, to="fp8", like=good(path)) if dist.get_rank() else convert(good(path), out)
    ),
    "convert, other scales": lambda path, out: convert(
        bf16(path), out, to="fp8", like=good(path), scales=last("fresh", "reuse")
    ),
    "convert, another scheme": lambda path, out: convert(
        bf16(path), out, to="fp8", scheme=last("channel", "per-tensor")
    ),
    "save_model, another dtype": lambda path, out: save_model(Held(tensors(good(path))), out, to=last("fp32", "bf16")),
    "save_model, another kind": lambda path, out: save_model(
        Held(tensors(good(path))), out, to=last("fp8", "bf16"), like=good(path)
    ),
    "save_model, other scales": lambda path, out: save_model(
        Held(tensors(good(path))), out, to="fp8", like=good(path), scales=last("fresh", "reuse")
    ),
    "FP8StorageWriter, another destination": lambda path, out: plain(
        lambda: save(
            tensors(good(path)), storage_writer=FP8StorageWriter(last(out.with_name("other"), out), like=good(path))
        )
    ),
}

JOBS: dict[str, Job] = {
    **DIFFER,
    "load_model": lambda path, out: load_model(Held(tensors(good(path))), path),
    "load_pretrained": lambda path, out: load_pretrained(path),
    "parallelize": lambda path, out: only_last_rank_refuses(path),
    "FP8StorageReader": lambda path, out: plain(
        lambda: load(tensors(good(path)), storage_reader=FP8StorageReader(path))
    ),
    "save_model bf16": lambda path, out: save_model(Held(tensors(good(path))), out, like=path),
    "save_model fp8": lambda path, out: save_model(Held(tensors(good(path))), out, to="fp8", like=path),
    "save_model, an argument": only_last_rank_is_wrong,
    "FP8StorageWriter": lambda path, out: plain(
        lambda: save(tensors(good(path)), storage_writer=FP8StorageWriter(out, like=path))
    ),
    "convert": lambda path, out: convert(path, out),
    "convert, the base": lambda path, out: convert(good(path).with_name("bf16"), out, to="fp8", like=path),
    "convert by a scheme": lambda path, out: convert(
        path.with_name("bf16") if path == good(path) else path, out, to="fp8", scheme="block"
    ),
    "convert, an argument": lambda path, out: convert(good(path), out, workers=-dist.get_rank() or None),
}


def _attempt(names: list[str], folder: Path) -> dict[str, tuple[str, str]]:
    """What each job raises on this rank; the last rank finds a damaged checkpoint where the others find a good one."""
    met = {}
    for name in names:
        path = folder / ("damaged" if dist.get_rank() else "fp8")
        try:
            JOBS[name](path, folder / "out")
        except Exception as error:
            met[name] = (type(error).__name__, str(error))
        dist.barrier()  # a rank that is a step ahead, or behind, fails here
    return met


def test_all_ranks_raise_the_same_error(sample_fp8: Path, tmp_path: Path) -> None:
    """Each public function raises it on all ranks, also if one rank fails alone or is given other arguments."""
    convert(sample_fp8, tmp_path / "bf16")
    shutil.copytree(sample_fp8, tmp_path / "fp8")
    damaged = Path(shutil.copytree(sample_fp8, tmp_path / "damaged"))
    max(damaged.glob("*.safetensors")).write_bytes(b"cut off")
    stale = Path(shutil.copytree(sample_fp8, tmp_path / "stale"))
    for tensor in open_checkpoint(stale).quantized:
        with (stale / tensor.span.file.name).open("r+b") as file:
            file.seek(tensor.span.start)
            codes = file.read(tensor.span.nbytes)
            file.seek(tensor.span.start)
            file.write(bytes(code ^ 1 for code in codes))
    before = sorted(file.name for file in tmp_path.iterdir())
    one, other = run(2, _attempt, list(JOBS), tmp_path)
    assert one == other
    assert list(one) == list(JOBS)
    expected = {
        **dict.fromkeys(DIFFER, "RanksDifferError"),
        "parallelize": "ValueError",
        "save_model, an argument": "ValueError",
        "convert, an argument": "ValueError",
    }
    for name, (kind, message) in one.items():
        assert kind == expected.get(name, "TruncatedFileError"), (name, kind, message)
        assert name not in DIFFER or "on rank 1, but" in message
    assert sorted(file.name for file in tmp_path.iterdir()) == before


class Unpicklable(Exception):
    """An error that other processes cannot make anew."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def _meet() -> str:
    from fp8ckpt.ranks import GroupRanks

    def fail() -> None:
        if dist.get_rank():
            raise Unpicklable("no", "luck")

    with pytest.raises((Unpicklable, RuntimeError)) as caught:
        GroupRanks().together(fail)
    dist.barrier()
    return str(caught.value)


def test_errors_that_cannot_be_sent() -> None:
    """An error of another library, which cannot be pickled, reaches the other ranks by its name and text."""
    assert run(2, _meet) == ["Unpicklable: no luck", "no luck"]

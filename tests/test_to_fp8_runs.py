"""The way back to FP8 as a run: cut off and resumed, shared by workers and ranks, counted by the byte, as a command."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt import convert, open_checkpoint, sample, verify
from fp8ckpt.encodings.fp8 import QuantizingFiller
from fp8ckpt.encodings.recipes import QuantizingPlan
from fp8ckpt.errors import ResumeMismatchError, StorageError
from fp8ckpt.output.extents import Chunk, Extent
from fp8ckpt.output.files import OutputFile
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes
from fp8ckpt.tensors.stored import TensorSpan
from tests.campaign.trial import STEPS, digests
from tests.conftest import Run
from tests.distributed import Launched
from tests.miniatures import COMPRESSED, Family, codes, families, scales
from tests.oracle import (
    Stored,
    assert_same_tree,
    quantize,
    read_directory,
    read_safetensors,
    spread,
    tree,
    write_plain,
    write_safetensors,
)
from tests.stopping import CHUNK, CHUNKS, run_until
from tests.support import ALL, cut, examples
from tests.test_resume import GOES_ON, fail_after
from tests.test_to_fp8 import expected_scale, steps
from tests.test_verify import reindex


class Died(BaseException):
    """The process is gone; no handler of ours may stop it."""


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plug is pulled here, and waiting for the disk is most of the time."""

    def fsync(fd: int) -> None:
        os.fstat(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "fdatasync", fsync)


def back(folder: Path, out: Path, source: str = "trained", **how: Any) -> Any:
    """A conversion in a folder of `small` to FP8 like its base."""
    return convert(folder / source, out, to="fp8", like=folder / "fp8", **how)


def grow(plain: Path, destination: Path, value: float = 3000) -> Path:
    """A trained copy of a BF16 directory: the last element of some weights has grown far beyond, some others moved."""
    shutil.copytree(plain, destination)
    for file in destination.glob("*.safetensors"):
        raw = np.memmap(file, np.uint8, "r+")
        header = json.loads(bytes(raw[8 : 8 + (size := int.from_bytes(raw[:8].tobytes(), "little"))]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = (8 + size + at for at in entry["data_offsets"])
            if "embed" not in name and len(entry["shape"]) == 2:
                raw[start : stop - 2 : 1022] ^= 3  # low bits of mantissas
                if any(word in name for word in ("v_proj", "up_proj", "down_proj")):
                    raw[stop - 2 : stop] = np.frombuffer(Stored.of(np.asarray(value), "BF16").data, np.uint8)
        raw.flush()
    return destination


def outgrown(folder: Path) -> Path:
    """A folder with a miniature ``fp8``, its ``plain`` conversion, ``trained``, of which many weights have outgrown
    their scale, and ``undisturbed``: that in FP8.
    """
    sample(folder / "fp8", Mistral3Sizes(layers=1, vision_layers=1, intermediate=384))
    convert(folder / "fp8", folder / "plain")
    grow(folder / "plain", folder / "trained")
    back(folder, folder / "undisturbed")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As of `outgrown`."""
    return outgrown(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def undisturbed(small: Path) -> dict[str, dict[str, str]]:
    """The digests of what undisturbed runs write, by source."""
    result = back(small, small / "out")
    assert result.report is not None
    assert result.report.total.fresh > 0.4 * result.report.total.scales
    found = {"plain": digests(small / "fp8"), "trained": digests(small / "out")}
    shutil.rmtree(small / "out")
    return found


# ---------------------------------------------------------------- cut off, and resumed


def test_ctrl_c_and_the_same_command_again(
    small: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Run
) -> None:
    """Exit 130 and one line that says how to go on; the rerun writes what is missing, says so, and ends the same."""
    out = tmp_path / "out"
    command = ["convert", small / "plain", out, "--to", "fp8", "--like", small / "fp8"]
    stopped = run_until("record", 3, signal.SIGINT, *command, "--workers", "1")
    assert (stopped.returncode, stopped.stdout) == (130, "")
    assert stopped.stderr == f"fp8ckpt: interrupted; what was written is in {out}.partial, and {GOES_ON}\n"
    cut(monkeypatch, CHUNK, CHUNKS)
    done = cli(*command)
    assert done.returncode == 0
    assert "were there from an earlier run" in done.stdout
    assert digests(out) == undisturbed["plain"]


@pytest.mark.parametrize("scales", ["reuse", "fresh"])
def test_cut_off_between_the_passes(scales: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all was looked at and nothing written again: the rerun reads only what the second pass writes."""
    cut(monkeypatch, 4096, 4)

    def died(*_: object) -> None:
        raise Died

    whole = back(small, tmp_path / "whole", scales=scales)
    with monkeypatch.context() as patch:
        patch.setattr("fp8ckpt.encodings.units.Units.recorded", lambda *_: {})
        patch.setattr("fp8ckpt.encodings.run._decide", died)
        with pytest.raises(Died):
            back(small, tmp_path / "out", scales=scales)
    result = back(small, tmp_path / "out", scales=scales)
    assert_same_tree(tmp_path / "out", tmp_path / "whole")
    assert result.report == whole.report
    assert result.report is not None
    again = sum(2 * row.elements for row in result.report.weights if row.fresh)
    assert result.bytes_read == again > 0
    assert result.bytes_resumed > result.bytes_written - again
    assert result.bytes_rewritten == 0


@pytest.mark.parametrize("remainder", range(2))
def test_death_at_every_step(remainder: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before, or halfway through, any change to the disk (half of them, except in the campaign), it resumes."""
    cut(monkeypatch, 24 << 10, 3)
    step, ended = remainder, False
    left, passes = 0, set()

    def before(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            return real(*arguments, **more)
        if left == -1 and real.__name__ in ("pwrite", "write"):
            real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
        raise Died

    while not ended:
        out = tmp_path / f"out{step}"
        left = step
        with monkeypatch.context() as patch:
            for name in STEPS:
                patch.setattr(os, name, partial(before, getattr(os, name)))
            try:
                back(small, out, report=remainder == 0, workers=1)
                ended = True
            except Died:
                pass
        if not ended and not out.exists():
            result = back(small, out, report=remainder == 0, workers=2)
            passes.add(result.bytes_resumed > result.bytes_written)  # all of the first pass, and some of the second
        assert_same_tree(out, small / "undisturbed")
        shutil.rmtree(out)
        left_over = out.with_name(out.name + ".partial")
        if left_over.exists():  # death after the rename: nothing of the output is in it
            assert not (left_over / "output").exists()
            shutil.rmtree(left_over)
        step += 2 if ALL else 4
    assert passes == {False, True}
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("source", "moments"), [("plain", (0, 1, 9, 60, 120)), ("trained", (0, 5, 70, 130, 150))])
def test_full_disk(
    source: str, moments: tuple[int, ...], workers: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC in either pass is named, and leaves no DST; the rerun, with other workers, ends well."""
    cut(monkeypatch, 8 << 10, 2)
    before = tree(small / source), tree(small / "fp8")
    whole = back(small, tmp_path / "whole", source)
    shutil.rmtree(tmp_path / "whole")
    for calls in moments:
        out = tmp_path / f"out{calls}"
        said = rf"No space left on device; free some space.*{out.name}\.partial, and {GOES_ON}"
        with monkeypatch.context() as patch:
            fail_after(patch, "pwrite", calls, errno.ENOSPC)
            with pytest.raises(StorageError, match=said):
                back(small, out, source, workers=workers)
        assert os.listdir(tmp_path) == [f"{out.name}.partial"]
        assert (tree(small / source), tree(small / "fp8")) == before
        result = back(small, out, source, workers=3 - workers)
        assert result.bytes_resumed > 0 or calls < 10
        assert result.report == whole.report
        assert_same_tree(out, small / ("fp8" if source == "plain" else "undisturbed"))
        shutil.rmtree(out)


@pytest.mark.parametrize("full", [True, False])
def test_a_record_that_the_disk_cuts_short(
    full: bool, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that is written in part is completed, or ends the run, which can be resumed."""
    cut(monkeypatch, 8 << 10, 2)
    write = os.write
    shortened = 0

    def short(fd: int, data: Any) -> int:
        nonlocal shortened
        if b": 3008.0" in bytes(data) and not shortened:  # what decides on a new scale
            shortened = write(fd, bytes(data)[: len(data) // 2])
            return shortened
        if shortened and full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    ended = pytest.raises(StorageError, match="No space left on device") if full else nullcontext()
    with monkeypatch.context() as patch, ended:
        patch.setattr(os, "write", short)
        back(small, tmp_path / "out", workers=1)
    assert shortened
    assert (tmp_path / "out").exists() != full
    if full:
        back(small, tmp_path / "out")
    assert_same_tree(tmp_path / "out", small / "undisturbed")


def test_the_second_pass_stands_where_all_of_the_first_does(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut some records may be gone, of either pass: a unit of which something is looked at again is
    written again, also when the next run dies in the midst of it; others are left.
    """
    cut(monkeypatch, 8 << 10, 2)

    def died(_: object) -> None:
        raise Died

    def run(out: Path) -> Any:
        return back(small, out, workers=1)

    report = run(tmp_path / "whole").report
    with monkeypatch.context() as patch:
        patch.setattr(PartialOutput, "publish", died)
        with pytest.raises(Died):
            run(tmp_path / "cut")
    again = sum(2 * row.elements for row in report.weights if row.fresh)
    lines = [line for line in (tmp_path / "cut.partial/.fp8ckpt/done-0").read_text().split("\n") if line]
    for seed in range(40 if ALL else 10):
        rng = np.random.default_rng(seed)
        lost = rng.choice(len(lines), int(rng.choice([1, 1, 4, len(lines) // 2])), replace=False)
        out = tmp_path / f"out{seed}"
        shutil.copytree(tmp_path / "cut.partial", f"{out}.partial")
        left = "\n".join(line for i, line in enumerate(lines) if i not in lost)
        Path(f"{out}.partial/.fp8ckpt/done-0").write_text(f"{left}\n")
        with monkeypatch.context() as patch:
            fail_after(patch, "pwrite", int(rng.integers(1, 6 * lost.size)), errno.EIO)
            with pytest.raises(StorageError):
                run(out)
        result = run(out)
        assert result.report == report
        assert_same_tree(out, small / "undisturbed")
        assert lost.size > 1 or result.bytes_read < again / 2


@pytest.mark.parametrize("change", ["scales", "report", "base", "scheme", "to", "source", "serving"])
def test_other_arguments_are_not_taken_up(
    change: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rerun that would write or report something else is refused; the same command continues."""
    cut(monkeypatch, 4096, 2)
    base = Path(shutil.copytree(small / "fp8", tmp_path / "base"))
    how: dict[str, Any] = {"to": "fp8", "like": base}
    with monkeypatch.context() as patch:
        fail_after(patch, "pwrite", 60, errno.EIO)
        with pytest.raises(StorageError):
            convert(small / "trained", tmp_path / "out", workers=1, **how)
    sizes = Mistral3Sizes(layers=1, vision_layers=1, intermediate=384)
    other: dict[str, Any] = {
        "scales": {**how, "scales": "fresh"},
        "report": {**how, "report": False},
        "base": {**how, "like": sample(tmp_path / "other", sizes, seed=1)},
        "scheme": {"to": "fp8", "scheme": "per-tensor"},
        "to": {"to": "bf16"},
        "source": how,
        "serving": {**how, "serving": True},
    }[change]
    source = small / ("plain" if change == "source" else "trained")
    left = tmp_path / "out.partial"
    before = digests(left)
    with pytest.raises(ResumeMismatchError, match=f"delete {left}"):
        convert(source if change != "to" else base, tmp_path / "out", **other)
    assert digests(left) == before
    result = convert(small / "trained", tmp_path / "out", workers=2, **how)
    assert result.bytes_resumed > 0
    assert_same_tree(tmp_path / "out", small / "undisturbed")


# ---------------------------------------------------------------- workers, and ranks


@pytest.mark.parametrize("how", [{}, {"scales": "fresh"}, {"scheme": "per-tensor"}, {"scheme": "block"}])
def test_workers_change_no_byte_and_no_number(
    how: dict[str, str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1, 2 and 7 workers write the same directory and report the same, to the last digit of every sum."""
    cut(monkeypatch, 4096, 3)
    steps(monkeypatch, 1000)
    way: dict[str, Any] = {"to": "fp8", **how} | ({} if "scheme" in how else {"like": small / "fp8"})
    results = [convert(small / "trained", tmp_path / str(n), workers=n, **way) for n in (1, 2, 7)]
    assert results[0].report is not None
    assert results[0].report.total.fresh > 0
    for other in results[1:]:
        assert_same_tree(other.destination, results[0].destination)
        assert other.report == results[0].report
        assert (other.bytes_read, other.bytes_written) == (results[0].bytes_read, results[0].bytes_written)


@pytest.mark.parametrize("how", [{"scales": "fresh"}, {"scheme": "per-tensor"}, {}])
def test_weights_are_written_while_others_are_looked_at(
    how: dict[str, str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that cores look while the disk writes: a weight whose scale is new is written as soon as all of it, and of its
    siblings, was looked at, in turn with the looks at others.
    """
    cut(monkeypatch, 4096, 2)
    filled: list[tuple[bool, str]] = []
    fill = QuantizingFiller.fill

    def noted(filler: QuantizingFiller, extent: Extent, chunk: Chunk, out: Any) -> Any:
        filled.append((extent.again, extent.layout.spans[min(chunk.first, len(extent.layout.spans) - 1)].name))
        return fill(filler, extent, chunk, out)

    monkeypatch.setattr(QuantizingFiller, "fill", noted)
    like = {} if "scheme" in how else {"like": small / "fp8"}
    convert(small / "trained", tmp_path / "out", to="fp8", workers=1, report=False, **how, **like)  # type: ignore[arg-type]
    places = {again: [i for i, (second, _) in enumerate(filled) if second == again] for again in (False, True)}
    last_looks = {name: i for i, (again, name) in enumerate(filled) if not again}
    assert all(last_looks[filled[i][1]] < i for i in places[True])
    meanwhile = [i for i in places[True] if i < places[False][-1]]
    assert len(meanwhile) > len(places[True]) / 2
    assert sum(not filled[i - 1][0] for i in meanwhile) > len(meanwhile) / 2


def test_wide_weights_of_many_blocks_are_decided_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one block has outgrown its scale, the others are still compared, in any number of pieces."""
    rng = np.random.default_rng(4)
    codes = rng.integers(1, 127, (48, 64)).astype(np.uint8)
    scales = Stored.of(np.full((3, 2), 0.5), "F32")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}
    base = Family({"w.weight": Stored.codes(codes), "w.weight_scale_inv": scales}, config, {}).write(
        tmp_path / "fp8", files=1
    )
    values = Stored.codes(codes).array.astype(np.float32) * np.float32(0.5)
    values[0, 0] = 4000
    values[20:32, :32] = values[16:28, :32] = 0.001 * rng.standard_normal((12, 32))
    values[16:32, 32:] = 0.5 * 2.0**-9 * rng.integers(0, 8, (16, 32))  # small, and exact
    values[40:, 40:] *= np.float32(1e-3)
    for dtype in ("BF16", "F32"):
        given = {"w.weight": Stored.of(values, dtype)}
        source = write_plain(tmp_path / dtype, given)
        scale = expected_scale(given["w.weight"], scales, (16, 32))
        for chunk, workers in ((4 << 20, 1), (512, 1), (512, 3), (64, 2)):
            cut(monkeypatch, chunk, 2)
            steps(monkeypatch, 96)
            out = tmp_path / f"{dtype}-{chunk}-{workers}"
            convert(source, out, to="fp8", like=base, workers=workers)
            found = read_directory(out)
            assert found["w.weight_scale_inv"] == scale
            assert found["w.weight"].data == quantize(given["w.weight"], scale, (16, 32))


def test_siblings_in_blocks_have_scales_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines join grids unchanged: of two siblings in blocks one grows, and the other keeps its scales."""
    codes = np.random.default_rng(3).integers(1, 127, (32, 64)).astype(np.uint8)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}
    scale = Stored.of(np.full((2, 2), 0.5), "F32")
    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    tensors = {name: Stored.codes(codes) for name in names} | {f"{name}_scale_inv": scale for name in names}
    base = Family(tensors, config, {}).write(tmp_path / "fp8", files=1)
    values = Stored.codes(codes).array.astype(np.float32) * np.float32(0.5)
    given = {name: Stored.of(values * factor, "BF16") for name, factor in zip(names, (1, 3), strict=True)}
    source = write_plain(tmp_path / "trained", given)
    for chunk in (4 << 20, 256):
        cut(monkeypatch, chunk, 2)
        convert(source, tmp_path / str(chunk), to="fp8", like=base)
        found = read_directory(tmp_path / str(chunk))
        for name in names:
            expected = expected_scale(given[name], scale, (16, 32))
            assert found[f"{name}_scale_inv"] == expected
            assert found[name].data == quantize(given[name], expected, (16, 32))
        assert found[f"{names[0]}_scale_inv"] == scale


LIBRARY = """
import errno, json, os, sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

import fp8ckpt
import fp8ckpt.output.extents as writing

writing.CHUNK, writing.EXTENT = 8192, 2 * 8192
folder, out = map(Path, sys.argv[1:])
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
pwrite, writes, full = os.pwrite, 0, False

def counted(fd, data, offset):
    global writes
    writes += 1
    if full and rank == size - 1 and writes > 5:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return pwrite(fd, data, offset)

os.pwrite = counted
everywhere, results = [None] * size, {}

def job(name, source, **how):
    global writes
    writes = 0
    try:
        done = fp8ckpt.convert(folder / source, out / name, to="fp8", workers=1, **how)
        found = {key: value for key, value in asdict(done).items() if key not in ("seconds", "destination")}
        dist.all_gather_object(everywhere, (writes, found))
    except fp8ckpt.Fp8CheckpointError as error:
        dist.all_gather_object(everywhere, (writes, type(error).__name__ + ": " + str(error)))
    assert all(found == everywhere[0][1] for _, found in everywhere), everywhere
    assert all(count for count, _ in everywhere), name
    results[name] = everywhere[0][1]

like = folder / "fp8"
job("plain", "plain", like=like)
job("trained", "trained", like=like)
job("fresh", "trained", like=like, scales="fresh")
job("block", "trained", scheme="block")
job("nan", "nan", like=like)
full = True
job("full", "trained", like=like)
full = False
job("full2", "trained", like=like)
dist.destroy_process_group()
if rank == 0:
    print(json.dumps(results))
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_and_report_what_one_process_does(
    ranks: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes and report, to the last digit; an error of one rank is every rank's, and can be resumed."""
    cut(monkeypatch, 8192, 2)
    folder = Path(shutil.copytree(small, tmp_path / "in", ignore=shutil.ignore_patterns("undisturbed")))
    shutil.copytree(folder / "trained", folder / "nan")
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    file = next(file for file in (folder / "nan").glob("*.safetensors") if name in read_safetensors(file))
    weights = read_safetensors(file)
    values = weights[name].array.copy()
    values[3, 3] = np.inf
    write_safetensors(file, {**weights, name: Stored.of(values, "BF16")}, {"format": "pt"})
    (tmp_path / "library.py").write_text(LIBRARY)
    (tmp_path / "out").mkdir()
    command = (tmp_path / "library.py", folder, tmp_path / "out")
    code, stdout, stderr = Launched(tmp_path / "ranks", ranks, *command).ended()
    assert code == 0, stderr
    found = json.loads(stdout)
    refused = f"WeightValueError: {name} in {file.name}: 1 of {values.size} elements are NaN or infinite"
    assert found.pop("nan").startswith(refused)
    assert re.match(f"StorageError: .*No space left on device.*{GOES_ON}", found.pop("full"))
    assert sorted(os.listdir(tmp_path / "out")) == ["block", "fresh", "full.partial", "full2", "plain", "trained"]
    like: dict[str, Any] = {"like": folder / "fp8"}
    jobs: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("plain", like),
        "trained": ("trained", like),
        "fresh": ("trained", {**like, "scales": "fresh"}),
        "block": ("trained", {"scheme": "block"}),
        "full2": ("trained", like),
    }
    timing = {"base_bytes_read", "bytes_rewritten"}  # when a weight turns out to have outgrown its scale is luck
    for key, (source, how) in jobs.items():
        alone = asdict(convert(folder / source, tmp_path / f"alone-{key}", to="fp8", **how))
        alone = {name: alone[name] for name in alone.keys() - {"seconds", "destination", *timing}}
        assert {name: found[key][name] for name in found[key].keys() - timing} == json.loads(json.dumps(alone))
        assert_same_tree(tmp_path / "out" / key, tmp_path / f"alone-{key}")
    back(folder, tmp_path / "out/full")
    assert_same_tree(tmp_path / "out/full", small / "undisturbed")


# ---------------------------------------------------------------- counted


class Counted:
    """How often each byte of each file is read and written at an offset while it is looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: dict[str, np.ndarray] = {}
        self.written: dict[str, np.ndarray] = {}
        preadv, pwrite, lock = os.preadv, os.pwrite, threading.Lock()

        def counted_read(fd: int, buffers: Any, offset: int) -> int:
            count = preadv(fd, buffers, offset)
            with lock:
                self._of(self.read, fd, str)[offset : offset + count] += 1
            return count

        def counted_write(fd: int, data: Any, offset: int) -> int:
            count = pwrite(fd, data, offset)
            with lock:
                self._of(self.written, fd, lambda path: Path(path).name)[offset : offset + count] += 1
            return count

        monkeypatch.setattr(os, "preadv", counted_read)
        monkeypatch.setattr(os, "pwrite", counted_write)

    @staticmethod
    def _of(counts: dict[Any, np.ndarray], fd: int, key: Callable[[str], Any]) -> np.ndarray:
        path = key(str(Path(f"/proc/self/fd/{fd}").readlink()))
        if path not in counts:
            counts[path] = np.zeros(os.fstat(fd).st_size, np.int64)
        found: np.ndarray = counts[path]
        return found

    def of(self, span: TensorSpan) -> set[int]:
        """How often the bytes of a stored tensor were read."""
        counts = self.read.get(f"{span.file.store.where}/{span.file.name}")
        return {0} if counts is None else {*map(int, counts[span.start : span.stop])}


@pytest.mark.parametrize("report", [True, False])
@pytest.mark.parametrize("case", [
    "untouched", "block fresh", "block trained", "channel fresh", "MXFP8 fresh", "scheme block", "scheme channel",
])  # fmt: skip
def test_each_byte_is_read_once_and_written_once(
    case: str, report: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source once if scales are kept or blocks fit a chunk; the base's codes for the report alone."""
    family = {"channel fresh": "per-channel [o,1]", "MXFP8 fresh": "MXFP8 U8"}.get(case)
    sizes = DeepseekSizes(layers=1) if "block" in case else Mistral3Sizes(layers=1, vision_layers=1)
    base = sample(tmp_path / "fp8", sizes) if family is None else families()[family].write(tmp_path / "fp8")
    plain = convert(base, tmp_path / "plain").destination
    if case == "block trained":
        plain = grow(plain, tmp_path / "trained")
    how: dict[str, Any] = {"scheme": case.split()[1]} if "scheme" in case else {"like": base}
    how |= {"scales": "fresh"} if "fresh" in case else {}
    cut(monkeypatch, 128 << 10, 2)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        result = convert(plain, tmp_path / "out", to="fp8", report=report, **how)
    source, like = open_checkpoint(plain), open_checkpoint(base)
    spans = [span for header in source.files for span in header.spans]
    assert {count for span in spans for count in counted.of(span)} == {1}
    others = {span.name for span in spans} | {tensor.scale.name for tensor in like.quantized}
    from_base = sum(span.nbytes for header in like.files for span in header.spans if span.name not in others)
    from_base *= "like" in how
    assert result.bytes_read == sum(span.nbytes for span in spans) + from_base
    codes = sum(tensor.weight.nbytes for tensor in like.quantized)
    once = report and "like" in how
    assert {count for tensor in like.quantized for count in counted.of(tensor.weight)} == {int(once)}
    assert result.base_bytes_read == (codes if once else 0)
    files = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert {name: counts.size for name, counts in counted.written.items()} == files
    assert {int(count) for counts in counted.written.values() for count in np.unique(counts)} == {1}
    assert result.bytes_written == sum(files.values())
    assert result.bytes_rewritten == 0


def test_what_is_written_twice_is_counted(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that outgrew their scale are read twice, and no others; ``bytes_rewritten`` is what the disk saw."""
    cut(monkeypatch, 4096, 2)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        result = back(small, tmp_path / "out", report=False, workers=1)
    twice = {tensor.name for tensor in open_checkpoint(tmp_path / "out").quantized}
    twice = {name for name in twice if "o_proj" not in name and "gate" not in name}
    source = open_checkpoint(small / "trained")
    read = {span.name: counted.of(span) for header in source.files for span in header.spans}
    again = {name for name, counts in read.items() if counts == {2}}
    assert {name: counts for name, counts in read.items() if name not in again and counts != {1}} == {}
    assert {name.split(".")[-2] for name in again} >= {"v_proj", "up_proj", "down_proj"}
    assert result.bytes_read == sum(
        span.nbytes * max(read[span.name]) for header in source.files for span in header.spans
    ) + sum(span.nbytes for tensor in open_checkpoint(small / "fp8").quantized for span in tensor.activation_scales)
    assert result.bytes_rewritten == sum(int((counts - 1).sum()) for counts in counted.written.values()) > 0


def test_many_small_weights_are_flushed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One flush an extent, and one a file, not one a weight; each extent is searched once a pass."""
    rng = np.random.default_rng(5)
    names = [f"model.layers.0.mlp.experts.{i}.down_proj.weight" for i in range(50)]
    weights = {name: Stored.of(rng.standard_normal((8, 16)).astype(np.float32), "BF16") for name in names}
    source = write_plain(tmp_path / "plain", weights)
    flushes: list[str] = []
    flush = OutputFile.flush

    def noted(file: OutputFile) -> None:
        flushes.append(file.file.name)
        flush(file)

    gone_through: list[Extent] = []
    units_in = QuantizingPlan.units_in
    monkeypatch.setattr(QuantizingPlan, "units_in", lambda plan, of: gone_through.append(of) or units_in(plan, of))
    monkeypatch.setattr(OutputFile, "flush", noted)
    result = convert(source, tmp_path / "out", to="fp8", scheme="per-tensor")
    assert result.report is not None
    assert result.report.total.fresh == len(names)
    assert len(flushes) <= 4
    assert len(gone_through) == 2  # that of each pass


# ---------------------------------------------------------------- any checkpoint


Drawn = tuple[dict[str, Stored], list[int], int, int, int]
IN_FOURS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}


@st.composite
def checkpoints(draw: st.DrawFn) -> Drawn:
    """(tensors, file of each, chunk, chunks, step): FP8 weights of any shape and grid, among tensors of any dtype."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dims = st.integers(0, 9) | st.integers(120, 140)
    tensors: dict[str, Stored] = {}
    for i in range(draw(st.integers(1, 4))):
        matrix = st.tuples(dims, dims) | st.tuples(st.integers(1, 3), dims, dims)
        shape = draw(st.sampled_from([(), (5,), (0,), (7,), (0, 6), (6, 0)]) | matrix | matrix)
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        codes = np.where((codes & 0x7F) == 0x7F, 0x3A, codes).astype(np.uint8)
        grids = [(), (1,), (1,) * len(shape)]
        if len(shape) == 1 and shape != (0,):
            grids.append(shape)
        if len(shape) >= 2 and 0 in shape:
            grids.append((*shape[:-2], *(-(-dim // 4) for dim in shape[-2:])))
        elif len(shape) >= 2:
            lead, (rows, cols) = shape[:-2], shape[-2:]
            for own in (lead, (1,) * len(lead)):
                grids += [(*own, rows, 1), (*own, 1, 1), (*own, 1, cols)]
            grids.append((*lead, -(-rows // 4), -(-cols // 4)))
        scale_shape = draw(st.sampled_from(grids))
        dtype = draw(st.sampled_from(["F32", "BF16", "F16", "F8_E8M0"]))
        if dtype == "F8_E8M0":
            scale = Stored.codes(rng.integers(100, 140, scale_shape).astype(np.uint8), dtype)
        else:
            scale = Stored.of(np.exp2(rng.uniform(-12, 8, scale_shape)).astype(np.float32), dtype)
        tensors[f"layers.{i}.q_proj.weight"] = Stored.codes(codes)
        tensors[f"layers.{i}.q_proj.weight_scale_inv"] = scale
        if draw(st.booleans()):
            activation = Stored.of(np.asarray(0.5), dtype) if dtype != "F8_E8M0" else scale
            tensors[f"layers.{i}.q_proj.activation_scale"] = activation
    for i in range(draw(st.integers(0, 4))):
        shape = tuple(draw(st.lists(dims, max_size=2)))
        dtype = draw(st.sampled_from(["BF16", "F16", "F32", "I64", "U8", "BOOL", "F64", "I8"]))
        tensors[f"other.{i}"] = Stored.of(rng.integers(0, 2, shape), dtype)
    files = draw(st.lists(st.integers(0, 2), min_size=len(tensors), max_size=len(tensors)))
    few = sum(len(tensor.data) for tensor in tensors.values()) // 500 * 8  # or there are thousands of pieces
    chunk = max(few, draw(st.sampled_from([8, 64, 1000, 4096, 1 << 16])))
    return tensors, files, chunk, draw(st.integers(1, 4)), draw(st.sampled_from([7, 100, 1 << 19]))


@examples(30)
@given(drawn=checkpoints(), to=st.sampled_from(["bf16", "fp32"]), report=st.booleans())
def test_any_checkpoint_round_trips(
    drawn: Drawn, to: str, report: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever it holds and however it is cut up, in files and in pieces: to bf16 or fp32, and back byte for byte."""
    tensors, files, chunk, chunks, step = drawn
    folder = tmp_path_factory.mktemp("any")
    try:
        base = folder / "fp8"
        base.mkdir()
        (base / "config.json").write_text(json.dumps(IN_FOURS))
        for file in set(files):
            part = {name: tensor for (name, tensor), own in zip(tensors.items(), files, strict=True) if own == file}
            write_safetensors(base / f"model-{file}.safetensors", part, {"format": "pt"})
        with pytest.MonkeyPatch.context() as patch:
            cut(patch, chunk, chunks)
            steps(patch, step)
            convert(base, folder / "plain", to=to)
            result = convert(folder / "plain", folder / "back", to="fp8", like=base, report=report)
        assert_same_tree(folder / "back", base)
        assert result.bytes_rewritten == 0
        if report:
            assert result.report is not None
            total = result.report.total
            weights = {name: tensor for name, tensor in tensors.items() if name.endswith("q_proj.weight")}
            elements = sum(math.prod(tensor.shape) for tensor in weights.values())
            assert (total.elements, total.moved, total.fresh) == (elements, 0, 0)
            assert total.scales == sum(math.prod(tensors[f"{name}_scale_inv"].shape) for name in weights)
    finally:
        shutil.rmtree(folder)


@examples(30)
@given(
    drawn=checkpoints(), dtype=st.sampled_from(["BF16", "F32"]), seed=st.integers(0, 2**32), workers=st.integers(1, 3)
)
def test_any_training_equals_the_oracle(
    drawn: Drawn, dtype: str, seed: int, workers: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Blocks grow, shrink, become zero or stay: scales by the rule, codes by the contract, in any pieces."""
    tensors, _, chunk, chunks, step = drawn
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("any")
    try:
        base = Family(tensors, IN_FOURS, {}).write(folder / "fp8", files=1)
        convert(base, folder / "plain", to="fp32")
        trained = read_directory(folder / "plain")
        expected = dict(tensors)
        for tensor in open_checkpoint(base).quantized:
            values, scale = trained[tensor.name].array.copy(), tensor.scale.name
            block = tensor.grid.block_size
            if values.size:
                grid = tuple(-(-dim // size) for dim, size in zip(values.shape, block, strict=True))
                factors = rng.choice([1, 1, 1, 2, 0.3, 2.0**-7, 1e-3, 0], grid).astype(np.float32)
                part = tuple(slice(int(rng.integers(0, dim)), None) for dim in values.shape)
                values[part] *= spread(factors, values.shape, block)[part]
            trained[tensor.name] = Stored.of(values, dtype)
            if values.size:
                expected[scale] = expected_scale(trained[tensor.name], tensors[scale], block)
                codes = quantize(trained[tensor.name], expected[scale], block)
                expected[tensor.name] = Stored("F8_E4M3", values.shape, codes)
        source = write_plain(folder / "trained", trained)
        with pytest.MonkeyPatch.context() as patch:
            cut(patch, chunk, chunks)
            steps(patch, step)
            convert(source, folder / "out", to="fp8", like=base, workers=workers)
        found = read_directory(folder / "out")
        assert {name for name in expected if found[name] != expected[name]} == set()
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- as a command


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(cli: Run) -> Cli:
    """``command("convert", ...)``: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        done = cli(*arguments)
        return done.returncode, done.stdout, done.stderr

    return run


def like(folder: Path) -> tuple[object, ...]:
    return ("--to", "fp8", "--like", folder / "fp8")


def test_summary_of_what_was_not_trained(small: Path, tmp_path: Path, command: Cli) -> None:
    """Nothing moved, every scale kept, and no table."""
    code, out, err = command("convert", small / "plain", tmp_path / "out", *like(small))
    assert (code, err) == (0, "")
    quantized = len(open_checkpoint(small / "fp8").quantized)
    elements = sum(tensor.weight.nbytes for tensor in open_checkpoint(small / "fp8").quantized)
    lines = out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: {len(open_checkpoint(small / 'plain').tensors)} tensors in ")
    assert f", {quantized} quantized, " in lines[0]
    kept = f"{quantized} of {quantized} (100 %) scales kept, 0 new"
    assert lines[1] == f"0 of {elements:,} (0 %) codes moved, 0 elements clipped, {kept}"
    assert lines[2].startswith("error against the source: ")
    assert len(lines) == 3
    assert_same_tree(tmp_path / "out", small / "fp8")


def test_summary_of_what_was_trained(small: Path, tmp_path: Path, command: Cli) -> None:
    """What moved, what is new, what had outgrown its scale; and the weights that moved most, in that order."""
    code, out, err = command("convert", small / "trained", tmp_path / "out", *like(small))
    assert (code, err) == (0, "")
    result = back(small, tmp_path / "again")
    assert result.report is not None
    total, lines = result.report.total, out.splitlines()
    assert total.moved
    assert lines[1].startswith(f"{total.moved:,} of {total.elements:,} (")
    assert lines[1].endswith(f" scales kept, {total.fresh} new")
    assert lines[3] == f"{total.outgrown} elements had outgrown the base's scales"
    assert lines[4] == "most moved:"
    assert " ".join(lines[5].split()) == "weight moved share new scales of outgrown mean error largest"
    rows = sorted((row for row in result.report.weights if row.moved), key=lambda row: -(row.moved or 0) / row.elements)
    shares = [f"{100 * (row.moved or 0) / row.elements:.3g}" for row in rows]
    first = [[row.name, f"{row.moved:,}", share] for row, share in zip(rows, shares, strict=True)][:10]
    assert [line.split()[:3] for line in lines[6:]] == first
    assert_same_tree(tmp_path / "out", small / "undisturbed")


def test_no_report_and_fresh_scales(small: Path, tmp_path: Path, command: Cli) -> None:
    """One line, and the bytes of the library call."""
    for i, more in enumerate((["--no-report"], ["--no-report", "--scales", "fresh", "--workers", "2"])):
        code, out, err = command("convert", small / "trained", tmp_path / f"out{i}", *like(small), *more)
        assert (code, err, len(out.splitlines())) == (0, "", 1)
    assert_same_tree(tmp_path / "out0", small / "undisturbed")
    convert(small / "trained", tmp_path / "fresh", to="fp8", like=small / "fp8", scales="fresh")
    assert_same_tree(tmp_path / "out1", tmp_path / "fresh")


def test_json_is_the_whole_result(small: Path, tmp_path: Path, command: Cli) -> None:
    """Every field of `Fp8Result`, the report of each weight and of all among them."""
    code, out, err = command("convert", small / "trained", tmp_path / "out", *like(small), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    result = asdict(back(small, tmp_path / "again"))
    assert found.keys() == {*result, "page"}  # where --report-html drew it
    for key in ("report", "to", "quantized", "bytes_read"):
        assert found[key] == json.loads(json.dumps(result[key]))
    names = [tensor.name for tensor in open_checkpoint(small / "fp8").quantized]
    assert [row["name"] for row in found["report"]["weights"]] == names
    code, out, _ = command("convert", small / "trained", tmp_path / "none", *like(small), "--json", "--no-report")
    assert json.loads(out)["report"] is None


@pytest.mark.parametrize("scheme", ["per-tensor", "block", "channel"])
def test_scheme_as_a_command(scheme: str, small: Path, tmp_path: Path, command: Cli) -> None:
    """Nothing is said of codes that moved, for there is no base; the bytes are those of the library call."""
    code, out, err = command("convert", small / "trained", tmp_path / "out", "--to", "fp8", "--scheme", scheme)
    assert (code, err) == (0, "")
    assert "moved" not in out
    assert "outgrown" not in out
    (line,) = [line for line in out.splitlines() if "elements clipped" in line]
    assert line.startswith("0 elements clipped, 0 of ")
    result = convert(small / "trained", tmp_path / "again", to="fp8", scheme=scheme)
    assert result.report is not None
    assert line.endswith(f" scales kept, {result.report.total.scales:,} new")
    assert {row.moved for row in result.report.weights} == {None}
    assert_same_tree(tmp_path / "out", tmp_path / "again")


def test_notes_are_printed(small: Path, tmp_path: Path, command: Cli) -> None:
    """Side files of the source that are not written."""
    plain = Path(shutil.copytree(small / "plain", tmp_path / "plain"))
    (plain / "mine.txt").write_text("mine")
    _, out, _ = command("convert", plain, tmp_path / "out", "--to", "fp8", "--like", small / "fp8", "--no-report")
    assert out.splitlines()[1:] == ["note: mine.txt is only in the source, and is not written"]


@pytest.mark.parametrize("arguments", [
    ["--to", "fp8"],
    ["--to", "fp8", "--like", "BASE", "--scheme", "block"],
    ["--to", "fp8", "--scheme", "int4"],
    ["--to", "fp8", "--like", "BASE", "--scales", "some"],
    ["--to", "bf16", "--like", "BASE"],
    ["--like", "BASE", "--scheme", "block"],
    ["--scales", "fresh"],
    ["--serving"],
    ["--to", "fp8", "--scheme", "block", "--scales", "fresh"],
    ["--to", "fp8", "--scheme", "block", "--serving"],
    ["--to", "fp8", "--like", "BASE", "--workers", "0"],
])  # fmt: skip
def test_combinations_that_make_no_sense(arguments: list[str], small: Path, tmp_path: Path, command: Cli) -> None:
    """Exit 2 with the usage, and nothing written."""
    given = [str(small / "fp8") if argument == "BASE" else argument for argument in arguments]
    code, out, err = command("convert", small / "plain", tmp_path / "out", *given)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ")
    assert "Error" in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", ["fp4", "MXFP4", "nvfp4"])
def test_four_bits_are_the_bases(dtype: str, small: Path, tmp_path: Path, command: Cli) -> None:
    """They are no target of their own: the base says them."""
    for verb in (("convert",), ("merge", small / "fp8")):
        code, _, err = command(*verb, small / "plain", tmp_path / "out", "--to", dtype)
        assert (code, "leave out --to" in " ".join(err.split())) == (2, True)


@pytest.mark.parametrize(("source", "base", "found"), [
    ("fp8", "fp8", "it is already quantized; expected BF16, F16 or F32; convert it first: --to bf16"),
    ("plain", "plain", "none of its tensors is quantized"),
    ("plain", "other", "tensors are only in the base"),
    ("plain", "nothing", "nothing"),
    ("nothing", "fp8", "nothing"),
])  # fmt: skip
def test_refusals_are_one_line(source: str, base: str, found: str, small: Path, tmp_path: Path, command: Cli) -> None:
    """Exit 1, one line that names what was found, nothing written."""
    path = sample(tmp_path / base, DeepseekSizes(layers=1)) if base == "other" else small / base
    code, out, err = command("convert", small / source, tmp_path / "out", "--to", "fp8", "--like", path)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("fp8ckpt: ")
    assert found in err
    assert not {"out", "out.partial"} & {*os.listdir(tmp_path)}


# ---------------------------------------------------------------- fit to be served


def test_serving_completes_the_released_list(tmp_path: Path, command: Cli) -> None:
    """Without ``--serving`` the release comes back byte for byte; with it, only its list is longer."""
    for layout in ("identity", "nested"):
        folder = tmp_path / layout
        base = sample(folder / "fp8", layout=layout)
        convert(base, folder / "plain")
        like = ("--to", "fp8", "--like", base, "--no-report")
        assert command("convert", folder / "plain", folder / "same", *like)[0] == 0
        assert_same_tree(folder / "same", base)
        assert command("verify", folder / "same", "--serving")[0] == 1
        assert command("convert", folder / "plain", folder / "out", *like, "--serving")[0] == 0
        code, out, _ = command("verify", folder / "out", "--serving")
        assert code == 0
        assert "fit to be served" in out
        found, expected = tree(folder / "out"), tree(base)
        assert {name for name in expected if found[name] != expected[name]} == {"config.json"}
        assert found.keys() == expected.keys()


def fall_short(base: Path, what: str) -> None:
    """Spoil a base in place, in one of the ways in which releases and other tools' outputs fall short."""
    if what == "params.json":
        (base / what).write_text('{"dim": 128, "quantization": {"qformat_weight": "fp8_e4m3"}}')
        write_safetensors(base / "consolidated.safetensors", {"x": Stored.of(np.ones(3), "BF16")})
    elif what == "no index":
        (base / "model.safetensors.index.json").unlink()
    else:
        for file in sorted(base.glob("*.safetensors")):
            tensors = read_safetensors(file)
            for name, tensor in list(tensors.items()):
                if what == "[1,1] scales" and name.endswith("_scale_inv"):
                    tensors[name] = Stored(tensor.dtype, (1, 1), tensor.data)
                if what == "activation scales" and name.endswith("q_proj.activation_scale"):
                    del tensors[name]
            write_safetensors(file, tensors, {"format": "pt"})
        reindex(base)


SHORT = ("[1,1] scales", "activation scales", "params.json", "no index")


@pytest.mark.parametrize("layout", ["identity", "nested"])
@pytest.mark.parametrize("what", [*SHORT, "all of them"])
def test_serving_puts_right_what_engines_trip_over(what: str, layout: str, tmp_path: Path) -> None:
    """Whatever the base lacks, the output has; the values are the same, and nothing else of it is."""
    base = sample(tmp_path / "fp8", Mistral3Sizes(layers=1, vision_layers=1), layout=layout)
    for short in SHORT if what == "all of them" else (what,):
        fall_short(base, short)
    assert verify(base).defects == ()
    assert not verify(base, serving=True).ok
    convert(base, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "same", to="fp8", like=base)
    assert {**tree(base), **tree(tmp_path / "same")} == tree(base)
    result = convert(tmp_path / "plain", tmp_path / "out", to="fp8", like=base, serving=True)
    assert result.report is not None
    assert (result.report.total.moved, result.report.total.fresh) == (0, 0)
    compared = verify(base, tmp_path / "out", serving=True)
    assert compared.serving is not None
    assert compared.serving.failures == ()
    assert (compared.defects, compared.tensor_differences) == ((), ())
    assert verify(tmp_path / "plain", tmp_path / "out").tensor_differences == ()
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    stored = read_directory(tmp_path / "out")
    activations = {name for name in stored if name.endswith("activation_scale")}
    lost = what in ("activation scales", "all of them")
    assert quantization["activation_scheme"] == ("dynamic" if lost else "static")
    assert bool(activations) == (not lost)
    assert {stored[name].shape for name in stored if name.endswith("_scale_inv")} == {
        (1,) if what in ("[1,1] scales", "all of them") else ()
    }
    assert not list((tmp_path / "out").glob("consolidated*"))
    assert not (tmp_path / "out/params.json").exists()
    assert (tmp_path / "out/model.safetensors.index.json").exists()


SERVED: dict[str, Callable[[Path], Path]] = {
    **{
        name: family.write
        for name, family in families().items()
        if {family.tensors[w].dtype for w in family.blocks} == {"F8_E4M3"}
    },
    "DeepSeek": lambda folder: sample(folder, DeepseekSizes(layers=1)),
    "small blocks": lambda folder: sample(folder, DeepseekSizes(layers=1, hidden=96, intermediate=96, q_rank=64)),
    "Mistral3": lambda folder: sample(folder, Mistral3Sizes(layers=1, vision_layers=1)),
    **{
        scheme: lambda folder, scheme=scheme: from_scheme(folder, scheme)  # type: ignore[misc]
        for scheme in ("per-tensor", "block", "channel")
    },
}


def from_scheme(folder: Path, scheme: str) -> Path:
    """A base that a scheme made, with a weight of one row."""
    plain = folder.with_name("given")
    plain.mkdir()
    rng = np.random.default_rng(6)
    shapes = {"q_proj": (200, 24), "one": (1, 24), "narrow": (24, 1), "single": (1, 1)}
    tensors = {
        f"model.layers.0.{name}.weight": Stored.of(rng.standard_normal(shape).astype(np.float32), "BF16")
        for name, shape in shapes.items()
    }
    tensors["model.layers.0.experts.down_proj"] = Stored.of(rng.standard_normal((1, 24, 30)).astype(np.float32), "BF16")
    write_safetensors(plain / "model.safetensors", tensors)
    return convert(plain, folder, to="fp8", scheme=scheme).destination


@pytest.mark.parametrize("name", SERVED)
def test_serving_changes_nothing_that_is_right(name: str, tmp_path: Path) -> None:
    """A base that engines serve right is unchanged; any other output is sound, with no new failure."""
    base = SERVED[name](tmp_path / "fp8")
    before = verify(base, serving=True)
    convert(base, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out", to="fp8", like=base, serving=True)
    if before.ok:
        assert_same_tree(tmp_path / "out", base)
    after = verify(base, tmp_path / "out", serving=True)
    assert (after.defects, after.tensor_differences) == ((), ())
    assert before.serving is not None
    assert after.serving is not None
    found, known = ({failure.found for failure in of.serving.failures} for of in (after, before))
    assert found <= known


def test_serving_keeps_the_activation_scales_of_one_group_of_several(tmp_path: Path) -> None:
    """Groups of one block size, of which one states static activations: what it has is there for the engine."""
    rng = np.random.default_rng(7)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    group = {"weights": scheme, "input_activations": {**scheme, "dynamic": True, "strategy": "token"}}
    static = {"targets": ["re:.*o_proj$"], **group, "input_activations": scheme}
    groups = {"group_0": static, "group_1": {"targets": ["re:.*up_proj$"], **group}}
    config = {"quantization_config": {**COMPRESSED, "config_groups": groups}}
    o, up = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.up_proj.weight"
    tensors = {
        o: codes(rng, 24, 16), f"{o}_scale": scales(rng, "F32", 1),
        o.replace("weight", "input_scale"): scales(rng, "F32", 1),
        up: codes(rng, 24, 16), f"{up}_scale": scales(rng, "F32", 1),
    }  # fmt: skip
    blocks = {name: (f"{name}_scale", (24, 16)) for name in (o, up)}
    base = Family(tensors, config, blocks, (o.replace("weight", "input_scale"),)).write(tmp_path / "fp8")
    assert verify(base, serving=True).ok
    convert(base, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out", to="fp8", like=base, serving=True)
    assert_same_tree(tmp_path / "out", base)


def test_progress_goes_on_over_both_passes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done never falls, nor exceeds what there is to do, and in the end all is done."""
    cut(monkeypatch, 8192, 2)
    seen: list[tuple[int, int]] = []
    result = back(small, tmp_path / "out", workers=2, progress=lambda done, total, doing: seen.append((done, total)))
    assert seen == sorted(seen)
    assert all(done <= total for done, total in seen)
    scales = sum(tensor.scale.nbytes for tensor in open_checkpoint(small / "fp8").quantized)
    assert result.report is not None
    again = sum(row.elements for row in result.report.weights if row.fresh)
    assert seen[-1] == (result.bytes_written - scales + again,) * 2

"""Memory is bounded: some MiB a worker above the interpreter with torch, whatever the size of the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fp8ckpt import open_checkpoint, sample
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes
from tests.adapters import PREFIX, factors, write_adapter

BUDGET = 256 << 20
Peaks = Callable[..., list[int]]


# An interpreter that has imported torch and fp8ckpt, and forks for each list of jobs. VmHWM, not ru_maxrss: the latter
# starts at what was resident before the fork. A 5 sets it back (proc(5)); where that is refused each peak is of all
# jobs so far, and stays within bounds, too.
INTERPRETER = """
import contextlib, json, os, sys, torch, fp8ckpt, fp8ckpt.figures
for line in sys.stdin:
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            print("[]", flush=True)
        continue
    found = []
    for job in json.loads(line):
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        exec(job)
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        found.append(int(peak.split()[1]) << 10)
    print(json.dumps(found), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def peaks() -> Iterator[Peaks]:
    """Peak resident bytes of a process that has torch and fp8ckpt, during each of some jobs, in order."""
    with subprocess.Popen(
        [sys.executable, "-c", INTERPRETER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as interpreter:

        def during(*jobs: str) -> list[int]:
            print(json.dumps(jobs), file=interpreter.stdin, flush=True)
            assert interpreter.stdout is not None
            found: list[int] = json.loads(interpreter.stdout.readline())
            assert len(found) == len(jobs)
            return found

        yield during


def assert_bounded(small: list[int], large: list[int], torch_alone: int) -> None:
    """Two workers stay within the budget at both sizes, and the larger one takes as much as the smaller, to 16 MiB."""
    assert len(small) == len(large) > 0
    for first, second in zip(small, large, strict=True):
        assert first > torch_alone  # it is measured at all
        assert max(first, second) - torch_alone <= BUDGET
        assert second - first < 16 << 20


@pytest.fixture(scope="module")
def torch_alone(peaks: Peaks) -> int:
    """Of a process that does nothing with what is imported."""
    return peaks("pass")[0]


def sizes(scheme: str, factor: int) -> Mistral3Sizes | DeepseekSizes:
    """About 37 MB of FP8 at factor 1, in weights that are larger than any buffer."""
    if scheme == "block":
        return DeepseekSizes(layers=factor, dense_layers=factor, hidden=1024, intermediate=12000, vocabulary=512)
    return Mistral3Sizes(layers=factor, hidden=1024, intermediate=11264, heads=8, kv_heads=4, head_dim=128)


@pytest.fixture(scope="module", params=["per-tensor", "block"])
def checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """A checkpoint of about 37 MB, and one of four times as much."""
    folder = tmp_path_factory.mktemp("memory")
    # Holes read as zeros, and cost neither time nor disk to make.
    yield (
        sample(folder / "small", sizes(request.param, 1), files=1, sparse=True),
        sample(folder / "large", sizes(request.param, 4), files=1, sparse=True),
    )
    shutil.rmtree(folder)


def trained(base: Path, destination: Path) -> Path:
    """The same model in BF16, of holes, but that the last element of each matrix is 1000: none of their last blocks'
    scales fits.
    """
    destination.mkdir()
    shutil.copy(base / "config.json", destination)
    raw = (base / "model.safetensors").open("rb")
    with raw, (destination / "model.safetensors").open("wb") as stream:
        header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
        plain, size = {}, 0
        for name, entry in header.items():
            if name != "__metadata__" and "_scale" not in name:
                dtype = "BF16" if entry["dtype"] == "F8_E4M3" else entry["dtype"]
                nbytes = (entry["data_offsets"][1] - entry["data_offsets"][0]) * (2 if dtype != entry["dtype"] else 1)
                plain[name] = {"dtype": dtype, "shape": entry["shape"], "data_offsets": [size, size + nbytes]}
                size += nbytes
        text = json.dumps(plain).encode()
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + size)
        for entry in plain.values():
            if entry["dtype"] == "BF16":
                os.pwrite(stream.fileno(), b"\x7a\x44", 8 + len(text) + entry["data_offsets"][1] - 2)
    return destination


@pytest.fixture(scope="module")
def trainings(checkpoints: tuple[Path, Path]) -> dict[Path, Path]:
    """A training of each of the two."""
    return {base: trained(base, base.with_name(f"{base.name}-trained")) for base in checkpoints}


def stored(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def test_peak_memory_is_bounded_and_does_not_grow(
    checkpoints: tuple[Path, Path], peaks: Peaks, torch_alone: int, tmp_path: Path
) -> None:
    """Of everything that only reads, or writes BF16; a page is drawn of the scheme whose page is larger."""
    assert stored(checkpoints[1]) > 3.5 * stored(checkpoints[0]) > 100 << 20
    found = []
    for source in checkpoints:
        out, alone = tmp_path / source.name, open_checkpoint(source).quantized[0].scale.numel == 1
        drawn = "fp8ckpt.figures.page_of = lambda found: ''\n" * alone
        found.append(
            peaks(
                f"assert fp8ckpt.verify({str(source)!r}, workers=2).ok",
                f"fp8ckpt.convert({str(source)!r}, {str(out)!r}, workers=2)",
                f"assert fp8ckpt.verify({str(source)!r}, {str(source)!r}, workers=2).ok",
            )
            + peaks(f"{drawn}fp8ckpt.report(*[{str(source)!r}] * 2, output='{out}.html', workers=2)")
        )
    assert_bounded(*found, torch_alone)


def test_peak_memory_to_fp8(
    checkpoints: tuple[Path, Path], trainings: dict[Path, Path], peaks: Peaks, torch_alone: int, tmp_path: Path
) -> None:
    """The same on the way back, whether scales are kept or made, weights written once or twice, a report of each."""
    config = json.loads((checkpoints[0] / "config.json").read_text())
    scheme = "block" if config["quantization_config"]["weight_block_size"] is not None else "per-tensor"
    found = []
    for base, source in trainings.items():
        options = [f"like={str(base)!r}", f"like={str(base)!r}, scales='fresh'", f"scheme={scheme!r}"]
        out = [tmp_path / f"{base.name}-{i}" for i in range(len(options))]
        jobs = [
            f"done = fp8ckpt.convert({str(source)!r}, {str(to)!r}, to='fp8', {option}, workers=2)\n"
            "assert done.report.total.elements > 0 and done.report.total.fresh > 0"
            for to, option in zip(out, options, strict=True)
        ]
        found.append(peaks(*jobs))
        assert all(stored(to) > 0.9 * stored(base) for to in out)
    assert_bounded(*found, torch_alone)


def test_peak_memory_of_merging(checkpoints: tuple[Path, Path], peaks: Peaks, torch_alone: int, tmp_path: Path) -> None:
    """An adapter of every matrix of the multilayer perceptrons takes no more of a larger model."""
    found = []
    for base in checkpoints:
        tensors = {}
        for name, tensor in open_checkpoint(base).tensors.items():
            if ".mlp." in name and len(tensor.shape) == 2:
                rows, cols = tensor.shape
                tensors |= factors(PREFIX + name.removesuffix(".weight"), 4, cols, rows)
        adapter = write_adapter(tmp_path / f"{base.name}-adapter", tensors)
        job = (
            f"done = fp8ckpt.merge({str(base)!r}, {str(adapter)!r}, {str(tmp_path / base.name)!r}, workers=2)\n"
            f"assert done.merged == {len(tensors) // 2} > 0 and done.report.total.changed > 0"
        )
        found.append(peaks(job))
    assert_bounded(*found, torch_alone)

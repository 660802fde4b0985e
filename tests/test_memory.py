"""Memory is bounded: some MiB a worker above the interpreter with torch, whatever the size of the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8ckpt import open_checkpoint, sample
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes
from tests.adapters import PREFIX, factors, write_adapter

BUDGET = 256 << 20


def peak(code: str) -> int:
    """Peak resident bytes of a child process that imports torch, then runs ``code``."""
    # VmHWM, not ru_maxrss: the latter starts at the size of the process that forked the child, which is this one.
    script = (
        f"import torch\n{code}\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) << 10


@pytest.fixture(scope="module")
def torch_alone() -> int:
    """Peak of a process that only imports torch."""
    return peak("")


def sizes(scheme: str, factor: int) -> Mistral3Sizes | DeepseekSizes:
    """About 75 MB of FP8 at factor 1, in weights that are larger than any buffer."""
    if scheme == "block":
        return DeepseekSizes(layers=factor, dense_layers=factor, hidden=2048, intermediate=12000, vocabulary=512)
    return Mistral3Sizes(layers=factor, hidden=2048, intermediate=10240, heads=16, kv_heads=4, head_dim=128)


@pytest.fixture(scope="module", params=["per-tensor", "block"])
def checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """A checkpoint of about 75 MB, and one of six times as much."""
    folder = tmp_path_factory.mktemp("memory")
    # Holes read as zeros, and cost neither time nor disk to make.
    yield (
        sample(folder / "small", sizes(request.param, 1), files=1, sparse=True),
        sample(folder / "large", sizes(request.param, 6), files=1, sparse=True),
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


@pytest.mark.parametrize("job", ["convert", "verify", "verify one", "report"])
def test_peak_memory_is_bounded_and_does_not_grow(
    job: str, checkpoints: tuple[Path, Path], torch_alone: int, tmp_path: Path
) -> None:
    """Two workers stay within the budget at both sizes, and the larger one takes as much as the smaller, to 32 MiB."""
    assert stored(checkpoints[1]) > 5 * stored(checkpoints[0]) > 300 << 20
    peaks = []
    for source in checkpoints:
        page = str(tmp_path / f"{source.name}.html")
        run = {
            "convert": f"import fp8ckpt; fp8ckpt.convert({str(source)!r}, {str(tmp_path / source.name)!r}, workers=2)",
            "verify": f"import fp8ckpt; assert fp8ckpt.verify({str(source)!r}, {str(source)!r}, workers=2).ok",
            "report": f"import fp8ckpt; fp8ckpt.report(*[{str(source)!r}] * 2, output={page!r}, workers=2)",
            "verify one": f"import fp8ckpt; assert fp8ckpt.verify({str(source)!r}, workers=2).ok",
        }[job]
        peaks.append(peak(run))
        shutil.rmtree(tmp_path / source.name, ignore_errors=True)
    assert all(used > torch_alone for used in peaks)  # it is measured at all
    assert max(peaks) - torch_alone <= BUDGET
    assert peaks[1] - peaks[0] < 32 << 20


@pytest.mark.parametrize("how", ["like", "like fresh", "scheme"])
def test_peak_memory_to_fp8(
    how: str, checkpoints: tuple[Path, Path], trainings: dict[Path, Path], torch_alone: int, tmp_path: Path
) -> None:
    """The same on the way back, whether scales are kept or made, weights written once or twice, a report of each."""
    block = (
        json.loads((checkpoints[0] / "config.json").read_text())["quantization_config"]["weight_block_size"] is not None
    )
    peaks = []
    for base, source in trainings.items():
        out = tmp_path / base.name
        more = {
            "like": f"like={str(base)!r}",
            "like fresh": f"like={str(base)!r}, scales='fresh'",
            "scheme": f"scheme={'block' if block else 'per-tensor'!r}",
        }[how]
        run = f"import fp8ckpt; done = fp8ckpt.convert({str(source)!r}, {str(out)!r}, to='fp8', {more}, workers=2)"
        peaks.append(peak(f"{run}; assert done.report.total.elements > 0 and done.report.total.fresh > 0"))
        assert stored(out) > 0.9 * stored(base)
        shutil.rmtree(out)
    assert all(used > torch_alone for used in peaks)
    assert max(peaks) - torch_alone <= BUDGET
    assert peaks[1] - peaks[0] < 32 << 20


def test_peak_memory_of_merging(checkpoints: tuple[Path, Path], torch_alone: int, tmp_path: Path) -> None:
    """An adapter of every matrix of the multilayer perceptrons takes no more of a larger model."""
    peaks = []
    for base in checkpoints:
        tensors = {}
        for name, tensor in open_checkpoint(base).tensors.items():
            if ".mlp." in name and len(tensor.shape) == 2:
                rows, cols = tensor.shape
                tensors |= factors(PREFIX + name.removesuffix(".weight"), 4, cols, rows)
        adapter = write_adapter(tmp_path / f"{base.name}-adapter", tensors)
        out = tmp_path / base.name
        run = f"import fp8ckpt; done = fp8ckpt.merge({str(base)!r}, {str(adapter)!r}, {str(out)!r}, workers=2)"
        peaks.append(peak(f"{run}; assert done.merged == {len(tensors) // 2} > 0 and done.report.total.changed > 0"))
        shutil.rmtree(out)
    assert all(used > torch_alone for used in peaks)
    assert max(peaks) - torch_alone <= BUDGET
    assert peaks[1] - peaks[0] < 32 << 20

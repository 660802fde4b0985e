"""Opening and inspecting sparse checkpoints of released size, against torch's own Hugging Face reader."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import HuggingFaceStorageReader

from benchmarks.measuring import keep
from fp8ckpt import inspect, open_checkpoint, sample
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes


def median(run: Callable[[], object], rounds: int = 5) -> float:
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def command(directory: Path) -> None:
    """What a user waits for."""
    subprocess.run([sys.executable, "-m", "fp8ckpt", "inspect", directory, "--quiet"], check=True)


def parse_json(directory: Path) -> None:
    """The least that any reader does: parse every header."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


def main() -> None:
    result = {}
    print("\nopening, files in the page cache (seconds, median of 5)")
    for name, sizes, files in (
        ("Mistral Medium 3.5 128B", Mistral3Sizes.true_shape(), 27),
        ("DeepSeek V3", DeepseekSizes.true_shape(), 163),
    ):
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
            source = sample(Path(work) / "fp8", sizes, files=files, sparse=True)
            stored = sum(len(header.spans) for header in open_checkpoint(source).files)
            logical = open_checkpoint(source).tensors
            theirs: dict[str, Any] = HuggingFaceStorageReader(str(source)).read_metadata().state_dict_metadata
            assert len(theirs) == stored
            assert all(tuple(theirs[name].size) == tensor.shape for name, tensor in logical.items())
            row = {
                "open_checkpoint": median(lambda source=source: open_checkpoint(source)),  # type: ignore[misc]
                "inspect, scales read": median(lambda source=source: inspect(source)),  # type: ignore[misc]
                "inspect, whole process": median(lambda source=source: command(source)),  # type: ignore[misc]
                "torch HuggingFaceStorageReader": median(
                    lambda source=source: HuggingFaceStorageReader(str(source)).read_metadata()  # type: ignore[misc]
                ),
                "json.loads of the headers alone": median(lambda source=source: parse_json(source)),  # type: ignore[misc]
            }
            result[name] = {"stored_tensors": stored, "files": files, "seconds": row}
            print(f"  {name}: {stored:,} stored tensors in {files} files")
            for what, seconds in row.items():
                print(f"    {what:<34} {seconds:6.3f}  {seconds / row['open_checkpoint']:5.2f} x open_checkpoint")
    keep("opening", {"checkpoints": result})


if __name__ == "__main__":
    main()

"""``python -m tests.campaign``: each kind of fault, as often as the arguments say; prints figures, and what went wrong;
and then every case of the tests of which `make test` runs a cover (tests/support.py).

Exit code 1 where anything was lost, silent, hung or without a name.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from fp8ckpt import convert, sample
from tests.campaign import flips, headers, kills, surroundings
from tests.campaign.trial import Count

Part = Callable[[Path], Count]


def parts(source: Path, plain: Path, sizes: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    """Each part of the campaign, with an empty folder to work in."""
    seed = sizes.seed
    yield "kills", lambda at: kills.kill(at, kills.jobs(source, plain), [source, plain], sizes.kills, seed)
    yield "joined", lambda at: kills.kill_joined(at, sizes.joined_kills, seed)
    yield "ranks", lambda at: kills.kill_ranks(at, source, plain, sizes.rank_kills, seed)
    yield "disks", lambda at: surroundings.fill_disks(at, source, plain, sizes.disks, seed)
    yield "state", lambda at: flips.flip_state(at, source, plain, sizes.flips, seed, sizes.stride)
    yield "scales", lambda at: flips.flip_scales(at, sizes.scale_bytes)
    yield "headers", lambda at: headers.mutate_headers(sizes.headers, seed)
    yield "hostile", lambda at: surroundings.be_hostile(at, source, sizes.directories, seed)
    yield "changes", lambda at: surroundings.change_sources(at, source, sizes.changes, seed)
    yield "permissions", lambda at: surroundings.lack_permissions(at, source, sizes.modes, seed)


def main() -> None:
    """Run it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    for name, size in {
        "kills": 1000, "joined-kills": 300, "rank-kills": 100, "disks": 200, "flips": 200, "stride": 1,
        "scale-bytes": 64, "headers": 1_000_000, "fuzz": 1_000_000, "directories": 200, "changes": 300,
        "modes": 200, "seed": 0,
    }.items():  # fmt: skip
        arguments.add_argument(f"--{name}", type=int, default=size, help=f"default: {size}")
    arguments.add_argument("--only", default="", help="names of parts, with commas between")
    sizes = arguments.parse_args()
    wrong = 0
    with TemporaryDirectory() as folder:
        source, plain = sample(Path(folder) / "fp8"), Path(folder) / "bf16"
        convert(source, plain)
        for name, part in parts(source, plain, sizes):
            if sizes.only and name not in sizes.only.split(","):
                continue
            at, begun = Path(folder) / name, time.monotonic()
            at.mkdir()
            count = part(at)
            print(f"{count}; {time.monotonic() - begun:.0f} s", flush=True)
            for line in count.wrong[:10]:
                print(f"    {line[:600]}", flush=True)
            wrong += len(count.wrong)
    if sizes.fuzz and (not sizes.only or "fuzz" in sizes.only.split(",")):
        if importlib.util.find_spec("atheris") is None:
            print("fuzzing: atheris is not installed (pip install '.[campaign]')")
        else:
            wrong += subprocess.run(
                [sys.executable, "-m", "tests.campaign.headers", str(sizes.fuzz)], check=False
            ).returncode
    if not sizes.only or "cases" in sizes.only.split(","):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "auto"], env={**os.environ, "FP8CKPT_TESTS": "all"}, check=False
        )
        wrong += done.returncode
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

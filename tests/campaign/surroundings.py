"""What is around a job: disks that fill up, hostile directories, sources that change, permissions that lack."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from fp8ckpt import convert, inspect, verify
from fp8ckpt.output.forecast import Room
from fp8ckpt.output.plan import OutputPlan
from tests.campaign.kills import cut_small, jobs, killed
from tests.campaign.trial import Count, apart, at_step, digests
from tests.stores.test_hostile import KINDS, READ, SIDE, put

NOBODY = 65534


@contextmanager
def _mounted(folder: Path, kind: str, image: Path) -> Iterator[bool]:
    """A file system of 4 MB at ``folder``; says whether one may be mounted here."""
    if kind == "tmpfs":
        commands = [["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]]
    else:
        image.write_bytes(bytes(4 << 20))
        commands = [
            ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)],
            ["mount", "-o", "loop", str(image), str(folder)],
        ]
    able = all(
        shutil.which(command[0]) and not subprocess.run(command, capture_output=True, check=False).returncode
        for command in commands
    )
    try:
        yield able
    finally:
        if able:
            subprocess.run(["umount", str(folder)], check=True)


def fill_disks(folder: Path, source: Path, plain: Path, disks: int, seed: int) -> Count:
    """A disk that fills up after there was room: a named error, and once there is room again, a run that ends well."""
    rng, count = random.Random(seed), Count("full disks")
    place, expected = folder / "disk", {}
    place.mkdir()
    for kind in ("tmpfs", "ext4 in a file"):
        with _mounted(place, kind, folder / "image") as able:
            if not able:
                count.what += f" ({kind} cannot be mounted here)"
                continue
            for _ in range(disks // 2):
                name, job = rng.choice(list(jobs(source, plain).items()))
                if name not in expected:
                    job(folder / "whole")
                    expected[name] = digests(folder / "whole")
                    shutil.rmtree(folder / "whole")
                left = rng.randrange(0, 1 << 20, 4096)
                disk = os.statvfs(place)
                (place / "other").write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - left)))
                outcome = apart(partial(_without_looking, job, place / "out"))
                trial = f"{name} on {kind} with {left} bytes"
                count.see(outcome, trial)
                count.faults += outcome.kind == "named"
                if outcome.kind == "named" and (place / "out").exists():
                    count.lost.append(trial)
                (place / "other").unlink()
                if not (place / "out").exists():
                    count.see(killed(job, place / "out", 0), f"{trial}, with room again")
                if not (place / "out").exists() or digests(place / "out") != expected[name]:
                    count.silent.append(trial)
                for path in place.iterdir():
                    if path.name != "lost+found":
                        shutil.rmtree(path)
    return count


def _without_looking(job: Callable[[Path], object], out: Path) -> None:
    """As if others had taken the room after it was looked for."""
    cut_small()
    OutputPlan._look = lambda *_: Room(out.parent, 0, None)  # type: ignore[method-assign,assignment]  # of this process
    job(out)


def be_hostile(folder: Path, source: Path, directories: int, seed: int) -> Count:
    """Directories in which one or two things are no files, or not where they seem to be."""
    rng, count = random.Random(seed), Count("hostile directories")
    for _ in range(directories):
        given = Path(shutil.copytree(source, folder / "a" / "fp8").parent) / "fp8"
        names = [rng.choice([*READ, *SIDE, *os.listdir(given)]) for _ in range(rng.choice((1, 2)))]
        made = [rng.choice(KINDS) for _ in names]
        for name, make in zip(names, made, strict=True):
            with suppress(FileExistsError):  # the second may need a name that the first has
                put(given, name, make)
        before = sorted(os.listdir(given))
        for job in (lambda: convert(given, folder / "out"), lambda: inspect(given), lambda: verify(given, given)):  # noqa: B023 - done at once
            outcome = apart(job)
            count.see(outcome, f"{names}, {[make.__name__ for make in made]}")
        count.faults += 1
        if any(path.is_symlink() for path in (folder / "out").rglob("*")):
            count.silent.append(str(names))
        if sorted(os.listdir(given)) != before:
            count.lost.append(str(names))
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return count


def change_sources(folder: Path, source: Path, changes: int, seed: int) -> Count:
    """A file that is read changes at some write of the output, its times as they were: never a mix."""
    rng, count = random.Random(seed), Count("changed sources")
    convert(source, folder / "whole")
    expected = digests(folder / "whole")
    shutil.rmtree(folder / "whole")
    for _ in range(changes):
        given = Path(shutil.copytree(source, folder / "fp8"))
        file = rng.choice([path for path in sorted(given.rglob("*")) if path.is_file()])
        how, step = rng.choice(("a byte", "longer", "shorter", "replaced", "gone")), rng.randrange(1, 40)
        outcome = apart(partial(_convert_while, given, folder / "out", partial(_change, file, how), step))
        trial = f"{file.name}, {how}, before write {step}"
        count.see(outcome, trial)
        count.faults += 1
        if outcome.kind == "done" and digests(folder / "out") != expected:
            count.silent.append(trial)
        if outcome.kind == "named" and (folder / "out").exists():
            count.lost.append(trial)
        for path in folder.iterdir():
            shutil.rmtree(path)
    return count


def _convert_while(source: Path, out: Path, change: Callable[[], object], step: int) -> None:
    cut_small()
    at_step(step, change, ("pwrite",))
    convert(source, out, workers=1)


def _change(file: Path, how: str) -> None:
    times, data = file.stat(), bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
        return
    if how == "replaced":
        file.unlink()
    if how == "shorter":
        del data[len(data) // 2 :]
    elif how == "longer":
        data.append(0)
    else:
        data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def lack_permissions(folder: Path, source: Path, modes: int, seed: int) -> Count:
    """Another user, and files and folders of any mode: a named error, or all of it."""
    rng, count = random.Random(seed), Count("permissions")
    if os.geteuid():
        count.what += " (only root can be another user)"
        return count
    convert(source, folder / "whole")
    expected = digests(folder / "whole")
    shutil.rmtree(folder / "whole")
    for path in (folder, *folder.parents):
        path.chmod(path.stat().st_mode | 0o005)
    for _ in range(modes):
        given = Path(shutil.copytree(source, folder / "fp8"))
        (folder / "to").mkdir(mode=0o777)
        (folder / "to").chmod(rng.choice((0o777, 0o777, 0o555, 0o333)))
        at = rng.choice([given, *given.rglob("*")])
        mode = rng.choice((0, 0o111, 0o222, 0o333, 0o444, 0o555, 0o666))
        at.chmod(mode)
        outcome = apart(partial(_as_nobody, partial(convert, given, folder / "to" / "out")))
        trial = f"{at.name}, {mode:o}, into {(folder / 'to').stat().st_mode & 0o777:o}"
        count.see(outcome, trial)
        count.faults += 1
        if outcome.kind == "done" and digests(folder / "to" / "out") != expected:
            count.silent.append(trial)
        if outcome.kind == "named" and (folder / "to" / "out").exists():
            count.lost.append(trial)
        for path in folder.iterdir():
            shutil.rmtree(path)
    return count


def _as_nobody(job: Callable[[], object]) -> object:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    return job()

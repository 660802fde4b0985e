"""The wheel: complete, no more than that, and at work in an environment that has its declared dependencies alone."""

from __future__ import annotations

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fp8ckpt

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy of the tree, which keeps the tree itself clean."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    out = tmp_path_factory.mktemp("wheel")
    command = "wheel --no-build-isolation --no-deps --no-index --quiet --disable-pip-version-check --wheel-dir"
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command.split(), str(out), str(tree)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def test_the_wheel_is_complete(wheel: Path) -> None:
    """Every module of the source, the marker of types and the licence; no test, no cache, nothing else."""
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    package = {name for name in names if name.startswith("fp8ckpt/")}
    source = ROOT / "src"
    kept = (path for path in (source / "fp8ckpt").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert package == {path.relative_to(source).as_posix() for path in kept}
    assert "fp8ckpt/py.typed" in package
    info = f"fp8ckpt-{fp8ckpt.__version__}.dist-info"
    listed = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    assert names - package == {f"{info}/{name}" for name in listed}


def test_metadata(wheel: Path) -> None:
    """The version is the package's, the licence has its name, and the description is the README."""
    with zipfile.ZipFile(wheel) as file:
        found = email.message_from_bytes(file.read(f"fp8ckpt-{fp8ckpt.__version__}.dist-info/METADATA"))
    assert (found["Version"], found["License-Expression"]) == (fp8ckpt.__version__, "Apache-2.0")
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    assert "fp8" in found["Keywords"].split(",")
    assert str(found.get_payload()).strip() == (ROOT / "README.md").read_text().strip()


def requirements(name: str) -> list[str]:
    """What a distribution needs always, extras apart."""
    found = importlib.metadata.requires(name) or []
    return [match.group() for line in found if "extra ==" not in line and (match := re.match(r"[\w.-]+", line))]


def closure(names: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """The installed distributions of these names, and all that they need here."""
    seen: set[str] = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            yield importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # needed on other systems
            continue
        names += requirements(name)


def declared(wheel: Path) -> list[str]:
    """The names of the dependencies that the wheel declares, extras apart."""
    with zipfile.ZipFile(wheel) as file:
        found = email.message_from_bytes(file.read(f"fp8ckpt-{fp8ckpt.__version__}.dist-info/METADATA"))
    lines = found.get_all("Requires-Dist", [])
    return [match.group() for line in lines if "extra ==" not in line and (match := re.match(r"[\w.-]+", line))]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an empty environment with the wheel in it, which sees links to the declared dependencies alone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", symlinks=True)
    packages = folder / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for distribution in closure(declared(wheel)):
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            link = packages / top
            if not link.exists() and top != "__pycache__":
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    command = "install --no-deps --no-index --quiet --disable-pip-version-check"
    python = folder / "venv" / "bin" / "python"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), *command.split(), str(wheel)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder / "venv" / "bin"


def test_the_wheel_works_alone(environment: Path, tmp_path: Path) -> None:
    """Each command runs, there and back, with what the wheel declares; and it is the wheel's own code that runs."""

    def run(*command: str) -> str:
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        done = subprocess.run(
            [str(environment / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=env,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("fp8ckpt", "--version") == f"fp8ckpt {fp8ckpt.__version__}\n"
    run("fp8ckpt", "sample", "fp8")
    file, _, printed = run("python", "-c", WORK).partition("\n")
    assert Path(file).is_relative_to(environment.parent)
    inspected, _, verified, _, again, read = printed.split("----")
    assert "defects: none" in inspected
    assert "the same" in verified
    assert "the same" in again
    assert "bfloat16" in read


# The other commands one after the other, in a process that imports torch once.
WORK = """
import sys
from importlib.util import find_spec
import fp8ckpt
from fp8ckpt.cli import main
print(fp8ckpt.__file__)
assert find_spec("pytest") is find_spec("transformers") is None
for command in (
    "inspect fp8",
    "convert fp8 bf16 --to bf16",
    "verify fp8 bf16",
    "convert bf16 back --to fp8 --like fp8",
    "verify fp8 back",
):
    sys.argv = ["fp8ckpt", *command.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    print("----")
print(fp8ckpt.open_checkpoint("fp8").read("lm_head.weight"))
"""


def test_the_licence_is_the_one_that_the_metadata_names() -> None:
    """Apache's second, whole."""
    text = (ROOT / "LICENSE").read_text()
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", text)
    assert "9. Accepting Warranty or Additional Liability" in text

"""The documentation is executed: README's blocks and the examples in the help texts."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from fp8ckpt.cli import app
from tests.adapters import PREFIX, factors, write_adapter
from tests.conftest import Run
from tests.distributed import Launched

ROOT = Path(__file__).parent.parent
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]  # a group, since the app has several commands


@pytest.mark.parametrize("page", ["README.md", "docs/fine-tuning.md", "docs/merging.md", "docs/coming-from.md"])
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bash and python block of the page runs, in order, in one directory."""
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert {language for language, _ in blocks} == {"bash", "python"}
    monkeypatch.setenv("FP8CKPT", str(ROOT))
    monkeypatch.chdir(tmp_path)
    for number, (language, code) in enumerate(blocks):
        for i, line in enumerate(code.splitlines() if language == "bash" else [code]):
            run_line(language, line, tmp_path / f"block-{number}-{i}")


def run_line(language: str, line: str, folder: Path) -> None:
    """A line of bash, or a block of Python. Our command and Python run in a process that has imported torch, and so do
    torchrun's ranks: torchrun itself is started by test_torchrun.py.
    """
    command: list[object] = []
    ranks, fails = None, False
    if language == "python":
        folder.with_suffix(".py").write_text(line)
        command = [folder.with_suffix(".py")]
    else:
        words = shlex.split(os.path.expandvars(line), comments=True)
        fails = words[-2:] == ["||", "true"]
        match words[: -2 if fails else None]:
            case ["fp8ckpt", *rest]:
                command = ["-m", "fp8ckpt", *rest]
            case ["python", *rest]:
                command = [*rest]
            case ["torchrun", "--standalone", "--nproc-per-node", count, *rest]:
                ranks, command = int(count), [*rest]
            case _:
                path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
                done = subprocess.run(
                    ["bash", "-euc", line], capture_output=True, text=True, env={**os.environ, "PATH": path},
                    timeout=240,
                )  # fmt: skip
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
                return
    code, stdout, stderr = Launched(folder, ranks, *command).ended()
    assert code == int(fails), f"{line}\n{stdout}\n{stderr}"


def test_make_targets_of_the_readme_are_run_by_ci() -> None:
    """The README's make commands exist, and CI runs each of them."""
    named = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named == {"demo", "test"}
    ci = (ROOT / ".ci/run").read_text()
    for target in named:
        assert re.search(rf"^make .*\b{target}$", ci, re.MULTILINE)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_readme_names_every_command() -> None:
    """No command is undocumented."""
    readme = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert f"`{name} " in readme


def test_help_examples_run(tmp_path: Path, cli: Run) -> None:
    """Each command's help ends in an example, and the examples work one after the other."""
    module, shape = "model.language_model.layers.0.self_attn.q_proj", (128, 128)
    write_adapter(tmp_path / "sample-lora", factors(PREFIX + module, cols=shape[1], rows=shape[0]))
    for name in ("sample", "inspect", "convert", "verify", "plan", "merge", "report"):
        text = cli(name, "--help").stdout.strip().splitlines()[-1]
        program, *arguments = shlex.split(text.strip().removeprefix("Example: "))
        assert program == "fp8ckpt"
        done = cli(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert set(COMMANDS) == {"sample", "inspect", "convert", "verify", "plan", "merge", "report"}

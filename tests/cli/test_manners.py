"""What anyone expects of a command: spelling, help, quiet, colour, names of every kind, one voice under torchrun."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Run
from tests.distributed import Launched
from tests.oracle import read_directory

from fp8ckpt import __version__, inspect
from fp8ckpt.errors import CheckpointNotFoundError

COMMANDS = ("inspect", "convert", "merge", "verify", "plan", "report", "sample")


def on_a_terminal(*arguments: object, **env: str) -> tuple[int, str]:
    """The command with a terminal for its output and errors: exit code, and what is seen."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    child = subprocess.Popen(
        [sys.executable, "-m", "fp8ckpt", *map(str, arguments)],
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm", "COLUMNS": "160", **env},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    return child.wait(60), seen.decode()


def test_version(cli: Run) -> None:
    """The version is one and the same everywhere."""
    for option in ("--version", "-V"):
        done = cli(option)
        assert (done.returncode, done.stdout) == (0, f"fp8ckpt {__version__}\n")


def test_case_does_not_matter(sample_fp8: Path, cli: Run) -> None:
    """Of commands and options, as of the values of options; what is given as a path or a pattern is left alone."""
    done = cli("Inspect", "--TENSOR", "LAYERS.0", sample_fp8)
    assert (done.returncode, "no tensor has a name like 'LAYERS.0'" in done.stderr) == (1, True)


def test_help_says_each_command_in_a_line(cli: Run) -> None:
    """None is cut off."""
    lines = cli("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert len(lines) >= len(COMMANDS)
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_short_help(command: tuple[str, ...], cli: Run) -> None:
    """-h is --help."""
    assert cli(*command, "-h").stdout == cli(*command, "--help").stdout != ""


@pytest.mark.parametrize(("given", "meant"), [
    ("BF16", "bf16"),
    ("bfloat16", "bf16"),
    ("torch.bfloat16", "bf16"),
    ("Float16", "fp16"),
    ("half", "fp16"),
    ("FLOAT32", "fp32"),
    ("f32", "fp32"),
])  # fmt: skip
def test_dtypes_by_their_usual_names(given: str, meant: str, sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """Any case, and the names that torch, safetensors and people use."""
    done = cli("convert", sample_fp8, tmp_path / "out", "--to", given, "--json")
    assert json.loads(done.stdout)["to"] == meant


def test_the_way_back_by_other_names(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """--to float8_e4m3fn --scheme Per_Tensor is --to fp8 --scheme per-tensor."""
    assert cli("convert", sample_fp8, tmp_path / "bf16", "-q").returncode == 0
    for to, scheme, out in (("float8_e4m3fn", "Per_Tensor", "a"), ("fp8", "per-tensor", "b")):
        assert cli("convert", tmp_path / "bf16", tmp_path / out, "--to", to, "--scheme", scheme).returncode == 0
    assert read_directory(tmp_path / "a") == read_directory(tmp_path / "b")


@pytest.mark.parametrize(("arguments", "hint"), [
    (("inspekt", "x"), "Did you mean 'inspect'?"),
    (("convert", "a", "b", "--wokers", "2"), "--workers"),
    (("convert", "a", "b", "--to", "bf15"), "did you mean bf16? expected one of bf16, fp16, fp32, fp8"),
    (("convert", "a", "b", "--to", "int4"), "expected one of bf16, fp16, fp32, fp8"),
    (("convert", "a", "b", "--to", "fp8", "--scheme", "blok"), "did you mean block?"),
    (("sample", "a", "--layout", "nestd"), "did you mean nested?"),
])  # fmt: skip
def test_did_you_mean(arguments: tuple[str, ...], hint: str, cli: Run, tmp_path: Path) -> None:
    """A slip is answered by what was probably meant, as wrong usage, and nothing is made."""
    done = cli(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert hint in done.stderr
    assert os.listdir(tmp_path) == []


def test_quiet(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """Success prints nothing, on a terminal either; errors are printed, and the exit code is the same."""
    for arguments in (
        ("inspect", sample_fp8),
        ("convert", sample_fp8, tmp_path / "out"),
        ("verify", sample_fp8, tmp_path / "out"),
        ("sample", tmp_path / "sample"),
    ):
        done = cli(*arguments, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert on_a_terminal("convert", sample_fp8, tmp_path / "out2", "-q") == (0, "")
    (tmp_path / "out" / "config.json").write_text("{}")
    done = cli("verify", sample_fp8, tmp_path / "out", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    done = cli("convert", sample_fp8, tmp_path / "out", "-q")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)


def test_colour_on_a_terminal_and_nowhere_else(sample_fp8: Path, cli: Run) -> None:
    """Results are coloured where they are seen; NO_COLOR and a dumb terminal mean none."""
    assert on_a_terminal("inspect", sample_fp8)[1].count("\033[") > 0
    plain = cli("inspect", sample_fp8).stdout
    assert "\033" not in plain
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert on_a_terminal("inspect", sample_fp8, **env) == (0, plain.replace("\n", "\r\n"))
    assert "\033[31mfp8ckpt:\033[0m" in on_a_terminal("inspect", "/nowhere")[1]


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_a_bar_on_a_terminal(command: str, sample_fp8: Path, tmp_path: Path) -> None:
    """It shows what is done, of how much, how fast, how long yet, and the file; and is gone in the end."""
    arguments = [sample_fp8, tmp_path / "out"] if command == "convert" else [sample_fp8]
    code, seen = on_a_terminal(command, *arguments, NO_COLOR="1")
    assert code == 0
    assert f"{command.removesuffix('y').removesuffix('f')}" in seen
    assert "MB" in seen
    assert ("writing model-0000" if command == "convert" else "reading model-0000") in seen


@pytest.mark.parametrize("folder", ["größe 尺寸", "a; b'c\"d$HOME -e"])
def test_paths_of_every_kind(folder: str, sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """Spaces, letters of any script, and what a shell would take apart: they are taken and printed as they are."""
    base = tmp_path / folder
    source = Path(shutil.copytree(sample_fp8, base / "fp8"))
    for env in ({}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        done = cli("inspect", source, env=env)
        assert (done.returncode, done.stderr) == (0, "")
    done = cli("convert", source, base / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{base / 'out'}: ")
    back = cli("convert", base / "out", base / "back", "--to", "fp8", "--like", source, "--json")
    assert json.loads(back.stdout)["destination"] == str(base / "back")
    assert read_directory(base / "back") == read_directory(source)


def test_a_path_that_is_no_text(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """A name of bytes that are no UTF-8 is printed escaped, and the work is done."""
    out = Path(os.fsdecode(bytes(tmp_path) + b"/out-\xff"))
    done = cli("convert", sample_fp8, out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/out-\\udcff: ")
    assert out.is_dir()


def test_one_of_several_files_is_no_checkpoint(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """It is not called defective: the message says what it is, and what to open."""
    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    part = source / "model-00002-of-00003.safetensors"
    expected = f"{part.name}: this is 1 of 3 files of a checkpoint; open the directory: {source}"
    for command in (("inspect", part), ("verify", part), ("convert", part, tmp_path / "out")):
        done = cli(*command)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"fp8ckpt: {expected}\n")
    (source / "model.safetensors.index.json").unlink()  # the name says it, too
    with pytest.raises(CheckpointNotFoundError, match="this is 1 of 3 files"):
        inspect(part)


def test_one_of_several_files_by_the_index_alone(sample_fp8: Path, tmp_path: Path) -> None:
    """Names that do not count their parts: the index says how many there are."""
    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    index = source / "model.safetensors.index.json"
    text = index.read_text()
    for i in (1, 2, 3):
        (source / f"model-0000{i}-of-00003.safetensors").rename(source / f"part{i}.safetensors")
        text = text.replace(f"model-0000{i}-of-00003", f"part{i}")
    index.write_text(text)
    assert inspect(source).defects == ()
    with pytest.raises(CheckpointNotFoundError, match="this is 1 of 3 files"):
        inspect(source / "part1.safetensors")
    for name in ("config.json", "model.safetensors.index.json"):
        with pytest.raises(CheckpointNotFoundError, match="this file holds no weights"):
            inspect(source / name)


@pytest.mark.parametrize("command", [("inspect",), ("verify",), ("inspect", "--json"), ("verify", "--json")])
def test_the_first_rank_speaks_for_all(command: tuple[str, ...], sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """Under torchrun every rank does it, and one prints."""
    alone = cli(*command, sample_fp8)
    assert Launched(tmp_path / "ranks", 2, "-m", "fp8ckpt", *command, sample_fp8).ended() == (0, alone.stdout, "")
    assert alone.stdout != ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, cli: Run) -> None:
    """The shell is told of commands, options, and the values of options."""
    complete = {"_FP8CKPT_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    for line, expected in (
        ("fp8ckpt ver", "verify"),
        ("fp8ckpt convert --wor", "--workers"),
        ("fp8ckpt convert a b --to f", "fp32"),
    ):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_TYPER_COMPLETE_ARGS": line}
        done = subprocess.run(
            [str(Path(sys.executable).with_name("fp8ckpt"))], env={**os.environ, **complete, **words},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert expected in done.stdout, done.stderr

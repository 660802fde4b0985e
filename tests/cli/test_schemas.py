"""What ``--json`` prints is what docs/schemas says, field by field, and every field is explained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.adapters import PREFIX, factors, write_adapter
from tests.conftest import Run
from typer.main import get_command

from fp8ckpt import open_checkpoint
from fp8ckpt.cli import app

SCHEMAS = Path(__file__).parent.parent.parent / "docs" / "schemas"
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]  # a group, since the app has several commands


def schema(command: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / f"{command}.json").read_text())
    return found


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """All parts of a schema that describe an object of named fields."""
    if isinstance(node, dict):
        if "properties" in node:
            yield node
        for part in node.values():
            yield from objects(part)
    elif isinstance(node, list):
        for part in node:
            yield from objects(part)


def test_every_command_has_a_schema() -> None:
    """And there is none of a command that is no more; one is of refusals."""
    assert sorted(file.stem for file in SCHEMAS.glob("*.json")) == sorted([*COMMANDS, "error"])


@pytest.mark.parametrize("command", [*COMMANDS, "error"])
def test_every_field_is_explained(command: str) -> None:
    """In a sentence, or by the definition that it refers to; and every field is always there."""
    Draft202012Validator.check_schema(schema(command))
    for node in objects(schema(command)):
        assert node["required"] == list(node["properties"])
        for name, field in node["properties"].items():
            assert "$ref" in field or field["description"].endswith("."), name


def test_what_is_printed_is_what_the_schema_says(
    sample_fp8: Path, sample_block: Path, tmp_path: Path, cli: Run
) -> None:
    """Of sound checkpoints and of defective ones, with reports and without: no field is missing or unknown."""
    broken = Path(shutil.copytree(sample_fp8, tmp_path / "broken"))
    (broken / "model-00003-of-00003.safetensors").unlink()
    bf16, back = tmp_path / "bf16", tmp_path / "back"
    module = "model.language_model.layers.0.self_attn.q_proj"
    rows, cols = open_checkpoint(sample_fp8)[f"{module}.weight"].shape
    adapter = write_adapter(tmp_path / "adapter", factors(PREFIX + module, cols=cols, rows=rows))
    runs: list[tuple[Any, ...]] = [
        ("sample", tmp_path / "sample", "--plan"),
        ("sample", tmp_path / "sample"),
        ("inspect", sample_fp8),
        ("inspect", sample_block, "--tensor", "proj"),
        ("inspect", broken),
        ("convert", sample_fp8, bf16, "--plan"),
        ("convert", sample_fp8, bf16, "--report-html", tmp_path / "page.html"),
        ("convert", bf16, back, "--to", "fp8", "--like", sample_fp8),
        ("convert", bf16, tmp_path / "scheme", "--to", "fp8", "--scheme", "block"),
        ("merge", sample_fp8, adapter, tmp_path / "merged", "--plan"),
        ("merge", sample_fp8, adapter, tmp_path / "merged"),
        ("merge", sample_fp8, f"{adapter}=0.5", tmp_path / "plain", "--to", "bf16", "--adapter", f"{adapter}=-1"),
        ("verify", sample_fp8, "--serving"),
        ("verify", sample_fp8, bf16),
        ("verify", sample_fp8, sample_block),
        ("verify", broken),
        ("plan", sample_fp8, "--ranks", 4, "--tp", 2),
        ("report", sample_fp8, "-o", tmp_path / "one.html"),
        ("report", sample_fp8, bf16, "-o", tmp_path / "two.html"),
    ]
    for command, *arguments in runs:
        printed = cli(command, *arguments, "--json")
        errors = Draft202012Validator(schema(command)).iter_errors(json.loads(printed.stdout))
        assert [f"{error.json_path}: {error.message}" for error in errors] == []
    assert {command for command, *_ in runs} == set(COMMANDS)


@pytest.mark.parametrize(("command", "paths"), [("inspect", ["none"]), ("convert", ["", ""]), ("sample", [""])])
def test_a_refusal_is_json_too(command: str, paths: list[str], sample_fp8: Path, cli: Run) -> None:
    """On stdout, with the facts apart; what stderr says does not change."""
    arguments = [sample_fp8 / path for path in paths]
    said, printed = cli(command, *arguments), cli(command, *arguments, "--json")
    assert (printed.returncode, printed.stderr) == (1, said.stderr)
    found = json.loads(printed.stdout)
    Draft202012Validator(schema("error")).validate(found)
    assert found["error"]["message"] in said.stderr

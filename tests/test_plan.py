"""What a cluster's ranks will hold and read: torch's own arithmetic, and nothing lost or read twice unsaid.

tests/checkpoint/test_rehearsal.py holds the same against real DTensors of real models.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt import open_checkpoint, plan
from fp8ckpt.plan import part_of
from fp8ckpt.ranks import BEYOND
from tests.conftest import Run
from tests.miniatures import families
from tests.oracle import Stored, write_safetensors

FAMILIES = families()
MESHES = [
    {"ranks": 1},
    {"ranks": 2, "tp": 2},
    {"ranks": 2, "pp": 2},
    {"ranks": 12, "tp": 2, "pp": 2},
    {"ranks": 30, "tp": 3, "pp": 2},  # nothing divides, and some ranks have nothing of much
    {"ranks": 999},
]


@given(st.integers(0, 40), st.integers(1, 12))
def test_parts_are_those_of_torch(size: int, parts: int) -> None:
    """Where there are fewer than ranks, the last ranks have nothing."""
    chunks = [len(chunk) for chunk in torch.empty(size).chunk(parts)] if size else []
    assert [part_of(size, parts, i) for i in range(parts)] == [*chunks, *[0] * (parts - len(chunks))]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model", ["sample_fp8", "sample_block"])
def test_reads_add_up_to_the_files(mesh: dict[str, int], model: str, request: pytest.FixtureRequest) -> None:
    """All ranks together read every byte, and what several hold whole once each; held is what bfloat16 takes."""
    path = request.getfixturevalue(model)
    checkpoint, found = open_checkpoint(path), plan(path, **mesh)
    data = sum(tensor.span.nbytes for tensor in checkpoint.tensors.values())
    held = sum(
        2 * tensor.numel if tensor.scaled is not None else tensor.span.nbytes for tensor in checkpoint.tensors.values()
    )
    assert [rank.rank for rank in found.ranks] == list(range(mesh["ranks"]))
    assert found.stored == data == sum(kind.bytes for kind in found.kinds)
    assert found.read == sum(rank.read for rank in found.ranks) == data + found.again
    assert found.again == 0 or mesh.get("tp", 1) > 1
    assert all(rank.peak == rank.held + BEYOND for rank in found.ranks)
    if mesh.get("tp", 1) == 1:
        assert sum(rank.held for rank in found.ranks) == held


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    """Two ranks that share out all share it out whole."""
    path = FAMILIES[name].write(tmp_path / "model")
    found = plan(path, ranks=2)
    assert found.read == found.stored == sum(t.span.nbytes for t in open_checkpoint(path).tensors.values())


def test_experts(sample_block: Path) -> None:
    """Each rank of a stage has its experts whole, and the ranks beyond share out what those have."""
    checkpoint = open_checkpoint(sample_block)
    experts = {name: t for name, t in checkpoint.tensors.items() if ".experts." in name}
    stacks: dict[str, int] = {}
    for name in experts:
        stacks[name.partition(".experts.")[0]] = stacks.get(name.partition(".experts.")[0], 0) + 1
    count = stacks.popitem()[1] // 3
    alone, shared = plan(sample_block, ranks=4, tp=2), plan(sample_block, ranks=4, tp=2, ep=2)
    assert [(rank.dp, rank.tp, rank.ep) for rank in shared.ranks] == [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]
    assert alone.read == shared.read
    expected = [0] * 4
    for name, tensor in experts.items():
        number = int(name.partition(".experts.")[2].partition(".")[0])
        for rank in range(4):
            mine = torch.arange(count).chunk(2)[rank % 2].chunk(2)
            expected[rank] += tensor.numel if rank // 2 < len(mine) and number in mine[rank // 2] else 0
    others = plan_without(sample_block, experts, ranks=4, tp=2)
    assert [rank.read - other for rank, other in zip(shared.ranks, others, strict=True)] == expected


def plan_without(path: Path, names: Any, **mesh: int) -> list[int]:
    """What each rank reads of a checkpoint that lacks some tensors."""
    checkpoint = open_checkpoint(path)
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in names}
    kept = type(checkpoint)(**{**vars(checkpoint), "tensors": rest})
    return [rank.read for rank in plan(kept, **mesh).ranks]


def model(path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> Path:
    """A model of zeros in bfloat16."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    tensors = {name: Stored("BF16", shape, bytes(2 * prod(shape))) for name, shape in shapes.items()}
    write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    return path


SHAPES = {
    "model.embed_tokens.weight": (6, 4),
    **{f"model.layers.{i}.mlp.up_proj.weight": (5, 4) for i in range(3)},
    "model.norm.weight": (4,),
}


def test_a_tied_head_is_read_on_both_ends(tmp_path: Path) -> None:
    """The last stage needs the embeddings, too; untied, it does not."""
    for tied, more in ((True, 48), (False, 0)):
        path = model(tmp_path / f"{tied}", SHAPES, {"tie_word_embeddings": tied})
        found = plan(path, ranks=2, pp=2)
        assert [rank.read for rank in found.ranks] == [48 + 40, 80 + 8 + more]
        assert found.again == more
        assert plan(path, ranks=1).again == 0


def test_what_models_have_no_place_for_is_left_out(tmp_path: Path) -> None:
    """Layers of multi-token prediction are no layers of a stage, and are read by nobody."""
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    found = plan(model(tmp_path / "mtp", SHAPES, config), ranks=2, pp=2)
    assert found.left_out == ("model.layers.2.mlp.up_proj.weight",)
    assert (found.left, found.read) == (40, found.stored - 40)
    assert [rank.tensors for rank in found.ranks] == [2, 2]


@pytest.mark.parametrize(("mesh", "message"), [
    ({"ranks": 0}, "ranks is 0"),
    ({"ranks": 4, "tp": -1}, "tp is -1"),
    ({"ranks": 10**20}, "expected at most 131072"),
    ({"ranks": 6, "tp": 4}, "6 ranks are no multiple of tp \\* pp = 4"),
    ({"ranks": 4, "pp": 4}, "pp is 4, and the model has 2 layers"),
    ({"ranks": 4, "pp": 2, "ep": 4}, "a divisor of the 2 ranks of a stage"),
    ({"ranks": 4, "ep": 4}, "the model has no experts"),
])  # fmt: skip
def test_sizes_that_do_not_go_together(mesh: dict[str, int], message: str, sample_fp8: Path) -> None:
    """Each is named."""
    with pytest.raises(ValueError, match=message):
        plan(sample_fp8, **mesh)


def test_command_line(sample_fp8: Path, cli: Run) -> None:
    """Ranks that are alike are a line; the rule is said; wrong sizes are wrong usage."""
    done = cli("plan", sample_fp8, "--ranks", 4, "--tp", 2, "--pp", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 stages x 1 data-parallel x 2 tensor-parallel" in done.stdout
    assert " lm_head  " in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines if line[1:2] == ["to"]] == [["0", "to", "1"], ["2", "to", "3"]]
    assert cli("plan", sample_fp8, "--ranks", 3, "--tp", 2).returncode == 2

"""Every family of the matrix is loaded bit for bit and saved byte for byte, however its experts are stacked and its
shards are cut.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from fp8ckpt import convert, load_pretrained, open_checkpoint, save_model
from fp8ckpt.convert import Fp8Result
from tests.distributed import assert_same, mesh, run, whole
from tests.families.releases import RELEASES
from tests.oracle import read_directory, tree
from tests.support import ALL, each

PROMPT = torch.arange(3, 11)[None]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every release."""
    root = tmp_path_factory.mktemp("releases")
    for name, release in RELEASES.items():
        release.write(root / name)
    return root


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


def assert_loaded(model: nn.Module, name: str, path: Path) -> None:
    """Every tensor of the state dict is what the release holds, stacked by hand."""
    state = model.state_dict()
    expected = RELEASES[name].expected(open_checkpoint(path).read)
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert_same(whole(tensor), expected[key], (name, key))


def assert_released(directory: Path, name: str, path: Path) -> None:
    """It is the release, file for file, but for what transformers' model has rounded."""
    rounded = RELEASES[name].rounded
    found, before = read_directory(directory), read_directory(path)
    differ = {key for key, value in before.items() if found[key] != value}
    assert all(key.endswith((*rounded, "correction_bias")) for key in differ)
    assert bool(differ) == bool(rounded)
    if not differ:
        assert tree(directory) == tree(path)


@pytest.mark.parametrize("name", RELEASES)
def test_load_pretrained_gives_what_transformers_gives(
    name: str, released: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Parameters, buffers, dtypes and logits are those of ``from_pretrained`` of the converted BF16; what is carried is
    listed. And what transformers saves of that is the release again, once it is converted back.
    """
    release = RELEASES[name]
    with caplog.at_level(logging.INFO, "fp8ckpt"):
        model = load_pretrained(released / name)
    said = [record.getMessage() for record in caplog.records]
    assert any("that the model does not have" in line and "eh_proj" in line for line in said) == (
        release.mtp is not None
    )
    assert any("rounded" in line for line in said) == bool(release.rounded)
    assert_loaded(model, name, released / name)
    found = logits(model)
    assert torch.isfinite(found).all()
    assert found.float().std() > 0.05
    convert(released / name, tmp_path / "bf16", layout="file" if release.understood else "model")
    theirs = getattr(transformers, release.model).from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    for key, tensor in theirs.state_dict().items():
        assert_same(model.state_dict()[key], tensor, key)
    for key, buffer in theirs.named_buffers():
        assert_same(dict(model.named_buffers())[key], buffer, key)
    assert_same(found, logits(theirs))
    theirs.save_pretrained(tmp_path / "saved")
    result = convert(tmp_path / "saved", tmp_path / "back", to="fp8", like=released / name)
    assert isinstance(result, Fp8Result)
    assert any("carried from the base" in note for note in result.notes) == (release.mtp is not None)
    assert any("fewer bits" in note for note in result.notes) == bool(release.rounded)
    assert any("differently in the source" in note for note in result.notes) != release.understood
    assert_released(tmp_path / "back", name, released / name)


@pytest.mark.parametrize("name", RELEASES)
def test_save_model_gives_the_release_back(
    name: str, released: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As FP8 it is the release, as BF16 what convert makes of it: file for file, MTP layers carried and listed."""
    release, path = RELEASES[name], released / name
    model = load_pretrained(path)
    caplog.clear()
    with caplog.at_level(logging.INFO, "fp8ckpt"):
        done = save_model(model, tmp_path / "fp8", to="fp8", like=path)
    assert isinstance(done, Fp8Result)
    assert done.report is not None
    assert any("eh_proj" in key for key in done.report.carried) == (release.mtp is not None)
    assert any("carried" in note for note in done.notes) == bool(done.report.carried)
    said = [record.getMessage() for record in caplog.records]
    assert any("are carried from" in line and "eh_proj" in line for line in said) == (release.mtp is not None)
    assert any("fewer bits" in line for line in said) == bool(release.rounded)
    assert_released(tmp_path / "fp8", name, path)
    if not release.rounded:
        convert(path, tmp_path / "plain")
        save_model(model, tmp_path / "bf16", like=path)
        assert tree(tmp_path / "bf16") == tree(tmp_path / "plain")


# ---------------------------------------------------------------- sharded


def _distribute(
    model: nn.Module, over: DeviceMesh, choose: Callable[[str, nn.Parameter], list[Placement] | None]
) -> None:
    """Make DTensors of the parameters for which placements are chosen; the others stay whole on every rank."""
    for prefix, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if (placements := choose(f"{prefix}.{key}", parameter)) is not None:
                sharded = distribute_tensor(parameter, over, placements, src_data_rank=None)
                setattr(module, key, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def _fsdp(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if re.search(r"(layers|blocks)\.\d+$", name):
            fully_shard(module, mesh=mesh())
    fully_shard(model, mesh=mesh())


def _experts(model: nn.Module) -> None:
    """Expert parallelism: each rank holds some of the stacked experts, and the rest whole."""
    _distribute(model, mesh(), lambda _, p: [Shard(0)] if p.ndim == 3 else None)


def _experts_and_fsdp(model: nn.Module) -> None:
    """Experts on one dimension of a mesh, and everything sharded by FSDP2 over the other."""
    over = mesh(1, 2, names=("ep", "dp"))
    _distribute(model, over["ep"], lambda _, p: [Shard(0)] if p.ndim == 3 else None)
    for name, module in model.named_modules():
        if re.search(r"(layers|blocks)\.\d+$", name):
            fully_shard(next(m for m in module.modules() if not list(m.children())), mesh=over["dp"])


def _cut(model: nn.Module) -> None:
    """Each matrix by its last dimension but one or two: gate from up, inside blocks, unevenly."""
    _distribute(model, mesh(), lambda _, p: [Shard(1)] if p.ndim > 1 else [Shard(0)])


def _strided(model: nn.Module) -> None:
    """Each rank holds a part of the gate and the like part of the up projection: two boxes, not one."""
    _distribute(model, mesh(), lambda name, p: [_StridedShard(p.ndim - 2, split_factor=2)] if p.ndim > 1 else None)


def _mixed(model: nn.Module) -> None:
    """A mesh of two dimensions, replicated over one, the other strided, with more shards than rows for some."""
    over = mesh(2, 1)
    _distribute(model, over, lambda name, p: [_StridedShard(p.ndim - 1, split_factor=3), Replicate()])


SHARDINGS = {f.__name__: f for f in (_fsdp, _experts, _experts_and_fsdp, _cut, _strided, _mixed)}


def _there_and_back(root: Path, out: Path, name: str, sharding: str) -> None:
    model = load_pretrained(root / name, parallelize=SHARDINGS[sharding])
    assert_loaded(model, name, root / name)
    save_model(model, out, to="fp8", like=root / name)
    if not RELEASES[name].rounded:
        assert tree(out) == tree(root / name)


def _all_there_and_back(root: Path, out: Path, cases: list[tuple[str, str]]) -> None:
    for name, sharding in cases:
        try:
            _there_and_back(root, out / f"{name}{sharding}", name, sharding)
        except Exception as error:
            raise AssertionError(f"{name}, {sharding}: {error!r}") from error


@pytest.mark.parametrize("half", [0, 1])
def test_there_and_back_however_it_is_sharded(half: int, released: Path, tmp_path: Path) -> None:
    """Two ranks, every family: FSDP2, experts, both, shards that cut projections and blocks, strided ones. Loaded it
    has the release's bits, saved as FP8 it is the release. A family has one of the shardings, a stacked one two
    of them.
    """
    of_all = [sharding for sharding in SHARDINGS if "experts" not in sharding]
    of_experts = {name: release.experts or "4" in name for name, release in RELEASES.items()}
    cases = each([name for name in RELEASES if not of_experts[name]], of_all)
    stacked = [name for name in RELEASES if of_experts[name]]
    cases += [case for i, case in enumerate(product(stacked, SHARDINGS)) if ALL or (i + i // len(SHARDINGS)) % 3 == 0]
    run(2, _all_there_and_back, released, tmp_path, cases[half::2])

"""Experts as the hosts stack them, through an adapter that says what each stack is made of.

torchtitan has three stacks, as they lie on disk; NeMo AutoModel has two, gate beside up and all transposed. Both are
sharded as the host does it, loaded, and saved as the release itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.experts import GroupedExperts
from nemo_automodel.components.moe.parallelizer import ExpertParallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import fp8ckpt
from fp8ckpt import Assembly
from tests_hosts.models import modules_with, spoil
from tests_hosts.ranks import Ranks

EXPERTS = "model.layers.1.mlp.experts"
Shapes = Mapping[str, tuple[int, ...]]


class Stacking(fp8ckpt.StateDictAdapter):
    """Tensors that are stacked by ``stacks``, and all others under their own names."""

    def __init__(self, stacks: Callable[[Shapes], dict[str, Assembly]]) -> None:
        self.stacks = stacks

    def assemblies(self, own: Shapes, stored: Shapes) -> Mapping[str, Assembly]:
        """As its base says."""
        stacks = self.stacks(stored)
        return {name: stacks[name] if name in stacks else Assembly.whole(name, stored[name]) for name in own}

    to_hf = from_hf = convert_single_tensor_to_hf = None  # type: ignore[assignment]  # never called


def parts(stored: Shapes, leaf: str) -> list[Assembly]:
    """The experts' tensors of one kind, in order."""
    names = [name for name in stored if re.fullmatch(rf"{re.escape(EXPERTS)}\.\d+\.{leaf}\.weight", name)]
    return [Assembly.whole(name, stored[name]) for name in sorted(names)]


def torchtitans(stored: Shapes) -> dict[str, Assembly]:
    """[E, I, H], [E, H, I], [E, I, H]."""
    kinds = {"w1_EFD": "gate_proj", "w2_EDF": "down_proj", "w3_EFD": "up_proj"}
    stack = "layers.1.moe.routed_experts.inner_experts"
    return {f"{stack}.{name}": Assembly.stack(parts(stored, leaf)) for name, leaf in kinds.items()}


def nemos(stored: Shapes) -> dict[str, Assembly]:
    """[E, H, 2 I], [E, I, H]."""
    gate, up, down = (Assembly.stack(parts(stored, leaf)) for leaf in ("gate_proj", "up_proj", "down_proj"))
    return {
        f"{EXPERTS}.gate_and_up_projs": Assembly.concatenate([gate, up], axis=1).transpose(1, 2),
        f"{EXPERTS}.down_projs": down.transpose(1, 2),
    }


def by_hand(host: str, source: Path) -> dict[str, torch.Tensor]:
    """The stacks' values, made without an assembly."""
    read = fp8ckpt.open_checkpoint(source).read
    gate, up, down = (
        torch.stack([read(f"{EXPERTS}.{i}.{leaf}.weight") for i in range(4)])
        for leaf in ("gate_proj", "up_proj", "down_proj")
    )
    if host == "torchtitan":
        stack = "layers.1.moe.routed_experts.inner_experts"
        return {f"{stack}.w1_EFD": gate, f"{stack}.w2_EDF": down, f"{stack}.w3_EFD": up}
    gate_up = torch.cat([gate.mT, up.mT], dim=2)
    return {f"{EXPERTS}.gate_and_up_projs": gate_up, f"{EXPERTS}.down_projs": down.mT.contiguous()}


def model_of(host: str, source: Path) -> nn.Module:
    """The release's tensors with experts as the host has them; NeMo's are its own module."""
    checkpoint = fp8ckpt.open_checkpoint(source)
    others = {name: torch.empty_like(checkpoint.read(name)) for name in checkpoint.tensors if EXPERTS not in name}
    stacks = {name: torch.empty_like(values) for name, values in by_hand(host, source).items()}
    if host == "torchtitan":
        model = modules_with({**others, **stacks})
        model.state_dict_adapter = Stacking(torchtitans)
        return model
    model = modules_with(others)
    count, width, twice = stacks[f"{EXPERTS}.gate_and_up_projs"].shape
    stated = {"n_routed_experts": count, "dim": width, "moe_inter_dim": twice // 2, "score_func": "sigmoid"}
    config = MoEConfig(**{f.name: stated.get(f.name, 1) for f in fields(MoEConfig) if f.default is MISSING})
    model.get_submodule("model.layers.1.mlp").add_module("experts", GroupedExperts(config))
    assert {name: tensor.shape for name, tensor in model.state_dict().items() if EXPERTS in name} == {
        name: values.shape for name, values in stacks.items()
    }
    model.state_dict_adapter = Stacking(nemos)
    return model


def shard_experts(model: nn.Module, how: str) -> None:
    """ "ep": whole experts; "tp": each cut along its inner dimension, as torchtitan does; "nemo": by its own style."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=(how,))
    if how == "nemo":
        parallelize_module(model.get_submodule(EXPERTS), mesh, ExpertParallel())
        return
    experts = model.get_submodule("layers.1.moe.routed_experts.inner_experts")
    for name, parameter in list(experts.named_parameters()):
        dimension = 0 if how == "ep" else {"w1_EFD": 1, "w2_EDF": 2, "w3_EFD": 1}[name]
        shards = distribute_tensor(parameter.detach(), mesh, [Shard(dimension)])
        experts.register_parameter(name, nn.Parameter(shards, requires_grad=False))


def load_and_save(host: str, how: str, source: Path, folder: Path) -> list[str]:
    """Stacks that are not, bit for bit, what the release's experts are; what was loaded is saved in two dtypes."""
    model: Any = model_of(host, source)
    shard_experts(model, how)
    spoil(model)
    fp8ckpt.load_model(model, source)
    state = model.state_dict()
    found = []
    for name, expected in by_hand(host, source).items():
        assert isinstance(state[name], DTensor)
        if not torch.equal(state[name].full_tensor(), expected):
            found.append(name)
    fp8ckpt.save_model(model, folder / "fp8", to="fp8", like=source)
    fp8ckpt.save_model(model, folder / "bf16", like=source)
    return found


@pytest.mark.parametrize(("host", "how"), [("torchtitan", "ep"), ("torchtitan", "tp"), ("nemo", "nemo")])
def test_stacks_of_a_host(host: str, how: str, sources: dict[str, Path], two_ranks: Ranks, tmp_path: Path) -> None:
    """Loaded bit for bit; saved, the release itself, and what ``convert`` makes of it."""
    source = sources["blocks"]
    assert two_ranks.run(load_and_save, host, how, source, tmp_path) == [[], []]
    fp8ckpt.convert(source, tmp_path / "converted")
    for name, expected in (("fp8", source), ("bf16", tmp_path / "converted")):
        files = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        assert files == {file.name: file.read_bytes() for file in expected.iterdir()}

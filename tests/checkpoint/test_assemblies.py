"""A model whose adapter says by assemblies how its tensors are made of those on disk: torchtitan's three stacks, layers
that are numbered anew on each stage of a pipeline, shards in strides.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from fp8ckpt import Assembly, Checkpoint, load_model, open_checkpoint, save_model
from fp8ckpt.errors import ModelMismatchError
from tests.distributed import assert_same, mesh, run, whole
from tests.families.releases import RELEASES

Shapes = dict[str, tuple[int, ...]]

NAME = "Qwen3-MoE"
EXPERTS = 4
LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Adapter:
    """Of a stage that begins with a layer. Nothing but ``assemblies`` is needed."""

    def __init__(self, first: int) -> None:
        self._first = first

    def hf_names(self, name: str) -> list[str]:
        """The names on disk of a tensor: of all experts, for a stack."""
        if (layer := re.fullmatch(r"blocks_(\d+)\.(.+)", name)) is None:
            return [{"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(name, name)]
        stem = f"model.layers.{self._first + int(layer[1])}."
        if layer[2] in LEAVES:
            return [f"{stem}mlp.experts.{i}.{LEAVES[layer[2]]}.weight" for i in range(EXPERTS)]
        return [stem + layer[2].replace("__", ".")]

    def assemblies(self, own: Shapes, stored: Shapes) -> dict[str, Assembly]:
        """By the model's names."""
        found = {}
        for name in own:
            parts = [Assembly.whole(hf, stored[hf]) for hf in self.hf_names(name)]
            stack = Assembly.stack(parts) if len(parts) > 1 else parts[0]
            found[name] = stack.transpose(1, 2) if name.endswith("w2") else stack
        return found


def model_of(checkpoint: Checkpoint, layers: range) -> nn.Module:
    """A model of these layers of the file, and of its ends where they are, in BF16; its adapter is with it."""
    model = nn.Module()
    adapter = Adapter(layers[0])
    names = {"embed.weight": 0 in layers, "norm.weight": 1 in layers, "lm_head.weight": 1 in layers}
    wanted = [name for name, here in names.items() if here]
    for number, layer in enumerate(layers):
        stem = f"model.layers.{layer}."
        plain = [name for name in checkpoint.tensors if name.startswith(stem) and ".experts." not in name]
        wanted += [f"blocks_{number}.{name.removeprefix(stem).replace('.', '__')}" for name in plain]
        wanted += [f"blocks_{number}.{leaf}" for leaf in LEAVES]
    for name in wanted:
        owner, _, leaf = name.rpartition(".")
        if not hasattr(model, owner):
            model.add_module(owner, nn.Module())
        shape = expected(checkpoint, adapter, name).shape
        getattr(model, owner).register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)))
    model.state_dict_adapter = adapter
    return model


def expected(checkpoint: Checkpoint, adapter: Adapter, name: str) -> torch.Tensor:
    """What a tensor of the model should be, stacked by hand."""
    parts = [checkpoint.read(hf) for hf in adapter.hf_names(name)]
    stack = torch.stack(parts) if len(parts) > 1 else parts[0]
    return stack.transpose(1, 2) if name.endswith("w2") else stack


def _stage(path: Path) -> nn.Module:
    rank = dist.get_rank()
    return model_of(open_checkpoint(path), range(rank, rank + 1))


def _strided(path: Path) -> nn.Module:
    model = model_of(open_checkpoint(path), range(2))
    for module in model.children():
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement = _StridedShard(1, split_factor=3) if parameter.ndim == 3 else Shard(parameter.ndim - 1)
            sharded = distribute_tensor(parameter.data, mesh(), [placement], src_data_rank=None)
            setattr(module, key, nn.Parameter(sharded))
    return model


def _there_and_back(path: Path, out: Path) -> None:
    for make, partial in ((_stage, True), (_strided, False)):
        model = make(path)
        load_model(model, path, partial=partial)
        for name, tensor in model.state_dict().items():
            assert_same(whole(tensor), expected(open_checkpoint(path), model.state_dict_adapter, name), name)
        save_model(model, out / make.__name__, to="fp8", like=path)


def test_there_and_back_on_two_ranks(tmp_path: Path) -> None:
    """Each tensor has the bits that stand on disk, and saved it is the release, byte for byte."""
    path = RELEASES[NAME].write(tmp_path / "release")
    run(2, _there_and_back, path, tmp_path)
    for name in ("_stage", "_strided"):
        for file in path.iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), (name, file)


def test_names_without_a_base_are_missed_by_name(tmp_path: Path) -> None:
    """Assemblies are made of a base's tensors: where none is given, the adapter must say what they are called."""
    checkpoint = open_checkpoint(RELEASES[NAME].write(tmp_path / "release"))
    with pytest.raises(ModelMismatchError, match=r"only through assemblies, which need a base.*give like"):
        save_model(model_of(checkpoint, range(2)), tmp_path / "out")

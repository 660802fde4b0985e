"""What the tests of all hosts share: samples in every variant, and ranks to load them on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes, sample
from tests_hosts.models import HEAD
from tests_hosts.ranks import Ranks

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the ranks, which inherit it: there are two of them on as many cores

Tensors = dict[str, torch.Tensor]

BF16_LINEAR = "model.language_model.layers.0.mlp.down_proj"


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that run jobs together."""
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by variant. Read-only."""
    folder = tmp_path_factory.mktemp("sources")
    identity, nested = sample(folder / "identity"), sample(folder / "nested", layout="nested")
    return {
        "identity": identity,
        "nested": nested,
        "uneven": sample(folder / "uneven", Mistral3Sizes(intermediate=257, vocabulary=513, vision_intermediate=129)),
        "f32_scales": rewritten(identity, folder / "f32_scales", f32_scales),
        "shaped_scales": rewritten(identity, folder / "shaped_scales", shaped_scales),
        "bf16_linear": rewritten(identity, folder / "bf16_linear", bf16_linear),
        "tied": tied(identity, folder / "tied"),
        "tied_nested": tied(nested, folder / "tied_nested"),
        "blocks": sample(folder / "blocks", DeepseekSizes()),
    }


def rewritten(source: Path, destination: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy whose files hold what ``change`` makes of their tensors, and an index that agrees."""
    shutil.copytree(source, destination)
    weight_map, size = {}, 0
    for file in sorted(destination.glob("*.safetensors")):
        tensors = change(load_file(file))
        save_file(tensors, file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (destination / "model.safetensors.index.json").write_text(json.dumps(index))
    return destination


def f32_scales(tensors: Tensors) -> Tensors:
    """Scales of float32 that no bfloat16 equals."""
    return {
        name: tensor.float() * 1.0037 if name.endswith("_scale_inv") else tensor for name, tensor in tensors.items()
    }


def shaped_scales(tensors: Tensors) -> Tensors:
    """Scales of shape [1] instead of []."""
    return {name: tensor.reshape(1) if name.endswith("_scale_inv") else tensor for name, tensor in tensors.items()}


def bf16_linear(tensors: Tensors) -> Tensors:
    """One Linear weight that was left in bfloat16, where the rule for names expects FP8."""
    dropped = (f"{BF16_LINEAR}.weight_scale_inv", f"{BF16_LINEAR}.activation_scale")
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    return {
        name: tensor.to(torch.bfloat16) if name == f"{BF16_LINEAR}.weight" else tensor for name, tensor in kept.items()
    }


def tied(source: Path, destination: Path) -> Path:
    """Tied embeddings, as in Ministral 3 3B: no head on disk."""
    rewritten(
        source,
        destination,
        lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(HEAD)},
    )
    file = destination / "config.json"
    config = json.loads(file.read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    file.write_text(json.dumps(config))
    return destination

"""Stacks of experts, and heads, as transformers itself reads what `convert --scheme` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fp8ckpt import convert, load_pretrained, open_checkpoint, verify
from tests.families.releases import RELEASES
from tests.test_four_bits import gpt_oss


def read_by_transformers(directory: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Which keys it misses, or does not expect; and the parameters that are of other bits than ours, less codes."""
    cls: Any = getattr(transformers, open_checkpoint(directory).config["architectures"][0])
    theirs, info = cls.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True)
    ours = load_pretrained(directory).state_dict()
    state = theirs.state_dict()
    plain = [name for name, tensor in state.items() if name in ours and tensor.dtype == ours[name].dtype]
    differ = [name for name in plain if not state[name].equal(ours[name])]
    return {kind: sorted(names) for kind, names in info.items() if names}, differ


def failures(directory: Path) -> list[str]:
    servability = verify(directory, serving=True).serving
    assert servability is not None
    return [failure.found for failure in servability.failures]


def test_experts_that_transformers_has_no_layer_for(tmp_path: Path) -> None:
    """gpt-oss: it takes codes for values; the summary and --serving say so, and what they advise is read right."""
    convert(gpt_oss(tmp_path / "release"), tmp_path / "bf16")
    result = convert(tmp_path / "bf16", tmp_path / "fp8", scheme="per-tensor")
    assert any("4 stacks of experts are quantized" in note and "no FP8 layer" in note for note in result.notes)
    [found] = failures(tmp_path / "fp8")
    assert "4 stacks of experts are FP8" in found
    info, differ = read_by_transformers(tmp_path / "fp8")
    assert len(info["unexpected_keys"]) == 4
    assert len(differ) == 4
    advised = convert(tmp_path / "bf16", tmp_path / "advised", scheme="per-tensor", skip="experts")
    assert not any("stacks" in note for note in advised.notes)
    assert failures(tmp_path / "advised") == []
    assert read_by_transformers(tmp_path / "advised") == ({}, [])


@pytest.mark.parametrize("scheme", ["per-tensor", "channel"])
def test_stacks_that_transformers_does_not_read_everywhere(scheme: str, tmp_path: Path) -> None:
    """By compressed-tensors, whose layers are Linears, nowhere; or where it has no kernels: a note."""
    convert(RELEASES["Qwen3-MoE"].write(tmp_path / "release"), tmp_path / "bf16", layout="model")
    convert(tmp_path / "bf16", tmp_path / "fp8", scheme=scheme)
    servability = verify(tmp_path / "fp8", serving=True).serving
    assert servability is not None
    assert servability.failures == ()
    assert any("4 stacks of experts are FP8" in note for note in servability.notes)
    assert len(read_by_transformers(tmp_path / "fp8")[0]["unexpected_keys"]) == 4


@pytest.mark.parametrize(("name", "fails"), [("GraniteMoe", False), ("AriaText", True)])
def test_stacks_under_weight(name: str, fails: bool, tmp_path: Path) -> None:
    """Which transformers gives other names in the model: it takes their codes for values, too, and it is said."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, num_key_value_heads=2, vocab_size=64, pad_token_id=0)
    getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    result = convert(tmp_path / "bf16", tmp_path / "fp8", scheme="per-tensor")
    assert any("2 stacks of experts are quantized" in note for note in result.notes)
    servability = verify(tmp_path / "fp8", serving=True).serving
    assert servability is not None
    said = [failure.found for failure in servability.failures] if fails else servability.notes
    assert any("2 stacks of experts are FP8" in found for found in said)
    assert len(read_by_transformers(tmp_path / "fp8")[0]["unexpected_keys"]) == 2


def test_a_head_is_listed_by_every_scheme(tmp_path: Path) -> None:
    """compressed-tensors in transformers makes codes of every Linear that is not: of a head that has no scale."""
    convert(RELEASES["Qwen3"].write(tmp_path / "release"), tmp_path / "bf16")
    for scheme in ("per-tensor", "channel"):
        convert(tmp_path / "bf16", tmp_path / scheme, scheme=scheme)
        assert failures(tmp_path / scheme) == []
        info, differ = read_by_transformers(tmp_path / scheme)
        assert info == {}
        assert "lm_head.weight" not in differ

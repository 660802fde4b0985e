"""What is stored in more bits than a parameter has is kept, refused or named: never rounded in silence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
)

from fp8ckpt import FP8StorageReader, load_model, load_pretrained, open_checkpoint, save_model
from fp8ckpt.errors import ConfigError, ModelMismatchError
from tests.distributed import assert_same, bits
from tests.oracle import Stored, read_directory, write_safetensors

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain DeepSeek-V3 of transformers' own names; its correction bias is of float32 values that BF16 lacks."""
    folder = tmp_path_factory.mktemp("stacked") / "deepseek"
    config = DeepseekV3Config(
        num_hidden_layers=2, first_k_dense_replace=1, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, num_attention_heads=2,
        num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        vocab_size=64, num_nextn_predict_layers=0, architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    folder.mkdir()
    stored = {name: Stored("BF16", tuple(t.shape), bits(t)) for name, t in model.state_dict().items()}
    stored[BIAS] = Stored.of(np.linspace(0.1, 0.9, 8).astype(np.float32), "F32")
    write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_transformers_keeps_in_float32_is_kept(
    dtype: torch.dtype, stacked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dtypes are those of ``from_pretrained``, and the correction bias has the file's own bits."""
    model = load_pretrained(stacked, dtype=dtype)
    theirs = DeepseekV3ForCausalLM.from_pretrained(stacked, dtype=dtype).state_dict()
    state = model.state_dict()
    assert {name: t.dtype for name, t in state.items()} == {name: t.dtype for name, t in theirs.items()}
    assert bits(state[BIAS]) == read_directory(stacked)[BIAS].data
    assert any("rounded" in record.getMessage() for record in caplog.records) == (dtype == torch.float16)


def test_it_is_saved_as_it_was(stacked: Path, tmp_path: Path) -> None:
    """The way back gives the base's own float32 bytes."""
    save_model(load_pretrained(stacked), tmp_path / "out", like=stacked)
    assert read_directory(tmp_path / "out") == read_directory(stacked)


CASES = {  # stored, parameter, whether something could be lost
    "F32 to bfloat16": ("F32", torch.bfloat16, True),
    "F32 to float16": ("F32", torch.float16, True),
    "F16 to bfloat16": ("F16", torch.bfloat16, True),
    "BF16 to float16": ("BF16", torch.float16, True),
    "BF16 to float32": ("BF16", torch.float32, False),
    "F16 to float32": ("F16", torch.float32, False),
    "F32 to float64": ("F32", torch.float64, False),
    "I64 to int32": ("I64", torch.int32, True),
    "I32 to float32": ("I32", torch.float32, True),
    "I32 to int64": ("I32", torch.int64, False),
    "F32 to int64": ("F32", torch.int64, True),
}


@pytest.mark.parametrize("case", CASES)
def test_rounding_is_refused_or_named(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`load_model` refuses what could lose something, unless told to; then it and the reader alone name the tensor."""
    stored, dtype, loses = CASES[case]
    if stored[0] == "I":
        kind = {"I64": np.int64, "I32": np.int32}[stored]
        tensor = Stored(stored, (2,), np.array([1, 1 << 30], kind).tobytes())
    else:
        tensor = Stored.of(np.array([0.1, 3.0], np.float32), stored)
    write_safetensors(tmp_path / "model.safetensors", {"w": tensor})
    model = nn.Module()
    model.register_buffer("w", torch.full((2,), 7, dtype=dtype))
    if loses:
        with pytest.raises(ModelMismatchError, match=r"w in model\.safetensors: .*narrow=True"):
            load_model(model, tmp_path)
        assert model.w.tolist() == [7, 7]
        load_model(model, tmp_path, narrow=True)
    else:
        load_model(model, tmp_path)
    assert_same(model.w, open_checkpoint(tmp_path).read("w").to(dtype))
    assert [r.levelno for r in caplog.records if "rounded" in r.getMessage()] == [logging.WARNING] * loses
    caplog.clear()
    dcp.load({"w": torch.zeros(2, dtype=dtype)}, storage_reader=FP8StorageReader(tmp_path), no_dist=True)
    assert len([r for r in caplog.records if "rounded" in r.getMessage()]) == loses


def test_a_buffer_that_its_class_does_not_make_anew_is_named(stacked: Path) -> None:
    """A value that nobody knows is refused, not left to what the memory held; the remedy is one."""
    model = load_pretrained(stacked)
    model.model.register_buffer("mystery", torch.ones(3), persistent=False)
    with pytest.raises(
        ConfigError, match=r"model\.mystery: no checkpoint holds this buffer.*after the model is loaded"
    ):
        load_model(model, stacked)
    del model.model.mystery
    load_model(model, stacked)


def test_buffers_that_a_model_writes_for_its_layers(tmp_path: Path) -> None:
    """Falcon-H1's are written by the model that holds the layers, and nothing that was loaded is written over."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4}
    few = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "ssm_multipliers": [0.5, 1.5, 2.0, 0.25, 3.0]}
    _assert_as_theirs(FalconH1ForCausalLM(FalconH1Config(**size, **heads, **few)), "mup_vector", tmp_path)


def test_buffers_of_booleans(tmp_path: Path) -> None:
    """GPT-BigCode's mask has both of the values that there are; one that nobody makes is refused all the same."""
    config = GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=64)
    model = _assert_as_theirs(GPTBigCodeForCausalLM(config), "transformer.bias", tmp_path)
    model.transformer.register_buffer("mystery", torch.ones(3, dtype=torch.bool), persistent=False)
    with pytest.raises(ConfigError, match=r"transformer\.mystery: no checkpoint holds this buffer"):
        load_model(model, tmp_path)


def _assert_as_theirs(model: Any, buffer: str, path: Path) -> Any:
    """Loaded by us, a model's parameters and buffers have the bits of ``from_pretrained``."""
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # nothing that initializing it would give
    model.save_pretrained(path)
    ours, theirs = load_pretrained(path), type(model).from_pretrained(path, dtype=torch.bfloat16)
    for found, expected in (
        (ours.named_buffers, theirs.named_buffers),
        (ours.named_parameters, theirs.named_parameters),
    ):
        assert dict(found()).keys() == dict(expected()).keys()
        for name, tensor in found():
            assert_same(tensor, dict(expected())[name], name)
    assert any(name.endswith(buffer) for name, _ in ours.named_buffers())
    return ours

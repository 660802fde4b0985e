"""Tied weights of families whose embeddings and heads have names of many kinds: what transformers ties is one tensor to
every job, whatever it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fp8ckpt import load_pretrained, save_model
from fp8ckpt.errors import ModelMismatchError
from tests.distributed import assert_same
from tests.oracle import read_directory

_SIZES = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "is_decoder": True, "max_position_embeddings": 40}  # fmt: skip
_PAIR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
#: By class, its sizes.
TIED: dict[str, dict[str, Any]] = {
    "CamembertForCausalLM": _BERT,  # the head is registered before the embeddings
    "XLMRobertaForCausalLM": _BERT,
    "BertLMHeadModel": _BERT,
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "OPTForCausalLM": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "word_embed_proj_dim": 32, "max_position_embeddings": 40},
    "GPTNeoXForCausalLM": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                           "num_attention_heads": 4},
    "MptForCausalLM": {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    "BartForConditionalGeneration": _PAIR,
    "WhisperForConditionalGeneration": {**_PAIR, "num_mel_bins": 8, "max_source_positions": 16,
                                        "max_target_positions": 16, "decoder_start_token_id": 1},
    "Zamba2ForCausalLM": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
                          "attention_head_dim": 16, "layers_block_type": ["mamba", "hybrid", "mamba", *["hybrid"] * 2],
                          "num_mem_blocks": 2, "mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4,
                          "mamba_ngroups": 1, "adapter_rank": 4},
    "Gemma2ForCausalLM": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
                          "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


def _without_sources(model: Any) -> Any:
    """The last stage of a pipeline, which holds heads and none of the embeddings."""
    for source in {*model.all_tied_weights_keys.values()}:
        owner, _, leaf = source.rpartition(".")[0].rpartition(".")
        if source.startswith("model.layers."):
            owner, leaf = "model.layers", source.split(".")[2]
        if "bias" not in source:
            setattr(model.get_submodule(owner), leaf, torch.nn.Identity())
    return model


@pytest.mark.parametrize("name", TIED)
def test_a_stage_without_the_embeddings_has_its_head_from_them(name: str, tmp_path: Path) -> None:
    """So has a stage with the second of two shared blocks."""
    whole = built(name)
    whole.save_pretrained(tmp_path / "whole")
    stage = load_pretrained(tmp_path / "whole", parallelize=_without_sources, partial=True)
    held, expected = stage.state_dict(), whole.state_dict()
    assert {*whole.all_tied_weights_keys} & held.keys()
    assert not {name for name in whole.all_tied_weights_keys.values() if "bias" not in name} & held.keys()
    for key, tensor in held.items():
        assert_same(tensor, expected[key], key)
    with pytest.raises(ModelMismatchError, match=r"is tied to .*, which this stage .*\(model.lm_head = None\)"):
        save_model(stage, tmp_path / "out", like=tmp_path / "whole")


def built(name: str) -> Any:
    """A miniature of the class, of values that differ everywhere."""
    torch.manual_seed(3)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**_SIZES, **TIED[name])).bfloat16().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 8)
    return model


@pytest.mark.parametrize("name", TIED)
def test_each_tied_tensor_is_saved_under_the_name_that_transformers_keeps(name: str, tmp_path: Path) -> None:
    """What is written is what save_pretrained writes, bit for bit, and nothing is missing when it is loaded again."""
    model = built(name)
    save_model(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert read_directory(tmp_path / "ours") == read_directory(tmp_path / "theirs")
    again, info = type(model).from_pretrained(tmp_path / "ours", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    for key, tensor in model.state_dict().items():
        assert_same(again.state_dict()[key], tensor, key)

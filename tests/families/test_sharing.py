"""Which tensors trainers cut, and how, by names of many families."""

from __future__ import annotations

import pytest

from fp8ckpt.families.sharing import sharing

LAYER = "model.layers.1"
MATRIX = (8, 16)


@pytest.mark.parametrize(("name", "shape", "rule"), [
    (f"{LAYER}.self_attn.q_proj.weight", MATRIX, "rows"),
    (f"{LAYER}.self_attn.q_proj.bias", (8,), "rows"),
    (f"{LAYER}.self_attn.o_proj.weight", MATRIX, "columns"),
    (f"{LAYER}.self_attn.o_proj.bias", (8,), "whole"),
    (f"{LAYER}.self_attn.q_norm.weight", (8,), "whole"),
    (f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight", MATRIX, "whole"),
    (f"{LAYER}.self_attn.kv_b_proj.weight", MATRIX, "rows"),
    (f"{LAYER}.mlp.gate.weight", (2, 16), "whole"),
    (f"{LAYER}.mlp.shared_experts.down_proj.weight", MATRIX, "columns"),
    (f"{LAYER}.mlp.experts.0.down_proj.weight", MATRIX, "experts, or columns"),
    (f"{LAYER}.block_sparse_moe.experts.1.w1.weight", MATRIX, "experts, or rows"),
    (f"{LAYER}.mlp.experts.gate_up_proj", (2, 8, 16), "experts, or rows"),
    (f"{LAYER}.mlp.experts.gate_up_proj_bias", (2, 8), "experts, or rows"),
    (f"{LAYER}.mlp.experts.down_proj", (2, 8, 16), "experts, or columns"),
    (f"{LAYER}.mlp.experts.down_proj_bias", (2, 8), "experts, or whole"),
    ("model.embed_tokens.weight", MATRIX, "whole, on the first stage"),
    ("model.norm.weight", (16,), "whole, on the last stage"),
    ("model.final_layernorm.weight", (16,), "whole, on the last stage"),
    ("model.word_embeddings_layernorm.weight", (16,), "whole, on the first stage"),
    ("lm_head.weight", MATRIX, "rows, on the last stage"),
    ("output.weight", MATRIX, "rows, on the last stage"),
    ("vision_tower.layers.1.attention.q_proj.weight", MATRIX, "whole, on the first stage"),
    ("multi_modal_projector.linear_1.weight", MATRIX, "whole, on the first stage"),
])  # fmt: skip
def test_rules(name: str, shape: tuple[int, ...], rule: str) -> None:
    """In a model of two layers, however many the vision tower has."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": MATRIX for i in (0, 1)}
    shapes |= {f"vision_tower.layers.{i}.feed_forward.up_proj.weight": MATRIX for i in range(9)}
    shapes |= {f"{LAYER}.mlp.experts.gate_up_proj": (2, 8, 16)} if "bias" in name and "experts" in name else {}
    shapes |= {f"{LAYER}.mlp.experts.down_proj": (2, 8, 16)} if "bias" in name and "experts" in name else {}
    shapes[name] = shape
    assert dict(sharing(shapes, {}))[name].rule == rule


def test_the_experts_of_a_layer_are_stacks() -> None:
    """One for each leaf, whatever the numbers of the experts."""
    leaves = [f"experts.{i}.{leaf}" for i in range(3) for leaf in ("up_proj", "down_proj")]
    found = sharing({f"model.layers.{layer}.mlp.{leaf}.weight": MATRIX for layer in (0, 1) for leaf in leaves}, {})
    stacks = {(i, f"model.layers.{i}.mlp.experts.{leaf}.weight") for i in (0, 1) for leaf in ("up_proj", "down_proj")}
    assert {(one.layer, one.stack) for _, one in found} == stacks

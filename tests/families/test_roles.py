"""What a weight is: what releases quantize, and what they leave, under any name."""

from __future__ import annotations

from typing import Any

import pytest

from fp8ckpt.families.roles import Roles

L = "model.layers.0"
LINEAR, STACK = (256, 128), (8, 256, 128)
EXPERTS = {f"{L}.mlp.experts.{i}.down_proj.weight": LINEAR for i in range(8)}

ROUTERS: list[tuple[str, dict[str, tuple[int, ...]], dict[str, Any]]] = [
    *((f"{L}.{path}.weight", {}, {}) for path in (
        "mlp.gate", "block_sparse_moe.gate", "block_sparse_moe.router.layer", "mlp.gate.wg", "feed_forward.router",
        "mlp.router.classifier", "ffn.router.layer", "mlp.router_gate", "mlp.shared_expert_gate", "moe.gating",
        "mlp.shared_experts_gate", "moe.gate_network", "mlp.text_moe_router.proj", "router.proj", "mlp.wg",
    )),
    (f"{L}.mlp.chooser.weight", EXPERTS, {}),  # by a row for each of the experts beside it
    (f"{L}.mlp.chooser.linear.weight", EXPERTS, {}),
    (f"{L}.mlp.chooser.weight", {f"{L}.mlp.experts.gate_up_proj": STACK}, {}),
    (f"{L}.moe.chooser.weight", {f"{L}.moe.up_proj.weight": STACK}, {}),
    (f"{L}.ffn.chooser.weight", {f"{L}.ffn.up.weight": STACK}, {"text_config": {"num_local_experts": 8}}),
    ("layers.0.chooser.weight", {f"layers.0.experts.{i}.w1.weight": LINEAR for i in range(8)}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "beside", "config"), ROUTERS)
def test_routers(name: str, beside: dict[str, tuple[int, ...]], config: dict[str, Any]) -> None:
    """By name, or by having a row for each of the experts beside them; never what only sounds or looks like one."""
    roles = Roles({name: (8, 128), **beside}, config)
    assert roles.left(name) == "routers of experts"
    assert all(roles.left(other) is None for other in beside)


@pytest.mark.parametrize(
    "path",
    [
        *("mlp.gate_proj", "mlp.gate_up_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj"),
        *("self_attn.gate_proj", "attention.wk", "mlp.shared_experts.down_proj", "mlp.shared_expert.up_proj"),
    ],
)  # fmt: skip
def test_what_is_no_router(path: str) -> None:
    """Linears of attention and of shared experts, even with a row for each expert, and gates of plain MLPs."""
    name = f"{L}.{path}.weight"
    shape = (8, 128) if "att" in path or "shared" in path else (128, 128)
    assert Roles({name: shape, **EXPERTS}, {}).left(name) is None


def test_a_gate_beside_an_up_of_its_shape_is_none() -> None:
    """A plain MLP that calls its Linears gate, up and down."""
    shapes = {
        f"{L}.mlp.{leaf}.weight": shape for leaf, shape in (("gate", LINEAR), ("up", LINEAR), ("down", (128, 256)))
    }
    roles = Roles(shapes, {})
    assert [roles.left(name) for name in shapes] == [None, None, None]


@pytest.mark.parametrize(("name", "stacked", "config"), [
    (f"{L}.block_sparse_moe.input_linear.weight", True, {}),  # Granite
    (f"{L}.moe.up_proj.weight", True, {}),  # Step
    (f"{L}.mlp.experts.gate_up_proj", True, {}),
    (f"{L}.mlp.experts.w13_weight", True, {}),
    (f"{L}.mlp.experts.gate_up_proj.weight", True, {}),
    (f"{L}.feed_forward.experts.w2", True, {}),
    (f"{L}.ffn.up.weight", True, {"num_experts": 8}),
    (f"{L}.ffn.up.weight", True, {"text_config": {"n_routed_experts": 8}}),
    (f"{L}.ffn.up.weight", False, {"num_experts": 16, "num_experts_per_tok": 8}),
    (f"{L}.mixer.conv1d.weight", False, {"num_experts": 8}),
    (f"{L}.self_attn.key_decay", False, {"num_experts": 8}),  # MiniMax, of as many heads as experts
    (f"{L}.mlp.experts.gate_up_proj_bias", False, {}),
    (f"{L}.mlp.experts.gate_up_proj_blocks", False, {}),
    ("model.vision_tower.moe.up.weight", False, {}),
])  # fmt: skip
def test_stacks_of_experts(name: str, stacked: bool, config: dict[str, Any]) -> None:
    """By their module's name or the configuration's number of experts; no other tensor of three dimensions."""
    roles = Roles({name: STACK}, config)
    assert roles.is_stack(name) == stacked
    assert roles.is_weight(name)
    assert (roles.left(name) is None) == stacked


def test_a_router_tells_the_number_of_experts() -> None:
    """Three dimensions beside a router with a row for each of the first."""
    up, router = f"{L}.ffn.up.weight", f"{L}.ffn.router.weight"
    assert Roles({up: STACK, router: (8, 128)}, {}).is_stack(up)
    assert not Roles({up: STACK, router: (9, 128)}, {}).is_stack(up)


@pytest.mark.parametrize(
    ("path", "rows", "beside", "left"),
    [
        *((f"linear_attn.{leaf}", 64, {}, True) for leaf in ("in_proj_ba", "in_proj_a", "in_proj_b", "in_proj_ab")),
        *((f"linear_attn.{leaf}", 4096, {}, False) for leaf in ("in_proj_qkvz", "in_proj_qkv", "in_proj_z")),
        ("attn.b_proj", 32, {"attn.A_log": (32,)}, True),
        ("attn.ba_proj", 64, {"attn.A_log": (32,)}, True),
        ("attn.beta", 32, {"attn.A_log": (1, 1, 32, 1)}, True),
        ("attn.b_proj", 256, {"attn.A_log": (32,)}, False),
        ("mixer.x_proj", 64, {"mixer.A_log": (64, 16)}, False),
        ("attn.b_proj", 32, {}, False),
    ],
)  # fmt: skip
def test_projections_to_a_number_a_head(path: str, rows: int, beside: dict[str, tuple[int, ...]], left: bool) -> None:
    """Those of gated delta nets by name, and under any name by the vector of decay rates beside them."""
    name = f"{L}.{path}.weight"
    roles = Roles({name: (rows, 512), **{f"{L}.{key}": shape for key, shape in beside.items()}}, {})
    assert (roles.left(name) is not None) == left


@pytest.mark.parametrize(("name", "left"), [
    ("lm_head.weight", "heads"),
    ("output.weight", "heads"),
    ("score.weight", "heads"),
    ("model.layers.61.shared_head.head.weight", "heads"),
    (f"{L}.self_attn.output.weight", None),
    (f"{L}.mlp.output.weight", None),
    ("transformer.wte.weight", "embeddings"),
    ("model.embed_tokens.weight", "embeddings"),
    (f"{L}.post_attention_layernorm.weight", "norms"),
    ("model.layers.61.eh_proj.weight", "projections of multi-token prediction"),
])  # fmt: skip
def test_what_else_is_left(name: str, left: str | None) -> None:
    """Heads are outside layers, but for those of multi-token prediction; a layer's own output is a Linear."""
    assert Roles({name: LINEAR}, {}).left(name) == left


def test_experts_are_one_layer() -> None:
    """Numbered or stacked, under their own module or beside the router; shared ones are Linears of their own."""
    shapes = {
        f"{L}.mlp.experts.0.up_proj.weight": LINEAR,
        f"{L}.mlp.experts.down_proj": STACK,
        f"{L}.moe.up_proj.weight": STACK,
        f"{L}.mlp.shared_experts.up_proj.weight": LINEAR,
        f"{L}.mlp.gate.weight": (8, 128),
    }
    roles = Roles(shapes, {})
    found = [roles.experts_of(name) for name in shapes]
    assert found == [f"{L}.mlp.experts", f"{L}.mlp.experts", f"{L}.moe.experts", None, None]

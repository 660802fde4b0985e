"""Where weights in blocks cannot be joined or shared out."""

from __future__ import annotations

import pytest

from fp8ckpt.families.parallel import Heads, Ragged, ragged

L = "model.layers.0"


@pytest.mark.parametrize(
    ("shapes", "size", "heads", "expected"),
    [
        ({"mlp.gate_proj": (192, 256), "mlp.up_proj": (192, 256)}, 1, None, {"gate_proj": 192, "up_proj": 192}),
        ({"mlp.gate_proj": (256, 256), "mlp.up_proj": (256, 256)}, 1, None, {}),
        ({"mlp.gate_proj": (256, 256), "mlp.up_proj": (256, 256)}, 4, None, {"gate_proj": 64, "up_proj": 64}),
        ({"mlp.up_proj": (192, 256)}, 1, None, {}),  # joined with nothing
        ({"mlp.up_proj": (192, 256)}, 2, None, {"up_proj": 96}),
        ({"mlp.down_proj": (256, 192)}, 1, None, {}),
        ({"mlp.down_proj": (256, 256)}, 4, None, {"down_proj": 64}),
        ({"mlp.experts.gate_up_proj": (8, 384, 256)}, 1, None, {"gate_up_proj": 192}),
        ({"mlp.experts.gate_up_proj": (8, 512, 256)}, 2, None, {}),
        ({"mlp.experts.gate_up_proj": (8, 512, 256)}, 4, None, {"gate_up_proj": 64}),
        ({"self_attn.q_proj": (512, 9), "self_attn.k_proj": (64, 9), "self_attn.v_proj": (64, 9)}, 1, 1,
         {"k_proj": 64, "v_proj": 64}),
        ({"self_attn.q_proj": (1024, 9), "self_attn.k_proj": (256, 9), "self_attn.v_proj": (256, 9)}, 8, 2, {}),
        ({"self_attn.q_proj": (1024, 9), "self_attn.k_proj": (256, 9), "self_attn.v_proj": (256, 9)}, 8, None,
         {"k_proj": 32, "v_proj": 32}),
        # DeepSeek: whole on every GPU, and the last one may be ragged
        ({"self_attn.q_a_proj": (1536, 9), "self_attn.kv_a_proj_with_mqa": (576, 9)}, 8, None, {}),
        ({"self_attn.q_a_proj": (1500, 9), "self_attn.kv_a_proj_with_mqa": (576, 9)}, 1, None, {"q_a_proj": 1500}),
        ({"self_attn.qkv_proj": (768, 9)}, 1, 2, {}),  # in one already: 512 rows of queries, 128 of keys
        ({"self_attn.qkv_proj": (640, 9)}, 1, 1, {"qkv_proj": 64}),
        ({"self_attn.qkv_proj": (768, 9)}, 4, 2, {"qkv_proj": 64}),
        ({"self_attn.qkv_proj": (700, 9)}, 1, None, {"qkv_proj": 700}),
        ({"mlp.something_else": (77, 77)}, 16, None, {}),
        ({"mlp.up_proj": (200, 256)}, 16, None, {"up_proj": 12}),  # no whole number of rows a GPU
    ],
)  # fmt: skip
def test_parts_that_are_not_whole_blocks(
    shapes: dict[str, tuple[int, ...]], size: int, heads: int | None, expected: dict[str, int]
) -> None:
    """Of joined weights, and of what a GPU has of rows or columns; heads of keys and values are not cut."""
    full = {f"{L}.{module}{'' if len(shape) == 3 else '.weight'}": shape for module, shape in shapes.items()}
    given = None if heads is None else Heads(8, heads)
    found = list(ragged(full, dict.fromkeys(full, (128, 128)), size, given))
    assert {part.name.removesuffix(".weight").rpartition(".")[2]: part.size for part in found} == expected
    assert {part.block for part in found} <= {128}


def test_some_must_be_whole_blocks_for_themselves() -> None:
    """Joined or not, rows and columns."""
    shapes = {"m.a.weight": (200, 256), "m.b.weight": (256, 200), "m.c.weight": (256, 256), "m.d.weight": (200, 200)}
    found = ragged(shapes, dict.fromkeys(shapes, (128, 128)), 1, None, {*shapes} - {"m.d.weight"})
    assert [part[:3] for part in found] == [("m.a.weight", "rows", 200), ("m.b.weight", "columns", 200)]


def test_columns_are_said_to_be_columns() -> None:
    """Which dimension, and each block's own size."""
    name = f"{L}.mlp.down_proj.weight"
    assert [*ragged({name: (256, 256)}, {name: (1, 96)}, 2, None)] == [Ragged(name, "columns", 128, 96)]

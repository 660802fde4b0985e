"""Which block size is a module's own, as configurations state it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fp8ckpt.errors import ConfigError
from fp8ckpt.stores.local import LocalStore
from fp8ckpt.tensors.blocks import BlockSizes, block_sizes

Q, UP, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.11.mlp.gate_proj"


def group(targets: list[str] | None, size: list[int] | int | str | None) -> dict[str, Any]:
    """A group of compressed-tensors; a whole number is a group size, None a scale a row."""
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel"}
    if isinstance(size, int):
        weights |= {"strategy": "group", "group_size": size}
    elif size is not None:
        weights |= {"strategy": "block", "block_structure": size}
    return {"weights": weights} if targets is None else {"targets": targets, "weights": weights}


def stated(tmp_path: Path, *groups: dict[str, Any], **more: Any) -> BlockSizes:
    named = {f"group_{i}": part for i, part in enumerate(groups)}
    return block_sizes(LocalStore(tmp_path), {"quantization_config": {"config_groups": named, **more}})


@pytest.mark.parametrize(("groups", "expected"), [
    ([group(["Linear"], [128, 128])], [(128, 128)] * 3),
    ([group(None, [128, 128])], [(128, 128)] * 3),
    ([group(["re:.*mlp.*"], [64, 64])], [(64, 64)] * 3),  # the only size there is
    ([group(["Linear"], "128x128")], [(128, 128)] * 3),
    ([group(["Linear"], None)], [None] * 3),
    ([group(["re:.*self_attn.*"], [128, 128]), group(["re:.*mlp.*"], 32)], [(128, 128), (1, 32), (1, 32)]),
    ([group(["Linear"], [128, 128]), group([UP], 32)], [(128, 128), (1, 32), (128, 128)]),
    ([group([UP], 32), group(["Linear"], [128, 128])], [(128, 128), (1, 32), (128, 128)]),
    ([group(["re:.*layers\\.0\\..*"], 32), group([UP], 16)], [(1, 32), (1, 16), None]),
    ([group(["re:.*layers\\.1\\..*"], 32), group(["Linear"], 16)], [(1, 16)] * 3),
    ([group(["re:.*up_proj"], 32), group(["re:.*mlp.*"], 16)], [None, (1, 32), (1, 16)]),
    ([group(["re:.*mlp.*"], 16), group(["re:.*up_proj"], 32)], [None, (1, 16), (1, 16)]),
    ([group(["*.mlp.*"], 16), group([Q], None)], [None, (1, 16), (1, 16)]),
    ([group(["Linear"], [128, 128]), group(["re:.*self_attn"], None)], [None, (128, 128), (128, 128)]),
    ([group(["re:["], 16), group(["Linear"], 32)], [(1, 32)] * 3),
    ([group(["Embedding"], 16), group(["Linear"], 32)], [(1, 32)] * 3),
    ([group([f"model.language_{UP}"], 16), group(["Linear"], 32)], [(1, 32), (1, 16), (1, 32)]),
], ids=str)  # fmt: skip
def test_a_module_has_the_size_of_its_own_group(
    tmp_path: Path, groups: list[dict[str, Any]], expected: list[tuple[int, ...] | None]
) -> None:
    """A name goes before a pattern, a pattern before a class; of patterns the first; a group may have no blocks."""
    sizes = stated(tmp_path, *groups)
    assert [sizes.of(module) for module in (Q, UP, GATE)] == expected
    assert sizes.stated == any(expected)


def test_a_class_of_embeddings(tmp_path: Path) -> None:
    """Whether a module is an embedding is told by its name."""
    sizes = stated(tmp_path, group(["Embedding"], 16), group(["Linear"], 32))
    assert (sizes.of("model.embed_tokens"), sizes.of("lm_head")) == ((1, 16), (1, 32))


@pytest.mark.parametrize("entry", [UP, "model.layers.0.mlp", "up_proj", "re:.*layers.0.mlp.*", "model.layers.0.mlp.*"])
def test_what_is_ignored_belongs_to_no_group(tmp_path: Path, entry: str) -> None:
    """By its name, its ancestor's, its leaf, or by a pattern."""
    sizes = stated(tmp_path, group(["Linear"], [128, 128]), group(["re:.*mlp.*"], 32), ignore=[entry, None])
    assert [sizes.of(module) for module in (Q, UP, GATE)] == [(128, 128), None, (1, 32)]


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_the_layers_of_modelopt(tmp_path: Path, where: str) -> None:
    """``quantized_layers`` names each, or the module that holds fused experts; what it does not name has no blocks."""
    experts = "model.layers.0.mlp.experts"
    layers = {
        Q: {"quant_algo": "FP8"},
        UP: {"quant_algo": "MXFP8", "group_size": 32},
        GATE: {"quant_algo": "FP8_PB_WO"},
        experts: {"quant_algo": "MXFP8"},
        "odd": None,
    }
    quantization = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    config: dict[str, Any] = {}
    if where == "config.json":
        config = {"quantization_config": quantization}
    else:
        (tmp_path / where).write_text(json.dumps({"quantization": quantization}))
    sizes = block_sizes(LocalStore(tmp_path), config)
    found = [sizes.of(module) for module in (Q, UP, GATE, f"{experts}.down_proj", "lm_head")]
    assert found == [None, (1, 32), (128, 128), (1, 32), None]


def test_the_schemes_of_quark(tmp_path: Path) -> None:
    """Layers by name and pattern, then classes, then all others; of several levels of scales, the groups'."""
    lines, whole = {"weight": {"qscheme": "per_group", "group_size": 32}}, {"weight": {"qscheme": "per_tensor"}}
    levels = {"weight": [{"qscheme": "per_group", "group_size": 16}, {"qscheme": "per_tensor", "group_size": None}]}
    blocks = {"weight": {"qscheme": "per_block", "block_size": [128, 128]}}
    layers = {"*self_attn*": whole, UP: levels}
    for others in ({"global_quant_config": lines}, {"layer_type_quant_config": {"Linear": lines}}):
        quantization = {"global_quant_config": blocks, "layer_quant_config": layers, **others}
        sizes = block_sizes(LocalStore(tmp_path), {"quantization_config": quantization})
        assert [sizes.of(module) for module in (Q, UP, GATE)] == [None, (1, 16), (1, 32)]
    quantization = {"global_quant_config": blocks, "layer_quant_config": {"odd": None}}
    assert block_sizes(LocalStore(tmp_path), {"quantization_config": quantization}).of(UP) == (128, 128)


@pytest.mark.parametrize("size", [16, 32])
def test_the_group_size_beside_an_algorithm_of_modelopt(tmp_path: Path, size: int) -> None:
    """It is what the configuration states, for all as for one layer."""
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "MXFP8", "group_size": size}})
    )
    assert block_sizes(LocalStore(tmp_path), {}).of(UP) == (1, size)


@pytest.mark.parametrize("quantization", [
    {"weight_block_size": [64, 64], "config_groups": {"a": group(["Linear"], [128, 128])}},
    {"config_groups": {"a": group(["Linear"], 32), "b": group(["Linear"], 16)}},
    {"config_groups": {"a": group([UP], 32), "b": group([UP], 16)}},
    {"config_groups": {"a": group([UP], 32)}, "quantized_layers": {UP: {"quant_algo": "FP8_PB_WO"}}},
    {"weight_block_size": [64, 64], "quant_algo": "FP8_PB_WO"},
], ids=str)  # fmt: skip
def test_two_sizes_for_the_same_modules(tmp_path: Path, quantization: dict[str, Any]) -> None:
    """Neither is chosen."""
    with pytest.raises(ConfigError, match="several block sizes for"):
        block_sizes(LocalStore(tmp_path), {"quantization_config": quantization})


def test_two_sizes_in_two_sections(tmp_path: Path) -> None:
    """Neither is chosen of the model's and its text model's, unless they are one."""
    config = {
        "quantization_config": {"weight_block_size": [128, 128]},
        "text_config": {"quantization_config": {"weight_block_size": [128, 128]}},
    }
    assert block_sizes(LocalStore(tmp_path), config).of(UP) == (128, 128)
    config["text_config"]["quantization_config"]["weight_block_size"] = [64, 64]
    with pytest.raises(ConfigError, match="several block sizes for"):
        block_sizes(LocalStore(tmp_path), config)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [False, True])
def test_both_keys_of_the_configuration(tmp_path: Path, key: str, nested: bool) -> None:
    """The old key is the new one, at the top and in a nested section."""
    config: dict[str, Any] = {key: {"config_groups": {"a": group(["Linear"], 32)}}}
    assert block_sizes(LocalStore(tmp_path), {"text_config": config} if nested else config).of(UP) == (1, 32)

"""What is read of a PEFT directory, and what is refused by name before a byte of data is read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8ckpt.errors import (
    CheckpointNotFoundError,
    ConfigError,
    Fp8CheckpointError,
    HeaderError,
    ModelMismatchError,
    TruncatedFileError,
    UnsupportedFormatError,
    WeightValueError,
)
from fp8ckpt.tensors.adapters import open_adapter, refuse_nonfinite
from fp8ckpt.tensors.reading import read_floats
from tests.adapters import factors as factors_of
from tests.adapters import values, write_adapter
from tests.oracle import Stored, write_safetensors

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def factors(module: str = Q, dtype: str = "F32") -> dict[str, Stored]:
    return factors_of(module, dtype=dtype)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_pair(dtype: str, tmp_path: Path) -> None:
    """A module's two factors, of any float dtype, without a byte lost."""
    tensors = factors(dtype=dtype)
    adapter = open_adapter(write_adapter(tmp_path / "a", tensors))
    [pair] = adapter.pairs
    assert (pair.module, pair.depth, pair.embedding) == ("model.layers.0.self_attn.q_proj", 0, False)
    assert np.array_equal(read_floats(pair.a), tensors[f"{Q}.lora_A.weight"].array.astype(np.float32))
    assert adapter.scaling(pair.module) == 2.0
    refuse_nonfinite(adapter)


SCALINGS: list[tuple[dict[str, Any], float, float]] = [
    ({}, 1.0, 8 / 4),
    ({}, 0.5, 0.5 * 8 / 4),
    ({"use_rslora": True}, 1.0, 8 / math.sqrt(4)),
    ({"rank_pattern": {"q_proj": 2}}, 1.0, 8 / 2),
    ({"rank_pattern": {"proj": 2}}, 1.0, 8 / 4),  # a name is a whole one
    ({"alpha_pattern": {"self_attn.q_proj": 3}}, 1.0, 3 / 4),
    ({"alpha_pattern": {r"^model.*[qk]_proj": 3, "q_proj": 5}}, 1.0, 3 / 4),  # the first that matches
    ({"rank_pattern": {r"layers\.0\..*": 16}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True}, -1.0, -1 / 4),
    ({"r": 8, "lora_alpha": 0.5}, 1.0, 0.5 / 8),
]


@pytest.mark.parametrize(("config", "weight", "expected"), SCALINGS)
def test_scaling(config: dict[str, Any], weight: float, expected: float, tmp_path: Path) -> None:
    """Ranks and alphas are found by PEFT's patterns; rank-stabilized adapters divide by the root."""
    adapter = open_adapter(write_adapter(tmp_path / "a", factors(), **config), weight)
    assert adapter.scaling("model.layers.0.self_attn.q_proj") == expected


def test_all_kinds_of_keys(tmp_path: Path) -> None:
    """Embeddings, nested wrappers, magnitudes and whole tensors, with PEFT's prefix or without."""
    e, x = "base_model.model.model.embed_tokens", "model.layers.0.mlp.experts"
    tensors = {
        f"{e}.lora_embedding_A": values(4, 32),
        f"{e}.lora_embedding_B": values(16, 4),
        f"{e}.base_layer.weight": values(32, 16),
        **factors(x),
        **factors(f"{x}.base_layer"),
        "base_model.model.lm_head.weight": values(3, 3),
    }
    adapter = open_adapter(write_adapter(tmp_path / "a", tensors))
    found = {(pair.module, pair.depth): pair for pair in adapter.pairs}
    assert found.keys() == {("model.embed_tokens", 0), (x, 0), (x, 1)}
    assert found["model.embed_tokens", 0].embedding
    assert adapter.tensors.keys() == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("index", [True, False])
def test_sharded(index: bool, tmp_path: Path) -> None:
    """Parts are read by their index, or by their names."""
    directory = write_adapter(tmp_path / "a", {})
    (directory / "adapter_model.safetensors").unlink()
    files = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = list(factors())
    for file, name in zip(files, names, strict=True):
        write_safetensors(directory / file, {name: factors()[name]})
    if index:
        text = json.dumps({"weight_map": dict(zip(names, files, strict=True))})
        (directory / "adapter_model.safetensors.index.json").write_text(text)
    assert len(open_adapter(directory).pairs) == 1
    (directory / files[1]).unlink()
    with pytest.raises(
        HeaderError, match=r"model-00002-of-00002.safetensors, which does not exist|only 1 of 2 parts exist"
    ):
        open_adapter(directory)


REFUSED_CONFIGS: list[tuple[dict[str, Any], type[Fp8CheckpointError], str]] = [
    ({"peft_type": "IA3"}, UnsupportedFormatError, "peft_type is IA3"),
    ({"peft_type": "LOHA"}, UnsupportedFormatError, "merge_and_unload"),
    ({"peft_type": "ADALORA"}, UnsupportedFormatError, "ADALORA"),
    ({"peft_type": None}, UnsupportedFormatError, "None"),
    ({"alora_invocation_tokens": [1]}, UnsupportedFormatError, "aLoRA"),
    ({"layer_replication": [[0, 2]]}, UnsupportedFormatError, "layer_replication"),
    ({"trainable_token_indices": [1]}, UnsupportedFormatError, "trainable_token_indices"),
    ({"lora_bias": True}, UnsupportedFormatError, "lora_bias"),
    ({"arrow_config": {"top_k": 1}}, UnsupportedFormatError, "Arrow"),
    ({"use_qalora": True}, UnsupportedFormatError, "use_qalora"),
    ({"kasa_config": {"beta": 1}}, UnsupportedFormatError, "kasa_config"),
    ({"a_thing_of_next_year": 1}, UnsupportedFormatError, "a_thing_of_next_year"),
    *(
        ({"init_lora_weights": how}, UnsupportedFormatError, "path_initial_model_for_weight_conversion")
        for how in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
    ),
    ({"r": 0}, ConfigError, "r is 0"),
    ({"r": "four"}, ConfigError, "r is four"),
    ({"r": True}, ConfigError, "r is True"),
    ({"lora_alpha": float("inf")}, ConfigError, "lora_alpha is inf"),
    ({"lora_alpha": 10**400}, ConfigError, "a finite number"),
    ({"lora_alpha": None}, ConfigError, "lora_alpha is None"),
    ({"rank_pattern": {"q": 2.5}}, ConfigError, "rank_pattern"),
    ({"rank_pattern": ["q"]}, ConfigError, "rank_pattern"),
    ({"alpha_pattern": {"(q": 2}}, ConfigError, "no regular expression"),
    ({"target_parameters": "experts"}, ConfigError, "target_parameters"),
]


@pytest.mark.parametrize(("config", "error", "text"), REFUSED_CONFIGS)
def test_a_configuration_that_cannot_be_merged(
    config: dict[str, Any], error: type[Fp8CheckpointError], text: str, tmp_path: Path
) -> None:
    """It is refused by the name of what it says."""
    with pytest.raises(error, match=text):
        open_adapter(write_adapter(tmp_path / "a", factors(), **config))


HARMLESS = [{"init_lora_weights": how} for how in (True, False, "gaussian", "eva", "orthogonal")]


@pytest.mark.parametrize("config", [*HARMLESS, {"a_thing_of_next_year": None}, {"use_bdlora": False}, {"bias": "all"}])
def test_a_configuration_that_changes_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    """How the factors began, and what is not set, is none of merging's business."""
    assert open_adapter(write_adapter(tmp_path / "a", factors(), **config)).pairs


def without(name: str) -> dict[str, Stored]:
    return {key: value for key, value in factors().items() if not key.endswith(name)}


REFUSED_TENSORS: list[tuple[dict[str, Stored], dict[str, Any], str]] = [
    ({}, {}, "no tensor"),
    (without("lora_B.weight"), {}, "no lora_B"),
    (without("lora_A.weight"), {}, "no lora_A"),
    (factors() | {f"{Q}.lora_A.weight": values(3, 16)}, {}, r"\(3, 16\) and \(8, 4\)"),
    (factors() | {f"{Q}.lora_A.weight": values(4, 2, 3, 3)}, {}, "convolution"),
    (factors() | {f"{Q}.lora_B.weight": values(8)}, {}, r"\(8,\)"),
    (factors() | {f"{Q}.lora_B.bias": values(8)}, {}, "lora_B.bias"),
    (factors() | {f"{Q}.lora_velora_embed": values(8)}, {}, "lora_velora_embed"),
    (factors() | {f"{Q}.lora_embedding_A": values(8)}, {}, "lora_embedding_B"),
    (factors() | {f"{Q}.lora_A.weight": Stored.codes(np.zeros((4, 16), np.uint8), "F8_E4M3")}, {}, "F8_E4M3"),
    (factors(), {"use_dora": True}, "no magnitude"),
    (factors() | {f"{Q}.lora_magnitude_vector": values(8)}, {}, "a magnitude"),
]


@pytest.mark.parametrize(("tensors", "config", "text"), REFUSED_TENSORS)
def test_tensors_that_make_no_adapter(
    tensors: dict[str, Stored], config: dict[str, Any], text: str, tmp_path: Path
) -> None:
    """A factor without the other, of another shape or of another kind is named."""
    with pytest.raises((UnsupportedFormatError, ModelMismatchError), match=text):
        open_adapter(write_adapter(tmp_path / "a", tensors, **config))


def test_files_that_make_no_adapter(tmp_path: Path) -> None:
    """A path that is no PEFT directory, a pickle, a truncated file, a file: each by name."""
    with pytest.raises(CheckpointNotFoundError, match="no such"):
        open_adapter(tmp_path / "none/of/it")
    with pytest.raises(CheckpointNotFoundError, match="adapter_config"):
        open_adapter(tmp_path)
    directory = write_adapter(tmp_path / "a", factors())
    weights = directory / "adapter_model.safetensors"
    with pytest.raises(CheckpointNotFoundError, match="directory of an adapter"):
        open_adapter(weights)
    os.truncate(weights, weights.stat().st_size - 4)
    with pytest.raises(TruncatedFileError):
        open_adapter(directory)
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(CheckpointNotFoundError, match="safe_serialization"):
        open_adapter(directory)
    (directory / "adapter_config.json").write_text("[")
    with pytest.raises(ConfigError):
        open_adapter(directory)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    """They are counted, and the tensor is named."""
    array = np.ones((8, 4), np.float32)
    array[1, 2] = bad
    tensors = factors() | {f"{Q}.lora_B.weight": Stored.of(array, "BF16")}
    with pytest.raises(WeightValueError, match=r"lora_B.*1 of 32"):
        refuse_nonfinite(open_adapter(write_adapter(tmp_path / "a", tensors)))


def test_a_weight_is_a_number(tmp_path: Path) -> None:
    """Of several adapters each has one, in float32."""
    for weight in (math.nan, -math.inf, 1e39):
        with pytest.raises(ValueError, match="weight"):
            open_adapter(write_adapter(tmp_path / str(weight), factors()), weight)

"""What a model has no place for is carried from the base where that is known or said, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp8ckpt import load_pretrained, save_model
from fp8ckpt.errors import ModelMismatchError
from fp8ckpt.families.kinds import mtp_tensors
from tests.families.releases import RELEASES
from tests.oracle import read_directory, tree

NAMES = {  # a tensor, a configuration, whether it is of an MTP layer
    "numbered": ("model.layers.61.eh_proj.weight", {"num_hidden_layers": 61, "num_nextn_predict_layers": 1}, True),
    "the last layer": (
        "model.layers.60.mlp.gate.weight",
        {"num_hidden_layers": 61, "num_nextn_predict_layers": 1},
        False,
    ),
    "beyond them": ("model.layers.62.eh_proj.weight", {"num_hidden_layers": 61, "num_nextn_predict_layers": 1}, False),
    "the second of two": ("model.layers.62.x", {"num_hidden_layers": 61, "num_mtp_layers": 2}, True),
    "no number said": ("model.layers.61.eh_proj.weight", {"num_hidden_layers": 61}, False),
    "none": ("model.layers.61.x", {"num_hidden_layers": 61, "num_nextn_predict_layers": 0}, False),
    "nested": (
        "model.language_model.layers.3.x",
        {"text_config": {"num_hidden_layers": 3, "mtp_num_hidden_layers": 1}},
        True,
    ),
    "a vision layer": ("model.vision_tower.layers.3.x", {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}, False),
    "no object": ("model.layers.3.x", {"text_config": 5, "num_hidden_layers": 3, "num_mtp_layers": 1}, True),
    "named": ("mtp.layers.0.x", {}, True),
    "named, nested": ("model.mtp.layers.0.x", {}, True),
    "named like it": ("model.mtpx.weight", {}, False),
    "native": ("layers.3.x", {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}, True),
}


@pytest.mark.parametrize("case", NAMES)
def test_mtp_layers_are_known_by_name_or_number(case: str) -> None:
    """They are called so, or their numbers follow those of the model's layers, as many as the configuration says."""
    name, config, expected = NAMES[case]
    assert mtp_tensors([name], config) == ({name} if expected else set())


@pytest.mark.parametrize("to", ["fp8", "bf16"])
def test_what_is_missing_for_no_known_reason_is_carried_only_where_it_is_said(to: str, tmp_path: Path) -> None:
    """A model without its head is refused, by a message that names the option; with it, the head is the base's."""
    path = RELEASES["Qwen3-MoE"].write(tmp_path / "release")
    whole = load_pretrained(path)
    save_model(whole, tmp_path / "whole", to=to, like=path)
    model: Any = load_pretrained(path)
    model.lm_head = None
    model.model.layers[1].mlp.experts.down_proj = None
    with pytest.raises(ModelMismatchError, match=r"5 tensors are only in the base.*carry=REGEX"):
        save_model(model, tmp_path / "out", to=to, like=path)
    with pytest.raises(ModelMismatchError, match=r"4 tensors are only in the base"):
        save_model(model, tmp_path / "out", to=to, like=path, carry="lm_head")
    save_model(model, tmp_path / "out", to=to, like=path, carry=r"lm_head|layers\.1\.mlp\.experts\.\d+\.down_proj")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    if to == "fp8":
        assert tree(tmp_path / "out") == tree(path)


def test_what_the_base_lacks_is_no_matter_of_carrying(tmp_path: Path) -> None:
    """A tensor of the model that the base has not is refused, whatever is carried; carry without a base is, too."""
    path = RELEASES["Qwen3"].write(tmp_path / "release")
    model: Any = load_pretrained(path)
    model.extra = model.lm_head
    model.lm_head = None
    with pytest.raises(ModelMismatchError, match="only in the model"):
        save_model(model, tmp_path / "out", to="fp8", like=path, carry=".")
    with pytest.raises(ValueError, match="carry goes with like"):
        save_model(model, tmp_path / "out", carry=".")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["release"]


def test_carried_weights_keep_their_scales_when_others_are_made_anew(tmp_path: Path) -> None:
    """The bytes of an MTP layer are the release's, also where every scale is fresh."""
    path = RELEASES["DeepSeek-V3"].write(tmp_path / "release")
    save_model(load_pretrained(path), tmp_path / "out", to="fp8", like=path, scales="fresh")
    found, before = read_directory(tmp_path / "out"), read_directory(path)
    differ = {name for name, tensor in before.items() if found[name] != tensor}
    assert differ
    assert not [name for name in differ if name.startswith("model.layers.2.")]
    assert found.keys() == before.keys()

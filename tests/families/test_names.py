"""Key layouts: names translate both ways, and the names in the file decide which layout it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8ckpt import open_checkpoint, sample
from fp8ckpt.families.names import (
    HEADLESS,
    HEADLESS_OF_NESTED,
    IDENTITY,
    LAYOUTS,
    NESTED,
    TEXT_OF_IDENTITY,
    TEXT_OF_NESTED,
    KeyLayout,
    find_layout,
    layout_on_disk,
)

VLM = [
    "model.language_model.embed_tokens.weight", "model.language_model.layers.10.self_attn.q_proj.weight",
    "model.language_model.norm.weight", "model.vision_tower.patch_conv.weight",
    "model.multi_modal_projector.linear_1.weight", "lm_head.weight",
]  # fmt: skip
TEXT = ["model.embed_tokens.weight", "model.layers.10.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"]
NESTED_ON_DISK = [
    "language_model.model.embed_tokens.weight", "language_model.model.layers.10.self_attn.q_proj.weight",
    "language_model.model.norm.weight", "vision_tower.patch_conv.weight", "multi_modal_projector.linear_1.weight",
    "language_model.lm_head.weight",
]  # fmt: skip


@pytest.mark.parametrize(("layout", "native", "hf"), [
    (IDENTITY, VLM, VLM),
    (NESTED, VLM, NESTED_ON_DISK),
    (TEXT_OF_IDENTITY, TEXT, [*VLM[:3], "lm_head.weight"]),
    (TEXT_OF_NESTED, TEXT, [*NESTED_ON_DISK[:3], "language_model.lm_head.weight"]),
    (HEADLESS, [name.removeprefix("model.") for name in VLM[:5]], VLM[:5]),
    (HEADLESS_OF_NESTED, [name.removeprefix("model.") for name in VLM[:5]], NESTED_ON_DISK[:5]),
], ids=lambda value: value.name if isinstance(value, KeyLayout) else "")  # fmt: skip
def test_names_translate_both_ways(layout: KeyLayout, native: list[str], hf: list[str]) -> None:
    """Each native name has its name on disk, and leads back; the layout is found from the names on both sides."""
    assert [layout.native_to_hf(name) for name in native] == hf
    assert [layout.hf_to_native(name) for name in hf] == native
    assert find_layout(native, hf) == layout


def test_a_model_type_that_is_no_word() -> None:
    """A list where a word belongs is a model that is not known, and no error of Python's."""
    assert layout_on_disk(["language_model.model.norm.weight"], {"model_type": ["llava"]}) == IDENTITY


def test_names_that_no_prefix_touches_stay() -> None:
    """A prefix is whole path components: names that merely look alike are left alone."""
    for name in ("model.vision_tower_extra.x", "lm_headless.weight", "other"):
        assert NESTED.native_to_hf(name) == name
    assert NESTED.hf_to_native("language_modeling.model.x") == "language_modeling.model.x"


def test_find_layout_prefers_the_plainest() -> None:
    """Names that fit no layout, none at all, or several equally: identity."""
    assert find_layout([], []) is IDENTITY
    assert find_layout(["a"], ["b"]) is IDENTITY
    assert find_layout(["lm_head.weight"], ["lm_head.weight"]) is IDENTITY
    assert LAYOUTS[0] is IDENTITY


def test_find_layout_of_a_part() -> None:
    """A few layers of the model, as a pipeline stage has, are enough."""
    stage = ["model.language_model.layers.10.self_attn.q_proj.weight"]
    assert find_layout(stage, NESTED_ON_DISK) is NESTED
    assert find_layout(["lm_head.weight"], NESTED_ON_DISK) is NESTED


@pytest.mark.parametrize(("layout", "expected"), [("identity", IDENTITY), ("nested", NESTED)])
def test_samples_have_their_layouts(tmp_path: Path, layout: str, expected: KeyLayout) -> None:
    """Every name of a sample leads to the model and back."""
    names = list(open_checkpoint(sample(tmp_path / "fp8", layout=layout)).tensors)
    native = [expected.hf_to_native(name) for name in names]
    assert [expected.native_to_hf(name) for name in native] == names
    assert find_layout(native, names) is expected

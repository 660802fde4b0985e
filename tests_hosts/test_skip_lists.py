"""The narrower reading of a skip list, by the version of transformers that has it: that of this environment."""

from __future__ import annotations

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from fp8ckpt.serving.skip_list import SkipList

ENTRIES = ["model.layers.1", "model.layers.1.mlp.gate", "model.layers.1.mlp.gate$", "ate_proj", "gate", "lm_head",
           "model.vision_tower"]  # fmt: skip
MODULES = ["model.layers.10.mlp.gate_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.gate", "lm_head",
           "model.layers.2.mlp.up_proj", "model.vision_tower.x", "model.vision_tower_2.y", "x.gate"]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("module", MODULES)
def test_what_an_entry_skips_is_found_before(entry: str, module: str) -> None:
    """Whatever this version takes an entry to skip, `verify --serving` takes it to skip, in one of its readings."""
    listed = SkipList.of([entry])
    taken = listed.reaches(module) or bool(listed.begins(module) or listed.ends(module))
    assert taken == (not should_convert_module(module, [entry]))

"""The groups of weights that are served as one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt.families.parallel import FUSED_LEAVES, sibling_units


@pytest.mark.parametrize("leaves", FUSED_LEAVES)
def test_each_row_is_one_unit_in_its_order(leaves: tuple[str, ...]) -> None:
    """Whatever the order in which its members are named; and with one missing, those that are left, if they are two."""
    unit = tuple(f"model.layers.0.x.{leaf}.weight" for leaf in leaves)
    assert sibling_units(unit) == sibling_units(reversed(unit)) == [unit]
    assert sibling_units(unit[1:]) == ([unit[1:]] if len(unit) > 2 else [])


def test_units_are_told_apart_by_their_module() -> None:
    """Layers and experts apart, two rows in one module apart, groups in the order in which they are first met."""
    names = [
        "model.layers.1.mlp.up_proj.weight", "model.layers.0.attn.kv_a_proj_with_mqa.weight",
        "model.layers.0.attn.v_proj.weight", "model.layers.10.mlp.gate_proj.weight",
        "model.layers.0.attn.q_a_proj.weight", "model.layers.1.mlp.gate_proj.weight",
        "model.layers.0.attn.q_proj.weight", "w3.weight", "w1.weight",
    ]  # fmt: skip
    assert sibling_units(names) == [
        ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.0.attn.q_a_proj.weight", "model.layers.0.attn.kv_a_proj_with_mqa.weight"),
        ("model.layers.0.attn.q_proj.weight", "model.layers.0.attn.v_proj.weight"),
        ("w1.weight", "w3.weight"),
    ]


def test_what_is_no_unit() -> None:
    """One member alone, other leaves, names that only end like a leaf, and tensors that are not weights."""
    assert sibling_units([]) == []
    assert sibling_units(["a.q_proj.weight", "b.k_proj.weight", "a.o_proj.weight", "a.down_proj.weight"]) == []
    names = ["a.my_q_proj.weight", "a.my_k_proj.weight", "a.q_proj.bias", "a.k_proj.bias", "q_proj", "k_proj"]
    assert sibling_units(names) == []


@given(
    st.lists(
        st.sampled_from(
            [f"{parent}{leaf}.weight" for parent in ("", "a.", "b.") for row in FUSED_LEAVES for leaf in row]
        )
    )
)
def test_each_name_is_in_one_unit_at_most(names: list[str]) -> None:
    """Units share no name, hold given names only, and repeated names change nothing."""
    units = sibling_units(names)
    members = [name for unit in units for name in unit]
    assert len(members) == len(set(members))
    assert set(members) <= set(names)
    assert sibling_units([*names, *names]) == units

"""transformers' conversions, run on symbols, say what they do to tensors; what is more than a rearrangement is refused.

This file fails by name when transformers moves what `families.transformers_tables` stands on.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.core_model_loading as core
from transformers import conversion_mapping

from fp8ckpt import load_pretrained
from fp8ckpt.errors import ModelMismatchError, UnsupportedFormatError
from fp8ckpt.families.transformers_tables import assemble, configured_model
from fp8ckpt.tensors.assembly import Assembly
from tests.distributed import rewrite
from tests.families.releases import RELEASES
from tests.oracle import Stored


def conversions() -> dict[str, tuple[list[str], list[str], list[Any], list[tuple[int, ...]]]]:
    """By name: source patterns, targets, operations, the shapes of the sources."""
    one, many = ["w.*.a"], ["w.*.a", "w.*.b"]
    merge = [core.MergeModulelist(0), core.Concatenate(1)]
    return {
        "merge": (one, ["w.x"], [core.MergeModulelist(0)], [(3, 4)] * 3),
        "merge and concatenate": (many, ["w.x"], merge, [(4, 5)] * 6),
        "transpose": (many, ["w.x"], [*merge, core.Transpose(1, 2)], [(4, 5)] * 6),
        "chunk": (["w.a"], ["w.x", "w.y", "w.z"], [core.Chunk(0)], [(12, 5)]),
        "interleave": (["w.a"], ["w.x"], [core.Interleave(1)], [(3, 8, 5)]),
        "interleave back": (["w.a"], ["w.x"], [core.Interleave(0, inverse=True)], [(8, 5)]),
        "interleave and chunk": (["w.a"], ["w.x", "w.y"], [core.Interleave(0), core.Chunk(0)], [(8, 5)]),
        "rope": (["w.a"], ["w.x"], [core.PermuteForRope(permute_layer_names=["a"])], [(16, 5)]),
        "rope of a vector": (["w.a"], ["w.x"], [core.PermuteForRope(permute_layer_names=["a"])], [(16,)]),
        "split modules": (["w.a"], ["w.*.x"], [core.SplitModulelist(0)], [(3, 4, 5)]),
    }  # fmt: skip


class _Model:
    """What a conversion asks of a model."""

    class config:  # noqa: N801  # an attribute, of which one is read
        num_attention_heads = 2


@pytest.mark.parametrize("case", conversions())
def test_symbols_go_the_way_of_tensors(case: str) -> None:
    """Each operation of transformers gives, on symbols, the assembly of what it gives on tensors."""
    from fp8ckpt.families.transformers_tables import _Symbol

    sources, targets, operations, shapes = conversions()[case]
    tensors, symbols = {}, {}
    at = 0
    for i, shape in enumerate(shapes):
        pattern = sources[i % len(sources)]
        size = int(torch.tensor(shape).prod())
        tensors.setdefault(pattern, []).append(torch.arange(at, at + size).reshape(shape))
        symbols.setdefault(pattern, []).append(_Symbol.of(Assembly.whole(f"s{i}", shape)))
        at += size
    values = {
        symbol.assembly.pieces[0].source: t for p in tensors for t, symbol in zip(tensors[p], symbols[p], strict=True)
    }
    for operation in operations:
        keys = {"source_patterns": sources, "target_patterns": targets, "config": _Model.config}
        tensors, symbols = operation.convert(tensors, **keys), operation.convert(symbols, **keys)
    assert tensors.keys() == symbols.keys()
    for key, tensor in tensors.items():
        assembly = symbols[key].assembly
        assert assembly.shape == tensor.shape
        made = torch.full(assembly.shape, -1)
        for p in assembly.pieces:
            offsets, sizes = p.source_region
            part = values[p.source][tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            kept = [axis for axis in p.axes if axis >= 0]
            part = part.permute([*kept, *(a for a in range(part.ndim) if a not in kept)]).reshape(p.sizes)
            made[tuple(slice(o, o + n) for o, n in zip(p.offsets, p.sizes, strict=True))] = part
        assert torch.equal(made, tensor)


class _Doubles(core.ConversionOps):
    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
        return {target_patterns[0]: next(iter(input_dict.values()))[0] * 2}


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_a_conversion_that_computes_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are not the file's own are nothing that can be loaded by regions: tensor and function are named."""
    model = RELEASES["Qwen3"].skeleton()
    rule = core.WeightConverter("q_proj.weight", "q_proj.weight", [_Doubles()])
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", lambda _: [rule])
    with pytest.raises(UnsupportedFormatError, match=r"layers\.0\.self_attn\.q_proj\.weight: .*Tensor\.mul"):
        assemble(model, _shapes(model), _shapes(model))


def test_a_release_without_some_of_its_experts_is_refused(tmp_path: Path) -> None:
    """One expert less, or one of its projections: the stacked tensor is named, and never filled in part."""
    path = RELEASES["Qwen3-MoE"].write(tmp_path / "whole")

    def without(*leaves: str) -> Path:
        gone = [f"layers.1.mlp.experts.3.{leaf}.weight" for leaf in leaves]
        return rewrite(
            path, tmp_path / leaves[0], lambda t: {k: v for k, v in t.items() if not any(g in k for g in gone)}
        )

    with pytest.raises(ModelMismatchError, match=r"model\.layers\.1\.mlp\.experts\.down_proj.*expected \(3, "):
        load_pretrained(without("down_proj"))
    with pytest.raises(UnsupportedFormatError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: 7 tensors"):
        load_pretrained(without("gate_proj"))


def test_experts_with_gaps_in_their_numbers_are_refused() -> None:
    """As many as the model has, and others: transformers stacks them all the same, each in another's place."""
    model = RELEASES["Qwen3-MoE"].skeleton()
    own = _shapes(model)
    stored = _shapes(model)
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        up, down = stored.pop(f"{experts}.gate_up_proj"), stored.pop(f"{experts}.down_proj")
        for number in (0, 1, 2, 7) if layer else range(4):
            matrices = {"gate_proj": (up[1] // 2, up[2]), "up_proj": (up[1] // 2, up[2]), "down_proj": down[1:]}
            stored |= {f"{experts}.{number}.{leaf}.weight": shape for leaf, shape in matrices.items()}
    with pytest.raises(
        UnsupportedFormatError, match=r"layers\.1\.mlp\.experts\.\w+: .* numbered up to 7, and 3, 4, 5, 6 are missing"
    ):
        assemble(model, own, stored)
    renamed = {name.replace("experts.7.", "experts.3."): shape for name, shape in stored.items()}
    assert assemble(model, own, renamed).parts.keys() == own.keys()


def test_experts_that_may_be_transposed_or_not_are_refused() -> None:
    """Where transformers has no rule, the class says nothing and the shape fits both, there is no guessing."""
    model = RELEASES["Qwen3-VL-MoE"].skeleton()
    own = _shapes(model)
    stored = {}
    for name, shape in own.items():
        if name.endswith("gate_up_proj"):
            own[name] = (shape[0], 64, 64)
            stored |= {
                name.replace("gate_up_proj", f"{i}.{p}.weight"): (32, 64)
                for i in range(4)
                for p in ("gate_proj", "up_proj")
            }
        elif name.endswith("experts.down_proj"):
            stored |= {name.replace("down_proj", f"{i}.down_proj.weight"): shape[1:] for i in range(4)}
        else:
            stored[name] = shape
    assert assemble(model, own, stored).parts.keys() == own.keys()  # the class is known
    for module in model.modules():
        if type(module).__name__ == "Qwen3VLMoeTextExperts":
            del module.is_transposed
            module.__class__ = type("SomeOtherExperts", (type(module),), {})
    with pytest.raises(UnsupportedFormatError, match=r"gate_up_proj: experts of SomeOtherExperts .* transposed or not"):
        assemble(model, own, stored)


def test_two_names_of_one_tensor_are_not_taken_for_one() -> None:
    """Where two tensors of a file would be one of the model, one of them is left over, and named as such."""
    model = RELEASES["Mistral3 nested"].skeleton()
    own = _shapes(model)
    made = assemble(model, own, {**own, "language_model.lm_head.weight": own["lm_head.weight"]})
    assert len(made.unused) == 1


def test_infinities_of_a_configuration_are_floats() -> None:
    """JSON has none, and transformers writes an object for one: Nemotron-H's and Granite's limits of a time step."""
    config = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "num_hidden_layers": 1}
    model = configured_model({**config, "time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert list(model.config.time_step_limit) == [0.0, float("inf")]


@pytest.mark.parametrize("config", [
    transformers.LlavaConfig(architectures=["LlavaForConditionalGeneration"]),
    transformers.Sam3Config(architectures=["Sam3Model"]),  # a configuration in one that is in another
    transformers.ApertusConfig(architectures=["ApertusForCausalLM"]),  # its activation has parameters of its own
], ids=lambda config: config.model_type)  # fmt: skip
def test_the_dtype_asked_for_is_that_of_every_part(config: Any) -> None:
    """Whatever the configurations of the parts state; and what is given stays as it was."""

    def stating(given: dict[str, Any]) -> dict[str, Any]:
        parts = {key: stating(part) for key, part in given.items() if key.endswith("_config") and part}
        return {**given, **parts, "dtype": "bfloat16"}

    given = stating(config.to_dict())
    before = deepcopy(given)
    for dtype in (torch.float32, torch.float16):
        assert {parameter.dtype for parameter in configured_model(given, dtype).parameters()} == {dtype}
    assert given == before
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Llama-4"])
@pytest.mark.parametrize("lacking", [r"experts\.3\.down_proj", r"experts\.2\.up_proj", r"experts\.\d\.gate_proj"])
def test_a_lacking_expert_is_named(name: str, lacking: str, tmp_path: Path) -> None:
    """Whoever stacks them, transformers or our own rows; none is left as it was."""

    def without(tensors: dict[str, Stored]) -> dict[str, Stored]:
        return {key: tensor for key, tensor in tensors.items() if not re.search(lacking, key)}

    path = rewrite(RELEASES[name].write(tmp_path / "whole"), tmp_path / "part", without)
    with pytest.raises((UnsupportedFormatError, ModelMismatchError), match=r"experts"):
        load_pretrained(path)

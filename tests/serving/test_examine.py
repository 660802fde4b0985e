"""What serving engines need: each point passes on a directory that has it, and is named on one that has not."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, Mistral3ForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from fp8ckpt import convert, sample, verify
from fp8ckpt.errors import ServingError
from fp8ckpt.sample import DeepseekSizes
from fp8ckpt.serving.examine import Servability, examine
from fp8ckpt.serving.joining import TensorParallel
from fp8ckpt.serving.listing import serving_config
from fp8ckpt.serving.skip_list import SkipList, unquantized_parts
from fp8ckpt.tensors.checkpoint import survey
from tests.catalogue import TORN, Row, catalogue, in_four_bits
from tests.conftest import Run
from tests.miniatures import families
from tests.oracle import Stored, read_directory, read_safetensors, write_safetensors
from tests.support import examples
from tests.test_architecture import heavy_modules
from tests.test_four_bits import with_siblings
from tests.test_verify import copy, holder, replace

FAMILIES = families()
LAYER = "model.language_model.layers.0"
UP, Q, K = f"{LAYER}.mlp.up_proj", f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj"
VISION = "model.vision_tower.transformer.layers.0.attention.q_proj"


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def rewrite(directory: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Change ``config.json`` in place."""
    config = read_config(directory)
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def complete(directory: Path, static: bool) -> Path:
    """Write the configuration that engines need."""
    (directory / "config.json").write_text(json.dumps(serving_config(survey(directory), static=static)))
    return directory


def build(directory: Path, tensors: dict[str, Stored], quantization: dict[str, Any] | None, **config: Any) -> Path:
    """A directory of one file."""
    directory.mkdir(parents=True)
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    config |= {} if quantization is None else {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def fp8(
    module: str, *shape: int, scale: tuple[int, ...] = (), value: float = 0.5, activation: bool = False
) -> dict[str, Stored]:
    """An FP8 weight with its scale (and its activation scale)."""
    found = {
        f"{module}.weight": Stored.codes(np.full(shape or (4, 4), 0x38, np.uint8)),
        f"{module}.weight_scale_inv": Stored.of(np.full(scale, value, np.float32), "F32"),
    }
    return found | ({f"{module}.activation_scale": Stored.of(np.array(1, np.float32), "F32")} if activation else {})


def plain(module: str, *shape: int) -> dict[str, Stored]:
    return {f"{module}.weight": Stored.of(np.ones(shape or (4, 4), np.float32), "BF16")}


def bf16(shape: tuple[int, ...], value: float = 1, dtype: str = "BF16") -> Stored:
    return Stored.of(np.full(shape, value, np.float32), dtype)


def tiled(module: str, *shape: int, value: float = 0.5) -> dict[str, Stored]:
    """An FP8 matrix, or a stack, in blocks of 128."""
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return fp8(module, *shape, scale=grid, value=value)


DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
STATIC = {**DYNAMIC, "activation_scheme": "static"}
BLOCKS = {**DYNAMIC, "weight_block_size": [128, 128]}
M = "model.layers.0.mlp"
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"


def examined(directory: Path) -> Servability:
    return examine(survey(directory))


def told(directory: Path, **options: Any) -> Servability:
    """What is said of a sound directory: each failure in one line, with what is expected and what to do."""
    result = verify(directory, serving=True, **options)
    assert result.defects == ()
    assert result.serving is not None
    assert result.ok == (result.serving.failures == ())
    for failure in result.serving.failures:
        assert "\n" not in failure.message
        assert failure.expected
        assert failure.remedy
    return result.serving


def only_failure(directory: Path) -> ServingError:
    (failure,) = told(directory).failures
    return failure


def judge(tensors: dict[str, Stored], quantization: dict[str, Any] | None, **config: Any) -> Servability:
    """What is said of a directory of one file."""
    with tempfile.TemporaryDirectory() as folder:
        return told(build(Path(folder) / "x", tensors, quantization, **config))


def pair(having: int) -> dict[str, Stored]:
    """Two FP8 weights, of which so many have an activation scale."""
    return fp8("m.q", activation=having > 0) | fp8("m.k", activation=having > 1)


def begin(sentences: Iterable[str], words: Iterable[str]) -> bool:
    return all(sentence.startswith(start) for sentence, start in zip(sentences, words, strict=True))


def case(
    name: str,
    tensors: dict[str, Stored],
    quantization: dict[str, Any] | None,
    *failures: str,
    notes: Sequence[str] | None = None,
    **config: Any,
) -> ParameterSet:
    """How the failures begin, and the notes, where they are no matter of indifference."""
    return pytest.param(tensors, {"quantization": quantization, **config}, failures, notes, id=name)


@pytest.fixture
def good(sample_fp8: Path, tmp_path: Path) -> Path:
    """The miniature Mistral3 checkpoint as it should be served, for a test to spoil."""
    return complete(copy(sample_fp8, tmp_path / "good"), static=True)


@pytest.fixture(params=["identity", "nested"])
def released(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The miniature as it is released, in both layouts."""
    return sample(tmp_path / "released", layout=request.param)


def test_the_released_list_is_named_and_completed(released: Path) -> None:
    """vLLM skips nothing by the three prefixes; `serving_config` lists all names, and changes nothing else."""
    failure = only_failure(released)
    linears = [
        name.removesuffix(".weight")
        for name, tensor in read_directory(released).items()
        if tensor.dtype == "BF16" and len(tensor.shape) == 2 and "embed" not in name and "lm_head" not in name
    ]
    assert failure.found.startswith(f"{len(linears)} unquantized Linears are not in modules_to_not_convert: ")
    assert failure.file == "config.json"
    before = read_config(released)
    complete(released, static=True)
    after = read_config(released)
    assert verify(released, serving=True).ok
    listed = after["quantization_config"].pop("modules_to_not_convert")
    first = before["quantization_config"].pop("modules_to_not_convert")
    assert after == before
    assert listed[:3] == first
    assert sorted(listed[3:]) == sorted(linears)
    assert serving_config(survey(released), static=True) == read_config(released)


def test_transformers_reads_the_completed_list_as_we_do(good: Path) -> None:
    """Of the Linears of the model, transformers converts those that are FP8 in the file and no others."""
    listed = read_config(good)["quantization_config"]["modules_to_not_convert"]
    stored = read_directory(good)
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(AutoConfig.from_pretrained(good))
    linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert len(linears) > 20
    for name in linears:
        assert should_convert_module(name, listed) == (stored[f"{name}.weight"].dtype == "F8_E4M3")


#: Whole blocks wherever engines join or share out, as DeepSeek's own sizes are.
WHOLE = DeepseekSizes(
    hidden=256, intermediate=512, expert_intermediate=256, q_rank=128, kv_rank=128, heads=8, nope_dim=48, v_dim=32
)


def test_the_block_sample_needs_nothing(tmp_path: Path) -> None:
    """As DeepSeek V3 is released, without a list: heads and routers are left alone by engines."""
    directory = sample(tmp_path / "fp8", WHOLE)
    result = verify(directory, serving=True)
    assert result.ok
    assert result.serving is not None
    assert result.serving.failures == ()
    (note,) = result.serving.notes
    assert "kv_a_proj_with_mqa" in note
    assert TORN in note
    assert serving_config(survey(directory), static=False) == read_config(directory)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("files", [1, 2])
def test_every_family_can_be_examined(name: str, files: int, tmp_path: Path) -> None:
    """No family raises, and the completed configuration leaves no gap in a list that the configuration states."""
    directory = FAMILIES[name].write(tmp_path / "x", files)
    examined(directory)
    static = any(tensor.activation_scales for tensor in survey(directory).quantized)
    complete(directory, static=static)
    messages = [failure.message for failure in examined(directory).failures]
    assert not [message for message in messages if "are not in" in message]
    assert not [message for message in messages if "no configuration says so" in message]
    assert serving_config(survey(directory), static=static) == read_config(directory)


ROWS = {**catalogue(), **in_four_bits()}


@pytest.mark.parametrize(("name", "row"), ROWS.items(), ids=[*ROWS])
def test_every_row_of_the_catalogue(name: str, row: Row, tmp_path: Path) -> None:
    """Failures and notes of each release are those pinned; what is not read is refused. docs/formats.md has each."""
    docs = Path(__file__).parents[2] / "docs/formats.md"
    assert row.docs in docs.read_text()
    checkpoint = survey(row.write(tmp_path / "x"))
    assert [type(defect) for defect in checkpoint.defects] == ([] if row.refused is None else [row.refused])
    if row.refused is not None:
        return
    assert {tensor.name for tensor in checkpoint.quantized} == {row.family.name(codes) for codes in row.family.blocks}
    found = examine(checkpoint)
    for said, pinned in (([failure.found for failure in found.failures], row.failures), (found.notes, row.notes)):
        assert len(said) == len(pinned), (name, said)
        assert all(words in sentence for sentence, words in zip(said, pinned, strict=True))


def q(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]
    return found


@pytest.mark.parametrize(("edit", "found"), [
    (lambda c: c.pop("quantization_config"), "the weights are FP8, but no configuration says so"),
    (lambda c: q(c).pop("quant_method"), "quant_method is missing"),
    (lambda c: q(c).pop("activation_scheme"), "activation_scheme is missing"),
    (lambda c: q(c).update(activation_scheme="sometimes"), "activation_scheme is sometimes"),
    (lambda c: q(c).update(activation_scheme="dynamic"), "14 of 14 FP8 tensors have an activation scale"),
    (lambda c: q(c)["modules_to_not_convert"].remove(VISION),
     f"1 unquantized Linears are not in modules_to_not_convert: {VISION}"),
    (lambda c: q(c)["modules_to_not_convert"].remove("model.vision_tower"),
     "1 parts of the model that hold nothing FP8 are not in modules_to_not_convert: model.vision_tower"),
    (lambda c: q(c)["modules_to_not_convert"].append(UP), f"1 FP8 tensors are in modules_to_not_convert: {UP}"),
    (lambda c: q(c)["modules_to_not_convert"].append("up_proj"), "2 FP8 tensors are in modules_to_not_convert"),
    (lambda c: q(c)["modules_to_not_convert"].append(LAYER), "7 FP8 tensors are in modules_to_not_convert"),
    (lambda c: q(c)["modules_to_not_convert"].append("*down_proj"), "2 FP8 tensors are in modules_to_not_convert"),
    (lambda c: q(c)["modules_to_not_convert"].append(r"re:.*layers\.0.*down_proj"),
     "1 FP8 tensors are in modules_to_not_convert"),
    (lambda c: c.update(tie_word_embeddings=True), "the head differs from model.language_model.embed_tokens.weight"),
])  # fmt: skip
def test_a_wrong_configuration_is_named(good: Path, edit: Callable[[dict[str, Any]], object], found: str) -> None:
    """Each statement that an engine reads, missing or wrong."""
    assert verify(good, serving=True).ok
    failure = only_failure(rewrite(good, edit))
    assert failure.found.startswith(found)


def test_the_configuration_may_be_nested(good: Path) -> None:
    """Quantization that is stated in ``text_config`` is found and completed there."""

    def nest(config: dict[str, Any]) -> None:
        config["text_config"]["quantization_config"] = config.pop("quantization_config")
        config["text_config"]["quantization_config"]["modules_to_not_convert"] = []

    assert {failure.found[:2] for failure in examined(rewrite(good, nest)).failures} == {"17", "2 "}
    complete(good, static=True)
    assert "quantization_config" not in read_config(good)
    assert examined(good).failures == ()


def test_a_configuration_is_made_where_there_is_none(good: Path) -> None:
    """Method, scheme, block size and both forms of the list, heads included; the rest is kept."""
    before = read_config(good)
    wanted = before["quantization_config"]
    complete(rewrite(good, lambda config: config.pop("quantization_config")), static=True)
    made = read_config(good)
    quantization = made["quantization_config"]
    assert {key: quantization[key] for key in ("quant_method", "activation_scheme", "weight_block_size")} == {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
    }
    assert set(quantization["modules_to_not_convert"]) == set(wanted["modules_to_not_convert"])
    assert {**made, "quantization_config": wanted} == before
    assert verify(good, serving=True).ok
    assert serving_config(survey(good), static=False)["quantization_config"]["activation_scheme"] == "dynamic"


def test_activation_scales_are_all_there_or_none(good: Path) -> None:
    """Some but not all fails under either scheme; none is right under dynamic alone. One failure, with a count."""
    replace(good, f"{UP}.activation_scale", lambda _: None)
    failure = only_failure(good)
    assert failure.found == "1 of 14 FP8 tensors have no activation scale"
    assert failure.tensor == f"{UP}.weight"
    assert failure.expected == "one for each, by config.json"
    assert [f.found for f in examined(complete(good, static=False)).failures] == [
        "13 of 14 FP8 tensors have an activation scale"
    ]
    for name in read_directory(good):
        if name.endswith(".activation_scale"):
            replace(good, name, lambda _: None)
    assert verify(good, serving=True).ok
    assert only_failure(complete(good, static=True)).found == "14 of 14 FP8 tensors have no activation scale"


def compressed_tensors(dynamic: bool | None, ignore: list[str]) -> dict[str, Any]:
    group = {"weights": {"strategy": "tensor"}, "input_activations": None if dynamic is None else {"dynamic": dynamic}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ignore}


def quark(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "quark", "exclude": [], "global_quant_config": {"weight": {}, **inputs}}


MIXED_GROUPS = {f"group_{i}": {"input_activations": {"dynamic": bool(i)}} for i in range(2)}


@pytest.mark.parametrize(("quantization", "fit"), [
    (compressed_tensors(True, []), {0}),
    (compressed_tensors(False, []), {2}),
    (compressed_tensors(None, []), {0}),
    ({"quant_method": "compressed-tensors", "config_groups": MIXED_GROUPS, "ignore": []}, {0, 1, 2}),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, {2}),
    ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, {0}),
    ({"quant_method": "torchao"}, {0, 2}),
    (quark({"input_tensors": {"is_dynamic": True}}), {0}),
    (quark({"input_tensors": {"is_dynamic": False}}), {2}),
    (quark({}), {0, 2}),
])  # fmt: skip
@pytest.mark.parametrize("having", [0, 1, 2])
def test_each_method_says_static_in_its_own_way(quantization: dict[str, Any], fit: set[int], having: int) -> None:
    """Of two weights, how many may have an activation scale: all where it is static, none where it is dynamic."""
    assert (judge(pair(having), quantization).failures == ()) == (having in fit)


@pytest.mark.parametrize(("o", "up", "fit"), [(True, False, True), (False, False, False), (True, True, False)])
def test_each_module_has_the_activation_scales_of_its_own_group(o: bool, up: bool, fit: bool) -> None:
    """Groups of compressed-tensors, and ModelOpt's layers: one static, one dynamic."""
    tensors = fp8("m.o_proj", activation=o) | fp8("m.up_proj", activation=up)
    groups = {
        "group_0": {"targets": ["re:.*o_proj"], "weights": {}, "input_activations": {"dynamic": False}},
        "group_1": {"targets": ["Linear"], "weights": {}, "input_activations": {"dynamic": True}},
    }
    layers = {"m.o_proj": {"quant_algo": "FP8"}, "m.up_proj": {"quant_algo": "MXFP8"}}
    for quantization in (
        {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": []},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers},
    ):
        assert (judge(tensors, quantization).failures == ()) == fit


@pytest.mark.parametrize(("method", "key", "entry"), [
    ("compressed-tensors", "ignore", "re:.*router.*"),
    ("modelopt", "exclude_modules", "*router*"),
    ("fbgemm_fp8", "modules_to_not_convert", "a.router_x"),
    ("mxfp8", "ignored_layers", "a"),
])  # fmt: skip
def test_other_families_keep_their_own_list(method: str, key: str, entry: str, tmp_path: Path) -> None:
    """Each unquantized Linear is matched by the family's own list, which is completed; no prefixes, no other key."""
    tensors = fp8("m.q") | plain("a.router_x") | plain("lm_head")
    quantization = {"quant_method": method, key: [entry]}
    directory = build(tmp_path / "x", tensors, quantization)
    assert only_failure(directory).found == f"1 unquantized Linears are not in {key}: lm_head"
    complete(directory, static=False)
    assert read_config(directory)["quantization_config"] == {"quant_method": method, key: [entry, "lm_head"]}
    assert examined(directory).failures == ()
    directory = build(tmp_path / "y", tensors, {"quant_method": method})
    lacks = "2 unquantized Linears" if method == "compressed-tensors" else "1 unquantized Linears"  # the head, too
    assert only_failure(directory).found.startswith(f"{lacks} are not in {key}: a.router_x")
    complete(directory, static=False)
    assert sorted(read_config(directory)["quantization_config"][key]) == ["a.router_x", "lm_head"]


def test_a_list_in_modelopts_own_file_counts(tmp_path: Path) -> None:
    """``hf_quant_config.json`` states method and list; ``config.json`` need not, and is left as it is."""
    directory = build(tmp_path / "x", fp8("m.q", activation=True) | plain("a.b") | plain("lm_head"), None)
    (directory / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": ["a.*"]}})
    )
    failure = only_failure(directory)
    assert (failure.found, failure.file) == (
        "1 unquantized Linears are not in exclude_modules: lm_head",
        "hf_quant_config.json",
    )
    assert serving_config(survey(directory), static=False) == {}


def test_routers_may_be_listed_by_their_leaf(tmp_path: Path) -> None:
    """MiniMax M2 lists leaf names: enough for routers and heads, which engines leave alone, and for nothing else."""
    tensors = fp8("model.layers.0.attn.q_proj") | plain("model.layers.0.moe.gate") | plain("lm_head")
    for listed in (["gate", "e_score_correction_bias", "lm_head"], None):
        assert judge(tensors, {**DYNAMIC, "modules_to_not_convert": listed}).failures == ()
    (failure,) = judge(tensors, {**DYNAMIC, "modules_to_not_convert": ["lm_head"]}).failures
    assert "model.layers.0.moe.gate" in failure.found
    listed, o_proj = ["gate", "o_proj", "lm_head"], "model.layers.0.attn.o_proj"
    directory = build(tmp_path / "d", tensors | plain(o_proj), {**DYNAMIC, "modules_to_not_convert": listed})
    assert o_proj in only_failure(directory).found
    assert q(serving_config(survey(directory), static=False))["modules_to_not_convert"] == [*listed, o_proj]


def test_both_keys_of_a_list_are_read(tmp_path: Path) -> None:
    """vLLM reads ``ignored_layers`` first, transformers ``modules_to_not_convert``: each of them must be complete."""
    tensors = fp8("m.q") | plain("lm_head")
    both = {**DYNAMIC, "modules_to_not_convert": ["lm_head"], "ignored_layers": ["x"]}
    directory = build(tmp_path / "x", tensors, both)
    assert only_failure(directory).found == "1 unquantized Linears are not in ignored_layers: lm_head"
    assert q(serving_config(survey(directory), static=False)) == {**both, "ignored_layers": ["x", "lm_head"]}
    assert judge(tensors, {**DYNAMIC, "ignored_layers": ["lm_head"]}).failures == ()


def test_the_models_own_names_count_in_the_nested_layout(tmp_path: Path) -> None:
    """A list may name modules as on disk or as in the model; and what is FP8 may be in it under neither name."""
    quantized, gate = "language_model.model.layers.0.q_proj", "language_model.model.layers.0.mlp.gate"
    tensors = fp8(quantized) | plain("vision_tower.fc1") | plain(gate)
    native = ["model.vision_tower", "model.vision_tower.fc1", "model.language_model.layers.0.mlp.gate"]
    for i, listed in enumerate((native, ["vision_tower", "vision_tower.fc1", gate])):
        directory = build(tmp_path / str(i), tensors, {**DYNAMIC, "modules_to_not_convert": listed})
        assert examined(directory).failures == ()
        assert serving_config(survey(directory), static=False) == read_config(directory)
    listed = [*native, "model.language_model.layers.0.q_proj"]
    (failure,) = judge(tensors, {**DYNAMIC, "modules_to_not_convert": listed}).failures
    assert failure.found == f"1 FP8 tensors are in modules_to_not_convert: {quantized}"


def test_parts_of_a_model() -> None:
    """The shortest prefixes with nothing FP8 below them, and none inside a stack of layers."""
    quantized = ["model.language_model.layers.0.q", "model.language_model.layers.1.q"]
    linears = [
        "model.visual.blocks.0.qkv", "model.visual.merger.fc", "lm_head", "model.language_model.layers.0.gate",
        "proj.linear_1",
    ]  # fmt: skip
    assert unquantized_parts(linears, quantized) == ["model.visual", "lm_head", "proj"]
    assert unquantized_parts(["model.vision.a.fc", "model.vision.b.fc"], ["model.vision.b.q", "model.x"]) == [
        "model.vision.a",
        "model.vision.b.fc",
    ]


@given(
    st.lists(st.sampled_from(["a", "b", "a.b", "b.a", "a.b.c", "re:a.*c", "*b", "c", "x"])),
    st.sampled_from(["a", "a.b", "a.b.c", "x.a.b", "xa.b", "c.a"]),
)
def test_a_skip_list_says_what_its_entries_say(entries: list[str], module: str) -> None:
    """The quick look-up is the same as asking each entry."""
    from fp8ckpt.tensors.config import skips

    assert SkipList.of(entries).reaches(module) == any(skips(entry, module) for entry in entries)


_MODULES = [
    *(f"model.language_model.layers.{i}.{leaf}"
      for i in range(2) for leaf in ("attn.q_proj", "attn.k_proj", "mlp.gate", "mlp.gate_proj")),
    *(f"model.vision_tower.layers.{i}.{leaf}" for i in range(2) for leaf in ("q_proj", "fc1")),
    "model.projector.linear_1", "model.projector.linear_2", "lm_head",
]  # fmt: skip


@examples(60)
@given(
    st.dictionaries(st.sampled_from(_MODULES), st.booleans(), min_size=1).filter(lambda chosen: any(chosen.values())),
    st.none()
    | st.lists(
        st.sampled_from([*_MODULES, "model.vision_tower", "gate", "re:.*fc1", "*linear_2", "visual"]), max_size=6
    ),
)
def test_no_gap_is_left(chosen: dict[str, bool], listed: list[str] | None) -> None:
    """The completed list has no gap and keeps its order, whatever is quantized and listed; transformers agrees."""
    listed = None if listed is None else [entry for entry in dict.fromkeys(listed) if not chosen.get(entry)]
    tensors: dict[str, Stored] = {}
    for module, is_fp8 in chosen.items():
        tensors |= fp8(module) if is_fp8 else plain(module)
    with tempfile.TemporaryDirectory() as folder:
        directory = build(Path(folder) / "x", tensors, {**DYNAMIC, "modules_to_not_convert": listed})
        completed = q(serving_config(survey(directory), static=False))["modules_to_not_convert"]
        complete(directory, static=False)
        failures = examined(directory).failures
        again = serving_config(survey(directory), static=False)
        assert again == read_config(directory)
    assert not [failure for failure in failures if "are not in" in failure.found]
    assert (completed or [])[: len(listed or [])] == (listed or [])
    if not listed:
        assert not [failure for failure in failures if "engines join" not in failure.found]
    plain_entries = [entry for entry in completed or [] if "*" not in entry]
    for module, is_fp8 in chosen.items():
        left_alone = module == "lm_head" or module.endswith(".gate")
        if not is_fp8 and (completed or not left_alone):
            assert module in completed or left_alone
            assert not should_convert_module(module, plain_entries)
        if is_fp8 and not listed:
            assert should_convert_module(module, plain_entries)


def write(name: str, text: str = "{}") -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


def add_consolidated(directory: Path) -> None:
    write_safetensors(directory / "consolidated.safetensors", plain("layers.0.wq"), {"format": "pt"})


def drop_format(directory: Path) -> None:
    file = holder(directory, f"{UP}.weight")
    write_safetensors(file, read_safetensors(file), {"made_by": "a test"})


@pytest.mark.parametrize(("spoil", "file", "found"), [
    (add_consolidated, "consolidated.safetensors", "Mistral's own copy of the weights is beside the others"),
    (write("params.json"), "params.json", "Mistral's own configuration is beside"),
    (write("pytorch_model.bin"), "pytorch_model.bin", "weights in another format"),
    (write("x.gguf"), "x.gguf", "weights in another format"),
    (write("original.pth"), "original.pth", "weights in another format"),
    (write("hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}'), "hf_quant_config.json",
     "it states quantization by ModelOpt, but config.json states fp8"),
    (lambda d: (d / "model.safetensors.index.json").unlink(), "model-00001-of-00003.safetensors",
     "3 safetensors files without an index"),
    (drop_format, None, "the metadata does not say what wrote it, in 1 of 3 files"),
])  # fmt: skip
def test_files_that_would_be_served_instead(
    good: Path, spoil: Callable[[Path], object], file: str | None, found: str
) -> None:
    """Each leftover, a missing index, and metadata without a format."""
    spoil(good)
    failure = only_failure(good)
    assert failure.found.startswith(found)
    assert file is None or failure.file == file


def test_a_trainers_files_are_no_weights(good: Path) -> None:
    """What trainers leave beside a model is not taken for one, and subfolders are not looked into."""
    write("training_args.bin")(good)
    (good / "original").mkdir()
    write("original/params.json")(good)
    assert verify(good, serving=True).ok


@pytest.mark.parametrize(("tied", "head", "found"), [
    (True, {}, []),
    (True, plain(HEAD, 8, 4), []),
    (True, {f"{HEAD}.weight": bf16((8, 4), 2)}, ["the head differs from model.embed_tokens.weight"]),
    (True, {f"{HEAD}.weight": bf16((8, 4), dtype="F32")}, ["the head differs from"]),
    (True, plain(HEAD, 9, 4), ["the head differs from"]),
    (True, fp8(HEAD, 8, 4), ["the head differs from"]),
    (False, plain(HEAD, 9, 4), []),
    (False, {}, ["tie_word_embeddings is false, but no head is stored"]),
    (None, {}, []),
    (None, plain(HEAD, 9, 4), []),
])  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_tied_heads(tied: bool | None, head: dict[str, Stored], found: list[str], nested: bool) -> None:
    """A tied head equals the embeddings or is absent; one that is not tied is there; otherwise nothing is asked."""
    config: dict[str, Any] = {} if tied is None else {"tie_word_embeddings": tied}
    config = {"text_config": config} if nested else config
    assert begin([failure.found for failure in judge(EMBEDDED | head, DYNAMIC, **config).failures], found)


def test_unequal_second_levels_are_a_note(tmp_path: Path) -> None:
    """Of NVFP4, whose groups state a size: engines take one for all that they join."""
    for name, other in (("equal", 1.0), ("unequal", 2.0)):
        family, _ = with_siblings(divides=False)
        family.tensors["model.layers.0.k_proj.weight_scale_2"] = Stored.of(
            family.tensors["model.layers.0.q_proj.weight_scale_2"].array * np.float32(other), "F32"
        )
        family.tensors["model.layers.0.v_proj.weight_scale_2"] = family.tensors["model.layers.0.q_proj.weight_scale_2"]
        result = examined(family.write(tmp_path / name))
        notes = [note for note in result.notes if "unequal second levels of scales" in note]
        assert [note.startswith("1 of 2 groups") for note in notes] == [True] * (other != 1)


def test_mistrals_own_layout_alone(tmp_path: Path) -> None:
    """No ``config.json`` and no index are asked of it; all its scales are checked against ``params.json``."""

    def native(name: str, scheme: str | None, activation: bool, scale: tuple[int, ...] = ()) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for i, leaf in enumerate(("wq", "wk")):
            weight = fp8("w")["w.weight"]
            tensors = {f"layers.0.{leaf}.weight": weight, f"layers.0.{leaf}.qscale_weight": bf16(scale, 1.0 + i)}
            tensors |= {f"layers.0.{leaf}.qscale_act": bf16(())} if activation else {}
            file = directory / f"consolidated-{i + 1:05d}-of-00002.safetensors"
            write_safetensors(file, tensors | plain(f"vision.{leaf}"), {"format": "pt"})
        if scheme is not None:
            quantization = {"qformat_weight": "fp8_e4m3", "qscheme_act": scheme}
            (directory / "params.json").write_text(json.dumps({"dim": 4, "quantization": quantization}))
        return directory

    for name, scheme, activation in (("a", "TENSOR", True), ("b", "NO_SCALES", False)):
        result = examined(native(name, scheme, activation))
        assert result.failures == ()
        (note,) = result.notes
        assert note.endswith("the first is layers.0.wq.weight, layers.0.wk.weight")
    for name, wrong, found in (
        ("c", ("TENSOR", False), "2 of 2 FP8 tensors have no activation scale; "),
        ("d", ("NO_SCALES", True), "2 of 2 FP8 tensors have an activation scale; "),
        ("e", ("TENSOR", True, (1, 1)), "the scale of a whole tensor has shape [1, 1]"),
        ("f", (None, False), "the weights are FP8, but no configuration says so; "),
    ):
        assert f": {found}" in only_failure(native(name, *wrong)).message  # type: ignore[arg-type]
    assert only_failure(tmp_path / "f").file == "params.json"
    (tmp_path / "f" / "params.json").write_text("{")
    assert [defect.file for defect in survey(tmp_path / "f").defects] == ["params.json"]
    assert examined(tmp_path / "f").failures == ()
    assert serving_config(survey(tmp_path / "f"), static=False) == {}


def test_what_is_not_quantized_is_served_as_it_is(sample_fp8: Path, tmp_path: Path) -> None:
    """A conversion to BF16 passes, with a note; quantization still stated, and leftovers, are named there too."""
    convert(sample_fp8, tmp_path / "bf16")
    result = verify(sample_fp8, tmp_path / "bf16", serving=True)
    assert result.ok
    assert result.serving == Servability((), ("nothing is quantized",))
    config = read_config(tmp_path / "bf16")
    assert serving_config(survey(tmp_path / "bf16"), static=True) == config
    rewrite(tmp_path / "bf16", lambda config: config.update(quantization_config=DYNAMIC))
    assert only_failure(tmp_path / "bf16").found == "it states that the weights are quantized, but none is"
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(config))
    write("model.gguf")(tmp_path / "bf16")
    assert only_failure(tmp_path / "bf16").file == "model.gguf"


def test_a_defective_directory_is_examined_as_far_as_it_goes(good: Path) -> None:
    """A missing scale, a file cut short, a configuration that is no JSON: no exception; what can be said is said."""
    write("params.json")(good)
    shutil.copytree(good, good.parent / "cut")
    shutil.copytree(good, good.parent / "config")
    shutil.copytree(good, good.parent / "empty")
    replace(good, f"{UP}.weight_scale_inv", lambda _: None)
    result = verify(good, serving=True)
    assert result.defects
    assert result.serving is not None
    assert [failure.file for failure in result.serving.failures] == ["params.json", good.name]
    assert "it has 1 defect: an engine refuses it" in result.serving.failures[-1].found

    file = holder(good.parent / "cut", f"{UP}.weight")
    file.write_bytes(file.read_bytes()[:-1000])
    assert "params.json" in [failure.file for failure in examined(good.parent / "cut").failures]
    file.write_bytes(b"")
    assert "params.json" in [failure.file for failure in examined(good.parent / "cut").failures]

    (good.parent / "config" / "config.json").write_text("{")
    found = examined(good.parent / "config")
    assert [failure.file for failure in found.failures] == ["params.json"]
    assert "the configuration cannot be understood, and was not checked" in found.notes

    for file in (good.parent / "empty").glob("*.safetensors"):
        file.write_bytes(b"")
    examined(good.parent / "empty")


def test_a_defect_is_not_held_against_the_configuration(tmp_path: Path) -> None:
    """Of a part that could not be read, or of weights that are packed, nothing is concluded."""
    packed = {"m.q.weight_packed": Stored.of(np.ones((4, 4), np.int32), "I32")}
    directory = build(
        tmp_path / "packed", packed | plain(EMBEDDINGS), compressed_tensors(None, []), tie_word_embeddings=False
    )
    result = verify(directory, serving=True)
    assert result.defects
    assert result.serving is not None
    assert [failure.expected for failure in result.serving.failures] == ["a sound checkpoint"]


@pytest.mark.parametrize("value", [None, 1, "text", [], ["x", 3, None], {}, True])
@pytest.mark.parametrize(
    "key", ["quant_method", "activation_scheme", "modules_to_not_convert", "ignored_layers", "config_groups", "ignore"]
)
def test_a_configuration_may_hold_anything(good: Path, key: str, value: object) -> None:
    """Values of the wrong kind are named, or taken for nothing; nothing raises."""
    for method in ("fp8", "compressed-tensors"):
        # The lambda is called at once.
        rewrite(good, lambda config: q(config).update({"quant_method": method, key: value}))  # noqa: B023
        examined(good)
        serving_config(survey(good), static=True)
    rewrite(good, lambda config: config.update(quantization_config=value, text_config=value, tie_word_embeddings=value))
    examined(good)
    serving_config(survey(good), static=True)


def test_serving_is_asked_for_and_of_the_last(sample_fp8: Path, good: Path) -> None:
    """Not asked for, nothing is said; of two directories the second is examined."""
    assert verify(sample_fp8).serving is None
    assert verify(sample_fp8).ok
    assert verify(sample_fp8, good, serving=True).serving == examined(good)
    swapped = verify(good, sample_fp8, serving=True)
    assert swapped.serving is not None
    assert len(swapped.serving.failures) == 1


def test_the_command_line(sample_fp8: Path, good: Path, cli: Run) -> None:
    """Failures and notes as text and as JSON; exit 1 on a failure, 0 with notes alone."""
    done = cli("verify", "--serving", sample_fp8)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    said = "  ServingError: model.multi_modal_projector.linear_1 in config.json: 17 unquantized"
    assert "failures in serving: 1" in lines
    assert [line[: len(said)] for line in lines if "ServingError" in line] == [said]
    assert any(line.startswith("note: 4 of 4 groups") for line in lines)
    assert lines[-1] == f"{sample_fp8}: not fit to be served"
    done = cli("verify", good, "--serving")
    assert done.returncode == 0
    assert "failures in serving: none" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{good}: fit to be served"
    done = cli("verify", sample_fp8, "--serving", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["ok"] is False
    (failure,) = found["serving"]["failures"]
    assert (failure["kind"], failure["file"]) == ("ServingError", "config.json")
    assert len(found["serving"]["notes"]) == 1
    assert json.loads(cli("verify", sample_fp8, "--json").stdout)["serving"] is None


def test_importing_it_is_cheap() -> None:
    """Neither torch nor numba."""
    assert heavy_modules("import fp8ckpt.serving.examine")[0] <= {"numpy"}


@pytest.mark.parametrize(("rows", "fit", "largest", "reason"), [
    (192, False, None, None),
    (1536, True, 4, f"with 8, {M}.gate_proj.weight has 192 rows, and its blocks 128"),
    (128, True, 1, f"with 2, {M}.gate_proj.weight has 64 rows, and its blocks 128"),
    (64 * 128, True, 64, None),
])  # fmt: skip
def test_blocks_that_are_joined_or_shared_out(
    rows: int, fit: bool, largest: int | None, reason: str | None, tmp_path: Path
) -> None:
    """Rows that are no whole blocks are a failure on one GPU; else it is said how many GPUs the blocks allow."""
    tensors = tiled(f"{M}.gate_proj", rows, 128) | tiled(f"{M}.up_proj", rows, 128) | tiled(f"{M}.down_proj", 128, rows)
    directory = build(tmp_path / "x", tensors, BLOCKS)
    found = examined(directory)
    assert (found.failures == ()) == fit
    assert found.tensor_parallel == (None if largest is None else TensorParallel(largest, reason))
    if not fit:
        failure = only_failure(directory)
        assert failure.found.startswith("2 FP8 tensors are joined with others and are not whole blocks: ")
        assert failure.tensor == f"{M}.gate_proj.weight"
        return
    assert largest is not None
    for size in (1, largest, 2 * largest) if reason else (64,):
        failures = told(directory, tensor_parallel=size).failures
        said = f"with a tensor-parallel size of {size}, 3 FP8 tensors are not cut into"
        assert begin([failure.found for failure in failures], [said] * (size > largest))


@pytest.mark.parametrize(("config", "largest"), [
    ({"num_key_value_heads": 2}, 16), ({"text_config": {"num_key_value_heads": 2}}, 16), ({}, 2),
])  # fmt: skip
def test_heads_of_keys_and_values_are_not_cut(config: dict[str, Any], largest: int) -> None:
    """More GPUs than such heads have one each: the configuration says how many there are, nested too."""
    rows = {"q_proj": 2048, "k_proj": 256, "v_proj": 256}
    tensors = {k: t for leaf in rows for k, t in tiled(f"model.layers.0.self_attn.{leaf}", rows[leaf], 128).items()}
    able = judge(tensors, BLOCKS, **config).tensor_parallel
    assert able is not None
    assert able.largest == largest


def test_one_scale_a_tensor_limits_nothing(good: Path) -> None:
    """No blocks, no size: and one that is asked for is fit."""
    assert examined(good).tensor_parallel is None
    assert verify(good, serving=True, tensor_parallel=8).ok
    for wrong in ({"serving": True, "tensor_parallel": 0}, {"tensor_parallel": 2}):
        with pytest.raises(ValueError, match=r"^tensor_parallel=\d; expected at least 1, with serving$"):
            verify(good, **wrong)  # type: ignore[arg-type] # a dict of options


def test_a_size_on_the_command_line(tmp_path: Path, cli: Run) -> None:
    """The line in words, `--tp`, and JSON."""
    tensors = tiled(f"{M}.gate_proj", 256, 128) | tiled(f"{M}.up_proj", 256, 128)
    directory = build(tmp_path / "x", tensors, BLOCKS)
    done = cli("verify", "--serving", directory)
    assert done.returncode == 0
    line = f"tensor parallelism: up to 2; with 4, {M}.gate_proj.weight has 64 rows, and its blocks 128"
    assert line in done.stdout.splitlines()
    assert cli("verify", "--serving", "--tp", "2", directory).returncode == 0
    done = cli("verify", "--serving", "--tp", "4", directory, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["serving"]["tensor_parallel"]["largest"] == 2
    assert cli("verify", "--tp", "4", directory).returncode == 2


@pytest.mark.parametrize(
    ("rows", "does"),
    [(192, "assumes smaller blocks, and reads wrong values"), (576, "refuses them"), (100, None), (256, None)],
)
def test_rows_that_are_no_whole_blocks_are_a_note(rows: int, does: str | None, tmp_path: Path) -> None:
    """What transformers itself does to such codes, which have another scale in each block."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    notes = examined(build(tmp_path / "x", tiled(f"{M}.down_proj", rows, 256), BLOCKS)).notes
    assert [TORN in note for note in notes] == ([] if does is None else [True])
    assert does is None or notes[0].endswith(does)
    scales = torch.arange(1.0, -(-rows // 128) + 1)[:, None]
    wanted = scales.repeat_interleave(128, 0)[:rows].expand(rows, 256)
    codes = torch.ones(rows, 256).to(torch.float8_e4m3fn)
    try:
        right = torch.equal(Fp8Dequantize(None)._dequantize_one(codes, scales.repeat(1, 2)).float(), wanted)
    except ValueError:
        assert does == "refuses them"
    else:
        assert right == (does is None)


GRANITE = {f"{M}.input_linear.weight": bf16((2, 4, 4)), **plain(f"{M}.router", 2, 4)}
INTEGERS = {"m.q_proj.packed": Stored.of(np.ones((4, 4), np.int32), "I32")}
OTHERS = {
    **plain("model.embed_tokens"), **plain("vision.pos_embed"), **plain("vision.patch_embed"),
    **plain("model.layers.0.q_norm"), **plain("vision.conv", 4, 3, 2, 2),
    "model.layers.0.bias": plain("x")["x.weight"],
    "model.table.weight": Stored.of(np.ones((4, 4), np.int64), "I64"),
}  # fmt: skip
EXPERTS = {
    "m.experts.gate_up_proj": fp8("m", 3, 4, 4)["m.weight"],
    "m.experts.gate_up_proj_scale_inv": bf16((3, 1, 1)),
    "m.experts.gate_up_proj_activation_scale": bf16((3,)),
}
SQUARE, TILED = fp8("m.q", 256, 256), fp8("m.k", 256, 256, scale=(2, 2))
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
RAGGED = {**tiled("m.p", 200, 256), "m.p.weight_scale_inv": bf16((2, 1, 2, 1), 0.5, "F32")}
RAGGED["m.p.weight_scale"] = RAGGED.pop("m.p.weight_scale_inv")
ROW = {"m.q_proj.weight": fp8("m.q")["m.q.weight"], "m.q_proj.weight_scale": bf16((4, 1), dtype="F32"), **plain(HEAD)}
EMBEDDED = fp8("m.q") | plain(EMBEDDINGS, 8, 4)
LONG_HEAD = np.ones((1500, 2000), np.float32)
TIED = fp8("m.q") | {f"{name}.weight": Stored.of(LONG_HEAD, "BF16") for name in (EMBEDDINGS, HEAD)}
LONG_HEAD[-1, -1] = 2  # beyond the first piece that is read
UNTIED = TIED | {f"{HEAD}.weight": Stored.of(LONG_HEAD, "BF16")}
MISTRAL3 = {"architectures": ["Mistral3ForConditionalGeneration"]}
O_PROJ = tiled("m.o_proj", 256, 128)
UE8M0 = {**BLOCKS, "scale_fmt": "ue8m0"}
NOT_EXPONENTS = (
    "m.o_proj.weight_scale_inv in model.safetensors: 2 scales of 1 FP8 tensors are not powers of two, but config.json "
    "states scale_fmt ue8m0;"
)
NO_HEAD = "config.json: tie_word_embeddings is false, but no head is stored; "
SIBLINGS = {name: stored for layer, values in enumerate([(0.5, 0.5, 0.5), (0.5, 0.25, 0.5)])
            for leaf, value in zip("qkv", values, strict=True)
            for name, stored in fp8(f"model.layers.{layer}.{leaf}_proj", value=value).items()}  # fmt: skip
SIBLINGS["model.layers.0.q_proj.weight_scale_inv"] = bf16((1,), 0.5)  # another dtype, the same value
UNEQUAL = (
    "1 of 2 groups of weights that are served as one have unequal scales, and are served through a requantization to "
    "the largest scale; the first is model.layers.1.q_proj.weight, model.layers.1.k_proj.weight"
)
NESTED = fp8("language_model.model.layers.0.o_proj") | plain("vision_tower.fc1")
NATIVE = {**DYNAMIC, "modules_to_not_convert": ["model.vision_tower", "model.vision_tower.fc1"]}


def joined(fp8_leaf: str, *leaves: str) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Weights that engines join, one of them FP8, and a configuration that lists the others."""
    tensors = fp8(f"m.{fp8_leaf}").copy()
    for leaf in leaves:
        tensors |= plain(f"m.{leaf}")
    return tensors, {**DYNAMIC, "modules_to_not_convert": [f"m.{leaf}" for leaf in leaves]}


def scaled_by(*scales: Stored) -> dict[str, Stored]:
    return O_PROJ | {"m.o_proj.weight_scale_inv": scales[0]}


CASES = [
    case("blocks", fp8("m.q", 256, 256, scale=(2, 2)), BLOCKS),
    case("a block of one scale", fp8("m.q", 100, 128, scale=(1, 1)), BLOCKS),
    case("one scale a tensor", SQUARE, DYNAMIC),
    case("one scale under a block size", SQUARE | TILED, BLOCKS,
         "m.q.weight in config.json: weight_block_size is [128, 128], and 1 of 2 FP8 tensors have other blocks;"),
    case("rows under no block size", fp8("m.q", 256, 256, scale=(256, 1)), DYNAMIC,
         "m.q.weight in config.json: weight_block_size is None, and 1 of 1 FP8 tensors have other blocks;"),
    case("no block size stated", SQUARE, {key: DYNAMIC[key] for key in ("quant_method", "activation_scheme")},
         notes=["weight_block_size is absent"]),
    case("scale [1]", fp8("m.q", scale=(1,)), DYNAMIC),
    case("scale [1, 1], as vLLM's loader fails on", fp8("m.q", scale=(1, 1)) | fp8("m.k"), DYNAMIC,
         "m.q.weight_scale_inv in model.safetensors: the scale of a whole tensor has shape [1, 1], in 1 of 2 FP8 "),
    case("a scale an expert may be [E, 1, 1]", EXPERTS, STATIC),
    case("activation scale [1, 1]", fp8("m.q") | {"m.q.activation_scale": bf16((1, 1), dtype="F32")}, STATIC,
         "m.q.activation_scale in model.safetensors: the activation scale has shape [1, 1]"),
    case("[o, 1] with o = 1, as channel-wise families store it", fp8("m.q", 1, 8, scale=(1, 1)),
         {"quant_method": "fbgemm_fp8", "modules_to_not_convert": [HEAD]}),
    *(case(f"{method} scales activations itself", fp8("m.q", activation=True), {"quant_method": method},
           "m.q.weight in model.safetensors: 1 of 1 FP8 tensors have an activation scale; expected none, by "
           "config.json; leave them out; or state static, where the method has that")
      for method in ("fbgemm_fp8", "mxfp8", "w8a8_fp8", "ptpc_fp8")),
    case("no Linears, which need not be listed", fp8("m.q") | OTHERS, DYNAMIC),
    case("DeepSeek-V4 calls it head", EMBEDDED | plain("head", 9, 4), DYNAMIC,
         "head in config.json: 1 unquantized", tie_word_embeddings=False),
    case("sections that contradict each other", EMBEDDED | plain(HEAD, 9, 4), DYNAMIC,
         f"{HEAD}.weight in model.safetensors: the head differs from {EMBEDDINGS}.weight, but text_config says "
         "tie_word_embeddings, though config.json itself says false;", tie_word_embeddings=False,
         text_config={"tie_word_embeddings": True}),
    case("tied heads", TIED, DYNAMIC, tie_word_embeddings=True),
    case("heads that differ in the last byte", UNTIED, DYNAMIC, "lm_head", tie_word_embeddings=True),
    *(case(f"{architecture} needs no head", EMBEDDED, DYNAMIC, tie_word_embeddings=False, architectures=[architecture])
      for architecture in ("LlamaForSequenceClassification", "SmolLM3ForTokenClassification", "Qwen2Model")),
    *(case(f"{architecture} needs a head", EMBEDDED, DYNAMIC, NO_HEAD, tie_word_embeddings=False,
           architectures=[architecture])
      for architecture in ("LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration")),
    case("columns that are no whole blocks", tiled(f"{M}.down_proj", 256, 192), BLOCKS,
         notes=["1 FP8 tensors have columns that are not a multiple of their block's ("]),
    *(case(f"{leaves[0]} FP8 beside {leaves[1:]}", *joined(*leaves),
           f"m.{leaves[1]}.weight in config.json: 1 groups of weights that engines join are only partly FP8")
      for leaves in (("k_proj", "q_proj", "v_proj"), ("w1", "w3"))),
    case("whole blocks alone of FP8_PB_WO", RAGGED, MODELOPT,
         "m.p.weight in model.safetensors: 1 FP8 tensors are of FP8_PB_WO and are not whole blocks: m.p.weight has "
         "200 rows"),
    case("ragged blocks otherwise", tiled("m.p", 200, 256), BLOCKS),
    *(case(f"{fits} in {dtype}", scaled_by(bf16((2, 1), value, dtype)), stated, *failures)
      for dtype in ("F32", "BF16")
      for fits, value, stated, failures in (
          ("a power of two", 2.0**-9, BLOCKS, ()), ("a power of two under ue8m0", 2.0**-9, UE8M0, ()),
          ("any scale", 3 * 2.0**-9, BLOCKS, ()), ("another under ue8m0", 3 * 2.0**-9, UE8M0, (NOT_EXPONENTS,)))),
    case("exponents under ue8m0", scaled_by(Stored.codes(np.full((2, 1), 118, np.uint8), "F8_E8M0")), UE8M0),
    case("blocks of Mistral3 by a name that vLLM renames", O_PROJ, BLOCKS,
         "m.o_proj.weight_scale_inv in model.safetensors: vLLM 0.33 reads this model's weight_scale_inv as one "
         "scale per tensor, and refuses 1 that are blocks;", **MISTRAL3),
    case("blocks of mistral3", O_PROJ, BLOCKS, "m.o_proj.weight_scale_inv", model_type="mistral3"),
    case("one scale of Mistral3", fp8("m.o_proj"), DYNAMIC, **MISTRAL3),
    case("blocks of Llama", O_PROJ, BLOCKS, notes=["SGLang 0.5"], architectures=["LlamaForCausalLM"]),
    case("blocks of another model", O_PROJ, BLOCKS, notes=[], architectures=["X"]),
    *(case(f"{method} is known {i}", ROW, {"quant_method": method, **more}, notes=[])
      for i, (method, more) in enumerate((
          ("quark", {"exclude": [HEAD], "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}),
          ("quark", {"exclude": [HEAD, "*router*"]}), ("w8a8_fp8", {}), ("ptpc_fp8", {}),
          ("fbgemm_fp8", {"modules_to_not_convert": [HEAD]}), ("torchao", {"quant_type": {"default": {}}}),
          ("modelopt_mixed", {"ignore": [HEAD]})))),
    case("a list of quark's", ROW, {"quant_method": "quark", "exclude": ["x"]},
         "lm_head in config.json: 1 unquantized Linears are not in exclude: lm_head;", notes=[]),
    case("an unknown method", ROW, {"quant_method": "something_new", "ignore": []},
         notes=["quant_method is something_new, for which fp8ckpt does not know what engines need: not checked"]),
    case("integers of a method that is none of ours", INTEGERS | plain(HEAD), {"quant_method": "something"},
         notes=["nothing is quantized",
                "config.json states a quantization that is not FP8 (m.q_proj.packed): not checked"]),
    case("siblings of unequal scales", SIBLINGS, DYNAMIC, notes=[UNEQUAL]),
    *(case(f"the model's own names of {config}", NESTED, NATIVE, **config)
      for config in ({}, {"model_type": "mistral3"}, {"model_type": "gemma3"})),
    case("the names of Mistral3 in another model", NESTED, NATIVE, "vision_tower.fc1", "vision_tower ", model_type="x"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "failures", "notes"), CASES)
def test_what_engines_need(
    tensors: dict[str, Stored], config: dict[str, Any], failures: tuple[str, ...], notes: list[str] | None
) -> None:
    found = judge(tensors, **config)
    assert begin([failure.message for failure in found.failures], failures)
    assert notes is None or begin(found.notes, notes)


CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
CACHED = {"quant_method": "compressed-tensors", "config_groups": {"g": {}}, "kv_cache_scheme": CACHE}


@pytest.mark.parametrize(("quantization", "modelopt", "fit"), [
    ({**CACHED, "config_groups": {}}, None, True),
    ({**CACHED, "ignore": ["lm_head", "re:.*q_proj"]}, None, True),
    ({**CACHED, "ignore": ["lm_head"]}, None, False),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": {}}, "ignore": ["lm_head"]}, None, False),
    ({"quant_method": "fp8", "weight_block_size": None, "kv_cache_quant_method": "fp8"}, None, False),
    (None, {"quant_algo": None, "kv_cache_quant_algo": "FP8"}, True),
    (None, {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, False),
    (None, {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "m*"]}, True),
])  # fmt: skip
def test_a_quantized_cache_alone_is_sound(
    quantization: dict[str, Any] | None, modelopt: dict[str, Any] | None, fit: bool, tmp_path: Path
) -> None:
    """BF16 weights with calibrated scales of an FP8 cache, as far as no weight is stated to be quantized."""
    scales = {f"m.{leaf}_scale": bf16((1,)) for leaf in "kv"}
    directory = build(tmp_path / "x", plain("m.q_proj") | plain("lm_head") | scales, quantization)
    if modelopt is not None:
        (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": modelopt}))
    failures = told(directory).failures
    assert [f.found for f in failures] == ["it states that the weights are quantized, but none is"] * (not fit)
    assert "remove" not in "".join(map(str, failures))


def old_rule(module: str, entries: list[str]) -> bool:
    """transformers 5.18's reading: an entry is the beginning of a name, or its end."""
    return any(re.match(entry, module) is not None or module.endswith(entry) for entry in entries)


@pytest.mark.parametrize(("entries", "version"), [
    (["model.layers.1"], "5.18"),
    (["model.layers.1.mlp.gate"], "5.18"),
    (["gate_proj_x", "ate_proj"], "5.23"),
    (["model.layers.1.mlp.gate$"], None),
    (["model.layers.2"], None),
])  # fmt: skip
def test_an_entry_is_read_as_each_version_of_transformers_does(entries: list[str], version: str | None) -> None:
    """5.18 asks for no end of a component, and so skips layers 10 and 11 for layer 1; no version for its beginning."""
    modules = ["model.layers.10.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]
    modules = modules[:1] if entries == ["model.layers.1"] else modules
    tensors = {name: stored for module in modules for name, stored in fp8(module).items()}
    result = judge(tensors, {**DYNAMIC, "modules_to_not_convert": entries})
    assert any(old_rule(module, entries) for module in modules) == (version is not None)
    assert begin([f.found for f in result.failures], [] if version is None else [f"transformers {version} matches "])


def test_a_router_beside_a_gate_proj_is_listed_as_every_version_reads_it(tmp_path: Path) -> None:
    """Its name alone would skip ``gate_proj`` in transformers 5.18: it is written with a ``$``."""
    tensors = fp8(f"{M}.gate_proj") | plain(f"{M}.gate") | plain("model.vision.fc")
    directory = complete(build(tmp_path / "x", tensors, DYNAMIC), static=False)
    listed = q(read_config(directory))["modules_to_not_convert"]
    assert f"{M}.gate$" in listed
    assert examined(directory).failures == ()
    assert should_convert_module(f"{M}.gate_proj", listed)
    assert not should_convert_module(f"{M}.gate", listed)
    assert not old_rule(f"{M}.gate_proj", listed)


@pytest.mark.parametrize("tensors", [{f"{M}.experts.gate_up_proj": bf16((2, 4, 4))}, GRANITE])
def test_stacks_of_experts_that_are_not_fp8_are_listed(tensors: dict[str, Stored], tmp_path: Path) -> None:
    """By the name of the layer that an engine makes of them."""
    directory = build(tmp_path / "x", fp8(f"{M}.o_proj") | tensors, DYNAMIC)
    assert f"{M}.experts" in only_failure(directory).found
    complete(directory, static=False)
    assert f"{M}.experts" in q(read_config(directory))["modules_to_not_convert"]
    assert examined(directory).failures == ()

"""FP8 without a base: what is quantized and what is left, by which scales, and all that an engine needs to know."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fp8ckpt import convert, open_checkpoint, sample, verify
from fp8ckpt.errors import Fp8CheckpointError, UnsupportedFormatError, WeightValueError
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes
from tests.oracle import (
    Stored,
    assert_same_tree,
    fresh_scale,
    maxima,
    quantize,
    read_directory,
    read_safetensors,
    tree,
    write_safetensors,
)
from tests.support import cut
from tests.test_to_fp8 import steps

SCHEMES = ("per-tensor", "block", "channel")
ENDING = {"per-tensor": "_scale_inv", "block": "_scale_inv", "channel": "_scale"}
MISTRAL3 = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
INDEX = "model.safetensors.index.json"
E = "model.layers.0.mlp.experts"

# Weights that engines join: they have one scale. By their last module.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))


def ending_of(scheme: str, directory: Path) -> str:
    """What follows a weight's name in its scale's: vLLM's loader of Mistral3 has no other name for blocks."""
    config = json.loads((directory / "config.json").read_text())
    return "_scale" if scheme == "block" and config.get("model_type") == "mistral3" else ENDING[scheme]


def block_of(scheme: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The block size of a weight; stacked experts are matrices, each with blocks of its own."""
    lead = (1,) * (len(shape) - 2)
    return (*lead, *{"per-tensor": shape[-2:], "block": (128, 128), "channel": (1, shape[-1])}[scheme])


def expected_scales(tensors: dict[str, Stored], scheme: str) -> dict[str, Stored]:
    """The scale of each of these weights, naively; joined weights of one scale each have that of the largest."""
    found = {}
    for name, values in tensors.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        joined = next((leaves for leaves in JOINED if leaf in leaves), (leaf,))
        members = [name]
        if len(values.shape) == 2 and scheme == "per-tensor":
            members = [m for m in (f"{parent}.{leaf}.weight" for leaf in joined) if m in tensors]
        largest = max(members, key=lambda member: float(maxima(tensors[member], tensors[member].shape).max()))
        scale = fresh_scale(tensors[largest], block_of(scheme, tensors[largest].shape), "F32")
        found[name] = scale._replace(shape=()) if scale.shape == (1, 1) and scheme == "per-tensor" else scale
    return found


def stacked(directory: Path, dtype: str) -> tuple[Path, set[str]]:
    """A mixture of experts, stacked, in two files of F32, F16 or BF16 without an index; and the weights that are to be
    quantized.
    """
    rng = np.random.default_rng(7)
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 24),
        f"{layer}.self_attn.q_proj.weight": (256, 24),
        f"{layer}.self_attn.q_proj.bias": (256,),
        f"{layer}.self_attn.k_proj.weight": (128, 24),
        f"{layer}.self_attn.q_norm.weight": (128,),
        f"{layer}.self_attn.sinks": (4,),
        f"{E}.gate_up_proj": (3, 256, 24),
        f"{E}.down_proj": (3, 24, 150),
        f"{E}.gate_up_proj_bias": (3, 256),
        f"{layer}.mlp.router.weight": (3, 24),
        f"{layer}.mlp.zero.weight": (30, 20),
        "model.norm.weight": (24,),
        "lm_head.weight": (64, 24),
    }
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) * np.exp2(rng.uniform(-9, 3, (*shape[:-1], 1)))
        tensors[name] = Stored.of(values.astype(np.float32), dtype)
    tensors[f"{layer}.mlp.zero.weight"] = Stored.of(np.zeros((30, 20)), dtype)
    tensors["position_ids"] = Stored.of(np.arange(12).reshape(3, 4), "I64")
    directory.mkdir(parents=True)
    for i, start in enumerate((0, 7)):
        part = dict(list(tensors.items())[start : start + 7])
        write_safetensors(directory / f"model-0000{i + 1}-of-00002.safetensors", part)
    (directory / "config.json").write_text(json.dumps({"architectures": ["X"], "text_config": {"hidden_size": 24}}))
    ends = ("q_proj.weight", "k_proj.weight", "zero.weight", "gate_up_proj", "down_proj")
    return directory, {name for name in tensors if name.endswith(ends)}


def from_sample(sizes: Mistral3Sizes | DeepseekSizes, **how: Any) -> Callable[[Path], tuple[Path, set[str]]]:
    """A converted sample; what was FP8 in it is what is to be FP8 again."""

    def make(folder: Path) -> tuple[Path, set[str]]:
        base = sample(folder / "released", sizes, **how)
        (base / "assets").mkdir()
        (base / "assets/logo.png").write_bytes(b"\x89PNG")
        convert(base, folder / "plain")
        return folder / "plain", {tensor.name for tensor in open_checkpoint(base).quantized}

    return make


SIZES = Mistral3Sizes(layers=2, vision_layers=1, hidden=136, intermediate=256, head_dim=64)
EXPERTS = DeepseekSizes(intermediate=384, expert_intermediate=128, q_rank=256)
SOURCES: dict[str, Callable[[Path], tuple[Path, set[str]]]] = {
    "identity": from_sample(SIZES),
    "nested": from_sample(SIZES, layout="nested", files=1),
    "DeepSeek": from_sample(EXPERTS),
    **{
        f"stacked {dtype}": lambda folder, dtype=dtype: stacked(folder / "plain", dtype)  # type: ignore[misc]
        for dtype in ("BF16", "F16", "F32")
    },
}

Source = tuple[Path, set[str]]


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """(a directory that is not FP8, the names of the weights that are to be)."""
    return SOURCES[request.param](tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_stored_byte(scheme: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales are the oracle's, in pieces of any size; all other tensors are copied."""
    directory, quantized = source
    ending = ending_of(scheme, directory)
    given = read_directory(directory)
    scales = expected_scales({name: given[name] for name in quantized}, scheme)
    expected = dict(given)
    for name, scale in scales.items():
        block = block_of(scheme, given[name].shape)
        expected[name + ending] = scale
        expected[name] = Stored("F8_E4M3", given[name].shape, quantize(given[name], scale, block))
    before = tree(directory)
    for chunk, step in ((4 << 20, 1 << 19), (2000, 300)):
        cut(monkeypatch, chunk, 3)
        steps(monkeypatch, step)
        out = tmp_path / str(chunk)
        result = convert(directory, out, to="fp8", scheme=scheme)
        found = read_directory(out)
        assert found.keys() == expected.keys()
        assert {name for name in expected if found[name] != expected[name]} == set()
        assert (result.quantized, result.tensors) == (len(quantized), len(given))
        assert result.report is not None
        total = result.report.total
        assert (total.moved, total.outgrown, total.clipped, result.base_bytes_read) == (None, 0, 0, 0)
        assert total.scales == total.fresh == sum(scale.array.size for scale in scales.values())
        # Weights with one scale in all are looked at first; all else is read once.
        whole = [name for name in quantized if scales[name].array.size == 1]
        if chunk == 4 << 20:
            twice = [*given.values(), *(given[name] for name in whole)]
            assert result.bytes_read == sum(len(tensor.data) for tensor in twice)
    assert tree(directory) == before
    assert_same_tree(tmp_path / "2000", tmp_path / str(4 << 20))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_directory_is_whole_and_fit_to_be_served(scheme: str, source: Source, tmp_path: Path) -> None:
    """The output is sound and servable, in the source's files, with its side files and a true configuration."""
    directory, quantized = source
    ending = ending_of(scheme, directory)
    out = tmp_path / "out"
    convert(directory, out, to="fp8", scheme=scheme)
    checked = verify(out, serving=True)
    assert checked.serving is not None
    notes = [n for n in checked.serving.notes if "not a multiple of their block" not in n and "stacks of exp" not in n]
    assert (checked.defects, checked.serving.failures, notes) == ((), (), [])

    checkpoint = open_checkpoint(out)
    grids = {tensor.name: tensor.grid.block_size for tensor in checkpoint.quantized}
    shapes = {name: tensor.shape for name, tensor in read_directory(directory).items()}
    assert grids.keys() == quantized
    for name, block in grids.items():
        ours, expected = (
            [-(-dim // size) for dim, size in zip(shapes[name], sizes, strict=True)]
            for sizes in (block, block_of(scheme, shapes[name]))
        )
        assert ours == expected
    assert {tensor.activation_scales for tensor in checkpoint.quantized} == {()}

    files = {file.name: read_safetensors(file).keys() for file in out.glob("*.safetensors")}
    for name, held in files.items():
        before = read_safetensors(directory / name).keys()
        assert held == before | {weight + ending for weight in before & quantized}
        with safe_open(out / name, "pt") as stream:
            assert stream.metadata()["format"] == "pt"
    assert files.keys() == {file.name for file in directory.glob("*.safetensors")}
    if len(files) > 1:
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"] == {tensor: name for name, held in files.items() for tensor in held}
        assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in read_directory(out).values())

    ours, theirs = tree(out), tree(directory)
    sides = {name for name in theirs if not name.endswith(".safetensors") and name not in (INDEX, "config.json")}
    assert {name: ours[name] for name in sides} == {name: theirs[name] for name in sides}
    assert ours.keys() - sides - files.keys() <= {INDEX, "config.json"}

    config = json.loads(ours["config.json"])
    quantization = config.pop("quantization_config")
    assert config == json.loads(theirs["config.json"])
    skipped = quantization.pop("ignore" if ending == "_scale" else "modules_to_not_convert", [])
    if ending == "_scale":
        group = quantization.pop("config_groups")["group_0"]
        assert group["targets"] == ["Linear"]
        weights, activations = group["weights"], group["input_activations"]
        assert (weights["strategy"], weights["dynamic"], weights["num_bits"]) == (scheme, False, 8)
        assert weights.get("block_structure") == ([128, 128] if scheme == "block" else None)
        assert (activations["strategy"], activations["dynamic"]) == ("group" if scheme == "block" else "token", True)
        assert activations.get("group_size") == (128 if scheme == "block" else None)
        stated = {"quant_method": "compressed-tensors", "format": "float-quantized"}
        assert quantization == {**stated, "quantization_status": "compressed"}
    else:
        block = [128, 128] if scheme == "block" else None
        stated = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        assert quantization == {**stated, "weight_block_size": block}
    assert not {name.removesuffix(".weight") for name in quantized} & {*skipped}
    matrices = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2}
    vision = {name for name in matrices if "vision" in name or "projector" in name}
    assert vision <= {*skipped}
    if vision:
        assert any(module.endswith("lm_head") for module in skipped)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_output_is_a_base(scheme: str, source: Source, tmp_path: Path) -> None:
    """Dequantized to BF16 and quantized like the output of the scheme, it comes back byte for byte."""
    out = tmp_path / "out"
    convert(source[0], out, to="fp8", scheme=scheme)
    convert(out, tmp_path / "plain")
    result = convert(tmp_path / "plain", tmp_path / "back", to="fp8", like=out)
    assert_same_tree(tmp_path / "back", out)
    assert result.report is not None
    assert (result.report.total.moved, result.report.total.fresh) == (0, 0)


LINEAR, OTHER = (16, 8), (8,)


@pytest.mark.parametrize(("name", "shape", "dtype", "expected"), [
    ("model.layers.0.self_attn.o_proj.weight", LINEAR, "BF16", True),
    ("model.layers.0.self_attn.o_proj.weight", LINEAR, "F64", False),
    ("model.layers.0.self_attn.o_proj.weight", LINEAR, "I8", False),
    ("model.layers.0.self_attn.o_proj.weight", (0, 8), "BF16", False),
    ("model.layers.0.self_attn.o_proj.bias", OTHER, "BF16", False),
    ("model.layers.0.mlp.experts.7.w2.weight", LINEAR, "F32", True),
    ("model.layers.0.mlp.shared_experts.down_proj.weight", LINEAR, "BF16", True),
    ("model.layers.0.feed_forward.experts.gate_up_proj", (2, 16, 8), "BF16", True),
    ("model.layers.0.mlp.experts.gate_up_proj_bias", (2, 16), "BF16", False),
    ("model.layers.0.mlp.gate.weight", LINEAR, "BF16", False),
    ("model.layers.0.block_sparse_moe.router.weight", LINEAR, "BF16", False),
    ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), "BF16", False),
    ("model.layers.0.post_attention_layernorm.weight", OTHER, "BF16", False),
    ("model.layers.0.linear_attn.conv1d.weight", (8, 1, 4), "BF16", False),
    ("model.layers.0.linear_attn.A_log", LINEAR, "BF16", False),
    ("model.layers.61.eh_proj.weight", LINEAR, "BF16", False),
    ("model.layers.61.shared_head.head.weight", LINEAR, "BF16", False),
    ("model.layers.0.self_attn.indexer.weights_proj.weight", LINEAR, "BF16", False),
    ("model.embed_tokens.weight", LINEAR, "BF16", False),
    ("text_model.model.segment_emb.weight", LINEAR, "BF16", False),
    ("model.layers.0.attn_hyper_connection.block_inject_weight.weight", LINEAR, "BF16", False),
    ("lm_head.weight", LINEAR, "BF16", False),
    ("language_model.lm_head.weight", LINEAR, "BF16", False),
    ("score.weight", LINEAR, "BF16", False),
    ("pre_classifier.weight", LINEAR, "BF16", False),
    ("model.vision_tower.transformer.layers.0.attention.q_proj.weight", LINEAR, "BF16", False),
    ("model.visual.blocks.0.attn.qkv.weight", LINEAR, "BF16", False),
    ("vit.encoder.layers.0.fc1.weight", LINEAR, "BF16", False),
    ("audio_tower.layers.0.fc1.weight", LINEAR, "BF16", False),
    ("model.multi_modal_projector.linear_1.weight", LINEAR, "BF16", False),
    ("model.mm_projector.0.weight", LINEAR, "BF16", False),
])  # fmt: skip
@pytest.mark.parametrize("scheme", ["per-tensor", "channel"])
def test_what_is_quantized(
    scheme: str, name: str, shape: tuple[int, ...], dtype: str, expected: bool, tmp_path: Path
) -> None:
    """Linears and stacked experts of the language model; what releases, and engines, leave in BF16 is left."""
    (tmp_path / "plain").mkdir()
    tensors = {
        "model.layers.0.mlp.down_proj.weight": Stored.of(np.ones((4, 4)), "BF16"),
        name: Stored.of(np.ones(shape), dtype),
    }
    write_safetensors(tmp_path / "plain/model.safetensors", tensors)
    convert(tmp_path / "plain", tmp_path / "out", to="fp8", scheme=scheme)
    found = read_directory(tmp_path / "out")
    assert (found[name].dtype == "F8_E4M3") == (name + ENDING[scheme] in found) == expected
    if not expected:
        assert found[name] == tensors[name]
    assert verify(tmp_path / "out", serving=True).ok


def test_files_that_engines_take_for_the_model_are_left_out(tmp_path: Path) -> None:
    """Configurations of Mistral and ModelOpt, which state other weights, are left out, with a note."""
    base = sample(tmp_path / "released", Mistral3Sizes(layers=1, vision_layers=1))
    convert(base, tmp_path / "plain")
    (tmp_path / "plain/params.json").write_text('{"dim": 4}')
    (tmp_path / "plain/hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    write_safetensors(tmp_path / "plain/consolidated.safetensors", {"x": Stored.of(np.ones(3), "BF16")})
    result = convert(tmp_path / "plain", tmp_path / "out", to="fp8", scheme="block")
    assert not {"params.json", "hf_quant_config.json", "consolidated.safetensors"} & {*os.listdir(tmp_path / "out")}
    assert verify(tmp_path / "out", serving=True).ok
    notes = [note for note in result.notes if not note.startswith("left")]
    assert [note.split()[0] for note in notes] == ["hf_quant_config.json", "params.json"]


def test_an_old_quantization_config_is_replaced(tmp_path: Path) -> None:
    """What the source's configuration still says of an earlier quantization, nested too, does not mix with the new."""
    stacked(tmp_path / "plain", "BF16")
    old = {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": [f"{L}.self_attn.q_proj"]}
    config = {"quantization_config": old, "text_config": {"hidden_size": 24, "quantization_config": old}}
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    convert(tmp_path / "plain", tmp_path / "out", to="fp8", scheme="per-tensor")
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert found["quantization_config"]["activation_scheme"] == "dynamic"
    assert "model.layers.0.self_attn.q_proj" not in found["quantization_config"].get("modules_to_not_convert", [])
    assert found["text_config"] == {"hidden_size": 24}
    assert verify(tmp_path / "out", serving=True).ok


def refused(kind: type[Fp8CheckpointError], match: str, source: Path, destination: Path, scheme: str = "block") -> None:
    """The error, and nothing written."""
    before = tree(source)
    with pytest.raises(kind, match=match):
        convert(source, destination, to="fp8", scheme=scheme)
    assert tree(source) == before
    assert not destination.exists()
    assert not destination.with_name(destination.name + ".partial").exists()


def test_refusals(tmp_path: Path) -> None:
    """A source that is FP8, one without a Linear, one that holds Mistral's own layout alone."""
    base = sample(tmp_path / "released", Mistral3Sizes(layers=1, vision_layers=1))
    refused(UnsupportedFormatError, "already quantized", base, tmp_path / "out")
    (tmp_path / "none").mkdir()
    write_safetensors(tmp_path / "none/model.safetensors", {"model.norm.weight": Stored.of(np.ones(3), "BF16")})
    none = "this scheme quantizes none of its tensors.*--like BASE"
    refused(UnsupportedFormatError, none, tmp_path / "none", tmp_path / "out")
    (tmp_path / "native").mkdir()
    native = {"layers.0.attention.wq.weight": Stored.of(np.ones((4, 4)), "BF16")}
    write_safetensors(tmp_path / "native/consolidated.safetensors", native)
    refused(UnsupportedFormatError, "Mistral's own layout.*--like BASE", tmp_path / "native", tmp_path / "out")


@pytest.mark.parametrize(("scheme", "value"), list(product(SCHEMES, [np.nan, -np.inf])))
def test_weights_that_are_not_finite_are_refused(scheme: str, value: float, tmp_path: Path) -> None:
    """By name and count, stacked experts too."""
    directory, _ = stacked(tmp_path / "plain", "F32")
    for name in ("model.layers.0.self_attn.k_proj.weight", f"{E}.down_proj"):
        spoilt = Path(shutil.copytree(directory, tmp_path / name))
        file = next(file for file in spoilt.glob("*.safetensors") if name in read_safetensors(file))
        tensors = read_safetensors(file)
        values = tensors[name].array.copy()
        values.reshape(-1)[[1, -1]] = value
        write_safetensors(file, {**tensors, name: Stored.of(values, "F32")})
        said = rf"^{name} in {file.name}: 2 of {values.size} elements"
        refused(WeightValueError, said, spoilt, tmp_path / "out", scheme)


def test_read_as_torch_reads_it(tmp_path: Path) -> None:
    """An output opened with safetensors and multiplied out by torch is what fp8ckpt reads of it."""
    directory, quantized = stacked(tmp_path / "plain", "BF16")
    convert(directory, tmp_path / "out", to="fp8", scheme="per-tensor")
    checkpoint = open_checkpoint(tmp_path / "out")
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            for name in quantized & {*stream.keys()}:
                codes, scale = stream.get_tensor(name), stream.get_tensor(name + "_scale_inv")
                assert codes.dtype == torch.float8_e4m3fn
                assert torch.equal((codes.float() * scale).bfloat16(), checkpoint.read(name))


L = "model.layers.0"


def plain_directory(directory: Path, shapes: dict[str, tuple[int, ...]], **config: Any) -> Path:
    """BF16 weights of these shapes, by the names of their modules (``.weight``) or, with a bar, their own."""
    rng = np.random.default_rng(3)
    directory.mkdir(parents=True)
    keys = [name.removesuffix("|") if name.endswith("|") else f"{name}.weight" for name in shapes]
    drawn = [Stored.of(rng.standard_normal(shape), "BF16") for shape in shapes.values()]
    tensors = dict(zip(keys, drawn, strict=True))
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


DELTA_NET = {f"{L}.linear_attn.{leaf}": (64, 128) for leaf in ("in_proj_ba", "in_proj_a", "in_proj_b")}


@pytest.mark.parametrize(("shapes", "quantized"), [
    ({f"{L}.block_sparse_moe.router.layer": (4, 128), f"{L}.mlp.gate.wg": (4, 128), **DELTA_NET}, set()),
    ({f"{L}.linear_attn.in_proj_qkvz": (256, 128)}, {f"{L}.linear_attn.in_proj_qkvz.weight"}),
    ({f"{L}.block_sparse_moe.input_linear": (4, 256, 128), f"{L}.moe.up_proj": (4, 128, 128)},
     {f"{L}.block_sparse_moe.input_linear.weight", f"{L}.moe.up_proj.weight"}),
    ({f"{L}.mlp.experts.w13|": (4, 256, 128)}, {f"{L}.mlp.experts.w13"}),
    ({f"{L}.conv.mix": (4, 128, 3), f"{L}.mlp.other": (2, 3, 4, 5)}, set()),
])  # fmt: skip
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_known_by_what_it_is(
    scheme: str, shapes: dict[str, tuple[int, ...]], quantized: set[str], tmp_path: Path
) -> None:
    """Routers and small projections are left, under any name, with a note; stacks of experts are quantized."""
    source = plain_directory(tmp_path / "plain", {**shapes, f"{L}.self_attn.o_proj": (128, 128)})
    result = convert(source, tmp_path / "out", to="fp8", scheme=scheme)
    found = {tensor.name for tensor in open_checkpoint(tmp_path / "out").quantized}
    assert found == quantized | {f"{L}.self_attn.o_proj.weight"}
    left = [note for note in result.notes if note.startswith("left unquantized, ")]
    assert bool(left) == (len(found) <= len(shapes))
    checked = verify(tmp_path / "out", serving=True)
    assert checked.ok
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    listed = config.get("modules_to_not_convert", config.get("ignore"))
    matrices = {name for name, shape in shapes.items() if len(shape) == 2 and f"{name}.weight" not in found}
    assert matrices <= {*(listed or [])}


T5 = {
    "shared": (320, 128),
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias": (32, 128),
    "decoder.block.0.layer.0.SelfAttention.q": (128, 128),
}


@pytest.mark.parametrize(
    ("shapes", "config", "left", "listed"),
    [
        (T5, {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, {*T5} - {[*T5][-1]}, {"lm_head"}),
        (
            {"transformer.w": (320, 128), "transformer.h.0.ffn.2": (128, 128)},
            {"architectures": ["CTRLLMHeadModel"], "tie_word_embeddings": True, "vocab_size": 320},
            {"transformer.w"},
            {"lm_head"},
        ),
        (
            {"text.tokens": (320, 128), f"{L}.mlp.up": (320, 128)},
            {"text_config": {"vocab_size": 320, "tie_word_embeddings": True}},
            {"text.tokens"},
            {"lm_head", "language_model.lm_head"},
        ),
        ({"model.shared": (8, 128), f"{L}.fc1": (8, 128)}, {"model_type": "whisper"}, {"model.shared"},
         {"proj_out"}),
        ({"model.shared": (8, 128), f"{L}.fc1": (8, 128)}, {"tie_word_embeddings": False}, {"model.shared"}, set()),
        ({"model.shared": (8, 128), f"{L}.fc1": (8, 128)}, {"architectures": ["BertModel"]}, {"model.shared"}, set()),
        ({"h.0.mlp.c_fc": (128, 128), "h.0.fc1": (128, 128)}, {"decoder": {"model_type": "gpt2"}}, {"h.0.mlp.c_fc"},
         {"lm_head"}),
        ({"h.0.mlp.c_fc": (128, 128)}, {"model_type": "gpt_bigcode"}, set(), {"lm_head"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", SCHEMES)
def test_embeddings_tied_heads_and_conv1d_are_no_codes(
    scheme: str, shapes: dict[str, tuple[int, ...]], config: dict[str, Any], left: set[str], listed: set[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Tables stay as they are under any name; a head that is not stored is a Linear to engines, and listed."""
    convert(plain_directory(tmp_path / "plain", shapes, **config), tmp_path / "out", to="fp8", scheme=scheme)
    found = {tensor.name for tensor in open_checkpoint(tmp_path / "out").quantized}
    assert found == {f"{name}.weight" for name in {*shapes} - left}
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    skipped = {*(quantization.get("modules_to_not_convert") or quantization.get("ignore") or [])}
    assert {name for name in skipped if name.endswith(("lm_head", "proj_out"))} == listed
    assert not skipped & {name.removesuffix(".weight") for name in found}
    assert verify(tmp_path / "out", serving=True).ok


def test_a_model_of_conv1d_alone_is_refused(tmp_path: Path) -> None:
    source = plain_directory(tmp_path / "plain", {"h.0.attn.c_attn": (128, 384)}, model_type="gpt2")
    refused(UnsupportedFormatError, r"weights of Conv1D.*h\.0\.attn\.c_attn", source, tmp_path / "out")


def test_what_cannot_be_joined_in_blocks_is_left_together(tmp_path: Path) -> None:
    """Rows that are no whole blocks: q, k and v together, gate and up, all of the experts; not what stands alone."""
    shapes = {
        **{f"{L}.self_attn.{leaf}_proj": (rows, 128) for leaf, rows in (("q", 256), ("k", 64), ("v", 64), ("o", 192))},
        **{f"{L}.mlp.{leaf}_proj": (192, 128) for leaf in ("gate", "up")},
        f"{L}.mlp.down_proj": (128, 192),
        **{f"model.layers.1.mlp.experts.0.{leaf}_proj": (192, 128) for leaf in ("gate", "up")},
        "model.layers.1.mlp.experts.0.down_proj": (128, 192),
        **{f"model.layers.2.mlp.experts.0.{leaf}_proj": (128, 128) for leaf in ("gate", "up", "down")},
    }
    source = plain_directory(tmp_path / "plain", shapes)
    result = convert(source, tmp_path / "out", to="fp8", scheme="block")
    found = {tensor.name.removesuffix(".weight") for tensor in open_checkpoint(tmp_path / "out").quantized}
    assert found == {name for name in shapes if "layers.2" in name or name.endswith(("o_proj", "0.mlp.down_proj"))}
    (note,) = result.notes
    assert note.startswith("left unquantized, joined by engines where they are not whole blocks of 128 rows: ")
    assert verify(tmp_path / "out", serving=True).ok
    for scheme in ("per-tensor", "channel"):
        assert convert(source, tmp_path / scheme, to="fp8", scheme=scheme).quantized == len(shapes)


def test_only_and_skip(tmp_path: Path) -> None:
    """Regular expressions, found anywhere in a name; what engines join is never torn apart, and the notes say so."""
    shapes = {
        **{f"{L}.self_attn.{leaf}_proj": (128, 128) for leaf in "qkvo"},
        **{f"{L}.mlp.experts.{i}.{leaf}_proj": (128, 128) for i in range(2) for leaf in ("gate", "up", "down")},
        f"{L}.mlp.gate": (2, 128),
    }
    source = plain_directory(tmp_path / "plain", shapes)

    def quantized(name: str, **how: str) -> tuple[set[str], tuple[str, ...]]:
        result = convert(source, tmp_path / name, to="fp8", scheme="block", **how)
        assert verify(tmp_path / name, serving=True).ok
        found = {tensor.name.removesuffix(".weight") for tensor in open_checkpoint(tmp_path / name).quantized}
        return {name.removeprefix(f"{L}.") for name in found}, result.notes

    attention = {f"self_attn.{leaf}_proj" for leaf in "qkvo"}
    experts = {name.removeprefix(f"{L}.") for name in shapes if "experts" in name}
    assert quantized("a", only=r"self_attn\.")[0] == attention
    assert quantized("b", skip="experts")[0] == attention
    assert quantized("c", only=r"_proj\.weight$", skip=r"\.o_proj")[0] == attention - {"self_attn.o_proj"} | experts
    found, notes = quantized("d", skip=r"k_proj|experts\.1\.up")
    assert found == {"self_attn.o_proj"}
    assert [note.partition(":")[0] for note in notes] == [
        "left unquantized, matched by --skip",
        "left unquantized, routers of experts",
        "left unquantized, joined by engines with what is left",
    ]


def test_only_and_skip_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    """No regular expression, no scheme; and a choice that leaves nothing says what was left."""
    source = plain_directory(tmp_path / "plain", {f"{L}.self_attn.o_proj": (128, 128)})
    with pytest.raises(ValueError, match=r"only='\(' is no regular expression"):
        convert(source, tmp_path / "out", to="fp8", scheme="block", only="(")
    with pytest.raises(ValueError, match="only and skip go with scheme"):
        convert(source, tmp_path / "out", to="fp8", like=source, skip="x")
    with pytest.raises(UnsupportedFormatError, match=r"none of its tensors.*matched by --skip"):
        convert(source, tmp_path / "out", to="fp8", scheme="block", skip="o_proj")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_blocks_of_mistral3_have_the_names_that_its_loader_knows(tmp_path: Path) -> None:
    """vLLM takes a ``weight_scale_inv`` of Mistral3 for the one scale of a tensor: blocks are compressed-tensors'."""
    shapes = {f"model.language_model.layers.0.mlp.{leaf}_proj": (128, 128) for leaf in ("gate", "up", "down")}
    source = plain_directory(tmp_path / "plain", shapes, **MISTRAL3)
    for scheme, ending in (("block", "_scale"), ("per-tensor", "_scale_inv")):
        convert(source, tmp_path / scheme, to="fp8", scheme=scheme)
        names = {tensor.scale.name for tensor in open_checkpoint(tmp_path / scheme).quantized}
        assert names == {f"{name}.weight{ending}" for name in shapes}
        assert verify(tmp_path / scheme, serving=True).ok

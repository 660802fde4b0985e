"""Samples: valid, in the released layouts, of true shapes in no space, and the same at every call."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fp8ckpt import inspect, open_checkpoint, sample, verify
from fp8ckpt.errors import OutputExistsError
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes
from fp8ckpt.tensors.scaled import QuantizedTensor
from tests.conftest import Run
from tests.oracle import Stored, read_directory, read_safetensors, tree

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
SIDE_FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.mark.parametrize(("layout", "text", "others"), [
    ("identity", "model.language_model", ("model.vision_tower.", "model.multi_modal_projector.", "lm_head.weight")),
    ("nested", "language_model.model", ("vision_tower.", "multi_modal_projector.", "language_model.lm_head.weight")),
])  # fmt: skip
def test_key_layouts(layout: str, text: str, others: tuple[str, ...], tmp_path: Path) -> None:
    """The names of either release: every text Linear is FP8 with two 0-d BF16 scales, everything else BF16 without."""
    stored = read_directory(sample(tmp_path / "fp8", layout=layout))
    linears = {f"{text}.layers.{i}.{linear}" for i in range(2) for linear in LINEARS}
    assert {name for name, tensor in stored.items() if tensor.dtype == "F8_E4M3"} == {
        f"{linear}.weight" for linear in linears
    }
    scales = {f"{linear}.{end}" for linear in linears for end in ("weight_scale_inv", "activation_scale")}
    for name in scales:
        assert (stored[name].dtype, stored[name].shape) == ("BF16", ())
        assert 0 < float(stored[name].array) < 1
    rest = stored.keys() - scales - {f"{linear}.weight" for linear in linears}
    assert {stored[name].dtype for name in rest} == {"BF16"}
    for prefix in (
        f"{text}.embed_tokens.weight",
        f"{text}.layers.0.input_layernorm.weight",
        f"{text}.norm.weight",
        *others,
    ):
        assert any(name.startswith(prefix) for name in rest), prefix
    assert all(name.startswith((f"{text}.", *others)) for name in rest)


def test_layouts_differ_in_names_only(tmp_path: Path) -> None:
    """Both layouts have tensors of the same shapes, dtypes and number."""
    kinds = []
    for layout in ("identity", "nested"):
        stored = read_directory(sample(tmp_path / layout, layout=layout))
        kinds.append(sorted((name.split(".")[-2:], tensor.dtype, tensor.shape) for name, tensor in stored.items()))
    assert kinds[0] == kinds[1]


def test_config_is_the_released_one(sample_fp8: Path) -> None:
    """Architecture, text and vision types, and the quantization_config of the Mistral3 releases."""
    config = json.loads((sample_fp8 / "config.json").read_text())
    assert config["architectures"] == ["Mistral3ForConditionalGeneration"]
    assert (config["text_config"]["model_type"], config["vision_config"]["model_type"]) == ("ministral3", "pixtral")
    quantization = config["quantization_config"]
    stated = [quantization[key] for key in ("quant_method", "activation_scheme", "weight_block_size")]
    assert stated == ["fp8", "static", None]
    assert quantization["modules_to_not_convert"] == ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def test_weights_have_a_real_distribution(sample_fp8: Path, sample_block: Path) -> None:
    """Codes reach 448 (amax / 448), almost never beyond one magnitude; values are normal with variance 1 / fan-in."""
    for source in (sample_fp8, sample_block):
        checkpoint = open_checkpoint(source)
        for tensor in checkpoint.quantized:
            values = checkpoint.read(tensor.name).float()
            assert values.std().item() == pytest.approx(tensor.shape[1] ** -0.5, rel=0.1)
            assert abs(values.mean().item()) < 0.1 * tensor.shape[1] ** -0.5 + 0.01
    stored = read_directory(sample_fp8)
    for name, tensor in stored.items():
        if tensor.dtype == "F8_E4M3":
            # The scale is rounded up to bf16, so the largest code may be one below 448.
            assert 416 <= np.abs(tensor.array.astype(np.float32)).max() <= 448, name


def test_block_scheme_has_ragged_blocks(sample_block: Path) -> None:
    """F32 scales of ceil(shape / 128), of ragged weights too; experts, routers, no activation scales."""
    stored = read_directory(sample_block)
    weights = {name: tensor for name, tensor in stored.items() if tensor.dtype == "F8_E4M3"}
    assert any(dim % 128 for tensor in weights.values() for dim in tensor.shape)
    for name, tensor in weights.items():
        scale = stored[f"{name}_scale_inv"]
        assert (scale.dtype, scale.shape) == ("F32", tuple(-(-dim // 128) for dim in tensor.shape))
        for row in range(scale.shape[0]):
            for col in range(scale.shape[1]):
                block = tensor.array[row * 128 : (row + 1) * 128, col * 128 : (col + 1) * 128].astype(np.float32)
                assert np.abs(block).max() == 448
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in weights
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in weights
    assert stored["model.layers.1.mlp.gate.weight"].dtype == "BF16"
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"
    assert not any("activation" in name for name in stored)
    config = json.loads((sample_block / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


@pytest.mark.parametrize("sizes", [Mistral3Sizes(), DeepseekSizes()])
@pytest.mark.parametrize("files", [1, 3, 5])
def test_files(sizes: Mistral3Sizes | DeepseekSizes, files: int, tmp_path: Path) -> None:
    """Files of about equal size, a true index, side files; a scale in another file than its weight."""
    source = sample(tmp_path / "fp8", sizes, files=files)
    names = [f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)]
    names = names if files > 1 else ["model.safetensors"]
    assert set(os.listdir(source)) == {*names, *SIDE_FILES, "model.safetensors.index.json"}
    sizes_on_disk = [(source / name).stat().st_size for name in names]
    assert max(sizes_on_disk) < 1.5 * sum(sizes_on_disk) / files
    assert verify(source).ok
    apart = [tensor for tensor in open_checkpoint(source).quantized if tensor.scale.file != tensor.weight.file]
    assert bool(apart) == (files > 1)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    stored: dict[str, Stored] = {}
    for name in names:
        stored |= read_safetensors(source / name)
    assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in stored.values())
    assert index["weight_map"] == {tensor: name for name in names for tensor in read_safetensors(source / name)}


def test_partition_changes_no_tensor(tmp_path: Path) -> None:
    """One file or three: the same tensors, bit for bit."""
    one, three = sample(tmp_path / "one", files=1), sample(tmp_path / "three", files=3)
    assert read_directory(one) == read_directory(three)


@pytest.mark.parametrize("sizes", [Mistral3Sizes(), DeepseekSizes()])
def test_deterministic_in_the_seed(sizes: Mistral3Sizes | DeepseekSizes, tmp_path: Path) -> None:
    """The same call writes the same directory; another seed other weights of the same shapes."""
    first, again, other = (tree(sample(tmp_path / str(i), sizes, seed=seed)) for i, seed in enumerate((3, 3, 4)))
    assert first == again
    assert first.keys() == other.keys()
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}


def test_layers_differ(sample_fp8: Path) -> None:
    """No two FP8 weights of one shape are equal."""
    codes = [tensor.data for tensor in read_directory(sample_fp8).values() if tensor.dtype == "F8_E4M3"]
    assert len(set(codes)) == len(codes) == 14


def test_true_shape_of_mistral_medium(tmp_path: Path) -> None:
    """88 layers, 616 quantized tensors, the released sizes; in no space."""
    source = sample(tmp_path / "fp8", Mistral3Sizes.true_shape(), files=27, sparse=True)
    checkpoint = open_checkpoint(source)
    assert len(checkpoint.quantized) == 616
    prefix = "model.language_model.layers.87."
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    shapes = {name.removeprefix(prefix): checkpoint[name].shape for name in names}
    assert shapes == {
        "input_layernorm.weight": (12288,), "post_attention_layernorm.weight": (12288,),
        "self_attn.q_proj.weight": (12288, 12288), "self_attn.k_proj.weight": (1024, 12288),
        "self_attn.v_proj.weight": (1024, 12288), "self_attn.o_proj.weight": (12288, 12288),
        "mlp.gate_proj.weight": (28672, 12288), "mlp.up_proj.weight": (28672, 12288),
        "mlp.down_proj.weight": (12288, 28672),
    }  # fmt: skip
    assert "model.language_model.layers.88.input_layernorm.weight" not in checkpoint.tensors
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        assert checkpoint[name].shape == (131072, 12288)
    elements = sum(tensor.numel for tensor in checkpoint.tensors.values())
    assert 125e9 < elements < 131e9
    files = list(source.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 125e9
    assert sum(file.stat().st_blocks for file in files) * 512 < 64 << 20
    assert inspect(source).defects == ()
    config = json.loads((source / "config.json").read_text())["text_config"]
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (88, 12288, 28672)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (96, 8, 128)


def test_true_shape_of_deepseek() -> None:
    """The released sizes of DeepSeek V3: 61 layers, 256 experts."""
    sizes = DeepseekSizes.true_shape()
    assert (sizes.layers, sizes.dense_layers, sizes.hidden) == (61, 3, 7168)
    assert (sizes.intermediate, sizes.expert_intermediate) == (18432, 2048)
    assert (sizes.experts, sizes.heads, sizes.q_rank, sizes.kv_rank, sizes.vocabulary) == (256, 128, 1536, 512, 129280)


@pytest.mark.parametrize(
    "sizes", [Mistral3Sizes(hidden=1024, intermediate=4096), DeepseekSizes(hidden=1024, intermediate=4096)]
)
def test_sparse_has_true_headers_and_holes(sizes: Mistral3Sizes | DeepseekSizes, tmp_path: Path) -> None:
    """Sparse and full have the same headers; sparse takes almost no disk, its scales are valid and its weights zero."""
    full, sparse = sample(tmp_path / "full", sizes), sample(tmp_path / "sparse", sizes, sparse=True)
    for file in sorted(full.glob("*.safetensors")):
        other = sparse / file.name
        assert other.stat().st_size == file.stat().st_size
        assert {n: t[:2] for n, t in read_safetensors(other).items()} == {
            n: t[:2] for n, t in read_safetensors(file).items()
        }
        assert other.stat().st_blocks * 512 < file.stat().st_blocks * 512 / 4
    assert verify(sparse).ok
    for tensor in open_checkpoint(sparse).tensors.values():
        if isinstance(tensor, QuantizedTensor):
            assert not any(read_safetensors(sparse / tensor.weight.file.name)[tensor.name].data)
            break


@pytest.mark.parametrize("kind", ["file", "empty directory", "directory"])
def test_existing_destination_is_refused_untouched(kind: str, tmp_path: Path, cli: Run) -> None:
    """Whatever stands at the destination stays as it is."""
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "directory":
            (out / "x").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError):
        sample(out)
    done = cli("sample", out)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_wrong_arguments(tmp_path: Path) -> None:
    """Sizes that make no model and unknown layouts are a ValueError, before anything is written."""
    for arguments in ({"layout": "flat"}, {"sizes": Mistral3Sizes(heads=3, kv_heads=2)}):
        with pytest.raises(ValueError, match=r"expected|multiple"):
            sample(tmp_path / "out", **arguments)  # type: ignore[arg-type]  # a mistake on purpose
    assert os.listdir(tmp_path) == []


def test_command_line_options(tmp_path: Path, cli: Run) -> None:
    """Every option reaches the sample; the directory is printed; mistakes are usage errors."""
    sizes = {
        "layers": 3, "hidden": 64, "intermediate": 96, "heads": 4, "kv-heads": 1, "head-dim": 16, "vocabulary": 400,
        "vision-layers": 1,
    }  # fmt: skip
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    done = cli("sample", tmp_path / "a", *options, "--layout", "nested", "--files", "2", "--seed", "9")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'a'}\n", "")
    expected = Mistral3Sizes(
        layers=3, hidden=64, intermediate=96, heads=4, kv_heads=1, head_dim=16, vocabulary=400, vision_layers=1
    )  # fmt: skip
    assert tree(tmp_path / "a") == tree(sample(tmp_path / "b", expected, layout="nested", files=2, seed=9))
    assert cli("sample", tmp_path / "c", "--scheme", "block", "--experts", "2", "--layers", "2").returncode == 0
    assert tree(tmp_path / "c") == tree(sample(tmp_path / "d", DeepseekSizes(experts=2)))
    assert cli("sample", tmp_path / "e", "--true-shape", "--sparse", "--layers", "1").returncode == 0
    assert open_checkpoint(tmp_path / "e")["model.language_model.layers.0.mlp.up_proj.weight"].shape == (28672, 12288)
    for wrong in (
        ["--experts", "4"],
        ["--scheme", "block", "--head-dim", "8"],
        ["--scheme", "int4"],
        ["--layout", "flat"],
        ["--layers", "0"],
        ["--files", "0"],
        ["--heads", "3", "--kv-heads", "2"],
    ):
        done = cli("sample", tmp_path / "x", *wrong)
        assert done.returncode == 2, wrong
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_progress_is_told(tmp_path: Path) -> None:
    """Of all weights, up to the last byte, and of the files one after the other."""
    told: list[tuple[int, int, str]] = []
    sample(tmp_path / "sample", progress=lambda *report: told.append(report))
    done, total, doing = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert {done[-1]} == set(total)
    assert list(dict.fromkeys(doing)) == [f"writing model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]

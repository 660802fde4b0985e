"""The conversion: every stored byte against the oracle, and all that stands beside the weights."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException

from fp8ckpt import FP8StorageReader, convert, inspect, open_checkpoint, plan_convert, sample
from fp8ckpt.errors import ConfigError, OutputBusyError, OutputExistsError, RangeError
from fp8ckpt.sample import Mistral3Sizes
from fp8ckpt.tensors.config import QUANTIZATION_KEYS, metadata_without_quantization
from fp8ckpt.tensors.scaled import QuantizedTensor
from tests.conftest import Run
from tests.miniatures import Family, families
from tests.oracle import NUMPY, Stored, dequantize, read_directory, read_safetensors, tree, write_safetensors
from tests.support import cut

FAMILIES = families()
TARGETS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
INDEX = "model.safetensors.index.json"
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
WEIGHT, SCALE = "m.q.weight", "m.q.weight_scale_inv"


def one_weight(
    weight: Stored, scale: Stored, block: tuple[int, ...], config: dict[str, Any] | None = None, **more: Stored
) -> Family:
    """A checkpoint of one FP8 weight, and whatever else."""
    return Family({WEIGHT: weight, SCALE: scale, **more}, config or FP8, {WEIGHT: (SCALE, block)})


def all_codes(*shape: int) -> Stored:
    """Codes of every kind but NaN, the same at every call."""
    codes = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x3A
    return Stored.codes(codes)


def scalar(value: float, dtype: str = "F32") -> Stored:
    return Stored.of(np.asarray(value, np.float32), dtype)


def overflows(family: Family, expected: dict[str, Stored]) -> bool:
    """Whether the oracle meets an infinity that is none in the codes."""
    for name in family.blocks:
        infinite = np.isinf(expected[family.name(name)].array.astype(np.float32))
        if (infinite & np.isfinite(family.tensors[name].array.astype(np.float32))).any():
            return True
    return False


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_the_oracle(name: str, to: str, tmp_path: Path) -> None:
    """Names, dtypes, shapes and every byte are the oracle's; or fp16 is refused where finite codes overflow it."""
    family = FAMILIES[name]
    source = family.write(tmp_path / "fp8")
    expected = family.expected(TARGETS[to])
    if overflows(family, expected):
        assert to == "fp16"
        with pytest.raises(RangeError, match="65504"):
            convert(source, tmp_path / "out", to=to)
        assert sorted(os.listdir(tmp_path)) == ["fp8"]
        return
    before = tree(source)
    result = convert(source, tmp_path / "out", to=to)

    out = tmp_path / "out"
    assert read_directory(out) == expected
    assert tree(source) == before
    assert sorted(os.listdir(tmp_path)) == ["fp8", "out"]
    assert (result.tensors, result.dequantized) == (len(expected), len(family.blocks))
    assert (result.to, result.destination) == (to, out)
    assert result.dropped_scales == len(family.tensors) - len(expected)
    assert result.nan_codes == {}

    partition = {}
    for file in source.glob("*.safetensors"):
        if kept := [name for tensor in read_safetensors(file) if (name := family.name(tensor)) in expected]:
            partition.update(dict.fromkeys(kept, file.name))
    assert {tensor: file.name for file in out.glob("*.safetensors") for tensor in read_safetensors(file)} == partition
    index = json.loads((out / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": sum(len(tensor.data) for tensor in expected.values())},
        "weight_map": partition,
    }

    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            assert stream.metadata() == {"format": "pt"}
        safetensors.torch.save_file(safetensors.torch.load_file(file), tmp_path / "again", {"format": "pt"})
        assert file.read_bytes() == (tmp_path / "again").read_bytes()

    config = json.loads((out / "config.json").read_text())
    assert config == {key: value for key, value in family.config.items() if key not in QUANTIZATION_KEYS}
    assert not (out / "hf_quant_config.json").exists()
    if "params.json" in family.more_files:
        assert json.loads((out / "params.json").read_text()) == {"dim": 16}


@pytest.mark.parametrize("to", TARGETS)
def test_configuration_loses_quantization_and_names_the_target(to: str, tmp_path: Path) -> None:
    """quantization_config goes at the top and nested; dtype and torch_dtype follow the target; all else stays."""
    quantization = FP8["quantization_config"]
    text = {"rope_parameters": {"theta": 1e6}, "n": None}
    config = {
        "architectures": ["X"],
        "dtype": "bfloat16",
        "quantization_config": quantization,
        "text_config": {"torch_dtype": "float8_e4m3fn", "quantization_config": quantization, **text},
        "vision_config": {"dtype": "bfloat16", "layers": [1, 2], "name": "é"},
        "quantization_note": "kept",
    }
    source = one_weight(all_codes(8, 4), scalar(0.5), (8, 4), config).write(tmp_path / "fp8")
    convert(source, tmp_path / "out", to=to)
    name = TORCH_NAMES[to]
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "architectures": ["X"],
        "dtype": name,
        "text_config": {"torch_dtype": name, **text},
        "vision_config": {"dtype": name, "layers": [1, 2], "name": "é"},
        "quantization_note": "kept",
    }


def test_other_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    """Side files, folders and hidden files are copied; the native copy of the weights and ModelOpt's config are not."""
    source = one_weight(all_codes(8, 4), scalar(0.5), (8, 4)).write(tmp_path / "fp8")
    native = {"layers.0.wq.weight": all_codes(8, 4), "layers.0.wq.qscale_weight": scalar(0.5)}
    write_safetensors(source / "consolidated.safetensors", native)
    write_safetensors(source / "consolidated-00001-of-00002.safetensors", native)
    (source / "consolidated.safetensors.index.json").write_text("{}")
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    (source / "params.json").write_text('{"dim": 4, "quantization": {"qformat_weight": "fp8_e4m3"}, "vocab_size": 7}')
    copied = {
        "tokenizer.json": b'{"a":  1}\r\n',
        "tekken.json": os.urandom(3 << 20),
        "README.md": "# é\n".encode(),
        "empty.txt": b"",
        ".gitattributes": b"*.safetensors lfs\n",
        "assets/logo.png": b"\x89PNG\0",
        "assets/deep/er/x.bin": bytes(range(256)),
        "onnx/model.safetensors": b"not read",
        "training_args.bin": b"no weights",
    }
    for name, data in copied.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    note = "weights in 2 other files are not part of the checkpoint, and are copied unchanged with the side files, "
    note += "quantized or not: assets/deep/er/x.bin, onnx/model.safetensors"
    for notes in (plan_convert(source, tmp_path / "out").notes, inspect(source).notes):
        assert note in notes
    assert convert(source, tmp_path / "out").notes == (note,)
    found = tree(tmp_path / "out")
    written = {"config.json", "params.json", INDEX, *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))}
    assert {name: data for name, data in found.items() if name not in written} == copied
    # The second file of the source held the scale only, and is gone with it.
    assert found.keys() - copied.keys() == written - {"model-00002-of-00002.safetensors"}
    assert json.loads(found["params.json"]) == {"dim": 4, "vocab_size": 7}


def test_broken_params_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A configuration that must be rewritten and cannot be read stops the conversion at the door."""
    source = one_weight(all_codes(8, 4), scalar(0.5), (8, 4)).write(tmp_path / "fp8")
    (source / "params.json").write_text("{")
    with pytest.raises(ConfigError, match=r"params\.json"):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["fp8"]


@pytest.mark.parametrize("to", TARGETS)
def test_nan_codes_are_carried_and_counted(to: str, tmp_path: Path) -> None:
    """NaN codes become the oracle's NaN bit for bit, and the result counts them by tensor, over all chunks."""
    codes = np.frombuffer(all_codes(300, 70).data, np.uint8).copy()
    codes[[0, 5, 777, 9000, 20999]] = (0x7F, 0xFF, 0x7F, 0xFF, 0x7F)
    tensors = {
        WEIGHT: Stored.codes(codes.reshape(300, 70)),
        SCALE: scalar(0.01),
        "m.k.weight": Stored.codes(np.full((2, 3), 0xFF, np.uint8)),
        "m.k.weight_scale_inv": scalar(1),
        "a.weight": all_codes(6, 6),
        "a.weight_scale_inv": scalar(2),
    }
    blocks = {"m.k.weight": (2, 3), WEIGHT: (300, 70), "a.weight": (6, 6)}
    family = Family(tensors, FP8, {name: (f"{name}_scale_inv", block) for name, block in blocks.items()})
    result = convert(family.write(tmp_path / "fp8"), tmp_path / "out", to=to)
    assert result.nan_codes == {"m.k.weight": 6, WEIGHT: 5}
    assert read_directory(tmp_path / "out") == family.expected(TARGETS[to])
    values = read_directory(tmp_path / "out")[WEIGHT].array.reshape(-1)
    assert np.flatnonzero(np.isnan(values.astype(np.float32))).tolist() == [0, 5, 777, 9000, 20999]


def test_nan_codes_are_counted_over_chunks_and_extents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor of NaN over many extents: every code is counted once."""
    cut(monkeypatch, 4096, 2)
    family = one_weight(Stored.codes(np.full((129, 257), 0x7F, np.uint8)), scalar(1), (129, 257))
    assert convert(family.write(tmp_path / "fp8"), tmp_path / "out", workers=3).nan_codes == {WEIGHT: 129 * 257}


def test_nan_codes_appear_in_the_summary(tmp_path: Path, cli: Run) -> None:
    """The command line says how many NaN codes there were and where."""
    codes = np.zeros((4, 4), np.uint8)
    codes[1, 2] = 0x7F
    source = one_weight(Stored.codes(codes), scalar(1), (4, 4)).write(tmp_path / "fp8")
    done = cli("convert", source, tmp_path / "out")
    assert done.returncode == 0
    assert "1 NaN codes, in 1 tensors, the first m.q.weight" in done.stdout
    as_json = json.loads(cli("convert", source, tmp_path / "out2", "--json").stdout)
    assert as_json["nan_codes"] == {WEIGHT: 1}


@pytest.mark.parametrize(("scale", "refused"), [(146.0, False), (146.25, True), (1e6, True)])
def test_fp16_overflow_is_refused_only_where_a_code_overflows(scale: float, refused: bool, tmp_path: Path) -> None:
    """448 * 146 = 65408 fits; 448 * 146.25 = 65520 rounds to infinity and is refused by name, with nothing written."""
    family = one_weight(Stored.codes(np.array([[0x7E, 0x01], [0x80, 0xFE]], np.uint8)), scalar(scale), (2, 2))
    source = family.write(tmp_path / "fp8")
    if not refused:
        convert(source, tmp_path / "out", to="fp16")
        assert read_directory(tmp_path / "out") == family.expected("F16")
        return
    with pytest.raises(RangeError, match=r"m\.q\.weight .*2 elements exceed 65504"):
        convert(source, tmp_path / "out", to="fp16")
    assert os.listdir(tmp_path) == ["fp8"]
    convert(source, tmp_path / "out", to="bf16")


def test_fp16_is_not_refused_for_a_large_scale_alone(tmp_path: Path) -> None:
    """A scale of 5000 overflows no code if the codes are small; NaN codes do not count as overflow."""
    family = one_weight(Stored.codes(np.array([[0x38, 0x7F, 0x40, 0x00]], np.uint8)), scalar(5000), (1, 4))
    assert convert(family.write(tmp_path / "fp8"), tmp_path / "out", to="fp16").nan_codes == {WEIGHT: 1}
    assert read_directory(tmp_path / "out") == family.expected("F16")


def test_file_of_scales_only_disappears(tmp_path: Path) -> None:
    """A file that held nothing but scales is not written, and the index does not name it."""
    source = tmp_path / "fp8"
    source.mkdir()
    weights = {"a.weight": all_codes(5, 7), "b.weight": all_codes(3, 3), "norm.weight": scalar(1, "BF16")}
    scales = {"a.weight_scale_inv": scalar(0.5), "b.weight_scale_inv": scalar(0.25), "b.activation_scale": scalar(3)}
    write_safetensors(source / "model-00001-of-00002.safetensors", weights)
    write_safetensors(source / "model-00002-of-00002.safetensors", scales)
    (source / "config.json").write_text("{}")
    result = convert(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model-00001-of-00002.safetensors"]
    assert result.dropped_scales == 3
    blocks = {"a.weight": ("a.weight_scale_inv", (5, 7)), "b.weight": ("b.weight_scale_inv", (3, 3))}
    assert (
        read_directory(tmp_path / "out")
        == Family({**weights, **scales}, {}, blocks, ("b.activation_scale",)).expected()
    )


@pytest.mark.parametrize("named", ["directory", "file"])
def test_single_file_source(named: str, tmp_path: Path) -> None:
    """One file without an index, named itself or by its directory, becomes one file without an index."""
    family = FAMILIES["per-tensor 0-d BF16"]
    source = family.write(tmp_path / "fp8", files=1)
    (source / "tokenizer.json").write_text("{}")
    convert(source if named == "directory" else source / "model.safetensors", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert read_directory(tmp_path / "out") == family.expected()


def test_source_of_parts_without_an_index_gets_one(tmp_path: Path) -> None:
    """Several files and no index: the output has the same files, and an index that is right."""
    family = FAMILIES["block 128 ragged F32"]
    source = family.write(tmp_path / "fp8")
    (source / INDEX).unlink()
    convert(source, tmp_path / "out")
    assert read_directory(tmp_path / "out") == family.expected()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    stored = {name: file.name for file in (tmp_path / "out").glob("*.safetensors") for name in read_safetensors(file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in family.expected().values())


def test_wrong_total_size_is_put_right_and_other_metadata_is_kept(tmp_path: Path) -> None:
    """The index is recomputed, not edited: total_size and total_parameters follow the output."""
    family = FAMILIES["per-tensor 0-d BF16"]
    source = family.write(tmp_path / "fp8")
    index = json.loads((source / INDEX).read_text())
    index["metadata"] = {"total_size": 5, "total_parameters": 6, "origin": "x"}
    (source / INDEX).write_text(json.dumps(index))
    convert(source, tmp_path / "out")
    expected = family.expected().values()
    elements, size = sum(int(np.prod(t.shape)) for t in expected), sum(len(t.data) for t in expected)
    found = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]
    assert found == {"origin": "x", "total_parameters": elements, "total_size": size}


def test_metadata_of_files_is_kept_and_completed(tmp_path: Path) -> None:
    """A file's own metadata stays; a missing format becomes pt."""
    source = one_weight(all_codes(8, 4), scalar(0.5), (8, 4)).write(tmp_path / "fp8", files=1)
    tensors = read_safetensors(source / "model.safetensors")
    write_safetensors(source / "model.safetensors", tensors, {"made by": "Ünit\n"})
    convert(source, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as stream:
        assert stream.metadata() == {"format": "pt", "made by": "Ünit\n"}


def test_names_of_any_kind_are_spelled_as_safetensors_does(tmp_path: Path) -> None:
    """Quotes, control characters and letters beyond ASCII in names: the file equals the library's."""
    names = ['a"b', "tab\there", "é.weight", "日本", "\x7f", "/", "\u2028", "z", "Z", "\U0001d4b3"]
    more = {
        name: Stored.of(np.arange(i + 1, dtype=np.float32), ("F32", "BF16", "F16")[i % 3])
        for i, name in enumerate(names)
    }
    more["flags"] = Stored("BOOL", (3,), b"\0\1\0")
    more["ids"] = Stored("I64", (1,), bytes(8))
    family = one_weight(all_codes(3, 3), scalar(0.5), (3, 3), **more)
    convert(family.write(tmp_path / "fp8", files=1), tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    assert read_safetensors(file) == family.expected()
    safetensors.torch.save_file(safetensors.torch.load_file(file), tmp_path / "again", {"format": "pt"})
    assert file.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(("weight_shape", "scale_shape", "block"), [
    ((0, 16), (), (1, 1)),
    ((0, 16), (1,), (1, 1)),
    ((16, 0), (1, 1), (1, 1)),
    ((0, 16), (0, 1), (1, 16)),
    ((0, 256), (0, 2), (128, 128)),
    ((), (), ()),
    ((), (1,), ()),
    ((5,), (), (5,)),
    ((5,), (1,), (5,)),
    ((5,), (5,), (1,)),
    ((1,), (1,), (1,)),
    ((1, 1), (1, 1), (1, 1)),
])  # fmt: skip
def test_empty_scalar_and_vector_weights(
    weight_shape: tuple[int, ...], scale_shape: tuple[int, ...], block: tuple[int, ...], to: str, tmp_path: Path
) -> None:
    """FP8 weights without elements, of no dimension and of one, beside others, come out as the oracle has them."""
    steps = np.arange(np.prod(scale_shape), dtype=np.float32).reshape(scale_shape)
    scale = Stored.of(np.full(scale_shape, 0.375, np.float32) + steps, "F32")
    weight = all_codes(*weight_shape) if weight_shape else Stored("F8_E4M3", (), b"\x39")
    more = {
        "z.empty": Stored("BF16", (0, 3), b""),
        "b.norm": scalar(2, "BF16"),
        "z.weight": all_codes(7, 3),
        "z.weight_scale_inv": scalar(3),
    }
    config = {"quantization_config": {"weight_block_size": [128, 128]}} if 128 in block else FP8
    tensors = {WEIGHT: weight, SCALE: scale, **more}
    family = Family(tensors, config, {"z.weight": ("z.weight_scale_inv", (7, 3))}, (WEIGHT, SCALE))
    expected = family.expected(TARGETS[to])
    empty = 0 in weight_shape
    values = b"" if empty else dequantize(weight, _as_grid(scale, weight_shape), block, TARGETS[to])
    expected[WEIGHT] = Stored(TARGETS[to], weight_shape, values)
    convert(family.write(tmp_path / "fp8", files=1), tmp_path / "out", to=to)
    assert read_directory(tmp_path / "out") == expected
    for file in (tmp_path / "out").glob("*.safetensors"):
        safetensors.torch.save_file(safetensors.torch.load_file(file), tmp_path / "again", {"format": "pt"})
        assert file.read_bytes() == (tmp_path / "again").read_bytes()


def _as_grid(scale: Stored, weight_shape: tuple[int, ...]) -> Stored:
    """The same scales with the weight's rank."""
    return Stored(
        scale.dtype, scale.shape if len(scale.shape) == len(weight_shape) else (1,) * len(weight_shape), scale.data
    )


def test_nothing_quantized_is_converted_to_itself(tmp_path: Path) -> None:
    """A checkpoint without FP8 keeps every tensor's bytes, whatever the target."""
    tensors = {
        "a.weight": Stored.of(np.arange(12, dtype=np.float32).reshape(3, 4), "BF16"),
        "b": Stored("I32", (2,), bytes(8)),
    }
    source = Family(tensors, {}, {}).write(tmp_path / "fp8")
    result = convert(source, tmp_path / "out", to="fp32")
    assert read_directory(tmp_path / "out") == tensors
    assert (result.dequantized, result.dropped_scales) == (0, 0)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("chunks", [(1, 1), (1, 3), (2, 7), (5, 5)])
def test_output_does_not_depend_on_chunks(
    chunks: tuple[int, int], to: str, sample_block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes over chunk and extent edges: many small chunks give the bytes of one large one."""
    convert(sample_block, tmp_path / "whole", to=to)
    cut(monkeypatch, 4096 * chunks[0], chunks[1])
    convert(sample_block, tmp_path / "pieces", to=to, workers=3)
    assert tree(tmp_path / "pieces") == tree(tmp_path / "whole")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_in_pages_equals_the_oracle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of one page, blocks of every family are entered at any row and column."""
    cut(monkeypatch, 4096, 1)
    family = FAMILIES[name]
    convert(family.write(tmp_path / "fp8"), tmp_path / "out", to="fp32", workers=2)
    assert read_directory(tmp_path / "out") == family.expected("F32")


@pytest.mark.parametrize(("metadata", "kept"), [
    ({"_quantization_metadata": "{}", "quantization_config": "{}", "modelspec.title": "x"}, {"modelspec.title": "x"}),
    ({"tensor_names": '["m.weight", "format", 3]', "m.weight": "{}", "n": "1"}, {"n": "1"}),
    ({"tensor_names": "[[", "m.weight": "x"}, None),
    ({"tensor_names": "[" * 100_000, "m.weight": "x"}, None),
    ({"tensor_names": '"a, b"', "m.weight": "x"}, None),
])  # fmt: skip
def test_what_metadata_says_of_quantization_goes(metadata: dict[str, str], kept: dict[str, str] | None) -> None:
    """And nothing else: what only looks like torchao's list of names is kept."""
    given = {**metadata, "format": "pt"}
    assert metadata_without_quantization(given) == (given if kept is None else {**kept, "format": "pt"})


def test_real_tensors_over_real_chunk_edges(tmp_path: Path) -> None:
    """Tensors of more than 10 MB and odd sizes straddle the 4 MiB chunks: every element is the oracle's."""
    rng = np.random.default_rng(5)
    ragged = all_codes(3001, 3607)
    tensors = {
        "a.weight": ragged,
        "a.weight_scale_inv": Stored.of(np.exp2(rng.uniform(-9, -1, (24, 29))).astype(np.float32), "F32"),
        "b.weight": all_codes(1999, 2003),
        "b.weight_scale_inv": scalar(0.0123, "BF16"),
        "c.weight": Stored.of(rng.standard_normal((1777, 1801)).astype(np.float32), "BF16"),
    }
    config = {"quantization_config": {"weight_block_size": [128, 128]}}
    blocks = {"a.weight": ("a.weight_scale_inv", (128, 128)), "b.weight": ("b.weight_scale_inv", (1999, 2003))}
    family = Family(tensors, config, blocks)
    convert(family.write(tmp_path / "fp8", files=1), tmp_path / "out")
    assert read_directory(tmp_path / "out") == family.expected()


def test_workers_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 2 and 5 workers write identical directories."""
    source = sample(tmp_path / "fp8", Mistral3Sizes(layers=2, hidden=256, intermediate=640))
    cut(monkeypatch, 8192, 4)
    outputs = []
    for workers in (1, 2, 5):
        convert(source, tmp_path / f"out{workers}", workers=workers)
        outputs.append(tree(tmp_path / f"out{workers}"))
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("pieces", [False, True])
def test_every_source_byte_is_read_once_and_every_output_byte_is_written_once(
    pieces: bool, sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reads and writes themselves, as the operating system sees them, cover the data exactly once."""
    if pieces:
        cut(monkeypatch, 4096, 3)
    reads: dict[str, list[tuple[int, int]]] = defaultdict(list)
    writes: dict[str, list[tuple[int, int]]] = defaultdict(list)
    preadv, pwrite = os.preadv, os.pwrite

    def counted_preadv(fd: int, buffers: Any, offset: int, *rest: int) -> int:
        count = preadv(fd, buffers, offset, *rest)
        reads[Path(f"/proc/self/fd/{fd}").readlink().name].append((offset, offset + count))
        return count

    def counted_pwrite(fd: int, data: Any, offset: int) -> int:
        count = pwrite(fd, data, offset)
        writes[Path(f"/proc/self/fd/{fd}").readlink().name].append((offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", counted_preadv)
    monkeypatch.setattr(os, "pwrite", counted_pwrite)
    result = convert(sample_fp8, tmp_path / "out", workers=2)

    checkpoint = open_checkpoint(sample_fp8)
    spans = [tensor.weight if isinstance(tensor, QuantizedTensor) else tensor for tensor in checkpoint.tensors.values()]
    assert result.bytes_read == sum(span.nbytes for span in spans)
    for span in spans:
        parts = sorted(part for part in reads[span.file.name] if span.start <= part[0] < span.stop)
        assert parts[0][0] == span.start
        assert parts[-1][1] == span.stop
        assert all(one[1] == two[0] for one, two in pairwise(parts)), span.name
    files = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert result.bytes_written == sum(files.values())
    assert writes.keys() == files.keys()
    for name, size in files.items():
        parts = sorted(writes[name])
        assert (parts[0][0], parts[-1][1]) == (0, size)
        assert all(one[1] == two[0] for one, two in pairwise(parts)), name


def test_progress_ends_at_the_total(sample_fp8: Path, tmp_path: Path) -> None:
    """Progress never falls, and ends at the bytes written."""
    seen: list[tuple[int, int]] = []
    result = convert(
        sample_fp8, tmp_path / "out", workers=2, progress=lambda done, total, doing: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {result.bytes_written}
    assert seen[-1][0] == result.bytes_written
    assert result.bytes_resumed == 0


@pytest.mark.parametrize("kind", ["file", "empty directory", "full directory", "broken link"])
def test_existing_destination_is_refused_untouched(kind: str, sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """Whatever stands at DST stays as it is; no partial output appears."""
    out = tmp_path / "out"
    if kind == "file":
        out.write_bytes(b"mine")
    elif kind == "broken link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "full directory":
            (out / "model.safetensors").write_bytes(b"mine")
    before = (os.lstat(out).st_mtime_ns, os.lstat(out).st_ino, tree(tmp_path))
    with pytest.raises(OutputExistsError, match="the destination exists"):
        convert(sample_fp8, out)
    done = cli("convert", sample_fp8, out)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert (os.lstat(out).st_mtime_ns, os.lstat(out).st_ino, tree(tmp_path)) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("where", ["out", "deep/er/out", "../fp8/out", "."])
def test_destination_inside_the_source_is_refused(where: str, sample_fp8: Path, tmp_path: Path) -> None:
    """A destination below the source, however spelled, is refused and nothing is made."""
    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError):
        convert(source, source / where)
    assert tree(tmp_path) == before
    assert not (source / "deep").exists()
    assert os.listdir(tmp_path) == ["fp8"]


def test_two_conversions_to_one_destination(sample_fp8: Path, tmp_path: Path) -> None:
    """While one writes DST, another is refused; the first ends undisturbed."""
    started, go_on = threading.Event(), threading.Event()

    def wait(done: int, total: int, doing: str) -> None:
        started.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(convert, sample_fp8, tmp_path / "out", workers=1, progress=wait)
        try:
            assert started.wait(60)
            with pytest.raises(OutputBusyError, match="another process is writing it"):
                convert(sample_fp8, tmp_path / "out")
        finally:
            go_on.set()
        first.result()
    convert(sample_fp8, tmp_path / "alone")
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")


def test_hub_snapshot_of_links(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """A snapshot whose files are links into blobs converts like the directory itself, by path and by hub id."""
    repository = tmp_path / "cache/models--org--model"
    snapshot = repository / "snapshots/abc123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc123")
    for i, file in enumerate(sorted(sample_fp8.iterdir())):
        shutil.copy(file, repository / f"blobs/{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    convert(sample_fp8, tmp_path / "plain")
    convert(snapshot, tmp_path / "linked")
    assert tree(tmp_path / "linked") == tree(tmp_path / "plain")
    assert not any(file.is_symlink() for file in (tmp_path / "linked").iterdir())
    done = cli("convert", "org/model", tmp_path / "by-id", env={"HF_HUB_CACHE": str(tmp_path / "cache")})
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "by-id") == tree(tmp_path / "plain")


def test_destination_in_folders_that_do_not_exist(
    sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing parents are made; a relative path is taken from the working directory; and so is the source."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fp8").symlink_to(sample_fp8)
    result = convert("fp8", "a/b/out")
    assert result.destination == tmp_path / "a/b/out"
    assert os.listdir(tmp_path / "a/b") == ["out"]


@pytest.mark.parametrize("arguments", [{"to": "int8"}, {"to": "auto"}, {"workers": 0}, {"workers": -1}])
def test_wrong_arguments_are_a_value_error(arguments: dict[str, Any], sample_fp8: Path, tmp_path: Path) -> None:
    """Mistakes of the caller are told before anything is looked at."""
    with pytest.raises(ValueError, match="expected"):
        convert(sample_fp8, tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == []


def test_command_line_prints_a_summary(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """One line on stdout, nothing on stderr where that is no terminal; --json is the result; usage errors are 2."""
    done = cli("convert", sample_fp8, tmp_path / "out", "--to", "fp32", "--workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "14 dequantized to fp32, 28 scales dropped" in done.stdout
    as_json = json.loads(cli("convert", sample_fp8, tmp_path / "out2", "--json").stdout)
    assert as_json["destination"] == str(tmp_path / "out2")
    assert (as_json["to"], as_json["dequantized"], as_json["dropped_scales"]) == ("bf16", 14, 28)
    assert cli("convert", sample_fp8, tmp_path / "out3", "--to", "int4").returncode == 2
    assert cli("convert", sample_fp8).returncode == 2
    assert cli("convert", sample_fp8, tmp_path / "out3", "--workers", "0").returncode == 2
    assert not (tmp_path / "out3").exists()


def test_all_numpy_dtypes_of_unquantized_tensors_pass_through(tmp_path: Path) -> None:
    """Integers, booleans and wide floats keep dtype and bytes, NaN payloads and signed zeros included."""
    rng = np.random.default_rng(1)
    plain = {
        f"p.{dtype}": Stored(
            dtype, (33,), rng.integers(0, 2, 33, np.uint8).tobytes() if dtype == "BOOL" else rng.bytes(33 * itemsize)
        )
        for dtype, itemsize in ((name, np.dtype(kind).itemsize) for name, kind in NUMPY.items())
        if not dtype.startswith(("F8", "F4"))
    }
    family = one_weight(all_codes(5, 3), scalar(0.5), (5, 3), **plain)
    convert(family.write(tmp_path / "fp8"), tmp_path / "out", to="fp16")
    assert read_directory(tmp_path / "out") == family.expected("F16")


@pytest.mark.parametrize(("to", "scale"), [("bf16", 1e36), ("fp32", 1e36), ("fp16", 200.0)])
def test_finite_codes_that_become_infinite_are_refused(to: str, scale: float, tmp_path: Path) -> None:
    """Whoever reads them; where no code is so large that it would, and for codes that are infinite, nothing is said."""
    codes = np.full((8, 16), 0x38, np.uint8)  # 1.0
    small = one_weight(Stored.codes(codes), Stored.of(np.full((), scale), "F32"), (8, 16)).write(tmp_path / "small")
    convert(small, tmp_path / "small-out", to=to)
    codes[3, 5] = 0x7E  # 448
    family = one_weight(Stored.codes(codes), Stored.of(np.full((), scale), "F32"), (8, 16))
    large = family.write(tmp_path / "large")
    target = torch.empty(8, 16, dtype=getattr(torch, TORCH_NAMES[to]))
    with pytest.raises(RangeError, match=rf"^{WEIGHT} in .*: 1 elements"):
        convert(large, tmp_path / "large-out", to=to)
    with pytest.raises(CheckpointException, match=rf"{WEIGHT} in .*: 1 elements with finite codes exceed"):
        dcp.load({WEIGHT: target}, storage_reader=FP8StorageReader(large), no_dist=True)
    codes[3, 5] = 0x7C  # infinity in e5m2
    infinite = one_weight(Stored.codes(codes, "F8_E5M2"), Stored.of(np.full((), 1.0), "F32"), (8, 16))
    dcp.load({WEIGHT: target}, storage_reader=FP8StorageReader(infinite.write(tmp_path / "infinite")), no_dist=True)
    assert int(target.isinf().sum()) == 1

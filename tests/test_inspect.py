"""Inspection: the numbers are those of the headers, every reason and every defect is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fp8ckpt import inspect, sample
from fp8ckpt.errors import UnknownTensorError
from fp8ckpt.inspect import Scheme, Unquantized
from fp8ckpt.sample import Mistral3Sizes
from fp8ckpt.stores import local
from fp8ckpt.system import read_at
from fp8ckpt.tensors.scale_ranges import ScaleRange
from tests.conftest import Run
from tests.miniatures import Family, families
from tests.oracle import Stored, read_directory, read_safetensors, scale_floats, write_safetensors

FAMILIES = families()
BLOCKS = {
    "per-tensor 0-d BF16": ("per tensor", "[]"),
    "per-tensor [1]": ("per tensor", "[1]"),
    "per-tensor [1,1]": ("per tensor", "[1, 1]"),
    "per-channel [o,1]": ("1 x all", "[40, 1]"),
    "per-channel [o]": ("1 x all", "[40]"),
    "block 128 ragged F32": ("128 x 128", "[3, 2]"),
    "experts [E,1,1]": ("1 x all x all", "[3, 1, 1]"),
    "experts in blocks": ("1 x 128 x 128", "[3, 2, 2]"),
    "experts fbgemm": ("1 x all x 1", "[3, 1, 16]"),
    "ModelOpt 4-D": ("128 x 128", "[2, 1, 3, 1]"),
    "MXFP8 U8": ("1 x 32", "[24, 4]"),
}


def numel(tensor: Stored) -> int:
    return int(np.prod(tensor.shape))


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_of_every_family(name: str, tmp_path: Path) -> None:
    """Tensors, elements, bytes and what bf16 takes are what the stored tensors add up to; no defect."""
    family = FAMILIES[name]
    found = inspect(family.write(tmp_path / "fp8"))
    expected = family.expected()
    assert found.defects == ()
    assert found.path == tmp_path / "fp8"
    assert found.files == 2
    assert found.tensors == len(expected)
    assert found.elements == sum(numel(tensor) for tensor in expected.values())
    assert found.stored_bytes == sum(len(tensor.data) for tensor in family.tensors.values())
    assert found.bf16_bytes == sum(len(tensor.data) for tensor in expected.values())
    assert found.activation_scales + found.cache_scales == len(family.dropped)
    schemes = {(family.tensors[w].dtype, family.tensors[s].dtype, block[-1]) for w, (s, block) in family.blocks.items()}
    assert {(scheme.dtype, scheme.scale_dtype) for scheme in found.schemes} == {scheme[:2] for scheme in schemes}
    assert sum(scheme.tensors for scheme in found.schemes) == len(family.blocks)
    assert sum(scheme.elements for scheme in found.schemes) == sum(numel(family.tensors[w]) for w in family.blocks)
    both = [family.tensors[key] for weight, (scale, _) in family.blocks.items() for key in (weight, scale)]
    assert sum(scheme.bytes for scheme in found.schemes) == sum(len(tensor.data) for tensor in both)
    scheme = found.schemes[0]
    if name in BLOCKS:
        assert (scheme.block, scheme.scale_shape) == BLOCKS[name]


def test_miniature(sample_fp8: Path) -> None:
    """The Mistral3 miniature: one scheme, four reasons not to quantize, activation scales."""
    found = inspect(sample_fp8)
    # 2 layers of q (128 x 128), k and v (64 x 128), o (128 x 128), gate, up and down (256 x 128)
    elements = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
    assert found.schemes == (Scheme("F8_E4M3", "per tensor", "BF16", "[]", 14, elements, elements + 2 * 14),)
    assert (found.tensors, found.files, found.activation_scales, found.cache_scales, found.notes) == (45, 3, 14, 0, ())
    by_reason = {row.reason: row for row in found.unquantized}
    assert by_reason["an embedding"] == Unquantized(
        "BF16", "an embedding", 1, 512 * 128, 2 * 512 * 128, ("model.language_model.embed_tokens.weight",)
    )
    norms = by_reason["a vector (norm, bias)"]
    assert (norms.tensors, norms.elements) == (5, 5 * 128)
    assert norms.modules == (
        "model.language_model.layers.*.input_layernorm.weight",
        "model.language_model.layers.*.post_attention_layernorm.weight",
        "model.language_model.norm.weight",
    )
    listed = by_reason["in the configuration's skip list"]
    assert listed.tensors == 25
    assert by_reason.keys() == {"an embedding", "a vector (norm, bias)", "in the configuration's skip list"}
    assert sum(row.tensors for row in found.unquantized) + 14 == found.tensors
    assert sum(row.bytes for row in found.unquantized) + found.schemes[0].bytes + 2 * 14 == found.stored_bytes


def test_blocks(sample_block: Path) -> None:
    """The DeepSeek miniature: blocks of 128 x 128, varying shapes, unquantized routers, no activation scales."""
    found = inspect(sample_block)
    (scheme,) = found.schemes
    stored = read_directory(sample_block)
    weights = [tensor for tensor in stored.values() if tensor.dtype == "F8_E4M3"]
    assert any(tensor.shape[1] == 128 for tensor in weights)  # one block spans a row, and is none the larger for it
    assert (scheme.block, scheme.scale_dtype, scheme.scale_shape) == ("128 x 128", "F32", "various")
    assert (scheme.tensors, scheme.elements) == (len(weights), sum(numel(tensor) for tensor in weights))
    assert found.activation_scales == 0
    rows = {(row.dtype, row.reason): row for row in found.unquantized}
    assert rows["F32", "a vector (norm, bias)"].modules == ("model.layers.*.mlp.gate.e_score_correction_bias",)
    assert set(rows["BF16", "stored without a scale"].modules) == {"lm_head.weight", "model.layers.*.mlp.gate.weight"}


@pytest.mark.parametrize(("entry", "listed"), [
    ("lm_head", True),
    ("m.lm_head", False),
    ("head", False),
    ("m", False),
    ("re:.*head$", True),
    ("re:head", False),
    ("re:(", False),
    ("*head", True),
    ("lm*", True),
    ("l*d", True),
    ("m*x", False),
])  # fmt: skip
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"])
def test_skip_lists(key: str, entry: str, listed: bool, tmp_path: Path) -> None:
    """An entry of a skip list speaks of a module by name, ancestor, leaf, wildcard or pattern, and of no other."""
    family = FAMILIES["per-tensor 0-d BF16"]
    config = {"quantization_config": {key: [entry, 5]}}
    found = inspect(Family(family.tensors, config, family.blocks).write(tmp_path / "fp8"))
    reasons = {row.modules: row.reason for row in found.unquantized}
    assert reasons["lm_head.weight",] == ("in the configuration's skip list" if listed else "stored without a scale")


def test_skip_list_of_modelopt(tmp_path: Path) -> None:
    """hf_quant_config.json has a skip list of its own."""
    found = inspect(FAMILIES["ModelOpt 4-D"].write(tmp_path / "fp8"))
    reasons = {row.modules: row.reason for row in found.unquantized}
    assert reasons["lm_head.weight",] == "in the configuration's skip list"


def test_nothing_quantized(tmp_path: Path) -> None:
    """A bf16 checkpoint has no scheme and no defect, and bf16 takes what is stored."""
    tensors = {"a.weight": Stored("BF16", (2, 3), bytes(12)), "b": Stored("F32", (), bytes(4))}
    found = inspect(Family(tensors, {}, {}).write(tmp_path / "bf16"))
    assert found.schemes == ()
    assert {row.reason for row in found.unquantized} == {"nothing is quantized"}
    assert found.bf16_bytes == found.stored_bytes == 16


def test_mixed_schemes_are_told_apart_largest_first(tmp_path: Path) -> None:
    """Per-tensor, per-channel and block scales in one checkpoint: a row each."""
    tensors: dict[str, Stored] = {}
    shapes = (((4, 4), ()), ((300, 200), (3, 2)), ((40, 24), (40, 1)), ((8, 8), ()))
    for name, (weight, scale) in zip("abcd", shapes, strict=True):
        tensors[f"{name}.weight"] = Stored.codes(np.zeros(weight, np.uint8))
        tensors[f"{name}.weight_scale"] = Stored.of(np.ones(scale, np.float32), "F32")
    config = {"quantization_config": {"weight_block_size": [128, 128]}}
    found = inspect(Family(tensors, config, {}).write(tmp_path / "fp8"))
    assert [(s.block, s.scale_shape, s.tensors, s.elements) for s in found.schemes] == [
        ("128 x 128", "[3, 2]", 1, 60_000),
        ("1 x all", "[40, 1]", 1, 960),
        ("per tensor", "[]", 2, 80),
    ]


def test_wrong_total_size_is_a_note(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """A wrong total_size stops nobody, and is mentioned."""
    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 1
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    found = inspect(source)
    assert found.defects == ()
    assert len(found.notes) == 1
    done = cli("inspect", source)
    assert done.returncode == 0
    assert "note: model.safetensors.index.json: metadata.total_size is" in done.stdout


def test_defects_are_all_listed_beside_the_sound_rest(sample_fp8: Path, tmp_path: Path) -> None:
    """A file that is cut off, a bad scale in another: both are defects, and the sound tensors are still counted."""
    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    files = sorted(source.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:50])
    tensors = read_safetensors(files[1])
    name = next(name for name in tensors if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in tensors)
    write_safetensors(files[1], {**tensors, name: Stored.of(np.array(-1, np.float32), "BF16")}, {"format": "pt"})
    found = inspect(source)
    kinds = {(type(defect).__name__, defect.tensor) for defect in found.defects}
    assert {("TruncatedFileError", None), ("ScaleValueError", name)} <= kinds
    # What may lie in the unreadable file is not held against the rest.
    assert not any(kind in ("MissingScaleError", "OrphanScaleError") for kind, _ in kinds)
    assert found.schemes[0].tensors > 0


def test_command_line(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """A table for people, JSON for machines; exit 0 without a defect, 1 with one, 2 for usage."""
    done = cli("inspect", sample_fp8)
    assert (done.returncode, done.stderr) == (0, "")
    parts = ("45 tensors", "F8_E4M3", "per tensor", "activation scales: 14", "in bf16: ", "defects: none")
    assert all(part in done.stdout for part in (*parts, "in the configuration's skip list"))
    as_json = json.loads(cli("inspect", sample_fp8, "--json").stdout)
    found = inspect(sample_fp8)
    assert as_json["schemes"] == [found.schemes[0].__dict__]
    assert (as_json["path"], as_json["bf16_bytes"], as_json["defects"]) == (str(sample_fp8), found.bf16_bytes, [])
    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    min(source.glob("*.safetensors")).unlink()
    done = cli("inspect", source)
    assert (done.returncode, done.stderr) == (1, "")
    assert "IndexMismatchError" in done.stdout
    done = cli("inspect", source, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert {defect["kind"] for defect in json.loads(done.stdout)["defects"]} == {"IndexMismatchError"}
    assert cli("inspect").returncode == 2


@pytest.mark.parametrize(("shape", "scale", "stated", "block"), [
    ((128, 128), (1, 1), (128, 128), "128 x 128"),
    ((64, 300), (1, 3), (128, 128), "128 x 128"),
    ((300, 64), (3, 1), (128, 128), "128 x 128"),
    ((128, 128), (), (128, 128), "per tensor"),
    ((128, 128), (1,), (128, 128), "per tensor"),
    ((3, 128, 128), (3, 1, 1), (128, 128), "1 x 128 x 128"),
    ((24, 32), (24, 1), (1, 32), "1 x 32"),
    ((24, 32), (24, 1), None, "1 x all"),
    ((24, 32), (24, 1), (128, 128), "1 x all"),
])  # fmt: skip
def test_a_block_is_named_by_its_size(
    shape: tuple[int, ...], scale: tuple[int, ...], stated: tuple[int, ...] | None, block: str, tmp_path: Path
) -> None:
    """Also where one block spans a row, a column, or all of a weight; as long as the configuration states that size."""
    tensors = {
        "a.weight": Stored.codes(np.full(shape, 0x38, np.uint8)),
        "a.weight_scale_inv": Stored.of(np.ones(scale, np.float32), "F32"),
    }
    config = {"quantization_config": {"weight_block_size": stated and list(stated)}}
    found = inspect(Family(tensors, config, {}).write(tmp_path / "fp8"), tensor="")
    assert found.defects == ()
    assert [scheme.block for scheme in found.schemes] == [found.listed[0].block] == [block]


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_listed(name: str, tmp_path: Path) -> None:
    """Each with dtype, shape, file and the range of its scales, as they are stored."""
    family = FAMILIES[name]
    source = family.write(tmp_path / "fp8")
    found = inspect(source, tensor="", scales=True)
    stored = {family.name(key): key for key in family.blocks}
    shapes = {name: tensor.shape for name, tensor in family.expected().items()}
    assert {row.name: row.shape for row in found.listed} == shapes
    for row in found.listed:
        key = stored.get(row.name, row.name)
        assert row.dtype == family.tensors[key].dtype
        assert key in read_safetensors(source / row.file)
        if key not in family.blocks:
            assert (row.block, row.scale_dtype, row.scale_shape, row.scales) == (None,) * 4
            continue
        scale = family.tensors[family.blocks[key][0]]
        values = scale_floats(scale)
        assert (row.scale_dtype, row.scale_shape) == (scale.dtype, scale.shape)
        assert row.scales is not None
        assert (row.scales.count, row.scales.least, row.scales.greatest) == (values.size, values.min(), values.max())
    assert sum(kind.weights for kind in found.scales) == len(family.blocks)
    sizes = [scale_floats(family.tensors[scale]).size for scale, _ in family.blocks.values()]
    assert sum(kind.scales.count for kind in found.scales) == sum(sizes)


def test_a_pattern_is_searched_in_names(sample_fp8: Path, cli: Run) -> None:
    """Only what matches is listed; nothing that does is told in one line; a pattern that is none is wrong usage."""
    found = inspect(sample_fp8, tensor=r"layers\.1\.mlp\.(gate|up)_proj")
    names = [row.name.rpartition("layers.")[2] for row in found.listed]
    assert names == ["1.mlp.gate_proj.weight", "1.mlp.up_proj.weight"]
    assert (inspect(sample_fp8).listed, inspect(sample_fp8).scales) == ((), ())
    with pytest.raises(UnknownTensorError, match="no tensor has a name like 'nothing'"):
        inspect(sample_fp8, tensor="nothing")
    done = cli("inspect", sample_fp8, "--tensor", r"self_attn\.o_proj")
    names = [line.split()[0].rpartition("layers.")[2] for line in done.stdout.splitlines()[1:-1]]
    assert names == ["0.self_attn.o_proj.weight", "1.self_attn.o_proj.weight"]
    assert cli("inspect", sample_fp8, "--tensor", "nothing").returncode == 1
    done = cli("inspect", sample_fp8, "--tensor", "o_proj(")
    assert (done.returncode, "no regular expression" in done.stderr) == (2, True)


def test_scales_that_stand_out_are_flagged(tmp_path: Path, cli: Run) -> None:
    """By kind of module: the least, the median and the greatest; and the weight that is unlike its kind."""
    tensors: dict[str, Stored] = {}
    for layer in range(6):
        for leaf, scale in (("up", 1.0), ("down", 64.0)):
            tensors[f"layers.{layer}.{leaf}.weight"] = Stored.codes(np.full((4, 4), 0x38, np.uint8))
            odd = 100.0 if (layer, leaf) == (3, "up") else scale
            tensors[f"layers.{layer}.{leaf}.weight_scale"] = Stored.of(np.float32(odd), "F32")
    source = Family(tensors, {}, {}).write(tmp_path / "fp8")
    up, down = inspect(source, scales=True).scales
    assert (up.kind, up.weights, up.scales) == ("up", 6, ScaleRange(6, 1.0, 1.0, 100.0))
    assert (up.outliers, down.outliers) == ({"layers.3.up.weight": 100.0}, {})
    assert "stands out: layers.3.up.weight, 100 times" in cli("inspect", source, "--scales").stdout


def test_what_is_defective_has_no_range(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """A bad scale is a defect, and the listing is valid JSON; so with a truncated file and a bad configuration."""
    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    file = min(source.glob("*.safetensors"))
    tensors = read_safetensors(file)
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    write_safetensors(file, {**tensors, name: Stored.of(np.array(np.nan, np.float32), "BF16")}, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = "wide"
    (source / "config.json").write_text(json.dumps(config))
    found = inspect(source, tensor="", scales=True)
    assert {type(defect).__name__ for defect in found.defects} == {"ScaleValueError", "ConfigError"}
    assert [row.name for row in found.listed if row.block and row.scales is None] == [name.removesuffix("_scale_inv")]
    assert "NaN" not in cli("inspect", source, "--json").stdout
    file.write_bytes(file.read_bytes()[:-1])
    assert cli("inspect", source, "--scales", "--tensor", "proj").returncode == 1


def test_128_billion_parameters_are_inspected_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """True shapes in sparse files: no weight is read, of 130 GB a few MB; the numbers are the model's."""
    source = sample(tmp_path / "fp8", Mistral3Sizes.true_shape(), files=27, sparse=True)
    read: list[int] = []

    def counted(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        read.append(read_at(fd, buffers, offset))
        return read[-1]

    monkeypatch.setattr(local, "read_at", counted)
    found = inspect(source)
    assert 0 < sum(read) < 8 << 20
    (scheme,) = found.schemes
    layer = 2 * 12288 * 12288 + 2 * 1024 * 12288 + 3 * 28672 * 12288
    assert (scheme.tensors, scheme.elements, scheme.block) == (616, 88 * layer, "per tensor")
    assert found.activation_scales == 616
    assert found.files == 27
    assert found.defects == ()
    assert found.bf16_bytes == 2 * found.elements

"""The way back to FP8 in a base's layout: byte-identical where nothing was trained, the oracle's codes and scales
elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8ckpt import convert, open_checkpoint, sample, verify
from fp8ckpt.convert import Fp8Result
from fp8ckpt.errors import (
    Fp8CheckpointError,
    ModelMismatchError,
    OutputExistsError,
    RangeError,
    UnsupportedFormatError,
    WeightValueError,
)
from fp8ckpt.output.files import OutputFile
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes
from tests.catalogue import Row, catalogue
from tests.miniatures import Family, families
from tests.oracle import (
    NUMPY,
    Stored,
    assert_same_tree,
    dequantize,
    fresh_scale,
    maxima,
    quantize,
    read_directory,
    read_safetensors,
    scale_floats,
    spread,
    tree,
    write_plain,
)
from tests.support import ALL, cut, each

E4M3 = {
    name: family
    for name, family in families().items()
    if {family.tensors[w].dtype for w in family.blocks} == {"F8_E4M3"}
}
OTHERS = {name: family for name, family in families().items() if name not in E4M3}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
TARGETS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
NESTED = [
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.lm_head.", "lm_head."),
]
INDEX = "model.safetensors.index.json"


def steps(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Make the parts of a chunk that are worked on at once small."""
    monkeypatch.setattr("fp8ckpt.encodings.passing.STEP", elements)


def back(source: Path, base: Path, destination: Path, **how: Any) -> Fp8Result:
    result = convert(source, destination, to="fp8", like=base, **how)
    assert isinstance(result, Fp8Result)
    return result


def comes_back(base: Path, to: str = "bf16") -> Fp8Result:
    """To ``to`` and back like the original: every file of the directory, byte for byte."""
    convert(base, plain := base.with_name(f"plain-{to}"), to=to)
    result = back(plain, base, base.with_name(f"back-{to}"))
    assert_same_tree(base.with_name(f"back-{to}"), base)
    return result


def one(*shape: int, scale: float = 1, dtype: str = "F32") -> dict[str, Stored]:
    """An FP8 weight of ones, with one scale."""
    codes = Stored.codes(np.full(shape or (2, 2), 0x38, np.uint8))
    return {"w.weight": codes, "w.weight_scale": Stored.of(np.float32(scale), dtype)}


UE8M0 = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}


def powers_of_two(root: Path, config: dict[str, Any], rng: np.random.Generator) -> Path:
    """DeepSeek V3.1: F32 scales that are powers of two; blocks of 128, and one scale for a matrix beside them."""
    tensors: dict[str, Stored] = {}
    for name, shape, grid in (("a.weight", (300, 200), (3, 2)), ("b.weight", (40, 24), ())):
        tensors[name] = Stored.codes(rng.integers(0, 0x7F, shape).astype(np.uint8))
        tensors[name + "_scale_inv"] = Stored.of(np.exp2(rng.integers(-14, -9, grid)).astype(np.float32), "F32")
    blocks = {"a.weight": ("a.weight_scale_inv", (128, 128)), "b.weight": ("b.weight_scale_inv", (40, 24))}
    return Family(tensors, config, blocks).write(root, files=1)


def grown(plain: Path, destination: Path) -> Path:
    """Some blocks of `powers_of_two` larger than their scale, one huge, one a float32 subnormal, one zero."""
    tensors = read_directory(plain)
    a, b = (tensors[name].array.astype(np.float32) for name in ("a.weight", "b.weight"))
    a[:128, :128] *= np.float32(3.3)
    a[128:256, :128] *= np.float32(2.0**120)
    a[128:256, 128:] = np.float32(2.0**-140)
    a[256:, :128] = 0
    tensors["a.weight"], tensors["b.weight"] = Stored.of(a, "F32"), Stored.of(b * np.float32(5), "F32")
    return write_plain(destination, tensors)


@pytest.mark.parametrize("scales", ["reuse", "fresh"])
@pytest.mark.parametrize("config", [
    {"quantization_config": UE8M0},
    {"quantization_config": {**UE8M0, "scale_fmt": "UE8M0"}},
    {"text_config": {"quantization_config": UE8M0}},
], ids=["top", "capitals", "nested"])  # fmt: skip
def test_new_scales_are_powers_of_two_where_the_base_says_so(config: Any, scales: str, tmp_path: Path) -> None:
    """``scale_fmt`` "ue8m0": a new scale is the least power of two not below ``amax / 448``, in any dtype."""
    base = powers_of_two(tmp_path / "fp8", config, np.random.default_rng(1))
    comes_back(base, "fp32")
    source = grown(tmp_path / "plain-fp32", tmp_path / "grown")
    back(source, base, tmp_path / "back", scales=scales)
    values, found, before = (read_directory(path) for path in (source, tmp_path / "back", base))
    for name, block in (("a.weight", (128, 128)), ("b.weight", (40, 24))):
        scale = found[name + "_scale_inv"]
        new = scale_floats(fresh_scale(values[name], block, "U8")).reshape(scale.shape)
        old = scale_floats(before[name + "_scale_inv"])
        kept = np.isin(np.arange(old.size).reshape(old.shape), [1, 4, 5]) if block == (128, 128) else False
        expected = np.where(kept, old, new) if scales == "reuse" else new
        assert np.array_equal(scale_floats(scale), expected)
        assert found[name].data == quantize(values[name], scale, block)
        assert set(np.frexp(scale_floats(scale))[0].reshape(-1).tolist()) == {0.5}


# ---------------------------------------------------------------- nothing was trained


@pytest.mark.parametrize("to", ["bf16", "fp32"])
@pytest.mark.parametrize("name", E4M3)
def test_round_trip_of_every_family(name: str, to: str, tmp_path: Path) -> None:
    """FP8, to bf16 or fp32, and back like the original: every file of the directory, byte for byte, as the sums say."""
    family = E4M3[name]
    base = family.write(tmp_path / "fp8")
    convert(base, tmp_path / "plain", to=to)
    before = tree(base), tree(tmp_path / "plain")
    result = back(tmp_path / "plain", base, tmp_path / "back")
    assert_same_tree(tmp_path / "back", base)
    assert (tree(base), tree(tmp_path / "plain")) == before
    assert sorted(os.listdir(tmp_path)) == ["back", "fp8", "plain"]

    weights = {weight: math.prod(family.tensors[weight].shape) for weight in family.blocks}
    assert (result.to, result.quantized) == ("fp8", len(weights))
    assert result.report is not None
    total = result.report.total
    assert total.elements == sum(weights.values())
    assert (total.moved, total.clipped, total.outgrown, total.fresh) == (0, 0, 0, 0)
    assert total.scales == sum(math.prod(family.tensors[scale].shape) for scale, _ in family.blocks.values())
    assert [row.name for row in result.report.weights] == [tensor.name for tensor in open_checkpoint(base).quantized]
    # The source is read once, but for what the base has and it has not; the base's codes are read once, for the report.
    stored = read_directory(tmp_path / "plain")
    beside = [family.tensors[name] for name in (*family.dropped, *family.markers)]
    assert result.bytes_read == sum(len(tensor.data) for tensor in [*stored.values(), *beside])
    assert result.base_bytes_read == sum(weights.values())
    assert (result.bytes_rewritten, result.bytes_resumed) == (0, 0)
    assert result.bytes_written == sum(file.stat().st_size for file in base.glob("*.safetensors"))


READ = {name: row for name, row in catalogue().items() if row.refused is None}


@pytest.mark.parametrize("row", READ.values(), ids=[*READ])
def test_round_trip_of_every_row_of_the_catalogue(row: Row, tmp_path: Path) -> None:
    """To bf16, where every tensor is the oracle's and nothing speaks of quantization; and back, byte for byte."""
    base = row.write(tmp_path / "fp8")
    convert(base, tmp_path / "plain")
    assert read_directory(tmp_path / "plain") == row.family.expected()
    for file in (tmp_path / "plain").iterdir():
        assert not re.search(rb"quantiz|quant_|_qdata|Float8|compression_config", file.read_bytes()[:4096])
    assert verify(base, tmp_path / "plain").ok
    back(tmp_path / "plain", base, tmp_path / "back", report=False)
    assert_same_tree(tmp_path / "back", base)


@pytest.mark.parametrize(("name", "sizes"), each(E4M3, [(64, 3, 50), (4096, 1, 1024), (1000, 5, 333)]))
def test_round_trip_in_small_pieces(
    name: str, sizes: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the pieces are, and whether blocks fit into them or not."""
    base = E4M3[name].write(tmp_path / "fp8", files=3)
    convert(base, tmp_path / "plain")
    chunk, chunks, step = sizes
    cut(monkeypatch, chunk, chunks)
    steps(monkeypatch, step)
    result = back(tmp_path / "plain", base, tmp_path / "back", report=False)
    assert_same_tree(tmp_path / "back", base)
    assert (result.report, result.base_bytes_read, result.bytes_rewritten) == (None, 0, 0)


@pytest.mark.parametrize("name", ["per-tensor 0-d BF16", "per-tensor 0-d F16", "block 128 ragged BF16", "ModelOpt FP8"])
def test_round_trip_through_float16(name: str, tmp_path: Path) -> None:
    """Where float16 holds all values as normal numbers."""
    family = E4M3[name]
    change = {
        scale: Stored.of(np.full(family.tensors[scale].shape, 0.37, np.float32), family.tensors[scale].dtype)
        for scale, _ in family.blocks.values()
    }
    comes_back(replace(family, tensors={**family.tensors, **change}).write(tmp_path / "fp8"), "fp16")


@pytest.mark.parametrize("layout", ["identity", "nested"])
def test_round_trip_of_mistral3(layout: str, tmp_path: Path) -> None:
    """Both layouts, all side files, an index, and scales that lie in another file than their weight."""
    base = sample(tmp_path / "fp8", Mistral3Sizes(), layout=layout, files=4)
    (base / "params.json").write_text('{"dim": 4, "quantization": {"qformat_weight": "fp8_e4m3"}}')
    (base / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    (base / "assets").mkdir()
    (base / "assets/logo.png").write_bytes(b"\x89PNG")
    comes_back(base)


def test_round_trip_of_deepseek(tmp_path: Path) -> None:
    """128 x 128 blocks with ragged edges, in several files."""
    comes_back(sample(tmp_path / "fp8", DeepseekSizes(), files=3))


def test_round_trip_of_a_header_that_no_library_writes(tmp_path: Path) -> None:
    """The order of tensors, the spacing of the JSON and foreign metadata are the base's."""
    codes = np.random.default_rng(5).integers(0, 126, (6, 5)).astype(np.uint8)
    tensors = {
        "z.weight_scale_inv": Stored.of(np.float32(0.25), "BF16"),
        "z.weight": Stored.codes(codes),
        "a": Stored.of(np.ones(3), "F32"),
    }
    base = Family(tensors, FP8, {"z.weight": ("z.weight_scale_inv", (6, 5))}).write(tmp_path / "fp8", files=1)
    header: dict[str, Any] = {"__metadata__": {"made by": "hand"}}
    for (name, t), start in zip(tensors.items(), (0, 2, 32), strict=True):
        header[name] = {"shape": list(t.shape), "dtype": t.dtype, "data_offsets": [start, start + len(t.data)]}
    text = json.dumps({name: header[name] for name in (*tensors, "__metadata__")}, indent=3).encode()
    data = b"".join(tensor.data for tensor in tensors.values())
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    comes_back(base)


def test_small_and_zero_blocks_keep_their_scale(tmp_path: Path) -> None:
    """A block that is small, or zero, keeps its scale: that gives it back exactly."""
    codes = np.zeros((4, 64), np.uint8)
    codes[1] = 0x01
    codes[2, :3] = (0x80, 0x10, 0x91)
    codes[3, 5] = 0x23
    tensors = {
        "m.q.weight": Stored.codes(codes),
        "m.q.weight_scale": Stored.of(np.float32([[0.3], [0.7], [1e-3], [5.0]]), "F32"),
        "m.k.weight": Stored.codes(np.full((3, 3), 0x80, np.uint8)),
        "m.k.weight_scale": Stored.of(np.float32(77.0), "BF16"),
        "m.o.weight": Stored.codes(np.full((3, 3), 0x05, np.uint8)),
        "m.o.weight_scale": Stored.of(np.float32(0.11), "BF16"),
    }
    base = Family(tensors, {}, {}).write(tmp_path / "fp8")
    for to in ("bf16", "fp32"):
        comes_back(base, to)


def test_the_source_may_lie_in_other_files_under_other_names(tmp_path: Path) -> None:
    """One file instead of three, and the model's own names instead of the nested ones on disk."""
    base = sample(tmp_path / "fp8", layout="nested")
    convert(base, tmp_path / "plain")
    found = read_directory(tmp_path / "plain").items()
    renamed = {native + name[len(hf) :]: t for name, t in found for hf, native in NESTED if name.startswith(hf)}
    assert len(renamed) == len(found)
    back(write_plain(tmp_path / "other", renamed), base, tmp_path / "back")
    assert_same_tree(tmp_path / "back", base)


def test_float32_and_float16_sources_are_cast_where_the_base_is_not_quantized(tmp_path: Path) -> None:
    """To the base's own dtype, nearest even, as ml_dtypes does it; integers are copied."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((300, 7)) * np.exp2(rng.integers(-20, 12, (300, 7)))).astype(np.float32)
    whole = {"d": Stored.of(values.round(), "I64")}
    base_dtypes = {"a": "BF16", "b": "F16", "c": "F32"}
    plain = {name: Stored.of(values, dtype) for name, dtype in base_dtypes.items()}
    base = Family({**one(), **plain, **whole}, FP8, {}).write(tmp_path / "fp8")
    for dtype in ("F32", "F16", "BF16"):
        given = Stored.of(values, dtype)
        tensors = {"w.weight": Stored.of(np.ones((2, 2)), dtype), **dict.fromkeys(plain, given), **whole}
        back(write_plain(tmp_path / dtype, tensors), base, tmp_path / f"out-{dtype}")
        cast = {name: Stored.of(given.array.astype(np.float32), own) for name, own in base_dtypes.items()}
        assert read_directory(tmp_path / f"out-{dtype}") == {**one(), **cast, **whole}


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    """A float32 that float16 cannot hold would become infinite: `RangeError` names the tensor, and nothing is left."""
    base = Family({**one(), "n": Stored.of(np.ones(4), "F16")}, FP8, {}).write(tmp_path / "fp8")
    large = Stored.of(np.float32([1, 7e4, np.inf, -9e9]), "F32")
    source = write_plain(tmp_path / "s", {"w.weight": Stored.of(np.ones((2, 2)), "BF16"), "n": large})
    with pytest.raises(RangeError, match=r"^n in model\.safetensors: 2 finite values"):
        back(source, base, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["fp8", "s"]


# ---------------------------------------------------------------- something was trained


def trained(family: Family, rng: np.random.Generator, dtype: str) -> dict[str, Stored]:
    """The logical tensors of a family, some of whose blocks have moved, grown, shrunk or become zero."""
    tensors = family.expected("F32")
    for name in map(family.name, family.blocks):
        values = tensors[name].array.astype(np.float32).copy()
        kind = rng.choice(["noise", "grown", "shrunk", "tiny", "zero", "same"], p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.1])
        part = tuple(slice(int(rng.integers(0, dim)), None) for dim in values.shape)
        noise = 1 + 0.02 * rng.standard_normal(values.shape)
        change = {"noise": noise, "grown": 1.7, "shrunk": 0.21, "tiny": 1e-4, "zero": 0.0, "same": 1.0}
        values[part] *= np.broadcast_to(change[kind], values.shape)[part].astype(np.float32)
        tensors[name] = Stored.of(np.clip(values, -3e38, 3e38), dtype)
    return tensors


def expected_scale(values: Stored, scale: Stored, block: tuple[int, ...]) -> Stored:
    """The rule, naively: the scale of before where the block fits it, block by block, else a fresh one."""
    amax, before = maxima(values, block), scale_floats(scale).reshape(maxima(values, block).shape)
    codes = Stored.codes(np.frombuffer(quantize(values, scale, block), np.uint8).reshape(values.shape))
    wide = values.array.astype(np.float32)
    exact = np.zeros(values.shape, np.bool_)
    for dtype in {values.dtype, "BF16"}:
        again = Stored(dtype, values.shape, dequantize(codes, scale, block, dtype)).array
        exact |= again.astype(np.float32) == wide
    inexact = maxima(Stored.of((~exact).astype(np.float32), "F32"), block) > 0
    with np.errstate(over="ignore"):
        ratio = (amax / before).astype(np.float32)
    keep = (amax == 0) | ((ratio <= 450) & ((ratio >= 28) | ~inexact))
    fresh = fresh_scale(values, block, scale.dtype)
    kind = NUMPY["F8_E8M0" if scale.dtype == "U8" else scale.dtype]
    old, new = (np.frombuffer(stored.data, kind).reshape(amax.shape) for stored in (scale, fresh))
    return Stored(scale.dtype, scale.shape, np.ascontiguousarray(np.where(keep, old, new)).tobytes())


@pytest.mark.parametrize("source_dtype", ["BF16", "F32"])
@pytest.mark.parametrize("name", E4M3)
def test_trained_weights_equal_the_oracle(
    name: str, source_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales by the rule and codes by the contract, in pieces of any size; all else is the base's or the source's."""
    family, rng = E4M3[name], np.random.default_rng(sum(name.encode()))
    base = family.write(tmp_path / "fp8")
    for i in range(6 if ALL else 3):
        tensors = trained(family, rng, source_dtype)
        source = write_plain(tmp_path / f"source-{i}", tensors)
        cut(monkeypatch, *[(4 << 20, 16), (256, 2), (1 << 14, 3)][i % 3])
        steps(monkeypatch, [1 << 19, 200, 5000][i % 3])
        result = back(source, base, tmp_path / f"out-{i}")
        found = read_directory(tmp_path / f"out-{i}")
        expected = dict(family.tensors)
        for weight, (scale, block) in family.blocks.items():
            values = tensors[family.name(weight)]
            expected[scale] = expected_scale(values, family.tensors[scale], block)
            expected[weight] = Stored("F8_E4M3", values.shape, quantize(values, expected[scale], block))
        for other in expected.keys() & tensors.keys() - family.blocks.keys():
            expected[other] = tensors[other]
        assert {key for key in expected if found[key] != expected[key]} == set()
        assert found.keys() == expected.keys()
        check_report(result, family, tensors, expected)


def check_report(result: Fp8Result, family: Family, tensors: dict[str, Stored], written: dict[str, Stored]) -> None:
    """The report against numpy."""
    assert result.report is not None
    rows = {row.name: row for row in result.report.weights}
    assert rows.keys() == set(map(family.name, family.blocks))
    for name, (scale, block) in family.blocks.items():
        row, values = rows[family.name(name)], np.abs(tensors[family.name(name)].array.astype(np.float64))
        old, new = (spread(scale_floats(stored[scale]), values.shape, block) for stored in (family.tensors, written))
        moved = np.frombuffer(family.tensors[name].data, np.uint8) != np.frombuffer(written[name].data, np.uint8)
        assert (row.elements, row.moved) == (values.size, int(moved.sum()))
        assert row.outgrown == int((values > np.float32(450) * old).sum())
        assert row.clipped == 0
        assert row.scales == math.prod(family.tensors[scale].shape)
        same = np.frombuffer(family.tensors[scale].data, np.uint8) == np.frombuffer(written[scale].data, np.uint8)
        changed = (~same.reshape(row.scales, -1).all(axis=1)).sum()
        assert row.fresh >= changed  # a fresh scale may happen to be the old one
        error = np.abs(np.abs(written[name].array.astype(np.float32)) * new - values.astype(np.float32))
        error = error.astype(np.float64)
        assert row.mean_error == pytest.approx(error.sum() / values.sum() if values.any() else 0.0, rel=1e-4)
        assert row.largest_error == pytest.approx(error.max() / values.max() if values.any() else 0.0, rel=1e-6)
    total = result.report.total
    for column in ("elements", "moved", "clipped", "outgrown", "scales", "fresh"):
        assert getattr(total, column) == sum(getattr(row, column) for row in rows.values())


@pytest.mark.parametrize("name", E4M3)
def test_fresh_scales(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``scales="fresh"`` makes every scale anew, fitting or not, and a zero block's 1."""
    family = E4M3[name]
    base = family.write(tmp_path / "fp8")
    tensors = family.expected("BF16")
    for weight in map(family.name, family.blocks):
        values = tensors[weight].array.copy()
        values.reshape(-1, values.shape[-1])[: values.shape[-2] // 2] = 0
        tensors[weight] = Stored.of(values, "BF16")
    source = write_plain(tmp_path / "source", tensors)
    for i, (chunk, step) in enumerate([(4 << 20, 1 << 19), (512, 100)]):
        cut(monkeypatch, chunk, 2)
        steps(monkeypatch, step)
        result = back(source, base, tmp_path / f"out-{i}", scales="fresh")
        found = read_directory(tmp_path / f"out-{i}")
        for weight, (scale, block) in family.blocks.items():
            values = tensors[family.name(weight)]
            fresh = fresh_scale(values, block, family.tensors[scale].dtype)
            assert found[scale].data == fresh.data
            assert found[scale].shape == family.tensors[scale].shape
            assert found[weight].data == quantize(values, fresh, block)
        assert result.report is not None
        assert result.report.total.fresh == result.report.total.scales
        assert result.bytes_rewritten == 0


def siblings(scales: list[float], leaves: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")) -> Family:
    """Siblings of one scale each."""
    rng = np.random.default_rng(1)
    tensors, blocks = {}, {}
    for leaf, scale in zip(leaves, scales, strict=True):
        codes = rng.integers(0, 127, (8, 16)).astype(np.uint8)
        codes[0, 0] = 0x7E
        tensors[f"a.{leaf}.weight"] = Stored.codes(codes)
        tensors[f"a.{leaf}.weight_scale_inv"] = Stored.of(np.float32(scale), "BF16")
        blocks[f"a.{leaf}.weight"] = (f"a.{leaf}.weight_scale_inv", (8, 16))
    return Family(tensors, FP8, blocks)


@pytest.mark.parametrize(("scales", "together"), [([0.5, 0.5, 0.5], "qkv"), ([0.5, 0.25, 0.5], "qv")])
@pytest.mark.parametrize("chunk", [4 << 20, 64])
def test_siblings_that_shared_a_scale_share_the_fresh_one(
    chunk: int, scales: list[float], together: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one of q, k and v grows, all that shared its scale get the new one; others keep theirs."""
    cut(monkeypatch, chunk, 2)
    steps(monkeypatch, 50)
    family = siblings(scales)
    tensors = family.expected()
    grown = tensors["a.v_proj.weight"].array.astype(np.float32) * np.float32(1.5)
    tensors["a.v_proj.weight"] = Stored.of(grown, "BF16")
    back(write_plain(tmp_path / "s", tensors), family.write(tmp_path / "fp8"), tmp_path / "out")
    found = read_directory(tmp_path / "out")
    fresh = fresh_scale(tensors["a.v_proj.weight"], (8, 16), "BF16")
    for leaf in "qkv":
        weight = f"a.{leaf}_proj.weight"
        expected = fresh if leaf in together else family.tensors[weight + "_scale_inv"]
        assert found[weight + "_scale_inv"].data == expected.data
        assert found[weight].data == quantize(tensors[weight], expected, (8, 16))


def test_a_small_sibling_keeps_the_scale_that_it_shares(tmp_path: Path) -> None:
    """Whether precision is thrown away is asked of those together that share a scale."""
    family = siblings([0.5, 0.5], ("gate_proj", "up_proj"))
    tensors = family.expected()
    small = tensors["a.up_proj.weight"].array.astype(np.float32) * np.float32(0.013)
    tensors["a.up_proj.weight"] = Stored.of(small, "BF16")
    result = back(write_plain(tmp_path / "s", tensors), family.write(tmp_path / "fp8"), tmp_path / "out")
    assert result.report is not None
    assert result.report.total.fresh == 0
    alone = siblings([0.5, 0.25], ("gate_proj", "up_proj"))
    tensors = {**alone.expected(), "a.up_proj.weight": Stored.of(small, "BF16")}
    result = back(write_plain(tmp_path / "s2", tensors), alone.write(tmp_path / "fp8-2"), tmp_path / "out2")
    assert result.report is not None
    assert {row.name: row.fresh for row in result.report.weights} == {"a.gate_proj.weight": 0, "a.up_proj.weight": 1}


def test_a_weight_with_one_scale_that_outgrew_it_is_written_twice_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source of such a weight is read twice; what had been written with the old scale is counted."""
    cut(monkeypatch, 1024, 2)
    steps(monkeypatch, 256)
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 127, (64, 128)).astype(np.uint8)
    base = Family({**one(scale=0.1), "w.weight": Stored.codes(codes)}, FP8, {}).write(tmp_path / "fp8")
    values = codes.view(NUMPY["F8_E4M3"]).astype(np.float32) * np.float32(0.1)
    values[33, 7] = 100.0
    source = write_plain(tmp_path / "s", {"w.weight": Stored.of(values, "BF16")})
    result = back(source, base, tmp_path / "out", workers=1)
    assert result.bytes_read == 2 * 2 * values.size
    assert result.bytes_rewritten == 33 * 128 // 1024 * 1024
    assert result.report is not None
    assert (result.report.total.fresh, result.report.total.outgrown) == (1, 1)


# ---------------------------------------------------------------- refusals


def refused(
    kind: type[Fp8CheckpointError], match: str, source: Path, base: Path, destination: Path, **how: Any
) -> None:
    """The error, and nothing written, nor changed."""
    before = tree(source), tree(base)
    with pytest.raises(kind, match=match):
        back(source, base, destination, **how)
    assert (tree(source), tree(base)) == before
    assert not destination.exists()
    assert not destination.with_name(destination.name + ".partial").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["per-tensor 0-d BF16", "block 128 ragged F32", "MXFP8 U8", "experts [E,1,1]"])
def test_weights_that_are_not_finite_are_refused(
    name: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with the count of the whole tensor, wherever the first one is met; and nothing is left behind."""
    cut(monkeypatch, 512, 2)
    steps(monkeypatch, 300)
    family = E4M3[name]
    base = family.write(tmp_path / "fp8")
    tensors = family.expected()
    weight = next(iter(family.blocks))
    values = tensors[weight].array.astype(np.float32).copy()
    values.reshape(-1)[[3, values.size // 2, values.size - 1]] = value
    tensors[weight] = Stored.of(values, "BF16")
    source, said = write_plain(tmp_path / "s", tensors), rf"^{weight} in .*: 3 of {values.size} elements"
    refused(WeightValueError, said, source, base, tmp_path / "out")


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_fp8_dtype_is_written(name: str, tmp_path: Path) -> None:
    """A base of e5m2 or fnuz codes is refused by name: they are read if met, and never written."""
    base = OTHERS[name].write(tmp_path / "fp8")
    convert(base, tmp_path / "plain")
    refused(UnsupportedFormatError, "codes in the base; expected F8_E4M3", tmp_path / "plain", base, tmp_path / "out")


@pytest.mark.parametrize(("change", "kind", "said"), [
    ({"lm_head.weight": None}, ModelMismatchError, r"lm_head\.weight, in the base"),
    ({"extra": Stored.of(np.ones(3), "BF16")}, ModelMismatchError, "extra, in the source"),
    ({"m.q.weight": Stored.of(np.ones((24, 40)), "BF16")}, ModelMismatchError,
     r"m\.q\.weight.*\(24, 40\).*\(40, 24\)"),
    ({"m.q.weight": Stored.of(np.ones((40, 24)), "I32")}, UnsupportedFormatError, r"m\.q\.weight.*I32"),
    ({"model.norm.weight": Stored.of(np.ones(8), "I64")}, ModelMismatchError, r"model\.norm\.weight.*I64.*BF16"),
])  # fmt: skip
def test_mismatches_are_refused(
    change: dict[str, Stored | None], kind: type[Fp8CheckpointError], said: str, tmp_path: Path
) -> None:
    """A tensor too few, too many, of another shape, of a dtype that cannot be cast."""
    family = E4M3["per-tensor 0-d BF16"]
    tensors = {name: tensor for name, tensor in {**family.expected(), **change}.items() if tensor is not None}
    refused(kind, said, write_plain(tmp_path / "s", tensors), family.write(tmp_path / "fp8"), tmp_path / "out")


def test_places_and_kinds_of_directories_are_refused(tmp_path: Path) -> None:
    """A source that is FP8, a base that is not; an output inside of either."""
    family = E4M3["per-tensor 0-d BF16"]
    base, out = family.write(tmp_path / "fp8"), tmp_path / "out"
    plain = write_plain(tmp_path / "plain", family.expected())
    refused(UnsupportedFormatError, "already quantized", base, base, out)
    refused(UnsupportedFormatError, "none of its tensors is quantized", plain, plain, out)
    refused(OutputExistsError, "inside the base", plain, base, base / "out")
    refused(OutputExistsError, "inside the source", plain, base, plain / "out")


def test_a_scale_beyond_its_dtype_is_refused(tmp_path: Path) -> None:
    """Values that a float16 scale cannot reach."""
    base = Family(one(dtype="F16"), FP8, {}).write(tmp_path / "fp8")
    source = write_plain(tmp_path / "s", {"w.weight": Stored.of(np.full((2, 2), 1e9), "F32")})
    refused(RangeError, r"^w\.weight in .*range of F16", source, base, tmp_path / "out")


@pytest.mark.parametrize("how", [
    {"to": "fp8"},
    {"to": "fp8", "like": "x", "scheme": "block"},
    {"to": "fp8", "like": "x", "scales": "some"},
    {"to": "fp8", "scheme": "int4"},
    {"to": "bf16", "like": "x"},
    {"to": "fp8", "scheme": "block", "scales": "fresh"},
    {"to": "int8"},
])  # fmt: skip
def test_arguments_that_do_not_go_together(how: dict[str, str], tmp_path: Path) -> None:
    """A `ValueError` that says which do."""
    with pytest.raises(ValueError, match=r"expected one of|needs the base|go with"):
        convert(tmp_path, tmp_path / "out", **how)


def test_side_files_of_the_source_that_are_not_written_are_named(tmp_path: Path) -> None:
    """The base's go out; a tokenizer that was changed in the source is mentioned."""
    base = sample(tmp_path / "fp8")
    convert(base, tmp_path / "plain")
    (tmp_path / "plain/tokenizer.json").write_text("{}")
    (tmp_path / "plain/notes.txt").write_text("mine")
    result = back(tmp_path / "plain", base, tmp_path / "out")
    assert_same_tree(tmp_path / "out", base)
    assert result.notes == (
        "notes.txt is only in the source, and is not written",
        "tokenizer.json differs in the source; the base's is written",
    )


def test_the_partition_is_the_base_s(tmp_path: Path) -> None:
    """Trained or not, every tensor is in the file that it was in, at the place where it was."""
    base = sample(tmp_path / "fp8")
    convert(base, tmp_path / "plain")
    plain = read_directory(tmp_path / "plain")
    larger = {name: Stored.of(t.array.astype(np.float32) * 1.3, t.dtype) for name, t in plain.items()}
    back(write_plain(tmp_path / "s", larger), base, tmp_path / "out")
    for file in base.glob("*.safetensors"):
        ours = tmp_path / "out" / file.name
        assert list(read_safetensors(ours)) == list(read_safetensors(file))
        length = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert ours.read_bytes()[:length] == file.read_bytes()[:length]
        assert ours.read_bytes() != file.read_bytes()
    assert (tmp_path / "out" / INDEX).read_bytes() == (base / INDEX).read_bytes()


def test_scales_are_written_once_an_extent(sample_block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small write waits for the large ones of its file: no band of a weight writes its scales by itself."""
    convert(sample_block, tmp_path / "bf16")
    monkeypatch.setattr("fp8ckpt.encodings.passing.STEP", 1)
    write, begun = OutputFile.write, set()

    def counted(file: OutputFile, data: Any, offset: int) -> None:
        begun.add((file.file.name, offset))
        write(file, data, offset)

    monkeypatch.setattr(OutputFile, "write", counted)
    convert(tmp_path / "bf16", tmp_path / "fp8", like=sample_block)
    scales = [tensor.scale for tensor in open_checkpoint(tmp_path / "fp8").quantized]
    assert max(span.shape[0] for span in scales) > 1
    within = {(span.file.name, at) for span in scales for at in range(span.start + 1, span.stop)}
    assert not within & begun

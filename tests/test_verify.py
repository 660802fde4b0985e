"""Verification: what is the same is said to be, and every kind of difference or defect is found and measured."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8ckpt import convert, sample, verify
from fp8ckpt.families.names import NESTED
from fp8ckpt.numerics.dequantize import Dequantizer
from fp8ckpt.sample import Mistral3Sizes
from fp8ckpt.verify import TensorDifference
from tests.conftest import Run
from tests.miniatures import Family, families
from tests.oracle import Stored, read_directory, read_safetensors, write_plain, write_safetensors

FAMILIES = families()
WEIGHT, SCALE = "m.q.weight", "m.q.weight_scale_inv"


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def holder(directory: Path, name: str) -> Path:
    """The file that holds a tensor."""
    return next(file for file in directory.glob("*.safetensors") if name in read_safetensors(file))


def replace(directory: Path, name: str, edit: Callable[[Stored], Stored | None]) -> None:
    """Edit one tensor in its file (or remove it), and the index."""
    file = holder(directory, name)
    tensors = read_safetensors(file)
    changed = edit(tensors[name])
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed
    write_safetensors(file, tensors, {"format": "pt"})
    reindex(directory)


def reindex(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    stored = {name: file.name for file in directory.glob("*.safetensors") for name in read_safetensors(file)}
    total = sum(len(tensor.data) for tensor in read_directory(directory).values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": stored}))


def as_dtype(dtype: str, **values: float) -> Callable[[Stored], Stored]:
    """The same values in another dtype, but for those given by flat index (as ``_3=1.5``)."""

    def edit(tensor: Stored) -> Stored:
        array = tensor.array.astype(np.float32).reshape(-1)
        for key, value in values.items():
            array[int(key[1:])] = value
        return Stored.of(array.reshape(tensor.shape), dtype)

    return edit


@pytest.fixture
def bf16(sample_fp8: Path, tmp_path: Path) -> Path:
    """The miniature converted to bf16, for a test to spoil."""
    convert(sample_fp8, tmp_path / "bf16")
    return tmp_path / "bf16"


@pytest.mark.parametrize("to", ["bf16", "fp16", "fp32"])
def test_conversions_are_the_same_as_their_source(
    to: str, sample_fp8: Path, sample_block: Path, tmp_path: Path
) -> None:
    """FP8 against its own conversion to any dtype is the same, either way round; every weight is read on both sides."""
    for i, source in enumerate((sample_fp8, sample_block)):
        out = tmp_path / str(i)
        convert(source, out, to=to)
        for pair in ((source, out), (out, source)):
            result = verify(*pair, workers=2)
            assert result.ok
            assert (result.defects, result.tensor_differences, result.file_differences) == ((), (), ())
            assert result.tensors == len(read_directory(out))
            assert result.nan_codes == ({}, {})
            stored = sum(len(t.data) for name, t in read_directory(source).items() if name in read_directory(out))
            assert result.bytes_read == stored + sum(len(t.data) for t in read_directory(out).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_the_same_as_its_conversion(name: str, tmp_path: Path) -> None:
    """Each family against its bf16, and against itself; alone it is sound; one flipped bit is found."""
    source = FAMILIES[name].write(tmp_path / "fp8")
    convert(source, tmp_path / "out")
    assert verify(source).ok
    assert verify(source, source).ok
    assert verify(source, tmp_path / "out").ok
    stored = next(iter(FAMILIES[name].blocks))
    weight = FAMILIES[name].name(stored)
    flipped = lambda t: t._replace(data=t.data[:-2] + bytes((t.data[-2] ^ 1, t.data[-1])))  # noqa: E731
    replace(tmp_path / "out", weight, flipped)
    (difference,) = verify(source, tmp_path / "out").tensor_differences
    numel = int(np.prod(FAMILIES[name].tensors[stored].shape))
    assert (difference.name, difference.elements, difference.numel) == (weight, 1, numel)


def test_differing_values_are_counted_and_measured(sample_fp8: Path, bf16: Path) -> None:
    """Exact counts, greatest distance, greatest relative distance, in the order of the first side."""
    expected = read_directory(bf16)
    a, b = "lm_head.weight", "model.language_model.layers.1.mlp.up_proj.weight"
    values = {name: expected[name].array.astype(np.float32).reshape(-1) for name in (a, b)}
    replace(bf16, a, as_dtype("BF16", _5=100.0, _6=float(values[a][6]) * 2))
    replace(bf16, b, as_dtype("BF16", _0=-3.0))
    result = verify(sample_fp8, bf16)
    assert not result.ok
    one, two = {difference.name: difference for difference in result.tensor_differences}, float(values[b][0])
    measured = abs(100.0 - float(values[a][5])), pytest.approx(1.0, abs=0.1)
    assert one.pop(a) == TensorDifference(a, "values differ", 2, values[a].size, *measured)
    measured = abs(two + 3.0), abs(two + 3.0) / max(3.0, abs(two))
    assert one == {b: TensorDifference(b, "values differ", 1, values[b].size, *measured)}
    swapped = verify(bf16, sample_fp8)
    assert set(swapped.tensor_differences) == set(result.tensor_differences)


@pytest.mark.parametrize("workers", [1, 3])
def test_differences_add_up_over_chunks(workers: int, tmp_path: Path) -> None:
    """A tensor of more elements than a chunk: counts add up, and the greatest of all chunks is told."""
    rng = np.random.default_rng(0)
    left = rng.standard_normal((1500, 2000)).astype(np.float32)
    right = left.copy()
    right.reshape(-1)[[0, 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 7, 2_999_999]] += (0.5, 1.0, 8.0, 0.25, 2.0, 0.125)
    for name, array in (("a", left), ("b", right)):
        write_plain(tmp_path / name, {"w": Stored.of(array, "F32")})
    (difference,) = verify(tmp_path / "a", tmp_path / "b", workers=workers).tensor_differences
    distance = np.abs(left.astype(np.float64) - right.astype(np.float64))
    relative = distance / np.maximum(np.abs(left), np.abs(right)).astype(np.float64)
    largest = float(distance.max()), float(relative.max())
    assert difference == TensorDifference("w", "values differ", 6, 3_000_000, *largest)


def test_signed_zeros_and_nan_payloads_differ(tmp_path: Path) -> None:
    """Bit for bit: +0 is not -0, one NaN is not another; where nothing is finite in both, there is no distance."""
    nan = np.array([0x7FC00000, 0x7FC00000, 0x3F800000], np.uint32).view(np.float32)
    other = np.array([0x7FC00001, 0x7FC00000, 0x7F800000], np.uint32).view(np.float32)
    for name, zero, n in (("a", 0.0, nan), ("b", -0.0, other)):
        far = Stored.of(np.array([1e308 if name == "a" else -1e308]), "F64")
        zeros, nans = Stored.of(np.array([zero, 1.0], np.float32), "F32"), Stored("F32", (3,), n.tobytes())
        write_plain(tmp_path / name, {"zero": zeros, "nan": nans, "far": far})
    differences = verify(tmp_path / "a", tmp_path / "b").tensor_differences
    largest = sys.float_info.max  # and not infinite
    assert set(differences) == {
        TensorDifference("zero", "values differ", 1, 2, 0.0, 0.0),
        TensorDifference("nan", "values differ", 2, 3, None, None),
        TensorDifference("far", "values differ", 1, 1, largest, largest / 1e308),
    }
    assert verify(tmp_path / "a", tmp_path / "a").ok


def test_second_copies_of_the_weights_are_compared(sample_fp8: Path, tmp_path: Path) -> None:
    """Mistral's own beside the Hugging Face files, where both have one: some engines load that."""
    one, other = copy(sample_fp8, tmp_path / "one"), copy(sample_fp8, tmp_path / "other")
    (one / "consolidated.safetensors").write_bytes(b"1")
    assert verify(one, other).ok
    (other / "consolidated.safetensors").write_bytes(b"2")
    assert verify(one, other).file_differences == ("consolidated.safetensors: differs",)


def test_a_configuration_with_infinities(sample_fp8: Path, tmp_path: Path) -> None:
    """As Python writes them, and no JSON has: Nemotron-H's limits of a time step. They stay as they are."""
    source = copy(sample_fp8, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "limit": [0.0, float("inf")], "nan": float("nan")}))
    convert(source, tmp_path / "plain")
    assert '"limit": [\n    0.0,\n    Infinity\n  ],\n  "nan": NaN' in (tmp_path / "plain" / "config.json").read_text()
    assert verify(source, source).ok
    assert verify(source, tmp_path / "plain").ok
    assert not verify(source, sample_fp8).ok


@pytest.mark.parametrize("dtype", ["I64", "I32", "I8", "U8", "BOOL", "F64", "F16"])
def test_every_dtype_is_compared(dtype: str, tmp_path: Path) -> None:
    """Unquantized tensors of any dtype; integers differ without a distance, floats with one."""
    for name, values in (("a", [0, 1, 1, 0, 1]), ("b", [0, 1, 0, 0, 0])):
        write_plain(tmp_path / name, {"w": Stored.of(np.array(values), dtype)})
    (difference,) = verify(tmp_path / "a", tmp_path / "b").tensor_differences
    measured = (1.0, 1.0) if dtype.startswith("F") else (None, None)
    assert difference == TensorDifference("w", "values differ", 2, 5, *measured)


def test_other_dtype_differs(sample_fp8: Path, bf16: Path) -> None:
    """An unquantized tensor of another dtype differs, by name and both dtypes, even if the values are equal."""
    replace(bf16, "lm_head.weight", as_dtype("F32"))
    (difference,) = verify(sample_fp8, bf16).tensor_differences
    assert difference == TensorDifference("lm_head.weight", "BF16 [512, 128] against F32 [512, 128]")


def test_fp8_against_a_dtype_that_it_cannot_become(sample_fp8: Path, bf16: Path) -> None:
    """A weight that is integers on the other side cannot be compared, and differs."""
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    replace(bf16, name, lambda t: Stored("I32", t.shape, bytes(4 * int(np.prod(t.shape)))))
    (difference,) = verify(sample_fp8, bf16).tensor_differences
    assert difference == TensorDifference(name, "F8_E4M3 [256, 128] against I32 [256, 128]")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.language_model.layers.0.mlp.up_proj.weight"])
def test_other_shape_differs(name: str, sample_fp8: Path, bf16: Path) -> None:
    """A transposed shape differs, although its bytes are the same."""
    replace(bf16, name, lambda t: t._replace(shape=t.shape[::-1]))
    (difference,) = verify(sample_fp8, bf16).tensor_differences
    assert difference.name == name
    assert difference.elements is None
    assert " against BF16 [128, " in difference.reason


def test_tensors_missing_on_either_side(sample_fp8: Path, bf16: Path) -> None:
    """A tensor that only one side has is told with that side."""
    replace(bf16, "lm_head.weight", lambda _: None)
    file = holder(bf16, "model.language_model.norm.weight")
    write_safetensors(file, {**read_safetensors(file), "extra": Stored("I64", (1,), bytes(8))}, {"format": "pt"})
    reindex(bf16)
    result = verify(sample_fp8, bf16)
    assert set(result.tensor_differences) == {
        TensorDifference("lm_head.weight", f"only in {sample_fp8}"),
        TensorDifference("extra", f"only in {bf16}"),
    }
    assert result.tensors == len(read_directory(bf16)) + 1


def test_nan_codes_are_counted_on_each_side(tmp_path: Path) -> None:
    """NaN codes, of FP8 sides only, by tensor; the same NaN on both sides is no difference."""
    codes = np.zeros((30, 40), np.uint8)
    codes[2, 3] = codes[29, 39] = 0x7F
    tensors = {WEIGHT: Stored.codes(codes), SCALE: Stored.of(np.float32(2) * np.ones(()), "F32")}
    source = Family(tensors, {}, {WEIGHT: (SCALE, (30, 40))}).write(tmp_path / "fp8")
    convert(source, tmp_path / "out")
    assert verify(source).nan_codes == ({WEIGHT: 2},)
    for other, counts in ((tmp_path / "out", ({WEIGHT: 2}, {})), (source, ({WEIGHT: 2}, {WEIGHT: 2}))):
        result = verify(source, other)
        assert result.ok
        assert result.nan_codes == counts


def test_two_of_fp8_are_compared_by_what_their_codes_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal codes under equal scales are not decoded; under others all but zeros differ, and equal values of other
    codes and scales do not; one other code, or sign of zero, is one element.
    """
    codes = np.full((30, 40), 0x38, np.uint8)  # 1.0
    codes[0, 0] = 0

    def written(name: str, codes: np.ndarray, scale: float) -> Path:
        tensors = {WEIGHT: Stored.codes(codes), SCALE: Stored.of(np.float32(scale) * np.ones(()), "F32")}
        return Family(tensors, {}, {WEIGHT: (SCALE, (30, 40))}).write(tmp_path / name)

    other, halved = codes.copy(), np.where(codes, codes - 8, 0).astype(np.uint8)
    other[0, 0], other[29, 39] = 0x80, 0x39
    source = written("source", codes, 2)
    for name, side, scale, differing in (
        ("twice", codes, 4, 1199), ("halved", halved, 4, None), ("other", other, 2, 2)
    ):  # fmt: skip
        found = verify(source, written(name, side, scale)).tensor_differences
        assert [difference.elements for difference in found] == ([differing] if differing else [])
    monkeypatch.setattr(Dequantizer, "flat", None)
    monkeypatch.setattr(Dequantizer, "gives", None)
    assert verify(source, written("same", codes, 2)).ok


def test_two_of_fp8_have_other_scales_too(sample_fp8: Path, tmp_path: Path) -> None:
    """The last bit of a float32 scale is seen, which no bfloat16 value shows; so is a scale of an activation or of the
    cache that has another value, or lacks. Its shape and dtype say nothing.
    """
    stem = "model.language_model.layers.0.self_attn.q_proj."
    one, other = (copy(sample_fp8, tmp_path / name) for name in ("one", "other"))
    for directory, factor in ((one, 1.0), (other, 1 + 2**-23)):
        replace(directory, stem + "weight_scale_inv", lambda t, f=factor: Stored.of(t.array.astype("f4") * f, "F32"))
    (difference,) = verify(one, other).tensor_differences
    assert difference.name == stem + "weight"
    replace(one, stem + "activation_scale", lambda t: Stored.of(t.array.astype("f4").reshape(1), "F32"))
    assert verify(one, sample_fp8).ok
    replace(one, stem + "activation_scale", lambda t: Stored.of(t.array * 2, "F32"))
    replace(one, stem.replace("q_", "k_") + "activation_scale", lambda _: None)
    file = holder(one, stem + "weight")
    cache = {"layers.0.self_attn.k_scale": Stored.of(np.ones(1), "F32")}
    write_safetensors(file, {**read_safetensors(file), **cache}, {"format": "pt"})
    reindex(one)
    assert {*verify(sample_fp8, one).file_differences} == {
        f"{stem}activation_scale: differs",
        f"{stem.replace('q_', 'k_')}activation_scale: only in {sample_fp8}",
        f"layers.0.self_attn.k_scale: only in {one}",
    }


@pytest.mark.parametrize("factor", [1, 2])
def test_other_scales_under_other_names(factor: int, sample_fp8: Path, tmp_path: Path) -> None:
    """Of a tensor that has another name on the other side, scales of activations are compared all the same."""
    scale = "model.language_model.layers.0.self_attn.q_proj.activation_scale"
    tensors = read_directory(sample_fp8)
    tensors[scale] = Stored.of(tensors[scale].array.astype("f4") * factor, "BF16")
    nested = copy(sample_fp8, tmp_path / "nested")
    for file in (*nested.glob("*.safetensors"), nested / "model.safetensors.index.json"):
        file.unlink()
    write_safetensors(nested / "model.safetensors", {NESTED.native_to_hf(k): t for k, t in tensors.items()})
    assert verify(sample_fp8, nested).file_differences == ((f"{scale}: differs",) if factor == 2 else ())


def test_config_that_differs(sample_fp8: Path, bf16: Path) -> None:
    """Keys of config.json that differ are named; quantization and dtype are not held against a conversion."""
    config = json.loads((bf16 / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-6
    config["new"] = 1
    del config["vision_feature_layer"]
    (bf16 / "config.json").write_text(json.dumps(config))
    result = verify(sample_fp8, bf16)
    assert result.tensor_differences == ()
    names = ("new", "text_config", "vision_feature_layer")
    assert result.file_differences == tuple(f"config.json: {name} differs" for name in names)


def test_quantization_config_is_compared_between_two_of_fp8(sample_fp8: Path, tmp_path: Path) -> None:
    """Two FP8 checkpoints with different quantization_config differ."""
    other = copy(sample_fp8, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["activation_scheme"] = "dynamic"
    (other / "config.json").write_text(json.dumps(config))
    assert verify(sample_fp8, other).file_differences == ("config.json: quantization_config differs",)


def test_side_files_that_differ_or_are_missing(sample_fp8: Path, bf16: Path) -> None:
    """Side files are compared byte for byte, by their path; what only one side has is told with that side."""
    (bf16 / "README.md").write_bytes((bf16 / "README.md").read_bytes() + b" ")
    (bf16 / "tokenizer.json").unlink()
    (bf16 / "assets").mkdir()
    (bf16 / "assets/x").write_text("x")
    result = verify(sample_fp8, bf16)
    assert result.tensor_differences == ()
    assert result.file_differences == (
        "README.md: differs",
        f"assets/x: only in {bf16}",
        f"tokenizer.json: only in {sample_fp8}",
    )


def test_quantization_files_of_modelopt_and_mistral(tmp_path: Path) -> None:
    """What a conversion drops or rewrites is no difference; what else differs in params.json is."""
    for name in ("ModelOpt FP8", "Mistral native"):
        source = FAMILIES[name].write(tmp_path / name)
        convert(source, tmp_path / f"{name} out")
        assert verify(source, tmp_path / f"{name} out").ok
    params = tmp_path / "Mistral native out/params.json"
    params.write_text('{"dim": 17}')
    found = verify(tmp_path / "Mistral native", tmp_path / "Mistral native out")
    assert found.file_differences == ("params.json: dim differs",)


def test_another_partition_is_the_same(sample_fp8: Path, tmp_path: Path) -> None:
    """FP8 against FP8 in another number of files: the same tensors, so the same."""
    other = sample(tmp_path / "one", Mistral3Sizes(), files=1)
    assert verify(sample_fp8, other).ok
    assert verify(other, sample_fp8).ok
    sample(tmp_path / "seed", Mistral3Sizes(), seed=1)
    result = verify(sample_fp8, tmp_path / "seed")
    assert result.file_differences == ()
    assert len(result.tensor_differences) > 20


def test_one_directory_reads_every_code_and_no_more(sample_fp8: Path) -> None:
    """Alone, every FP8 code is read, to count NaN; sound."""
    result = verify(sample_fp8)
    assert result.ok
    assert result.paths == (sample_fp8,)
    assert result.bytes_read == sum(len(t.data) for t in read_directory(sample_fp8).values() if t.dtype == "F8_E4M3")


def test_wrong_total_size_is_a_defect(sample_fp8: Path, tmp_path: Path) -> None:
    """A total_size that is not the sum of the tensors is a defect, harmless to readers: tensors are compared."""
    other = copy(sample_fp8, tmp_path / "other")
    index = json.loads((other / "model.safetensors.index.json").read_text())
    right = index["metadata"]["total_size"]
    index["metadata"]["total_size"] = right + 1
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    (defect,) = verify(other).defects
    assert type(defect).__name__ == "IndexMismatchError"
    assert defect.file == "model.safetensors.index.json"
    assert f"total_size is {right + 1}; the tensors take {right} bytes" in defect.found
    both = verify(sample_fp8, other)
    assert (both.ok, both.tensor_differences) == (False, ())
    assert both.bytes_read == verify(sample_fp8, sample_fp8).bytes_read > 0


def test_defects_of_both_sides_are_listed(sample_fp8: Path, tmp_path: Path) -> None:
    """A missing scale here, an infinite one there: both are told, and no value is compared."""
    one, two = copy(sample_fp8, tmp_path / "one"), copy(sample_fp8, tmp_path / "two")
    weight = "model.language_model.layers.0.mlp.up_proj.weight"
    replace(one, f"{weight}_scale_inv", lambda _: None)
    replace(two, f"{weight}_scale_inv", as_dtype("BF16", _0=np.inf))
    with_defects = verify(one, sample_fp8, serving=True).serving
    assert str(with_defects) == str(verify(sample_fp8, serving=True).serving)  # B is sound
    result = verify(one, two)
    assert not result.ok
    assert [(type(d).__name__, d.tensor) for d in result.defects] == [
        ("MissingScaleError", weight),
        ("ScaleValueError", f"{weight}_scale_inv"),
    ]
    assert result.tensor_differences == ()
    assert result.bytes_read == 0


def test_empty_and_scalar_tensors_are_compared(tmp_path: Path) -> None:
    """Tensors without elements and of no dimension, FP8 and not."""
    tensors: dict[str, Stored] = {
        "e.weight": Stored("F8_E4M3", (0, 4), b""),
        "e.weight_scale": Stored.of(np.ones((), np.float32), "F32"),
        "s.weight": Stored("F8_E4M3", (), b"\x39"),
        "s.weight_scale": Stored.of(np.ones((), np.float32), "F32"),
        "empty": Stored("BF16", (0,), b""),
    }
    value = np.array(1.125, np.float32)
    plain = {"e.weight": Stored("BF16", (0, 4), b""), "s.weight": Stored.of(value, "BF16"), "empty": tensors["empty"]}
    for name, stored in (("a", tensors), ("b", plain)):
        write_plain(tmp_path / name, stored)
    assert verify(tmp_path / "a").ok
    assert verify(tmp_path / "a", tmp_path / "a").ok
    assert verify(tmp_path / "a", tmp_path / "b").ok


def test_progress_ends_at_the_bytes_read(sample_fp8: Path, bf16: Path) -> None:
    """Progress never falls, and ends at its total."""
    seen: list[tuple[int, int]] = []
    result = verify(sample_fp8, bf16, workers=2, progress=lambda done, total, doing: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (result.bytes_read, result.bytes_read)


def parsed(cli: Run, *arguments: object) -> tuple[int, dict[str, Any]]:
    done = cli("verify", *arguments, "--json")
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_command_line_exit_codes(sample_fp8: Path, bf16: Path, tmp_path: Path, cli: Run) -> None:
    """0 the same or sound, 1 different or defective, 2 usage; --json says the same as the text."""
    done = cli("verify", sample_fp8, bf16)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{sample_fp8} and {bf16}: the same" in done.stdout
    assert "sound" in cli("verify", sample_fp8, "--workers", "1").stdout
    code, result = parsed(cli, sample_fp8, bf16)
    assert (code, result["ok"], result["defects"]) == (0, True, [])

    name = "model.language_model.layers.0.mlp.up_proj.weight"
    replace(bf16, name, as_dtype("BF16", _7=50.0))
    (bf16 / "README.md").unlink()
    done = cli("verify", sample_fp8, bf16)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"{name}: values differ in 1 of 32,768 elements, by up to " in done.stdout
    assert f"README.md: only in {sample_fp8}" in done.stdout
    assert "different, 1 of" in done.stdout
    code, result = parsed(cli, sample_fp8, bf16)
    assert (code, result["ok"]) == (1, False)
    assert [(d["name"], d["elements"], d["numel"]) for d in result["tensor_differences"]] == [(name, 1, 32768)]
    assert result["file_differences"] == [f"README.md: only in {sample_fp8}"]

    broken = copy(sample_fp8, tmp_path / "broken")
    replace(broken, f"{name}_scale_inv", lambda _: None)
    done = cli("verify", broken)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"MissingScaleError: {name}" in done.stdout
    assert f"{broken}: defective" in done.stdout
    code, result = parsed(cli, broken)
    assert (code, result["ok"]) == (1, False)
    assert [(d["kind"], d["tensor"]) for d in result["defects"]] == [("MissingScaleError", name)]

    for arguments in ([], [sample_fp8, bf16, bf16], [sample_fp8, "--workers", "0"], [sample_fp8, "--nonsense"]):
        assert cli("verify", *arguments).returncode == 2
    done = cli("verify", sample_fp8, tmp_path / "nowhere")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)

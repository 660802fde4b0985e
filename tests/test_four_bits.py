"""Releases in four bits through every job: read, inspected, converted, verified, loaded; each family of the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fp8ckpt import (
    FP8StorageReader,
    FP8StorageWriter,
    convert,
    inspect,
    load_pretrained,
    open_checkpoint,
    report,
    save_model,
    verify,
)
from fp8ckpt.convert import Fp8Result
from fp8ckpt.errors import ConfigError, RangeError, ScaleShapeError, ScaleValueError, UnsupportedFormatError
from fp8ckpt.numerics.geometry import within
from fp8ckpt.tensors import reading
from fp8ckpt.tensors.checkpoint import Checkpoint
from tests import oracle
from tests.checkpoint.test_save_fp8 import assert_same_report, plain_save, small_steps, tensors_of
from tests.distributed import run
from tests.miniatures import Family, Packed, four_bits
from tests.oracle import Stored, read_directory, tree, write_safetensors
from tests.support import cut, examples

FAMILIES = four_bits()
TARGETS = {"bf16": "BF16", "fp32": "F32"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Every family, on disk and open."""
    root = tmp_path_factory.mktemp("families")
    return {name: open_checkpoint(family.write(root / str(i))) for i, (name, family) in enumerate(FAMILIES.items())}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weight_has_its_own_name_shape_and_group(name: str, written: dict[str, Checkpoint]) -> None:
    """Of twice as many columns as its bytes; what stands beside it is no tensor."""
    family, checkpoint = FAMILIES[name], written[name]
    assert set(checkpoint.tensors) == set(family.expected())
    for stored, packed in family.packed.items():
        tensor = checkpoint[family.name(stored)].scaled
        assert tensor is not None
        assert (tensor.weight.name, tensor.grid.weight_shape) == (stored, packed.shape)
        assert tensor.grid.block_size == family.blocks[stored][1]
        assert (None if tensor.second is None else tensor.second.span.name) == packed.factor


@examples(150)
@given(name=st.sampled_from(list(FAMILIES)), buffer=st.sampled_from([1, 7, 100, 4 << 20]), data=st.data())
def test_a_region_equals_the_slice(written: dict[str, Checkpoint], name: str, buffer: int, data: st.DataObject) -> None:
    """Begun and ended at any element, odd ones too, however small the buffer is."""
    expected = FAMILIES[name].expected()
    key = data.draw(st.sampled_from(sorted(expected)))
    whole = expected[key].array.view(np.uint16)
    offsets = tuple(data.draw(st.integers(0, dim)) for dim in whole.shape)
    sizes = tuple(data.draw(st.integers(0, dim - at)) for dim, at in zip(whole.shape, offsets, strict=True))
    sizes = tuple(min(size, 6) for size in sizes) if buffer < 100 else sizes  # one read a row or so
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CODES_BUFFER", buffer)
        region = written[name].read(key, offsets, sizes)
    window = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
    assert raw(region) == np.ascontiguousarray(whole[window]).tobytes()


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversion_equals_the_oracle(name: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, shapes and every byte, in chunks of a page too; nothing in the output speaks of quantization."""
    family = FAMILIES[name]
    source = family.write(tmp_path / "fp4")
    convert(source, tmp_path / "out", to=to)
    assert read_directory(tmp_path / "out") == family.expected(TARGETS[to])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not config.keys() & {"quantization_config", "expert_dtype"}
    assert not (tmp_path / "out/hf_quant_config.json").exists()
    cut(monkeypatch, 4096, 1)
    convert(source, tmp_path / "pages", to=to, workers=2)
    assert read_directory(tmp_path / "pages") == family.expected(TARGETS[to])
    assert verify(source, tmp_path / "out").ok


def test_float16_is_refused_where_a_value_goes_beyond(tmp_path: Path) -> None:
    """Four times 2**14 does; three times does not."""
    family = FAMILIES["Quark MXFP4"]
    for code, fits in ((0x55, True), (0x66, False)):
        weight, scale = (
            Stored.codes(np.full(shape, byte, np.uint8), "U8") for shape, byte in (((24, 48), code), ((24, 3), 141))
        )
        changed = {**family.tensors, "m.q.weight": weight, "m.q.weight_scale": scale}
        source = type(family)(changed, family.config, family.blocks, packed=family.packed).write(tmp_path / str(code))
        if fits:
            convert(source, tmp_path / "out", to="fp16")
            assert (read_directory(tmp_path / "out")["m.q.weight"].array == 49152).all()
        else:
            with pytest.raises(RangeError, match=f"{24 * 96} elements exceed 65504"):
                convert(source, tmp_path / "none", to="fp16")


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_shows_a_scheme_of_its_own(name: str, written: dict[str, Checkpoint]) -> None:
    """Four bits by their own name, with their group; elements and bytes add up."""
    family = FAMILIES[name]
    found = inspect(written[name].path, tensor="", scales=True)
    expected = family.expected()
    assert found.defects == ()
    assert found.elements == sum(int(np.prod(tensor.shape)) for tensor in expected.values())
    assert found.stored_bytes == sum(len(tensor.data) for tensor in family.tensors.values())
    assert found.bf16_bytes == sum(len(tensor.data) for tensor in expected.values())
    four = [scheme for scheme in found.schemes if scheme.dtype == "F4"]
    assert len(four) == 1
    assert four[0].tensors == len(family.packed)
    assert four[0].elements == sum(int(np.prod(packed.shape)) for packed in family.packed.values())
    beside = {key for name, packed in family.packed.items() for key in (name, family.blocks[name][0], packed.factor)}
    assert four[0].bytes == sum(len(family.tensors[key].data) for key in beside - {None})
    assert four[0].block.endswith("x 16" if four[0].scale_dtype == "F8_E4M3" else "x 32")
    assert {row.name: row.shape for row in found.listed} == {key: tensor.shape for key, tensor in expected.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_into_whole_and_strided_targets(name: str, written: dict[str, Checkpoint]) -> None:
    """Through DCP, to bfloat16 and float32, transposed as well; the bytes read are the file's."""
    family = FAMILIES[name]
    for dtype, of_torch in (("BF16", torch.bfloat16), ("F32", torch.float32)):
        expected = family.expected(dtype)
        dtypes = {key: of_torch if tensor.dtype == dtype else torch.bfloat16 for key, tensor in expected.items()}
        state: dict[str, Any] = {key: torch.zeros(t.shape, dtype=dtypes[key]) for key, t in expected.items()}
        reader = FP8StorageReader(written[name].path)
        dcp.load(state, storage_reader=reader, no_dist=True)
        assert {key: raw(tensor) for key, tensor in state.items()} == {key: t.data for key, t in expected.items()}
        assert reader.bytes_read == sum(len(t.data) for s, t in family.tensors.items() if family.name(s) in expected)
    expected = family.expected()
    across = {key: torch.zeros(t.shape[::-1], dtype=torch.bfloat16) for key, t in expected.items()}
    state = {key: tensor.permute(*reversed(range(tensor.dim()))) for key, tensor in across.items()}
    dcp.load(state, storage_reader=FP8StorageReader(written[name].path, workers=3), no_dist=True)
    assert {key: raw(tensor) for key, tensor in state.items()} == {key: t.data for key, t in expected.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_device_multiplies_to_the_same_bits(name: str, written: dict[str, Checkpoint]) -> None:
    """Codes of four bits travel as codes of eight with the same values."""
    from fp8ckpt.checkpoint.regions import _codes_of, dequantize_on_device
    from fp8ckpt.tensors.tensor import Reader

    family, buffer = FAMILIES[name], torch.empty(1 << 16, dtype=torch.uint8)
    for stored in family.blocks:
        tensor = written[name][family.name(stored)].scaled
        assert tensor is not None
        reader = Reader(buffer.numpy(), reading.load_dequantizer)
        shape = tensor.grid.weight_shape
        region = tuple(min(3, dim - 1) for dim in shape), tuple(dim - min(3, dim - 1) for dim in shape)
        target = torch.empty(region[1], dtype=torch.bfloat16)
        for piece, codes in tensor.codes(region, reader):
            given = _codes_of(tensor, piece, codes, buffer)
            dequantize_on_device(given, reader.dequantizer(tensor, "BF16"), piece[0], target[within(piece, region)])
        expected = written[name].read(tensor.name, *tensor.of_codes(region))
        assert raw(target.mT if tensor.across else target) == raw(expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_verify_and_report(
    name: str, written: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound alone, and with itself; the report counts its codes, each nibble one."""
    if name != "gpt-oss":  # a page is seconds of work
        monkeypatch.setattr("fp8ckpt.figures.page_of", lambda found: "")
    path = written[name].path
    alone = verify(path)
    assert alone.ok
    assert verify(path, path).ok
    found = report(path, output=tmp_path / "page.html")
    for stored in FAMILIES[name].packed:
        codes = np.frombuffer(FAMILIES[name].tensors[stored].data, np.uint8)
        weight = next(weight for weight in found.weights if weight.name == FAMILIES[name].name(stored))
        assert weight.dtype == "F4"
        assert weight.use.codes == 2 * codes.size
        assert weight.use.zeros == np.count_nonzero(codes & 7 == 0) + np.count_nonzero(codes >> 4 & 7 == 0)
    if len(FAMILIES[name].packed) == 1:
        both = np.concatenate([codes & 15, codes >> 4])
        assert found.codes["F4"] == tuple(np.bincount(both, minlength=16))


# ---------------------------------------------------------------- the way back


def trained(family: Family, rng: np.random.Generator, dtype: str) -> dict[str, Stored]:
    """Values of every weight, of which some groups are untouched, some have noise, some shrink, grow or become zero."""
    found = family.expected()
    for stored in family.blocks:
        name = family.name(stored)
        values = found[name].array.astype(np.float32)
        noise = 1 + 0.05 * rng.standard_normal(values.shape)
        kind = rng.integers(0, 6, values.shape[:-1])[..., None]
        of_kind = [values * noise, values * 0.3, values * 1.15, 0 * values]
        changed = np.select([kind == i for i in range(4)], of_kind, values)
        found[name] = Stored.of(changed.astype(np.float32), dtype)
    return found


def four_bits_of(
    family: Family, stored: str, values: Stored, *, fresh: bool, factor: Stored | None = None
) -> tuple[bytes, bytes]:
    """The oracle: the codes and the scales, element by element and group by group; under a new ``factor`` all fresh."""
    packed, (key, block) = family.packed[stored], family.blocks[stored]
    scale, old = family.tensors[key], Stored("F4", packed.shape, family.tensors[stored].data)
    more: dict[str, Any] = {}
    if packed.factor is not None:
        more = {"factor": factor or family.tensors[packed.factor], "divides": packed.divides}
        fresh = fresh or factor is not None
    before, amax = oracle.multipliers(scale, **more), oracle.maxima(values, block)
    codes = oracle.quantize(values, scale, block, codes="F4", **more)
    wide = values.array.astype(np.float32)
    exact = np.zeros(wide.shape, bool)
    for dtype in (values.dtype, "BF16"):
        back = oracle.dequantize(Stored("F4", old.shape, codes), scale, block, dtype, **more)
        again = np.frombuffer(back, oracle.NUMPY[dtype]).reshape(wide.shape).astype(np.float32)
        exact |= again.view(np.uint32) == wide.view(np.uint32)
    whole = oracle.maxima(Stored.of(~exact, "F32"), block) == 0
    ratio = amax / before
    keep = (amax == 0) | ((ratio >= 4) & (ratio <= np.float32(6 * 450 / 448))) | ((ratio < 4) & whole)
    new = np.asarray(fresh_of(amax, scale.dtype, more), np.uint8)
    chosen = new if fresh else np.where(keep, np.frombuffer(scale.data, np.uint8).reshape(new.shape), new)
    chosen_scale = Stored.codes(chosen, scale.dtype)
    return oracle.quantize(values, chosen_scale, block, codes="F4", **more), chosen_scale.data


def new_factor(family: Family, unit: dict[str, Stored], *, fresh: bool) -> Stored | None:
    """The oracle: a new factor of weights that share one, whose values are ``unit``; None where they keep theirs."""
    largest, exact = np.float32(0), True
    for stored, values in unit.items():
        packed = family.packed[stored]
        if packed.factor is None:
            return None
        wide = values.array.astype(np.float32)
        largest = max(largest, np.abs(wide).max())
        exact &= wide.tobytes() == family.expected("F32")[family.name(stored)].data
        before = family.tensors[packed.factor].array.reshape(()).astype(np.float32)
    wanted = largest / np.float32(6) * before if packed.divides else largest / (np.float32(6) * before)
    if not fresh and wanted <= 464 and (wanted >= 28 or largest == 0 or exact):
        return None
    value = np.float32(2688) / largest if packed.divides else largest / np.float32(2688)
    return Stored.of(np.full(family.tensors[packed.factor].shape, value, np.float32), "F32")


def fresh_of(amax: np.ndarray, dtype: str, more: dict[str, Any]) -> np.ndarray:
    """The OCP's exponents, or the nearest e4m3 under the factor."""
    if not more:
        exponents = np.floor(np.log2(np.where(amax == 0, 4, amax).astype(np.float64))) - 2 + 127
        return np.maximum(exponents, 0)
    factor = more["factor"].array.reshape(()).astype(np.float32)
    wanted = amax / np.float32(6) * factor if more["divides"] else amax / (np.float32(6) * factor)
    wanted = np.where(amax == 0, 0.125 if more["divides"] else 1, wanted).astype(oracle.NUMPY["F8_E4M3"])
    return wanted.view(np.uint8)


@pytest.mark.parametrize("name", ["ModelOpt NVFP4", "compressed-tensors NVFP4"])
@pytest.mark.parametrize("codes", ["zeros", "any"])
def test_a_group_with_a_scale_of_zero_is_zeros(name: str, codes: str, tmp_path: Path) -> None:
    """As kernels write groups of zeros, and ModelOpt wrote what is too small for a scale: engines multiply by it. Zeros
    come back byte for byte, with their signs; other codes as zeros, and the scale as it was.
    """
    family = replace(FAMILIES[name], tensors=dict(FAMILIES[name].tensors))
    for stored in family.packed:
        key = family.blocks[stored][0]
        scales, packed = (np.frombuffer(family.tensors[one].data, np.uint8).copy() for one in (key, stored))
        scales[0] = 0
        packed[:8] = (0, 0x80, 0x08, 0x88, 0, 0, 0, 0) if codes == "zeros" else (0x12, 0xF7, 0x7F, 0x99, 0, 1, 0x10, 6)
        for one, data in ((key, scales), (stored, packed)):
            family.tensors[one] = family.tensors[one]._replace(data=data.tobytes())
    source = family.write(tmp_path / "a")
    convert(source, tmp_path / "b")
    assert {key: read_directory(tmp_path / "b")[key] for key in family.expected()} == family.expected()
    assert all(row.scales.least > 0 for row in report(source, output=tmp_path / "page.html").weights)
    result = convert(tmp_path / "b", tmp_path / "c", to="fp8", like=source)
    assert isinstance(result, Fp8Result)
    assert result.report is not None
    assert (result.report.total.fresh, result.report.total.clipped) == (0, 0)
    assert verify(source, tmp_path / "c").ok
    assert (tree(tmp_path / "c") == tree(source)) == (codes == "zeros")
    trained = read_directory(tmp_path / "b")
    stored = next(iter(family.packed))
    values = trained[family.name(stored)].array.astype(np.float32) + np.float32(1)
    write_plain(tmp_path / "d", {**trained, family.name(stored): Stored.of(values, "BF16")})
    convert(tmp_path / "d", tmp_path / "e", to="fp8", like=source)
    assert read_directory(tmp_path / "e")[family.blocks[stored][0]].data[0] != 0


@pytest.mark.parametrize("byte", [0x80, 0x7F])
def test_no_other_scale_of_two_levels_is_let_through(byte: int, tmp_path: Path) -> None:
    """Negative zero, and NaN."""
    family = replace(FAMILIES["ModelOpt NVFP4"], tensors=dict(FAMILIES["ModelOpt NVFP4"].tensors))
    key = family.blocks[next(iter(family.packed))][0]
    family.tensors[key] = family.tensors[key]._replace(data=bytes([byte]) + family.tensors[key].data[1:])
    [defect] = verify(family.write(tmp_path / "a")).defects
    assert isinstance(defect, ScaleValueError)


def write_plain(directory: Path, tensors: dict[str, Stored]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    return directory


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_not_trained_comes_back_byte_for_byte(name: str, to: str, tmp_path: Path) -> None:
    """Every file of the release, without a word on what to convert to; the report says that nothing moved."""
    source = FAMILIES[name].write(tmp_path / "fp4")
    convert(source, tmp_path / "plain", to=to)
    result = convert(tmp_path / "plain", tmp_path / "back", like=source)
    assert tree(tmp_path / "back") == tree(source)
    assert isinstance(result, Fp8Result)
    assert result.report is not None
    total = result.report.total
    assert (total.moved, total.fresh, total.clipped, total.outgrown) == (0, 0, 0, 0)
    assert total.elements == sum(t.numel for t in open_checkpoint(source).quantized)


@examples(10)
@given(rows=st.integers(1, 5), pairs=st.integers(1, 60), two_levels=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_weights_of_any_shape_come_back(rows: int, pairs: int, two_levels: bool, seed: int) -> None:
    """An odd number of groups, a last one of a pair of codes, a single group."""
    rng, group = np.random.default_rng(seed), 16 if two_levels else 32
    groups, dtype = -(-2 * pairs // group), "F8_E4M3" if two_levels else "U8"
    tensors = {
        "m.q.weight_packed": Stored.codes(rng.integers(0, 256, (rows, pairs), np.uint8), "U8"),
        "m.q.weight_scale": Stored.codes(rng.integers(60, 120, (rows, groups), np.uint8), dtype),
    }
    if two_levels:
        tensors["m.q.weight_global_scale"] = Stored.of(np.float32([7000]), "F32")
    with TemporaryDirectory() as folder:
        release, plain, back = (Path(folder) / name for name in ("release", "plain", "back"))
        Family(tensors, {}, {}).write(release, files=1)
        convert(release, plain)
        convert(plain, back, like=release)
        assert tree(back) == tree(release)


@pytest.mark.parametrize("scales", ["reuse", "fresh"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_trained_values_go_back_as_the_oracle(
    name: str, dtype: str, scales: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales are kept or made group by group, and saving writes the same files from whatever is worked on at once."""
    family = FAMILIES[name]
    base = family.write(tmp_path / "fp4")
    tensors = trained(family, np.random.default_rng(sum(name.encode())), dtype)
    source = write_plain(tmp_path / "source", tensors)
    result = convert(source, tmp_path / "out", like=base, scales=scales)
    assert isinstance(result, Fp8Result)
    written = read_directory(tmp_path / "out")
    for stored in family.packed:
        values = family.packed[stored].turned(tensors[family.name(stored)])
        factor = new_factor(family, {stored: values}, fresh=scales == "fresh")
        codes, of_groups = four_bits_of(family, stored, values, fresh=scales == "fresh", factor=factor)
        assert written[stored].data == codes
        assert written[family.blocks[stored][0]].data == of_groups
    cut(monkeypatch, 4096, 1)
    convert(source, tmp_path / "pages", to="fp8", like=base, scales=scales, workers=2)
    assert tree(tmp_path / "pages") == tree(tmp_path / "out")
    state = tensors_of(source)
    for step in (1 << 19, 100):
        small_steps(monkeypatch, step)
        saved = plain_save(state, tmp_path / f"saved {step}", base, scales=scales)
        assert_same_report(saved.report, result.report)
        assert tree(tmp_path / f"saved {step}") == tree(tmp_path / "out")


def save_in_shards(source: Path, base: Path, destination: Path, dim: int) -> int:
    """On one of several ranks: the tensors of a directory in shards along a dimension, wherever that cuts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {name: distribute_tensor(t, mesh, [Shard(dim % t.dim())]) for name, t in tensors_of(source).items()}
    with pytest.MonkeyPatch.context() as patch:
        small_steps(patch, 500)
        writer = FP8StorageWriter(destination, like=base)
        dcp.save(state, storage_writer=writer)
        return writer.bytes_written


@pytest.mark.parametrize(("name", "size", "dim"), [("gpt-oss", 5, -1), ("new factors", 3, -1), ("new factors", 2, 0)])
def test_shards_that_cut_a_group_or_a_byte_in_two(name: str, size: int, dim: int, tmp_path: Path) -> None:
    """Where a byte or a group lies on two ranks, the files are still those of a conversion."""
    if name == "gpt-oss":
        family = FAMILIES[name]
        tensors = trained(family, np.random.default_rng(5), "BF16")
    else:
        family, tensors = with_siblings(divides=size == 2)
    base, source = family.write(tmp_path / "fp4"), write_plain(tmp_path / "source", tensors)
    convert(source, tmp_path / "expected", like=base)
    written = run(size, save_in_shards, source, base, tmp_path / "out", dim)
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert sum(written) == sum(len(tensor.data) for tensor in family.tensors.values())


def with_siblings(*, divides: bool) -> tuple[Family, dict[str, Stored]]:
    """An NVFP4 release whose q and k, gate and up, share a factor, and what its training made of it.

    q outgrows its factor, and k does not; gate and up shrink beyond what precision allows; o is all zeros; v and down
    are so small for their factors that they keep them only because every element is given back.
    """
    rng = np.random.default_rng(9)
    ending, scaling = ("_packed", "_global_scale") if divides else ("", "_scale_2")
    family = Family({}, {}, {})
    for leaf, of in {"q": 0.4, "k": 0.4, "v": 40, "o": 0.3, "gate": 0.2, "up": 0.2, "down": 9}.items():
        name = f"model.layers.0.{leaf}_proj.weight"
        codes, scale, factor = name + ending, f"{name}_scale", name + scaling
        low = {"v": 20, "down": 20}.get(leaf, 60)
        both = rng.choice(np.delete(np.arange(16, dtype=np.uint8), 8), (2, 24, 36))  # the library has no negative zero
        family.tensors[codes] = Stored.codes(both[0] | both[1] << np.uint8(4), "U8")
        family.tensors[scale] = Stored.codes(rng.integers(low, 2 * low - 8, (24, 5), np.uint8), "F8_E4M3")
        value = np.full((1,) if divides else (), 2688 / of if divides else of / 2688, np.float32)
        family.tensors[factor] = Stored.of(value, "F32")
        family.blocks[codes] = (scale, (1, 16))
        family.names[codes] = name
        family.packed[codes] = Packed((24, 72), factor, divides)
    tensors = family.expected("F32")
    for leaf, times in {"q": 30, "k": 1.3, "o": 0, "gate": 0.01, "up": 0.003}.items():
        name = f"model.layers.0.{leaf}_proj.weight"
        tensors[name] = Stored.of(tensors[name].array * np.float32(times) + 0, "F32")  # no negative zero
    return family, tensors


UNITS = {"q k": True, "v": False, "o": False, "gate up": True, "down": False}


def written_by_compressed_tensors(unit: list[np.ndarray]) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The factor that joins them, and of each the codes and scales, all by the library."""
    arguments = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16,
        scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    whole = torch.from_numpy(np.stack(unit))
    factor = generate_gparam(whole.min(), whole.max())
    made = []
    for values in whole:
        padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 16))  # the last group is of eight
        groups = padded.reshape(len(values), -1, 16)
        scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, factor)
        packed = quantize_and_pack_fp4(padded, scales, global_scale=factor, group_size=16)[:, : values.shape[1] // 2]
        made.append((raw(packed), raw(scales.to(torch.float8_e4m3fn))))
    return raw(factor), made


@pytest.mark.parametrize("scales", ["reuse", "fresh"])
@pytest.mark.parametrize("divides", [False, True])
def test_a_new_factor_is_the_librarys_and_the_siblings(
    *, divides: bool, scales: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is decided for a weight and its siblings together, in pages, steps and shards: the oracle's bytes."""
    family, tensors = with_siblings(divides=divides)
    base, source = family.write(tmp_path / "fp4"), write_plain(tmp_path / "source", tensors)
    result = convert(source, tmp_path / "out", like=base, scales=scales)
    assert isinstance(result, Fp8Result)
    assert result.report is not None
    written, keys = read_directory(tmp_path / "out"), {name: stored for stored, name in family.names.items()}
    reported = {row.name: row for row in result.report.weights}
    for leaves, made_anew in UNITS.items():
        unit = {keys[f"model.layers.0.{leaf}_proj.weight"]: tensors[f"model.layers.0.{leaf}_proj.weight"]
                for leaf in leaves.split()}  # fmt: skip
        factor = new_factor(family, unit, fresh=scales == "fresh") if leaves != "o" else None
        if leaves == "o" and scales == "fresh":  # of zeros it is 1
            factor = Stored.of(np.ones((1,) if divides else (), np.float32), "F32")
        assert (factor is not None) == (made_anew or scales == "fresh")
        for stored, values in unit.items():
            packed, row = family.packed[stored], reported[family.name(stored)]
            expected = factor or family.tensors[packed.factor or ""]
            assert written[packed.factor or ""].data == expected.data
            codes, of_groups = four_bits_of(family, stored, values, fresh=scales == "fresh", factor=factor)
            assert written[stored].data == codes
            assert written[family.blocks[stored][0]].data == of_groups
            assert (row.fresh_factors, row.scales) == (factor is not None, 24 * 5)
            assert row.fresh == (120 if factor is not None else row.fresh)
        if divides and factor is not None:
            theirs, made = written_by_compressed_tensors([values.array for values in unit.values()])
            assert factor.data == theirs
            assert [(written[s].data, written[family.blocks[s][0]].data) for s in unit] == made
    assert result.report.total.fresh_factors == (7 if scales == "fresh" else 4)
    cut(monkeypatch, 512, 1)
    again = convert(source, tmp_path / "pages", like=base, scales=scales, workers=2)
    assert isinstance(again, Fp8Result)
    assert_same_report(again.report, result.report)
    assert tree(tmp_path / "pages") == tree(tmp_path / "out")
    for step in (1 << 19, 100):
        small_steps(monkeypatch, step)
        saved = plain_save(tensors_of(source), tmp_path / f"saved {step}", base, scales=scales)
        assert_same_report(saved.report, result.report)
        assert tree(tmp_path / f"saved {step}") == tree(tmp_path / "out")


def test_rows_that_no_chunk_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are cut into whole groups; where the last one is not whole, such a row with a factor is refused."""
    for name, cols in (("ModelOpt NVFP4", 80), ("Quark MXFP4", 96), ("compressed-tensors NVFP4", 72)):
        family, at = FAMILIES[name], tmp_path / name
        base = family.write(at / "base")
        tensors = trained(family, np.random.default_rng(3), "F32")
        tensors["m.q.weight"] = Stored.of(tensors["m.q.weight"].array * np.float32(3), "F32")
        source = write_plain(at / "source", tensors)
        convert(source, at / "out", like=base)
        with monkeypatch.context() as patch:
            cut(patch, 64, 8)
            if cols % 16:
                with pytest.raises(UnsupportedFormatError, match="72 elements, whose last group is not whole"):
                    convert(source, at / "cut", like=base)
            else:
                convert(source, at / "cut", like=base, workers=2)
                assert tree(at / "cut") == tree(at / "out")


def test_a_base_in_four_bits_is_no_source(tmp_path: Path) -> None:
    """It is converted first."""
    source = FAMILIES["gpt-oss"].write(tmp_path / "fp4")
    with pytest.raises(UnsupportedFormatError, match="already quantized"):
        convert(source, tmp_path / "out", like=source)


# ---------------------------------------------------------------- engines and transformers


@pytest.mark.parametrize("name", FAMILIES)
def test_engines_know_the_method(name: str, written: dict[str, Checkpoint]) -> None:
    """What is stated is what is there: no failure, and no note that a method is not known."""
    found = verify(written[name].path, serving=True).serving
    assert found is not None
    assert found.failures == ()
    assert not [note for note in found.notes if "not checked" in note or "nothing is quantized" in note]


def restate(config: Any, size: object) -> Any:
    """A configuration with another group size, wherever it states one."""
    if isinstance(config, list):
        return [restate(value, size) for value in config]
    if not isinstance(config, dict):
        return config
    return {key: size if key == "group_size" else restate(value, size) for key, value in config.items()}


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("name", [
    *("ModelOpt NVFP4", "ModelOpt mixed with NVFP4"),
    *("compressed-tensors NVFP4", "compressed-tensors MXFP4", "Quark MXFP4"),
])  # fmt: skip
def test_the_group_size_must_be_that_of_the_file(name: str, where: str, tmp_path: Path) -> None:
    """Engines size the scales by what is stated; it is in the headers what they are."""
    source, right = FAMILIES[name].write(tmp_path / "a"), 32 if "MXFP4" in name else 16
    config = json.loads((source / "config.json").read_text())
    if where == "config.json":
        (source / where).write_text(json.dumps(restate(config, 48 - right)))
        (source / "hf_quant_config.json").unlink(missing_ok=True)
    else:
        stated = {**config["quantization_config"], "group_size": 48 - right}
        stated.pop("quant_method")
        (source / "config.json").write_text("{}")
        (source / where).write_text(json.dumps({"quantization": restate(stated, 48 - right)}))
    for serving in (False, True):
        [defect] = verify(source, serving=serving).defects
        assert isinstance(defect, ScaleShapeError)
        assert f"has groups of {right}, group_size is {48 - right}" in defect.found


def test_two_group_sizes_are_named(tmp_path: Path) -> None:
    """ModelOpt states it in two files."""
    source = FAMILIES["ModelOpt NVFP4"].write(tmp_path / "a")
    stated = json.loads((source / "hf_quant_config.json").read_text())
    (source / "hf_quant_config.json").write_text(json.dumps(restate(stated, 32)))
    [defect] = verify(source).defects
    assert isinstance(defect, ConfigError)
    assert "several block sizes" in defect.found


def gpt_oss(directory: Path, intermediate: int = 64) -> Path:
    """A release of random bytes, in which the projections down are square, if nothing else is asked for: no shape says
    how they lie.
    """
    config = transformers.GptOssConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=intermediate, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=128, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], dtype="bfloat16", architectures=["GptOssForCausalLM"],
    )  # fmt: skip
    rng = np.random.default_rng(1)
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, cols, rows = tensor.shape
            codes = rng.integers(0, 256, (experts, rows, cols // 32, 16), np.uint8)
            tensors[f"{name}_blocks"] = Stored.codes(codes, "U8")
            tensors[f"{name}_scales"] = Stored.codes(rng.integers(118, 124, codes.shape[:-1], np.uint8), "U8")
        else:
            tensors[name] = Stored.of(0.2 * rng.standard_normal(tuple(tensor.shape)).astype(np.float32), "BF16")
    stated = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return Family(tensors, {**config.to_dict(), "quantization_config": stated}, {}).write(directory)


def test_gpt_oss_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """Parameters and logits are bit-equal, loaded or converted; saved by either, it becomes the release again."""
    release = gpt_oss(tmp_path / "release")
    ours = load_pretrained(release)
    how: dict[str, Any] = {"quantization_config": transformers.Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    theirs = transformers.GptOssForCausalLM.from_pretrained(release, **how)
    expected = {name: raw(tensor) for name, tensor in theirs.state_dict().items()}
    assert {name: raw(tensor) for name, tensor in ours.state_dict().items()} == expected
    convert(release, tmp_path / "bf16")
    converted = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = [model(tokens).logits for model in (theirs.eval(), ours, converted.eval())]
    assert torch.equal(logits[1], logits[0])
    assert torch.equal(logits[2], logits[0])
    save_model(ours, tmp_path / "ours", to="fp8", like=release)
    ours.save_pretrained(tmp_path / "theirs")
    for name in ("bf16", "theirs"):
        convert(tmp_path / name, tmp_path / f"{name} back", like=release)
        assert read_directory(tmp_path / f"{name} back") == read_directory(release)
    assert tree(tmp_path / "ours") == tree(tmp_path / "bf16 back") == tree(release)

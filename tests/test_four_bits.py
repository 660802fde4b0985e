"""Releases in four bits through every job: read, inspected, converted, verified, loaded; each family of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8ckpt import FP8StorageReader, convert, inspect, open_checkpoint, report, verify
from fp8ckpt.errors import RangeError
from fp8ckpt.tensors import reading
from fp8ckpt.tensors.checkpoint import Checkpoint
from tests.miniatures import four_bits
from tests.oracle import Stored, read_directory
from tests.test_convert import cut

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
        assert (tensor.weight.name, tensor.shape, tensor.grid.block_size) == (
            stored,
            packed.shape,
            family.blocks[stored][1],
        )
        assert (None if tensor.second is None else tensor.second.span.name) == packed.factor


@settings(max_examples=150, deadline=None)
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
            Stored.codes(np.full((24, 48), code, np.uint8), "U8"),
            Stored.codes(np.full((24, 3), 141, np.uint8), "U8"),
        )
        changed = {**family.tensors, "m.q.weight": weight, "m.q.weight_scale": scale}
        source = type(family)(changed, family.config, family.blocks, packed=family.packed).write(tmp_path / str(code))
        if fits:
            convert(source, tmp_path / "out", to="fp16")
            assert (read_directory(tmp_path / "out")["m.q.weight"].array == 49152).all()
        else:
            with pytest.raises(RangeError, match=f"{24 * 96} elements go beyond 65504"):
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
    beside = {
        key for stored, packed in family.packed.items() for key in (stored, family.blocks[stored][0], packed.factor)
    }
    assert four[0].bytes == sum(len(family.tensors[key].data) for key in beside - {None})
    assert four[0].block.endswith("x 16" if four[0].scale_dtype == "F8_E4M3" else "x 32")
    assert {row.name: row.shape for row in found.listed} == {key: tensor.shape for key, tensor in expected.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_into_whole_and_strided_targets(name: str, written: dict[str, Checkpoint]) -> None:
    """Through DCP, to bfloat16 and float32, transposed as well; the bytes read are the file's."""
    family = FAMILIES[name]
    for dtype, of_torch in (("BF16", torch.bfloat16), ("F32", torch.float32)):
        expected = family.expected(dtype)
        state: dict[str, Any] = {
            key: torch.zeros(t.shape, dtype=of_torch if t.dtype == dtype else torch.bfloat16)
            for key, t in expected.items()
        }
        reader = FP8StorageReader(written[name].path)
        dcp.load(state, storage_reader=reader, no_dist=True)
        assert {key: raw(tensor) for key, tensor in state.items()} == {key: t.data for key, t in expected.items()}
        assert reader.bytes_read == sum(
            len(family.tensors[s].data) for s in family.tensors if family.name(s) in expected
        )
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
        region = tuple(min(3, dim - 1) for dim in tensor.shape), tuple(dim - min(3, dim - 1) for dim in tensor.shape)
        target = torch.empty(region[1], dtype=torch.bfloat16)
        for piece, codes in tensor.codes(region, reader):
            given = _codes_of(tensor, piece, codes, buffer)
            part = target[
                tuple(slice(at - o, at - o + n) for at, o, n in zip(piece[0], region[0], piece[1], strict=True))
            ]
            dequantize_on_device(given, reader.dequantizer(tensor, "BF16"), piece[0], part)
        assert raw(target) == raw(written[name].read(tensor.name, *region))


@pytest.mark.parametrize("name", FAMILIES)
def test_verify_and_report(name: str, written: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Sound alone, and with itself; the report counts its codes, each nibble one."""
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

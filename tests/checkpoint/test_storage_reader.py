"""`FP8StorageReader`: torch's distributed checkpoint sees the logical checkpoint, and every region holds the oracle's
values.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.tensor import DTensor, Replicate, Shard, empty

from fp8ckpt import Fp8CheckpointError, FP8StorageReader, open_checkpoint
from fp8ckpt.checkpoint.regions import dequantize_on_device, expanded_scales
from fp8ckpt.errors import (
    MissingScaleError,
    ModelMismatchError,
    RegionError,
    ScaleValueError,
    UnknownTensorError,
    UnsupportedFormatError,
)
from fp8ckpt.tensors.reading import load_dequantizer, torch_dtype
from tests.distributed import assert_same, bits, mesh, rewrite, run
from tests.miniatures import Family, families
from tests.oracle import Stored, write_safetensors
from tests.support import ALL, examples

FAMILIES = families()
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family as a directory."""
    root = tmp_path_factory.mktemp("families")
    return {name: family.write(root / str(i)) for i, (name, family) in enumerate(FAMILIES.items())}


def _tensor(stored: Stored) -> torch.Tensor:
    return torch.frombuffer(bytearray(stored.data), dtype=torch_dtype(stored.dtype)).reshape(stored.shape)


def _load(state: dict[str, Any], reader: FP8StorageReader) -> None:
    dcp.load(state, storage_reader=reader, no_dist=True)


# ---------------------------------------------------------------- all families


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_family_and_target(name: str, dtype: str, written: dict[str, Path]) -> None:
    """Whole tensors, dequantized to the target's dtype, and plain ones as they are; bytes read are the weights'."""
    family = FAMILIES[name]
    expected = family.expected(dtype)
    state = {key: torch.zeros(t.shape, dtype=torch_dtype(t.dtype)) for key, t in expected.items()}
    reader = FP8StorageReader(written[name])
    _load(state, reader)
    for key, tensor in expected.items():
        assert bits(state[key]) == tensor.data, key
    read = (len(stored.data) for key, stored in family.tensors.items() if family.name(key) in expected)
    assert reader.bytes_read == sum(read)


@pytest.mark.parametrize("name", FAMILIES)
def test_strided_targets(name: str, written: dict[str, Path]) -> None:
    """Transposed targets, and every second column of one, are filled, and nothing beside them."""
    expected = FAMILIES[name].expected()
    transposed = {key: torch.zeros(t.shape[::-1], dtype=torch_dtype(t.dtype)) for key, t in expected.items()}
    _load({key: t.permute(*reversed(range(t.dim()))) for key, t in transposed.items()}, FP8StorageReader(written[name]))
    wide = {key: torch.full((*t.shape, 2), 7, dtype=torch_dtype(t.dtype)) for key, t in expected.items()}
    _load({key: t[..., 0] for key, t in wide.items()}, FP8StorageReader(written[name], workers=3))
    for key, tensor in expected.items():
        assert bits(transposed[key].permute(*reversed(range(len(tensor.shape))))) == tensor.data, key
        assert bits(wide[key][..., 0]) == tensor.data, key
        assert bool((wide[key][..., 1] == 7).all()), key


@pytest.mark.parametrize("name", FAMILIES)
def test_codes_and_scales_under_their_own_names(name: str, written: dict[str, Path]) -> None:
    """A target of the stored FP8 dtype gets the codes, and scales and activation scales can be asked for by name."""
    family = FAMILIES[name]
    asked = {key: family.tensors[key] for weight, (scale, _) in family.blocks.items() for key in (weight, scale)}
    for tensor in open_checkpoint(written[name]).quantized:
        asked.update({span.name: family.tensors[span.name] for span in tensor.activation_scales})
    state = {key: torch.zeros(t.shape, dtype=torch.uint8).to(torch_dtype(t.dtype)) for key, t in asked.items()}
    _load(state, FP8StorageReader(written[name]))
    for key, tensor in asked.items():
        assert bits(state[key]) == tensor.data, key


def test_plain_tensors_are_cast(written: dict[str, Path]) -> None:
    """A BF16 tensor for a float32 parameter is cast, as DCP does."""
    name = "per-tensor 0-d BF16"
    target = torch.zeros(16, 8)
    _load({"lm_head.weight": target}, FP8StorageReader(written[name]))
    assert_same(target, _tensor(FAMILIES[name].tensors["lm_head.weight"]).float())


def test_one_element_of_a_strided_whole(tmp_path: Path) -> None:
    """A target of one element that is every second of something else, plain or FP8."""
    one = Stored.of(np.full((1, 1), 3.0, np.float32), "F32")
    tensors = {
        "a": one,
        "b.weight": Stored.codes(np.full((1, 1), 0x38, np.uint8)),
        "b.weight_scale_inv": Stored("F32", (), one.data),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    for dtype in (torch.float32, torch.bfloat16):
        wide = {name: torch.zeros(1, 1, 2, dtype=dtype) for name in ("a", "b.weight")}
        _load({name: tensor[..., 1] for name, tensor in wide.items()}, FP8StorageReader(tmp_path))
        found = {name: tensor.flatten().tolist() for name, tensor in wide.items()}
        assert found == {"a": [0.0, 3.0], "b.weight": [0.0, 3.0]}


def test_parameters_are_filled_in_place(written: dict[str, Path]) -> None:
    """A parameter that requires a gradient keeps its memory, and has the values."""
    name = "per-tensor 0-d BF16"
    parameter = torch.nn.Parameter(torch.zeros(40, 24, dtype=torch.bfloat16))
    address = parameter.data_ptr()
    _load({"m.q.weight": parameter}, FP8StorageReader(written[name]))
    assert parameter.data_ptr() == address
    assert parameter.requires_grad
    assert bits(parameter) == FAMILIES[name].expected()["m.q.weight"].data


# ---------------------------------------------------------------- what the reader says of itself


def test_metadata_is_the_logical_checkpoint(sample_fp8: Path) -> None:
    """FP8 tensors are BF16 of one chunk; scales have their own entries; the id is the path."""
    checkpoint = open_checkpoint(sample_fp8)
    metadata = FP8StorageReader(sample_fp8).read_metadata()
    scales = {span.name for t in checkpoint.quantized for span in (t.scale, *t.activation_scales)}
    assert set(metadata.state_dict_metadata) == set(checkpoint.tensors) | scales
    for tensor in checkpoint.quantized:
        entry = metadata.state_dict_metadata[tensor.name]
        assert (entry.properties.dtype, tuple(entry.size)) == (torch.bfloat16, tensor.shape)
        [chunk] = entry.chunks
        assert (tuple(chunk.offsets), tuple(chunk.sizes)) == ((0, 0), tensor.shape)
    assert metadata.storage_meta is not None
    assert metadata.storage_meta.checkpoint_id == str(sample_fp8)


def test_validate_checkpoint_id(sample_fp8: Path) -> None:
    """A directory or a file that is there, and nothing else."""
    assert FP8StorageReader.validate_checkpoint_id(sample_fp8)
    assert FP8StorageReader.validate_checkpoint_id(str(sample_fp8 / "config.json"))
    assert not FP8StorageReader.validate_checkpoint_id(sample_fp8 / "nothing")


def test_reset_with_another_path(written: dict[str, Path]) -> None:
    """``dcp.load(checkpoint_id=...)`` takes another checkpoint; reset without one keeps it."""
    one, two = "per-tensor 0-d BF16", "per-tensor 0-d F32"
    reader = FP8StorageReader(written[one])
    target = torch.zeros(40, 24, dtype=torch.bfloat16)
    dcp.load({"m.q.weight": target}, storage_reader=reader, checkpoint_id=str(written[two]), no_dist=True)
    assert bits(target) == FAMILIES[two].expected()["m.q.weight"].data
    _load({"m.q.weight": target.zero_()}, reader)
    assert bits(target) == FAMILIES[two].expected()["m.q.weight"].data
    reader.reset(written[one])
    _load({"m.q.weight": target}, reader)
    assert bits(target) == FAMILIES[one].expected()["m.q.weight"].data


def test_takes_an_open_checkpoint_and_a_single_file(sample_fp8: Path, tmp_path: Path) -> None:
    """A `Checkpoint`, or one of its files, is as good as a path."""
    checkpoint = open_checkpoint(sample_fp8)
    name = checkpoint.quantized[0].name
    target = torch.zeros(checkpoint[name].shape, dtype=torch.bfloat16)
    reader = FP8StorageReader(checkpoint)
    assert reader.checkpoint is checkpoint
    _load({name: target}, reader)
    assert_same(target, checkpoint.read(name))
    plain = "lm_head.weight"
    target = torch.zeros(checkpoint[plain].shape, dtype=torch.bfloat16)
    single = tmp_path / "single.safetensors"
    write_safetensors(single, {plain: Stored("BF16", tuple(target.shape), bits(checkpoint.read(plain)))})
    _load({plain: target}, FP8StorageReader(single))
    assert_same(target, checkpoint.read(plain))


# ---------------------------------------------------------------- refusals


def _error_of(state: dict[str, Any], reader: FP8StorageReader) -> str:
    with pytest.raises(CheckpointException) as caught:  # DCP wraps what a rank met with
        _load(state, reader)
    return "\n".join(f"{type(error).__name__}: {error}" for error, _ in caught.value.failures.values())


def test_unknown_names_and_wrong_shapes_are_refused(sample_fp8: Path) -> None:
    """A key that the checkpoint lacks, and a target of another shape, are refused, and name the tensor."""
    name = open_checkpoint(sample_fp8).quantized[0].name
    reader = FP8StorageReader(sample_fp8)
    assert "nothing.weight" in _error_of({"nothing.weight": torch.zeros(2)}, reader)
    assert name in _error_of({name: torch.zeros(3, 3, dtype=torch.bfloat16)}, reader)
    assert reader.bytes_read == 0


def test_integer_targets_are_refused(sample_fp8: Path) -> None:
    """An FP8 tensor has no values in int32, float64 or another FP8 dtype: `UnsupportedFormatError` by name."""
    tensor = open_checkpoint(sample_fp8).quantized[0]
    for dtype in (torch.int32, torch.float64, torch.float8_e5m2):
        message = _error_of({tensor.name: torch.zeros(tensor.shape).to(dtype)}, FP8StorageReader(sample_fp8))
        assert message.startswith(f"{UnsupportedFormatError.__name__}: {tensor.name}")


@pytest.mark.parametrize("bad", [0x7FC0, 0x7F80, 0x0000, 0xBF80])
def test_a_bad_scale_surfaces_with_its_name(sample_fp8: Path, tmp_path: Path, bad: int) -> None:
    """NaN, infinity, zero and a negative scale: `ScaleValueError`, with the scale's name and file."""
    name = open_checkpoint(sample_fp8).quantized[3].name

    def change(tensors: dict[str, Stored]) -> dict[str, Stored]:
        return {**tensors, name + "_scale_inv": Stored("BF16", (), bad.to_bytes(2, "little"))}

    path = rewrite(sample_fp8, tmp_path / "bad", change)
    shape = open_checkpoint(path)[name].shape
    message = _error_of({name: torch.zeros(shape, dtype=torch.bfloat16)}, FP8StorageReader(path))
    assert message.startswith(f"{ScaleValueError.__name__}: {name}_scale_inv in model.safetensors: ")


def test_a_missing_scale_is_refused_before_any_data(sample_fp8: Path, tmp_path: Path) -> None:
    """No codes ever pass for values: the checkpoint is refused when its headers are read."""
    name = open_checkpoint(sample_fp8).quantized[3].name
    path = rewrite(sample_fp8, tmp_path / "missing", lambda t: {n: v for n, v in t.items() if n != name + "_scale_inv"})
    with pytest.raises(MissingScaleError, match=name):
        len(FP8StorageReader(path).read_metadata().state_dict_metadata)
    reader = FP8StorageReader(path)
    message = _error_of({"lm_head.weight": torch.zeros(512, 128)}, reader)
    assert f"{name} in model.safetensors: F8_E4M3 weight without a scale" in message
    assert reader.bytes_read == 0


class _Planner(DefaultLoadPlanner):
    """Resolves each item to a tensor of its own."""

    def __init__(self, *targets: torch.Tensor) -> None:
        super().__init__()
        self.targets = targets
        self.committed: list[int | None] = []

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert read_item.dest_index.index is not None
        return self.targets[read_item.dest_index.index]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        assert tensor.data_ptr() == self.resolve_tensor(read_item).data_ptr()
        self.committed.append(read_item.dest_index.index)


def _item(name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], number: int = 0) -> ReadItem:
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(name, index=number),
        dest_offsets=torch.Size([0] * len(sizes)),
        storage_index=MetadataIndex(name, torch.Size([0] * len(sizes))),
        storage_offsets=torch.Size(offsets),
        lengths=torch.Size(sizes),
    )


def test_a_plan_that_does_not_fit_its_target_is_refused(sample_fp8: Path) -> None:
    """A hand-made plan of an unknown tensor, or of other sizes than its target: named errors, nothing read."""
    name = open_checkpoint(sample_fp8).quantized[0].name
    for item, error in ((_item("nothing", (0,), (1,)), UnknownTensorError), (_item(name, (0, 0), (2, 2)), RegionError)):
        reader = FP8StorageReader(sample_fp8)
        planner = _Planner(torch.zeros(1, dtype=torch.bfloat16))
        with pytest.raises(error) as caught:
            reader.read_data(LoadPlan([item]), planner)
        assert isinstance(caught.value, Fp8CheckpointError)
        assert reader.bytes_read == 0


def test_a_target_whose_elements_share_memory_is_refused(sample_fp8: Path) -> None:
    """They would all have the values of one."""
    name = open_checkpoint(sample_fp8).quantized[0].name
    shape = tuple(open_checkpoint(sample_fp8)[name].shape)
    target = torch.zeros((1, shape[1]), dtype=torch.bfloat16).expand(shape)
    with pytest.raises(ModelMismatchError, match="share the memory of"):
        FP8StorageReader(sample_fp8).read_data(LoadPlan([_item(name, (0, 0), shape)]), _Planner(target))


# ---------------------------------------------------------------- regions


@st.composite
def _regions(draw: st.DrawFn, shape: tuple[int, ...], least: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    offsets, sizes = [], []
    for dim in shape:
        start = draw(st.integers(0, dim - least))
        offsets.append(start)
        sizes.append(draw(st.integers(least, dim - start)))
    return tuple(offsets), tuple(sizes)


def _slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))


@given(data=st.data())
@examples(150)
def test_random_regions(data: st.DataObject, written: dict[str, Path]) -> None:
    """Several regions of a weight at once, into any dtype: the oracle's values, each byte read once."""
    name = data.draw(st.sampled_from(list(FAMILIES)))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    family: Family = FAMILIES[name]
    expected = family.expected(dtype)
    weight = data.draw(st.sampled_from(list(expected)))
    items, targets = [], []
    for number in range(data.draw(st.integers(1, 4))):
        offsets, sizes = data.draw(_regions(expected[weight].shape))
        items.append(_item(weight, offsets, sizes, number))
        targets.append(torch.zeros(sizes, dtype=torch_dtype(expected[weight].dtype)))
    reader = FP8StorageReader(written[name], workers=data.draw(st.integers(1, 3)))
    planner = _Planner(*targets)
    reader.read_data(LoadPlan(items), planner).wait()
    full = _tensor(expected[weight])
    for item, target in zip(items, targets, strict=True):
        assert bits(target) == bits(full[_slices(tuple(item.storage_offsets), tuple(item.lengths))])
    assert planner.committed == list(range(len(items)))
    itemsize = 1 if weight in map(family.name, family.blocks) else full.element_size()
    assert reader.bytes_read == sum(prod(item.lengths) for item in items) * itemsize


def _dtensors(paths: dict[str, str]) -> dict[str, int]:
    """Every family, its tensors placed in several ways; returns the bytes read by family and placement."""
    counted, over = {}, mesh()
    for name, path in paths.items():
        expected = FAMILIES[name].expected()
        few = not ALL and (name not in _ON_MANY_RANKS or over.size() == 8)  # and copies are what one process reads
        for placement in (Shard(0), Shard(1), *(() if few else (Replicate(),))):
            state = {}
            for key, tensor in expected.items():
                own = Replicate() if placement == Shard(1) and len(tensor.shape) < 2 else placement
                state[key] = empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device_mesh=over, placements=[own])
            reader = FP8StorageReader(path, workers=2)
            dcp.load(state, storage_reader=reader)
            for key, tensor in expected.items():
                assert isinstance(state[key], DTensor)
                assert bits(state[key].full_tensor()) == tensor.data, (name, key, placement)
            counted[f"{name} {placement}"] = reader.bytes_read
    dist.barrier()
    return counted


_ON_MANY_RANKS = [
    "per-tensor 0-d BF16", "per-channel [o,1]", "block 128 ragged F32", "experts in blocks", "MXFP8 U8", "ModelOpt 4-D",
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "names"), [(3, list(FAMILIES)), (8, _ON_MANY_RANKS)], ids=["3", "8"])
def test_dtensors_of_every_family(ranks: int, names: list[str], written: dict[str, Path]) -> None:
    """Rows, columns and copies over the ranks, uneven and empty shards: right everywhere, each byte read once."""
    counts = run(ranks, _dtensors, {name: str(written[name]) for name in names})
    for name in names:
        family = FAMILIES[name]
        expected = family.expected()
        stored = {family.name(key): tensor for key, tensor in family.tensors.items()}
        size = {key: len(stored[key].data) for key in expected}
        whole = sum(size.values())
        vectors = sum(size[key] for key, tensor in expected.items() if len(tensor.shape) < 2)
        assert sum(count[f"{name} {Shard(0)}"] for count in counts) == whole
        assert sum(count[f"{name} {Shard(1)}"] for count in counts) == whole + (ranks - 1) * vectors
        assert all(count.get(f"{name} {Replicate()}", whole) == whole for count in counts)


# ---------------------------------------------------------------- on a device


@given(data=st.data())
@examples(200)
def test_device_arithmetic_equals_the_look_up(data: st.DataObject, written: dict[str, Path]) -> None:
    """What an accelerator computes (here with CPU tensors) has the oracle's bits, for every family and any region."""
    name = data.draw(st.sampled_from(list(FAMILIES)))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    family = FAMILIES[name]
    tensor = open_checkpoint(written[name]).quantized[0]
    offsets, sizes = data.draw(_regions(tensor.shape, least=1))
    dequantizer = load_dequantizer(tensor, dtype)
    codes = _tensor(family.tensors[tensor.weight.name])[_slices(offsets, sizes)]
    target = torch.zeros((*sizes, 2), dtype=DTYPES[dtype])[..., 1]
    dequantize_on_device(codes, dequantizer, offsets, target)
    expected = _tensor(family.expected(dtype)[tensor.name])[_slices(offsets, sizes)]
    assert bits(target) == bits(expected)
    scales = expanded_scales(dequantizer, offsets, sizes, torch.device("cpu"))
    assert scales.dtype == torch.float32
    assert torch.broadcast_shapes(tuple(scales.shape), sizes) == torch.Size(sizes)


def test_expanded_scales_are_small_where_a_block_spans() -> None:
    """One scale for a region within one block: its shape is all ones, so that no copy of the weight's size is made."""
    from fp8ckpt.numerics.dequantize import Dequantizer
    from fp8ckpt.numerics.geometry import BlockGrid

    scales = np.arange(1, 7, dtype=np.float32).view(np.uint32).reshape(3, 2)
    dequantizer = Dequantizer(BlockGrid((300, 200), (128, 128)), scales, "F32", "F8_E4M3", "BF16")
    inside = expanded_scales(dequantizer, (130, 130), (50, 60), torch.device("cpu"))
    assert inside.tolist() == [[4.0]]
    across = expanded_scales(dequantizer, (127, 0), (2, 128), torch.device("cpu"))
    assert across.tolist() == [[1.0], [3.0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_targets(written: dict[str, Path]) -> None:
    """Codes travel to a CUDA device, and are dequantized there to the oracle's bits; strided targets too."""
    for name, family in FAMILIES.items():
        for dtype in DTYPES:
            expected = family.expected(dtype)
            state = {
                key: torch.zeros((*t.shape, 2), dtype=torch_dtype(t.dtype), device="cuda")[..., 0]
                for key, t in expected.items()
            }
            _load(state, FP8StorageReader(written[name], workers=3))
            for key, tensor in expected.items():
                assert bits(state[key].cpu()) == tensor.data, (name, key, dtype)

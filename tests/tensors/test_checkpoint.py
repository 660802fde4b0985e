"""The logical checkpoint: what opens, what is refused, and what a read returns and costs."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt import convert, inspect, verify
from fp8ckpt.errors import (
    AmbiguousScaleError,
    CheckpointNotFoundError,
    ConfigError,
    Fp8CheckpointError,
    HeaderError,
    IndexMismatchError,
    MissingScaleError,
    OrphanScaleError,
    RegionError,
    ScaleShapeError,
    ScaleValueError,
    SourceChangedError,
    StorageError,
    TruncatedFileError,
    UnknownTensorError,
    UnsupportedFormatError,
)
from fp8ckpt.numerics.codes import FP8_DTYPES
from fp8ckpt.output.side_files import side_files
from fp8ckpt.stores.local import LocalStore, local_file
from fp8ckpt.stores.store import ByteRange, Bytes
from fp8ckpt.tensors import reading
from fp8ckpt.tensors.checkpoint import Checkpoint, open_checkpoint, survey
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import DTYPE_BITS, TensorSpan, tensor_nbytes
from fp8ckpt.tensors.tensor import Reader
from tests.miniatures import cache_only, families
from tests.oracle import Stored, assert_same_tree, read_directory, read_safetensors, write_safetensors
from tests.support import examples

Spoil = Callable[[Path], object]

FAMILIES = families()
INDEX = "model.safetensors.index.json"
PER_TENSOR = FAMILIES["per-tensor 0-d BF16"]
BLOCK = FAMILIES["block 128 ragged F32"]
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A sound checkpoint of two files with an index, to be spoiled."""
    return PER_TENSOR.write(tmp_path / "checkpoint")


def raw_bytes(tensor: torch.Tensor) -> bytes:
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def patterns(stored: Stored) -> np.ndarray:
    """Its elements, with no meaning."""
    return np.frombuffer(stored.data, f"V{DTYPE_BITS[stored.dtype] // 8}").reshape(stored.shape)


def check_reads(checkpoint: Checkpoint, expected: dict[str, Stored]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, stored in expected.items():
        tensor = checkpoint.read(name)
        assert tuple(tensor.shape) == stored.shape
        assert tensor.dtype == reading.torch_dtype(stored.dtype)
        assert raw_bytes(tensor) == stored.data, name


def edit_json(file: Path, change: Any) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def mapping(**files: str | None) -> Spoil:
    """The index says other files of tensors; None for one that it leaves out."""

    def edit(index: dict[str, Any]) -> None:
        index["weight_map"] |= files
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file is not None}

    return lambda directory: edit_json(directory / INDEX, edit)


def file_of(name: str, tensors: dict[str, Stored] | bytes | str) -> Spoil:
    """Another file, or another one in its place."""

    def write(directory: Path) -> None:
        if isinstance(tensors, dict):
            write_safetensors(directory / name, tensors)
        else:
            data = tensors if isinstance(tensors, bytes) else tensors.encode("utf-8", "surrogatepass")
            (directory / name).write_bytes(data)

    return write


def without(*names: str) -> Spoil:
    return lambda directory: [(directory / name).unlink() for name in names]


def config_of(quantization: object) -> Spoil:
    return file_of("config.json", json.dumps({"quantization_config": quantization}))


FIRST = next(iter(PER_TENSOR.tensors))
EVIL = {"evil.weight": Stored.of(np.zeros(3), "BF16")}
NO_NAMES = (
    "../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b.safetensors", "x\0.safetensors",
)  # fmt: skip
NO_INDEXES = ("", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}',
              '{"weight_map": {"a": null}}', '{"weight_map": {"a": "f", "a": "f"}}', "\ud83d", "[" * 10**5)  # fmt: skip
NO_CONFIGS = ("{", "[]", "3", '{"a": 1, "a": 2}', "\ud800", "[" * 100_000)
NO_SIZES = (0, -1, "128", [128, 0], [-1, 128], [1.5, 2], [True, 1], [], [[128], [128]], {"a": 1}, [None], [{}], 128.0,
            True)  # fmt: skip
TWO_SIZES = {str(i): {"weights": {"block_structure": [size, size]}} for i, size in enumerate((64, 128))}

#: How `two` is spoiled; the one defect: its class, the tensor or file that it names, words that are in it.
SPOILED: dict[str, tuple[Spoil, type[Fp8CheckpointError], str | None, tuple[str, ...]]] = {
    "a tensor in another file than the index says":
        (mapping(**{FIRST: TWO}), IndexMismatchError, FIRST, (f"says that it is in {TWO}", f"but it is in {ONE}")),
    "a tensor that the index does not list":
        (mapping(**{FIRST: None}), IndexMismatchError, FIRST, ("does not list", ONE)),
    "a tensor that no file holds":
        (mapping(**{"ghost.weight": ONE}), IndexMismatchError, "ghost.weight", ("does not hold", ONE)),
    "a file that the index does not name": (file_of("extra.safetensors", EVIL), IndexMismatchError,
        "extra.safetensors", ("does not name this file",)),
    "a damaged file that the index does not name":  # it cannot be shown to be empty
        (file_of("extra.safetensors", b"junk"), IndexMismatchError, None, ("extra.safetensors",)),
    **{f"the index names {name!r}": (mapping(**{"evil.weight": name}), IndexMismatchError, None,
            ("it names the file", "; expected the name of a file in the directory")) for name in NO_NAMES},
    **{f"no index: {text[:40]!r}": (file_of(INDEX, text), IndexMismatchError, INDEX, ()) for text in NO_INDEXES},
    "a damaged file does not blame the others": (file_of(TWO, b"junk, and nothing else"), HeaderError, TWO, ()),
    **{f"no configuration: {text[:40]!r}": (file_of("config.json", text), ConfigError, "config.json", ())
       for text in NO_CONFIGS},
    **{f"no block size: {size}": (config_of({"weight_block_size": size}), ConfigError, None, ()) for size in NO_SIZES},
    "several block sizes": (config_of({"config_groups": TWO_SIZES}), ConfigError, None, ("several block sizes",)),
}  # fmt: skip

#: How `two` is changed, and may be.
SOUND: dict[str, Spoil] = {
    "no index": without(INDEX),
    "no configuration, which one scale a tensor does not need": without("config.json"),
    "an empty file that the index does not name": file_of("extra.safetensors", {}),
    **{f"metadata of the index: {metadata}": lambda directory, metadata=metadata: edit_json(  # type: ignore[misc]
        directory / INDEX, lambda index: index.update(metadata=metadata))
       for metadata in (None, [], "x", {}, {"total_size": "many"}, {"total_size": None})},
}  # fmt: skip


def refused(path: Path | str, kind: type[Fp8CheckpointError], *words: str, count: int | None = 1) -> Fp8CheckpointError:
    """`open_checkpoint` raises it, `survey` lists it, and each of ``words`` is in its one line."""
    with pytest.raises(Fp8CheckpointError) as caught:
        open_checkpoint(path)
    defects = survey(path).defects
    found = [defect for defect in defects if type(defect) is kind and all(word in str(defect) for word in words)]
    assert found, defects
    if count is not None:
        assert len(defects) == count, defects
    assert type(caught.value) is type(defects[0])
    assert all(str(defect).isprintable() for defect in defects)
    return found[0]


# Opening.


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_every_family_is_read(tmp_path: Path, name: str) -> None:
    """`read` gives the oracle's bytes for FP8, and the stored bytes for all else."""
    checkpoint = open_checkpoint(FAMILIES[name].write(tmp_path / "checkpoint"))
    check_reads(checkpoint, FAMILIES[name].expected())


def test_with_an_index(two: Path) -> None:
    """The index and its name, the configuration, the path and the headers are there."""
    checkpoint = open_checkpoint(two)
    assert checkpoint.path == two
    assert checkpoint.index_name == INDEX
    assert checkpoint.index == json.loads((two / INDEX).read_text())
    assert checkpoint.config == PER_TENSOR.config
    assert [header.file.name for header in checkpoint.files] == [ONE, TWO]
    assert checkpoint.defects == checkpoint.notes == ()
    assert [tensor.name for tensor in checkpoint.quantized] == list(PER_TENSOR.blocks)


def test_blocks_need_the_configuration(tmp_path: Path) -> None:
    """A grid of blocks is not guessed: without ``weight_block_size`` it is refused; the remedy says what to state."""
    directory = BLOCK.write(tmp_path / "checkpoint")
    (directory / "config.json").unlink()
    error = refused(directory, ScaleShapeError, "(3, 2)", "(300, 200)")
    assert "weight_block_size" in (error.remedy or "")


def test_a_single_file(tmp_path: Path) -> None:
    """A file named itself is the whole checkpoint, with the configuration beside it."""
    directory = BLOCK.write(tmp_path / "checkpoint", files=1)
    write_safetensors(directory / "other.safetensors", {"stray.weight": Stored.codes(np.zeros((4, 4), np.uint8))})
    checkpoint = open_checkpoint(directory / "model.safetensors")
    assert checkpoint.path == directory
    check_reads(checkpoint, BLOCK.expected())


def test_a_single_file_of_several_is_refused(two: Path) -> None:
    """One file of several lacks what is in the others; the directory is to be opened."""
    with pytest.raises(CheckpointNotFoundError, match=f"{ONE}: this is 1 of 2 files of a checkpoint"):
        open_checkpoint(two / ONE)


def test_a_directory_behind_a_link(two: Path, tmp_path: Path) -> None:
    """A link to the directory is followed; links out of it are not, be they of weights or of the configuration."""
    (tmp_path / "link").symlink_to(two, target_is_directory=True)
    check_reads(open_checkpoint(tmp_path / "link"), PER_TENSOR.expected())
    (linked := tmp_path / "linked").mkdir()
    for file in two.iterdir():
        (linked / file.name).symlink_to(file)
    leads_out = {(defect.file, defect.found) for defect in survey(linked).defects}
    assert leads_out == {(f, "it is a link that leads out of the directory") for f in ("config.json", INDEX, ONE, TWO)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub, and the working directory, both empty."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", [
    "absent", "a/b/c/d", "./absent", "../absent", "/absent/dir", "", "a\0b", "x" * 5000, "a b", "~/absent",
    "a--b/c", "a..b/c", "-a/b", "a/b.", "a/b.git", ".a/b",  # which huggingface_hub would refuse as an id
])  # fmt: skip
@pytest.mark.usefixtures("cache")
def test_what_is_not_there(name: str) -> None:
    """A path that leads nowhere, whatever its spelling, is a CheckpointNotFoundError."""
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_checkpoint(name)
    assert str(caught.value).isprintable()
    assert isinstance(caught.value, FileNotFoundError)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    """A directory with no safetensors file holds no checkpoint."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointNotFoundError, match="no safetensors file"):
        open_checkpoint(tmp_path)


def fill_hub_cache(cache: Path, repository: str, source: Path) -> Path:
    """The layout of huggingface_hub: blobs, a snapshot of links, and a ref."""
    root = cache / f"models--{repository.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / revision
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    for i, file in enumerate(sorted(source.iterdir())):
        blob = root / "blobs" / f"{i:040x}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_hub_id_in_the_local_cache(two: Path, cache: Path) -> None:
    """A hub id opens the snapshot in the cache, without the network."""
    snapshot = fill_hub_cache(cache, "mistralai/Tiny-FP8", two)
    checkpoint = open_checkpoint("mistralai/Tiny-FP8")
    assert checkpoint.path.resolve() == snapshot.resolve()
    check_reads(checkpoint, PER_TENSOR.expected())


@pytest.mark.usefixtures("cache")
def test_a_hub_id_that_is_not_cached() -> None:
    """It is named, with the command that fetches it."""
    with pytest.raises(CheckpointNotFoundError, match="hf download mistralai/Absent-FP8"):
        open_checkpoint("mistralai/Absent-FP8")


@pytest.mark.parametrize("thing", [None, 3, ["a.safetensors", "b.safetensors"], {}])
def test_what_is_no_checkpoint_of_any_kind(thing: Any) -> None:
    """Wherever one is taken, it is said what can be given."""
    for call in (open_checkpoint, verify, inspect):
        with pytest.raises(TypeError, match=rf"a {type(thing).__name__} is no checkpoint: give a directory"):
            call(thing)


def test_a_local_directory_goes_before_a_hub_id(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is there is opened, though its name could be a hub id."""
    (tmp_path / "org").mkdir()
    two.rename(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").path == Path("org/name")


@pytest.mark.parametrize("native", ["consolidated.safetensors", "consolidated-00001-of-00001.safetensors"])
@pytest.mark.parametrize("index", [True, False])
def test_native_files_beside_hugging_face_ones_are_ignored(two: Path, native: str, index: bool) -> None:
    """Mistral's second copy is not read, sound or not."""
    (two / native).write_bytes(b"not a safetensors file")
    (two / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": native}}))
    if not index:
        (two / INDEX).unlink()
    checkpoint = open_checkpoint(two)
    assert checkpoint.index_name == (INDEX if index else None)
    check_reads(checkpoint, PER_TENSOR.expected())


@pytest.mark.parametrize("parts", [1, 2])
def test_a_native_directory(tmp_path: Path, parts: int) -> None:
    """Mistral's own files, alone, are the checkpoint; with their own index where there is one."""
    family = FAMILIES["Mistral native"]
    directory = tmp_path / "native"
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(family.more_files["params.json"]))
    names = list(family.tensors)
    weight_map = {}
    for i in range(parts):
        file = "consolidated.safetensors" if parts == 1 else f"consolidated-{i + 1:05d}-of-{parts:05d}.safetensors"
        write_safetensors(directory / file, {name: family.tensors[name] for name in names[i::parts]})
        weight_map.update(dict.fromkeys(names[i::parts], file))
    index = "consolidated.safetensors.index.json" if parts > 1 else None
    if index is not None:
        (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.index_name == index
    check_reads(checkpoint, family.expected())


# Indexes.


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_directory_has_one_defect(two: Path, name: str) -> None:
    (two / "sub").mkdir()
    for place in (two.parent, two / "sub"):  # which an index must not reach
        write_safetensors(place / "x.safetensors", EVIL)
    spoil, kind, subject, words = SPOILED[name]
    spoil(two)
    error = refused(two, kind, *words)
    assert subject is None or subject in (error.tensor, error.file)


@pytest.mark.parametrize("name", SOUND)
def test_what_decides_nothing(two: Path, name: str) -> None:
    SOUND[name](two)
    checkpoint = open_checkpoint(str(two))
    assert (checkpoint.index_name is None, checkpoint.index is None) == (name == "no index",) * 2
    assert checkpoint.config == ({} if name.startswith("no configuration") else PER_TENSOR.config)
    check_reads(checkpoint, PER_TENSOR.expected())


def test_a_file_that_is_not_there(two: Path) -> None:
    """File and first tensor are named; its tensors' scales are not held against others."""
    (two / TWO).unlink()
    error = refused(two, IndexMismatchError, TWO, "does not exist")
    assert error.file == INDEX
    assert error.tensor in PER_TENSOR.tensors


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "☃" * 200, "\n\x1b", "config.json"])
def test_odd_file_names_in_an_index(two: Path, name: str) -> None:
    """Names that no file system takes, or that are no safetensors file, are named defects."""
    edit_json(two / INDEX, lambda index: index["weight_map"].update({"odd.weight": name}))
    with pytest.raises(Fp8CheckpointError) as caught:
        open_checkpoint(two)
    assert str(caught.value).isprintable()


def test_a_wrong_total_size_is_noted(two: Path) -> None:
    """``total_size`` decides nothing: a wrong one is a note, no defect."""
    edit_json(two / INDEX, lambda index: index["metadata"].update(total_size=1))
    (slip,) = open_checkpoint(two).slips
    assert "total_size is 1" in str(slip)


@pytest.mark.parametrize("part", [ONE, TWO])
def test_a_missing_part_without_an_index(two: Path, part: str) -> None:
    """The names say how many parts there are."""
    (two / INDEX).unlink()
    (two / part).unlink()
    refused(two, IndexMismatchError, f"the part {part} does not exist", "all of the 2 parts")


def test_every_missing_part_is_listed(two: Path) -> None:
    """Of five parts with one there, four are missing."""
    (two / INDEX).unlink()
    (two / TWO).unlink()
    (two / ONE).rename(two / "model-00003-of-00005.safetensors")
    missing = [defect for defect in survey(two).defects if isinstance(defect, IndexMismatchError)]
    assert [f"{i:05d}-of-00005" in str(defect) for i, defect in zip((1, 2, 4, 5), missing, strict=True)] == [True] * 4


@pytest.mark.parametrize("index", [True, False])
def test_a_name_in_two_files(two: Path, index: bool) -> None:
    """Neither is chosen, by an index neither."""
    if not index:
        (two / INDEX).unlink()
    write_safetensors(two / TWO, PER_TENSOR.tensors)
    twice = {defect.tensor for defect in survey(two).defects if isinstance(defect, HeaderError)}
    assert twice == set(list(PER_TENSOR.tensors)[0::2])
    with pytest.raises(HeaderError, match="it is also in"):
        open_checkpoint(two)


# Damage and configuration.


def test_a_truncated_file(two: Path) -> None:
    """A file cut anywhere is refused when it is opened."""
    whole = (two / ONE).read_bytes()
    for size in (0, 5, 8, 100, len(whole) - 1):
        (two / ONE).write_bytes(whole[:size])
        assert refused(two, TruncatedFileError, count=None).file == ONE


def test_a_file_that_is_a_directory(two: Path) -> None:
    (two / ONE).unlink()
    (two / ONE).mkdir()
    with pytest.raises(Fp8CheckpointError):
        open_checkpoint(two)


@pytest.mark.parametrize("stated", [[{"weight_block_size": [128, 128]}], "fp8", 8, True])
@pytest.mark.parametrize(
    ("file", "key"), [("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")]
)
def test_quantization_that_is_no_object(tmp_path: Path, file: str, key: str, stated: object) -> None:
    """What is stated of quantization is an object, or it is the one defect: no scale is blamed for it."""
    source = BLOCK.write(tmp_path / "checkpoint")
    (source / file).write_text(json.dumps({key: stated}))
    error = refused(source, ConfigError, "its quantization configuration is")
    assert (error.file, error.expected) == (file, "an object")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@examples(150)
@given(
    quantization=st.dictionaries(
        st.sampled_from(["weight_block_size", "config_groups", "quant_algo", "quantization"]), _json
    ),
    nested=st.booleans(),
)
def test_fuzz_of_the_configuration(two: Path, quantization: dict[str, Any], nested: bool) -> None:
    """Whatever the configuration says, it is understood or refused by name."""
    if isinstance(quantization.get("config_groups"), dict):
        quantization["config_groups"]["g"] = {
            "weights": {"group_size": quantization.get("quant_algo"), "block_structure": None}
        }
    config: dict[str, Any] = {"quantization_config": quantization}
    (two / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    (two / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization.get("quantization")}))
    for defect in survey(two).defects:
        assert isinstance(defect, ConfigError)


def test_survey_lists_every_defect(tmp_path: Path) -> None:
    """One of each, in one directory: all are listed; the one raised says how many more there are."""
    codes = Stored.codes(np.zeros((4, 4), np.uint8))
    one = Stored.of(np.ones(()), "F32")
    directory = tmp_path / "bad"
    directory.mkdir()
    write_safetensors(directory / "a.safetensors", {
        "missing.weight": codes, "orphan.weight_scale_inv": one, "two.weight": codes, "two.weight_scale": one,
        "two.weight_scale_inv": one, "shape.weight": codes, "shape.weight_scale": Stored.of(np.ones((2, 3)), "F32"),
        "good.weight": codes, "good.weight_scale": one,
        "packed.weight_packed": Stored.of(np.zeros((4, 2)), "I32")})  # fmt: skip
    write_safetensors(directory / "b.safetensors", {"good.weight_scale": one, "unlisted": one})
    weight_map = dict.fromkeys(("missing.weight", "orphan.weight_scale_inv", "two.weight", "two.weight_scale",
        "two.weight_scale_inv", "shape.weight", "shape.weight_scale", "good.weight",
        "packed.weight_packed"), "a.safetensors")  # fmt: skip
    (directory / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "good.weight_scale": "b.safetensors"}}))
    defects = survey(directory).defects
    kinds = {AmbiguousScaleError, HeaderError, IndexMismatchError, MissingScaleError, OrphanScaleError, ScaleShapeError,
             UnsupportedFormatError}  # fmt: skip
    assert {type(defect) for defect in defects} == kinds
    assert len(defects) == len(kinds)
    with pytest.raises(Fp8CheckpointError, match=f"{len(kinds) - 1} more defects"):
        open_checkpoint(directory)


def test_defects_come_in_the_same_order_every_time(two: Path) -> None:
    """The order of defects is that of the files and names, not of a set: two processes report the same first one."""
    edit_json(two / INDEX, lambda index: index["weight_map"].update({f"ghost.{i:03d}": ONE for i in range(40)}))
    found = [defect.tensor for defect in survey(two).defects]
    assert found == sorted(found, key=str)


# Reading.


def test_an_unknown_tensor(two: Path) -> None:
    """Unknown names, and scales, which are no tensors, are an UnknownTensorError."""
    checkpoint = open_checkpoint(two)
    for name in ("absent", "m.q.weight_scale_inv", "m.q.activation_scale", "", "a\nb"):
        with pytest.raises(UnknownTensorError, match="no such tensor") as caught:
            checkpoint.read(name)
        assert isinstance(caught.value, KeyError)
        assert str(caught.value).isprintable()
        with pytest.raises(UnknownTensorError):
            checkpoint[name]


@pytest.mark.parametrize("name", ["m.q.weight", "lm_head.weight"])
@pytest.mark.parametrize(("offsets", "sizes"), [
    ((0,), (1,)),
    ((0, 0, 0), (1, 1, 1)),
    ((), ()),
    ((-1, 0), (1, 1)),
    ((0, 0), (-1, 1)),
    ((0, 0), (1000, 1)),
    ((1000, 0), (0, 0)),
    ((1000, 0), None),
    ((16, 0), (1000, 8)),
    ((0, 0), (1,)),
    (None, (1,)),
    (None, (1000, 1)),
])  # fmt: skip
def test_regions_outside_the_tensor(
    two: Path, name: str, offsets: tuple[int, ...] | None, sizes: tuple[int, ...] | None
) -> None:
    """Wrong ranks, negative numbers and what reaches over an edge are a RegionError that names the tensor."""
    with pytest.raises(RegionError) as caught:
        open_checkpoint(two).read(name, offsets, sizes)
    assert caught.value.tensor == name
    assert isinstance(caught.value, IndexError)


def test_offsets_or_sizes_alone(two: Path) -> None:
    """Offsets alone mean "to the end", sizes alone "from the beginning"; lists and torch sizes will do."""
    checkpoint = open_checkpoint(two)
    for name in ("m.q.weight", "lm_head.weight"):
        whole = checkpoint.read(name)
        assert torch.equal(checkpoint.read(name, (3, 2)), whole[3:, 2:])
        assert torch.equal(checkpoint.read(name, None, (3, 2)), whole[:3, :2])
        assert torch.equal(checkpoint.read(name, [1, 1], torch.Size([2, 2])), whole[1:3, 1:3])  # type: ignore[arg-type]
        assert checkpoint.read(name, (whole.shape[0], 0)).shape == (0, whole.shape[1])


Written = dict[str, tuple[Checkpoint, dict[str, np.ndarray]]]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Every family on disk, opened, with its tensors as the oracle has them (bit patterns)."""
    found = {}
    for i, (name, family) in enumerate(FAMILIES.items()):
        checkpoint = open_checkpoint(family.write(tmp_path_factory.mktemp("families") / str(i)))
        found[name] = (checkpoint, {key: patterns(stored) for key, stored in family.expected().items()})
    return found


@examples(400)
@given(family=st.sampled_from(list(FAMILIES)), buffer=st.sampled_from([1, 7, 100, 4 << 20]), data=st.data())
def test_a_region_equals_the_slice(written: Written, family: str, buffer: int, data: st.DataObject) -> None:
    """A region of any tensor of any family equals the slice of the oracle's, however small the buffer for codes is."""
    checkpoint, expected = written[family]
    name = data.draw(st.sampled_from(list(expected)))
    whole = expected[name]
    offsets = tuple(data.draw(st.integers(0, dim)) for dim in whole.shape)
    sizes = tuple(data.draw(st.integers(0, dim - offset)) for dim, offset in zip(whole.shape, offsets, strict=True))
    if buffer < 100:  # one read a row or so: keep the number of them small
        sizes = tuple(min(size, 6) for size in sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CODES_BUFFER", buffer)
        region = checkpoint.read(name, offsets, sizes)
    assert tuple(region.shape) == sizes
    window = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
    assert raw_bytes(region) == np.ascontiguousarray(whole[window]).tobytes()


class CountingStore(LocalStore):
    """Counts what is read."""

    bytes = calls = 0

    def read(self, wanted: Sequence[ByteRange], out: Sequence[Bytes]) -> None:
        super().read(wanted, out)
        self.bytes += sum(part.stop - part.start for part in wanted)
        self.calls += 1


@pytest.mark.parametrize("name", ["per-tensor 0-d BF16", "block 128 ragged F32", "experts in blocks", "MXFP8 U8"])
@pytest.mark.parametrize("part", ["all", "rows", "columns", "point", "nothing"])
def test_a_region_reads_its_own_bytes_only(written: Written, name: str, part: str) -> None:
    """Codes of the region, plus the scales: not one byte more, and each in one read."""
    checkpoint, _ = written[name]
    counted = CountingStore(checkpoint.path)
    checkpoint = open_checkpoint(counted)
    opened = counted.bytes, counted.calls
    (tensor,) = checkpoint.quantized
    shape = tensor.shape
    rank = len(shape)
    offsets, sizes = {
        "all": ((0,) * rank, shape),
        "rows": ((0,) * (rank - 2) + (3, 0), (1,) * (rank - 2) + (7, shape[-1])),
        "columns": ((0,) * (rank - 1) + (5,), (*shape[:-1], 9)),
        "point": ((1,) * rank, (1,) * rank),
        "nothing": ((1,) * rank, (0,) * rank),
    }[part]
    checkpoint.read(tensor.name, offsets, sizes)
    count = int(np.prod(sizes))
    assert counted.bytes - opened[0] == (count + tensor.scale.nbytes if count else 0)
    assert counted.calls - opened[1] == (2 if count else 0)
    opened = counted.bytes, counted.calls
    checkpoint.read("lm_head.weight", (2, 3), (5, 4))
    assert (counted.bytes - opened[0], counted.calls - opened[1]) == (5 * 4 * 2, 1)


def test_opening_reads_no_data(two: Path) -> None:
    """Headers, index and configuration only."""
    counted = CountingStore(two)
    checkpoint = open_checkpoint(counted)
    heads = sum(8 + len(header.text) for header in checkpoint.files)
    assert counted.bytes == heads + sum((two / name).stat().st_size for name in ("config.json", INDEX))


def test_short_reads_are_continued(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that gives a few bytes at a time changes nothing."""
    checkpoint = open_checkpoint(two)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:3]], offset))
    check_reads(checkpoint, PER_TENSOR.expected())


def test_a_read_error_is_named(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error is a StorageError with the system's reason."""
    checkpoint = open_checkpoint(two)

    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        checkpoint.read("lm_head.weight")


def test_files_that_change_after_opening(two: Path) -> None:
    """A file cut short later, or removed, is not what was opened."""
    checkpoint = open_checkpoint(two)
    tensor = checkpoint["lm_head.weight"]
    assert isinstance(tensor, TensorSpan)
    os.truncate(two / tensor.file.name, tensor.start + 3)
    with pytest.raises(SourceChangedError, match="it changed after it was opened"):
        checkpoint.read("lm_head.weight")
    (two / tensor.file.name).unlink()
    with pytest.raises(SourceChangedError):
        checkpoint.read("lm_head.weight")


_BAD_SCALES = {
    "F32": {"NaN": 0x7FC00000, "-NaN": 0xFFC00001, "inf": 0x7F800000, "-inf": 0xFF800000, "0": 0, "-0": 1 << 31,
        "-1": 0xBF800000},
    "BF16": {"NaN": 0x7FC0, "-NaN": 0xFF81, "inf": 0x7F80, "-inf": 0xFF80, "0": 0, "-0": 1 << 15, "-1": 0xBF80},
    "F16": {"NaN": 0x7E00, "-NaN": 0xFC01, "inf": 0x7C00, "-inf": 0xFC00, "0": 0, "-0": 1 << 15, "-1": 0xBC00},
    "U8": {"NaN": 255},
    "F8_E8M0": {"NaN": 255},
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "kind"), [(dtype, kind) for dtype, kinds in _BAD_SCALES.items() for kind in kinds])
@pytest.mark.parametrize("grid", ["one", "rows"])
def test_scales_that_cannot_be_scales(tmp_path: Path, dtype: str, kind: str, grid: str) -> None:
    """NaN, infinite, zero and negative scales of each dtype are refused by a read, with their place among others."""
    numpy_dtype = {1: np.uint8, 2: np.uint16, 4: np.uint32}[DTYPE_BITS[dtype] // 8]
    one = {"F32": 0x3F800000, "BF16": 0x3F80, "F16": 0x3C00}.get(dtype, 127)
    shape: tuple[int, ...] = () if grid == "one" else (6, 1)
    scales = np.full(shape, one, numpy_dtype)
    scales[() if grid == "one" else (4, 0)] = _BAD_SCALES[dtype][kind]
    codes, scale = Stored.codes(np.full((6, 8), 0x38, np.uint8)), Stored(dtype, shape, scales.tobytes())
    write_safetensors(tmp_path / "model.safetensors", {"w.weight": codes, "w.weight_scale": scale})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(ScaleValueError) as caught:
        checkpoint.read("w.weight", (0, 0), (1, 1))  # the bad one need not lie in the region
    error = caught.value
    assert (error.tensor, error.file) == ("w.weight_scale", "model.safetensors")
    assert error.expected == "finite and positive scales"
    assert f"1 of {scales.size} scales" in error.found
    assert grid != "rows" or "at (4, 0)" in error.found
    found = reading.scale_defects(checkpoint.quantized)
    assert [str(defect) for defect in found] == [str(caught.value)]


def test_all_bad_scales_are_found(tmp_path: Path) -> None:
    """`scale_defects` lists every tensor's, activation scales and scales in other files included, and no sound one."""
    tensors: dict[str, Stored] = {}
    bad = set()
    for i in range(60):
        tensors[f"l{i}.weight"] = Stored.codes(np.full((4, 4), 0x38, np.uint8))
        for end, every in (("weight_scale", 7), ("input_scale", 11)):
            value = np.float32(np.nan if i % every == 3 else 0.5)
            tensors[f"l{i}.{end}"] = Stored.of(value, "F32" if i % 2 else "BF16")
            if i % every == 3:
                bad.add(f"l{i}.{end}")
    names = sorted(tensors, key=lambda name: (name.split(".")[1], name))  # scales side by side
    write_safetensors(tmp_path / "a.safetensors", {name: tensors[name] for name in names[::2]})
    write_safetensors(tmp_path / "b.safetensors", {name: tensors[name] for name in names[1::2]})
    checkpoint = open_checkpoint(tmp_path)
    defects = reading.scale_defects(checkpoint.quantized)
    assert all(isinstance(defect, ScaleValueError) for defect in defects)
    assert sorted(defect.tensor or "" for defect in defects) == sorted(bad)


WHOLE_BYTES = sorted(dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0 and dtype not in FP8_DTYPES)


@pytest.mark.parametrize("dtype", WHOLE_BYTES)
def test_plain_tensors_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    """What is not FP8 keeps its dtype and its bytes: 0-d, empty and three-dimensional; what is, without elements."""
    rng = np.random.default_rng(1)
    tensors = {}
    for name, shape in (("scalar", ()), ("empty", (0, 3)), ("cube", (2, 3, 5))):
        size = tensor_nbytes(dtype, shape)
        tensors[name] = Stored(dtype, shape, rng.integers(0, 2 if dtype == "BOOL" else 256, size, np.uint8).tobytes())
    fp8 = {"w.weight": Stored.codes(np.zeros((0, 4), np.uint8)), "w.weight_scale": Stored.of(np.float32(1), "F32")}
    write_safetensors(tmp_path / "model.safetensors", tensors | fp8)
    checkpoint = open_checkpoint(tmp_path)
    check_reads(checkpoint, tensors | {"w.weight": Stored("BF16", (0, 4), b"")})
    part = checkpoint.read("cube", (1, 1, 2), (1, 2, 2))
    assert raw_bytes(part) == np.ascontiguousarray(patterns(tensors["cube"])[1:2, 1:3, 2:4]).tobytes()


@pytest.mark.parametrize("name", ["per-tensor 0-d BF16", "block 128 ragged F32"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_other_targets(tmp_path: Path, name: str, dtype: str) -> None:
    """The reading room dequantizes to each target, through buffers of any size, into any strides."""
    family = FAMILIES[name]
    checkpoint = open_checkpoint(family.write(tmp_path / "checkpoint"))
    (tensor,) = checkpoint.quantized
    assert isinstance(tensor, QuantizedTensor)
    expected = family.expected(dtype)[tensor.name]
    out = np.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]), np.uint32 if dtype == "F32" else np.uint16)
    reader = Reader(1000, reading.load_dequantizer)
    tensor.values(reading.checked_region(tensor, None, None), dtype, out[..., ::2], reader)
    assert reader.bytes_read == tensor.numel
    assert np.ascontiguousarray(out[..., ::2]).tobytes() == expected.data
    assert not out[..., 1::2].any()


@pytest.mark.parametrize("name", ["per-tensor 0-d BF16", "block 128 ragged F32", "experts [E,1,1]", "MXFP8 U8"])
def test_a_run_of_elements_equals_the_slice(name: str, written: Any) -> None:
    """A run in row-major order, from anywhere to anywhere, is the oracle's, whatever the tensor is."""
    checkpoint, expected = written[name]
    rng = np.random.default_rng(3)
    for key, values in expected.items():
        tensor = checkpoint[key]
        reader = Reader(50, reading.load_dequantizer, counting=True)
        for start, stop in np.sort(rng.integers(0, values.size + 1, (10, 2)), axis=1).tolist():
            out = np.empty((stop - start) * values.itemsize, np.uint8)
            tensor.elements(start, tensor.dtype, out, reader)
            assert out.tobytes() == values.reshape(-1)[start:stop].tobytes()
        assert not reader.nonfinite


def test_codes_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    """By whichever way they are read, each once."""
    codes = np.array([[0x7F, 0x38], [0xFF, 0x00]], np.uint8)
    write_safetensors(tmp_path / "model.safetensors", {
        "a.weight": Stored.codes(codes), "a.weight_scale": Stored.of(np.array(1, np.float32), "F32"),
    })  # fmt: skip
    tensor = open_checkpoint(tmp_path)["a.weight"]
    whole = (0, 0), (2, 2)
    reader = Reader(3, reading.load_dequantizer, counting=True)
    tensor.values(whole, "BF16", np.empty((2, 2), np.uint16), reader)
    assert reader.nonfinite == {"a.weight": 2}
    tensor.elements(1, "BF16", np.empty(6, np.uint8), reader)
    assert reader.nonfinite == {"a.weight": 3}
    assert [(part.start, part.stop) for part in tensor.reads(whole)] == [(tensor.span.start, tensor.span.stop)]
    assert [part.stop - part.start for part in tensor.reads(((0, 1), (2, 1)))] == [1, 1]


# What is no part of the model.


@pytest.mark.parametrize("with_index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors", "optimizer.safetensors",
     "optimizer-00003-of-00004.safetensors", "training_state.safetensors"],
)  # fmt: skip
def test_a_file_of_a_trainer_is_no_part_of_the_model(two: Path, name: str, with_index: bool, tmp_path: Path) -> None:
    """It is a side file: not read, whatever is in it, and copied by a conversion."""
    if not with_index:
        (two / INDEX).unlink()
    (two / name).write_bytes(b"whatever")
    checkpoint = open_checkpoint(two)
    check_reads(checkpoint, PER_TENSOR.expected())
    assert checkpoint.beside == (name,)
    assert side_files(checkpoint)[name] == local_file(two / name)
    convert(two, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"whatever"


def test_an_adapter_that_the_index_names_and_one_alone(two: Path, tmp_path: Path) -> None:
    """What the index names is read; and a directory of nothing but an adapter is what it is."""
    (two / TWO).rename(two / "adapter_two.safetensors")
    edit_json(two / INDEX, lambda index: index["weight_map"].update(
        {name: "adapter_two.safetensors" for name, file in index["weight_map"].items() if file == TWO}
    ))  # fmt: skip
    check_reads(open_checkpoint(two), PER_TENSOR.expected())
    (tmp_path / "alone").mkdir()
    write_safetensors(tmp_path / "alone/adapter_model.safetensors", {"a": Stored.of(np.ones(3, np.float32), "BF16")})
    assert list(open_checkpoint(tmp_path / "alone").tensors) == ["a"]


def test_metadata_of_null(two: Path) -> None:
    """``"__metadata__": null`` is what the reference library reads as absent."""
    whole = (two / ONE).read_bytes()
    stop = 8 + int.from_bytes(whole[:8], "little")
    text = json.dumps({**json.loads(whole[8:stop]), "__metadata__": None}).encode()
    (two / ONE).write_bytes(len(text).to_bytes(8, "little") + text + whole[stop:])
    checkpoint = open_checkpoint(two)
    check_reads(checkpoint, PER_TENSOR.expected())
    assert checkpoint.files[0].metadata == {}


# Following the index.


@pytest.fixture
def sidecar(two: Path) -> Path:
    """A checkpoint with an FP8 layer in a file that its index does not name."""
    codes, scale = PER_TENSOR.tensors[next(iter(PER_TENSOR.blocks))], Stored.of(np.array(0.5, np.float32), "F32")
    write_safetensors(two / "mtp.safetensors", {"mtp.fc.weight": codes, "mtp.fc.weight_scale": scale})
    return two


def test_a_file_beside_the_index_can_be_left_out(sidecar: Path, tmp_path: Path) -> None:
    """Refused, with the option that helps; with it, noted, and copied as it is."""
    defect = refused(sidecar, IndexMismatchError, "mtp.safetensors", "--follow-index", "follow_index=True")
    assert "fetch" not in str(defect)
    checkpoint = open_checkpoint(sidecar, follow_index=True)
    check_reads(checkpoint, PER_TENSOR.expected())
    (note,) = checkpoint.notes
    assert note.startswith("mtp.safetensors: ")
    result = convert(sidecar, tmp_path / "out", follow_index=True)
    assert result.notes == (note,)
    assert (tmp_path / "out/mtp.safetensors").read_bytes() == (sidecar / "mtp.safetensors").read_bytes()
    assert verify(sidecar, tmp_path / "out", follow_index=True).ok
    back = convert(tmp_path / "out", tmp_path / "back", to="fp8", like=sidecar, follow_index=True)
    assert note in back.notes
    assert_same_tree(tmp_path / "back", sidecar)
    assert inspect(sidecar, follow_index=True).notes == (note,)


def test_tensors_beside_the_index_can_be_left_out(two: Path, tmp_path: Path) -> None:
    """A file with more tensors than the index lists: the rest is noted, not read, and kept by the way back."""
    tensors = read_safetensors(two / ONE)
    codes = PER_TENSOR.tensors[next(iter(PER_TENSOR.blocks))]
    more = {"mtp.fc.weight": codes, "mtp.norm.weight": tensors["model.norm.weight"]}
    write_safetensors(two / ONE, {**tensors, **more}, {"format": "pt"})
    refused(two, IndexMismatchError, "mtp.fc.weight", "--follow-index", count=None)
    checkpoint = open_checkpoint(two, follow_index=True)
    check_reads(checkpoint, PER_TENSOR.expected())
    (note,) = checkpoint.notes
    assert ONE in note
    assert "2 tensors" in note
    convert(two, tmp_path / "out", follow_index=True)
    assert read_directory(tmp_path / "out") == PER_TENSOR.expected()
    convert(tmp_path / "out", tmp_path / "back", to="fp8", like=two, follow_index=True)
    assert (tmp_path / "back" / ONE).read_bytes() == (two / ONE).read_bytes()


def test_following_an_index_that_lies(two: Path) -> None:
    """What the index lists must be there, where it says; and without an index there is nothing to follow."""
    edit_json(two / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": ONE, "no.weight": TWO}))
    defects = survey(two, follow_index=True).defects
    assert {defect.tensor for defect in defects} >= {"no.weight"}
    assert all(isinstance(defect, IndexMismatchError) for defect in defects)
    (two / INDEX).unlink()
    check_reads(open_checkpoint(two, follow_index=True), PER_TENSOR.expected())


def test_an_fp8_cache_with_plain_weights(tmp_path: Path) -> None:
    """Sound; a conversion to bfloat16 drops its scales with the configuration that they belong to, and says so. The way
    back brings both, byte for byte.
    """
    family = cache_only()
    source = family.write(tmp_path / "source")
    checkpoint = open_checkpoint(source)
    check_reads(checkpoint, family.expected())
    assert {span.name for span in checkpoint.cache_scales} == set(family.dropped)
    assert verify(source).ok
    result = convert(source, tmp_path / "out")
    assert result.dropped_scales == 2
    assert result.notes == ("2 scales of the key-value cache are left out, with the configuration that they belong to",)
    assert read_directory(tmp_path / "out") == family.expected()
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"dtype": "bfloat16"}
    assert verify(source, tmp_path / "out").ok
    result = convert(tmp_path / "out", tmp_path / "back", to="fp8", like=source)
    assert (result.quantized, result.report.total.elements) == (0, 0)
    assert result.notes == ("the base has no FP8 weights: its 2 scales of the key-value cache are written back",)
    assert_same_tree(tmp_path / "back", source)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool, sample_fp8: Path, tmp_path: Path) -> None:
    """Opening puts it off, one job in another, and also where it refuses."""
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        inspect(sample_fp8)
        assert gc.isenabled() is enabled
        with pytest.raises(CheckpointNotFoundError):
            open_checkpoint(tmp_path)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()

"""Saving as FP8 from any sharding: file for file what `convert --to fp8 --like BASE` writes of the same values; or
nothing at all.
"""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.multiprocessing import ProcessExitedException

import fp8ckpt
from fp8ckpt import (
    Checkpointer,
    FP8StorageWriter,
    convert,
    load_model,
    load_pretrained,
    open_checkpoint,
    sample,
    save_model,
    verify,
)
from fp8ckpt.checkpoint import checkpointing, exchanged, fp8_part, fp8_storage_writer
from fp8ckpt.encodings.results import Fp8Result, QuantizationReport
from fp8ckpt.errors import (
    Fp8CheckpointError,
    ModelMismatchError,
    OutputExistsError,
    RangeError,
    ResumeMismatchError,
    ScaleValueError,
    StorageError,
    UnsupportedFormatError,
    WeightValueError,
)
from fp8ckpt.models.mistral3_vlm.state_dict_adapter import Mistral3FP8StateDictAdapter
from fp8ckpt.sample import Mistral3Sizes
from tests.distributed import UNEVEN, apart, fsdp, mesh, rewrite, run, stage, tied, tp, tp_fsdp
from tests.miniatures import Family
from tests.oracle import Stored, assert_same_tree, read_directory, write_plain
from tests.support import ALL, each, pairs
from tests.test_to_fp8 import E4M3, OTHERS, UE8M0, grown, one, powers_of_two, siblings, trained

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
MODES = ("reuse", "fresh")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """A state dict of a directory of plain tensors."""
    found = {}
    for name, tensor in read_directory(directory).items():
        found[name] = torch.empty(tensor.shape, dtype=TORCH[tensor.dtype])
        if tensor.data:
            found[name] = torch.frombuffer(bytearray(tensor.data), dtype=TORCH[tensor.dtype]).reshape(tensor.shape)
    return found


def stored_bytes(directory: Path) -> int:
    return sum(len(tensor.data) for tensor in read_directory(directory).values())


class Saved(NamedTuple):
    """``bytes_written`` by this rank, and the report of all."""

    bytes_written: int
    report: QuantizationReport | None


def plain_save(state: dict[str, Any], path: Path, base: Path, **how: Any) -> Saved:
    """Through plain ``dcp.save``."""
    writer = FP8StorageWriter(path, like=base, **how)
    dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())
    assert writer.base_bytes_read == sum(tensor.weight.nbytes for tensor in open_checkpoint(base).quantized)
    return Saved(writer.bytes_written, writer.report)


def assert_same_report(found: QuantizationReport | None, expected: QuantizationReport | None) -> None:
    """Every count, maximum and name; mean errors but for the order in which they are added up."""
    assert found is not None
    assert expected is not None
    assert found.carried == expected.carried
    assert len(found.weights) == len(expected.weights) > 0
    for row, other in zip((found.total, *found.weights), (expected.total, *expected.weights), strict=True):
        assert replace(row, mean_error=0.0) == replace(other, mean_error=0.0)
        assert row.mean_error == pytest.approx(other.mean_error, rel=1e-6)


def small_steps(patch: pytest.MonkeyPatch, elements: int) -> None:
    """Make what is worked on at once small, so that more blocks wait, and what the ranks exchange at once."""
    patch.setattr(fp8_part, "_LARGEST_STEP", elements)
    patch.setattr(fp8_part, "_LEAST_STEP", elements)
    patch.setattr(exchanged, "_EXCHANGED", max(1, elements // 16))
    patch.setattr(fp8_part, "_EXCHANGED", 3)


class Case:
    """A base and plain directories of values, with what a conversion makes of each."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root, self.base = root, base
        self.sources: dict[str, Path] = {}
        self.reports: dict[tuple[str, str], QuantizationReport | None] = {}

    def add(self, name: str, source: Path) -> None:
        self.sources[name] = source
        for mode in MODES:
            done = convert(source, self.root / f"{name} {mode}", to="fp8", like=self.base, scales=mode)
            assert isinstance(done, Fp8Result)
            self.reports[name, mode] = done.report

    def expected(self, name: str, mode: str) -> Path:
        return self.root / f"{name} {mode}"


def change(base: Path, plain: Path, destination: Path, dtype: str = "BF16") -> Path:
    """Train a model, roughly: noise everywhere; by turns a weight grows, shrinks, has an outlier, or becomes zero."""
    rng = np.random.default_rng(3)
    tensors = dict(read_directory(plain))
    for i, tensor in enumerate(open_checkpoint(base).quantized):
        values = tensors[tensor.name].array.astype(np.float32).copy()
        flat = values.reshape(-1)
        match i % 6:
            case 0:
                flat *= (1 + 0.02 * rng.standard_normal(flat.size)).astype(np.float32)
            case 1:
                flat[flat.size // 2 :] *= np.float32(1.7)
            case 2:
                flat *= np.float32(0.013)
                flat[::2] *= (1 + 0.02 * rng.standard_normal(flat[::2].size)).astype(np.float32)
            case 3:
                flat[rng.integers(flat.size)] = 1000
            case 4:
                flat[:] = 0
        tensors[tensor.name] = Stored.of(values, dtype)
    return write_plain(destination, tensors)


def with_equal_scales(base: Path, destination: Path) -> Path:
    """The scales of q, k and v, and of gate and up, made equal: what an engine joins has one scale."""

    def equal(tensors: dict[str, Stored]) -> dict[str, Stored]:
        changed = dict(tensors)
        for name in tensors:
            for leaf, of in (("q_proj", "k_proj"), ("v_proj", "k_proj"), ("gate_proj", "up_proj")):
                if name.endswith(f"{leaf}.weight_scale_inv"):
                    changed[name] = tensors[name.replace(leaf, of)]
        return changed

    return rewrite(base, destination, equal)


@pytest.fixture(scope="module")
def models(sample_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Mistral3 bases: the sample, one of uneven sizes in the other layout, and one whose siblings have equal scales."""
    root = tmp_path_factory.mktemp("models")
    bases = {
        "identity": sample_fp8,
        "uneven": sample(root / "uneven", UNEVEN, layout="nested", files=2),
        "equal": with_equal_scales(sample_fp8, root / "equal"),
    }
    found = {}
    for name, base in bases.items():
        case = found[name] = Case(root / f"cases-{name}", base)
        case.root.mkdir()
        convert(base, case.root / "plain")
        case.add("untouched", case.root / "plain")
        case.add("trained", change(base, case.root / "plain", case.root / "changed"))
    return found


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize(("name", "dtype"), each(E4M3, ["BF16", "F32", "F16"]))
def test_every_family_in_one_process(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untouched values give back the base; changed ones what a conversion writes, whatever is worked on at once."""
    family, rng = E4M3[name], np.random.default_rng(sum(name.encode()))
    case = Case(tmp_path, family.write(tmp_path / "fp8"))
    convert(case.base, tmp_path / "plain")
    case.add("untouched", tmp_path / "plain")
    tensors = trained(family, rng, "F32" if dtype == "F16" else dtype)
    if dtype == "F16":
        tensors = {
            key: Stored.of(np.clip(t.array.astype(np.float32), -6e4, 6e4), "F16") if t.dtype == "F32" else t
            for key, t in tensors.items()
        }
    case.add("trained", write_plain(tmp_path / "source", tensors))
    for step, source, mode in pairs((1 << 19, 100), case.sources, MODES):
        small_steps(monkeypatch, step)
        out = tmp_path / f"out {source} {mode} {step}"
        saved = plain_save(tensors_of(case.sources[source]), out, case.base, scales=mode)
        assert saved.bytes_written == stored_bytes(case.base)
        assert_same_tree(out, case.expected(source, mode))
        assert_same_report(saved.report, case.reports[source, mode])
        if (source, mode) == ("untouched", "reuse"):
            assert_same_tree(out, case.base)


@pytest.mark.parametrize("step", [1 << 19, 100])
def test_powers_of_two_in_one_process(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base says ``scale_fmt`` "ue8m0", new scales are powers of two here too, of blocks that wait or not."""
    base = powers_of_two(tmp_path / "fp8", {"quantization_config": UE8M0}, np.random.default_rng(1))
    convert(base, tmp_path / "plain", to="fp32")
    case = Case(tmp_path, base)
    case.add("grown", grown(tmp_path / "plain", tmp_path / "source"))
    small_steps(monkeypatch, step)
    for mode in MODES:
        plain_save(tensors_of(case.sources["grown"]), tmp_path / mode, base, scales=mode)
        assert_same_tree(tmp_path / mode, case.expected("grown", mode))


@pytest.mark.parametrize("name", ["identity", "uneven", "equal"])
def test_a_model_in_one_process(name: str, models: dict[str, Case], tmp_path: Path) -> None:
    """``save_model``: an untouched model is its base again; a trained one what converting its bf16 directory writes."""
    case = models[name]
    model = load_pretrained(case.base)
    done = save_model(model, tmp_path / "out", to="fp8", like=case.base)
    assert_same_tree(tmp_path / "out", case.base)
    assert isinstance(done, Fp8Result)
    assert_same_report(done.report, case.reports["untouched", "reuse"])
    again = convert(case.sources["untouched"], tmp_path / "again", to="fp8", like=case.base)
    different = {"bytes_read", "seconds", "report", "destination", "notes"}
    facts = {name: value for name, value in vars(done).items() if name not in different}
    assert facts == {name: value for name, value in vars(again).items() if name not in different}
    assert done.destination == (tmp_path / "out").absolute()
    assert (done.bytes_read, done.notes) == (0, ())
    done = save_model(model, tmp_path / "uncounted", to="fp8", like=case.base, report=False)
    assert isinstance(done, Fp8Result)
    assert (done.report, done.base_bytes_read, done.quantized) == (None, 0, len(open_checkpoint(case.base).quantized))
    assert verify(case.base, tmp_path / "out").ok
    load_model(model, case.sources["trained"])
    for mode in MODES:
        done = save_model(model, tmp_path / mode, to="fp8", like=open_checkpoint(case.base), scales=mode)
        assert_same_tree(tmp_path / mode, case.expected("trained", mode))
        assert isinstance(done, Fp8Result)
        assert_same_report(done.report, case.reports["trained", mode])
    assert (tmp_path / "reuse").joinpath("config.json").read_bytes() == (case.base / "config.json").read_bytes()


def test_float32_models_adapters_and_strings(models: dict[str, Case], tmp_path: Path) -> None:
    """A float32 model is quantized from its own values; names by the model's adapter; paths may be strings."""
    case = models["uneven"]
    model = load_pretrained(case.base, dtype=torch.float32)
    model.state_dict_adapter = Mistral3FP8StateDictAdapter.from_checkpoint(case.base)
    Checkpointer().save_model(model, str(tmp_path / "out"), to="fp8", like=str(case.base))
    assert_same_tree(tmp_path / "out", case.base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0003)
    save_model(model, tmp_path / "trained", to="fp8", like=case.base)
    save_model(model, tmp_path / "fp32", to="fp32")
    convert(tmp_path / "fp32", tmp_path / "expected", to="fp8", like=case.base)
    assert_same_tree(tmp_path / "trained", tmp_path / "expected")


def test_a_merged_adapter(models: dict[str, Case], tmp_path: Path) -> None:
    """``weight + B @ A`` in place, as merging low-rank adapters does: what the merged model holds is what is saved."""
    case = models["identity"]
    model = load_pretrained(case.base)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and "q_proj" in name:
                rows, cols = parameter.shape
                parameter += (torch.randn(rows, 4) @ torch.randn(4, cols) * 0.01).to(parameter.dtype)
    save_model(model, tmp_path / "bf16", like=case.base)
    convert(tmp_path / "bf16", tmp_path / "expected", to="fp8", like=case.base)
    save_model(model, tmp_path / "out", to="fp8", like=case.base)
    assert_same_tree(tmp_path / "out", tmp_path / "expected")
    changed = {
        name for name, tensor in read_directory(tmp_path / "out").items() if tensor != read_directory(case.base)[name]
    }
    assert changed
    assert all("q_proj" in name for name in changed)


def test_tied_models(models: dict[str, Case], tmp_path: Path) -> None:
    """The head is stored as often as in the base."""
    for head in (None, "equal"):
        base = tied(models["identity"].base, tmp_path / f"fp8-{head}", head)
        save_model(load_pretrained(base), tmp_path / f"out-{head}", to="fp8", like=base)
        assert_same_tree(tmp_path / f"out-{head}", base)


def test_empty_weights_and_strides_of_values(tmp_path: Path) -> None:
    """A weight without elements has its scale; values may be transposed, strided, or parameters."""
    tensors = {
        "e.weight": Stored.codes(np.empty((0, 4), np.uint8)),
        "e.weight_scale": Stored.of(np.float32(3), "F32"),
        "w.weight": Stored.codes(np.arange(24, dtype=np.uint8).reshape(4, 6)),
        "w.weight_scale": Stored.of(np.full((4, 1), 0.5), "F32"),
        "v.weight": Stored.codes(np.arange(5, dtype=np.uint8)),
        "v.weight_scale": Stored.of(np.float32(2), "F32"),
        "n": Stored.of(np.arange(6).reshape(2, 3), "I64"),
        "x": Stored.of(np.empty((0, 3)), "BF16"),
    }
    base = Family(tensors, {}, {}).write(tmp_path / "fp8")
    convert(base, tmp_path / "plain")
    state = tensors_of(tmp_path / "plain")
    state["w.weight"] = state["w.weight"].T.contiguous().T
    state["v.weight"] = state["v.weight"].repeat_interleave(2)[::2]
    state["n"] = nn.Parameter(state["n"], requires_grad=False)
    for mode in MODES:
        expected = convert(tmp_path / "plain", tmp_path / f"expected {mode}", to="fp8", like=base, scales=mode)
        saved = plain_save(state, tmp_path / mode, base, scales=mode)
        assert_same_tree(tmp_path / mode, tmp_path / f"expected {mode}")
        assert isinstance(expected, Fp8Result)
        assert_same_report(saved.report, expected.report)


def test_plain_tensors_are_cast_as_a_conversion_casts_them(tmp_path: Path) -> None:
    """Where the base is not quantized its dtype is kept, nearest even, NaN and all; what overflows is refused."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((300, 7)) * np.exp2(rng.integers(-20, 12, (300, 7)))).astype(np.float32)
    values[0, :3] = [np.nan, -np.nan, np.inf]
    weight = {
        "w.weight": Stored.codes(np.full((2, 2), 0x38, np.uint8)),
        "w.weight_scale": Stored.of(np.float32(1), "F32"),
    }
    with np.errstate(all="ignore"):
        plain = {dtype: Stored.of(values, dtype) for dtype in ("BF16", "F16", "F32")}
        base = Family({**weight, **plain}, {}, {}).write(tmp_path / "fp8")
        for dtype in ("BF16", "F16", "F32"):
            given = {
                "w.weight": Stored.of(np.ones((2, 2)), dtype),
                **{name: Stored.of(values, dtype) for name in plain},
            }
            source = write_plain(tmp_path / dtype, given)
            convert(source, tmp_path / f"expected {dtype}", to="fp8", like=base)
            plain_save(tensors_of(source), tmp_path / f"out {dtype}", base)
            assert_same_tree(tmp_path / f"out {dtype}", tmp_path / f"expected {dtype}")
    state = {**tensors_of(tmp_path / "F32"), "F16": torch.full((300, 7), 7e4)}
    refused(RangeError, "F16 in .*finite F32 values .*do not fit F16", lambda: plain_save(state, tmp_path / "no", base))
    assert not list(tmp_path.glob("no*"))


# ---------------------------------------------------------------- ranks


def sharded(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """A state dict as DTensors of all ranks: by rows, columns, or both; what has no such dimension is replicated."""
    if kind == "both":
        over, wanted = mesh(2, 2, names=("a", "b")), [Shard(0), Shard(1)]
    else:
        over, wanted = mesh(), [{"rows": Shard(0), "columns": Shard(1), "last": Shard(2)}[kind]]
    found = {}
    for name, tensor in state.items():
        placements = [place if place.dim < tensor.dim() else Replicate() for place in wanted]
        found[name] = distribute_tensor(tensor, over, placements, src_data_rank=None)
    return found


Save = tuple[str, tuple[str, str], str]  # the name of a case, its source and the mode, how it is sharded
WAYS = tuple(itertools.product(("untouched", "trained"), MODES))


def _plain_on_ranks(cases: dict[str, Case], saves: list[Save], root: Path, step: int | None) -> list[Saved]:
    with pytest.MonkeyPatch.context() as patch:
        if step is not None:
            small_steps(patch, step)
        saved = []
        for i, (name, (source, mode), kind) in enumerate(saves):
            state = sharded(tensors_of(cases[name].sources[source]), kind)
            saved.append(plain_save(state, root / str(i), cases[name].base, scales=mode))
        return saved


def check_plain(cases: dict[str, Case], saves: list[Save], ranks: int, root: Path, step: int | None = None) -> None:
    """Each byte is written once over all ranks, and each directory is the one that a conversion writes."""
    written = run(ranks, _plain_on_ranks, cases, saves, root, step)
    for i, (name, (source, mode), kind) in enumerate(saves):
        case, told = cases[name], (name, source, mode, kind)
        assert_same_tree(root / str(i), case.expected(source, mode))
        assert sum(saved[i].bytes_written for saved in written) == stored_bytes(case.base), told
        for saved in written:
            assert_same_report(saved[i].report, case.reports[source, mode])


GRIDS = (
    "per-tensor 0-d BF16", "per-channel [o]", "per-channel wide", "block 128 ragged F32", "block 128 ragged F8_E8M0",
    "experts [E,1,1]", "experts in blocks", "experts fbgemm", "ModelOpt 4-D", "ModelOpt FP8", "MXFP8 U8",
    "small blocks F32", "Mistral native",
)  # fmt: skip
PLACES = ((2, "rows"), (2, "columns"), (3, "rows"), (3, "columns"), (4, "both"))
ON_RANKS = pairs(GRIDS, WAYS, PLACES)


@pytest.fixture(scope="module")
def families_trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """A family of each kind of grid, untouched and trained."""
    found = {}
    for name in GRIDS:
        root = tmp_path_factory.mktemp("family")
        family, rng = E4M3[name], np.random.default_rng(sum(name.encode()))
        case = found[name] = Case(root, family.write(root / "fp8"))
        convert(case.base, root / "plain")
        case.add("untouched", root / "plain")
        case.add("trained", write_plain(root / "source", trained(family, rng, "BF16")))
        assert_same_tree(case.expected("untouched", "reuse"), case.base)
    return found


@pytest.mark.parametrize(("ranks", "step"), [(2, None), (3, 500), (4, 1000)])
def test_every_kind_of_grid_on_ranks(
    ranks: int, step: int | None, families_trained: dict[str, Case], tmp_path: Path
) -> None:
    """Plain ``dcp.save`` of DTensors whose shards cut blocks wherever they like."""
    saves = [(name, way, kind) for name, way, (where, kind) in ON_RANKS if where == ranks]
    check_plain(families_trained, saves, ranks, tmp_path, step)


@pytest.mark.parametrize("ranks", [3, 4])
def test_deepseek_on_ranks(ranks: int, sample_block: Path, tmp_path: Path) -> None:
    """128 x 128 blocks with ragged edges, in several files."""
    saves = [("deepseek", way, kind) for way, (where, kind) in each(WAYS, PLACES[2:]) if where == ranks]
    (tmp_path / "case").mkdir()
    case = Case(tmp_path / "case", sample_block)
    convert(sample_block, case.root / "plain")
    case.add("untouched", case.root / "plain")
    case.add("trained", change(sample_block, case.root / "plain", case.root / "changed"))
    check_plain({"deepseek": case}, saves, ranks, tmp_path)


def test_siblings_on_ranks(tmp_path: Path) -> None:
    """One of q, k and v grows on one rank's shard: those that shared its scale share the new one, wherever they lie."""
    cases = {}
    for i, (scales, factor) in enumerate([([0.5, 0.5, 0.5], 1.5), ([0.5, 0.25, 0.5], 1.5), ([0.5, 0.5, 0.5], 0.0131)]):
        root = tmp_path / f"case-{i}"
        root.mkdir()
        family = siblings(scales)
        case = cases[f"siblings {i}"] = Case(root, family.write(root / "fp8"))
        tensors = {name: tensor.array.astype(np.float32) for name, tensor in family.expected().items()}
        small = {name: Stored.of(values * np.float32(0.0131), "BF16") for name, values in tensors.items()}
        tensors["a.v_proj.weight"] = tensors["a.v_proj.weight"] * np.float32(factor)
        grown = {name: Stored.of(values, "BF16") for name, values in tensors.items()}
        case.add("trained", write_plain(root / "source", grown))
        case.add("all small", write_plain(root / "small", small))
    saves = list(itertools.product(cases, itertools.product(("trained", "all small"), MODES), ("rows", "columns")))
    check_plain(cases, saves, 2, tmp_path, 10)


class Counting(FP8StorageWriter):
    made: list[Counting] = []  # noqa: RUF012  # of this process

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.made.append(self)


def _models_on_ranks(models: dict[str, Case], root: Path) -> dict[str, Saved]:
    """Save every model from every sharding."""
    checkpointing.FP8StorageWriter = Counting  # type: ignore[misc]
    size, rank, flat, written = dist.get_world_size(), dist.get_rank(), mesh(), {}
    shardings: dict[str, Callable[[nn.Module], nn.Module]] = {
        "fsdp": lambda m: fsdp(m, flat),
        "tp": lambda m: tp(m, flat),
        "pp": lambda m: stage(m, rank, size),
    }
    if size == 4:
        both, stages = mesh(2, 2, names=("dp", "tp")), mesh(2, 2, names=("pp", "dp"))
        shardings = {
            "tp and fsdp": lambda m: tp_fsdp(m, both),
            "pp and fsdp": lambda m: fsdp(stage(m, stages.get_local_rank("pp"), 2), stages["dp"]),
        }
    for name, (source, mode), (ranks, kind) in MODELS_ON_RANKS:
        if ranks == size:
            case, parallelize = models[name], shardings[kind]
            early = None if "pp" in kind else parallelize
            model = load_pretrained(case.base, parallelize=early)
            model = model if early else parallelize(model)
            load_model(model, case.sources[source], partial="pp" in kind)
            out = f"{name}, {source}, {mode}, {kind}"
            done = save_model(model, root / out, to="fp8", like=case.base, scales=mode)
            assert isinstance(done, Fp8Result)
            written[out] = Saved(Counting.made.pop().bytes_written, done.report)
    return written


MODELS_ON_RANKS = pairs(
    ("identity", "uneven", "equal"),
    (("untouched", "reuse"), ("trained", "reuse"), ("trained", "fresh")),
    (*itertools.product((1, 2, 3), ("fsdp", "tp")), (2, "pp"), (4, "tp and fsdp"), (4, "pp and fsdp")),
)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_sharding(ranks: int, models: dict[str, Case], tmp_path: Path) -> None:
    """From FSDP2, TP, pipelines and 2-D meshes: what `convert` writes, each byte once over all ranks."""
    written = run(ranks, _models_on_ranks, models, tmp_path)
    assert len(written[0]) == sum(where == ranks for _, _, (where, _) in MODELS_ON_RANKS) >= 6
    for out in written[0]:
        name, source, mode, _ = out.split(", ")
        assert_same_tree(
            tmp_path / out, models[name].expected(source, mode) if source == "trained" else models[name].base
        )
        assert sum(saved[out].bytes_written for saved in written) == stored_bytes(models[name].base), out
        for saved in written:
            assert_same_report(saved[out].report, models[name].reports[source, mode])
    assert all(saved[out].bytes_written for saved in written for out in saved if "fsdp" in out)


def _from_a_subgroup(case: Case, root: Path) -> str:
    """Ranks 1 and 2 of three save together; then with a writer that was not given their group."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return ""
    state = {
        name: tensor.clone() for name, tensor in tensors_of(case.sources["trained"]).items()
    }  # whole on both: each tensor is written by one of them
    writer = FP8StorageWriter(root / "out", like=case.base, process_group=group)
    dcp.save(state, storage_writer=writer, process_group=group)
    try:
        dcp.save(state, storage_writer=FP8StorageWriter(root / "other", like=case.base), process_group=group)
    except CheckpointException as error:
        return str(error)
    return "nothing was raised"


def test_a_subgroup_saves(models: dict[str, Case], tmp_path: Path) -> None:
    """By the writer's ``process_group``, which must be the one of the save."""
    told = run(3, _from_a_subgroup, models["equal"], tmp_path)
    assert_same_tree(tmp_path / "out", models["equal"].expected("trained", "reuse"))
    assert all("give FP8StorageWriter the process_group that dcp.save gets" in text for text in told[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["per-tensor 0-d BF16", "block 128 ragged F32", "MXFP8 U8"])
def test_values_on_a_device(name: str, families_trained: dict[str, Case], tmp_path: Path) -> None:
    """They stay there until a piece of them is worked on."""
    case = families_trained[name]
    state = {key: tensor.cuda() for key, tensor in tensors_of(case.sources["trained"]).items()}
    plain_save(state, tmp_path / "out", case.base)
    assert_same_tree(tmp_path / "out", case.expected("trained", "reuse"))


# ---------------------------------------------------------------- refusals


def refused(kind: type[Fp8CheckpointError], match: str, save: Callable[[], Any]) -> None:
    """The error, out of what DCP wraps it in."""
    with pytest.raises(kind, match=match), checkpointing._named_errors():
        save()


def _nonfinite_on_ranks(cases: dict[str, Case], root: Path) -> list[str]:
    told = []
    for name, case in cases.items():
        weight = next(iter(E4M3[name].blocks))
        for kind in ("rows", "columns"):
            state = tensors_of(case.sources["trained"])
            flat = state[weight].reshape(-1)
            flat[-3:] = torch.tensor([torch.nan, torch.inf, -torch.inf])  # on the last rank
            flat[0] = torch.nan if kind == "columns" else 1.0  # and on the first
            if kind == "rows":
                flat[1] = 1.0
            try:
                plain_save(sharded(state, kind), root / "out", case.base)
            except CheckpointException as error:
                told.append("; ".join(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()))
            dist.barrier()
    return told


def test_nonfinite_weights_are_refused_on_every_rank(families_trained: dict[str, Case], tmp_path: Path) -> None:
    """By name, with the count over all ranks, where blocks wait and where they do not; and nothing is left behind."""
    names = ("per-tensor 0-d BF16", "block 128 ragged F32", "MXFP8 U8", "per-channel [o]")
    for told in run(2, _nonfinite_on_ranks, {name: families_trained[name] for name in names}, tmp_path):
        assert len(told) == 2 * len(names)
        for i, text in enumerate(told):
            weight = next(iter(E4M3[names[i // 2]].blocks))
            numel = np.prod(E4M3[names[i // 2]].tensors[weight].shape)
            said = f"WeightValueError: {weight}: {3 + i % 2} of {numel} elements are NaN or infinite"
            assert text.count(said) == 2, text
    assert list(tmp_path.iterdir()) == []


def test_nonfinite_weights_of_a_model_are_refused(models: dict[str, Case], tmp_path: Path) -> None:
    """By its own name through ``save_model``; the same call succeeds when the value is gone."""
    case = models["identity"]
    model = load_pretrained(case.base)
    weight = model.model.language_model.layers[1].mlp.down_proj.weight
    good = weight.detach()[3, 4].clone()
    with torch.no_grad():
        weight[3, 4] = torch.nan
    with pytest.raises(WeightValueError, match=r"layers\.1\.mlp\.down_proj\.weight: 1 of "):
        save_model(model, tmp_path / "out", to="fp8", like=case.base)
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        weight[3, 4] = good
    save_model(model, tmp_path / "out", to="fp8", like=case.base)
    assert_same_tree(tmp_path / "out", case.base)


def test_bases_and_models_that_do_not_fit_are_refused(models: dict[str, Case], tmp_path: Path) -> None:
    """What does not fit is refused by name, and nothing is written."""
    family = E4M3["per-tensor 0-d BF16"]
    base = family.write(tmp_path / "fp8")
    convert(base, tmp_path / "plain")
    out = tmp_path / "out"
    good = tensors_of(tmp_path / "plain")
    tensors = {**family.tensors, "m.q.weight_scale_inv": Stored.of(np.float32(-1), "BF16")}
    bad = Family(tensors, family.config, family.blocks).write(tmp_path / "bad")
    plain, q, fewer = tmp_path / "plain", good["m.q.weight"], {**good}
    del fewer["lm_head.weight"]
    rows: list[tuple[type[Fp8CheckpointError], str, dict[str, Any], Path, Path]] = [
        (UnsupportedFormatError, "none of its tensors is quantized", good, out, plain),
        (ScaleValueError, r"m\.q\.weight_scale_inv", good, out, bad),
        (ModelMismatchError, r"lm_head\.weight, in the base", fewer, out, base),
        (ModelMismatchError, "extra, in the model", {**good, "extra": torch.ones(2)}, out, base),
        (ModelMismatchError, r"m\.q\.weight: shape \(24, 40\).*\(40, 24\)", {**good, "m.q.weight": q.T}, out, base),
        (UnsupportedFormatError, r"m\.q\.weight: a weight of dtype F64", {**good, "m.q.weight": q.double()}, out, base),
        (ModelMismatchError, r"model\.norm\.weight: dtype I64.*BF16",
         {**good, "model.norm.weight": good["model.norm.weight"].long()}, out, base),
        (UnsupportedFormatError, "step: it is not a tensor", {**good, "step": 3}, out, base),
        (OutputExistsError, "inside the base", good, base / "out", base),
        (OutputExistsError, "destination exists", good, plain, base),
    ]  # fmt: skip
    for name, other in OTHERS.items():
        directory = other.write(tmp_path / f"other {name}")
        convert(directory, tmp_path / f"plain {name}")
        state = tensors_of(tmp_path / f"plain {name}")
        rows.append((UnsupportedFormatError, "codes in the base; expected F8_E4M3", state, out, directory))
    for kind, said, state, to, of in rows:
        refused(kind, said, partial(plain_save, state, to, of))
    assert not list(tmp_path.glob("out*"))
    assert not list(base.glob("out*"))


def test_a_scale_beyond_its_dtype_is_refused(tmp_path: Path) -> None:
    """Values that a float16 scale cannot reach."""
    base = Family(one(dtype="F16"), {}, {}).write(tmp_path / "fp8")
    state = {"w.weight": torch.full((2, 2), 1e9)}
    refused(RangeError, r"^w\.weight in .*range of F16", lambda: plain_save(state, tmp_path / "out", base))
    assert [file.name for file in tmp_path.iterdir()] == ["fp8"]


@pytest.mark.parametrize(("how", "match"), [
    ({"to": "fp8"}, "needs like.*--scheme"),
    ({"to": "fp8", "base": "x", "scales": "some"}, "expected one of reuse, fresh"),
    ({"to": "bf16", "scales": "fresh"}, "goes with to='fp8'"),
    ({"to": "int8"}, "expected one of bf16, fp16, fp32, fp8"),
])  # fmt: skip
def test_arguments_that_do_not_go_together(how: dict[str, str], match: str, tmp_path: Path) -> None:
    """A `ValueError` that says which do."""
    with pytest.raises(ValueError, match=match):
        save_model(nn.Linear(2, 2), tmp_path / "out", **how)
    with pytest.raises(ValueError, match="expected one of reuse, fresh"):
        FP8StorageWriter(tmp_path / "out", like=tmp_path, scales="some")


def _full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_on_one_rank(case: Case, root: Path) -> list[str]:
    """The disk of rank 1 is full, for one save; another rank has another model. What this rank was told."""
    rank, told = dist.get_rank(), []
    model: Any = load_pretrained(case.base, parallelize=lambda m: fsdp(m, mesh()))

    def attempt(name: str) -> None:
        try:
            save_model(model, root / name, to="fp8", like=case.base)
        except BaseException as error:  # torch's CheckpointException is no Exception: it would end the rank in silence
            told.append(f"{type(error).__name__}: {error}")
        else:
            told.append("nothing was raised")
        dist.barrier()

    for method in ("pwrite", "fdatasync"):
        true = getattr(os, method)
        if rank == 1:
            setattr(os, method, _full)
        attempt("out")
        setattr(os, method, true)
    attempt("out")
    if rank == 1:
        model.extra = nn.Linear(2, 2, bias=False)
    attempt("other")
    return told


def test_refusals_reach_every_rank(models: dict[str, Case], tmp_path: Path) -> None:
    """A full disk of one rank, a tensor that only one has: all ranks raise the same, and go on together."""
    for told in run(2, _full_on_one_rank, models["identity"], tmp_path):
        assert told[0].startswith("StorageError: ")
        assert told[1].startswith("StorageError: ")
        assert told[2] == "nothing was raised"
        assert told[3].startswith("ModelMismatchError: ")
    assert_same_tree(tmp_path / "out", models["identity"].base)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------- killed


def _die_while_saving(base: Path, destination: Path) -> None:
    write, left = os.pwrite, [40]

    def write_or_die(*arguments: Any) -> int:
        left[0] -= 1
        if not left[0]:
            os._exit(9)
        return write(*arguments)

    os.pwrite = write_or_die
    save_model(load_pretrained(base), destination, to="fp8", like=base)


def test_what_a_killed_save_left_is_taken_over(models: dict[str, Case], tmp_path: Path) -> None:
    """A process dies while it writes: no destination; the same save ends with the same bytes, any other is refused."""
    case = models["uneven"]
    with pytest.raises(ProcessExitedException, match="exit code 9"):
        run(1, _die_while_saving, case.base, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out.partial"]
    model = load_pretrained(case.base)
    with pytest.raises(ResumeMismatchError, match=r"out\.partial"):
        save_model(model, tmp_path / "out", to="fp8", like=case.base, scales="fresh")
    with pytest.raises(ResumeMismatchError, match=r"out\.partial"):
        save_model(model, tmp_path / "out", like=case.base)
    shutil.copytree(tmp_path / "out.partial", tmp_path / "later.partial")
    save_model(model, tmp_path / "out", to="fp8", like=case.base)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["later.partial", "out"]
    assert_same_tree(tmp_path / "out", case.base)
    file = next(case.base.glob("*.safetensors"))
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))  # the same times: it was touched nevertheless
    with pytest.raises(ResumeMismatchError, match=f"{file.name}, which it is made from, has changed since"):
        save_model(model, tmp_path / "later", to="fp8", like=case.base)


# ---------------------------------------------------------------- asynchronous


def test_async_save_in_one_process(models: dict[str, Case], tmp_path: Path) -> None:
    """What is saved are the values at the time of the call, whatever becomes of them while it is written."""
    case = models["equal"]
    state = tensors_of(case.sources["trained"])
    writer = FP8StorageWriter(tmp_path / "out", like=case.base)
    future = dcp.async_save(state, storage_writer=writer, no_dist=True)
    for tensor in state.values():
        tensor.zero_()
    future.result()
    assert_same_tree(tmp_path / "out", case.expected("trained", "reuse"))


def test_a_failed_async_save_gives_up_its_lock(
    models: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the future's; the same writer, or another one beside it, saves there afterwards."""
    case = models["identity"]
    state = tensors_of(case.sources["untouched"])
    writer = FP8StorageWriter(tmp_path / "out", like=case.base)
    for method in ("pwrite", "fdatasync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, method, _full)
            failed = dcp.async_save(state, storage_writer=writer, no_dist=True)
            refused(StorageError, "No space left on device", failed.result)
    dcp.async_save(state, storage_writer=FP8StorageWriter(tmp_path / "out", like=case.base), no_dist=True).result()
    assert_same_tree(tmp_path / "out", case.base)
    dcp.async_save(state, storage_writer=writer, checkpoint_id=tmp_path / "again", no_dist=True).result()
    assert_same_tree(tmp_path / "again", case.base)
    assert writer.bytes_written == stored_bytes(case.base)


def _async_on_ranks(case: Case, root: Path) -> list[str]:
    """In a thread: succeeds, fails on one rank, succeeds again."""
    told = []
    state = sharded(tensors_of(case.sources["trained"]), "rows")
    writer = FP8StorageWriter(root / "out", like=case.base)
    for attempt in range(2):
        true = os.pwrite
        if attempt == 0 and dist.get_rank() == 1:
            os.pwrite = _full
        future = dcp.async_save(state, storage_writer=writer)
        try:
            future.result()
            told.append("nothing was raised")
        except CheckpointException as error:
            told.append("; ".join(type(cause).__name__ for cause, _ in error.failures.values()))
        os.pwrite = true
        dist.barrier()
        writer = FP8StorageWriter(root / "out", like=case.base) if attempt == 0 else writer
    return told


def test_async_save_on_ranks(models: dict[str, Case], tmp_path: Path) -> None:
    """The ranks' threads meet as their processes do; a failure of one is all ranks', and the next save goes through."""
    for told in run(2, _async_on_ranks, models["equal"], tmp_path):
        assert told == ["StorageError; StorageError", "nothing was raised"]
    assert_same_tree(tmp_path / "out", models["equal"].expected("trained", "reuse"))


def _async_in_a_process(case: Case, root: Path) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # torch's process is a child of this one
    os.environ["MASTER_ADDR"] = "localhost"
    state = sharded(tensors_of(case.sources["trained"]), "rows")
    writer = FP8StorageWriter(root / "out", like=case.base, process_group=dist.group.WORLD)
    dcp.async_save(state, storage_writer=writer, async_checkpointer_type=AsyncCheckpointerType.PROCESS).result()


@pytest.mark.parametrize("ranks", [1, 2] if ALL else [2])
def test_async_save_in_a_process(ranks: int, models: dict[str, Case], tmp_path: Path) -> None:
    """The writer travels; the group of the process is made of the same ranks."""
    run(ranks, _async_in_a_process, models["equal"], tmp_path)
    assert_same_tree(tmp_path / "out", models["equal"].expected("trained", "reuse"))


def test_the_writer_is_public_and_travels(models: dict[str, Case], tmp_path: Path) -> None:
    """`fp8ckpt.FP8StorageWriter` is the one that `save_model` uses; it can be pickled, with an open base or without."""
    assert fp8ckpt.FP8StorageWriter is checkpointing.FP8StorageWriter is fp8_storage_writer.FP8StorageWriter
    for i, base in enumerate((models["identity"].base, open_checkpoint(models["identity"].base))):
        writer = pickle.loads(pickle.dumps(FP8StorageWriter(tmp_path / str(i), like=base)))
        dcp.save(tensors_of(models["identity"].sources["untouched"]), storage_writer=writer, no_dist=True)
        assert_same_tree(tmp_path / str(i), models["identity"].base)


# ---------------------------------------------------------------- memory


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def _beyond(folder: Path) -> list[tuple[int, int]]:
    """What saving takes beyond the model, at most, and what the model takes, in bytes: of two dtypes."""
    os.environ["LOCAL_WORLD_SIZE"] = str(max(1, len(os.sched_getaffinity(0)) // 2))
    small, found = load_pretrained(folder / "small"), []
    save_model(small, folder / "once", to="fp8", like=folder / "small")  # code and libraries are there
    for dtype in (torch.bfloat16, torch.float32):
        model = load_pretrained(folder / "large", dtype=dtype)
        held = sum(parameter.nbytes for parameter in model.parameters())
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        save_model(model, folder / str(dtype), to="fp8", like=folder / "large")
        found.append((_status("VmHWM") - before, held))
    return found


def test_memory_beyond_the_model(tmp_path: Path) -> None:
    """Saving some 150 MB of bf16 as FP8 takes at most 64 MiB beyond the model, in one process of two threads; and so
    does the same model in float32.
    """
    sizes = Mistral3Sizes(layers=1, hidden=2048, intermediate=10240, heads=16, kv_heads=4, head_dim=128)
    large, _ = sample(tmp_path / "large", sizes, files=2, sparse=True), sample(tmp_path / "small", files=2)
    [found] = apart(_beyond, [tmp_path])
    for (beyond, held), width, dtype in zip(found, (2, 4), ("bfloat16", "float32"), strict=True):
        print(f"{beyond / 2**20:.1f} MiB beyond {held / 1e6:.0f} MB")
        assert held > 75e6 * width
        assert beyond <= 64 << 20
        assert verify(large, tmp_path / f"torch.{dtype}").ok

"""A rehearsal at full size: the 128B release's true names and shapes in sparse files, for 64 ranks, TP8 x PP8."""

from __future__ import annotations

import gc
import multiprocessing
import time
import warnings
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, Mistral3ForConditionalGeneration

from fp8ckpt import Checkpoint, FP8StorageReader, QuantizedTensor, open_checkpoint, plan, sample
from fp8ckpt.sample import Mistral3Sizes
from tests.distributed import UNEVEN, apart, local, stage, tp, tp_fsdp

STAGES, SHARDS = 8, 8
_held_here: tuple[Any, ...] = ()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """128 GB of holes, and true headers."""
    return open_checkpoint(
        sample(tmp_path_factory.mktemp("release") / "128B", Mistral3Sizes.true_shape(), files=27, sparse=True)
    )


class Planned(NamedTuple):
    """One rank's plan: regions by tensor, in the order planned; and how many elements of each tensor it holds."""

    regions: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    held: dict[str, int]
    seconds: float


def _plans(path: Path) -> list[Planned]:
    """The plan of each rank, of a model that is built once: then the process is forked for each."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(AutoConfig.from_pretrained(path))
    gc.freeze()
    with multiprocessing.get_context("fork").Pool(2, _hold, (model, path), maxtasksperchild=1) as pool:
        return pool.map(_plan, range(STAGES * SHARDS), chunksize=1)


def _hold(*given: Any) -> None:
    global _held_here  # of a process of one rank
    _held_here = given


def _plan(rank: int) -> Planned:
    """Plan as a rank of a world of 64 of which no other rank is there; its parameters are on meta.

    In a process of its own: torch remembers placements, and with them the rank that they were first computed for.
    """
    model, path = _held_here
    dist.init_process_group("fake", rank=rank, world_size=STAGES * SHARDS)
    mesh = init_device_mesh("cpu", (STAGES, SHARDS), mesh_dim_names=("pp", "tp"))
    state = tp(stage(model, mesh.get_local_rank("pp"), STAGES), mesh["tp"]).state_dict()
    begun = time.perf_counter()
    reader, planner = FP8StorageReader(path), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, rank == 0)
    planner.set_up_planner(state, metadata, rank == 0)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    seconds = time.perf_counter() - begun
    assert all(item.storage_index.fqn == item.dest_index.fqn for item in plan.items)
    regions = [(item.storage_index.fqn, tuple(item.storage_offsets), tuple(item.lengths)) for item in plan.items]
    return Planned(regions, {name: local(tensor).numel() for name, tensor in state.items()}, seconds)


def test_64_ranks(release: Checkpoint) -> None:
    """All that is said of their plans, which take seconds: in one test, so that no two workers make them."""
    [plans] = apart(_plans, [release.path])
    each_byte_is_read_once(release, plans)
    stages_divide_the_model(plans)
    plan_says_what_each_rank_reads(release, plans)


def _bytes(name: str, numel: int, release: Checkpoint) -> int:
    tensor = release[name]
    return numel if isinstance(tensor, QuantizedTensor) else numel * tensor.nbytes // tensor.numel


def each_byte_is_read_once(release: Checkpoint, plans: list[Planned]) -> None:
    """Each rank plans its shards and no more; over all ranks each sharded tensor is covered once, each other one once a
    rank.
    """
    assert sum(tensor.numel for tensor in release.tensors.values()) > 125e9
    regions: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    planned = []
    for one in plans:
        planned.append(sum(_bytes(name, prod(sizes), release) for name, _, sizes in one.regions))
        assert planned[-1] == sum(_bytes(name, numel, release) for name, numel in one.held.items())
        for name, offsets, sizes in one.regions:
            regions.setdefault(name, []).append((offsets, sizes))

    sharded = {name for plan in plans for name, numel in plan.held.items() if numel < release[name].numel}
    assert regions.keys() == release.tensors.keys()
    linears = [name for name, tensor in release.tensors.items() if isinstance(tensor, QuantizedTensor)]
    assert sharded == {*linears, "lm_head.weight"}
    for name, found in regions.items():
        shape = release[name].shape
        if name not in sharded:
            assert found == [((0,) * len(shape), shape)] * SHARDS, name
            continue
        assert sum(prod(sizes) for _, sizes in found) == prod(shape), name
        # Eight slices of one dimension, one after the other: together with the sum above, a partition.
        [axis] = {i for _, sizes in found for i, (size, dim) in enumerate(zip(sizes, shape, strict=True)) if size < dim}
        end = 0
        for offsets, sizes in sorted(found, key=lambda region: region[0]):
            assert offsets[axis] == end, name
            end += sizes[axis]
        assert end == shape[axis]
    total = sum(_bytes(name, tensor.numel, release) for name, tensor in release.tensors.items())
    copies = sum(_bytes(name, release[name].numel, release) for name in regions.keys() - sharded)
    assert sum(planned) == total + (SHARDS - 1) * copies
    slowest = max(plan.seconds for plan in plans)
    print(
        f"planned in at most {slowest * 1000:.0f} ms; {min(planned) / 1e9:.2f} to {max(planned) / 1e9:.2f} GB a rank, ",
        end="",
    )
    print(f"{sum(planned) / 1e9:.1f} GB together, of {total / 1e9:.1f} GB on disk")


def stages_divide_the_model(plans: list[Planned]) -> None:
    """Eleven layers a stage: the ends hold the embeddings and the vision tower, and the norm and the head."""
    layers = [
        {int(name.split(".")[3]) for name in plan.held if name.startswith("model.language_model.layers.")}
        for plan in plans
    ]
    assert layers == [set(range(11 * (rank // SHARDS), 11 * (rank // SHARDS) + 11)) for rank in range(STAGES * SHARDS)]
    first, middle, last = (set(plans[rank].held) for rank in (0, 27, 63))
    assert all(name.startswith("model.language_model.layers.") for name in middle)
    assert "model.language_model.embed_tokens.weight" in first
    assert any(name.startswith("model.vision_tower") for name in first)
    assert {"lm_head.weight", "model.language_model.norm.weight"} <= last
    assert "lm_head.weight" not in first


def test_the_release_takes_no_room(release: Checkpoint) -> None:
    """The files are as long as the release's, and mostly holes."""
    files = list(Path(release.path).glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 120e9
    assert sum(file.stat().st_blocks * 512 for file in files) < 20e6


def plan_says_what_each_rank_reads(release: Checkpoint, plans: list[Planned]) -> None:
    """`fp8ckpt.plan` needs no model and no process group, and knows what the real shards of the model will read."""
    found = plan(release, ranks=STAGES * SHARDS, tp=SHARDS, pp=STAGES)
    for rank, planned in zip(found.ranks, plans, strict=True):
        assert rank.read == sum(_bytes(name, prod(sizes), release) for name, _, sizes in planned.regions)
        assert rank.held == sum(2 * numel for numel in planned.held.values())
        assert rank.tensors == len(planned.held)


def _held(work: tuple[int, Path]) -> int:
    """The bytes that a rank of six holds, TP2 x FSDP2 over three."""
    rank, path = work
    warnings.simplefilter("ignore")
    dist.init_process_group("fake", rank=rank, world_size=6)
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model: Any = Mistral3ForConditionalGeneration(AutoConfig.from_pretrained(path))
    return sum(local(tensor).nbytes for tensor in tp_fsdp(model, mesh).state_dict().values())


def test_plan_of_uneven_shards(tmp_path: Path) -> None:
    """Sizes that nothing divides, cut by two dimensions of a mesh: what the shards of DTensor hold."""
    path = sample(tmp_path / "uneven", UNEVEN)
    first, last = apart(_held, [(rank, path) for rank in (0, 5)])
    found = plan(path, ranks=6, tp=2).ranks
    assert (found[0].held, found[5].held) == (first, last)
    assert first > last

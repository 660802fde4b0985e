"""A load of DeepSeek-V3 on 64 ranks, rehearsed with true names and shapes in sparse files, and process groups in which
only one rank exists: what each rank reads, that all together read the files once, and what one rank's plan takes.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from benchmarks.measuring import keep
from fp8ckpt import Checkpoint, open_checkpoint, sample
from fp8ckpt.checkpoint.assembling import assemble
from fp8ckpt.checkpoint.load_plan import LoadPlan
from fp8ckpt.checkpoint.planners import AssemblyLoadPlanner, Part, parts_of
from fp8ckpt.families.transformers_tables import configured_model
from fp8ckpt.sample import DeepseekSizes
from fp8ckpt.tensors.assembly import Assembly, Piece
from fp8ckpt.tensors.tensor import bytes_of_values

Distribute = Callable[[torch.Tensor], DTensor]


def ep64() -> Distribute:
    """Four of 256 experts per rank; everything else sharded by rows over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    return lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def ep8_fsdp8() -> Distribute:
    """An eighth of the experts for each eight of 64 ranks; each of the eight has an eighth of the rows of that stack,
    of gate and up separately; everything else is sharded by rows over all ranks.
    """
    mesh = init_device_mesh("cpu", (8, dist.get_world_size() // 8), mesh_dim_names=("ep", "dp"))

    def distribute(tensor: torch.Tensor) -> DTensor:
        placements: list[Placement] = [Shard(0), Shard(1 if tensor.ndim == 3 else 0)]
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    return distribute


MESHES = {f.__name__: f for f in (ep64, ep8_fsdp8)}


class Planned(NamedTuple):
    """One rank's plan. ``seconds`` of processor time: to open the files, and for the rest; ``grown``: the bytes that
    the process grew by in each.
    """

    read: int
    items: int
    seconds: tuple[float, float]
    grown: tuple[int, int]


def plan_rank(name: str, rank: int, ranks: int, path: Path) -> Planned:
    """Do all that a rank does before its first byte. The parameters are never touched, and take no memory."""
    _alone(rank, ranks)
    model: Any = configured_model(open_checkpoint(path).config)
    distribute = MESHES[name]()
    held = model.state_dict().keys()
    for prefix, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(distribute(parameter), requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):
            if f"{prefix}.{key}" in held:  # the biases of routers
                setattr(module, key, distribute(buffer))
    model.to_empty(device="cpu")
    gc.collect()
    seconds, grown = [time.process_time()], [_resident()]
    checkpoint = open_checkpoint(path)
    seconds, grown = [*seconds, time.process_time()], [*grown, _resident()]
    plan = LoadPlan(model, checkpoint, partial=False, narrow=True, follow_index=False)
    items = AssemblyLoadPlanner(plan.parts).finish_plan(None).items  # type: ignore[arg-type]  # the plan is its own
    seconds, grown = [*seconds, time.process_time()], [*grown, _resident()]
    read = _bytes_of(plan.parts, checkpoint)
    return Planned(read, len(items), _steps(seconds), _steps(grown))


def _steps(values: list[Any]) -> Any:
    return tuple(after - before for before, after in pairwise(values))


def parts_of_rank(
    name: str, rank: int, ranks: int, tensors: dict[str, torch.Tensor], made: dict[str, Assembly]
) -> list[Part]:
    """What a rank reads, its tensors on the meta device."""
    _alone(rank, ranks)
    distribute = MESHES[name]()
    parts = [part for key, tensor in tensors.items() for part in parts_of(distribute(tensor), made[key])]
    dist.destroy_process_group()
    return parts


def assert_a_partition(parts: list[Part], checkpoint: Checkpoint) -> None:
    """Over all ranks each element of the files is read once."""
    pieces: dict[str, list[Piece]] = {}
    for part in parts:
        offsets, sizes = part.region
        pieces.setdefault(part.source, []).append(Piece(part.source, offsets, offsets, sizes, tuple(range(len(sizes)))))
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    assert pieces.keys() == shapes.keys()
    for name, of_one in pieces.items():
        assert Assembly(shapes[name], tuple(of_one)).defect(shapes) is None, name


def _bytes_of(parts: list[Part], checkpoint: Checkpoint) -> int:
    tensors = checkpoint.tensors
    return sum(bytes_of_values(tensors[p.source]) * p.values.numel() // tensors[p.source].numel for p in parts)


def _alone(rank: int, ranks: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=rank, world_size=ranks)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def rehearse(path: Path, meshes: Iterable[str], ranks: int) -> dict[str, Any]:
    """What all ranks read of a checkpoint, on each mesh, and what the plans of the first and the last of them take."""
    result: dict[str, Any] = {}
    checkpoint = open_checkpoint(path)
    stored = sum(bytes_of_values(tensor) for tensor in checkpoint.tensors.values())
    model = configured_model(checkpoint.config)
    tensors = model.state_dict()
    made = assemble(model, tensors, {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()})
    assert made is not None
    for name in meshes:
        parts = [parts_of_rank(name, rank, ranks, tensors, made.parts) for rank in range(ranks)]
        assert_a_partition([part for of_one in parts for part in of_one], checkpoint)
        read = [_bytes_of(of_one, checkpoint) for of_one in parts]
        assert sum(read) == stored
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            plans = pool.starmap(plan_rank, [(name, rank, ranks, path) for rank in (0, ranks - 1)], chunksize=1)
        assert [plan.read for plan in plans] == [read[0], read[-1]]
        plan = max(plans, key=lambda plan: sum(plan.seconds))
        result[name] = {
            "ranks": ranks,
            "tensors": len(checkpoint.tensors),
            "bytes": stored,
            "bytes_read_by_all_ranks": sum(read),
            "bytes_read_by_a_rank": [min(read), max(read)],
            "items_of_a_rank": plan.items,
            "processor_seconds": {"open": plan.seconds[0], "plan": plan.seconds[1]},
            "mib": {"open": plan.grown[0] >> 20, "plan": plan.grown[1] >> 20},
        }
        print(f"  {name}: {ranks:,} ranks read {sum(read):,} of {stored:,} bytes; {min(read):,} to {max(read):,} each")
        print(f"    {plan.items:,} items; {plan.seconds} processor s; {[size >> 20 for size in plan.grown]} MiB")
    return result


def main() -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
        path = sample(Path(work) / "fp8", DeepseekSizes.true_shape(), files=163, sparse=True)
        keep("planning", rehearse(path, MESHES, 64))


if __name__ == "__main__":
    main()

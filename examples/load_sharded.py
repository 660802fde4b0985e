"""Load an FP8 checkpoint into a model that is sharded over the ranks of torchrun, run it, train it, and save it as BF16
or FP8.

    torchrun --standalone --nproc-per-node 2 examples/load_sharded.py FP8_DIRECTORY [--steps N] [--out DIRECTORY]
        [--to fp8] [--tensor-parallel]

Each rank reads the bytes of its own shards, once, and holds no second copy of anything.
"""

from __future__ import annotations

import argparse
import gc
import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fp8ckpt

TENSOR_PARALLEL = {
    **{f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
    **{f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")},
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def train(model: nn.Module, steps: int, device: str) -> None:
    """Train on a made-up text; every rank has the same, so that any sharding learns the same."""
    tokens = torch.randint(20, 300, (4, 64), generator=torch.Generator().manual_seed(0)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Load, compare each rank's logits with rank 0's, train, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--out")
    parser.add_argument("--to", default="bf16")
    parser.add_argument("--tensor-parallel", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dist.init_process_group()
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))

    def parallelize(model: nn.Module) -> None:
        layers = model.model.language_model.layers
        for layer in layers:
            if arguments.tensor_parallel:
                parallelize_module(layer, mesh, TENSOR_PARALLEL)
            else:
                fully_shard(layer, mesh=mesh)
        if not arguments.tensor_parallel:
            fully_shard(model, mesh=mesh)

    model = fp8ckpt.load_pretrained(arguments.checkpoint, parallelize=parallelize, device=mesh.device_type)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 17, device=mesh.device_type)[None]).logits
    held = sum(
        (parameter.to_local() if hasattr(parameter, "to_local") else parameter).nbytes
        for parameter in model.parameters()
    )
    print(
        f"rank {dist.get_rank()}: holds {held:,} bytes of parameters; the logits' mean is {logits.float().mean():.6f}"
    )
    train(model, arguments.steps, mesh.device_type)
    if arguments.out:
        fp8ckpt.save_model(model, arguments.out, to=arguments.to, like=arguments.checkpoint)
    del model, logits
    gc.collect()  # a sharded model holds itself, and its group: where they outlive this function, gloo may abort
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

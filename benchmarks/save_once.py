"""Save one FSDP2-sharded model in one way, under torchrun: ``save_once.py KIND CHECKPOINT OUT``. Prints JSON of seconds
and bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fp8ckpt

KIND, SOURCE, OUT = sys.argv[1:4]


def written() -> int:
    """Bytes that this process has written, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def parallelize(model: Any) -> None:
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    model = fp8ckpt.load_pretrained(SOURCE, parallelize=parallelize)
    dist.barrier()
    before, begun = written(), time.perf_counter()
    if KIND == "ours":
        fp8ckpt.save_model(model, OUT)
    elif KIND == "ours, FP8":
        fp8ckpt.save_model(model, OUT, to="fp8", like=SOURCE)
    else:
        names = dict.fromkeys(model.state_dict(), 1)
        writer = HuggingFaceStorageWriter(
            path=OUT, fqn_to_index_mapping=names, save_distributed=True, enable_consolidation=True
        )
        save(model.state_dict(), storage_writer=writer)
    dist.barrier()
    seconds = time.perf_counter() - begun
    total = torch.tensor(written() - before)
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(json.dumps({"seconds": seconds, "written": int(total)}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads have been seen to abort a process that ends beside its peers; all is done and printed


main()

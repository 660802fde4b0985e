"""Run a function on several gloo ranks; shard a transformers Mistral3 model as trainers do; make variants of a
checkpoint.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import runpy
import select
import shutil
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fp8ckpt.sample import Mistral3Sizes
from tests.oracle import Stored, read_directory, write_safetensors

# Few of its dimensions are multiples of any number of ranks, and k_proj and v_proj have four rows.
UNEVEN = Mistral3Sizes(
    layers=2, hidden=100, intermediate=203, heads=6, kv_heads=1, head_dim=4, vocabulary=515, vision_hidden=68,
    vision_intermediate=37,
)  # fmt: skip


def serve() -> None:
    """Fork the server that ranks are forked from, as multiprocessing would start it: so it has what the tests have
    imported. What `warm` does it does once it is asked for a rank.
    """
    address = connection.arbitrary_address("AF_UNIX")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    ended, alive = os.pipe()
    if not (pid := os.fork()):
        os.close(alive)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not what pytest puts there
        try:
            if listener in select.select([listener, ended], [], [])[0]:
                from tests import warm  # noqa: F401

                forkserver.main(listener.detach(), ended, [])
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    listener.close()
    os.close(ended)
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive, pid


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on ``size`` ranks; what each returns, by rank. The first rank that fails fails the
    caller.

    ``function`` is importable (of a module, not of a test), and so are what it takes and returns.
    """
    with TemporaryDirectory(prefix="ranks-") as folder:
        mp.start_processes(_rank, (size, Path(folder), function, arguments), size, start_method="forkserver")
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(size)]


class Launched:
    """``python COMMAND...`` on ``size`` ranks, as torchrun would start it, but forked with everything imported; or in
    one process that is no rank. What is printed goes to ``folder``.

    torchrun and each of its ranks import torch anew, which is most of the time of such a test.
    """

    def __init__(self, folder: Path, size: int | None, *command: object, **environment: str) -> None:
        self._folder = folder
        folder.mkdir()
        ranks = [environment]
        if size is not None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
            world |= {"LOCAL_WORLD_SIZE": str(size), **environment}
            ranks = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        context = multiprocessing.get_context("forkserver")
        self._ranks = [
            context.Process(
                target=_launched, args=(folder / str(rank), [*map(str, command)], {**given, "PWD": str(Path.cwd())})
            )
            for rank, given in enumerate(ranks)
        ]
        for process in self._ranks:
            process.start()

    def poll(self) -> bool:
        """Whether a rank has ended."""
        return any(process.exitcode is not None for process in self._ranks)

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self._ranks:
            process.kill()
            process.join()

    def ended(self) -> tuple[int, str, str]:
        """The first exit status that is not 0, and what all have printed; what hangs is killed, and fails the test."""
        for process in self._ranks:
            process.join(120)
        codes = [process.exitcode for process in self._ranks]
        self.kill()
        assert None not in codes, "a rank hangs"
        out, err = ("".join(f.read_text() for f in sorted(self._folder.glob(f"*.{kind}"))) for kind in ("out", "err"))
        return next((code for code in codes if code), 0), out, err


def _launched(output: Path, command: list[str], environment: dict[str, str]) -> None:
    gc.freeze()  # or the first collection copies every page of what is imported
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.chdir(environment["PWD"])
    torch.set_num_threads(1)
    for number, kind in ((1, "out"), (2, "err")):
        with output.with_suffix(f".{kind}").open("wb") as stream:
            os.dup2(stream.fileno(), number)
    name = command.pop(0)
    if name == "-m":
        sys.argv = command
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [name, *command]
        runpy.run_path(name, run_name="__main__")


def apart(function: Callable[[Any], Any], arguments: list[Any]) -> list[Any]:
    """``function`` of each argument in a process of its own, two at a time, without a process group."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        return list(pool.map(function, arguments))


def _rank(rank: int, size: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # or the first collection copies every page of what is imported
    warnings.simplefilter("ignore")
    os.environ.update(
        LOCAL_WORLD_SIZE=str(size), HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
    )
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    try:
        result = function(*arguments)
    except Exception:
        raise
    except (
        BaseException
    ) as error:  # torch's CheckpointException is one; the process that waits hears of Exceptions only
        raise RuntimeError("".join(traceback.format_exception(error))) from None
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def mesh(*sizes: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh of all ranks; by default of one dimension."""
    return init_device_mesh("cpu", sizes or (dist.get_world_size(),), mesh_dim_names=names)


def fsdp(model: nn.Module, over: DeviceMesh) -> nn.Module:
    """FSDP2: each text layer, then the rest."""
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=over)
    return fully_shard(model, mesh=over)


def tp(model: nn.Module, over: DeviceMesh) -> nn.Module:
    """Tensor parallelism of the text layers (columns, then rows) and of the head."""
    plan = {f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
    plan |= {f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    plan |= {"mlp.down_proj": RowwiseParallel(), "self_attn.o_proj": RowwiseParallel()}
    text, head = model.model.language_model, model.lm_head
    for layer in text.layers:
        if not isinstance(layer, nn.Identity):  # of another pipeline stage
            parallelize_module(layer, over, plan)
    if head is not None and (text.embed_tokens is None or head.weight is not text.embed_tokens.weight):
        parallelize_module(model, over, {"lm_head": ColwiseParallel()})
    return model


def tp_fsdp(model: nn.Module, over: DeviceMesh) -> nn.Module:
    """Both: ``over`` has the dimensions "dp" and "tp"."""
    return fsdp(tp(model, over["tp"]), over["dp"])


def stage(model: nn.Module, index: int, count: int) -> nn.Module:
    """A pipeline stage: its share of the text layers; vision and embeddings on the first, norm and head on the last."""
    text = model.model.language_model
    layers = len(text.layers)
    for i in range(layers):
        if not layers * index // count <= i < layers * (index + 1) // count:
            text.layers[i] = nn.Identity()
    if index:
        text.embed_tokens = model.model.vision_tower = model.model.multi_modal_projector = None
    if index < count - 1:
        text.norm = model.lm_head = None
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; every rank of its mesh must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's values, in row-major order."""
    # reshape() keeps odd strides of one element
    flat = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().tobytes()


def assert_same(found: torch.Tensor, expected: torch.Tensor, name: object = "") -> None:
    """The same dtype, shape and bits."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert bits(found) == bits(expected), name


def rewrite(
    source: Path,
    destination: Path,
    tensors: Callable[[dict[str, Stored]], dict[str, Stored]] | None = None,
    config: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A copy of a checkpoint as one file, its stored tensors and its configuration changed."""
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    stored = read_directory(source)
    write_safetensors(destination / "model.safetensors", tensors(stored) if tensors else stored, {"format": "pt"})
    text = json.loads((source / "config.json").read_text())
    if config is not None:
        config(text)
    (destination / "config.json").write_text(json.dumps(text))
    return destination


def rescaled(source: Path, destination: Path, change: Callable[[np.ndarray], Stored], **more: Any) -> Path:
    """A copy whose scales are others, made of their values in float32."""

    def edit(tensors: dict[str, Stored]) -> dict[str, Stored]:
        scales = {name: change(t.array.astype(np.float32)) for name, t in tensors.items() if "_scale_inv" in name}
        return {**tensors, **scales}

    return rewrite(source, destination, edit, **more)


def single(adapter: Any, weight: torch.Tensor, name: str = "a.weight") -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that an adapter makes of one weight."""
    (_, codes), (_, scale) = adapter.convert_single_tensor_to_hf(name, weight, quantization=True)
    return codes, scale


def tied(source: Path, destination: Path, head: str | None = None) -> Path:
    """A checkpoint whose configuration ties; its head absent, "equal" to the embeddings, or "other"."""

    def change(tensors: dict[str, Stored]) -> dict[str, Stored]:
        name = next(name for name in tensors if name.endswith("lm_head.weight"))
        embeddings = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        kept = {key: tensor for key, tensor in tensors.items() if key != name}
        return kept | {None: {}, "equal": {name: tensors[embeddings]}, "other": {name: tensors[name]}}[head]

    def tie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True

    return rewrite(source, destination, change, tie)

"""Load one checkpoint into one model in one way, in a process of its own: ``python load_once.py KIND CHECKPOINT``.

Prints JSON: the seconds of a first load, into fresh memory, and of a second into the same memory, if the way has one;
the peak of private memory beyond what the process held before; the model's bytes, and a checksum of every parameter.
Under torchrun the model is sharded with FSDP2. The way ``touch`` writes zeros into the model, the floor of the others.
Imports nothing of the benchmarks, so that it runs in a peer's environment.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, FineGrainedFP8Config, Mistral3ForConditionalGeneration

KIND, SOURCE = sys.argv[1], sys.argv[2]


class Peak:
    """Samples this process's anonymous memory."""

    def __init__(self) -> None:
        self.start = self.peak = self.now()
        threading.Thread(target=self.run, daemon=True).start()

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)


def build(kind: type = Mistral3ForConditionalGeneration) -> Any:
    config = AutoConfig.from_pretrained(SOURCE)
    if KIND.startswith("nemo"):
        config.quantization_config["dequantize"] = True
    else:
        del config.quantization_config
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = kind(config)
    torch.set_default_dtype(torch.float32)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    return model


class NaiveAdapter:
    """The documented adapter as it is usually written: the model's values cast to placeholders, ``w.to(bf16) * scale``
    back.
    """

    @staticmethod
    def to_hf(state: dict[str, torch.Tensor], fp8: set[str]) -> dict[str, torch.Tensor]:
        result = {}
        for name, value in state.items():
            if name in fp8:
                result[name] = value.to(torch.float8_e4m3fn)
                result[name + "_scale_inv"] = torch.empty((), dtype=torch.bfloat16)
            else:
                result[name] = value
        return result

    @staticmethod
    def from_hf(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for name, value in state.items():
            if name.endswith("_scale_inv"):
                continue
            scale = state.get(name + "_scale_inv")
            result[name] = value if scale is None else value.to(torch.bfloat16) * scale
        return result


def main() -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    model: Any
    if KIND == "transformers":
        skip = json.loads((Path(SOURCE) / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
        how: dict[str, Any] = {"weight_block_size": None, "modules_to_not_convert": skip}
        quantization = FineGrainedFP8Config(dequantize=True, activation_scheme="static", **how)

        def load_model() -> None:
            nonlocal model
            model = Mistral3ForConditionalGeneration.from_pretrained(
                SOURCE, dtype=torch.bfloat16, quantization_config=quantization
            )

    elif KIND == "ours":
        import fp8ckpt

        fp8ckpt.load_model  # noqa: B018 - imported before the clock starts, as the peers are
        model = build()

        def load_model() -> None:
            fp8ckpt.load_model(model, SOURCE)

    elif KIND == "touch":
        model = build()

        def load_model() -> None:
            for parameter in model.parameters():
                parameter.detach().zero_()

    elif KIND == "adapter":
        import fp8ckpt

        fp8 = {tensor.name for tensor in fp8ckpt.open_checkpoint(SOURCE).quantized}
        model = build()

        def load_model() -> None:
            placeholders = NaiveAdapter.to_hf(model.state_dict(), fp8)
            load(placeholders, storage_reader=HuggingFaceStorageReader(SOURCE), no_dist=not dist.is_initialized())
            model.load_state_dict(NaiveAdapter.from_hf(placeholders))

    else:
        from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
        from nemo_automodel.components.checkpoint.config import CheckpointingConfig
        from nemo_automodel.components.models.mistral3.state_dict_adapter import Mistral3FP8StateDictAdapter

        custom = type(
            "Custom", (Mistral3ForConditionalGeneration,), {"__module__": "nemo_automodel.components.models.benchmark"}
        )
        model = build(custom if KIND == "nemo-dcp" else Mistral3ForConditionalGeneration)
        layers = model.config.text_config.num_hidden_layers if KIND == "nemo-streaming" else None
        prefixes = ("model.vision_tower", "model.multi_modal_projector")
        model.state_dict_adapter = Mistral3FP8StateDictAdapter(not_fp8_prefixes=prefixes, num_hidden_layers=layers)
        config = CheckpointingConfig(
            checkpoint_dir="unused",
            model_save_format="safetensors",
            save_consolidated=False,
            dequantize_base_checkpoint=True,
            model_repo_id=None,
        )
        checkpointer = Checkpointer(config, dp_rank=int(os.environ.get("RANK", "0")), tp_rank=0, pp_rank=0)

        def load_model() -> None:
            checkpointer.load_model(model, SOURCE, is_init_step=True)

    peak, begun = Peak(), time.perf_counter()
    load_model()
    result: dict[str, Any] = {"seconds": time.perf_counter() - begun, "peak": max(peak.peak, peak.now()) - peak.start}
    if KIND != "transformers":  # it makes a new model at each load
        begun = time.perf_counter()
        load_model()
        result["again"] = time.perf_counter() - begun
    checksum, held = 0, 0
    for name, parameter in sorted(model.named_parameters()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held += local.nbytes
        checksum = zlib.crc32(
            name.encode() + local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), checksum
        )
    result |= {"model": held, "checksum": checksum}
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(
            0
        )  # gloo's threads have been seen to abort a process that ends beside its peers; all is done and printed


main()

"""`load_pretrained` of a mixture of experts of true width, with one tensor per expert in the file, against
transformers' own ``from_pretrained(dequantize=True)`` on the same bytes: one process, and two ranks.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measuring import in_ranks, keep

# Two layers of Qwen3-30B-A3B: 1.2 GB of codes in 128 x 128 blocks, 768 experts' tensors.
LAYERS, EXPERTS, HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 128, 2048, 768, 32, 4, 128, 4096
ROUNDS = 3

LOAD_ONCE = """
import json, os, sys, threading, time, zlib
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3MoeForCausalLM  # all that both import
import fp8ckpt
fp8ckpt.load_pretrained
kind, source = sys.argv[1:]
ranks = int(os.environ.get("WORLD_SIZE", "1"))
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
if ranks > 1:
    dist.init_process_group("gloo")
def held():  # anonymous memory
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
start = peak = held()
def sample():
    global peak
    while True:
        peak = max(peak, held())
        time.sleep(0.002)
threading.Thread(target=sample, daemon=True).start()
def shard(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)
begun = time.perf_counter()
if kind == "ours":
    model = fp8ckpt.load_pretrained(source, parallelize=shard if ranks > 1 else None)
else:
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True))
seconds = time.perf_counter() - begun
top = max(peak, held())  # the comparison takes memory of its own
local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
nbytes = sum(p.nbytes for p in local)
checksum = 0
for name, p in sorted(model.named_parameters()):
    whole = (p.full_tensor() if isinstance(p, DTensor) else p).detach().contiguous()
    checksum = zlib.crc32(whole.view(torch.uint8).numpy(), checksum)
if int(os.environ.get("RANK", "0")) == 0:
    print(json.dumps({"seconds": seconds, "peak": top - start, "model": nbytes, "checksum": checksum}))
if ranks > 1:
    dist.destroy_process_group()
"""


def release(directory: Path) -> Path:
    """The two layers, with random codes, as they are released."""
    directory.mkdir()
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def plain(name: str, *shape: int) -> None:
        tensors[name] = torch.randn(shape, generator=random).to(torch.bfloat16)

    def linear(name: str, rows: int, cols: int) -> None:
        codes = torch.randint(0, 120, (rows, cols), generator=random, dtype=torch.uint8)
        tensors[f"{name}.weight"] = codes.view(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // 128), -(-cols // 128), generator=random) / 1000 + 1e-4
        tensors[f"{name}.weight_scale_inv"] = scales.to(torch.bfloat16)

    plain("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    plain("model.norm.weight", HIDDEN)
    plain("lm_head.weight", VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain(f"{layer}.{norm}.weight", HIDDEN)
        for norm in "qk":
            plain(f"{layer}.self_attn.{norm}_norm.weight", HEAD_DIM)
        for what, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            linear(f"{layer}.self_attn.{what}_proj", heads * HEAD_DIM, HIDDEN)
        linear(f"{layer}.self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM)
        plain(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for what in ("gate", "up"):
                linear(f"{layer}.mlp.experts.{expert}.{what}_proj", WIDTH, HIDDEN)
            linear(f"{layer}.mlp.experts.{expert}.down_proj", HIDDEN, WIDTH)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    skipped = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(LAYERS))]
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": 8, "moe_intermediate_size": WIDTH,
        "intermediate_size": 6144, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False, "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": skipped,
        },
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def main() -> None:
    figures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
        source, script = release(Path(work) / "fp8"), Path(work) / "load_once.py"
        script.write_text(LOAD_ONCE)
        size = sum(file.stat().st_size for file in source.iterdir())
        for _ in range(ROUNDS):
            for ranks in (1, 2):
                for kind in ("ours", "transformers"):
                    figures.setdefault(f"{kind}, {ranks}", []).append(in_ranks(ranks, script, kind, source))
    checksums = {run["checksum"] for runs in figures.values() for run in runs}
    assert len(checksums) == 1, figures  # the same bits in every parameter, or the figures mean nothing
    print(f"\nloading {size / 1e9:.2f} GB of experts into fresh memory (best of {ROUNDS}); ranks of ours are FSDP2's")
    for name, runs in figures.items():
        best = min(run["seconds"] for run in runs)
        ours = min(run["seconds"] for run in figures["ours" + name[name.index(",") :]])
        beyond = min(run["peak"] - run["model"] for run in runs) / 2**20
        model = runs[0]["model"] / 1e9
        print(f"  {name:<18} {best:6.2f} s {best / ours:5.2f} x ours   {beyond:+6.0f} MiB beyond {model:.2f} GB a rank")
    keep("moe", {"source_bytes": size, "runs": figures})


if __name__ == "__main__":
    main()

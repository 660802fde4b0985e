"""What both hosts' tests need of a model: build it from a sample, shard it, spoil it before the load, and compare it
after.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, Mistral3ForConditionalGeneration

import fp8ckpt

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def build(
    source: Path, cls: type[nn.Module] = Mistral3ForConditionalGeneration, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """The sample's model, uninitialized; its configuration keeps the quantization and says to dequantize it."""
    config = AutoConfig.from_pretrained(source)
    if hasattr(config, "quantization_config"):
        config.quantization_config["dequantize"] = True
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return cls(config)
    finally:
        torch.set_default_dtype(before)


def modules_of(source: Path) -> nn.Module:
    """Nested modules with a parameter for each logical tensor of a checkpoint, of the dtype that it is loaded as."""
    checkpoint = fp8ckpt.open_checkpoint(source)
    return modules_with({name: torch.empty_like(checkpoint.read(name)) for name in checkpoint.tensors})


def modules_with(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Nested modules with parameters of these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


def shard(model: nn.Module, how: str) -> None:
    """ "none"; "fsdp": FSDP2 over all ranks; "tp": the text model's Linears, embedding and head over all ranks."""
    if how == "none":
        return
    ranks = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(how,))
    layers = model.get_submodule(
        "model.language_model.layers" if hasattr(model, "config") else "model.layers"
    ).children()
    if how == "fsdp":
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return
    assert how == "tp"
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {name: ColwiseParallel() for name in columns} | {
        name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    for layer in layers:
        parallelize_module(layer, mesh, plan)
    ends = {
        EMBEDDING.removesuffix(".weight"): RowwiseParallel(input_layouts=Replicate()),
        HEAD.removesuffix(".weight"): ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)


def spoil(model: nn.Module) -> None:
    """Make every parameter NaN, so that none can be right by chance or by initialization."""
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).fill_(torch.nan)


def on_disk(name: str, nested: bool) -> str:
    """The stored name of a Mistral3 parameter, spelled out here so that no adapter is asked."""
    if not nested:
        return name
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return "language_model." + name if name.startswith("lm_head.") else name.removeprefix("model.")


def sharded(model: nn.Module) -> int:
    """How many parameters are in shards."""
    return sum(
        isinstance(parameter, DTensor) and any(p.is_shard() for p in parameter.placements)
        for parameter in model.parameters()
    )


def keep_stage(model: nn.Module, stage: int) -> None:
    """Cut the model to one of two pipeline stages, each of which has modules that the other lacks."""
    text = model.get_submodule("model.language_model")
    gone = ["norm", "layers.1"] if stage == 0 else ["embed_tokens", "layers.0"]
    for name in gone:
        text.set_submodule(name, nn.Identity())
    for name in ["lm_head"] if stage == 0 else ["model.vision_tower", "model.multi_modal_projector"]:
        model.set_submodule(name, nn.Identity())


def wrong(model: nn.Module, source: Path, nested: bool = False, whole: bool = True) -> list[str]:
    """Parameters that are not, bit for bit, what `Checkpoint.read` gives. In a whole model every tensor on disk is one
    of them.
    """
    checkpoint = fp8ckpt.open_checkpoint(source)
    parameters = {on_disk(name, nested): parameter.detach() for name, parameter in model.named_parameters()}
    assert not whole or parameters.keys() == checkpoint.tensors.keys()
    found = []
    for name, parameter in parameters.items():
        actual = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        expected = checkpoint.read(name).to(actual.dtype)  # a float32 model holds the bfloat16 values
        if not torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)):
            found.append(name)
    return found

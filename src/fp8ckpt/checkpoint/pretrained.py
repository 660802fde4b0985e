"""A trainer's one line: from a checkpoint's directory to a model that is sharded, loaded, tied and ready to run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fp8ckpt.checkpoint.checkpointing import load_model
from fp8ckpt.errors import ConfigError
from fp8ckpt.families.transformers_tables import configured_model, distributed, keep_in_float32
from fp8ckpt.ranks import ranks_of_group
from fp8ckpt.stores.local import local_copy
from fp8ckpt.stores.store import File
from fp8ckpt.targets import TARGETS, target_of
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint
from fp8ckpt.tensors.config import CONFIG
from fp8ckpt.tensors.reading import torch_dtype

if TYPE_CHECKING:
    from transformers.distributed.configuration_utils import DistributedConfig

_GENERATION = "generation_config.json"


def load_pretrained(
    path: CheckpointLike,
    *,
    parallelize: Callable[[nn.Module], nn.Module | None] | DistributedConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.bfloat16,
    partial: bool = False,
    follow_index: bool = False,
) -> nn.Module:
    """Build the transformers model that ``config.json`` names on the meta device; shard, materialize and load it;
    return it.

    ``parallelize(model)`` applies FSDP2, TP or any other DTensor placement, in place or by returning another module. It
    may also be a ``DistributedConfig`` of transformers: the model is then sharded by its own plans (TP, EP, FSDP2, PP),
    as by ``from_pretrained(distributed_config=)``, and ``device`` is the device type of its mesh. ``dtype``: of the
    parameters, bfloat16, float16 or float32, as torch's dtype or by name; parameters that transformers itself keeps in
    float32 (DeepSeek's ``e_score_correction_bias``) are excepted. A warning names the tensors of the file that this
    rounds, FP8 ones aside. ``partial``: ``parallelize`` removes parts of the model (a PP stage). ``follow_index``:
    ignore tensors that the index does not list. Needs transformers.

    >>> model = fp8ckpt.load_pretrained("sample-fp8")
    >>> type(model).__name__, model.lm_head.weight.dtype
    ('Mistral3ForConditionalGeneration', torch.bfloat16)
    """
    ranks = ranks_of_group()
    checkpoint, model = ranks.together(lambda: _built(path, dtype, follow_index))

    def shard() -> Any:
        if parallelize is None:
            sharded: Any = model
        elif callable(parallelize):
            made: object = parallelize(model)
            if not isinstance(made, nn.Module | None):
                raise TypeError(f"parallelize returned {made!r}; expected the model, or None")
            sharded = made or model
        elif not hasattr(parallelize, "tp_size"):
            raise TypeError(f"parallelize={parallelize!r}; expected a function of the model, or a DistributedConfig")
        else:
            sharded = distributed(model, parallelize)
        return sharded.to_empty(device=device)

    model = ranks.together(shard)
    load_model(model, checkpoint, partial=partial, narrow=True)
    ranks.together(lambda: _finish(model, checkpoint))
    return model  # type: ignore[no-any-return]  # a class that is known by name only


def _built(path: CheckpointLike, asked: str | torch.dtype, follow_index: bool) -> tuple[Checkpoint, Any]:
    """The checkpoint, and the model that its configuration names, on the meta device."""
    dtype = torch_dtype(TARGETS[target_of(asked, TARGETS, "dtype")])
    checkpoint = open_checkpoint(path, follow_index=follow_index)
    model = configured_model(checkpoint.config, dtype)
    if model is None:
        given = checkpoint.config.get("architectures") or []
        raise ConfigError.of_architecture(file=File(checkpoint.store, CONFIG), given=given)
    model.config.name_or_path = str(checkpoint.path)
    keep_in_float32(model, dtype)
    return checkpoint, model


def _finish(model: Any, checkpoint: Checkpoint) -> None:
    import transformers

    if _GENERATION in checkpoint.store.files():  # without it, the default stays; a FIFO is refused here
        with local_copy(checkpoint.store, [_GENERATION]) as directory, suppress(OSError):
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    model.eval()

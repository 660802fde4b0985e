"""State-dict adapter of models whose FP8 weights have scales of 128 x 128 blocks, as DeepSeek V3 has them.

Every rank has whole scale grids: they are 1/4096 of the weights' bytes, and the shards of a DTensor need not end at
block boundaries (576 or 1536 rows over 8 ranks do not). Each shard is dequantized by its offsets in the full tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from fp8ckpt.families.roles import DEEPSEEK_V3
from fp8ckpt.models.fp8_state_dict_adapter import FP8StateDictAdapter, identity
from fp8ckpt.tensors.checkpoint import CheckpointLike, open_checkpoint

logger = logging.getLogger(__name__)


def _is_fp8_weight_key(model_key: str) -> bool:
    """Return True iff ``model_key`` names an FP8 Linear weight of the release."""
    return model_key.endswith(".weight") and not model_key.endswith(DEEPSEEK_V3)


class DeepseekV3FP8StateDictAdapter(FP8StateDictAdapter):
    """An adapter between a model's state dict and an FP8 checkpoint with block scales; default names are the same."""

    logger = logger
    block_size = (128, 128)
    scale_dtype = "F32"

    def __init__(
        self,
        *,
        native_to_hf: Callable[[str], str] = identity,
        hf_to_native: Callable[[str], str] = identity,
        layout_name: str = "deepseek_v3",
    ) -> None:
        super().__init__(native_to_hf, hf_to_native, layout_name)

    @classmethod
    def from_checkpoint(cls, path: CheckpointLike) -> DeepseekV3FP8StateDictAdapter:
        """Return the adapter for the checkpoint at ``path``, which decides which weights are FP8, and their scales.

        Raises `UnsupportedFormatError` if a scale is not a grid of 128 x 128 blocks named ``_scale_inv``.
        """
        adapter = cls()
        adapter._take(open_checkpoint(path))
        return adapter

    def _is_named_fp8(self, fqn: str) -> bool:
        return _is_fp8_weight_key(fqn)

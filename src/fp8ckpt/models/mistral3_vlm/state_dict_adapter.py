"""State-dict adapter of Mistral3 models that were released in FP8, with one scale per tensor.

The text model's Linear weights are e4m3, each with a scalar ``weight_scale_inv`` and an ``activation_scale`` that
training does not use. Vision tower, projector, ``lm_head``, embeddings and norms are BF16. The names and signatures
here are those that host trainers know from the adapter's reference documentation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from fp8ckpt.checkpoint.quantized_dtensors import dequantize
from fp8ckpt.families.names import IDENTITY, NESTED, KeyLayout, released_layout
from fp8ckpt.families.roles import MISTRAL3, MISTRAL3_TOWERS
from fp8ckpt.families.tied import ties_embeddings
from fp8ckpt.models.fp8_state_dict_adapter import FP8StateDictAdapter
from fp8ckpt.models.fp8_state_dict_adapter import identity as _identity
from fp8ckpt.tensors.checkpoint import CheckpointLike, open_checkpoint

logger = logging.getLogger(__name__)

_NON_QUANTIZED_SUFFIXES = MISTRAL3  # as the reference documentation names them
_VLM_TEXT, _NESTED_TEXT = NESTED.prefixes[0]


def _is_fp8_weight_key(model_key: str, not_fp8_prefixes: tuple[str, ...] = ()) -> bool:
    """Return True iff ``model_key`` names an FP8 Linear weight.

    ``not_fp8_prefixes``: modules that are not FP8, with everything below them; they match whole components of names.
    """
    if not model_key.endswith(".weight") or model_key.endswith(_NON_QUANTIZED_SUFFIXES):
        return False
    return not any(model_key == prefix or model_key.startswith(prefix + ".") for prefix in not_fp8_prefixes)


def _dequantize_from_fp8(
    weight_fp8: torch.Tensor, scale_inv: torch.Tensor, target_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Dequantize one FP8 weight by its scalar scale: float32 product, one rounding. DTensors stay DTensors."""
    return dequantize("weight", weight_fp8, scale_inv, None, target_dtype)


class Mistral3FP8StateDictAdapter(FP8StateDictAdapter):
    """An adapter between a Mistral3 model's state dict and its FP8 checkpoint.

    ``native_to_hf``, ``hf_to_native``: translate names; by default both sides have the same. ``layout_name`` appears in
    log lines. ``not_fp8_prefixes``: native modules that are BF16 on disk.
    """

    logger = logger
    scale_dtype = "BF16"

    def __init__(
        self,
        *,
        native_to_hf: Callable[[str], str] = _identity,
        hf_to_native: Callable[[str], str] = _identity,
        layout_name: str = "vlm_full",
        not_fp8_prefixes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(native_to_hf, hf_to_native, layout_name)
        self.not_fp8_prefixes = not_fp8_prefixes

    @classmethod
    def for_vlm_full(cls, config: Any | None = None) -> Mistral3FP8StateDictAdapter:
        """Return the adapter of the full model, if there is no file. Without ``config`` its names on disk are the same,
        as in Mistral Medium 3.5 128B; with one, they are those under which that model is released.

        ``config``: a transformers configuration, or the mapping of ``config.json``.
        """
        if config is None:
            return cls._of_layout(IDENTITY, is_vlm=True)
        adapter = cls._of_layout(released_layout(config), is_vlm=True)
        adapter.may_lack_head = ties_embeddings(config) is not False
        return adapter

    @classmethod
    def for_causal_lm(cls, config: Any | None = None) -> Mistral3FP8StateDictAdapter:
        """Return the adapter of the text model alone, without a file; names on disk are the same, as in Devstral 2."""
        adapter = cls(layout_name="causal_lm")
        adapter.may_lack_head = bool(ties_embeddings(config))
        return adapter

    @classmethod
    def from_checkpoint(cls, path: CheckpointLike) -> Mistral3FP8StateDictAdapter:
        """Return the adapter for the checkpoint at ``path``: its layout, FP8 weights and scales.

        Raises `UnsupportedFormatError` unless its scales are one per tensor, named ``_scale_inv``.
        """
        checkpoint = open_checkpoint(path)
        layout = NESTED if any(name.startswith(_NESTED_TEXT) for name in checkpoint.tensors) else IDENTITY
        is_vlm = layout is NESTED or any(name.startswith(_VLM_TEXT) for name in checkpoint.tensors)
        adapter = cls._of_layout(layout, is_vlm=is_vlm)
        adapter._take(checkpoint)
        return adapter

    @classmethod
    def _of_layout(cls, layout: KeyLayout, *, is_vlm: bool) -> Mistral3FP8StateDictAdapter:
        return cls(
            native_to_hf=layout.native_to_hf,
            hf_to_native=layout.hf_to_native,
            layout_name=layout.name if is_vlm else "text_only",
            not_fp8_prefixes=MISTRAL3_TOWERS if is_vlm else (),
        )

    def _is_named_fp8(self, fqn: str) -> bool:
        return _is_fp8_weight_key(fqn, self.not_fp8_prefixes)

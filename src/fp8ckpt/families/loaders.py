"""Models whose loaders in serving engines read names in a way of their own, as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Models whose loader renames every ``.weight_scale_inv`` to ``.weight_scale``: the name of the one scale of a tensor,
#: and no name of a grid of blocks. By engine; told by ``architectures`` or ``model_type``.
RENAMED_SCALES = {
    "vLLM 0.33": {"Mistral3ForConditionalGeneration", "mistral3"},
    "SGLang 0.5": {"LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM", "Phi3ForCausalLM"},
}


def engines_that_rename_scales(config: Mapping[str, Any]) -> list[str]:
    """The engines that take a ``weight_scale_inv`` of this model for the scale of a whole tensor."""
    names = config.get("architectures")
    stated = {name for name in (*(names if isinstance(names, list) else ()), config.get("model_type")) if name}
    return [engine for engine, models in RENAMED_SCALES.items() if models & {str(name) for name in stated}]

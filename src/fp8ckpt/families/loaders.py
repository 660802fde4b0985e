"""Models whose loaders, in serving engines and in transformers, read names in a way of their own, as rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

#: Models whose loader renames every ``.weight_scale_inv`` to ``.weight_scale``: the name of the one scale of a tensor,
#: and no name of a grid of blocks. By engine; told by ``architectures`` or ``model_type``.
RENAMED_SCALES = {
    "vLLM 0.33": {"Mistral3ForConditionalGeneration", "mistral3"},
    "SGLang 0.5": {"LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM", "Phi3ForCausalLM"},
}

#: Models of which transformers 5 leaves the experts random, with a warning, where a file holds each for itself: told by
#: ``architectures``.
EXPERTS_LEFT_RANDOM = {"Llama4ForCausalLM", "Llama4ForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"}
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")


def engines_that_rename_scales(config: Mapping[str, Any]) -> list[str]:
    """The engines that take a ``weight_scale_inv`` of this model for the scale of a whole tensor."""
    names = config.get("architectures")
    stated = {name for name in (*(names if isinstance(names, list) else ()), config.get("model_type")) if name}
    return [engine for engine, models in RENAMED_SCALES.items() if models & {str(name) for name in stated}]


def leaves_experts_random(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether transformers has no rule by which it loads the experts of a file with these tensors."""
    architectures = config.get("architectures")
    stated = {str(name) for name in architectures} if isinstance(architectures, list) else set()
    return not stated.isdisjoint(EXPERTS_LEFT_RANDOM) and any(map(_ONE_EXPERT.search, names))

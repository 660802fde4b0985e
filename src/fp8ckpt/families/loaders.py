"""Models whose loaders, in serving engines and in transformers, interpret names in their own way, as rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fp8ckpt.families.names import architectures

#: Models whose loader renames every ``.weight_scale_inv`` to ``.weight_scale``, which names the one scale of a tensor,
#: never a grid of blocks. By engine; identified by ``architectures`` or ``model_type``.
RENAMED_SCALES = {
    "vLLM 0.33": {"Mistral3ForConditionalGeneration", "mistral3"},
    "SGLang 0.5": {"LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM", "Phi3ForCausalLM"},
}

#: Models whose experts transformers 5 leaves random, with a warning, if a file holds one tensor for each expert.
#: Identified by ``architectures``.
EXPERTS_LEFT_RANDOM = {"Llama4ForCausalLM", "Llama4ForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"}
#: Models whose experts cannot be FP8 layers of transformers: they have biases, or are transposed. By how the names of
#: their ``architectures`` begin.
EXPERTS_NEVER_FP8 = ("GptOss", "Llama4", "Aria")
#: Models whose stacked experts transformers dequantizes as it does a Linear's weight, by ``model_type``.
_EXPERTS_DEQUANTIZED = {"jetmoe"}
#: Models with ``Conv1D`` of transformers: a weight is ``[in, out]``, and no engine treats it as a Linear. Identified by
#: ``model_type``, also of a section; and their modules, by the last component.
_OF_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder", "jais"}
_CONV1D = {"c_attn", "q_attn", "c_proj", "c_fc", "c_fc2"}
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")


def engines_that_rename_scales(config: Mapping[str, Any]) -> list[str]:
    """Return the engines that take a ``weight_scale_inv`` of this model for the scale of a whole tensor."""
    stated = {*architectures(config), str(config.get("model_type"))}
    return [engine for engine, models in RENAMED_SCALES.items() if models & stated]


def is_transposed(config: Mapping[str, Any], leaf: str) -> bool:
    """Whether a module with this last component is a ``Conv1D`` of this model."""
    sections = (config, *(section for section in config.values() if isinstance(section, Mapping)))
    return leaf in _CONV1D and any(str(section.get("model_type")) in _OF_CONV1D for section in sections)


def leaves_experts_random(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether transformers has no rule to load the experts of a file with these tensors."""
    return not architectures(config).isdisjoint(EXPERTS_LEFT_RANDOM) and any(map(_ONE_EXPERT.search, names))


def misreads_stacks(config: Mapping[str, Any], method: str | None) -> str | None:
    """Return, in words, when transformers 5 takes the codes of stacked experts with this ``quant_method`` for values.
    None for a method that it does not load, or has layers of stacks for.
    """
    if method == "compressed-tensors":
        return "transformers quantizes only Linears by compressed-tensors, and reads codes as values"
    if method not in ("fp8", None) or config.get("model_type") in _EXPERTS_DEQUANTIZED:
        return None
    if has_no_fp8_experts(config):
        return "transformers has no FP8 layer for this model's experts, and reads codes as values"
    where = "where it has no FP8 kernels (on a CPU, an older GPU, or with dequantize=True)"
    return f"transformers does not dequantize stacks: {where} it reads codes as values"


def has_no_fp8_experts(config: Mapping[str, Any]) -> bool:
    """Whether transformers cannot hold the stacked experts of this model in FP8."""
    return any(name.startswith(EXPERTS_NEVER_FP8) for name in architectures(config))

"""Models whose loaders, in serving engines and in transformers, read names in a way of their own, as rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fp8ckpt.families.names import architectures

#: Models whose loader renames every ``.weight_scale_inv`` to ``.weight_scale``: the name of the one scale of a tensor,
#: and no name of a grid of blocks. By engine; told by ``architectures`` or ``model_type``.
RENAMED_SCALES = {
    "vLLM 0.33": {"Mistral3ForConditionalGeneration", "mistral3"},
    "SGLang 0.5": {"LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM", "Phi3ForCausalLM"},
}

#: Models of which transformers 5 leaves the experts random, with a warning, where a file holds each for itself: told by
#: ``architectures``.
EXPERTS_LEFT_RANDOM = {"Llama4ForCausalLM", "Llama4ForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"}
#: Models whose experts are no FP8 layer of transformers: they have biases, or lie across. Told by ``architectures``.
EXPERTS_NEVER_FP8 = {"GptOssForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration"}
#: Models that multiply by ``Conv1D`` of transformers: a weight lies ``[in, out]``, and is no Linear to any engine. Told
#: by ``model_type``, of a section too; and their modules, by the last component.
_OF_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder", "jais"}
_CONV1D = {"c_attn", "q_attn", "c_proj", "c_fc", "c_fc2"}
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")


def engines_that_rename_scales(config: Mapping[str, Any]) -> list[str]:
    """The engines that take a ``weight_scale_inv`` of this model for the scale of a whole tensor."""
    stated = {*architectures(config), str(config.get("model_type"))}
    return [engine for engine, models in RENAMED_SCALES.items() if models & stated]


def is_transposed(config: Mapping[str, Any], leaf: str) -> bool:
    """Whether a module with this last component is a ``Conv1D`` of this model."""
    sections = (config, *(section for section in config.values() if isinstance(section, Mapping)))
    return leaf in _CONV1D and any(str(section.get("model_type")) in _OF_CONV1D for section in sections)


def leaves_experts_random(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether transformers has no rule by which it loads the experts of a file with these tensors."""
    return not architectures(config).isdisjoint(EXPERTS_LEFT_RANDOM) and any(map(_ONE_EXPERT.search, names))


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is of stacked experts that are a parameter of their own: of a ``.weight``, scales are known."""
    return len(shape) == 3 and not name.endswith(".weight")


def misreads_stacks(config: Mapping[str, Any], method: str | None) -> str | None:
    """When transformers 5 takes the codes of stacked experts, of a ``quant_method``, for values: in words. None for a
    method that it has layers of stacks for, or does not load.
    """
    if method == "compressed-tensors":
        return "transformers quantizes nothing but Linears by compressed-tensors, and takes codes for values"
    if method not in ("fp8", None):
        return None
    if has_no_fp8_experts(config):
        return "transformers has no FP8 layer for this model's experts, and takes codes for values"
    where = "where it has no FP8 kernels (on a CPU, an older GPU, or with dequantize=True)"
    return f"transformers dequantizes no stack: {where} it takes codes for values"


def has_no_fp8_experts(config: Mapping[str, Any]) -> bool:
    """Whether transformers cannot hold the experts of this model in FP8, stacked as they are."""
    return not architectures(config).isdisjoint(EXPERTS_NEVER_FP8)

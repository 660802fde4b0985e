"""The families of the matrix as miniatures in the layouts in which they are released: a row each.

A miniature is made of a tiny transformers model: its tensors, cut apart and renamed here by plain slicing, without the
package and without transformers' own tables, get codes and scales as the release has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers

from tests.oracle import Stored, write_safetensors

BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


def _compressed(strategy: str, dynamic: bool) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Grid:
    """How scales lie: what they are called, their dtype, and the block of one, of a weight's shape."""

    scale: str
    dtype: str
    block: Callable[[tuple[int, ...]], tuple[int, ...]]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None  # where it is not the grid's own
    activation: str | None = None


SQUARES = Grid("_scale_inv", "BF16", lambda shape: (128, 128))
SQUARES_F32 = Grid("_scale_inv", "F32", lambda shape: (128, 128))
ROWS = Grid("_scale", "F32", lambda shape: (1, shape[1]))
ROWS_BF16 = Grid("_scale", "BF16", lambda shape: (1, shape[1]))
ONE = Grid("_scale", "BF16", lambda shape: shape, lambda shape: (1,), "input_scale")
SCALAR = Grid("_scale_inv", "BF16", lambda shape: shape, lambda shape: (), "activation_scale")
MODELOPT = Grid("_scale", "F32", lambda shape: shape, lambda shape: (), "input_scale")
EXPERTS = Grid("_scale_inv", "BF16", lambda shape: (1, *shape[1:]), None, "activation_scale")


@dataclass(frozen=True)
class Release:
    """``model``: a class of transformers and its sizes; ``names``: (pattern, replacement) from its names to those of
    the release; ``experts``: what its stacked experts are called there, (gate, up, down), or None where they stay
    stacked; ``transposed``: whether the class holds them [E, in, out]; ``understood``: whether transformers itself
    loads the release's names.
    """

    model: str
    sizes: dict[str, Any]
    grid: Grid
    quantization: dict[str, Any]
    names: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, str, str] | None = None
    transposed: bool = False
    quantized: str = r"layers\.\d+\.(?!.*vision).*(_proj|_proj_with_mqa|\.w[123]|_proj_qkvz|out_proj)(\.weight)?$"
    plain: str = r"visual|vision_tower|multi_modal_projector|lm_head|conv1d|in_proj_[ba]"
    float32: str = r"e_score_correction_bias$"
    head: bool = False  # a tied head is stored all the same
    mtp: str | None = None  # the prefix of the MTP layer, which is the last layer of the model once more
    cache: bool = False  # scales of the KV cache
    modelopt: bool = False
    understood: bool = True
    rounded: tuple[str, ...] = field(default=())  # stored in more bits than transformers' model has

    def configuration(self) -> Any:
        """The configuration of the model alone."""
        cls = getattr(transformers, self.model)
        config = cls.config_class(**self.sizes)
        config.architectures = [self.model]
        return config

    def skeleton(self) -> Any:
        """The model on the meta device, in BF16."""
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                return getattr(transformers, self.model)(self.configuration())
        finally:
            torch.set_default_dtype(torch.float32)

    def write(self, directory: Path, files: int = 2) -> Path:
        """Write it; tensors go to the files in turn."""
        rng = np.random.default_rng(3)
        stored: dict[str, Stored] = {}
        for name, shape in self._shapes().items():
            stored.update(self._stored(rng, name, shape))
        if self.head:
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
        if self.mtp is not None:
            last = max(int(found[1]) for name in stored if (found := re.match(r".*?layers\.(\d+)\.", name)))
            for name in list(stored):
                head, found, tail = name.partition(f"layers.{last}.")
                if found and "vis" not in head:
                    stored[self.mtp + tail] = stored[name]
            stored[self.mtp + "eh_proj.weight"] = Stored.of(rng.standard_normal((32, 64)), "BF16")
        directory.mkdir(parents=True)
        names, weight_map = sorted(stored), {}
        for i in range(files):
            file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
            write_safetensors(directory / file, {name: stored[name] for name in names[i::files]}, {"format": "pt"})
            weight_map.update(dict.fromkeys(names[i::files], file))
        total = sum(len(tensor.data) for tensor in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        config = json.loads(self.configuration().to_json_string())
        config |= {"architectures": [self.model], "dtype": "bfloat16"}
        if self.modelopt:
            quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
            (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
        else:
            config["quantization_config"] = self.quantization
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    def expected(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors by name, of values that ``read`` gives of the release: plain stacking."""
        found = {}
        model = self.skeleton()
        tied = model.all_tied_weights_keys or {}
        for name, tensor in model.state_dict().items():
            parts = [read(self._name(part)) for part, _ in self._released(tied.get(name, name), tuple(tensor.shape))]
            if len(parts) == 1:
                found[name] = parts[0]
                continue
            if name.endswith("gate_up_proj"):
                parts = [torch.cat([gate, up]) for gate, up in zip(parts[::2], parts[1::2], strict=True)]
            stacked = torch.stack(parts)
            found[name] = stacked.transpose(1, 2).contiguous() if self.transposed else stacked
        kept = self.float32 if not self.rounded else "-"
        return {name: value if re.search(kept, name) else value.bfloat16() for name, value in found.items()}

    def _name(self, name: str) -> str:
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement, name)
        return name

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the release by name."""
        model = self.skeleton()
        found = {}
        for name, tensor in model.state_dict().items():
            if name in (model.all_tied_weights_keys or {}) and not self.head:
                continue
            found.update((self._name(part), shape) for part, shape in self._released(name, tuple(tensor.shape)))
        return found

    def _released(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        stem, _, leaf = name.rpartition(".")
        if self.experts is None or leaf not in ("gate_up_proj", "down_proj") or not stem.endswith("experts"):
            return [(name, shape)]
        count, rows, columns = (shape[0], shape[2], shape[1]) if self.transposed else shape
        gate, up, down = self.experts
        if leaf == "down_proj":
            return [(f"{stem}.{i}.{down}.weight", (rows, columns)) for i in range(count)]
        return [(f"{stem}.{i}.{part}.weight", (rows // 2, columns)) for i in range(count) for part in (gate, up)]

    def _stored(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> dict[str, Stored]:
        quantized = len(shape) > 1 and re.search(self.quantized, name) and not re.search(self.plain, name)
        if not quantized:
            dtype = "F32" if re.search(self.float32, name) or name.endswith(self.rounded or "-") else "BF16"
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            values = centre + 0.05 * rng.standard_normal(shape)
            return {name: Stored.of(values.astype(np.float32), dtype)}
        block = self.grid.block(shape)
        grid = tuple(-(-dim // min(size, dim)) for dim, size in zip(shape, block, strict=True))
        values = np.clip(rng.standard_normal(shape) * 80, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        scale_shape = self.grid.shape(shape) if self.grid.shape is not None else grid
        scales = np.exp2(rng.uniform(-11, -10, prod(scale_shape))).reshape(scale_shape)
        stem = name.removesuffix(".weight")
        found = {
            name: Stored.codes(values.view(np.uint8)),
            name + self.grid.scale: Stored.of(scales.astype(np.float32), self.grid.dtype),
        }
        if self.grid.activation is not None:
            key = f"{stem}.{self.grid.activation}" if stem != name else f"{name}_{self.grid.activation}"
            found[key] = Stored.of(np.full(scale_shape if stem != name else (1,), 0.02, np.float32), self.grid.dtype)
        for leaf in ("k", "v") if self.cache else ():
            if stem.endswith(f"{leaf}_proj"):
                found[f"{stem}.{leaf}_scale"] = Stored.of(np.array(0.5, np.float32), "F32")
        return found


_TEXT = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MOE = {**_TEXT, "moe_intermediate_size": 40, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_RAGGED = {"hidden_size": 160, "intermediate_size": 200}
_LATENT = {
    **_MOE, **_RAGGED, "moe_intermediate_size": 136, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
_LATENT.pop("head_dim"), _LATENT.pop("num_experts"), _LATENT.pop("num_local_experts")
_QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
_PROJ = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1,
}  # fmt: skip
_NESTED = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision|multi)", r"\1"),
    (r"^lm_head", "language_model.lm_head"),
)
_PIXTRAL = {
    "model_type": "pixtral", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 2, "head_dim": 16, "image_size": 56, "patch_size": 14,
}  # fmt: skip


def _mistral3(tied: bool = False) -> dict[str, Any]:
    text = {**_TEXT, "model_type": "ministral3", "tie_word_embeddings": tied}
    return {"text_config": text, "vision_config": _PIXTRAL, "tie_word_embeddings": tied, "image_token_index": 10}


RELEASES = {
    "Mistral3 identity": Release("Mistral3ForConditionalGeneration", _mistral3(), SCALAR, PER_TENSOR),
    "Mistral3 nested": Release("Mistral3ForConditionalGeneration", _mistral3(), SCALAR, PER_TENSOR, _NESTED),
    "Mistral3 nested tied": Release("Mistral3ForConditionalGeneration", _mistral3(True), SCALAR, PER_TENSOR, _NESTED),
    "Ministral3 text": Release("Ministral3ForCausalLM", _TEXT, SCALAR, PER_TENSOR),
    "Qwen3": Release("Qwen3ForCausalLM", {**_TEXT, **_RAGGED, "tie_word_embeddings": False}, SQUARES, BLOCK),
    "Qwen3 tied, head stored": Release("Qwen3ForCausalLM", {**_TEXT, "tie_word_embeddings": True}, SQUARES, BLOCK,
        head=True),
    "Qwen3 tied": Release("Qwen3ForCausalLM", {**_TEXT, "tie_word_embeddings": True}, SQUARES, BLOCK),
    "Qwen3-MoE": Release("Qwen3MoeForCausalLM", {**_MOE, **_RAGGED, "moe_intermediate_size": 136}, SQUARES, BLOCK,
        experts=_PROJ),
    "Qwen3-VL": Release("Qwen3VLForConditionalGeneration", {"text_config": _TEXT, "vision_config": _QWEN_VISION},
        SQUARES, BLOCK),
    "Qwen3-VL-MoE": Release("Qwen3VLMoeForConditionalGeneration", {"text_config": _MOE, "vision_config": _QWEN_VISION},
        SQUARES, BLOCK, experts=_PROJ, understood=False),
    "Qwen3-Next": Release("Qwen3NextForCausalLM", {**_MOE, **_HYBRID}, SQUARES, BLOCK, experts=_PROJ,
        mtp="mtp.layers.0."),
    "Qwen3.5-MoE": Release("Qwen3_5MoeForConditionalGeneration",
        {"text_config": {**_MOE, **_HYBRID}, "vision_config": _QWEN_VISION}, SQUARES, BLOCK, experts=_PROJ,
        mtp="mtp.layers.0."),
    "DeepSeek-V3": Release("DeepseekV3ForCausalLM", {**_LATENT, "num_nextn_predict_layers": 1}, SQUARES_F32, BLOCK,
        experts=_PROJ, mtp="model.layers.2."),
    "GLM-4.5-MoE": Release("Glm4MoeForCausalLM", {**_LATENT, "head_dim": 16, "num_nextn_predict_layers": 1}, ROWS,
        _compressed("channel", True), experts=_PROJ, mtp="model.layers.2."),
    "MiniMax-M2": Release("MiniMaxM2ForCausalLM", {**_MOE, **_RAGGED, "rotary_dim": 8}, SQUARES_F32, BLOCK,
        ((r"\.mlp\.", ".block_sparse_moe."), (r"gate\.e_score", "e_score")), _MIXTRAL, rounded=("gate.weight",)),
    "Mixtral": Release("MixtralForCausalLM", _MOE, ONE, _compressed("tensor", False),
        ((r"\.mlp\.", ".block_sparse_moe."),), _MIXTRAL),
    "Llama, compressed-tensors dynamic": Release("LlamaForCausalLM", _TEXT, ROWS_BF16, _compressed("channel", True)),
    "Llama, compressed-tensors static": Release("LlamaForCausalLM", _TEXT, ONE, _compressed("tensor", False)),
    "Llama, fbgemm": Release("LlamaForCausalLM", _TEXT, ROWS,
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "Llama, ModelOpt": Release("LlamaForCausalLM", _TEXT, MODELOPT, {}, cache=True, modelopt=True),
    "Llama-4": Release("Llama4ForConditionalGeneration",
        {"text_config": {**_MOE, "intermediate_size_mlp": 96, "intermediate_size": 32, "interleave_moe_layer_step": 2},
         "vision_config": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 128,
                           "num_attention_heads": 2, "vision_output_dim": 32, "image_size": 56, "patch_size": 14,
                           "projector_input_dim": 32, "projector_output_dim": 32},
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        ROWS_BF16, _compressed("channel", True), experts=_PROJ, transposed=True, understood=False),
    "Mistral4": Release("Mistral4ForCausalLM", {**_LATENT, "num_local_experts": 4, "n_routed_experts": 4}, EXPERTS,
        PER_TENSOR),
}  # fmt: skip


def experts_apart(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Stacks [E, out, in] of experts as a tensor each, gate apart from up."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        leaves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf, ())
        for i, one in enumerate(tensor.array if leaves else ()):
            for part, array in zip(leaves, np.split(one, len(leaves)), strict=True):
                found[f"{stem}.{i}.{part}.weight"] = Stored.of(array, tensor.dtype)
        if not leaves:
            found[name] = tensor
    return found

"""Models of released families, in any size, as facts: tensors, configuration, and the small files beside them.

`fp8ckpt.sample` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from fp8ckpt.families.names import IDENTITY, NESTED
from fp8ckpt.tensors.config import dump_json

LAYOUTS = {"identity": IDENTITY, "nested": NESTED}
_IMAGE_TOKEN, _PAD_TOKEN = 10, 11
_SPECIAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
)  # fmt: skip


class Weight(NamedTuple):
    """A tensor of the model. ``fill`` is a constant, or None for normal deviates of variance 1 / fan-in."""

    name: str
    shape: tuple[int, ...]
    fp8: bool = False
    fill: float | None = None
    dtype: str = "BF16"


@dataclass(frozen=True)
class Mistral3Sizes:
    """Sizes of a Mistral3 vision-language model; the default is a miniature of 0.9 MB."""

    block: ClassVar[tuple[int, int] | None] = None
    layers: int = 2
    hidden: int = 128
    intermediate: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocabulary: int = 512
    vision_layers: int = 2
    vision_hidden: int = 64
    vision_intermediate: int = 128
    vision_heads: int = 2
    image_size: int = 56

    @classmethod
    def true_shape(cls) -> Mistral3Sizes:
        """Return the sizes of Mistral Medium 3.5 128B; the width of the vision tower is Pixtral Large's."""
        return cls(88, 12288, 28672, 96, 8, 128, 131072, 48, 1664, 8192, 16, 1540)

    def weights(self, layout: str) -> Iterator[Weight]:
        """Yield the tensors in the order of the file, under the names of a layout."""
        named = LAYOUTS[layout].native_to_hf
        for weight in self._weights():
            yield weight._replace(name=named(weight.name))

    def _weights(self) -> Iterator[Weight]:
        text, vision, projector = "model.language_model", "model.vision_tower", "model.multi_modal_projector"
        hidden, wide, seen = self.hidden, self.intermediate, self.vision_hidden
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield Weight(f"{text}.embed_tokens.weight", (self.vocabulary, hidden))
        for i in range(self.layers):
            layer = f"{text}.layers.{i}"
            yield Weight(f"{layer}.input_layernorm.weight", (hidden,), fill=1.0)
            for name, rows, cols in (
                ("q_proj", q, hidden), ("k_proj", kv, hidden), ("v_proj", kv, hidden), ("o_proj", hidden, q),
            ):  # fmt: skip
                yield Weight(f"{layer}.self_attn.{name}.weight", (rows, cols), fp8=True)
            yield Weight(f"{layer}.post_attention_layernorm.weight", (hidden,), fill=1.0)
            yield from _gated(f"{layer}.mlp", hidden, wide, fp8=True)
        yield Weight(f"{text}.norm.weight", (hidden,), fill=1.0)
        yield Weight("lm_head.weight", (self.vocabulary, hidden))
        yield Weight(f"{vision}.patch_conv.weight", (seen, 3, 14, 14))
        yield Weight(f"{vision}.ln_pre.weight", (seen,), fill=1.0)
        for i in range(self.vision_layers):
            layer = f"{vision}.transformer.layers.{i}"
            yield Weight(f"{layer}.attention_norm.weight", (seen,), fill=1.0)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield Weight(f"{layer}.attention.{name}.weight", (seen, seen))
            yield Weight(f"{layer}.ffn_norm.weight", (seen,), fill=1.0)
            yield from _gated(f"{layer}.feed_forward", seen, self.vision_intermediate, fp8=False)
        yield Weight(f"{projector}.norm.weight", (seen,), fill=1.0)
        yield Weight(f"{projector}.patch_merger.merging_layer.weight", (seen, 4 * seen))
        yield Weight(f"{projector}.linear_1.weight", (hidden, seen))
        yield Weight(f"{projector}.linear_2.weight", (hidden, hidden))

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16",
            "image_token_index": _IMAGE_TOKEN, "model_type": "mistral3", "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "quantization_config": {
                "activation_scheme": "static", "dequantize": False,
                "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
                "quant_method": "fp8", "weight_block_size": None,
            },
            "spatial_merge_size": 2,
            "text_config": {
                "head_dim": self.head_dim, "hidden_act": "silu", "hidden_size": self.hidden,
                "intermediate_size": self.intermediate, "max_position_embeddings": 262144,
                "model_type": "ministral3", "num_attention_heads": self.heads, "num_hidden_layers": self.layers,
                "num_key_value_heads": self.kv_heads, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
                "vocab_size": self.vocabulary,
            },
            "tie_word_embeddings": False,
            "vision_config": {
                "hidden_size": self.vision_hidden, "image_size": self.image_size,
                "intermediate_size": self.vision_intermediate, "model_type": "pixtral",
                "num_attention_heads": self.vision_heads, "num_channels": 3,
                "num_hidden_layers": self.vision_layers, "patch_size": 14,
            },
            "vision_feature_layer": -1,
        }  # fmt: skip


@dataclass(frozen=True)
class DeepseekSizes:
    """Sizes of a model shaped like DeepSeek V3; the default is a miniature whose dimensions are no multiples of 128."""

    block: ClassVar[tuple[int, int]] = (128, 128)
    layers: int = 2
    dense_layers: int = 1
    hidden: int = 320
    intermediate: int = 416
    expert_intermediate: int = 160
    experts: int = 4
    heads: int = 4
    q_rank: int = 192
    kv_rank: int = 96
    nope_dim: int = 32
    rope_dim: int = 16
    v_dim: int = 32
    vocabulary: int = 512

    @classmethod
    def true_shape(cls) -> DeepseekSizes:
        """Return the sizes of DeepSeek V3, without its layer of multi-token prediction: about 91,000 tensors."""
        return cls(61, 3, 7168, 18432, 2048, 256, 128, 1536, 512, 128, 64, 128, 129280)

    def weights(self, layout: str) -> Iterator[Weight]:
        """Yield the tensors in the order of the file; there is one layout."""
        hidden = self.hidden
        yield Weight("model.embed_tokens.weight", (self.vocabulary, hidden))
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            attention = f"{layer}.self_attn"
            yield Weight(f"{layer}.input_layernorm.weight", (hidden,), fill=1.0)
            yield Weight(f"{attention}.q_a_proj.weight", (self.q_rank, hidden), fp8=True)
            yield Weight(f"{attention}.q_a_layernorm.weight", (self.q_rank,), fill=1.0)
            yield Weight(
                f"{attention}.q_b_proj.weight", (self.heads * (self.nope_dim + self.rope_dim), self.q_rank), fp8=True
            )
            yield Weight(f"{attention}.kv_a_proj_with_mqa.weight", (self.kv_rank + self.rope_dim, hidden), fp8=True)
            yield Weight(f"{attention}.kv_a_layernorm.weight", (self.kv_rank,), fill=1.0)
            yield Weight(
                f"{attention}.kv_b_proj.weight", (self.heads * (self.nope_dim + self.v_dim), self.kv_rank), fp8=True
            )
            yield Weight(f"{attention}.o_proj.weight", (hidden, self.heads * self.v_dim), fp8=True)
            yield Weight(f"{layer}.post_attention_layernorm.weight", (hidden,), fill=1.0)
            if i < self.dense_layers:
                yield from _gated(f"{layer}.mlp", hidden, self.intermediate, fp8=True)
            else:
                yield Weight(f"{layer}.mlp.gate.weight", (self.experts, hidden))
                yield Weight(f"{layer}.mlp.gate.e_score_correction_bias", (self.experts,), fill=0.5, dtype="F32")
                for expert in range(self.experts):
                    yield from _gated(f"{layer}.mlp.experts.{expert}", hidden, self.expert_intermediate, fp8=True)
                yield from _gated(f"{layer}.mlp.shared_experts", hidden, self.expert_intermediate, fp8=True)
        yield Weight("model.norm.weight", (hidden,), fill=1.0)
        yield Weight("lm_head.weight", (self.vocabulary, hidden))

    def config(self) -> dict[str, Any]:
        groups = 8 if self.experts % 8 == 0 else 1
        return {
            "architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16",
            "first_k_dense_replace": self.dense_layers, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "kv_lora_rank": self.kv_rank, "model_type": "deepseek_v3",
            "moe_intermediate_size": self.expert_intermediate, "n_group": groups, "n_routed_experts": self.experts,
            "n_shared_experts": 1, "num_attention_heads": self.heads,
            "num_experts_per_tok": min(8, self.experts // 2), "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads, "num_nextn_predict_layers": 0, "q_lora_rank": self.q_rank,
            "qk_nope_head_dim": self.nope_dim, "qk_rope_head_dim": self.rope_dim,
            "quantization_config": {
                "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                "weight_block_size": list(self.block),
            },
            "topk_group": max(1, groups // 2), "v_head_dim": self.v_dim, "vocab_size": self.vocabulary,
        }  # fmt: skip


def _gated(name: str, hidden: int, wide: int, *, fp8: bool) -> Iterator[Weight]:
    yield Weight(f"{name}.gate_proj.weight", (wide, hidden), fp8)
    yield Weight(f"{name}.up_proj.weight", (wide, hidden), fp8)
    yield Weight(f"{name}.down_proj.weight", (hidden, wide), fp8)


def side_files(vocabulary: int) -> dict[str, bytes]:
    """Return a working byte-level tokenizer, and the other small files of a release."""
    # GPT-2's printable stand-ins for bytes, which byte-level tokenizers share.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*_SPECIAL_TOKENS, *stand_ins]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": token, **flags, "special": True} for i, token in enumerate(_SPECIAL_TOKENS)]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens) if i < vocabulary}, "merges": []},
    }  # fmt: skip
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return {
        "README.md": b"A miniature checkpoint, written by `fp8ckpt sample`. Its weights are random.\n",
        "chat_template.jinja": b"{% for message in messages %}[INST]{{ message['content'] }}[/INST]{% endfor %}\n",
        "generation_config.json": dump_json({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": _PAD_TOKEN}),
        "tokenizer.json": dump_json(tokenizer),
        "tokenizer_config.json": dump_json({**special, "tokenizer_class": "PreTrainedTokenizerFast"}),
    }

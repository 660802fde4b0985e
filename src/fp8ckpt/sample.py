"""Write a miniature, valid FP8 checkpoint in a released layout: what the demo runs on, and what tests and benchmarks
start from.

Two families. `Mistral3Sizes`: a Mistral3 vision-language model with per-tensor e4m3 text Linears, 0-d BF16 scales and
activation scales, all else BF16. `DeepseekSizes`: a DeepSeek-V3-shaped model with F32 scales of 128 x 128 blocks,
ragged edges included. Weights are normal deviates quantized with ``amax / 448``, so a model made of them runs. Where
there are several files, the scale of a file's last FP8 weight lies in the next file, as happens in releases.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ckpt.numerics.geometry import BlockGrid
from fp8ckpt.output.files import OutputFiles
from fp8ckpt.output.forecast import Forecast
from fp8ckpt.output.layout import FileLayout, TensorSpec, index_text, lay_out
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan
from fp8ckpt.stores.address import local_path
from fp8ckpt.tensors.config import CONFIG, dump_json
from fp8ckpt.tensors.directory import INDEX
from fp8ckpt.tensors.stored import TensorSpan, tensor_nbytes

if TYPE_CHECKING:
    from fp8ckpt.engine import Progress

LAYOUTS = ("identity", "nested")
_BLOCK = (128, 128)
_POOL = 1 << 22  # deviates that all weights are cut from; drawing each anew would take minutes for real sizes
_BAND = 128  # rows of a weight that are made at once
_IMAGE_TOKEN, _PAD_TOKEN = 10, 11
_SPECIAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
)  # fmt: skip


@dataclass(frozen=True)
class Mistral3Sizes:
    """Sizes of a Mistral3 vision-language model; by default a miniature of 0.9 MB."""

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
        """Mistral Medium 3.5 128B; the width of its vision tower is Pixtral Large's."""
        return cls(88, 12288, 28672, 96, 8, 128, 131072, 48, 1664, 8192, 16, 1540)


@dataclass(frozen=True)
class DeepseekSizes:
    """Sizes of a DeepSeek-V3-shaped model; by default a miniature whose dimensions are no multiples of 128."""

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
        """DeepSeek V3, without its layer of multi-token prediction: about 91,000 tensors."""
        return cls(61, 3, 7168, 18432, 2048, 256, 128, 1536, 512, 128, 64, 128, 129280)


class _Weight(NamedTuple):
    """A tensor of the model. ``fill`` is a constant, or None for normal deviates of variance 1 / fan-in."""

    name: str
    shape: tuple[int, ...]
    fp8: bool = False
    fill: float | None = None
    dtype: str = "BF16"


def sample(
    destination: str | Path,
    sizes: Mistral3Sizes | DeepseekSizes | None = None,
    *,
    layout: str = "identity",
    files: int = 3,
    sparse: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint of ``sizes`` to the new directory ``destination``, and return it.

    ``layout`` (Mistral3 only): "identity", the names of the model's own state dict, as Mistral Medium 3.5 has them; or
    "nested", as Ministral 3 and Devstral have them. ``files``: how many safetensors files. ``sparse``: true headers,
    scales and side files, and holes where weights would be. ``progress`` is called with (bytes of weights written, in
    all, what is being done). Raises `fp8ckpt.errors.OutputExistsError` where the destination exists, and
    `fp8ckpt.errors.NoRoomError` where there is no room for it.

    >>> from fp8ckpt.sample import Mistral3Sizes
    >>> path = fp8ckpt.sample("small", Mistral3Sizes(layers=1), files=2)
    >>> len(fp8ckpt.open_checkpoint(path).quantized)
    7
    """
    planned = _plan(sizes or Mistral3Sizes(), layout, files, sparse, seed)
    output = PartialOutput(local_path(destination))
    planned.output.begin(output)
    opened = OutputFiles(output.directory)
    try:
        spans: dict[str, TensorSpan] = {}
        for file in planned.output.layouts:
            opened.of(file.name).write(_array(file.head), 0)
            spans.update((span.name, span) for span in file.spans)
        done, total = 0, sum(map(_nbytes, planned.weights))
        for weight in planned.weights:
            for name, offset, data in _bytes_of(weight, planned.block, sparse, seed):
                opened.of(spans[name].file.name).write(data, spans[name].start + offset)
            done += _nbytes(weight)
            if progress is not None:
                progress(done, total, f"writing {spans[weight.name].file.name}")
        opened.flush()
        planned.output.publish(output)
    finally:
        opened.close()
        output.release()
    return Path(output.destination)


def plan_sample(
    destination: str | Path,
    sizes: Mistral3Sizes | DeepseekSizes | None = None,
    *,
    layout: str = "identity",
    files: int = 3,
    sparse: bool = False,
) -> Forecast:
    """What `sample` would write with the same arguments: files, bytes, room, time. Writes nothing.

    >>> fp8ckpt.plan_sample("planned").files
    10
    """
    planned = _plan(sizes or Mistral3Sizes(), layout, files, sparse, 0)
    return planned.output.forecast(PartialOutput(local_path(destination)), {}, {})


class _Planned(NamedTuple):
    output: OutputPlan
    weights: list[_Weight]
    block: tuple[int, int] | None


def _plan(sizes: Mistral3Sizes | DeepseekSizes, layout: str, files: int, sparse: bool, seed: int) -> _Planned:
    """Everything that can be known or refused before the first byte is written."""
    if files < 1:
        raise ValueError(f"files={files}; expected at least 1")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}; expected one of {', '.join(LAYOUTS)}")
    if isinstance(sizes, Mistral3Sizes):
        if sizes.heads % sizes.kv_heads:
            raise ValueError(f"heads={sizes.heads} is no multiple of kv_heads={sizes.kv_heads}")
        weights, config, block = list(_mistral3(sizes, layout)), _mistral3_config(sizes), None
    else:
        weights, config, block = list(_deepseek(sizes)), _deepseek_config(sizes), _BLOCK
    layouts = _partition(weights, block, files)
    texts = {**_side_files(sizes.vocabulary), CONFIG: dump_json(config), INDEX: index_text(layouts)}
    arguments = {
        "job": "sample",
        "sizes": repr(sizes),
        "layout": layout,
        "files": files,
        "sparse": sparse,
        "seed": seed,
    }
    holes = sum(_nbytes(weight) for weight in weights) if sparse else 0
    return _Planned(OutputPlan((), arguments, tuple(layouts), texts, holes=holes), weights, block)


def _array(data: bytes) -> Any:
    import numpy as np

    return np.frombuffer(data, np.uint8)


def _nbytes(weight: _Weight) -> int:
    return tensor_nbytes("F8_E4M3" if weight.fp8 else weight.dtype, weight.shape)


def _scale_specs(weight: _Weight, block: tuple[int, int] | None) -> list[TensorSpec]:
    if not weight.fp8:
        return []
    if block is not None:
        return [TensorSpec(weight.name + "_scale_inv", "F32", BlockGrid(weight.shape, block).shape)]
    return [
        TensorSpec(weight.name + "_scale_inv", "BF16", ()),
        TensorSpec(weight.name.removesuffix("weight") + "activation_scale", "BF16", ()),
    ]


def _partition(weights: list[_Weight], block: tuple[int, int] | None, files: int) -> list[FileLayout]:
    """Fill the files one after the other with about the same number of bytes; a scale may go to the file after its
    weight's.
    """
    total = sum(map(_nbytes, weights))
    contents: list[list[TensorSpec]] = [[]]
    filled = 0
    carried: list[TensorSpec] = []
    for weight in weights:
        if filled >= total * len(contents) / files and len(contents) < files:
            contents.append(carried)
            carried = []
        spec = TensorSpec(weight.name, "F8_E4M3" if weight.fp8 else weight.dtype, weight.shape)
        filled += tensor_nbytes(spec.dtype, spec.shape)
        ends_file = filled >= total * len(contents) / files and len(contents) < files
        contents[-1].append(spec)
        (carried if ends_file else contents[-1]).extend(_scale_specs(weight, block))
    contents[-1].extend(carried)
    if len(contents) == 1:
        return [lay_out("model.safetensors", contents[0], {"format": "pt"})]
    return [
        lay_out(f"model-{i:05d}-of-{len(contents):05d}.safetensors", specs, {"format": "pt"})
        for i, specs in enumerate(contents, 1)
    ]


def _bytes_of(
    weight: _Weight, block: tuple[int, int] | None, sparse: bool, seed: int
) -> Iterator[tuple[str, int, Any]]:
    """(stored tensor, offset in it in bytes, bytes) of a weight and its scales."""
    import numpy as np

    from fp8ckpt.numerics.quantize import encode, parts_of_run, values_of

    scale_name = weight.name + "_scale_inv"
    if weight.fp8 and block is None:
        activation = 0.01 + (zlib.crc32(weight.name.encode()) % 1000) / 50000
        yield (
            weight.name.removesuffix("weight") + "activation_scale",
            0,
            _bf16(np.array([activation], np.float32)).view(np.uint8),
        )
    if sparse:
        if weight.fp8:
            grid = BlockGrid(weight.shape, block or weight.shape)
            ones = np.full(grid.shape, 2.0**-10, np.float32)
            yield scale_name, 0, (ones if block else _bf16(ones)).reshape(-1).view(np.uint8)
        return
    if not weight.fp8:
        for offset, values in _bands(weight, seed):
            stored = values if weight.dtype == "F32" else _bf16(values)
            yield weight.name, offset * stored.itemsize, stored.reshape(-1).view(np.uint8)
        return
    tensor_scale = None
    if block is None:
        largest = max(float(np.abs(values).max()) for _, values in _bands(weight, seed))
        stored = _bf16(np.array([largest / 448], np.float32), up=True)
        tensor_scale = (stored.astype(np.uint32) << 16).view(np.float32)[0]
        yield scale_name, 0, stored.view(np.uint8)
    for offset, values in _bands(weight, seed):
        codes = np.empty(values.size, np.uint8)
        if block is None:
            grid, scales = BlockGrid(values.shape, values.shape), np.full((1, 1), tensor_scale, np.float32)
        else:
            grid = BlockGrid(values.shape, (len(values), _BLOCK[1]))
            edges = np.arange(0, values.shape[1], _BLOCK[1])
            scales = (np.maximum.reduceat(np.abs(values).max(axis=0), edges) / np.float32(448)).astype(np.float32)[
                np.newaxis
            ]
            yield (
                scale_name,
                offset // (values.shape[1] * _BLOCK[0]) * len(edges) * 4,
                scales.reshape(-1).view(np.uint8),
            )
        encode(parts_of_run(grid, 0, values.size), values_of(values.reshape(-1).view(np.uint8), "F32"), scales, codes)
        yield weight.name, offset, codes


def _bf16(values: Any, *, up: bool = False) -> Any:
    """Positive or negative float32 values as bfloat16 bits: nearest even, or away from zero."""
    import numpy as np

    bits = values.view(np.uint32)
    return ((bits + (np.uint32(0xFFFF) if up else np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16).astype(np.uint16)


_pools: dict[int, Any] = {}


def _bands(weight: _Weight, seed: int) -> Iterator[tuple[int, Any]]:
    """(first element, values f32 [rows, row size]) of `_BAND` rows after another, the same at every call."""
    import numpy as np

    rows = weight.shape[0]
    width = 1
    for dim in weight.shape[1:]:
        width *= dim
    if weight.fill is None and seed not in _pools:
        _pools[seed] = np.random.default_rng(seed).standard_normal(_POOL, np.float32)
    start = zlib.crc32(f"{seed} {weight.name}".encode()) % _POOL
    for row in range(0, rows, _BAND):
        shape = (min(_BAND, rows - row), width)
        if weight.fill is not None:
            yield row * width, np.full(shape, weight.fill, np.float32)
        else:
            first = (start + row * width) % _POOL
            values = np.resize(np.concatenate((_pools[seed][first:], _pools[seed][:first])), shape)
            yield row * width, values * np.float32(width**-0.5)


def _mistral3(sizes: Mistral3Sizes, layout: str) -> Iterator[_Weight]:
    text, vision, projector, head = (
        ("model.language_model", "model.vision_tower", "model.multi_modal_projector", "lm_head")
        if layout == "identity"
        else ("language_model.model", "vision_tower", "multi_modal_projector", "language_model.lm_head")
    )
    hidden, wide = sizes.hidden, sizes.intermediate
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    yield _Weight(f"{text}.embed_tokens.weight", (sizes.vocabulary, hidden))
    for i in range(sizes.layers):
        layer = f"{text}.layers.{i}"
        yield _Weight(f"{layer}.input_layernorm.weight", (hidden,), fill=1.0)
        yield _Weight(f"{layer}.self_attn.q_proj.weight", (q, hidden), fp8=True)
        yield _Weight(f"{layer}.self_attn.k_proj.weight", (kv, hidden), fp8=True)
        yield _Weight(f"{layer}.self_attn.v_proj.weight", (kv, hidden), fp8=True)
        yield _Weight(f"{layer}.self_attn.o_proj.weight", (hidden, q), fp8=True)
        yield _Weight(f"{layer}.post_attention_layernorm.weight", (hidden,), fill=1.0)
        yield _Weight(f"{layer}.mlp.gate_proj.weight", (wide, hidden), fp8=True)
        yield _Weight(f"{layer}.mlp.up_proj.weight", (wide, hidden), fp8=True)
        yield _Weight(f"{layer}.mlp.down_proj.weight", (hidden, wide), fp8=True)
    yield _Weight(f"{text}.norm.weight", (hidden,), fill=1.0)
    yield _Weight(f"{head}.weight", (sizes.vocabulary, hidden))
    seen = sizes.vision_hidden
    yield _Weight(f"{vision}.patch_conv.weight", (seen, 3, 14, 14))
    yield _Weight(f"{vision}.ln_pre.weight", (seen,), fill=1.0)
    for i in range(sizes.vision_layers):
        layer = f"{vision}.transformer.layers.{i}"
        yield _Weight(f"{layer}.attention_norm.weight", (seen,), fill=1.0)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield _Weight(f"{layer}.attention.{name}.weight", (seen, seen))
        yield _Weight(f"{layer}.ffn_norm.weight", (seen,), fill=1.0)
        yield _Weight(f"{layer}.feed_forward.gate_proj.weight", (sizes.vision_intermediate, seen))
        yield _Weight(f"{layer}.feed_forward.up_proj.weight", (sizes.vision_intermediate, seen))
        yield _Weight(f"{layer}.feed_forward.down_proj.weight", (seen, sizes.vision_intermediate))
    yield _Weight(f"{projector}.norm.weight", (seen,), fill=1.0)
    yield _Weight(f"{projector}.patch_merger.merging_layer.weight", (seen, 4 * seen))
    yield _Weight(f"{projector}.linear_1.weight", (hidden, seen))
    yield _Weight(f"{projector}.linear_2.weight", (hidden, hidden))


def _deepseek(sizes: DeepseekSizes) -> Iterator[_Weight]:
    hidden = sizes.hidden
    yield _Weight("model.embed_tokens.weight", (sizes.vocabulary, hidden))
    for i in range(sizes.layers):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        yield _Weight(f"{layer}.input_layernorm.weight", (hidden,), fill=1.0)
        yield _Weight(f"{attention}.q_a_proj.weight", (sizes.q_rank, hidden), fp8=True)
        yield _Weight(f"{attention}.q_a_layernorm.weight", (sizes.q_rank,), fill=1.0)
        yield _Weight(
            f"{attention}.q_b_proj.weight", (sizes.heads * (sizes.nope_dim + sizes.rope_dim), sizes.q_rank), fp8=True
        )
        yield _Weight(f"{attention}.kv_a_proj_with_mqa.weight", (sizes.kv_rank + sizes.rope_dim, hidden), fp8=True)
        yield _Weight(f"{attention}.kv_a_layernorm.weight", (sizes.kv_rank,), fill=1.0)
        yield _Weight(
            f"{attention}.kv_b_proj.weight", (sizes.heads * (sizes.nope_dim + sizes.v_dim), sizes.kv_rank), fp8=True
        )
        yield _Weight(f"{attention}.o_proj.weight", (hidden, sizes.heads * sizes.v_dim), fp8=True)
        yield _Weight(f"{layer}.post_attention_layernorm.weight", (hidden,), fill=1.0)
        if i < sizes.dense_layers:
            yield from _deepseek_mlp(f"{layer}.mlp", hidden, sizes.intermediate)
        else:
            yield _Weight(f"{layer}.mlp.gate.weight", (sizes.experts, hidden))
            yield _Weight(f"{layer}.mlp.gate.e_score_correction_bias", (sizes.experts,), fill=0.5, dtype="F32")
            for expert in range(sizes.experts):
                yield from _deepseek_mlp(f"{layer}.mlp.experts.{expert}", hidden, sizes.expert_intermediate)
            yield from _deepseek_mlp(f"{layer}.mlp.shared_experts", hidden, sizes.expert_intermediate)
    yield _Weight("model.norm.weight", (hidden,), fill=1.0)
    yield _Weight("lm_head.weight", (sizes.vocabulary, hidden))


def _deepseek_mlp(name: str, hidden: int, wide: int) -> Iterator[_Weight]:
    yield _Weight(f"{name}.gate_proj.weight", (wide, hidden), fp8=True)
    yield _Weight(f"{name}.up_proj.weight", (wide, hidden), fp8=True)
    yield _Weight(f"{name}.down_proj.weight", (hidden, wide), fp8=True)


def _mistral3_config(sizes: Mistral3Sizes) -> dict[str, Any]:
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": _IMAGE_TOKEN,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "quantization_config": {
            "activation_scheme": "static",
            "dequantize": False,
            "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
            "quant_method": "fp8",
            "weight_block_size": None,
        },
        "spatial_merge_size": 2,
        "text_config": {
            "head_dim": sizes.head_dim,
            "hidden_act": "silu",
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "max_position_embeddings": 262144,
            "model_type": "ministral3",
            "num_attention_heads": sizes.heads,
            "num_hidden_layers": sizes.layers,
            "num_key_value_heads": sizes.kv_heads,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "vocab_size": sizes.vocabulary,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": sizes.vision_hidden,
            "image_size": sizes.image_size,
            "intermediate_size": sizes.vision_intermediate,
            "model_type": "pixtral",
            "num_attention_heads": sizes.vision_heads,
            "num_channels": 3,
            "num_hidden_layers": sizes.vision_layers,
            "patch_size": 14,
        },
        "vision_feature_layer": -1,
    }


def _deepseek_config(sizes: DeepseekSizes) -> dict[str, Any]:
    groups = 8 if sizes.experts % 8 == 0 else 1
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "dtype": "bfloat16",
        "first_k_dense_replace": sizes.dense_layers,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "kv_lora_rank": sizes.kv_rank,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": sizes.expert_intermediate,
        "n_group": groups,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1,
        "num_attention_heads": sizes.heads,
        "num_experts_per_tok": min(8, sizes.experts // 2),
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.heads,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": sizes.q_rank,
        "qk_nope_head_dim": sizes.nope_dim,
        "qk_rope_head_dim": sizes.rope_dim,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(_BLOCK),
        },
        "topk_group": max(1, groups // 2),
        "v_head_dim": sizes.v_dim,
        "vocab_size": sizes.vocabulary,
    }


def _side_files(vocabulary: int) -> dict[str, bytes]:
    """A working byte-level tokenizer, and the other small files that a release has."""
    # GPT-2's printable stand-ins for bytes, which byte-level tokenizers share.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*_SPECIAL_TOKENS, *stand_ins]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, token in enumerate(_SPECIAL_TOKENS)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens) if i < vocabulary}, "merges": []},
    }
    return {
        "README.md": b"A miniature checkpoint, written by `fp8ckpt sample`. Its weights are random.\n",
        "chat_template.jinja": b"{% for message in messages %}[INST]{{ message['content'] }}[/INST]{% endfor %}\n",
        "generation_config.json": dump_json({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": _PAD_TOKEN}),
        "tokenizer.json": dump_json(tokenizer),
        "tokenizer_config.json": dump_json(
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        ),
    }

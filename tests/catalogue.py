"""What is released in FP8, row by row: a miniature of each with its names, scales and configuration, what an engine
would say to it, and where docs/formats.md speaks of it.

`fp8ckpt`'s own rules are not asked for any of it: a miniature is made of the words of the release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fp8ckpt.errors import Fp8CheckpointError, MissingScaleError, ScaleShapeError, UnsupportedFormatError
from tests.miniatures import Family, cache_only, codes, families, four_bits, plain, scales
from tests.oracle import Stored

Shape = tuple[int, ...]
A, M, L = "model.layers.0.self_attn.", "model.layers.0.mlp.", "model.layers.0."
DENSE = {f"{A}q_proj": (256, 128), f"{A}k_proj": (128, 128), f"{A}v_proj": (128, 128), f"{A}o_proj": (128, 256)}
MLP = {f"{M}gate_proj": (256, 128), f"{M}up_proj": (256, 128), f"{M}down_proj": (128, 256)}
EACH = {f"{M}experts.{e}.{leaf}_proj": (128, 128) for e in range(2) for leaf in ("gate", "up", "down")}
SMALL = {f"{A}q_proj": (32, 24), f"{A}k_proj": (16, 24), f"{A}v_proj": (16, 24), f"{M}gate_proj": (40, 24),
         f"{M}up_proj": (40, 24)}  # fmt: skip
PLAIN = {"model.embed_tokens": (16, 24), "lm_head": (16, 24)}
NOT_LISTED = "unquantized Linears are not in modules_to_not_convert"
COLUMNS = "columns that are not a multiple of their block's"
TORN = "rows that are not a multiple of their block's"
STACKS = "transformers does not dequantize stacks"
UNEQUAL = "groups of weights that are served as one have unequal scales"


@dataclass(frozen=True)
class Row:
    """``family``: the miniature. ``docs``: what docs/formats.md calls it. ``failures``, ``notes``: what `--serving`
    says, in words that each sentence holds. ``refused``: the error, of what is not read. ``native``: Mistral's own
    files.
    """

    family: Family
    docs: str
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    refused: type[Fp8CheckpointError] | None = None
    native: bool = False

    def write(self, directory: Path) -> Path:
        """The directory of the release, in two files; Mistral's own is one."""
        self.family.write(directory, 1 if self.native else 2)
        if self.native:
            (directory / "model.safetensors").rename(directory / "consolidated.safetensors")
            (directory / "config.json").unlink()
        return directory


@dataclass(frozen=True)
class Scaling:
    """How weights are scaled: the endings of the keys of a weight, its scale and its activation's, and of a weight's
    shape the block of one scale and the shape of all.
    """

    scale: str
    dtype: str
    block: Callable[[Shape], Shape]
    shape: Callable[[Shape], Shape]
    activation: str | None = None
    weight: str = ".weight"

    def of(self, rng: np.random.Generator, module: str, shape: Shape) -> dict[str, Stored]:
        """A weight and what stands beside it."""
        found = {module + self.weight: codes(rng, *shape)}
        found[module + self.scale] = scales(rng, self.dtype, *self.shape(shape))
        if self.activation is not None:
            of_one = shape[:1] if len(shape) == 3 else (1,) if self.shape(shape) == (1,) else ()
            found[module + self.activation] = scales(rng, self.dtype, *of_one)
        return found


def _tiles(shape: Shape, *block: int) -> Shape:
    return tuple(-(-dim // size) for dim, size in zip(shape[-2:], block, strict=True))


ONE = Scaling(".weight_scale_inv", "BF16", lambda s: s, lambda s: (), ".activation_scale")
SQUARES = Scaling(".weight_scale_inv", "F32", lambda s: (128, 128), lambda s: _tiles(s, 128, 128))
LINES = Scaling(".weight_scale", "U8", lambda s: (1, 32), lambda s: _tiles(s, 1, 32))
ROWS = Scaling(".weight_scale", "F32", lambda s: (1, s[-1]), lambda s: (s[0], 1))
MODELOPT = Scaling(".weight_scale", "F32", lambda s: s, lambda s: (), ".input_scale")
STACKED = Scaling("_scale_inv", "BF16", lambda s: (1, *s[1:]), lambda s: (s[0], 1, 1), "_activation_scale", "")


def release(
    scaling: Scaling,
    quantized: dict[str, Shape],
    config: dict[str, Any],
    *,
    unquantized: dict[str, Shape] = PLAIN,
    more: tuple[tuple[Scaling, dict[str, Shape]], ...] = (),
    names: Callable[[str], str] = lambda name: name,
    **others: Any,
) -> Family:
    """The miniature of a release: modules by name with their shapes, scaled in one way, or in ``more``."""
    rng = np.random.default_rng(5)
    tensors = {names(f"{module}.weight"): plain(rng, *shape) for module, shape in unquantized.items()}
    tensors[names("model.norm.weight")] = plain(rng, 24)
    blocks, dropped = {}, []
    for way, modules in ((scaling, quantized), *more):
        for module, shape in modules.items():
            tensors |= {names(key): stored for key, stored in way.of(rng, module, shape).items()}
            blocks[names(module + way.weight)] = (names(module + way.scale), way.block(shape))
            dropped += [names(module + way.activation)] if way.activation is not None else []
    extra: dict[str, Stored] = others.pop("tensors", {})
    return Family({**tensors, **extra}, config, blocks, (*dropped, *others.pop("dropped", ())), **others)


def fp8(block: list[int] | None, scheme: str = "dynamic", skipped: list[str] | None = None, **more: Any) -> Any:
    """``config.json`` of ``quant_method`` "fp8"."""
    stated = {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": block, **more}
    return {"quantization_config": stated | ({} if skipped is None else {"modules_to_not_convert": skipped})}


def compressed(strategy: str, inputs: dict[str, Any] | None, **weights: Any) -> dict[str, Any]:
    """``config.json`` of compressed-tensors."""
    stated = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": stated, "input_activations": inputs}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    }


TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
BLOCK = [128, 128]


def _nested(name: str) -> str:
    """The names of Ministral 3: the text below ``language_model``, vision beside it."""
    if name.startswith("model.vision_tower."):
        return name.removeprefix("model.")
    return "language_model." + name


def _language(modules: dict[str, Shape]) -> dict[str, Shape]:
    """The names of a model with vision: the text below ``model.language_model``."""
    return {name.replace("model.", "model.language_model.", 1): shape for name, shape in modules.items()}


def _mistral() -> dict[str, Row]:
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    static = fp8(None, "static", skipped)
    vision = {"model.vision_tower.transformer.layers.0.attention.q_proj": (24, 24)}
    experts = {f"{L}mlp.experts.gate_up_proj": (2, 40, 24), f"{L}mlp.experts.down_proj": (2, 24, 20)}
    router = {f"{M}gate": (2, 24)}
    rng = np.random.default_rng(6)
    cache = {f"layers.0.attention.{leaf}_fake_quantizer.qscale_act": scales(rng, "BF16") for leaf in ("k", "v", "kv")}
    own = {"layers.0.attention.wq": (32, 24), "layers.0.attention.wk": (16, 24), "layers.0.feed_forward.w2": (24, 40)}
    native = Scaling(".qscale_weight", "BF16", lambda s: s, lambda s: (), ".qscale_act")
    params = {"dim": 24, "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    tied = {name: shape for name, shape in PLAIN.items() if name != "lm_head"}
    return {
        "Mistral Medium 3.5": Row(
            release(ONE, _language(SMALL), static, unquantized=_language(PLAIN) | vision),
            "Mistral3", (NOT_LISTED,), (UNEQUAL,),
        ),
        "Ministral 3, Devstral Small 2": Row(
            release(ONE, SMALL, static, unquantized=PLAIN | vision, names=_nested),
            "Ministral 3", (NOT_LISTED,), (UNEQUAL,),
        ),
        "Ministral 3 3B, tied": Row(
            release(ONE, SMALL, static | {"tie_word_embeddings": True}, unquantized=tied | vision, names=_nested),
            "Ministral 3", (NOT_LISTED,), (UNEQUAL,),
        ),
        "Devstral 2": Row(release(ONE, SMALL, static), "Devstral 2", (), (UNEQUAL,)),
        "Mistral Small 4": Row(
            release(ONE, SMALL, fp8(None, "static", ["lm_head", "gate"]), unquantized=PLAIN | router,
                    more=((STACKED, experts),)),
            "Mistral Small 4", (), (UNEQUAL, STACKS),
        ),
        "Mistral native": Row(
            release(native, own, {}, unquantized={"tok_embeddings": (16, 24), "output": (16, 24)}, tensors=cache,
                    dropped=tuple(cache), more_files={"params.json": params}),
            "Mistral native", (), (UNEQUAL,), native=True,
        ),
    }  # fmt: skip


def _blocks() -> dict[str, Row]:
    rng = np.random.default_rng(6)
    router = {f"{M}gate": (2, 24)}
    bias = {f"{M}gate.e_score_correction_bias": Stored.of(np.ones(2, np.float32), "F32")}
    v4 = replace(SQUARES, scale=".scale", dtype="F8_E8M0")
    hc = {f"{L}hc_attn_scale": plain(rng, 3), f"{L}hc_ffn_scale": plain(rng, 3)}
    stacks = {f"{L}moe.{leaf}_proj": (2, 128, 128) for leaf in ("gate", "up", "down")}
    of_stacks = replace(SQUARES, block=lambda s: (1, 128, 128), shape=lambda s: (s[0], 1, 1))
    m3 = {"quantization_config": {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"]}}
    padded = {f"{A}k_proj.weight": codes(rng, 192, 128), f"{A}k_proj.weight_scale_inv": scales(rng, "F32", 3, 1)}
    ragged = {f"{M}gate_proj": (192, 128), f"{M}up_proj": (192, 128), f"{M}down_proj": (128, 192)}
    nets = {f"{L}linear_attn.in_proj_{leaf}": (8, 24) for leaf in ("ba", "a", "b")}
    mtp, visual = {"mtp.fc": (24, 48)}, {"model.visual.merger.fc": (24, 24)}
    two = fp8(BLOCK, skipped=["lm_head"])
    return {
        "DeepSeek V3, Kimi K2": Row(
            release(SQUARES, DENSE | MLP | EACH, fp8(BLOCK, fmt="e4m3"), unquantized=PLAIN | router, tensors=bias),
            "DeepSeek V3 to V3.2, Kimi K2",
        ),
        "DeepSeek V3.1 and after": Row(
            _in_powers_of_two(release(SQUARES, DENSE, fp8(BLOCK, scale_fmt="ue8m0"))), 'scale_fmt: "ue8m0"'
        ),
        "DeepSeek V4": Row(release(v4, DENSE, fp8(BLOCK, scale_fmt="ue8m0"), tensors=hc), "DeepSeek V4"),
        "Qwen3": Row(release(replace(SQUARES, dtype="BF16"), DENSE | MLP, two), "Qwen3"),
        "Qwen3, scales in F16": Row(release(replace(SQUARES, dtype="F16"), DENSE, two), "Qwen3"),
        "Qwen3-MoE": Row(
            release(replace(SQUARES, dtype="BF16"), DENSE | EACH, fp8(BLOCK, skipped=["lm_head", f"{M}gate"]),
                    unquantized=PLAIN | router),
            "Qwen3",
        ),
        "Qwen3-VL": Row(
            release(SQUARES, _language(DENSE), fp8(BLOCK, skipped=["lm_head", "model.visual", *visual]),
                    unquantized=_language(PLAIN) | visual),
            "Qwen3",
        ),
        "MiniMax M2": Row(
            release(SQUARES, {f"{L}block_sparse_moe.experts.0.{w}": (128, 128) for w in ("w1", "w2", "w3")},
                    fp8(BLOCK, skipped=["gate", "e_score_correction_bias", "lm_head"]),
                    unquantized=PLAIN | {f"{L}block_sparse_moe.gate": (2, 24)}),
            "MiniMax M2",
        ),
        "MiniMax M3": Row(release(replace(LINES, scale=".weight_scale_inv"), DENSE, m3), "MiniMax M2 and M3"),
        "MiMo V2": Row(release(SQUARES, MLP, two, tensors=padded), "MiMo V2", refused=ScaleShapeError),
        "Step 3.5": Row(
            release(SQUARES, DENSE, two, unquantized=PLAIN, more=((of_stacks, stacks),)), "Step 3.5",
            notes=("3 stacks of experts are FP8",),
        ),
        "tied head that is stored": Row(
            _tied(release(SQUARES, DENSE, two | {"tie_word_embeddings": True})), "The head"
        ),
        "MTP layers": Row(
            release(SQUARES, DENSE | {"mtp.layers.0.mlp.up_proj": (128, 128)},
                    {"num_nextn_predict_layers": 1, **fp8(BLOCK, skipped=["lm_head", "mtp.fc"])},
                    unquantized=PLAIN | mtp),
            "MTP layer",
        ),
        "experts a tensor each": Row(
            release(SQUARES, _language(DENSE | EACH), fp8(BLOCK, skipped=["lm_head", *_language(router)]),
                    unquantized=_language(PLAIN | router)),
            "Experts are one tensor each",
        ),
        "rows that are joined, and no whole blocks": Row(
            release(SQUARES, ragged, two), "Blocks are whole",
            ("2 FP8 tensors are joined with others and are not whole blocks",),
            (COLUMNS, TORN),
        ),
        "gated delta nets": Row(
            release(SQUARES, DENSE, fp8(BLOCK, skipped=["lm_head", *nets]), unquantized=PLAIN | nets),
            "gated delta nets",
        ),
    }  # fmt: skip


def _in_powers_of_two(family: Family) -> Family:
    exponents = {scale: np.frexp(family.tensors[scale].array)[1] for scale, _ in family.blocks.values()}
    powers = {name: Stored.of(np.ldexp(np.float32(1), powers), "F32") for name, powers in exponents.items()}
    return replace(family, tensors=family.tensors | powers)


def _tied(family: Family) -> Family:
    return replace(family, tensors=family.tensors | {"lm_head.weight": family.tensors["model.embed_tokens.weight"]})


def _tools() -> dict[str, Row]:
    four = replace(SQUARES, scale=".weight_scale", shape=lambda s: (s[0] // 128, 1, s[1] // 128, 1))
    row_each = replace(MODELOPT, block=lambda s: (1, s[-1]), shape=lambda s: s[:1], activation=None)
    of_experts = Scaling("_scale", "F32", lambda s: (1, s[1], 1), lambda s: (s[0], 1, s[2]), weight="")
    stacks = {f"{L}feed_forward.experts.gate_up_proj": (2, 24, 40)}
    one = Scaling(".weight_scale", "BF16", lambda s: s, lambda s: (1,), ".input_scale")
    bound = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    rng = np.random.default_rng(6)
    cache = {f"{A}{leaf}_proj.{leaf}_scale": scales(rng, "F32") for leaf in "kv"}

    def modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
        quantization = {"quant_algo": algorithm, "exclude_modules": ["lm_head"], **more}
        return {"hf_quant_config.json": {"quantization": quantization}}

    stated = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}}
    int8 = {f"{A}o_proj.weight": Stored.of(np.ones((24, 24), np.int8), "I8"),
            f"{A}o_proj.weight_scale": scales(rng, "BF16", 24, 1)}  # fmt: skip
    awq = {f"{A}o_proj.qweight": Stored.of(np.ones((24, 3), np.int32), "I32"),
           f"{A}o_proj.scales": plain(rng, 1, 24)}  # fmt: skip
    return {
        "GLM-4.5": Row(release(ROWS, SMALL, compressed("channel", TOKEN)), "GLM-4.5"),
        "compressed-tensors, static": Row(
            release(one, SMALL, compressed("tensor", TENSOR)), "compressed-tensors", (), (UNEQUAL,)
        ),
        "compressed-tensors, dynamic": Row(
            release(replace(ROWS, dtype="BF16"), SMALL, compressed("channel", TOKEN)), "compressed-tensors"
        ),
        "compressed-tensors, blocks": Row(
            release(replace(SQUARES, scale=".weight_scale", dtype="BF16"), DENSE,
                    compressed("block", TOKEN, block_structure=BLOCK)), "block_structure",
        ),
        "compressed-tensors, MXFP8": Row(
            release(LINES, DENSE, compressed("group", TOKEN, group_size=32)), "group_size"
        ),
        "ModelOpt, its own file": Row(
            release(MODELOPT, SMALL, {}, more_files=modelopt("FP8", kv_cache_quant_algo="FP8"), tensors=cache,
                    dropped=tuple(cache)), "NVIDIA ModelOpt", (), (UNEQUAL,),
        ),
        "ModelOpt, config.json": Row(release(MODELOPT, SMALL, stated), "NVIDIA ModelOpt", (), (UNEQUAL,)),
        "ModelOpt, a scale a row": Row(
            release(row_each, SMALL, {}, more_files=modelopt("FP8_PER_CHANNEL_PER_TOKEN")), "A 1-D scale"
        ),
        "ModelOpt, FP8_PB_WO": Row(release(four, DENSE, {}, more_files=modelopt("FP8_PB_WO")), "FP8_PB_WO"),
        "ModelOpt, MXFP8": Row(release(LINES, DENSE, {}, more_files=modelopt("MXFP8")), "MXFP8"),
        "fbgemm": Row(release(ROWS, SMALL, {"quantization_config": bound}, more=((of_experts, stacks),)), "fbgemm"),
        "INT8": Row(release(ROWS, SMALL, {}, tensors=int8), "INT8", refused=UnsupportedFormatError),
        "AWQ": Row(release(ROWS, SMALL, {}, tensors=awq), "AWQ", refused=UnsupportedFormatError),
        "FP8 cast without scales": Row(
            release(ROWS, SMALL, {}, tensors={"x.weight": codes(rng, 4, 4)}), "and so is none",
            refused=MissingScaleError,
        ),
    }  # fmt: skip


#: Of the miniatures of `families` that are whole releases: what docs/formats.md calls them, failures, notes.
_OF_FAMILIES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "one scale for the cache": ("X.kv_scale", (), ()),
    "Quark": ("X.prob_output_scale", (), ()),
    "attention scaled": ("X.q_scale", (), ()),
    "attention scaled by head": ("one per head", (), ()),
    "older activation scales": ("X.act_scale", ("have an activation scale",), ()),
    "an older key": ("compression_config", (), ()),
    "torchao": ("torchao", (), ()),
    "torchao in blocks": ("torchao", (), ()),
    "ComfyUI": ("scaled_fp8", ("no configuration says so",), ()),
    "ComfyUI by layer": ("X.comfy_quant", ("no configuration says so",), ()),
    "ModelOpt experts": ("X_weight_scale", (), ()),
    "several groups": ("config_groups", (), (COLUMNS,)),
    "ModelOpt mixed": ("quantized_layers", (), (COLUMNS,)),
}


def catalogue() -> dict[str, Row]:
    """Every row, by name; the same at every call."""
    found = families()
    named = {name: Row(found[name], *said) for name, said in _OF_FAMILIES.items()}
    alone = Row(cache_only(), "kv_cache_scheme", (), ("nothing is quantized", "key-value cache alone"))
    return {**_mistral(), **_blocks(), **_tools(), **named, "a cache in FP8 alone": alone}


_OF_FOUR_BITS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {"DeepSeek V4 in four bits": ((), (COLUMNS, TORN))}


def in_four_bits() -> dict[str, Row]:
    """The same of codes of four bits, whose round trips are tests of their own."""
    return {name: Row(family, "four bits", *_OF_FOUR_BITS.get(name, ((), ()))) for name, family in four_bits().items()}

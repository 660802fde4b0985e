"""Every family of the catalogue that is a suffix and a block grid, as a small directory with what it dequantizes to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.oracle import Stored, dequantize, write_safetensors


class Packed(NamedTuple):
    """What a weight of four bits is besides its scale: its own shape, and the factor of its second level."""

    shape: tuple[int, ...]
    factor: str | None = None
    divides: bool = False
    across: bool = False  # then the logical tensor has its last two dimensions in the other order

    def turned(self, values: Stored) -> Stored:
        """Values [shape] as the logical tensor has them, and back."""
        if not self.across:
            return values
        return Stored.of(values.array.swapaxes(-1, -2), values.dtype)


@dataclass(frozen=True)
class Family:
    """A directory to be: its stored tensors, its configuration, and the block size of each FP8 weight by name."""

    tensors: dict[str, Stored]
    config: dict[str, Any]
    blocks: dict[str, tuple[str, tuple[int, ...]]]  # weight: (its scale, its block size)
    dropped: tuple[str, ...] = ()  # stored tensors that are no logical tensor, besides the scales
    more_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # of logical tensors that are stored under another name
    markers: tuple[str, ...] = ()  # stored tensors that are neither tensor nor scale
    metadata: dict[str, str] = field(default_factory=dict)  # of every header, besides the format
    packed: dict[str, Packed] = field(default_factory=dict)  # of the weights, those of four bits

    def name(self, stored: str) -> str:
        """The logical name of what is stored under a name."""
        return self.names.get(stored, stored)

    def write(self, directory: Path, files: int = 2) -> Path:
        """Write it; tensors go to the files in turn, so that many scales lie in another file than their weight."""
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        for name, value in self.more_files.items():
            (directory / name).write_text(json.dumps(value))
        names = list(self.tensors)
        if files == 1:
            write_safetensors(directory / "model.safetensors", self.tensors, {**self.metadata, "format": "pt"})
            return directory
        weight_map = {}
        for i in range(files):
            file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
            held = {name: self.tensors[name] for name in names[i::files]}
            write_safetensors(directory / file, held, {**self.metadata, "format": "pt"})
            weight_map.update(dict.fromkeys(names[i::files], file))
        total = sum(len(tensor.data) for tensor in self.tensors.values())
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        )
        return directory

    def expected(self, dtype: str = "BF16") -> dict[str, Stored]:
        """What a conversion to ``dtype`` must hold."""
        of_blocks = {scale for scale, _ in self.blocks.values()} | {packed.factor for packed in self.packed.values()}
        result = {}
        for name, tensor in self.tensors.items():
            if name in self.blocks:
                scale, block = self.blocks[name]
                more: dict[str, Any] = {}
                if (packed := self.packed.get(name)) is not None:
                    tensor = Stored("F4", packed.shape, tensor.data)
                    factor = None if packed.factor is None else self.tensors[packed.factor]
                    more = {"factor": factor, "divides": packed.divides}
                values = Stored(dtype, tensor.shape, dequantize(tensor, self.tensors[scale], block, dtype, **more))
                result[self.name(name)] = values if packed is None else packed.turned(values)
            elif name not in of_blocks and name not in self.dropped and name not in self.markers:
                result[name] = tensor
        return result


def codes(rng: np.random.Generator, *shape: int, dtype: str = "F8_E4M3") -> Stored:
    """Codes of every kind but NaN (and, in e5m2, infinity)."""
    found = rng.integers(0, 256, shape, np.uint8)
    nonfinite = {"F8_E4M3": (found & 0x7F) == 0x7F, "F8_E5M2": (found & 0x7F) >= 0x7C}.get(dtype, found == 0x80)
    found[nonfinite] = 0x3A
    return Stored.codes(found, dtype)


def scales(rng: np.random.Generator, dtype: str, *shape: int) -> Stored:
    """Scales that no other dtype holds, or exponents."""
    if dtype in ("U8", "F8_E8M0"):
        return Stored.codes(rng.integers(100, 135, shape, np.uint8), dtype)
    return Stored.of(np.asarray(np.exp2(rng.uniform(-14, -2, shape)) * 1.37, np.float32), dtype)


def plain(rng: np.random.Generator, *shape: int) -> Stored:
    """Values in bfloat16."""
    return Stored.of(rng.standard_normal(shape).astype(np.float32), "BF16")


def families() -> dict[str, Family]:
    """By name; the same at every call."""
    rng = np.random.default_rng(7)
    found: dict[str, Family] = {}

    def add(
        name: str,
        weight: str,
        weight_stored: Stored,
        scale: str,
        scale_stored: Stored,
        block: tuple[int, ...],
        config: dict[str, Any] | None = None,
        activation: str | None = None,
        **more: Any,
    ) -> None:
        tensors = {
            "model.norm.weight": plain(rng, 8),
            weight: weight_stored,
            scale: scale_stored,
            "lm_head.weight": plain(rng, 16, 8),
        }
        if activation is not None:
            tensors[activation] = scales(rng, "BF16")
        dropped = (activation,) if activation is not None else ()
        extra = more.pop("tensors", {})
        found[name] = Family(
            {**tensors, **extra}, config or {}, {weight: (scale, block)}, dropped + more.pop("dropped", ()), **more
        )

    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    block = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    w, s, a = "m.q.weight", "m.q.weight_scale_inv", "m.q.activation_scale"
    for dtype in ("BF16", "F32", "F16"):
        add(f"per-tensor 0-d {dtype}", w, codes(rng, 40, 24), s, scales(rng, dtype), (40, 24), fp8, a)
    add(
        "per-tensor [1]", w, codes(rng, 40, 24), "m.q.weight_scale", scales(rng, "BF16", 1), (40, 24), {},
        "m.q.input_scale",
    )  # fmt: skip
    add("per-tensor [1,1]", w, codes(rng, 40, 24), s, scales(rng, "F32", 1, 1), (40, 24), fp8)
    add("per-channel [o,1]", w, codes(rng, 40, 24), "m.q.weight_scale", scales(rng, "F32", 40, 1), (1, 24))
    add("per-channel [o]", w, codes(rng, 40, 24), "m.q.weight_scale", scales(rng, "F32", 40), (1, 24))
    add("per-channel wide", w, codes(rng, 5, 3000), "m.q.weight_scale", scales(rng, "BF16", 5, 1), (1, 3000))
    for dtype in ("F32", "BF16", "F16", "F8_E8M0"):
        add(f"block 128 ragged {dtype}", w, codes(rng, 300, 200), s, scales(rng, dtype, 3, 2), (128, 128), block)
    add("block 128 e5m2", w, codes(rng, 130, 260, dtype="F8_E5M2"), s, scales(rng, "F32", 2, 3), (128, 128), block)
    add("DeepSeek V4", w, codes(rng, 130, 260), "m.q.scale", scales(rng, "F8_E8M0", 2, 3), (128, 128), block,
        tensors={"m.hc_attn_scale": plain(rng, 3), "m.norm.scale": plain(rng, 4),
                 "m.norm.weight": plain(rng, 4)})  # fmt: skip
    e = "m.experts.gate_up_proj"
    add(
        "experts [E,1,1]", e, codes(rng, 3, 20, 16), f"{e}_scale_inv", scales(rng, "BF16", 3, 1, 1), (1, 20, 16), fp8,
        f"{e}_activation_scale",
    )  # fmt: skip
    add("experts in blocks", "m.experts.down_proj", codes(rng, 3, 130, 200), "m.experts.down_proj_scale_inv",
        scales(rng, "F32", 3, 2, 2), (1, 128, 128), block)  # fmt: skip
    add("experts fbgemm", "m.experts.gate_up_proj", codes(rng, 3, 20, 16), "m.experts.gate_up_proj_scale",
        scales(rng, "F32", 3, 1, 16), (1, 20, 1),
        {"quantization_config": {"quant_method": "fbgemm_fp8"}})  # fmt: skip
    modelopt = {"quantization": {"quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head"]}}
    add("ModelOpt 4-D", w, codes(rng, 256, 384), "m.q.weight_scale", scales(rng, "F32", 2, 1, 3, 1), (128, 128), {},
        more_files={"hf_quant_config.json": modelopt})  # fmt: skip
    cache = {"m.k_proj.k_scale": scales(rng, "F32"), "m.v_proj.v_scale": scales(rng, "F32")}
    add("ModelOpt FP8", "m.k_proj.weight", codes(rng, 32, 16), "m.k_proj.weight_scale", scales(rng, "F32"), (32, 16),
        {}, "m.k_proj.input_scale", tensors=cache, dropped=tuple(cache),
        more_files={"hf_quant_config.json": {"quantization": {
            "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}})  # fmt: skip
    mx = {"quantization_config": {"quant_method": "mxfp8", "weight_block_size": [1, 32]}}
    for dtype in ("U8", "F8_E8M0"):
        add(f"MXFP8 {dtype}", w, codes(rng, 24, 100), s, scales(rng, dtype, 24, 4), (1, 32), mx)
    add("small blocks F32", w, codes(rng, 24, 100), s, scales(rng, "F32", 24, 4), (1, 32), mx)
    add("Mistral native", "layers.0.wq.weight", codes(rng, 32, 16), "layers.0.wq.qscale_weight", scales(rng, "BF16"),
        (32, 16), {}, "layers.0.wq.qscale_act",
        more_files={"params.json": {"dim": 16, "quantization": {"qformat_weight": "fp8_e4m3"}}})  # fmt: skip
    groups = {
        "group_0": {"weights": {"num_bits": 8, "strategy": "block", "block_structure": [128, 128], "type": "float"}}
    }
    add("compressed-tensors block", w, codes(rng, 200, 130), "m.q.weight_scale", scales(rng, "BF16", 2, 2),
        (128, 128), {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized",
                                             "config_groups": groups}})  # fmt: skip
    for dtype in ("F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        add(f"per-tensor {dtype}", w, codes(rng, 40, 24, dtype=dtype), s, scales(rng, "F32"), (40, 24), fp8)
    found.update(_of_attention(rng))
    found.update(_of_other_names(rng))
    found.update(_of_groups(rng))
    return found


GROUPED = {"num_bits": 4, "type": "float", "symmetric": True}
MXFP4 = {**GROUPED, "strategy": "group", "group_size": 32}
NVFP4 = {**GROUPED, "strategy": "tensor_group", "group_size": 16}


def _compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    inputs = {**weights, "dynamic": "local"} if weights is NVFP4 else None
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    stated = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}
    return {"quantization_config": stated}


def four_bits() -> dict[str, Family]:
    """The families whose weights, or some of them, have codes of four bits; the same at every call."""
    rng = np.random.default_rng(4)
    found: dict[str, Family] = {}

    def packed(dtype: str, *shape: int) -> Stored:
        return Stored.codes(rng.integers(0, 256, shape, np.uint8), dtype)

    def grouped(dtype: str, *shape: int) -> Stored:
        low, high = (40, 120) if dtype == "F8_E4M3" else (118, 130)
        return Stored.codes(rng.integers(low, high, shape, np.uint8), dtype)

    def factor(value: float, *shape: int) -> Stored:
        return Stored.of(np.full(shape, value, np.float32), "F32")

    def around(tensors: dict[str, Stored]) -> dict[str, Stored]:
        return {"model.norm.weight": plain(rng, 8), **tensors, "lm_head.weight": plain(rng, 16, 8)}

    e = "model.layers.0.mlp.experts."
    tensors, blocks, of = {}, {}, {}
    names = {}
    for leaf, rows, groups in (("gate_up_proj", 24, 3), ("down_proj", 96, 1)):
        b, s = f"{e}{leaf}_blocks", f"{e}{leaf}_scales"
        tensors |= {
            b: packed("U8", 2, rows, groups, 16),
            s: grouped("U8", 2, rows, groups),
            f"{e}{leaf}_bias": plain(rng, 2, rows),
        }
        blocks[b], of[b], names[b] = (s, (1, 1, 32)), Packed((2, rows, 32 * groups), across=True), e + leaf
    stated = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    found["gpt-oss"] = Family(around(tensors), {"quantization_config": stated}, blocks, names=names, packed=of)

    fp8, fp4 = "layers.0.attn.wq_a", "layers.0.ffn.experts.0.w1"
    tensors = {fp8 + ".weight": codes(rng, 130, 260), fp8 + ".scale": scales(rng, "F8_E8M0", 2, 3)}
    tensors |= {fp4 + ".weight": packed("I8", 20, 48), fp4 + ".scale": grouped("F8_E8M0", 20, 3)}
    stated = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    found["DeepSeek V4 in four bits"] = Family(
        around(tensors), {"expert_dtype": "fp4", "quantization_config": {**stated, "activation_scheme": "dynamic"}},
        {fp8 + ".weight": (fp8 + ".scale", (128, 128)), fp4 + ".weight": (fp4 + ".scale", (1, 32))},
        packed={fp4 + ".weight": Packed((20, 96))},
    )  # fmt: skip

    q, s, f, a = "m.q.weight", "m.q.weight_scale", "m.q.weight_scale_2", "m.q.input_scale"
    tensors = {q: packed("U8", 24, 40), s: grouped("F8_E4M3", 24, 5), f: factor(0.37 / 2688), a: factor(0.02)}
    modelopt = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    found["ModelOpt NVFP4"] = Family(
        around(tensors), {"quantization_config": {"quant_method": "modelopt", **modelopt}}, {q: (s, (1, 16))}, (a,),
        {"hf_quant_config.json": {"quantization": modelopt}}, packed={q: Packed((24, 80), f)},
    )  # fmt: skip

    o = "m.o.weight"
    mixed = {"m.q": {"quant_algo": "NVFP4", "group_size": 16}, "m.o": {"quant_algo": "FP8"}}
    algorithm = {"quant_algo": "MIXED_PRECISION", "quantized_layers": mixed}
    beside = {o: codes(rng, 24, 16), "m.o.weight_scale": scales(rng, "F32"), "m.o.input_scale": factor(0.02)}
    found["ModelOpt mixed with NVFP4"] = Family(
        around({**tensors, **beside}), {"quantization_config": {"quant_method": "modelopt", **algorithm}},
        {q: (s, (1, 16)), o: ("m.o.weight_scale", (24, 16))}, (a, "m.o.input_scale"),
        {"hf_quant_config.json": {"quantization": algorithm}}, packed={q: Packed((24, 80), f)},
    )  # fmt: skip

    p, f, a = "m.q.weight_packed", "m.q.weight_global_scale", "m.q.input_global_scale"
    found["compressed-tensors NVFP4"] = Family(
        around({p: packed("U8", 24, 36), s: grouped("F8_E4M3", 24, 5), f: factor(2688 / 0.37, 1), a: factor(55, 1)}),
        _compressed("nvfp4-pack-quantized", NVFP4), {p: (s, (1, 16))}, (a,), names={p: q},
        packed={p: Packed((24, 72), f, divides=True)},
    )  # fmt: skip
    found["compressed-tensors MXFP4"] = Family(
        around({p: packed("U8", 24, 48), s: grouped("U8", 24, 3)}), _compressed("mxfp4-pack-quantized", MXFP4),
        {p: (s, (1, 32))}, names={p: q}, packed={p: Packed((24, 96))},
    )  # fmt: skip
    weights = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "ch_axis": -1}
    found["Quark MXFP4"] = Family(
        around({q: packed("U8", 24, 48), s: grouped("U8", 24, 3)}),
        {"quantization_config": {"quant_method": "quark", "global_quant_config": {"weight": weights}}},
        {q: (s, (1, 32))}, packed={q: Packed((24, 96))},
    )  # fmt: skip
    return found


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    },
    "ignore": ["lm_head"],
}


def attention(rng: np.random.Generator) -> tuple[dict[str, Stored], dict[str, tuple[str, tuple[int, ...]]]]:
    """Four projections of an attention with a scale a row: the stored tensors, and the blocks of a `Family`."""
    tensors = {"model.embed_tokens.weight": plain(rng, 16, 24)}
    blocks = {}
    for leaf, rows in (("q", 24), ("k", 12), ("v", 12), ("o", 24)):
        weight, scale = f"model.layers.0.attn.{leaf}_proj.weight", f"model.layers.0.attn.{leaf}_proj.weight_scale"
        tensors |= {weight: codes(rng, rows, 24), scale: scales(rng, "F32", rows, 1)}
        blocks[weight] = (scale, (1, 24))
    return tensors, blocks


def _of_attention(rng: np.random.Generator) -> dict[str, Family]:
    """Scales that belong to no weight, under each of their names; with parameters beside them that only end like
    those.
    """
    a = "model.layers.0.attn."
    more: dict[str, dict[str, Stored]] = {
        "one scale for the cache": {a + "kv_scale": scales(rng, "F32")},
        "Quark": {a + f"{leaf}_proj.output_scale": scales(rng, "F32", 1) for leaf in "qkv"}
        | {a + "prob_output_scale": scales(rng, "F32")},
        "attention scaled": {a + f"{leaf}_scale": scales(rng, "BF16") for leaf in "qkv"},
        "attention scaled by head": {
            a + f"{leaf}_scale": scales(rng, "F32", n, 1, 1) for leaf, n in zip("qkv", (4, 2, 2), strict=True)
        },
        "older activation scales": {a + f"{leaf}_proj.act_scale": scales(rng, "F32") for leaf in "qkvo"},
        "an older key": {},
    }
    found = {}
    for name, dropped in more.items():
        tensors, blocks = attention(rng)
        kept = {
            "model.layers.0.layer_scale": plain(rng, 24),
            "model.layers.0.attn.logit_scale": plain(rng, 4, 1, 1),
            "model.layers.0.attn.q_norm.scale": plain(rng, 6),
            "model.vision.attn.q_scale": plain(rng, 24),
            "model.hc_attn_scale": plain(rng, 1),
        }
        key = "compression_config" if name == "an older key" else "quantization_config"
        config = {key: {"quant_method": "quark", "exclude": ["lm_head"]} if name == "Quark" else COMPRESSED}
        found[name] = Family({**tensors, **kept, **dropped}, config, blocks, tuple(dropped))
    return found


def _of_other_names(rng: np.random.Generator) -> dict[str, Family]:
    """Weights, scales and markers under names of their own."""
    tensors, blocks = attention(rng)
    renamed, names = {}, {}
    for name, stored in tensors.items():
        new = name
        if name in blocks:
            new = name.removesuffix("weight") + "_weight_qdata"
            names[new] = name
        elif name.endswith("weight_scale"):
            new = name.removesuffix("weight_scale") + "_weight_scale"
        renamed[new] = stored
    torchao = {new: (new.removesuffix("_qdata") + "_scale", blocks[name][1]) for new, name in names.items()}
    config = {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}
    found = {"torchao": Family(renamed, config, torchao, names=names, metadata=_of_torchao(renamed, names))}
    x = "model.layers.0.mlp.up_proj._weight_"
    own = {x + "qdata": "model.layers.0.mlp.up_proj.weight"}
    in_blocks = {
        x + "qdata": codes(rng, 256, 384),
        x + "scale": scales(rng, "F32", 2, 3),
        "model.norm.weight": plain(rng, 16),
    }
    grid = {x + "qdata": (x + "scale", (128, 128))}
    found["torchao in blocks"] = Family(in_blocks, config, grid, names=own, metadata=_of_torchao(in_blocks, own))

    w, s = "blocks.0.attn.q.weight", "blocks.0.attn.q.scale_weight"
    stored = {
        w: codes(rng, 24, 16),
        s: scales(rng, "F32"),
        "blocks.0.attn.q.scale_input": scales(rng, "F32"),
        "blocks.0.norm.scale": plain(rng, 16),
    }
    for name, size in (("ComfyUI", 0), ("ComfyUI, full precision", 2)):
        marked = {**stored, "scaled_fp8": codes(rng, size)}
        found[name] = Family(marked, {}, {w: (s, (24, 16))}, ("blocks.0.attn.q.scale_input",), markers=("scaled_fp8",))
    text = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    newer = {
        w: stored[w],
        "blocks.0.attn.q.weight_scale": stored[s],
        "blocks.0.attn.q.comfy_quant": Stored.codes(text, "U8"),
    }
    layers = {"format_version": "1.0", "layers": {"blocks.0.attn.q": {"format": "float8_e4m3fn"}}}
    found["ComfyUI by layer"] = Family(
        newer, {}, {w: ("blocks.0.attn.q.weight_scale", (24, 16))}, markers=("blocks.0.attn.q.comfy_quant",),
        metadata={"_quantization_metadata": json.dumps(layers)},
    )  # fmt: skip

    e = "model.layers.0.feed_forward.experts."
    experts: dict[str, Stored] = {}
    of_experts = {}
    for leaf, shape in (("gate_up_proj", (3, 16, 40)), ("down_proj", (3, 20, 16))):
        experts |= {
            e + leaf: codes(rng, *shape),
            e + leaf + "_weight_scale": scales(rng, "F32"),
            e + leaf + "_input_scale": scales(rng, "F32"),
        }
        of_experts[e + leaf] = (e + leaf + "_weight_scale", shape)
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    found["ModelOpt experts"] = Family(
        experts, config, of_experts, tuple(e + leaf + "_input_scale" for leaf in ("gate_up_proj", "down_proj"))
    )
    return found


def _of_torchao(tensors: dict[str, Stored], names: dict[str, str]) -> dict[str, str]:
    """What torchao says in a header of every tensor."""
    found = {name: json.dumps({"_type": "Tensor"}) for name in tensors if "._" not in name}
    found |= {name: json.dumps({"_type": "Float8Tensor", "_data": {}}) for name in names.values()}
    return {**found, "tensor_names": json.dumps(list(found))}


def _of_groups(rng: np.random.Generator) -> dict[str, Family]:
    """Modules of one checkpoint with block sizes of their own."""
    o, up = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"
    weights = {"num_bits": 8, "type": "float"}
    square = {**weights, "strategy": "block", "block_structure": [128, 128]}
    lines = {**weights, "strategy": "group", "group_size": 32}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": square},
        "group_1": {"targets": ["re:.*mlp.*"], "weights": lines},
    }
    config = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": groups,
            "ignore": [],
        }
    }
    mx = {up + ".weight": codes(rng, 130, 100), up + ".weight_scale": scales(rng, "U8", 130, 4)}
    in_squares = {o + ".weight": codes(rng, 260, 130), o + ".weight_scale": scales(rng, "F32", 3, 2)}
    blocks = {up + ".weight": (up + ".weight_scale", (1, 32))}
    found = {
        "several groups": Family(
            {**in_squares, **mx}, config, {o + ".weight": (o + ".weight_scale", (128, 128)), **blocks}
        )
    }
    layers = {o: {"quant_algo": "FP8"}, up: {"quant_algo": "MXFP8", "group_size": 32}}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    whole = {
        o + ".weight": codes(rng, 260, 130),
        o + ".weight_scale": scales(rng, "F32"),
        o + ".input_scale": scales(rng, "F32"),
    }
    config = {"quantization_config": {"quant_method": "modelopt", **mixed}}
    more_files = {"hf_quant_config.json": {"quantization": mixed}}
    of_both = {o + ".weight": (o + ".weight_scale", (260, 130)), **blocks}
    found["ModelOpt mixed"] = Family({**whole, **mx}, config, of_both, (o + ".input_scale",), more_files)
    return found


def cache_only() -> Family:
    """Weights in bfloat16 and a cache in FP8 with its calibrated scales: nothing is quantized but the cache."""
    rng = np.random.default_rng(8)
    tensors, blocks = attention(rng)
    unquantized = {name: plain(rng, *stored.shape) for name, stored in tensors.items() if not name.endswith("_scale")}
    of_cache = {f"model.layers.0.attn.{leaf}_scale": scales(rng, "BF16", 1) for leaf in "kv"}
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    ignored = ["lm_head", *(weight.removesuffix(".weight") for weight in blocks)]
    quantization = {**COMPRESSED, "config_groups": {}, "ignore": ignored, "kv_cache_scheme": scheme}
    config = {"dtype": "bfloat16", "quantization_config": quantization}
    return Family({**unquantized, **of_cache}, config, {}, tuple(of_cache))

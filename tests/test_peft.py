"""PEFT itself as the client: random adapters of transformers' models, merged into the model by it, into files by us."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from fp8ckpt import convert, load_model, load_pretrained, merge, open_checkpoint, save_model, verify
from fp8ckpt.errors import ModelMismatchError, UnsupportedFormatError
from tests.families.releases import RELEASES
from tests.families.test_tied import built
from tests.oracle import Stored, read_directory, read_safetensors, write_safetensors
from tests.test_four_bits import gpt_oss

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "every Linear": ("Mistral3 nested", {"target_modules": "all-linear", "r": 2}),
    "a text model": ("Ministral3 text", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "DoRA": ("Mistral3 identity", {"target_modules": ["q_proj", "up_proj"], "r": 2, "use_dora": True}),
    "DoRA of embeddings": ("Qwen3", {"target_modules": ["v_proj", "embed_tokens"], "r": 2, "use_dora": True}),
    "patterns": (
        "Qwen3",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5},
            "alpha_pattern": {r".*layers\.0\..*": 3},
        },
    ),
    "embeddings and whole modules": (
        "Qwen3",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "modules_to_save": ["input_layernorm", "norm"]},
    ),
    "tied embeddings and a head": ("Qwen3 tied, head stored", {"target_modules": ["embed_tokens"], "r": 2}),
    "tied embeddings": ("Qwen3 tied", {"target_modules": ["v_proj", "embed_tokens"]}),
    "experts": ("Qwen3-MoE", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 2}),
    "every Linear beside stacked experts": ("Qwen3-MoE", {"target_modules": "all-linear", "r": 2}),
    "experts, one of two, by its bare name": (
        "DeepSeek-V3", {"target_modules": ["kv_b_proj", "o_proj"], "target_parameters": ["down_proj"]}
    ),
    "experts, one of two": ("DeepSeek-V3", {"target_modules": ["kv_b_proj"], "target_parameters": EXPERTS[1:]}),
    "experts under other names": (
        "Mixtral", {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"], "r": 2}
    ),
    "square experts": ("MiniMax-M2", {"target_modules": [], "target_parameters": EXPERTS[:1], "r": 2}),
    "transposed experts, one square": ("Llama-4", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 2}),
    "experts stacked in the release": ("Mistral4", {"target_modules": [], "target_parameters": EXPERTS, "r": 2}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_embeddings_are_saved_beside_their_factors(tmp_path: Path) -> None:
    """By PEFT, though they were not trained: no reason to refuse two adapters, or one with a weight."""
    base = RELEASES["Qwen3"].write(tmp_path / "base")
    model = trained(base, tmp_path / "one", target_modules=["embed_tokens"], r=2)
    result = merge(base, [(tmp_path / "one", 0.25), (tmp_path / "one", 0.5)], tmp_path / "out", to="bf16")
    layer = model.get_base_model().get_input_embeddings()
    expected = layer.base_layer.weight + 0.75 * layer.get_delta_weight("default")
    found = open_checkpoint(tmp_path / "out").read("model.embed_tokens.weight")
    assert torch.allclose(found, expected.bfloat16(), rtol=2**-7, atol=1e-6)
    assert result.merged == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mistral3 identity", "Mistral3 nested"])
def test_an_adapter_of_a_model_without_its_head(name: str, tmp_path: Path) -> None:
    """As AutoModel makes it for embeddings and rewards: its names lack the first part."""
    base = RELEASES[name].write(tmp_path / "base")
    whole = load_pretrained(base, dtype=torch.float32)
    model = adapted(whole.model, tmp_path / "adapter", target_modules=["q_proj", "o_proj"], r=2)
    merge(base, tmp_path / "adapter", tmp_path / "out", to="bf16")
    expected = model.merge_and_unload().state_dict()
    for key, found in load_pretrained(tmp_path / "out").model.state_dict().items():
        assert torch.allclose(found.float(), expected[key], rtol=2**-7, atol=1e-6), key


def trained(base: Path, directory: Path, dtype: torch.dtype = torch.float32, std: float = 0.2, **config: Any) -> Any:
    """A base with an adapter of random values, which is saved."""
    return adapted(load_pretrained(base, dtype=dtype), directory, std, **config)


def adapted(model: Any, directory: Path, std: float = 0.2, **config: Any) -> Any:
    """A model with an adapter of random values, which is saved."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if re.search(r"lora_(embedding_)?[AB]", name):
            torch.nn.init.normal_(parameter, std=std)
        elif "modules_to_save" in name or "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
            parameter.data += 0.1 * name.endswith(".bias")
    model.save_pretrained(directory)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_merged_by_peft_and_by_us(case: str, tmp_path: Path) -> None:
    """What PEFT merges into the model in float32 is what is merged into the files, rounded once; and to FP8 the same
    tensors change, and most of it arrives.
    """
    name, config = CASES[case]
    base = RELEASES[name].write(tmp_path / "base")
    model = trained(base, tmp_path / "adapter", **config)
    merge(base, tmp_path / "adapter", tmp_path / "bf16", to="bf16")
    result = merge(base, tmp_path / "adapter", tmp_path / "fp8")
    expected = model.merge_and_unload().state_dict()
    found = load_pretrained(tmp_path / "bf16", dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    equal = count = 0
    for key, value in expected.items():
        ours, theirs = found[key].bfloat16(), value.bfloat16()
        assert torch.allclose(ours, theirs, rtol=2**-7, atol=1e-6), key
        equal, count = equal + int((ours == theirs).sum()), count + ours.numel()
    assert equal > 0.999 * count  # float32's own order of addition tips a rounding here and there
    assert result.report.total.arrived == pytest.approx(1, abs=0.01)
    assert verify(tmp_path / "fp8").ok
    old, new = read_directory(base), read_directory(tmp_path / "fp8")
    merged = {row.name for row in result.report.weights}
    assert {key for key in old if old[key] != new[key]} >= {open_checkpoint(base)[row].span.name for row in merged}
    assert result.merged == len(merged) > 0


TIED = {
    "Gemma2ForCausalLM": ("model.embed_tokens", "lm_head"),
    "OPTForCausalLM": ("model.decoder.embed_tokens", "lm_head"),
    "WhisperForConditionalGeneration": ("model.decoder.embed_tokens", "proj_out"),
    "BloomForCausalLM": ("transformer.word_embeddings", "lm_head"),
    "GPTNeoXForCausalLM": ("gpt_neox.embed_in", "lm_head"),
    "CamembertForCausalLM": ("roberta.embeddings.word_embeddings", "lm_head.decoder"),
    "T5ForConditionalGeneration": ("shared", "lm_head"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", TIED)
def test_what_becomes_of_a_tied_head(name: str, *, twice: bool, tmp_path: Path) -> None:
    """Whatever it is called, and whether the base stores it or not: where PEFT's merge leaves embeddings and head one
    tensor, so does ours, and a note says so; where it parts them, for which the base has no room, it is refused. So are
    factors of the head, with which PEFT changes the embeddings; those that are tied themselves are merged once.
    """
    embeddings, head = TIED[name]
    built(name).save_pretrained(tmp_path / "base")
    if twice:
        file = tmp_path / "base/model.safetensors"
        stored = read_safetensors(file)
        write_safetensors(file, {**stored, f"{head}.weight": stored[f"{embeddings}.weight"]}, {"format": "pt"})

    def merged(number: int, text: str | None, **config: Any) -> None:
        adapter, out = tmp_path / f"adapter {number}", tmp_path / f"out {number}"
        model = trained(tmp_path / "base", adapter, **config)
        if text is not None:
            with pytest.raises(UnsupportedFormatError, match=text):
                merge(tmp_path / "base", adapter, out)
            return
        layer = model.get_base_model().get_submodule(embeddings)
        whole = "modules_to_save" in config
        expected = layer.weight if whole else layer.base_layer.weight + layer.get_delta_weight("default")
        if config.get("use_dora"):
            expected = model.merge_and_unload().get_submodule(embeddings).weight
        notes = merge(tmp_path / "base", adapter, out, to="bf16").notes
        [note] = [note for note in notes if f"{head}.weight" in note and "as well" in note]
        assert ("added once" in note) == (not whole and "ensure_weight_tying" in config)
        found = load_pretrained(out)
        for one in (found.get_submodule(embeddings), found.get_submodule(head)):
            assert torch.allclose(one.weight.float(), expected.bfloat16().float(), rtol=2**-7, atol=1e-6)

    linears = {"target_modules": r".*\.(query_key_value|q_proj|query|q)$", "r": 2}
    apart = "separately from the tensors that the base ties it to.*unties them"
    merged(0, apart, **linears, modules_to_save=[embeddings])
    merged(1, None, target_modules=[embeddings], r=2, use_dora=twice)
    merged(2, f"the base ties {head}.weight to .*would change with these", target_modules=[head], r=2)
    merged(3, f"the base ties {head}.weight to .*would change with these", target_modules=[embeddings, head], r=2)
    if embeddings.endswith("embed_tokens"):  # the names of which PEFT knows that they are tied
        merged(4, None, **linears, modules_to_save=[embeddings], ensure_weight_tying=True)
        merged(5, None, target_modules=[embeddings], r=2, ensure_weight_tying=True)


@pytest.mark.filterwarnings("ignore")
def test_biases_of_modules_that_are_saved_whole(tmp_path: Path) -> None:
    """With bias="all", PEFT saves them under two names, and those of before as well."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}
    OPTForCausalLM(OPTConfig(num_hidden_layers=1, vocab_size=64, **sizes)).save_pretrained(tmp_path / "base")
    given = {"target_modules": ["q_proj"], "modules_to_save": ["final_layer_norm"], "bias": "all", "r": 2}
    expected = trained(tmp_path / "base", tmp_path / "adapter", **given).merge_and_unload().state_dict()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", to="bf16")
    merged = load_pretrained(tmp_path / "out").state_dict()
    for key, value in expected.items():
        assert torch.allclose(merged[key].float(), value, rtol=2**-8, atol=1e-6), key
    norm = "model.decoder.final_layer_norm.bias"
    assert not torch.equal(merged[norm].float(), open_checkpoint(tmp_path / "base").read(norm).float())


@pytest.mark.filterwarnings("ignore")
def test_experts_in_four_bits(tmp_path: Path) -> None:
    """gpt-oss, whose codes lie across the experts that PEFT adapts, and of which one stack is square: what it merges in
    float32 is what is merged in BF16, and back in MXFP4 most of it arrives.
    """
    base = gpt_oss(tmp_path / "base")
    model = trained(base, tmp_path / "a", std=0.05, target_modules=["q_proj"], target_parameters=EXPERTS, r=2)
    merge(base, tmp_path / "a", tmp_path / "bf16", to="bf16")
    result = merge(base, tmp_path / "a", tmp_path / "fp4")
    found = load_pretrained(tmp_path / "bf16", dtype=torch.float32).state_dict()
    for name, value in model.merge_and_unload().state_dict().items():
        assert (found[name].bfloat16() == value.bfloat16()).double().mean() > 0.999, name
    assert result.merged == 6
    experts = [row.arrived for row in result.report.weights if "experts" in row.name]
    assert experts == pytest.approx([0.9] * 4, abs=0.05)  # the OCP's scales clip what is above six of them
    assert verify(tmp_path / "fp4").ok


@pytest.mark.filterwarnings("ignore")
def test_experts_apart_whose_stacks_interleave_gate_and_up(tmp_path: Path) -> None:
    """Of gpt-oss, as quantizers save it that know Linears alone: neither an adapter nor a model has stacks of such."""
    base, apart = gpt_oss(tmp_path / "base"), tmp_path / "apart"
    trained(base, tmp_path / "a", target_modules=["q_proj"], target_parameters=EXPERTS, r=2)
    convert(base, tmp_path / "stacked")
    tensors = read_directory(tmp_path / "stacked")
    for name in [name for name in tensors if re.search(r"experts\.\w+_proj$", name)]:
        (stem, _, leaf), whole = name.rpartition("."), tensors.pop(name)
        for i, expert in enumerate(whole.array.transpose(0, 2, 1)):
            for k, part in enumerate(leaf.replace("gate_up_proj", "gate_proj up_proj").split()):
                rows = expert[k::2] if "gate" in leaf else expert
                tensors[f"{stem}.{i}.{part}.weight"] = Stored.of(rows, whole.dtype)
    apart.mkdir()
    write_safetensors(apart / "model.safetensors", tensors, {"format": "pt"})
    shutil.copy(tmp_path / "stacked/config.json", apart)
    with pytest.raises(UnsupportedFormatError, match="interleave the rows of gate and up"):
        merge(apart, tmp_path / "a", tmp_path / "merged")
    with pytest.raises(UnsupportedFormatError, match="interleave the rows of gate and up"):
        convert(apart, tmp_path / "out", layout="model")


@pytest.mark.filterwarnings("ignore")
def test_a_client_in_bf16(tmp_path: Path) -> None:
    """PEFT on the model in BF16 adds to a base that was rounded: it is further from the sum in float64 than we are, who
    round once.
    """
    base = RELEASES["Llama, ModelOpt"].write(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj"
    model = trained(base, tmp_path / "adapter", torch.bfloat16, 0.01, target_modules=["q_proj"])
    layer = model.get_base_model().get_submodule(name)
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    convert(base, tmp_path / "f32", to="fp32")
    exact = open_checkpoint(tmp_path / "f32").read(f"{name}.weight").double() + layer.scaling["default"] * (b @ a)
    merge(base, tmp_path / "adapter", tmp_path / "bf16", to="bf16")
    ours = open_checkpoint(tmp_path / "bf16").read(f"{name}.weight").double()
    theirs = model.merge_and_unload().get_submodule(name).weight.double()
    off = (ours - exact).norm(), (theirs - exact).norm()
    assert 1.1 * off[0] < off[1] < 2 * off[0]
    assert 0.1 < (ours != theirs).double().mean() < 0.9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "text"), [
    (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "peft_type is IA3"),
    (peft.LoHaConfig(target_modules=["q_proj"]), "peft_type is LOHA"),
    (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), "peft_type is ADALORA"),
    (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), "init_lora_weights is olora"),
    (peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "trainable_token_indices"),
])  # fmt: skip
def test_what_peft_saves_and_we_refuse(config: Any, text: str, tmp_path: Path) -> None:
    """By name, and nothing is written."""
    base = RELEASES["Ministral3 text"].write(tmp_path / "base")
    peft.get_peft_model(load_pretrained(base, dtype=torch.float32), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(Exception, match=text) as caught:
        merge(base, tmp_path / "adapter", tmp_path / "out")
    assert type(caught.value).__name__ == "UnsupportedFormatError"
    assert not (tmp_path / "out").exists()


def test_a_model_with_adapters_in_it_is_not_saved(sample_fp8: Path, tmp_path: Path) -> None:
    """Neither under PEFT's names nor without what was trained."""
    model = peft.get_peft_model(load_pretrained(sample_fp8), peft.LoraConfig(target_modules=["q_proj"]))
    for how in ({}, {"like": sample_fp8}, {"like": sample_fp8, "to": "fp8"}):
        with pytest.raises(ModelMismatchError, match=r"PEFT adapters .*merge_and_unload"):
            save_model(model, tmp_path / "out", **how)
    for held in (model, model.base_model.model):
        with pytest.raises(ModelMismatchError, match=r"PEFT adapters .*before adapters are added"):
            load_model(held, sample_fp8)
    save_model(model.merge_and_unload(), tmp_path / "out", like=sample_fp8)
    assert verify(sample_fp8, tmp_path / "out").ok  # a fresh adapter adds nothing

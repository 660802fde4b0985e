"""What is written is what transformers needs: it loads, BF16 or FP8, and is bit for bit what transformers dequantizes
itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DeepseekV3ForCausalLM,
    FineGrainedFP8Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from fp8ckpt import convert, open_checkpoint, sample
from fp8ckpt.sample import DeepseekSizes
from tests.test_to_fp8_runs import grow

PROMPT = torch.tensor([[1, 300, 17, 42, 255, 3, 99]])
# Four patches after merging 2 x 2: an image of 56 x 56 has 4 x 4 patches of 14.
WITH_IMAGE = torch.tensor([[1, 3, 10, 10, 10, 10, 200, 4, 60]])


@pytest.fixture(scope="module", params=["identity", "nested"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedModel, PreTrainedModel]:
    """(the converted directory, its model, transformers' own dequantized load of the FP8 source)."""
    folder = tmp_path_factory.mktemp(request.param)
    source = sample(folder / "fp8", layout=request.param)
    convert(source, folder / "bf16")
    quantization = json.loads((source / "config.json").read_text())["quantization_config"]
    skipped = quantization["modules_to_not_convert"]
    config = FineGrainedFP8Config(
        dequantize=True, weight_block_size=None, activation_scheme="static", modules_to_not_convert=skipped
    )
    ours, info = Mistral3ForConditionalGeneration.from_pretrained(
        folder / "bf16", dtype=torch.bfloat16, output_loading_info=True
    )
    assert {key: list(names) for key, names in info.items() if names} == {}
    theirs = Mistral3ForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    return folder / "bf16", ours.eval(), theirs.eval()


Models = tuple[Path, PreTrainedModel, PreTrainedModel]


def assert_equal_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours.contiguous().view(torch.int16), theirs.contiguous().view(torch.int16))


def test_weights_equal_transformers_own_load(models: Models) -> None:
    """Every parameter, bit for bit; and every tensor of the file is a parameter."""
    out, ours, theirs = models
    one, two = ours.state_dict(), theirs.state_dict()
    assert {name for name in two if "scale" in name} <= {
        name for name in two if name.endswith(("activation_scale", "scale_inv"))
    }
    assert one.keys() == {name for name in two if "scale" not in name}
    for name, tensor in one.items():
        assert_equal_bits(tensor, two[name])
    assert len(open_checkpoint(out).tensors) == len(one)


def test_weights_are_those_of_the_file(models: Models) -> None:
    """The loaded parameters hold the file's values: nothing is left at its initial value."""
    out, ours, _ = models
    checkpoint = open_checkpoint(out)
    left = {tensor.contiguous().view(torch.int16).numpy().tobytes() for tensor in ours.state_dict().values()}
    for name in checkpoint.tensors:
        assert checkpoint.read(name).view(torch.int16).numpy().tobytes() in left


def test_logits_of_text_are_equal(models: Models) -> None:
    """The same logits, bit for bit, and real numbers that differ by position."""
    _, ours, theirs = models
    with torch.no_grad():
        one, two = ours(input_ids=PROMPT).logits, theirs(input_ids=PROMPT).logits
    assert one.shape == (1, 7, 512)
    assert torch.isfinite(one).all()
    assert one.float().std() > 0.01
    assert_equal_bits(one, two)


def test_logits_with_an_image_are_equal(models: Models) -> None:
    """The vision tower and projector take part: equal logits with an image, other ones with another image."""
    _, ours, theirs = models
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    inputs = {"input_ids": WITH_IMAGE, "image_sizes": torch.tensor([[56, 56]])}
    with torch.no_grad():
        one = ours(**inputs, pixel_values=pixels).logits
        two = theirs(**inputs, pixel_values=pixels).logits
        other = ours(**inputs, pixel_values=-pixels).logits
    assert torch.isfinite(one).all()
    assert_equal_bits(one, two)
    assert not torch.equal(one, other)


def test_tokenizer_round_trips_text(models: Models) -> None:
    """The tokenizer that was copied loads, and text of every kind survives; special tokens are single ids."""
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    for text in ("Hello, world!", " leading space", "déjà vu 日本 🙂", "tabs\tand\nlines", "{'a': [1, 2]}"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert max(ids) < 512
        assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids("[IMG]") == 10
    assert tokenizer.encode("[INST]x", add_special_tokens=False)[0] == 3
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 11)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[INST]hi[/INST]"


def test_config_names_no_quantization(models: Models) -> None:
    """What transformers loaded is a plain bf16 model."""
    _, ours, _ = models
    assert getattr(ours.config, "quantization_config", None) is None
    assert ours.config.dtype == torch.bfloat16


def test_block_scales_load_in_deepseek(sample_block: Path, tmp_path: Path) -> None:
    """The DeepSeek-shaped sample, converted, loads with every key, and its logits are finite."""
    convert(sample_block, tmp_path / "bf16")
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "bf16", dtype=torch.bfloat16, output_loading_info=True
    )
    assert {key: list(names) for key, names in info.items() if names} == {}
    with torch.no_grad():
        logits = model.eval()(input_ids=PROMPT).logits
    assert logits.shape == (1, 7, 512)
    assert torch.isfinite(logits).all()
    assert logits.float().std() > 0.01


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the miniature as ``fp8`` and a ``trained`` BF16 copy, of which some weights have outgrown their
    scale.
    """
    folder = tmp_path_factory.mktemp("trained")
    sample(folder / "fp8")
    convert(folder / "fp8", folder / "plain")
    grow(folder / "plain", folder / "trained", value=1.0)
    return folder


@pytest.mark.parametrize("how", ["like", "like serving", "per-tensor"])
def test_fp8_outputs_load_as_they_dequantize(how: str, trained: Path, tmp_path: Path) -> None:
    """transformers' weights and logits of the output are bit-equal to those of its conversion to BF16."""
    out, plain = tmp_path / "out", tmp_path / "plain"
    if how.startswith("like"):
        result = convert(trained / "trained", out, to="fp8", like=trained / "fp8", serving="serving" in how)
        assert result.report is not None
        assert result.report.total.moved
        assert 0 < result.report.total.fresh < result.report.total.scales
    else:
        convert(trained / "trained", out, to="fp8", scheme=how)
    convert(out, plain)
    stated = json.loads((out / "config.json").read_text())["quantization_config"]
    stated = {key: stated[key] for key in ("activation_scheme", "weight_block_size", "modules_to_not_convert")}
    ours = Mistral3ForConditionalGeneration.from_pretrained(plain, dtype=torch.bfloat16).eval()
    theirs, info = Mistral3ForConditionalGeneration.from_pretrained(
        out,
        dtype=torch.bfloat16,
        quantization_config=FineGrainedFP8Config(dequantize=True, **stated),
        output_loading_info=True,
    )
    assert {
        key: [name for name in names if "activation_scale" not in name] for key, names in info.items() if names
    } in ({}, {"unexpected_keys": []})
    two = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert_equal_bits(tensor, two[name])
    given = Mistral3ForConditionalGeneration.from_pretrained(trained / "trained", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        one, other, before = (model(input_ids=PROMPT).logits for model in (ours, theirs.eval(), given))
    assert torch.isfinite(one).all()
    assert one.float().std() > 0.01
    assert_equal_bits(one, other)
    assert not torch.equal(one, before)  # 8 bits are fewer than 16
    assert (one.float() - before.float()).abs().mean() < 0.2 * before.float().std()


def test_block_scheme_loads_in_deepseek(tmp_path: Path) -> None:
    """The same of experts and latent attention, whose sizes are whole blocks, as transformers needs them."""
    attention = {"q_rank": 128, "kv_rank": 112, "nope_dim": 48, "v_dim": 16}
    base = sample(tmp_path / "fp8", DeepseekSizes(hidden=256, intermediate=384, expert_intermediate=128, **attention))
    convert(base, tmp_path / "plain")
    out = tmp_path / "out"
    convert(tmp_path / "plain", out, to="fp8", scheme="block")
    convert(out, tmp_path / "again")
    ours = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16).eval()
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=[128, 128], activation_scheme="dynamic")
    theirs = DeepseekV3ForCausalLM.from_pretrained(out, dtype=torch.bfloat16, quantization_config=config).eval()
    two = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if tensor.dtype == torch.bfloat16:
            assert_equal_bits(tensor, two[name])
    with torch.no_grad():
        assert_equal_bits(ours(input_ids=PROMPT).logits, theirs(input_ids=PROMPT).logits)

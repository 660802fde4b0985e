"""Loading into models: unsharded, FSDP2, TP, both, pipeline stages; strict on every rank; tied; runnable; equal to
transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from transformers import AutoConfig, FineGrainedFP8Config, Ministral3ForCausalLM, Mistral3ForConditionalGeneration

import fp8ckpt
from fp8ckpt import (
    Checkpointer,
    FP8StorageReader,
    StateDictAdapter,
    convert,
    load_model,
    load_pretrained,
    open_checkpoint,
    sample,
    save_model,
    verify,
)
from fp8ckpt.checkpoint import checkpointing
from fp8ckpt.errors import ConfigError, MissingScaleError, ModelMismatchError, RegionError, ScaleValueError
from fp8ckpt.families.names import find_layout
from fp8ckpt.models.mistral3_vlm.state_dict_adapter import Mistral3FP8StateDictAdapter
from tests.distributed import (
    UNEVEN,
    assert_same,
    bits,
    fsdp,
    local,
    mesh,
    rewrite,
    run,
    stage,
    tied,
    tp,
    tp_fsdp,
    whole,
)
from tests.families.releases import RELEASES
from tests.oracle import Stored, dequantize, read_directory, write_plain, write_safetensors
from tests.support import ALL

PROMPT = torch.tensor([[1, 300, 17, 42, 255, 3, 99]])
THREE_UNEVEN = replace(UNEVEN, layers=3)


@pytest.fixture(scope="module")
def paths(sample_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample in both layouts, and one of uneven sizes."""
    root = tmp_path_factory.mktemp("models")
    nested = sample(root / "nested", layout="nested")
    return {"identity": sample_fp8, "nested": nested, "uneven": sample(root / "uneven", THREE_UNEVEN, layout="nested")}


@pytest.fixture(scope="module")
def theirs(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """transformers' own load of the FP8 sources, dequantized; their logits are saved for ranks to compare."""
    found = {}
    for name in ("identity", "nested"):
        quantization = json.loads((paths[name] / "config.json").read_text())["quantization_config"]
        skipped = quantization["modules_to_not_convert"]
        config = FineGrainedFP8Config(
            dequantize=True, weight_block_size=None, activation_scheme="static", modules_to_not_convert=skipped
        )
        how: dict[str, Any] = {"dtype": torch.bfloat16, "quantization_config": config}
        found[name] = Mistral3ForConditionalGeneration.from_pretrained(paths[name], **how).eval()
    return found


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


def _assert_loaded(model: nn.Module, path: Path) -> None:
    """Every tensor of the state dict has the bits that the checkpoint's own read gives."""
    checkpoint = open_checkpoint(path)
    state = model.state_dict()
    layout = find_layout(state, checkpoint.tensors)
    for name, tensor in state.items():
        assert_same(whole(tensor), checkpoint.read(layout.native_to_hf(name)), name)


@contextmanager
def _bf16(device: str) -> Iterator[None]:
    """Parameters made within it are BF16, and buffers that must be float32 stay so, as ``from_pretrained`` does."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _meta_model(path: Path, device: str = "meta") -> Any:
    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _bf16(device):
        return Mistral3ForConditionalGeneration(config)


def _source_bytes(path: Path) -> dict[str, int]:
    """Bytes on disk of each logical tensor, scales aside."""
    return {name: (getattr(t, "weight", None) or t).nbytes for name, t in open_checkpoint(path).tensors.items()}


class _Counting(FP8StorageReader):
    made: list[_Counting] = []  # noqa: RUF012  # of this process

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.made.append(self)

    @classmethod
    def total(cls) -> int:
        count = sum(reader.bytes_read for reader in cls.made)
        cls.made.clear()
        return count


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("name", ["identity", "nested"])
def test_equals_transformers_own_load(name: str, paths: dict[str, Path], theirs: dict[str, Any]) -> None:
    """One line gives a model of the checkpoint's bits, with transformers' logits and buffers, and generation config."""
    model = load_pretrained(paths[name])
    assert type(model) is Mistral3ForConditionalGeneration
    assert not model.training
    _assert_loaded(model, paths[name])
    assert_same(_logits(model), _logits(theirs[name]))
    buffers, expected = dict(model.named_buffers()), dict(theirs[name].named_buffers())
    for key in buffers:
        assert_same(buffers[key], expected[key], key)
    assert len(buffers) >= 2
    assert model.generation_config.eos_token_id == 2
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("name", ["identity", "uneven"])
@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, "F32"), (torch.float16, "F16")])
def test_other_dtypes_are_rounded_once(name: str, dtype: torch.dtype, stored: str, paths: dict[str, Path]) -> None:
    """A float32 model has the float32 products, not those of bfloat16; a float16 one their roundings."""
    model = load_pretrained(paths[name], dtype=dtype)
    tensors, checkpoint = read_directory(paths[name]), open_checkpoint(paths[name])
    state = model.state_dict()
    layout = find_layout(state, checkpoint.tensors)
    quantized = {tensor.name for tensor in checkpoint.quantized}
    for key, tensor in state.items():
        assert tensor.dtype == dtype
        hf = layout.native_to_hf(key)
        if hf in quantized:
            assert bits(tensor) == dequantize(tensors[hf], tensors[hf + "_scale_inv"], tensors[hf].shape, stored), key
        else:
            assert bits(tensor) == bits(checkpoint.read(hf).to(dtype)), key


def test_loads_in_place(paths: dict[str, Path]) -> None:
    """Parameters keep memory and gradient flags, given a string, an open checkpoint, or by a Checkpointer."""
    model = _meta_model(paths["nested"], "cpu")
    model.model.vision_tower.requires_grad_(False)
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    for load in (
        lambda: load_model(model, str(paths["nested"])),
        lambda: load_model(model, open_checkpoint(paths["nested"])),
        lambda: Checkpointer().load_model(model, paths["nested"]),
    ):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        load()
        _assert_loaded(model, paths["nested"])
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("name", ["identity", "uneven"])
def test_buffers_are_restored(name: str, paths: dict[str, Path]) -> None:
    """A model made on meta and emptied has its rotary frequencies again: all buffers equal those of a fresh model."""
    model = _meta_model(paths[name])
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(77)
    load_model(model, paths[name])
    expected = dict(_meta_model(paths[name], "cpu").named_buffers())
    assert any(key.endswith("inv_freq") for key in expected)
    for key, buffer in model.named_buffers():
        assert_same(buffer, expected[key], key)
    assert bool(torch.isfinite(_logits(model)).all())


def test_buffers_of_a_module_that_holds_the_model(paths: dict[str, Path]) -> None:
    """Under a trainer's wrapper, the inner model's buffers are restored, and the wrapper's own left alone."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _meta_model(paths["identity"])
            self.register_buffer("own", torch.zeros(2), persistent=False)
            self.state_dict_adapter = Mistral3FP8StateDictAdapter(
                native_to_hf=lambda k: k.removeprefix("inner."), hf_to_native=lambda k: "inner." + k
            )

    wrapper = Wrapper()
    wrapper.inner.to_empty(device="cpu")
    for buffer in wrapper.buffers():
        buffer.fill_(77)
    load_model(wrapper, paths["identity"])
    _assert_loaded(wrapper.inner, paths["identity"])
    assert wrapper.own.tolist() == [77, 77]
    fresh = dict(_meta_model(paths["identity"], "cpu").named_buffers())
    for key, buffer in wrapper.inner.named_buffers():
        assert_same(buffer, fresh[key], key)


def test_preflight_line_comes_before_the_first_byte(
    paths: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rank will hold and read is logged before any data is: the numbers are exact."""
    path = paths["identity"]
    seen: list[str] = []

    class Reader(_Counting):
        def read_data(self, *arguments: Any) -> Any:
            seen.extend(record.getMessage() for record in caplog.records if record.name.startswith("fp8ckpt"))
            assert self.bytes_read == 0
            return super().read_data(*arguments)

    monkeypatch.setattr(checkpointing, "FP8StorageReader", Reader)
    with caplog.at_level(logging.INFO):
        model = load_pretrained(path)
    held, source = sum(p.nbytes for p in model.parameters()), sum(_source_bytes(path).values())
    [line] = seen
    assert f"holds {held} bytes" in line
    assert f"reads {source} bytes" in line
    assert Reader.total() == source


def test_load_pretrained_refuses_an_unknown_architecture(paths: dict[str, Path], tmp_path: Path) -> None:
    """A class that transformers does not have is named."""
    path = rewrite(paths["identity"], tmp_path / "strange", config=lambda c: c.update(architectures=["NoSuchModel"]))
    with pytest.raises(ConfigError, match="NoSuchModel"):
        load_pretrained(path)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", ["identity", "nested", "uneven"])
def test_models_own_adapter(name: str, paths: dict[str, Path]) -> None:
    """``model.state_dict_adapter`` gives the names: the same bits as without it."""
    model = _meta_model(paths[name])
    model.state_dict_adapter = Mistral3FP8StateDictAdapter.from_checkpoint(paths[name])
    model.to_empty(device="cpu")
    load_model(model, paths[name])
    _assert_loaded(model, paths[name])


@pytest.mark.parametrize("name", ["identity", "nested"])
def test_placeholders_and_reader_give_the_same_bits(name: str, paths: dict[str, Path]) -> None:
    """to_hf, torch's or our reader, from_hf: what `load_model` gives, by both ways of a host."""
    model = load_pretrained(paths[name])
    adapter = Mistral3FP8StateDictAdapter.from_checkpoint(paths[name])
    for quantization, reader in (
        (True, HuggingFaceStorageReader(str(paths[name]))),
        (True, FP8StorageReader(paths[name])),
        (False, FP8StorageReader(paths[name])),
    ):
        state = {key: torch.full_like(tensor, float("nan")) for key, tensor in model.state_dict().items()}
        hf = adapter.to_hf(state, quantization=quantization)
        dcp.load(hf, storage_reader=reader, no_dist=True)
        native = adapter.from_hf(hf)
        assert native.keys() == model.state_dict().keys()
        for key, tensor in model.state_dict().items():
            assert_same(native[key], tensor, key)


class _FusedAdapter(StateDictAdapter):
    """On disk two tensors, in the model one: it makes new tensors, which must be carried back."""

    def to_hf(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {"q.weight": state_dict["qk"][:40].clone(), "k.weight": state_dict["qk"][40:].clone()}

    def from_hf(self, hf_state_dict: dict[str, Any], device_mesh: Any = None, **kwargs: Any) -> dict[str, Any]:
        return {"qk": torch.cat([hf_state_dict["q.weight"], hf_state_dict["k.weight"]])}

    def convert_single_tensor_to_hf(self, fqn: str, tensor: Any, **kwargs: Any) -> list[tuple[str, Any]]:
        return [("q.weight", tensor[:40]), ("k.weight", tensor[40:])]


def test_an_adapter_that_makes_new_tensors(tmp_path: Path) -> None:
    """Values that an adapter cuts apart for the disk come together in the parameter; and are saved apart again."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, rows in (("q.weight", 40), ("k.weight", 24)):
        tensors[name] = Stored.codes(rng.integers(0, 0x7F, (rows, 8), np.uint8))
        tensors[name + "_scale_inv"] = Stored.of(np.array(0.01 * rows, np.float32), "F32")
    write_plain(tmp_path / "fp8", tensors)
    model = nn.Module()
    model.qk = nn.Parameter(torch.zeros(64, 8, dtype=torch.bfloat16))
    model.state_dict_adapter = _FusedAdapter()
    load_model(model, tmp_path / "fp8")
    checkpoint = open_checkpoint(tmp_path / "fp8")
    assert_same(model.qk.detach(), torch.cat([checkpoint.read("q.weight"), checkpoint.read("k.weight")]))
    fp8ckpt.save_model(model, tmp_path / "bf16", like=tmp_path / "fp8")
    for name in ("q.weight", "k.weight"):
        assert_same(open_checkpoint(tmp_path / "bf16").read(name), checkpoint.read(name))


def test_persistent_buffers_are_loaded(tmp_path: Path) -> None:
    """A buffer that the checkpoint holds is a tensor like any other."""
    write_safetensors(tmp_path / "model.safetensors", {"bias": Stored.of(np.arange(4, dtype=np.float32), "F32")})
    model = nn.Module()
    model.register_buffer("bias", torch.full((4,), -1.0))
    model.register_buffer("cache", torch.full((2,), 5.0), persistent=False)
    load_model(model, tmp_path)
    assert model.bias.tolist() == [0, 1, 2, 3]
    assert model.cache.tolist() == [5, 5]


def test_wrapped_models_are_what_they_wrap(tmp_path: Path) -> None:
    """Compiled, with checkpointed activations, in DDP, as a whole and a layer: the same values under the same names,
    the buffers that a checkpoint holds among them; and saved as if there were no wrapper.
    """
    base = RELEASES["DeepSeek-V3"].write(tmp_path / "fp8")
    model = load_pretrained(base)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = model.model.layers
    layers[0], layers[1] = torch.compile(layers[0]), torch.compile(checkpoint_wrapper(layers[1]))
    for tensor in model.state_dict().values():
        tensor.detach().fill_(3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(model))
        load_model(wrapped, base)
        fp8ckpt.save_model(wrapped, tmp_path / "back", to="fp8", like=base)
        fp8ckpt.save_model(wrapped, tmp_path / "bf16")
    finally:
        dist.destroy_process_group()
    assert all((tmp_path / "back" / file.name).read_bytes() == file.read_bytes() for file in base.iterdir())
    saved = open_checkpoint(tmp_path / "bf16")
    assert saved.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(saved.read(name), tensor)  # what is float32 is so by its class
    assert saved.config["architectures"] == ["DeepseekV3ForCausalLM"]


# ---------------------------------------------------------------- strictness


def _mismatches() -> dict[str, tuple[Callable[[Any], None], bool, str]]:
    """By name: a change of the model, whether it is loaded as a part, and what the message must say."""

    def extra(model: Any) -> None:
        model.model.language_model.extra = nn.Linear(2, 2, bias=False)

    def unused(model: Any) -> None:
        model.lm_head = None

    def shape(model: Any) -> None:
        model.model.language_model.layers[0].mlp.up_proj = nn.Linear(128, 255, bias=False)

    def meta(model: Any) -> None:
        model.lm_head = nn.Linear(128, 512, bias=False, device="meta")

    def codes(model: Any) -> None:
        model.model.language_model.layers[0].mlp.up_proj.to(torch.float8_e4m3fn)

    return {
        "codes": (codes, False, "up_proj.weight: a parameter of dtype torch.float8_e4m3fn; expected bfloat16"),
        "missing": (extra, False, "1 tensors of the model are not in it: model.language_model.extra.weight"),
        "missing of a part": (extra, True, "1 tensors of the model are not in it: model.language_model.extra.weight"),
        "unused": (unused, False, "1 of its tensors are not in the model: lm_head.weight"),
        "shape": (shape, False, "model.language_model.layers.0.mlp.up_proj.weight"),
        "shape of a part": (shape, True, "model.language_model.layers.0.mlp.up_proj.weight"),
        "meta": (meta, False, "1 tensors are on the meta device: lm_head.weight"),
    }


@pytest.mark.parametrize("case", _mismatches())
def test_mismatches_are_refused_before_any_data(case: str, paths: dict[str, Path]) -> None:
    """Missing, unused, of another shape, on meta: `ModelMismatchError` lists the names, and no parameter changes."""
    change, partial, text = _mismatches()[case]
    model = _meta_model(paths["identity"])
    model.to_empty(device="cpu")
    change(model)
    held = [p for p in model.parameters() if not p.is_meta]
    with torch.no_grad():
        for parameter in held:
            parameter.fill_(3)
    with pytest.raises(ModelMismatchError) as caught:
        load_model(model, paths["identity"], partial=partial)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(bool((parameter == 3).all()) for parameter in held)


def test_memory_that_cannot_hold_it_is_refused(tmp_path: Path) -> None:
    """Two parameters in one memory, unless they are equal on disk; elements in one place; tensors of inference mode."""
    rng = np.random.default_rng(0)
    stored = {f"{name}.weight": Stored.of(rng.standard_normal((4, 6)), "F32") for name in ("up", "gate")}
    write_safetensors(tmp_path / "differ.safetensors", stored)
    write_safetensors(tmp_path / "equal.safetensors", dict.fromkeys(stored, stored["up.weight"]))

    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"up": nn.Linear(6, 4, bias=False), "gate": nn.Linear(6, 4, bias=False)})

    one = model()
    one["gate"].weight.data = one["up"].weight.data
    with pytest.raises(ModelMismatchError, match=r"gate\.weight.*they differ on disk"):
        load_model(one, tmp_path / "differ.safetensors")
    load_model(one, tmp_path / "equal.safetensors")
    assert torch.equal(one["gate"].weight, torch.from_numpy(stored["up.weight"].array.copy()))
    expanded = model()
    expanded["up"].weight = nn.Parameter(torch.zeros(1, 6).expand(4, 6))
    with pytest.raises(ModelMismatchError, match=r"up\.weight: its 24 elements share the memory of 6"):
        load_model(expanded, tmp_path / "differ.safetensors")
    empty = model()
    empty["extra"] = nn.Module()
    empty["extra"].weight = nn.Parameter(torch.zeros(4, 6)[4:, :1])  # the shard of a rank that has none of it
    write_safetensors(tmp_path / "empty.safetensors", {**stored, "extra.weight": Stored.of(np.zeros((0, 1)), "F32")})
    load_model(empty, tmp_path / "empty.safetensors")
    with torch.inference_mode():
        frozen = model()
    with pytest.raises(ModelMismatchError, match="inference mode"):
        load_model(frozen, tmp_path / "differ.safetensors")


def test_a_long_list_is_cut(paths: dict[str, Path]) -> None:
    """Ten names, and how many more there are."""
    model = nn.Linear(2, 2)
    with pytest.raises(ModelMismatchError, match="2 tensors of the model are not in it: bias, weight"):
        load_model(model, paths["identity"], partial=True)
    count = len(open_checkpoint(paths["identity"]).tensors)
    with pytest.raises(
        ModelMismatchError, match=rf"{count} of its tensors are not in the model: .* and {count - 10} more"
    ):
        load_model(nn.Module(), paths["identity"])


def test_arguments_that_are_none_are_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    """By a line that names them, whatever they are."""
    path = paths["identity"]
    for stated in (-1, True, 3, {}):
        rewrite(path, tmp_path / str(stated), config=lambda held, stated=stated: held.update(architectures=stated))
        with pytest.raises(ConfigError, match="architectures is"):
            load_pretrained(tmp_path / str(stated))
    other: Any = 3
    with pytest.raises(TypeError, match="parallelize=3"):
        load_pretrained(path, parallelize=other)
    with pytest.raises(TypeError, match="parallelize returned 3"):
        load_pretrained(path, parallelize=lambda model: other)
    for size in ("5GB", 0, -1):
        with pytest.raises(ValueError, match="max_file_bytes="):
            save_model(nn.Linear(2, 2), tmp_path / "saved", max_file_bytes=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers='a'"):
        convert(path, tmp_path / "out", workers="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers='a'"):
        verify(path, path, workers="a")  # type: ignore[arg-type]
    with pytest.raises(RegionError, match=r"offsets \(0\.5, 0\)"):
        open_checkpoint(path).read("lm_head.weight", offsets=(0.5, 0))  # type: ignore[arg-type]


def test_defects_of_the_checkpoint_surface_by_name(paths: dict[str, Path], tmp_path: Path) -> None:
    """A missing scale and one of NaN: the checkpoint's own errors, not torch's wrapping of them."""
    name = open_checkpoint(paths["identity"]).quantized[5].name
    missing = rewrite(
        paths["identity"], tmp_path / "missing", lambda t: {n: v for n, v in t.items() if n != name + "_scale_inv"}
    )
    with pytest.raises(MissingScaleError, match=name):
        load_pretrained(missing)
    nan = Stored("BF16", (), (0x7FC0).to_bytes(2, "little"))
    bad = rewrite(paths["identity"], tmp_path / "bad", lambda t: {**t, name + "_scale_inv": nan})
    with pytest.raises(ScaleValueError, match=name):
        load_pretrained(bad)


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("name", ["identity", "nested"])
def test_text_model_of_a_vlm(name: str, paths: dict[str, Path], theirs: dict[str, Any]) -> None:
    """The text model alone takes its part of the file, when told that it is one; its logits are the whole model's."""
    config = AutoConfig.from_pretrained(paths[name]).text_config
    with _bf16("meta"):
        model = Ministral3ForCausalLM(config)
    model.to_empty(device="cpu")
    with pytest.raises(ModelMismatchError, match="partial=True"):
        load_model(model, paths[name])
    load_model(model, paths[name], partial=True)
    _assert_loaded(model, paths[name])
    assert_same(_logits(model.eval()), _logits(theirs[name]))


def test_stages_in_one_process(paths: dict[str, Path]) -> None:
    """Each stage of two is loaded by itself; together they have every tensor once; without partial each is refused."""
    names: list[str] = []
    for i in range(2):
        model = load_pretrained(paths["nested"], parallelize=lambda m, i=i: stage(m, i, 2), partial=True)
        _assert_loaded(model, paths["nested"])
        names += model.state_dict()
    assert sorted(names) == sorted(load_pretrained(paths["nested"]).state_dict())
    with pytest.raises(ModelMismatchError, match="partial=True"):
        load_pretrained(paths["nested"], parallelize=lambda m: stage(m, 0, 2))


# ---------------------------------------------------------------- tied embeddings


def _untied(source: Path, destination: Path) -> Path:
    """The same model without ties: its head is a copy."""

    def untie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False

    return rewrite(tied(source, destination.with_name("equal"), "equal"), destination, None, untie)


@pytest.mark.parametrize("name", ["identity", "nested"])
def test_tied_embeddings(name: str, paths: dict[str, Path], tmp_path: Path) -> None:
    """No head on disk: after ``to_empty`` the head is the embeddings, one Parameter, and the logits are right."""
    path = tied(paths[name], tmp_path / "tied")
    model = load_pretrained(path)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    untied = load_pretrained(_untied(paths[name], tmp_path / "untied"))
    assert untied.lm_head.weight is not untied.model.language_model.embed_tokens.weight
    assert_same(_logits(model), _logits(untied))

    again = _meta_model(path)
    again.to_empty(device="cpu")
    again.state_dict_adapter = Mistral3FP8StateDictAdapter.from_checkpoint(path)
    load_model(again, path)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert_same(_logits(again.eval()), _logits(untied))


@pytest.mark.parametrize("name", ["identity", "nested"])
def test_tied_embeddings_that_are_on_disk_twice(name: str, paths: dict[str, Path], tmp_path: Path) -> None:
    """Equal ones are taken; different ones are refused, for one of the two would be lost."""
    model = load_pretrained(tied(paths[name], tmp_path / "equal", "equal"))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    with pytest.raises(ModelMismatchError, match="they differ on disk"):
        load_pretrained(tied(paths[name], tmp_path / "other", "other"))


def test_ties_of_a_plain_module(tmp_path: Path) -> None:
    """A module that is no transformers model, and shares a Parameter: either name on disk fills both."""
    values = Stored.of(np.arange(6, dtype=np.float32).reshape(3, 2), "F32")
    for name in ("a.weight", "b.weight"):
        path = write_plain(tmp_path / name, {name: values})
        model = nn.ModuleDict({"a": nn.Embedding(3, 2), "b": nn.Linear(2, 3, bias=False)})
        model["b"].weight = model["a"].weight
        load_model(model, path)
        assert model["b"].weight is model["a"].weight
        assert bits(model["a"].weight) == values.data


# ---------------------------------------------------------------- ranks


def _count(parts: list[Any]) -> dict[str, int]:
    """Bytes that this rank has read since it was last asked, and what its parts of the tensors are on disk."""
    model, path = parts
    source, checkpoint = _source_bytes(path), open_checkpoint(path)
    layout = find_layout(model.state_dict(), checkpoint.tensors)
    mine = replicated = 0
    for name, tensor in model.state_dict().items():
        hf = layout.native_to_hf(name)
        share = source[hf] * local(tensor).numel() // tensor.numel()
        mine += share
        if not isinstance(tensor, DTensor) or all(isinstance(p, Replicate) for p in tensor.placements):
            replicated += source[hf]
    return {"read": _Counting.total(), "mine": mine, "replicated": replicated}


def _on_ranks(paths: dict[str, Path], logits: dict[str, Path]) -> dict[str, Any]:
    checkpointing.FP8StorageReader = _Counting  # type: ignore[misc]
    size, rank = dist.get_world_size(), dist.get_rank()
    flat = mesh()
    counted: dict[str, Any] = {}
    for name, path in paths.items():
        model = load_pretrained(path, parallelize=lambda m: fsdp(m, flat))
        assert all(isinstance(p, DTensor) for p in model.parameters())
        counted[f"fsdp {name}"] = _count([model, path])
        _assert_loaded(model, path)
        if name in logits:
            assert_same(_logits(model), torch.load(logits[name]), name)

        model = load_pretrained(path, parallelize=lambda m: tp(m, flat))
        counted[f"tp {name}"] = _count([model, path])
        _assert_loaded(model, path)
        if size >= 4 and size % 2 == 0:
            both = mesh(2, size // 2, names=("dp", "tp"))
            model = load_pretrained(path, parallelize=lambda m, both=both: tp_fsdp(m, both))
            counted[f"2-D {name}"] = _count([model, path])
            _assert_loaded(model, path)

        model = load_pretrained(path, parallelize=lambda m: stage(m, rank, size), partial=True)
        counted[f"pp {name}"] = {**_count([model, path]), "names": list(model.state_dict())}
        _assert_loaded(model, path)
    return counted


def _on_ranks_of_dtype(path: Path) -> None:
    """A float32 model under FSDP2; one that is TP within each of two pipeline stages."""
    model = load_pretrained(path, parallelize=lambda m: fsdp(m, mesh()), dtype=torch.float32)
    alone = Checkpointer(dist.group.WORLD)
    expected = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    alone.load_model(model, path)
    tensors = read_directory(path)
    for name, tensor in model.state_dict().items():
        assert_same(whole(tensor), expected[name], name)
        if name + "_scale_inv" in tensors:
            assert bits(whole(tensor)) == dequantize(
                tensors[name], tensors[name + "_scale_inv"], tensors[name].shape, "F32"
            )
    if dist.get_world_size() == 4:
        both = mesh(2, 2, names=("pp", "tp"))
        index = both.get_local_rank("pp")
        model = load_pretrained(path, parallelize=lambda m: tp(stage(m, index, 2), both["tp"]), partial=True)
        assert any(isinstance(p, DTensor) for p in model.parameters())
        _assert_loaded(model, path)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8 if ALL else 6])
def test_every_sharding(ranks: int, paths: dict[str, Path], theirs: dict[str, Any], tmp_path: Path) -> None:
    """Every parameter has its bits on every mesh; FSDP2's logits are transformers'; each source byte is read once."""
    logits = {}
    for name, model in theirs.items():
        logits[name] = tmp_path / name
        torch.save(_logits(model), logits[name])
    # What divides evenly does so by 2 and by 4, and of 6 ranks some hold none of four rows; names depend on none.
    named = {1: ["nested"], 2: ["identity"], 3: ["uneven"], 4: ["identity"], 6: ["uneven"]}
    chosen = {name: paths[name] for name in (paths if ALL else named[ranks])}
    counts = run(ranks, _on_ranks, chosen, logits)
    for name, path in chosen.items():
        total = sum(_source_bytes(path).values())
        assert sum(count[f"fsdp {name}"]["read"] for count in counts) == total
        for kind in ("fsdp", "tp", "2-D", "pp"):
            for count in counts:
                if f"{kind} {name}" in count:
                    assert count[f"{kind} {name}"]["read"] == count[f"{kind} {name}"]["mine"], (kind, name)
        replicated = counts[0][f"tp {name}"]["replicated"]
        assert sum(count[f"tp {name}"]["read"] for count in counts) == total + (ranks - 1) * replicated
        assert sum(count[f"pp {name}"]["read"] for count in counts) == total
        stages = [key for count in counts for key in count[f"pp {name}"]["names"]]
        assert len(stages) == len(set(stages)) == len(open_checkpoint(path).tensors)


@pytest.mark.parametrize("ranks", [3, 4] if ALL else [4])
def test_float32_and_stages_of_tp(ranks: int, paths: dict[str, Path]) -> None:
    """Float32 parameters under FSDP2 have the float32 products; pipeline stages may be tensor-parallel within."""
    run(ranks, _on_ranks_of_dtype, paths["uneven"])


def _refused_on_ranks(path: Path, bad: Path) -> list[str]:
    """Each mismatch on one rank only, or on all: what this rank was told."""
    told = []
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    for change, partial, _ in _mismatches().values():
        for where in (last, 0, None):
            model = _meta_model(path)
            model.to_empty(device="cpu")
            if where in (rank, None):
                change(model)
            try:
                load_model(model, path, partial=partial)
            except ModelMismatchError as error:
                told.append(str(error))
            else:
                told.append("nothing was raised")
            dist.barrier()
    try:
        load_pretrained(bad, parallelize=lambda m: stage(m, rank, last + 1), partial=True)
    except BaseException as error:  # torch's CheckpointException is no Exception; it would end the rank without a word
        told.append(f"{type(error).__name__}: {error}")
    dist.barrier()
    return told


def test_refusals_reach_every_rank(paths: dict[str, Path], tmp_path: Path) -> None:
    """Whichever rank finds a mismatch or a bad scale, all raise the same error, and go on together."""
    quantized = open_checkpoint(paths["identity"]).quantized
    name = next(tensor.name for tensor in quantized if "layers.1" in tensor.name)
    nan = Stored("BF16", (), (0x7FC0).to_bytes(2, "little"))
    bad = rewrite(paths["identity"], tmp_path / "bad", lambda t: {**t, name + "_scale_inv": nan})
    for told in run(2, _refused_on_ranks, paths["identity"], bad):
        expected = [text for _, _, text in _mismatches().values() for _ in range(3)]
        assert len(told) == len(expected) + 1
        for found, text in zip(told, expected, strict=False):
            assert text in found
        assert told[-1].startswith(f"ScaleValueError: {name}_scale_inv")


def _tied_on_ranks(path: Path, twice: Path, other: Path, untied: Path) -> None:
    reference = _logits(load_pretrained(untied))
    for source in (path, twice):
        model = load_pretrained(source, parallelize=lambda m: fsdp(m, mesh()))
        assert isinstance(model, FSDPModule)
        assert_same(whole(model.lm_head.weight), whole(model.model.language_model.embed_tokens.weight))
        assert_same(_logits(model), reference)
    model = load_pretrained(path, parallelize=lambda m: tp(m, mesh()))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert_same(whole(model.lm_head.weight), open_checkpoint(untied).read("lm_head.weight"))
    for part in ("lm_head", "model.language_model.embed_tokens"):  # the other of the two is whole on every rank

        def shard(model: Any, part: str = part) -> None:
            cut = distribute_tensor(model.get_submodule(part).weight.detach(), mesh(), [Shard(1)])
            model.get_submodule(part).weight = nn.Parameter(cut)

        model = load_pretrained(path, parallelize=shard)
        assert_same(whole(model.lm_head.weight), open_checkpoint(untied).read("lm_head.weight"))
        assert_same(whole(model.model.language_model.embed_tokens.weight), whole(model.lm_head.weight))
    with pytest.raises(ModelMismatchError, match="they differ on disk"):
        load_pretrained(other, parallelize=lambda m: fsdp(m, mesh()))


def test_tied_embeddings_under_fsdp_and_tp(paths: dict[str, Path], tmp_path: Path) -> None:
    """A sharded head equals the embeddings; a different head on disk is refused on all ranks."""
    source = paths["identity"]
    twice, other = tied(source, tmp_path / "twice", "equal"), tied(source, tmp_path / "other", "other")
    run(2, _tied_on_ranks, tied(source, tmp_path / "tied"), twice, other, _untied(source, tmp_path / "untied"))


def _adapter_on_ranks(path: Path) -> None:
    """Both ways of a host, on sharded models."""
    adapter = Mistral3FP8StateDictAdapter.from_checkpoint(path)
    for shard in (fsdp, tp):
        model: Any = _meta_model(path)
        model.state_dict_adapter = adapter
        shard(model, mesh())
        model.to_empty(device="cpu")
        load_model(model, path)
        _assert_loaded(model, path)
        state = {}
        for key, tensor in model.state_dict().items():
            state[key] = torch.full_like(tensor, float("nan"))
        hf = adapter.to_hf(state, quantization=True)
        dcp.load(hf, storage_reader=HuggingFaceStorageReader(str(path)))
        native = adapter.from_hf(hf)
        for key, tensor in model.state_dict().items():
            assert isinstance(native[key], DTensor) == isinstance(tensor, DTensor)
            if isinstance(tensor, DTensor):
                assert native[key].placements == tensor.placements
                assert not any(isinstance(p, Partial) for p in tensor.placements)
            assert_same(local(native[key]), local(tensor), key)


@pytest.mark.parametrize("ranks", [2, 3] if ALL else [3])
def test_adapter_under_fsdp_and_tp(ranks: int, paths: dict[str, Path]) -> None:
    """With the model's adapter, and by its placeholders through torch's reader: the same bits in every shard."""
    run(ranks, _adapter_on_ranks, paths["uneven"])

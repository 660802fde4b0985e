"""Saving from sharded models: the final files, each byte once, equal to what a conversion gives; or nothing at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing import ProcessExitedException
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    Mistral3ForConditionalGeneration,
)

import fp8ckpt
from fp8ckpt import (
    Checkpointer,
    FP8StorageWriter,
    SafetensorsStorageWriter,
    convert,
    load_pretrained,
    open_checkpoint,
    sample,
    save_model,
    verify,
)
from fp8ckpt.checkpoint import checkpointing, storage_writer
from fp8ckpt.errors import ModelMismatchError, OutputExistsError, RangeError, ResumeMismatchError, StorageError
from fp8ckpt.models.mistral3_vlm.state_dict_adapter import Mistral3FP8StateDictAdapter
from tests.distributed import UNEVEN, Launched, assert_same, bits, fsdp, mesh, run, tied, tp, tp_fsdp
from tests.families.releases import RELEASES
from tests.oracle import Stored, assert_same_tree, read_directory, read_safetensors, tree, write_safetensors
from tests.support import ALL


@pytest.fixture(scope="module")
def paths(sample_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample, and one of uneven sizes in the other layout; each with what `convert` makes of it beside it."""
    root = tmp_path_factory.mktemp("save")
    found = {"identity": sample_fp8, "uneven": sample(root / "uneven", UNEVEN, layout="nested", files=2)}
    for name in list(found):
        for to in ("bf16", "fp32"):
            convert(found[name], root / f"{name}-{to}", to=to)
            found[f"{name} {to}"] = root / f"{name}-{to}"
    return found


def _tensor_bytes(directory: Path) -> int:
    return sum(len(tensor.data) for tensor in read_directory(directory).values())


class _Counting(SafetensorsStorageWriter):
    made: list[_Counting] = []  # noqa: RUF012  # of this process

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.made.append(self)


# ---------------------------------------------------------------- with a base


@pytest.mark.parametrize("name", ["identity", "uneven"])
@pytest.mark.parametrize("to", ["bf16", "fp32"])
def test_load_then_save_equals_convert(name: str, to: str, paths: dict[str, Path], tmp_path: Path) -> None:
    """With the base, in one process: every file of the directory is the one that `convert` writes, byte for byte."""
    model = load_pretrained(paths[name], dtype=torch.float32)  # rounded once, when it is saved
    done = save_model(model, tmp_path / "out", to=to, like=paths[name])
    assert_same_tree(tmp_path / "out", paths[f"{name} {to}"])
    weights = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert (done.to, done.destination) == (to, tmp_path / "out")
    assert (done.files, done.bytes_written) == (len(tree(tmp_path / "out")), sum(weights))
    assert done.tensors == len(model.state_dict())
    assert verify(paths[name], tmp_path / "out").ok
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("to", ["bf16", "fp32"])
def test_what_a_base_says_beside_its_tensors(to: str, sample_fp8: Path, tmp_path: Path) -> None:
    """Metadata of the index and of each header, a file without tensors and one of scales alone: saved as converted."""
    base = tmp_path / "fp8"
    shutil.copytree(sample_fp8, base, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = read_directory(sample_fp8)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    others = {name: tensor for name, tensor in tensors.items() if name not in scales}
    write_safetensors(base / "a.safetensors", others, {"made by": "a lab", "format": "pt"})
    write_safetensors(base / "b.safetensors", scales, {"format": "pt"})
    write_safetensors(base / "c.safetensors", {}, {"note": "none"})
    weight_map = {**dict.fromkeys(others, "a.safetensors"), **dict.fromkeys(scales, "b.safetensors")}
    metadata = {"total_size": 1, "total_parameters": 2, "x": "kept"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    convert(base, tmp_path / "expected", to=to)
    model = load_pretrained(base, dtype=torch.float32)
    save_model(model, tmp_path / "out", to=to, like=base)
    assert_same_tree(tmp_path / "out", tmp_path / "expected")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert (index["metadata"]["x"], index["metadata"]["total_parameters"] > 2) == ("kept", True)
    state = {name: checkpoint.read(name) for checkpoint in [open_checkpoint(base)] for name in checkpoint.tensors}
    dcp.save(state, storage_writer=SafetensorsStorageWriter(tmp_path / "plain", dtype="bf16", like=base), no_dist=True)
    convert(base, tmp_path / "expected-bf16")
    assert_same_tree(tmp_path / "plain", tmp_path / "expected-bf16")


def test_threads_is_the_former_name_of_workers(paths: dict[str, Path]) -> None:
    """It warns where it is written."""
    with pytest.warns(DeprecationWarning, match="threads= is now workers=") as warned:
        fp8ckpt.FP8StorageReader(paths["uneven"], threads=2)
    assert warned[0].filename == __file__


def test_base_is_the_former_name_of_like(paths: dict[str, Path], tmp_path: Path) -> None:
    """It warns where it is written, and does the same; both at once are refused."""
    model, base = load_pretrained(paths["uneven"]), paths["uneven"]
    calls: list[Callable[[], Any]] = [
        lambda: save_model(model, tmp_path / "one", base=base),
        lambda: Checkpointer().save_model(model, tmp_path / "two", base=base),
        lambda: SafetensorsStorageWriter(tmp_path / "three", base=base),
        lambda: FP8StorageWriter(tmp_path / "four", base=base),
    ]
    for call in calls:
        with pytest.warns(DeprecationWarning, match="base= is now like=") as warned:
            call()
        assert warned[0].filename == __file__
    for name in ("one", "two"):
        assert_same_tree(tmp_path / name, paths["uneven bf16"])
    with pytest.raises(TypeError, match="one of them"):
        save_model(model, tmp_path / "five", like=base, base=base)
    with pytest.raises(TypeError, match="needs like"):
        FP8StorageWriter(tmp_path / "five")


def test_adapter_and_checkpointer(paths: dict[str, Path], tmp_path: Path) -> None:
    """By the model's adapter, through `Checkpointer`, from an open base: the same directory."""
    model = load_pretrained(paths["uneven"])
    model.state_dict_adapter = Mistral3FP8StateDictAdapter.from_checkpoint(paths["uneven"])
    Checkpointer().save_model(model, tmp_path / "out", like=open_checkpoint(paths["uneven"]))
    assert_same_tree(tmp_path / "out", paths["uneven bf16"])


def test_changed_weights_are_saved(paths: dict[str, Path], tmp_path: Path) -> None:
    """What was trained is what is stored, under the base's names and in its files."""
    model = load_pretrained(paths["uneven"])
    changed = model.model.language_model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        changed.mul_(3).add_(0.25)
    save_model(model, str(tmp_path / "out"), like=str(paths["uneven"]))
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    out, expected = read_directory(tmp_path / "out"), read_directory(paths["uneven bf16"])
    assert out[name].data == bits(changed)
    assert {key for key in expected if out[key] != expected[key]} == {name}
    assert out.keys() == expected.keys()


# ---------------------------------------------------------------- without a base


@pytest.mark.parametrize(("to", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_without_a_base_it_loads_in_transformers(
    to: str, dtype: torch.dtype, paths: dict[str, Path], tmp_path: Path
) -> None:
    """A float32 model is rounded to the dtype given, under its own names, with no quantization in its configuration."""
    model = load_pretrained(paths["uneven"], dtype=torch.float32)
    save_model(model, tmp_path / "out", to=to)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Mistral3ForConditionalGeneration"]
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "quantization_config" not in config
    stored = read_directory(tmp_path / "out")
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert stored[name].data == bits(tensor.to(dtype)), name
    again, info = Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=dtype, output_loading_info=True
    )
    assert {key: list(names) for key, names in info.items() if names} == {}
    for name, tensor in again.state_dict().items():
        assert_same(tensor, model.state_dict()[name].to(dtype), name)
    assert again.config.dtype == dtype


def test_what_is_rounded_without_a_base_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the class keeps in float32 stays; what else has more bits than are asked for is named, in notes and log. Its
    bare configuration gets the name of its class, or nobody could load what was saved.
    """
    config = DeepseekV3Config(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=8,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=64, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=2, topk_group=1,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    model.__class__ = type("FSDPDeepseekV3ForCausalLM", (DeepseekV3ForCausalLM,), {})  # as fully_shard() does
    kept, rounded = "model.layers.1.mlp.gate.e_score_correction_bias", "model.norm.weight"
    model.model.layers[1].mlp.gate.e_score_correction_bias = torch.full((8,), 1 + 2**-20)
    model.model.norm.weight.data = torch.full((32,), 1 + 2**-20)
    result = save_model(model, tmp_path / "saved")
    stored = read_directory(tmp_path / "saved")
    assert (stored[kept].dtype, stored[rounded].dtype) == ("F32", "BF16")
    assert stored[kept].data == model.state_dict()[kept].numpy().tobytes()
    assert result.notes == (f"1 tensors are rounded to BF16: {rounded}",)
    assert result.notes[0] in caplog.text
    loaded = load_pretrained(tmp_path / "saved").state_dict()
    assert torch.equal(loaded[kept], model.state_dict()[kept])
    assert save_model(model, tmp_path / "whole", to="fp32").notes == ()
    config = HunYuanMoEV1Config(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=1, vocab_size=64, num_experts=2, moe_topk=1,
    )  # fmt: skip
    router = "model.layers.0.mlp.gate.wg.weight"  # which the class makes in float32, whatever is asked for
    assert save_model(HunYuanMoEV1ForCausalLM._from_config(config, dtype=torch.bfloat16), tmp_path / "more").notes == ()
    assert read_directory(tmp_path / "more")[router].dtype == "F32"


def test_files_end_where_they_are_told(paths: dict[str, Path], tmp_path: Path) -> None:
    """Several files of at most ``max_file_bytes`` of tensors, in order, with their index; transformers loads them."""
    model, most = load_pretrained(paths["identity"]), 200_000
    save_model(model, tmp_path / "out", max_file_bytes=most)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    held = [read_safetensors(file) for file in files]
    assert all(sum(len(t.data) for t in tensors.values()) <= most for tensors in held)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: file.name for file, tensors in zip(files, held, strict=True) for name in tensors
    }
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    again = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, tensor in again.state_dict().items():
        assert_same(tensor, model.state_dict()[name], name)


def test_a_tensor_larger_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    """No tensor is cut, and no file is empty."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(40, 40, bias=False), nn.Linear(2, 2, bias=False))
    save_model(model, tmp_path / "out", to="fp32", max_file_bytes=20)
    assert [set(read_safetensors(file)) for file in sorted((tmp_path / "out").glob("*.safetensors"))] == [
        {"0.weight"}, {"1.weight"}, {"2.weight"}
    ]  # fmt: skip


def test_adapter_names_without_a_base(paths: dict[str, Path], tmp_path: Path) -> None:
    """The adapter's names on disk are those of the release."""
    model = load_pretrained(paths["uneven"])
    model.state_dict_adapter = Mistral3FP8StateDictAdapter.from_checkpoint(paths["uneven"])
    save_model(model, tmp_path / "out")
    assert read_directory(tmp_path / "out") == read_directory(paths["uneven bf16"])


def test_a_target_that_is_none_is_refused(tmp_path: Path) -> None:
    """The message lists the dtypes."""
    with pytest.raises(ValueError, match="bf16, fp16, fp32"):
        save_model(nn.Linear(2, 2), tmp_path / "out", to="int8")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- tied


@pytest.mark.parametrize("name", ["identity", "uneven"])
def test_tied_models(name: str, paths: dict[str, Path], tmp_path: Path) -> None:
    """The tied tensor is stored once, or as often as in the base; without a base the model loads again, tied."""
    for head in (False, True):
        source = tied(paths[name], tmp_path / f"fp8-{head}", "equal" if head else None)
        model = load_pretrained(source)
        save_model(model, tmp_path / f"out-{head}", like=source)
        convert(source, tmp_path / f"converted-{head}")
        assert_same_tree(tmp_path / f"out-{head}", tmp_path / f"converted-{head}")
    save_model(model, tmp_path / "alone")
    assert read_directory(tmp_path / "alone").keys() == model.state_dict().keys() - {"lm_head.weight"}
    again, info = Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path / "alone", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert_same(again.lm_head.weight, model.lm_head.weight)


# ---------------------------------------------------------------- refusals


def test_an_existing_destination_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is ever overwritten, be it a file, a directory or a broken link."""
    model = load_pretrained(paths["uneven"])
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("directory", "file", "link"):
        with pytest.raises(OutputExistsError, match=name):
            save_model(model, tmp_path / name, like=paths["uneven"])
        assert not SafetensorsStorageWriter.validate_checkpoint_id(tmp_path / name)
    assert SafetensorsStorageWriter.validate_checkpoint_id(tmp_path / "free")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["directory", "file", "link"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_base_of_another_model_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    """`ModelMismatchError` names a tensor that only one has, or that differs in shape; nothing is written."""
    model: Any = load_pretrained(paths["identity"])
    model.extra = nn.Linear(2, 2, bias=False)
    with pytest.raises(ModelMismatchError, match=r"extra\.weight"):
        save_model(model, tmp_path / "out", like=paths["identity"])
    model.extra = None
    head, model.lm_head = model.lm_head, None
    with pytest.raises(ModelMismatchError, match=r"lm_head\.weight"):
        save_model(model, tmp_path / "out", like=paths["identity"])
    model.lm_head = head
    assert list(tmp_path.iterdir()) == []


def test_a_base_of_other_shapes_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    """A model whose vocabulary has grown is not the base's any more: its configuration would be wrong."""
    model: Any = load_pretrained(paths["identity"])
    model.lm_head = nn.Linear(128, 520, bias=False, dtype=torch.bfloat16)
    with pytest.raises(ModelMismatchError, match=r"lm_head\.weight"):
        save_model(model, tmp_path / "out", like=paths["identity"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_a_model_without_values_is_refused(to: str, paths: dict[str, Path], tmp_path: Path) -> None:
    """A parameter that was left on the meta device is named, and not said to want `to_empty`: that has no values."""
    model = load_pretrained(paths["uneven"])
    model.lm_head.to("meta")
    with pytest.raises(ModelMismatchError, match=r"1 tensors are on the meta device: lm_head\.weight; load it first"):
        save_model(model, tmp_path / "out", to=to, like=paths["uneven"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_a_tied_head_that_was_trained_apart_is_refused(to: str, tmp_path: Path) -> None:
    """The base has no place for it: saved under the name of the embeddings, it would be lost."""
    base = RELEASES["Qwen3 tied"].write(tmp_path / "base")
    model = load_pretrained(base)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    save_model(model, tmp_path / "equal", to=to, like=base)
    model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(
        ModelMismatchError, match=r"lm_head\.weight: it differs from model\.embed_tokens.*the configuration ties it to"
    ):
        save_model(model, tmp_path / "out", to=to, like=base)
    assert not (tmp_path / "out").exists()


def _apart(base: Path, out: Path) -> None:
    over = mesh()
    for cut in ((None, Shard(1)), (Shard(0), None), (Shard(0), Shard(1)), (Shard(1), Shard(1))):
        model = load_pretrained(base)
        embeddings = model.model.embed_tokens.weight.detach()
        for module, placement in zip((model.model.embed_tokens, model.lm_head), cut, strict=True):
            one = embeddings.clone()
            if placement is not None:
                one = distribute_tensor(one, over, [placement], src_data_rank=None)
            module.weight = nn.Parameter(one)
        save_model(model, out / f"{cut} equal", like=base)
        model.peft_config = {"default": None} if dist.get_rank() else {}
        with pytest.raises(ModelMismatchError, match="PEFT adapters"):  # on both, and neither waits for the other
            save_model(model, out / f"{cut} refused", like=base)
        model.peft_config = {}
        head = model.lm_head.weight.detach()
        local = head.to_local() if isinstance(head, DTensor) else head
        local[-1, -1] += 1  # of the second rank, where all that differs is
        with pytest.raises(
            ModelMismatchError, match=r"lm_head\.weight: it differs from .*, which the configuration ties it to"
        ):
            save_model(model, out / f"{cut} apart", like=base)


def test_a_tied_head_is_compared_however_the_two_are_cut(tmp_path: Path) -> None:
    """One of them whole, or by another dimension: two ranks."""
    run(2, _apart, RELEASES["Qwen3 tied"].write(tmp_path / "base"), tmp_path)


def test_arguments_that_would_be_ignored_are_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    """The base decides the files: their size goes without one; a dtype is one of the library's spellings."""
    model, base = load_pretrained(paths["uneven"]), paths["uneven"]
    for to in ("bf16", "fp8"):
        with pytest.raises(ValueError, match="max_file_bytes goes without like"):
            save_model(model, tmp_path / "out", to=to, like=base, max_file_bytes=1 << 20)
    for more in ({"max_file_bytes": 5_000_000_000}, {"side_files": storage_writer.SideFiles()}):
        with pytest.raises(ValueError, match="go without like"):
            SafetensorsStorageWriter(tmp_path / "out", like=base, **more)
    for dtype in ("fp8", "I64", ""):
        with pytest.raises(ValueError, match="expected one of bf16, fp16, fp32"):
            SafetensorsStorageWriter(tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_values_that_the_dtype_cannot_hold_are_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    """A finite value never becomes infinite without a word; infinity and NaN stay what they are."""
    model = load_pretrained(paths["uneven"])
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 70000
    with pytest.raises(RangeError, match=r"lm_head\.weight.*do not fit F16"):
        save_model(model, tmp_path / "out", to="fp16")
    assert not (tmp_path / "out").exists()
    for value, remedy in ((1e300, "no dtype that can be saved holds them"), (70000.0, "save in bf16 or fp32")):
        state = {"x": torch.tensor([value, 1.0], dtype=torch.float64)}
        with pytest.raises(BaseException, match=f"RangeError: x in .*{remedy}"):
            dcp.save(state, storage_writer=SafetensorsStorageWriter(tmp_path / "f64", dtype="fp16"), no_dist=True)
    special = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=torch.float64)
    dcp.save({"x": special}, storage_writer=SafetensorsStorageWriter(tmp_path / "ok", dtype="bf16"), no_dist=True)
    assert_same(open_checkpoint(tmp_path / "ok").read("x"), special.to(torch.bfloat16))


def test_values_of_another_kind_than_the_bases_are_refused(tmp_path: Path) -> None:
    """Whole numbers are not made of fractions, nor fractions of whole numbers."""
    tensors = {"n": Stored.of(np.arange(3), "I64"), "x": Stored.of(np.ones(2, np.float32), "F32")}
    (tmp_path / "base").mkdir()
    write_safetensors(tmp_path / "base/model.safetensors", tensors)
    for state in ({"n": torch.ones(3), "x": torch.ones(2)}, {"n": torch.arange(3), "x": torch.arange(2)}):
        writer = SafetensorsStorageWriter(tmp_path / "out", like=tmp_path / "base")
        with pytest.raises(BaseException, match=r"ModelMismatchError: [nx]: dtype"):
            dcp.save(state, storage_writer=writer, no_dist=True)


def test_codes_without_scales_are_refused(tmp_path: Path) -> None:
    """What was only cast to FP8 could not be loaded again; codes that have their scales beside them can."""
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelMismatchError, match=r"weight: a parameter of dtype .* without a scale.*bfloat16"):
        save_model(model, tmp_path / "out")
    assert not [*tmp_path.iterdir()]
    model.register_buffer("weight_scale", torch.tensor(0.3))  # which bfloat16 would round
    assert save_model(model, tmp_path / "out").notes == ()
    assert open_checkpoint(tmp_path / "out").read("weight").unique().item() == torch.tensor(0.3).bfloat16().item()
    assert read_directory(tmp_path / "out")["weight_scale"].data == bits(torch.tensor(0.3))


def _save_a_stage(root: Path) -> None:
    model = nn.Module()
    if dist.get_rank() == 0:
        model.first = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    else:
        model.register_buffer("weight", torch.ones(4, 4).to(torch.float8_e4m3fn))
        model.register_buffer("weight_scale", torch.tensor(0.3))
    save_model(model, root / "out")


def test_what_only_one_stage_keeps_in_float32(tmp_path: Path) -> None:
    """Stages of a pipeline have different tensors to keep, of which none asks the others."""
    run(2, _save_a_stage, tmp_path)
    stored = read_directory(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "first.weight": "BF16", "weight": "F8_E4M3", "weight_scale": "F32"
    }  # fmt: skip


def test_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    """A number, or a tensor of a dtype that safetensors does not know, is refused by name; nothing is written."""
    for state, name in (({"step": 3}, "step"), ({"z": torch.zeros(2, dtype=torch.complex128)}, "z")):
        with pytest.raises(BaseException, match=f"UnsupportedFormatError: {name}: "):
            dcp.save(state, storage_writer=SafetensorsStorageWriter(tmp_path / "out"), no_dist=True)
    assert list(tmp_path.iterdir()) == []


def test_no_space_leaves_no_destination(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk's refusal is `StorageError`; the destination is not there; with space, the same call succeeds."""
    model = load_pretrained(paths["uneven"])

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="No space left on device"):
            save_model(model, tmp_path / "out", like=paths["uneven"])
    assert not (tmp_path / "out").exists()
    save_model(model, tmp_path / "out", like=paths["uneven"])
    assert_same_tree(tmp_path / "out", paths["uneven bf16"])


# ---------------------------------------------------------------- killed


def _die_while_saving(path: Path, destination: Path) -> None:
    write, left = storage_writer.write_region, [5]

    def write_or_die(*arguments: Any) -> int:
        left[0] -= 1
        if not left[0]:
            os._exit(9)
        return write(*arguments)

    storage_writer.write_region = write_or_die
    save_model(load_pretrained(path), destination, like=path)


def test_what_a_killed_save_left_is_taken_over(paths: dict[str, Path], tmp_path: Path) -> None:
    """A process dies while it writes: no destination; the same save ends with the same bytes, any other is refused."""
    with pytest.raises(ProcessExitedException, match="exit code 9"):
        run(1, _die_while_saving, paths["uneven"], tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out.partial"]
    assert len(list((tmp_path / "out.partial/output").glob("*.safetensors"))) == 2
    model = load_pretrained(paths["uneven"])
    with pytest.raises(ResumeMismatchError, match=r"out\.partial"):
        save_model(model, tmp_path / "out", to="fp32", like=paths["uneven"])
    save_model(model, tmp_path / "out", like=paths["uneven"])
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert_same_tree(tmp_path / "out", paths["uneven bf16"])


_LOSES_A_RANK = """
import os, sys
import torch.distributed as dist
import fp8ckpt
from tests.distributed import fsdp, mesh

dist.init_process_group("gloo")
release, out = sys.argv[1:]
model = fp8ckpt.load_pretrained(release, parallelize=lambda model: fsdp(model, mesh()))
if dist.get_rank() == 1:
    os.pwrite = lambda *arguments: os._exit(0)
fp8ckpt.save_model(model, out, like=release)
"""


def test_a_rank_that_dies_is_named_on_the_others(sample_fp8: Path, tmp_path: Path) -> None:
    """Not by what gloo says of a connection; nothing is at the destination, and the same save ends."""
    (tmp_path / "script.py").write_text(_LOSES_A_RANK)
    code, _, said = Launched(tmp_path / "said", 2, tmp_path / "script.py", sample_fp8, tmp_path / "out").ended()
    assert code == 1
    assert "fp8ckpt.errors.RankLostError: another rank ended, or did not answer" in said
    assert not (tmp_path / "out").exists()
    save_model(load_pretrained(sample_fp8), tmp_path / "out", like=sample_fp8)
    assert verify(sample_fp8, tmp_path / "out").ok


# ---------------------------------------------------------------- plain dcp.save


@pytest.mark.parametrize("writer", [SafetensorsStorageWriter, FP8StorageWriter])
@pytest.mark.parametrize("when", ["while", "before"])
def test_a_rank_that_outlives_its_coordinator(
    when: str, writer: Any, sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No save begins while the rank writes, and once one has begun, it writes nothing: its values were in that one."""
    base = open_checkpoint(sample_fp8)
    old = {name: base.read(name) for name in base.tensors}
    new = {name: tensor * 2 for name, tensor in old.items()}
    orphan, out = writer(tmp_path / "out", like=base), tmp_path / "out"
    write = orphan._write_regions if when == "while" else orphan.write_data

    def save(values: dict[str, torch.Tensor], storage: Any) -> None:
        dcp.save(values, storage_writer=storage, no_dist=True)

    def outliving(*arguments: Any) -> Any:
        orphan.release()  # as where the coordinator died
        if when == "while":
            with pytest.raises(BaseException, match="OutputBusyError"):
                save(new, writer(out, like=base))
        else:
            save(new, writer(out, like=base))
        return write(*arguments)

    monkeypatch.setattr(orphan, "_write_regions" if when == "while" else "write_data", outliving)
    if when == "while":
        save(old, orphan)
    else:
        with pytest.raises(BaseException, match="OutputExistsError"):
            save(old, orphan)
    save(old if when == "while" else new, writer(tmp_path / "expected", like=base))
    assert_same_tree(out, tmp_path / "expected")


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 5, generator=generator),
        "half": torch.randn(3, 4, generator=generator).half(),
        "double": torch.randn(3, 4, generator=generator).double(),
        "transposed": torch.randn(5, 6, generator=generator).T,
        "every second": torch.randn(4, 6, generator=generator)[:, ::2],
        "one of two": torch.tensor([[1.0, 2.0]])[:, 1:],
        "one, strided": torch.randn(1, 1, 2, generator=generator)[..., 0],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "steps": torch.arange(6).reshape(2, 3),
        "mask": torch.tensor([True, False, True]),
        "codes": torch.arange(4, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "parameter": nn.Parameter(torch.ones(2, 2)),
    }


def _assert_stored(directory: Path, state: dict[str, torch.Tensor], dtype: torch.dtype, name: str) -> None:
    stored = read_directory(directory)
    assert stored.keys() == state.keys()
    for key, tensor in state.items():
        floats = (torch.float16, torch.float32, torch.float64, torch.bfloat16)
        cast = tensor.detach().to(dtype) if tensor.dtype in floats else tensor
        assert (stored[key].shape, stored[key].data) == (tuple(tensor.shape), bits(cast)), key
        assert tensor.dtype not in floats or stored[key].dtype == name


@pytest.mark.parametrize("spelling", ["bf16", "BF16", "fp32", "F32"])
def test_plain_dcp_save(spelling: str, tmp_path: Path) -> None:
    """Tensors of every kind and stride: one file, floats in the dtype asked for, the rest as it is; bytes counted."""
    name, dtype = ("BF16", torch.bfloat16) if "16" in spelling else ("F32", torch.float32)
    writer = SafetensorsStorageWriter(tmp_path / "out", dtype=spelling)
    dcp.save(_state(), storage_writer=writer, no_dist=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    _assert_stored(tmp_path / "out", _state(), dtype, name)
    assert writer.bytes_written == _tensor_bytes(tmp_path / "out")
    dcp.save({"a": torch.ones(2)}, storage_writer=writer, checkpoint_id=str(tmp_path / "again"), no_dist=True)
    assert set(read_directory(tmp_path / "again")) == {"a"}
    assert writer.bytes_written == _tensor_bytes(tmp_path / "again")


def _dtensors_on_ranks(destination: Path) -> int:
    flat, state = mesh(), {}
    for i, (name, tensor) in enumerate(_state().items()):
        placement = [Shard(0), Shard(tensor.dim() - 1), Replicate()][i % 3] if tensor.dim() else Replicate()
        if tensor.dtype.itemsize == 1:  # what gloo does not scatter
            state[name] = tensor
        else:
            state[name] = distribute_tensor(tensor.detach().contiguous(), flat, [placement])
    assert any(isinstance(tensor, DTensor) for tensor in state.values())
    writer = SafetensorsStorageWriter(destination, max_file_bytes=100)
    dcp.save(state, storage_writer=writer)
    return writer.bytes_written


@pytest.mark.parametrize("ranks", [2, 3])
def test_plain_dcp_save_of_dtensors(ranks: int, tmp_path: Path) -> None:
    """Rows, columns and copies, in several files: each byte written once over all ranks."""
    written = run(ranks, _dtensors_on_ranks, tmp_path / "out")
    _assert_stored(tmp_path / "out", _state(), torch.bfloat16, "BF16")
    assert sum(written) == _tensor_bytes(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


# ---------------------------------------------------------------- ranks


def _save_on_ranks(paths: dict[str, Path], root: Path) -> dict[str, int]:
    """Save from every sharding, with and without a base; returns the bytes that this rank wrote, by output."""
    checkpointing.SafetensorsStorageWriter = _Counting  # type: ignore[misc]
    size, flat, written = dist.get_world_size(), mesh(), {}
    shardings: dict[str, Any] = {"fsdp": lambda m: fsdp(m, flat), "tp": lambda m: tp(m, flat)}
    if size == 4:
        both = mesh(2, 2, names=("dp", "tp"))
        shardings["2-D"] = lambda m: tp_fsdp(m, both)
    names = ("identity", "uneven")
    for (i, name), (k, kind) in product(enumerate(names), enumerate(shardings)):
        if ALL or (size + k) % 2 == i:
            model = load_pretrained(paths[name], parallelize=shardings[kind])
            save_model(model, root / f"{name} {kind}", like=paths[name])
            written[f"{name} {kind}"] = _Counting.made.pop().bytes_written
    if not ALL and size != 3:
        return written
    model = load_pretrained(paths["identity"], parallelize=shardings["fsdp"], dtype=torch.float32)
    save_model(model, root / "alone", max_file_bytes=300_000)
    written["alone"] = _Counting.made.pop().bytes_written
    model = load_pretrained(paths["tied"], parallelize=shardings["fsdp"])
    save_model(model, root / "tied", like=paths["tied"])
    written["tied"] = _Counting.made.pop().bytes_written
    return written


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_sharding(ranks: int, paths: dict[str, Path], tmp_path: Path) -> None:
    """From FSDP2, TP and both: what `convert` writes, each byte by one rank. The two models take turns."""
    source = tied(paths["identity"], tmp_path / "tied fp8")
    convert(source, tmp_path / "tied bf16")
    root = tmp_path / "out"
    root.mkdir()
    written = run(ranks, _save_on_ranks, {**paths, "tied": source}, root)
    outputs = {file.name for file in root.iterdir()}
    assert outputs == written[0].keys()
    assert len(outputs) == ((6 + 2 * (ranks == 4)) if ALL else {1: 2, 2: 2, 3: 4, 4: 3}[ranks])
    for name in outputs:
        assert sum(counts[name] for counts in written) == _tensor_bytes(root / name), name
        if name == "tied":
            assert_same_tree(root / name, tmp_path / "tied bf16")
        elif name != "alone":
            assert_same_tree(root / name, paths[name.split()[0] + " bf16"])
    if "alone" in outputs:
        again = Mistral3ForConditionalGeneration.from_pretrained(root / "alone", dtype=torch.bfloat16)
        expected = open_checkpoint(paths["identity"])
        for name, tensor in again.state_dict().items():
            assert_same(tensor, expected.read(name), name)
        assert len(list((root / "alone").glob("*.safetensors"))) > 1
    if ranks > 1:
        assert all(count for counts in written for name, count in counts.items() if name.endswith("fsdp"))


def _refused_on_ranks(path: Path, root: Path) -> list[str]:
    """Refusals that only one rank meets with; what this rank was told."""
    rank, told = dist.get_rank(), []

    def attempt(model: nn.Module, destination: Path) -> None:
        try:
            save_model(model, destination, like=path)
        except (
            BaseException
        ) as error:  # torch's CheckpointException is no Exception; it would end the rank without a word
            told.append(f"{type(error).__name__}: {error}")
        else:
            told.append("nothing was raised")
        dist.barrier()

    model: Any = load_pretrained(path, parallelize=lambda m: fsdp(m, mesh()))
    (root / "there").mkdir(exist_ok=True)
    attempt(model, root / "there")
    write = os.pwrite

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        os.pwrite = full
    attempt(model, root / "full")
    os.pwrite = write
    attempt(model, root / "full")
    model.extra = nn.Linear(2, 2, bias=False)
    attempt(model, root / "other")
    return told


def test_refusals_reach_every_rank(paths: dict[str, Path], tmp_path: Path) -> None:
    """All ranks raise the error of one, and go on together."""
    for told in run(2, _refused_on_ranks, paths["uneven"], tmp_path):
        assert told[0].startswith("OutputExistsError: ")
        assert told[1].startswith("StorageError: ")
        assert told[2] == "nothing was raised"
        assert told[3].startswith("ModelMismatchError: ")
    assert_same_tree(tmp_path / "full", paths["uneven bf16"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full", "there"]


def test_the_writer_is_public() -> None:
    """`fp8ckpt.SafetensorsStorageWriter` is the one that `save_model` uses."""
    for room in (checkpointing, storage_writer):
        assert room.SafetensorsStorageWriter is fp8ckpt.SafetensorsStorageWriter


def test_a_destination_inside_the_base_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    """A base's side files would be copied into themselves."""
    base = tmp_path / "base"
    shutil.copytree(paths["uneven"], base)
    with pytest.raises(OutputExistsError, match="inside the base"):
        save_model(load_pretrained(base), base / "out", like=base)
    assert not list(base.glob("out*"))

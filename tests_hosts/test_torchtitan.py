"""torchtitan's own ``CheckpointManager``, with our adapter: it loads a release, with a path and without, and saves it.

What it saves are its own shards, consolidated by torch into as many files as the release has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torchtitan.components.checkpointer.dcp import CheckpointManager

import fp8ckpt
from fp8ckpt.models.deepseek_v3.state_dict_adapter import DeepseekV3FP8StateDictAdapter
from fp8ckpt.models.mistral3_vlm.state_dict_adapter import Mistral3FP8StateDictAdapter
from tests_hosts.models import HEAD, build, modules_of, shard, sharded, spoil, wrong
from tests_hosts.ranks import Ranks


def load_and_save(variant: str, source: Path, folder: Path, path: str | None) -> tuple[list[str], int]:
    """(wrong parameters, sharded ones) after the host has loaded a checkpoint; then it saves at its last step."""
    model, adapter = made(variant, source)
    shard(model, "fsdp")
    spoil(model)
    config = CheckpointManager.Config(
        enable=True,
        folder=str(folder),
        keep_latest_k=0,
        initial_load_in_hf=True,
        initial_load_path=path,
        initial_load_in_hf_quantized=path is not None,
        last_save_in_hf=True,
        export_dtype="bfloat16",
    )
    host = CheckpointManager(
        config, dataloader=None, model_parts=[model], optimizers=None, lr_schedulers=None, states={}, sd_adapter=adapter
    )
    assert host.load()
    host.save(5, last_step=True)
    host.close()
    return wrong(model, source, variant == "nested", whole=variant != "tied"), sharded(model)


def made(variant: str, source: Path) -> tuple[Any, Any]:
    """A model without values, and the adapter of the release."""
    if variant == "blocks":
        return modules_of(source), DeepseekV3FP8StateDictAdapter.from_checkpoint(source)
    return build(source), Mistral3FP8StateDictAdapter.from_checkpoint(source)


@pytest.mark.parametrize("path_given", [False, True])
@pytest.mark.parametrize("variant", ["identity", "nested", "blocks"])
def test_what_the_host_loads_and_saves(
    variant: str, path_given: bool, sources: dict[str, Path], two_ranks: Ranks, tmp_path: Path
) -> None:
    """Every parameter is the release's, and so is every tensor that is saved, under its name and in as many files."""
    source = sources[variant]
    path = str(source) if path_given else None
    for differing, count in two_ranks.run(load_and_save, variant, source, tmp_path / "run", path):
        assert differing == []
        assert count > 0
    out = tmp_path / "run" / "step-5"
    saved, released = fp8ckpt.open_checkpoint(out), fp8ckpt.open_checkpoint(source)
    result = fp8ckpt.verify(source, out)
    assert result.defects == ()
    cast = {name for name, tensor in released.tensors.items() if tensor.dtype == "F32"}  # by the host, to its one dtype
    assert {difference.name for difference in result.tensor_differences} == cast
    assert saved.quantized == []
    assert [header.file.name for header in saved.files] == [header.file.name for header in released.files]
    assert saved.tensors_in(saved.files[0])[0].name in {t.name for t in released.tensors_in(released.files[0])}


def test_what_the_host_asks_of_an_adapter(sources: dict[str, Path]) -> None:
    """The directory, and each tensor's file by its number; a tied head that is not stored has a place, too."""
    adapter: Any = Mistral3FP8StateDictAdapter.from_checkpoint(sources["tied_nested"])
    checkpoint = fp8ckpt.open_checkpoint(sources["tied_nested"])
    assert adapter.hf_assets_path == str(sources["tied_nested"])
    numbers = adapter.fqn_to_index_mapping
    assert numbers.keys() == {*checkpoint.tensors, "language_model." + HEAD}
    assert set(numbers.values()) == set(range(1, len(checkpoint.files) + 1))
    for name, tensor in checkpoint.tensors.items():
        assert f"model-{numbers[name]:05}-of-{len(checkpoint.files):05}.safetensors" == tensor.span.file.name
    unknown = Mistral3FP8StateDictAdapter.for_vlm_full()
    assert (unknown.hf_assets_path, unknown.fqn_to_index_mapping) == (None, None)

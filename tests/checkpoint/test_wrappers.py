"""What is given as a model and is none, or keeps its tensors from being seen, is refused; nothing in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp8ckpt import load_model, open_checkpoint, save_model
from fp8ckpt.errors import ModelMismatchError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A layer of ones."""
    layer = nn.Linear(4, 4, bias=False)
    nn.init.ones_(layer.weight)
    save_model(layer, tmp_path / "saved")
    return tmp_path / "saved"


def test_what_is_no_model(saved: Path, tmp_path: Path) -> None:
    """A state dict, and arguments in another order."""
    for model in (nn.Linear(4, 4).state_dict(), str(saved), None):
        with pytest.raises(TypeError, match=r"is of type \w+, not a torch\.nn\.Module: for a state dict, use dcp"):
            load_model(model, saved)
        with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
            save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_dict_of_copies_is_not_loaded(saved: Path) -> None:
    """As FullyShardedDataParallel gives it: what is loaded into copies, the model would not have."""
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    before = model.weight.detach().clone()

    def copied(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> dict[str, Any]:
        return {name: tensor.clone() for name, tensor in state.items()}

    hook = model._register_state_dict_hook(copied)
    with pytest.raises(ModelMismatchError, match=r"returns copies of 1 tensors.* weight; .*before it is wrapped"):
        load_model(model, saved)
    assert model.weight.equal(before)
    hook.remove()
    load_model(model, saved)
    assert bool((model.weight == 1).all())


def test_parameters_that_deepspeed_has_shared_out(saved: Path, tmp_path: Path) -> None:
    """They have no elements, and would be saved so."""
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    model.weight.ds_id = 0
    for call in (lambda: load_model(model, saved), lambda: save_model(model, tmp_path / "out")):
        with pytest.raises(ModelMismatchError, match=r"DeepSpeed .*ZeRO 3"):
            call()


def test_data_parallel_has_no_name_in_files(tmp_path: Path) -> None:
    """It is seen through, as DDP is."""
    save_model(nn.DataParallel(nn.Linear(4, 4)), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tensors.keys() == {"weight", "bias"}

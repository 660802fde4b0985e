"""What people call a dtype means the same wherever one is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fp8ckpt import SafetensorsStorageWriter, convert, load_pretrained, merge, open_checkpoint, plan_convert, save_model
from fp8ckpt.targets import target_of

NAMES = {
    "bf16": ("BF16", "bfloat16", "torch.bfloat16", torch.bfloat16),
    "fp16": ("F16", "half", "Float16", torch.float16),
    "fp32": ("f32", "float", "torch.float32", torch.float32),
    "fp8": ("F8_E4M3", "float8_e4m3fn", torch.float8_e4m3fn),
}


def test_every_name_of_a_dtype() -> None:
    """torch's, those of files, people's, in any case; and the dtype itself."""
    for target, names in NAMES.items():
        assert {target_of(name) for name in (target, *names)} == {target}


@pytest.mark.parametrize("given", ["auto", None, torch.float64, torch.float8_e5m2, 16])
def test_what_is_no_target_is_refused_with_what_is(given: object) -> None:
    """transformers' "auto" too."""
    with pytest.raises(ValueError, match=r"to=.*; expected one of bf16, fp16, fp32, fp8"):
        target_of(given)


def test_wherever_a_dtype_is_asked_for(sample_fp8: Path, tmp_path: Path) -> None:
    """By torch's dtype and by its name."""
    model = load_pretrained(sample_fp8, dtype="float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    small = nn.Linear(2, 2, bias=False)
    for number, to in enumerate(("float16", torch.float16)):
        assert convert(sample_fp8, tmp_path / f"{number}", to=to).to == "fp16"
        assert plan_convert(sample_fp8, tmp_path / "planned", to=to).fits
        save_model(small, tmp_path / f"saved-{number}", to=to)
        assert open_checkpoint(tmp_path / f"saved-{number}").read("weight").dtype is torch.float16
        SafetensorsStorageWriter(tmp_path / "unused", dtype=to)
    for call in (
        lambda: load_pretrained(sample_fp8, dtype="fp8"),
        lambda: merge(sample_fp8, tmp_path, tmp_path / "merged", to="float16"),
        lambda: SafetensorsStorageWriter(tmp_path / "unused", dtype="fp8"),
    ):
        with pytest.raises(ValueError, match=r"expected one of .*bf16"):
            call()

"""Two files of one model that stack their experts in other ways: each is made of the other, and compared with it,
whatever the pieces; or refused by name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fp8ckpt.output.extents as writing
from fp8ckpt import convert, open_checkpoint, verify
from fp8ckpt.cli.verify import _print as print_compared
from fp8ckpt.convert import PlainResult
from fp8ckpt.errors import Fp8CheckpointError, ModelMismatchError, StorageError, UnsupportedFormatError
from fp8ckpt.families import between
from fp8ckpt.output import like
from tests.conftest import Run
from tests.distributed import rewrite
from tests.families.releases import RELEASES, experts_apart
from tests.oracle import Stored, read_directory, tree

STACKED = [name for name, release in RELEASES.items() if release.experts]
OTHERS = ["Mistral3 nested tied", "Qwen3 tied, head stored", "Mistral4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Releases by name, and beside each its BF16 in the file's layout and in the model's. Read-only."""
    root = tmp_path_factory.mktemp("made")
    for name in (*STACKED, *OTHERS):
        RELEASES[name].write(root / name)
        for layout in ("file", "model"):
            convert(root / name, root / f"{name}, {layout}", layout=layout)
    return root


@pytest.mark.parametrize("name", [*STACKED, *OTHERS])
def test_the_models_layout_is_what_the_model_holds(name: str, made: Path) -> None:
    """Each tensor of the model, stacked by hand, under its name there; and what it has no place for as it was."""
    found = read_directory(made / f"{name}, model")
    release = RELEASES[name]
    expected = release.expected(open_checkpoint(made / name).read)
    stored = release.rounded or ("e_score_correction_bias",)
    for key, value in expected.items():
        if key in found and not key.endswith((*stored, "correction_bias")):  # those are kept in F32
            assert found[key].data == value.contiguous().view(torch.uint8).numpy().tobytes()
    left = {key for key in found if key not in expected}
    assert all(release.mtp is not None and key.startswith(release.mtp) for key in left)
    tied = {"lm_head.weight"} if "tied" in name and not release.head else set()
    assert expected.keys() - found.keys() == tied


@pytest.mark.parametrize("name", [*STACKED, *OTHERS])
def test_stacked_and_not_are_converted_and_compared(name: str, made: Path, tmp_path: Path) -> None:
    """The model's layout gives the release back byte for byte, and both compare as equal, in either order."""
    base, stacked = made / name, made / f"{name}, model"
    result = convert(stacked, tmp_path / "back", to="fp8", like=base)
    assert tree(tmp_path / "back") == tree(base)
    other = read_directory(stacked).keys() != open_checkpoint(base).tensors.keys()
    assert any("differently in the source" in note for note in result.notes) == (name in STACKED)
    for pair in ((base, stacked), (stacked, base), (made / f"{name}, file", stacked)):
        compared = verify(*pair)
        assert compared.ok
        assert [f"differently in {pair[1]}" in note for note in compared.notes] == [True] * other


def spoiled(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """One element of each stack is another."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 3 and "experts" in name:
            array = tensor.array.copy()
            array[-1, -1, -2] = 2 * array[-1, -1, -2] + 1
            found[name] = Stored.of(array, tensor.dtype)
    return found


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Llama-4"])
def test_differences_are_found_through_it(name: str, made: Path, tmp_path: Path) -> None:
    """Of one element in a stack, the tensor that it is of in the other file is named."""
    other = rewrite(made / f"{name}, model", tmp_path / "other", spoiled)
    found = verify(made / name, other)
    assert {(d.name.split(".")[-3], d.elements) for d in found.tensor_differences} <= {
        (str(RELEASES[name].configuration().get_text_config().num_local_experts - 1), 1)
    }
    assert len(found.tensor_differences) == 2 * sum("gate_up" in key for key in read_directory(other))
    assert not found.ok


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Llama-4", "Mixtral", "GLM-4.5-MoE"])
@pytest.mark.parametrize("scales", ["reuse", "fresh"])
def test_trained_experts_become_the_codes_that_they_have_apart(
    name: str, scales: str, made: Path, tmp_path: Path
) -> None:
    """Values that moved are quantized as if each expert had stood in a tensor of its own."""

    def trained(tensors: dict[str, Stored]) -> dict[str, Stored]:
        return {
            k: Stored.of(t.array * np.float32(1.3), t.dtype) if t.dtype == "BF16" else t for k, t in tensors.items()
        }

    for layout in ("file", "model"):
        source = rewrite(made / f"{name}, {layout}", tmp_path / layout, trained)
        convert(source, tmp_path / f"{layout} back", to="fp8", like=made / name, scales=scales)
    assert tree(tmp_path / "file back") == tree(tmp_path / "model back")
    assert tree(tmp_path / "file back") != tree(made / name)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Llama-4", "Mixtral"])
def test_pieces_of_any_size_give_the_same(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that cut experts, rows and blocks, in either direction, with any workers."""
    monkeypatch.setattr(writing, "CHUNK", 1 << 12)
    monkeypatch.setattr(writing, "EXTENT", 1 << 14)
    monkeypatch.setattr("fp8ckpt.encodings.passing.STEP", 1000)
    monkeypatch.setattr("fp8ckpt.encodings.passing.READ_AT_ONCE", 64)
    convert(made / name, tmp_path / "model", layout="model", workers=3)
    assert tree(tmp_path / "model") == tree(made / f"{name}, model")
    convert(tmp_path / "model", tmp_path / "back", to="fp8", like=made / name)
    assert tree(tmp_path / "back") == tree(made / name)


def test_a_base_may_be_stacked_where_the_source_is_not(made: Path, tmp_path: Path) -> None:
    """The reverse: a release whose stacks are FP8 as they are takes what was saved expert by expert."""

    source = rewrite(made / "Mistral4, file", tmp_path / "source", experts_apart)
    stacks = [name for name, tensor in read_directory(made / "Mistral4, file").items() if len(tensor.shape) == 3]
    assert not stacks or not read_directory(source).keys() & set(stacks)
    result = convert(source, tmp_path / "back", to="fp8", like=made / "Mistral4")
    assert tree(tmp_path / "back") == tree(made / "Mistral4")
    assert f"{len(stacks)} tensors are stacked, cut or named differently in the source" in result.notes
    assert verify(source, made / "Mistral4").ok


@pytest.mark.parametrize(("source", "arguments"), [
    ("DeepSeek-V3", {"layout": "model"}),
    ("DeepSeek-V3, model", {"to": "fp8", "like": "DeepSeek-V3"}),
    ("DeepSeek-V3, model", {"to": "fp8", "like": "DeepSeek-V3", "scales": "fresh"}),
    ("Mistral4, apart", {"to": "fp8", "like": "Mistral4"}),
])  # fmt: skip
def test_what_is_cut_off_goes_on_from_there(
    source: str, arguments: dict[str, Any], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was on disk is not written again, and the bytes are the same, of stacks and of experts apart."""
    if source == "Mistral4, apart":
        rewrite(made / "Mistral4, file", tmp_path / source, experts_apart)
        source = str(tmp_path / source)
    if "like" in arguments:
        arguments = {**arguments, "like": made / arguments["like"]}
    convert(made / source, tmp_path / "whole", **arguments)
    monkeypatch.setattr(writing, "CHUNK", 1 << 12)
    monkeypatch.setattr(writing, "EXTENT", 1 << 13)
    out, real, written = tmp_path / "out", os.pwrite, []

    def failing(fd: int, data: Any, offset: int) -> int:
        written.append(len(data))
        if len(written) == 40:
            raise OSError(errno.EIO, "a fault")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(StorageError):
            convert(made / source, out, workers=1, **arguments)
    assert convert(made / source, out, **arguments).bytes_resumed > 10 << 12
    assert tree(out) == tree(tmp_path / "whole")


def test_a_conversion_is_in_several_files_where_it_is_large(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an index, each tensor whole; what the model has no place for in the order of the source."""
    monkeypatch.setattr(like, "DEFAULT_FILE_BYTES", 60_000)
    result = convert(made / "Qwen3-Next", tmp_path / "out", layout="model")
    assert isinstance(result, PlainResult)
    assert len(list(tmp_path.glob("out/model-*-of-*.safetensors"))) > 3
    assert open_checkpoint(tmp_path / "out").index is not None
    assert read_directory(tmp_path / "out") == read_directory(made / "Qwen3-Next, model")
    written = open_checkpoint(tmp_path / "out").tensors
    left = [key for key in open_checkpoint(made / "Qwen3-Next").tensors if key.startswith("mtp.")]
    assert left == sorted(left, key=lambda key: written[key].span.file.name)
    assert len({written[key].span.file.name for key in left}) > 1
    assert result.tensors == len(read_directory(tmp_path / "out"))
    assert result.dequantized == len(open_checkpoint(made / "Qwen3-Next").quantized)


@pytest.mark.parametrize("name", RELEASES)
def test_the_models_layout_is_advised_where_transformers_leaves_experts_random(
    name: str, tmp_path: Path, made: Path
) -> None:
    """And nowhere else."""
    if name not in (*STACKED, *OTHERS):
        RELEASES[name].write(tmp_path / name)
    source = made / name if (made / name).exists() else tmp_path / name
    notes = [convert(source, tmp_path / layout, layout=layout).notes for layout in ("file", "model")]
    said = [any("use --layout model" in note for note in of_one) for of_one in notes]
    assert said == [not RELEASES[name].understood, False]


def test_the_command_line_says_it(made: Path, tmp_path: Path, cli: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The option, where it means something, and the note of a comparison."""
    base = made / "Llama-4"
    done = cli("convert", base, tmp_path / "bf16", "--layout", "model")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "bf16") == tree(made / "Llama-4, model")
    refused = cli("convert", tmp_path / "bf16", tmp_path / "x", "--to", "fp8", "--like", base, "--layout", "model")
    assert refused.returncode == 2
    print_compared(verify(base, tmp_path / "bf16"))
    assert "note: 12 tensors are stacked, cut or named differently in" in capsys.readouterr().out


# ---------------------------------------------------------------- what has no way


def without(*endings: str) -> Callable[[dict[str, Stored]], dict[str, Stored]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}


def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(between, "find_spec", lambda name: None)


def renamed(config: dict[str, Any]) -> None:
    config["architectures"] = ["SomeModelOfMine"]


def unknown(config: dict[str, Any]) -> None:
    config["num_attention_heads"] = "several"


def wider(tensors: dict[str, Stored]) -> dict[str, Stored]:
    found = {**tensors}
    for name, (dtype, shape, data) in tensors.items():
        if name.endswith("gate_up_proj"):
            rows = shape[1] + 2
            found[name] = Stored(dtype, (shape[0], rows, shape[2]), bytes(len(data) // shape[1] * rows))
    return found


def test_without_transformers_it_is_said_what_to_install(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison by names alone finds them different; a conversion says how to get further."""
    no_transformers(monkeypatch)
    name = "Qwen3-MoE"
    with pytest.raises(UnsupportedFormatError, match=r"not installed; pip install 'fp8ckpt\[hf\]'"):
        convert(made / name, tmp_path / "out", layout="model")
    with pytest.raises(
        ModelMismatchError, match=r"24 tensors are only in the base, 4 only in the source.*transformers"
    ):
        convert(made / f"{name}, model", tmp_path / "out", to="fp8", like=made / name)
    found = verify(made / name, made / f"{name}, model")
    assert (len(found.tensor_differences), found.notes) == (28, ())


@pytest.mark.parametrize("change", [renamed, unknown])
def test_of_a_model_that_transformers_does_not_know(change: Any, made: Path, tmp_path: Path) -> None:
    """Names decide, as before."""
    base = rewrite(made / "Qwen3-MoE", tmp_path / "base", config=change)
    source = rewrite(made / "Qwen3-MoE, model", tmp_path / "source", config=change)
    with pytest.raises(ModelMismatchError, match=r"24 tensors are only in the base, 4 only in the source"):
        convert(source, tmp_path / "out", to="fp8", like=base)
    assert len(verify(base, source).tensor_differences) == 28
    with pytest.raises(Fp8CheckpointError):
        convert(base, tmp_path / "out", layout="model")


def test_what_does_not_go_together_is_named(made: Path, tmp_path: Path) -> None:
    """A source without some of its experts, or of other sizes, or with two tensors for one."""
    name = "Qwen3-MoE"
    base, plain, stacked = made / name, made / f"{name}, file", made / f"{name}, model"
    convert(stacked, tmp_path / "stacked", to="fp8", scheme="block")
    some = rewrite(plain, tmp_path / "some", without("layers.1.mlp.experts.3.gate_proj.weight"))
    with pytest.raises(UnsupportedFormatError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: 7 tensors"):
        convert(some, tmp_path / "out", to="fp8", like=tmp_path / "stacked")
    compared = verify(stacked, some)
    assert not compared.ok
    assert "by their names alone: model.layers.1.mlp.experts.gate_up_proj: 7 tensors" in compared.notes[0]
    with pytest.raises(ModelMismatchError, match=r"gate_up_proj: shape \(4, 274, 160\); expected \(4, 272, 160\)"):
        convert(rewrite(stacked, tmp_path / "wide", wider), tmp_path / "out", to="fp8", like=base)
    both = rewrite(
        stacked, tmp_path / "both", lambda t: t | {"model.layers.0.mlp.experts.0.up_proj.weight": t["lm_head.weight"]}
    )
    with pytest.raises(Fp8CheckpointError, match=r"experts"):
        convert(both, tmp_path / "out", to="fp8", like=base)
    assert not (tmp_path / "out").exists()


def test_pieces_of_several_dtypes_are_refused(made: Path, tmp_path: Path) -> None:
    """One expert in F32 among those in BF16 makes no tensor; FP8 and BF16 ones make one of BF16 only."""
    plain = "model.layers.0.mlp.experts.1.down_proj.weight"

    def of(dtype: str) -> Callable[[dict[str, Stored]], dict[str, Stored]]:
        def change(tensors: dict[str, Stored]) -> dict[str, Stored]:
            found = {k: t for k, t in tensors.items() if k != plain + "_scale_inv"}
            return found | {plain: Stored.of(tensors[plain].array.astype(np.float32), dtype)}

        return change

    name = "Qwen3-MoE"
    mixed = rewrite(made / f"{name}, file", tmp_path / "mixed", of("F32"))
    with pytest.raises(UnsupportedFormatError, match=r"experts\.down_proj: its pieces have the dtypes BF16 and F32"):
        convert(mixed, tmp_path / "out", layout="model")
    partly = rewrite(made / name, tmp_path / "partly", of("BF16"))
    convert(partly, tmp_path / "bf16", layout="model")
    assert verify(partly, tmp_path / "bf16").ok
    with pytest.raises(UnsupportedFormatError, match=r"some of its pieces are FP8 and others BF16.*convert to bf16"):
        convert(partly, tmp_path / "out", to="fp32", layout="model")

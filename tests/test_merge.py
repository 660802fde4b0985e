"""Merging adapters by hand-made files: the bytes of the way back from merged float32 values, whatever the pieces."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt import MergeResult, convert, merge, open_checkpoint, plan_merge, verify
from fp8ckpt.encodings.adapting import adapted
from fp8ckpt.errors import (
    Fp8CheckpointError,
    ModelMismatchError,
    OutputExistsError,
    RangeError,
    ResumeMismatchError,
    StorageError,
    UnsupportedFormatError,
    WeightValueError,
)
from fp8ckpt.output.files import OutputFile
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.tensors.adapters import open_adapter
from fp8ckpt.tensors.reading import load_dequantizer
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.tensor import Reader
from tests.adapters import F32, PREFIX, factors, merged, values, write_adapter
from tests.conftest import Run
from tests.miniatures import Family, families, four_bits
from tests.oracle import NUMPY, Stored, read_directory, tree, write_plain, write_safetensors
from tests.stopping import CHUNKS, run_until
from tests.support import cut, examples
from tests.test_four_bits import with_siblings

E4M3 = {
    name: family
    for name, family in families().items()
    if family.blocks and {family.tensors[w].dtype for w in family.blocks} == {"F8_E4M3"}
}
WRITTEN = E4M3 | four_bits()  # the families that merges go back to
SCALING = 2.0


def floats(family: Family, weight: str) -> F32:
    """What a weight dequantizes to in float32."""
    found: F32 = family.expected("F32")[family.name(weight)].array
    return found


def watch_codes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The weights whose codes are read to be decoded, from now on."""
    found: set[str] = set()

    def watched(real: Callable[..., Any], tensor: QuantizedTensor, *arguments: Any) -> Any:
        found.add(tensor.name)
        return real(tensor, *arguments)

    for real in (QuantizedTensor.codes, QuantizedTensor.run):
        monkeypatch.setattr(QuantizedTensor, real.__name__, lambda *given, real=real: watched(real, *given))
    return found


def adapter_of(name: str, value: F32, strength: float, seed: int = 5) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Factors of one weight whose product is about ``strength`` times its largest element; and their configuration."""
    experts, config = 1, {}
    module = name.removesuffix(".weight")
    if value.ndim == 3:
        experts, config = value.shape[0], {"target_parameters": [name]}
        module = name.rpartition(".")[0]
    made = factors(PREFIX + module, 4, value.shape[-1], value.shape[-2], experts=experts, seed=seed)
    key = f"{PREFIX}{module}.lora_B.weight"
    factor = strength * float(np.abs(value).max()) / 4
    made[key] = Stored.of(made[key].array * np.float32(factor), "F32")
    return made, config


def expected_of(name: str, value: F32, made: dict[str, Stored], scaling: float = SCALING) -> F32:
    a, b = (next(tensor for key, tensor in made.items() if f"lora_{side}" in key) for side in "AB")
    return merged(value, a, b, scaling)


@pytest.mark.parametrize("strength", [1e-4, 0.5])
@pytest.mark.parametrize("name", WRITTEN)
def test_the_bytes_of_the_way_back(name: str, strength: float, tmp_path: Path) -> None:
    """To FP8 or four bits a merge is what converting the merged values in float32 with the same base is: the same codes
    and scales, kept where they fit and for siblings together, and everything else byte for byte.
    """
    family = WRITTEN[name]
    base = family.write(tmp_path / "base", files=2)
    weight = next(iter(family.blocks))
    value = floats(family, weight)
    made, config = adapter_of(family.name(weight), value, strength)
    adapter = write_adapter(tmp_path / "adapter", made, **config)
    source = {
        key: Stored.of(floats(family, key), "F32") if key in family.blocks else tensor
        for key, tensor in family.tensors.items()
        if key in family.blocks or family.name(key) in open_checkpoint(base).tensors
    }
    source[weight] = Stored.of(expected_of(weight, value, made), "F32")
    (tmp_path / "source").mkdir()
    write_safetensors(
        tmp_path / "source/model.safetensors", {family.name(key): tensor for key, tensor in source.items()}
    )
    back = convert(tmp_path / "source", tmp_path / "back", to="fp8", like=base)
    planned = plan_merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged.partial").exists()
    result = merge(base, adapter, tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(tmp_path / "back")
    assert planned.bytes_to_write == sum(map(len, tree(tmp_path / "merged").values()))
    assert (planned.files, planned.fits) == (result.files, True)
    assert planned.bytes_to_read >= result.bytes_read or result.bytes_rewritten
    assert (result.to, result.merged) == ("fp8", 1)
    [row] = result.report.weights
    [other] = [row for row in back.report.weights if row.name == family.name(weight)]
    assert (row.clipped, row.fresh, row.scales) == (other.clipped, other.fresh, other.scales)
    assert row.fresh_factors == other.fresh_factors


@pytest.mark.parametrize("divides", [False, True])
def test_siblings_of_four_bits(*, divides: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shares its factor with a merged weight is copied, and not decoded, as long as the factor is kept; a new one
    is of both, and both are what converting the merged values makes of them.
    """
    family, _ = with_siblings(divides=divides)
    base, plain = family.write(tmp_path / "base"), family.expected("F32")
    q, k = (f"model.layers.0.{leaf}_proj.weight" for leaf in "qk")
    for strength, alone in ((0.001, True), (3, False)):
        made, config = adapter_of(q, plain[q].array, strength)
        adapter = write_adapter(tmp_path / f"adapter {strength}", made, **config)
        source = tmp_path / f"source {strength}"
        source.mkdir()
        values = {**plain, q: Stored.of(expected_of(q, plain[q].array, made), "F32")}
        write_safetensors(source / "model.safetensors", values)
        convert(source, tmp_path / f"back {strength}", like=base)
        with monkeypatch.context() as patch:
            decoded = watch_codes(patch)
            result = merge(base, adapter, tmp_path / f"merged {strength}")
        assert decoded == ({q} if alone else {q, k})
        assert tree(tmp_path / f"merged {strength}") == tree(tmp_path / f"back {strength}")
        assert [(row.name, row.fresh_factors) for row in result.report.weights] == [(q, not alone)]
        assert (result.bytes_rewritten == 0) == alone


@pytest.mark.parametrize("name", families())
def test_to_bf16(name: str, tmp_path: Path) -> None:
    """Of every format, the merged weight is rounded once from float32; all else is what a conversion writes."""
    family = families()[name]
    if not family.blocks:
        pytest.fail("a family without FP8 weights")
    base = family.write(tmp_path / "base", files=2)
    weight = next(iter(family.blocks))
    value = floats(family, weight)
    made, config = adapter_of(family.name(weight), value, 0.01)
    adapter = write_adapter(tmp_path / "adapter", made, **config)
    convert(base, tmp_path / "plain")
    result = merge(base, adapter, tmp_path / "merged", to="bf16", workers=2)
    one, two = read_directory(tmp_path / "merged"), read_directory(tmp_path / "plain")
    with np.errstate(all="ignore"):
        two[family.name(weight)] = Stored.of(expected_of(weight, value, made), "BF16")
    assert one == two
    assert tree(tmp_path / "merged").keys() == tree(tmp_path / "plain").keys()
    assert result.merged == 1


# ---------------------------------------------------------------- the sample: several weights, siblings, plain tensors

LAYER = "model.language_model.layers.0."
Q, K, GATE, DOWN = (LAYER + leaf for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"))
EMBED = "model.language_model.embed_tokens"


@pytest.fixture(scope="module")
def plain(sample_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    """The sample dequantized to float32."""
    directory = tmp_path_factory.mktemp("plain") / "f32"
    convert(sample_fp8, directory, to="fp32")
    return read_directory(directory)


def pair(
    plain: dict[str, Stored], module: str, strength: float = 0.01, seed: int = 3, rank: int = 4
) -> dict[str, Stored]:
    """Factors of a module of the sample."""
    value = plain[module + ".weight"].array
    made = factors(PREFIX + module, rank, value.shape[1], value.shape[0], seed=seed)
    key = f"{PREFIX}{module}.lora_B.weight"
    made[key] = Stored.of(made[key].array * np.float32(strength * float(np.abs(value).max())), "F32")
    return made


def in_bf16(directory: Path) -> dict[str, F32]:
    return {name: tensor.array.astype(np.float32) for name, tensor in read_directory(directory).items()}


def rounded(values: F32) -> F32:
    return values.astype(NUMPY["BF16"]).astype(np.float32)


def test_all_that_lora_says_at_once(plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path) -> None:
    """Ranks and alphas by pattern, rank-stabilized scaling, an embedding, whole tensors, in one adapter."""
    embed, norm = plain[EMBED + ".weight"].array.astype(np.float32), LAYER + "input_layernorm.weight"
    tensors = pair(plain, Q) | pair(plain, DOWN, rank=2)
    e = {
        f"{PREFIX}{EMBED}.lora_embedding_A": values(4, embed.shape[0]),
        f"{PREFIX}{EMBED}.lora_embedding_B": values(embed.shape[1], 4),
    }
    new_norm = Stored.of(plain[norm].array.astype(np.float32) * np.float32(1.25), "BF16")
    config = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.0\..*q_proj": 3}, "use_rslora": True}
    adapter = write_adapter(tmp_path / "a", {**tensors, **e, PREFIX + norm: new_norm}, **config)
    result = merge(sample_fp8, adapter, tmp_path / "out", to="bf16")
    found = in_bf16(tmp_path / "out")
    expected = {
        Q: expected_of(Q, plain[Q + ".weight"].array, pair(plain, Q), 3 / math.sqrt(4)),
        DOWN: expected_of(DOWN, plain[DOWN + ".weight"].array, pair(plain, DOWN, rank=2), 8 / math.sqrt(2)),
    }
    for module, value in expected.items():
        assert np.array_equal(found[module + ".weight"], rounded(value))
    left, right = (e[key].array.astype(np.float32) for key in e)
    product = merged(embed, Stored.of(right.T, "F32"), Stored.of(left.T, "F32"), 8 / math.sqrt(4))
    assert np.array_equal(found[EMBED + ".weight"], rounded(product))
    assert np.array_equal(found[norm], new_norm.array.astype(np.float32))
    assert result.merged == 4
    assert {row.name for row in result.report.weights} == {Q + ".weight", DOWN + ".weight", EMBED + ".weight", norm}


@pytest.mark.parametrize("to", ["fp8", "bf16"])
def test_dora_of_embeddings(
    to: str, plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns are scaled to the magnitudes that were trained, by norms of whole columns, whatever the pieces."""
    value = plain[EMBED + ".weight"].array.astype(np.float32)
    a, b = values(4, value.shape[0]), values(value.shape[1], 4, seed=2)
    magnitude = np.random.default_rng(2).uniform(0.5, 2, value.shape[1]).astype(np.float32)
    made = {"embedding_A": a, "embedding_B": b, "magnitude_vector": Stored.of(magnitude, "F32")}
    named = {f"{PREFIX}{EMBED}.lora_{what}": tensor for what, tensor in made.items()}
    adapter = write_adapter(tmp_path / "a", named, use_dora=True)
    planned = plan_merge(sample_fp8, adapter, tmp_path / "out", to=to)
    without = write_adapter(tmp_path / "plain", {k: v for k, v in named.items() if "magnitude" not in k})
    once = plan_merge(sample_fp8, without, tmp_path / "out", to=to)
    assert planned.bytes_to_read - once.bytes_to_read == 2 * value.size  # of bfloat16, for the norms
    merge(sample_fp8, adapter, tmp_path / "out", to=to)
    total = merged(value, Stored.of(b.array.T, "F32"), Stored.of(a.array.T, "F32"), SCALING)
    norms = np.sqrt((total.astype(np.float64) ** 2).sum(axis=0))
    factor = (magnitude.astype(np.float64) / norms).astype(np.float32)
    assert np.array_equal(in_bf16(tmp_path / "out")[EMBED + ".weight"], rounded(total * factor))
    pieces(monkeypatch, 512, 3, 100)
    monkeypatch.setattr("fp8ckpt.tensors.merged._AT_ONCE", 1000)
    merge(sample_fp8, adapter, tmp_path / "pages", to=to, workers=3)
    assert tree(tmp_path / "pages") == tree(tmp_path / "out")


def test_dora(plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path) -> None:
    """Rows are scaled to the magnitudes that were trained, by norms of whole rows, whatever the pieces."""
    value, made = plain[Q + ".weight"].array, pair(plain, Q, 0.3)
    magnitude = np.random.default_rng(2).uniform(0.5, 2, value.shape[0]).astype(np.float32)
    made[f"{PREFIX}{Q}.lora_magnitude_vector"] = Stored.of(magnitude, "F32")
    adapter = write_adapter(tmp_path / "a", made, use_dora=True)
    merge(sample_fp8, adapter, tmp_path / "out", to="bf16")
    found = in_bf16(tmp_path / "out")[Q + ".weight"]
    total = expected_of(Q, value, made)
    factor = (magnitude.astype(np.float64) / np.sqrt((total.astype(np.float64) ** 2).sum(axis=1))).astype(np.float32)
    assert np.array_equal(found, rounded(total * factor[:, None]))


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_several_adapters(to: str, plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """Each is added as many times as its weight says, in the order given; the command says it in the same words."""
    one, two = pair(plain, Q, seed=3), pair(plain, Q, seed=9) | pair(plain, DOWN)
    paths = [write_adapter(tmp_path / name, made) for name, made in (("one", one), ("two", two))]
    merge(sample_fp8, [(paths[0], 0.7), (paths[1], -0.25)], tmp_path / "out", to=to)
    done = cli("merge", sample_fp8, f"{paths[0]}=0.7", tmp_path / "cli", "--adapter", f"{paths[1]}=-0.25", "--to", to)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "cli") == tree(tmp_path / "out")
    if to == "bf16":
        second = {key: tensor for key, tensor in two.items() if "q_proj" in key}
        value = expected_of(Q, expected_of(Q, plain[Q + ".weight"].array, one, 1.4), second, -0.5)
        assert np.array_equal(in_bf16(tmp_path / "out")[Q + ".weight"], rounded(value))


@pytest.mark.parametrize("scales", ["reuse", "fresh"])
def test_what_is_not_touched_is_the_bases(
    scales: str, plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path
) -> None:
    """Codes, scales and all other tensors, byte for byte; of siblings that shared one scale, all have the new one."""
    if scales == "reuse":
        with pytest.MonkeyPatch.context() as patch:
            decoded = watch_codes(patch)
            merge(sample_fp8, write_adapter(tmp_path / "little", pair(plain, GATE, 1e-3)), tmp_path / "kept")
        assert decoded == {GATE + ".weight"}
    adapter = write_adapter(tmp_path / "a", pair(plain, GATE, 1.0))
    result = merge(sample_fp8, adapter, tmp_path / "out", scales=scales)
    old, new = read_directory(sample_fp8), read_directory(tmp_path / "out")
    up = GATE.replace("gate", "up")
    shared = old[GATE + ".weight_scale_inv"] == old[up + ".weight_scale_inv"]
    touched = {GATE, up} if shared else {GATE}
    changed = {name for name in old if old[name] != new[name]}
    assert {name.rpartition(".")[0] for name in changed} == touched
    assert changed >= {GATE + ".weight", GATE + ".weight_scale_inv"}
    if shared:
        assert new[GATE + ".weight_scale_inv"] == new[up + ".weight_scale_inv"]
    assert verify(tmp_path / "out").ok
    assert [row.name for row in result.report.weights] == [GATE + ".weight"]
    others = {name for name in tree(sample_fp8) if not name.endswith(".safetensors")}
    assert {name: tree(tmp_path / "out")[name] for name in others} == {name: tree(sample_fp8)[name] for name in others}


def test_an_adapter_that_adds_nothing(plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path) -> None:
    """With factors B of zero, as before training, the output is the base, and a note says so."""
    made = pair(plain, Q, 0.0)
    result = merge(sample_fp8, write_adapter(tmp_path / "a", made), tmp_path / "out")
    assert tree(tmp_path / "out") == tree(sample_fp8)
    assert result.report.total.arrived is None
    assert any("add nothing" in note and "or their weights are" in note for note in result.notes)


# ---------------------------------------------------------------- the report


@pytest.mark.parametrize("strength", [3e-4, 0.05])
def test_what_arrived(strength: float, plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path) -> None:
    """The projection on what was to be added, and the error at right angles to it, against numpy; with a note where
    little arrived.
    """
    made = pair(plain, Q, strength)
    result = merge(sample_fp8, write_adapter(tmp_path / "a", made), tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "f32", to="fp32")
    before = plain[Q + ".weight"].array.astype(np.float64)
    delta = expected_of(Q, plain[Q + ".weight"].array, made).astype(np.float64) - before
    added = read_directory(tmp_path / "f32")[Q + ".weight"].array.astype(np.float64) - before
    [row] = result.report.weights
    arrived = (delta * added).sum() / (delta**2).sum()
    assert row.arrived == pytest.approx(arrived, rel=1e-6)
    assert row.error == pytest.approx(np.linalg.norm(added - arrived * delta) / np.linalg.norm(delta), rel=1e-5)
    assert row.delta == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(before), rel=1e-9)
    assert (row.changed, row.elements) == (np.count_nonzero(added), added.size)
    assert any("less than half" in note for note in result.notes) == (arrived < 0.5)
    assert (arrived < 0.5) == (strength < 0.01)


@pytest.mark.parametrize(("name", "helps"), [
    ("compressed-tensors MXFP4", False),
    ("gpt-oss", False),
    ("DeepSeek V4 in four bits", False),
    ("ModelOpt NVFP4", True),
])  # fmt: skip
def test_what_helps_where_little_arrived(name: str, *, helps: bool, tmp_path: Path) -> None:
    """New scales are the old ones where they are powers of two, and the codes too."""
    family = WRITTEN[name]
    base, weight = family.write(tmp_path / "base"), next(iter(family.blocks))
    made, config = adapter_of(family.name(weight), floats(family, weight), 1e-7)
    adapter = write_adapter(tmp_path / "adapter", made, **config)
    [note] = [note for note in merge(base, adapter, tmp_path / "out").notes if "less than half" in note]
    assert "(--to bf16)" in note
    assert ("--scales fresh" in note, "smaller blocks" in note) == (helps, helps)


def test_the_report_in_words(plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """How much arrived, in all and where least, and what can be done."""
    adapter = write_adapter(tmp_path / "a", pair(plain, Q, 3e-4) | pair(plain, DOWN, 0.5))
    printed = cli("merge", sample_fp8, adapter, tmp_path / "out").stdout
    for part in (
        "2 merged, to fp8",
        "% of what was to be added arrived",
        "least arrived:",
        "--to bf16",
        "--scales fresh",
    ):
        assert part in printed
    rows = printed.partition("least arrived:")[2].splitlines()
    assert [Q in rows[2], DOWN in rows[3]] == [True, True]


# ---------------------------------------------------------------- pieces, workers, interruption


def pieces(monkeypatch: pytest.MonkeyPatch, chunk: int, chunks: int, step: int) -> None:
    cut(monkeypatch, chunk, chunks)
    monkeypatch.setattr("fp8ckpt.encodings.passing.STEP", step)


@pytest.fixture(scope="module")
def everything(plain: dict[str, Stored], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of most kinds: DoRA aside, which goes alone."""
    vocabulary, hidden = plain[EMBED + ".weight"].array.shape
    tensors = pair(plain, Q) | pair(plain, GATE, 0.5) | pair(plain, DOWN)
    tensors |= {f"{PREFIX}{EMBED}.lora_embedding_A": values(4, vocabulary)}
    tensors |= {f"{PREFIX}{EMBED}.lora_embedding_B": values(hidden, 4)}
    return write_adapter(tmp_path_factory.mktemp("everything") / "a", tensors)


@pytest.fixture(scope="module")
def whole(everything: Path, sample_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What merging it gives, in one go."""
    root = tmp_path_factory.mktemp("whole")
    for to in ("fp8", "bf16"):
        merge(sample_fp8, everything, root / to, to=to, workers=1)
    return {to: root / to for to in ("fp8", "bf16")}


@pytest.mark.parametrize(
    ("chunk", "chunks", "step", "workers"), [(4096, 2, 1000, 3), (512, 40, 100, 1), (8192, 1, 7, 2)]
)
@pytest.mark.parametrize("to", ["fp8", "bf16"])
def test_pieces_and_workers_change_nothing(
    to: str, chunk: int, chunks: int, step: int, workers: int, everything: Path, whole: dict[str, Path],
    sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Wherever chunks begin and end, inside rows too, and however many work on them."""
    pieces(monkeypatch, chunk, chunks, step)
    merge(sample_fp8, everything, tmp_path / "out", to=to, workers=workers)
    assert tree(tmp_path / "out") == tree(whole[to])


@pytest.mark.parametrize("writes", [0, 3, 20, 45])
@pytest.mark.parametrize("to", ["fp8", "bf16"])
def test_a_run_that_was_cut_off_goes_on(
    to: str, writes: int, everything: Path, whole: dict[str, Path], sample_fp8: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """At any write: the same call ends with the same bytes, and with the same report."""
    pieces(monkeypatch, 8192, 2, 4000)
    real, done = OutputFile.write, []

    def write(file: OutputFile, *arguments: Any) -> None:
        if len(done) == writes:
            raise StorageError("no space left on device", file="x", remedy="free some space")
        done.append(0)
        real(file, *arguments)

    monkeypatch.setattr(OutputFile, "write", write)
    with pytest.raises(StorageError, match="continues from there"):
        merge(sample_fp8, everything, tmp_path / "out", to=to, workers=1)
    monkeypatch.setattr(OutputFile, "write", real)
    assert not (tmp_path / "out").exists()
    result = merge(sample_fp8, everything, tmp_path / "out", to=to)
    assert (result.bytes_resumed > 0) == (writes > 0)
    assert tree(tmp_path / "out") == tree(whole[to])
    undisturbed = merge(sample_fp8, everything, tmp_path / "again", to=to)
    assert result.report == undisturbed.report


@pytest.mark.parametrize("before_end", [8, 1])
def test_killed_and_run_again(before_end: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGKILL, after an extent of the first pass or of the second, in which a weight and its sibling have a new
    factor: the same command ends with the bytes of a run that was let alone.
    """
    family, _ = with_siblings(divides=False)
    base, q = family.write(tmp_path / "base"), "model.layers.0.q_proj.weight"
    made, config = adapter_of(q, family.expected("F32")[q].array, 3)
    adapter = write_adapter(tmp_path / "a", made, **config)
    with monkeypatch.context() as patch:
        pieces(patch, 256, CHUNKS, 1 << 19)
        records = []
        real = PartialOutput.record
        patch.setattr(PartialOutput, "record", lambda *arguments: records.append(real(*arguments)))
        merge(base, adapter, tmp_path / "whole", workers=1)
    killed = "merge", base, adapter, tmp_path / "out", "--workers", "1"
    stopped = run_until("record", len(records) - before_end, signal.SIGKILL, *killed, chunk=256)
    assert stopped.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    pieces(monkeypatch, 256, CHUNKS, 1 << 19)
    result = merge(base, adapter, tmp_path / "out")
    assert result.bytes_resumed > 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_another_adapter_does_not_go_on(
    everything: Path, sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun is of its adapter, weight and configuration: any other is refused, and nothing is touched."""
    monkeypatch.setattr(
        OutputFile, "flush", lambda file: (_ for _ in ()).throw(StorageError("full", file="x", remedy=""))
    )
    with pytest.raises(StorageError):
        merge(sample_fp8, everything, tmp_path / "out")
    monkeypatch.undo()
    other = Path(shutil.copytree(everything, tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    begun = tree(tmp_path / "out.partial")
    for adapter, how in (
        (other, {}),
        ([(everything, 0.5)], {}),
        (everything, {"to": "bf16"}),
        (everything, {"scales": "fresh"}),
    ):
        with pytest.raises(ResumeMismatchError):
            merge(sample_fp8, adapter, tmp_path / "out", **how)
        assert tree(tmp_path / "out.partial") == begun
    merge(sample_fp8, everything, tmp_path / "out")


@examples(40)
@given(st.integers(0, 1 << 30), st.sampled_from([0.0, 1e-3, 0.1, 2.0]), st.floats(0, 1.2), st.data())
def test_the_largest_is_found_among_few(
    sample_fp8: Path, plain: dict[str, Stored], seed: int, strength: float, known: float, data: st.DataObject
) -> None:
    """Of any run, by any factors: the largest magnitude of all, or what is known to be larger."""
    with TemporaryDirectory() as folder:
        adapters = [
            open_adapter(write_adapter(Path(folder) / str(n), pair(plain, Q, strength, seed + n))) for n in (0, 1)
        ]
        tensor = adapted(open_checkpoint(sample_fp8), adapters)[Q + ".weight"]
        start = data.draw(st.integers(0, tensor.numel - 1))
        count = data.draw(st.integers(1, tensor.numel - start))
        reader, values = Reader(1 << 20, load_dequantizer), np.empty(count, np.float32)
        tensor.elements(start, "F32", values.view(np.uint8), reader)
        at_least = np.float32(known * float(np.abs(plain[Q + ".weight"].array).max()))
        expected = max(np.abs(values).max(), at_least)
        found = tensor.largest(start, count, at_least, reader)
        assert found is None or found == expected
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fp8ckpt.numerics.products._FEW", 64)
            few = tensor.largest(start, count, at_least, reader)
        assert few is None or few == expected
        assert few is not None or strength > 1e-3 or at_least < expected


# ---------------------------------------------------------------- refusals


def renamed(tensors: dict[str, Stored], old: str, new: str) -> dict[str, Stored]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


Made = tuple[dict[str, Stored], dict[str, Any], Any]
REFUSED: dict[str, tuple[Callable[[dict[str, Stored]], Made], type[Fp8CheckpointError], str]] = {
    "a module that is not there": (
        lambda p: (renamed(pair(p, Q), "q_proj", "qkv_proj"), {}, 1), ModelMismatchError, "the base has no .*qkv_proj"
    ),
    "one of several": (
        lambda p: (pair(p, Q) | renamed(pair(p, K), "layers.0", "layers.99"), {}, 1), ModelMismatchError, r"layers\.99"
    ),
    "another rank than the configuration's": (
        lambda p: (pair(p, Q), {"r": 8}, 1), ModelMismatchError, "4 rows.*rank 8"
    ),
    "another base": (
        lambda p: (factors(PREFIX + Q, 4, 96, 128), {}, 1),
        ModelMismatchError,
        r"factors \(4, 96\).*give the base that the adapter was trained on",
    ),
    "a square matrix that may be a Linear or lie across": (
        lambda p: (pair(p, Q), {"fan_in_fan_out": True}, 1), UnsupportedFormatError, "q_proj.*set it to false"
    ),
    "not finite": (
        lambda p: (pair(p, Q) | {f"{PREFIX}{Q}.lora_A.weight": Stored.of(np.full((4, 128), np.nan), "F32")}, {}, 1),
        WeightValueError,
        "512 of 512",
    ),
    "a whole tensor of another shape": (
        lambda p: ({PREFIX + LAYER + "input_layernorm.weight": values(7)}, {}, 1), ModelMismatchError, r"shape \(7,\)"
    ),
    "a part of a whole tensor": (
        lambda p: ({PREFIX + LAYER + "input_layernorm.weight": values(128)}, {}, 0.5), ModelMismatchError, "weight 0.5"
    ),
    "magnitudes of another count": (
        lambda p: (
            {
                f"{PREFIX}{EMBED}.lora_embedding_A": values(4, p[EMBED + ".weight"].shape[0]),
                f"{PREFIX}{EMBED}.lora_embedding_B": values(p[EMBED + ".weight"].shape[1], 4),
                f"{PREFIX}{EMBED}.lora_magnitude_vector": values(p[EMBED + ".weight"].shape[0]),
            },
            {"use_dora": True},
            1,
        ),
        ModelMismatchError,
        "128 elements",
    ),
    "DoRA with a weight": (
        lambda p: (pair(p, Q) | {f"{PREFIX}{Q}.lora_magnitude_vector": values(128)}, {"use_dora": True}, 0.5),
        UnsupportedFormatError,
        "DoRA",
    ),
    "magnitudes of other rows": (
        lambda p: (pair(p, Q) | {f"{PREFIX}{Q}.lora_magnitude_vector": values(7)}, {"use_dora": True}, 1),
        ModelMismatchError,
        "128 elements",
    ),
    "another method": (lambda p: (pair(p, Q), {"peft_type": "IA3"}, 1), UnsupportedFormatError, "IA3"),
    "parameters that are not there": (
        lambda p: (pair(p, Q), {"target_parameters": ["q_proj.weight", "q_proj.other"]}, 1),
        UnsupportedFormatError,
        "wrapped first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("to", ["fp8", "bf16"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_byte(
    name: str, to: str, plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path
) -> None:
    """By name, and with nothing left behind."""
    make, error, text = REFUSED[name]
    tensors, config, weight = make(plain)
    adapter = write_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(error, match=text):
        merge(sample_fp8, [(adapter, weight)], tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("to", "scales"), [("fp8", "reuse"), ("fp8", "fresh"), ("bf16", "reuse")])
def test_sums_beyond_float32_are_the_adapters(
    to: str, scales: str, plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path
) -> None:
    """Finite factors whose product is not are refused whatever is written; an infinity went into BF16 in silence."""
    tensors = {
        name: Stored.of(np.full(stored.shape, 3e38 if ".lora_B." in name else 10, np.float32), "F32")
        for name, stored in pair(plain, Q).items()
    }
    adapter = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(RangeError, match=rf"{Q}\.weight.*: 16384 merged values do not fit F32.*lora_alpha"):
        merge(sample_fp8, adapter, tmp_path / "out", to=to, scales=scales)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_that_cannot_be_added(plain: dict[str, Stored], sample_fp8: Path, tmp_path: Path) -> None:
    """Two adapters that replace one tensor, and DoRA beside another adapter."""
    norm = {PREFIX + LAYER + "input_layernorm.weight": values(128)}
    dora = pair(plain, Q) | {f"{PREFIX}{Q}.lora_magnitude_vector": values(128)}
    whole, other = write_adapter(tmp_path / "a", norm), write_adapter(tmp_path / "b", norm)
    first, second = write_adapter(tmp_path / "c", dora, use_dora=True), write_adapter(tmp_path / "d", pair(plain, Q))
    with pytest.raises(ModelMismatchError, match="two adapters replace it"):
        merge(sample_fp8, [(whole, 1), (other, 1)], tmp_path / "out")
    for one, two in ((first, second), (second, first)):
        with pytest.raises(UnsupportedFormatError, match="several adapters"):
            merge(sample_fp8, [(one, 1), (two, 1)], tmp_path / "out")


def test_arguments(everything: Path, sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """Wrong usage is told from a defect; the destination is never overwritten, nor the base written into."""
    for how in ({"to": "fp16"}, {"scales": "new"}, {"workers": 0}, {"to": "bf16", "serving": True}):
        with pytest.raises(ValueError, match=r"expected|go with"):
            merge(sample_fp8, everything, tmp_path / "out", **how)
    with pytest.raises(ValueError, match="at least one"):
        merge(sample_fp8, [], tmp_path / "out")
    with pytest.raises(OutputExistsError):
        merge(sample_fp8, everything, tmp_path)
    with pytest.raises(OutputExistsError, match="inside the adapter"):
        merge(sample_fp8, everything, everything / "out")
    assert cli("merge", sample_fp8, everything, tmp_path / "out", "--to", "fp16").returncode == 2
    assert (
        "r=1_0" in cli("merge", sample_fp8, f"{everything}r=1_0", tmp_path / "out").stderr
    )  # a path, and not ten times
    done = cli("merge", sample_fp8, tmp_path / "none", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_a_base_in_bf16(plain: dict[str, Stored], everything: Path, sample_fp8: Path, tmp_path: Path) -> None:
    """It is merged into its own dtype; FP8 cannot be asked of it."""
    convert(sample_fp8, tmp_path / "base")
    result = merge(tmp_path / "base", everything, tmp_path / "out")
    assert result.to == "bf16"
    value = read_directory(tmp_path / "base")[Q + ".weight"].array.astype(np.float32)
    expected = rounded(expected_of(Q, value, pair(plain, Q)))
    assert np.array_equal(in_bf16(tmp_path / "out")[Q + ".weight"], expected)
    with pytest.raises(UnsupportedFormatError, match="none of its tensors is quantized"):
        merge(tmp_path / "base", everything, tmp_path / "fp8", to="fp8")


def test_serving(everything: Path, sample_fp8: Path, tmp_path: Path) -> None:
    """What engines trip over in the base's own files is put right."""
    assert isinstance(merge(sample_fp8, everything, tmp_path / "out", serving=True), MergeResult)
    assert verify(tmp_path / "out", serving=True).ok


# ---------------------------------------------------------------- other ways round


@pytest.mark.parametrize(("module", "model_type", "shape", "stated", "across"), [
    ("h.attn", None, (16, 8), True, True),
    ("h.linear", None, (16, 8), True, False),
    ("h.c_proj", "gpt2", (8, 8), False, True),
    ("h.c_fc", "gpt2", (8, 16), False, True),
    ("lm_head", "gpt2", (8, 8), False, False),
])  # fmt: skip
def test_weights_stored_the_other_way_round(
    module: str, model_type: str | None, shape: tuple[int, int], stated: bool, across: bool, tmp_path: Path
) -> None:
    """A Conv1D holds [in, out]. PEFT goes by the class of each, and ``fan_in_fan_out`` records that of the last one."""
    base = write_plain(tmp_path / "base", {f"{module}.weight": values(*shape, dtype="F32", seed=4)})
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    out_of, into = shape[::-1] if across else shape
    made = factors(module, 4, into, out_of)
    merge(base, write_adapter(tmp_path / "a", made, fan_in_fan_out=stated), tmp_path / "out")
    value = read_directory(base)[f"{module}.weight"].array
    expected = expected_of(module, np.ascontiguousarray(value.T if across else value), made)
    found = read_directory(tmp_path / "out")[f"{module}.weight"].array
    assert np.array_equal(found, expected.T if across else expected)
    magnitude = np.random.default_rng(2).uniform(0.5, 2, out_of).astype(np.float32)  # DoRA has one for each output
    made[f"{module}.lora_magnitude_vector"] = Stored.of(magnitude, "F32")
    dora = write_adapter(tmp_path / "dora", made, fan_in_fan_out=stated, use_dora=True)
    merge(base, dora, tmp_path / "scaled")
    expected *= (magnitude / np.sqrt((expected.astype(np.float64) ** 2).sum(axis=1))).astype(np.float32)[:, None]
    found = read_directory(tmp_path / "scaled")[f"{module}.weight"].array
    assert np.array_equal(found, expected.T if across else expected)


E, ROWS, COLS, RANK = 3, 12, 10, 2
STACK = "m.mlp.experts."


def experts(kind: str, rows: int = ROWS) -> dict[str, Stored]:
    """The down projections of some experts: a matrix each, or one stack."""
    whole = values(E, rows, COLS, dtype="F32", seed=8)
    if kind == "stack":
        return {f"{STACK}down_proj": whole}
    return {f"{STACK}{i}.down_proj.weight": Stored.of(whole.array[i], "F32") for i in range(E)}


@pytest.mark.parametrize("of_adapter", ["stack", "matrices", "stack of an older PEFT"])
@pytest.mark.parametrize("of_base", ["stack", "matrices"])
def test_stacked_and_not(of_base: str, of_adapter: str, tmp_path: Path) -> None:
    """Experts are merged whether base and adapter hold them stacked or not, and as either PEFT took a stack."""
    base = write_plain(tmp_path / "base", experts(of_base))
    rng = np.random.default_rng(3)
    a, b = (
        rng.standard_normal((E, RANK, COLS)).astype(np.float32),
        rng.standard_normal((E, ROWS, RANK)).astype(np.float32),
    )
    config: dict[str, Any] = {"r": RANK}
    if of_adapter == "matrices":
        made = {}
        for i in range(E):
            made[f"{STACK}{i}.down_proj.lora_A.weight"] = Stored.of(a[i], "F32")
            made[f"{STACK}{i}.down_proj.lora_B.weight"] = Stored.of(b[i], "F32")
    else:
        inner, outer = a.reshape(E * RANK, COLS), b.transpose(1, 2, 0).reshape(ROWS, RANK * E)
        if of_adapter == "stack of an older PEFT":  # which takes it for [E, in, out]
            inner, outer = b.transpose(0, 2, 1).reshape(E * RANK, ROWS), a.transpose(2, 1, 0).reshape(COLS, RANK * E)
        made = {
            f"{STACK[:-1]}.lora_A.weight": Stored.of(inner, "F32"),
            f"{STACK[:-1]}.lora_B.weight": Stored.of(outer, "F32"),
        }
        config["target_parameters"] = ["experts.down_proj"]
    merge(base, write_adapter(tmp_path / "a", made, **config), tmp_path / "out")
    found, old = read_directory(tmp_path / "out"), experts("stack")[f"{STACK}down_proj"].array
    for i in range(E):
        pair_of_one = Stored.of(a[i], "F32"), Stored.of(b[i], "F32")
        one = found[f"{STACK}down_proj"].array[i] if of_base == "stack" else found[f"{STACK}{i}.down_proj.weight"].array
        assert np.array_equal(one, merged(old[i], *pair_of_one, 8 / RANK))


def test_a_stack_that_was_trained_whole(tmp_path: Path) -> None:
    """It replaces one of the base's; experts that the base holds apart have another way, which the refusal names."""
    new = Stored.of(2 * experts("stack")[f"{STACK}down_proj"].array, "F32")
    adapter = write_adapter(tmp_path / "a", {f"{PREFIX}{STACK}down_proj": new})
    merge(write_plain(tmp_path / "stack", experts("stack")), adapter, tmp_path / "out")
    assert read_directory(tmp_path / "out") == {f"{STACK}down_proj": new}
    separately = "the base stores a part, .*, separately; expected one tensor; merge it with PEFT"
    with pytest.raises(UnsupportedFormatError, match=separately):
        merge(write_plain(tmp_path / "apart", experts("matrices")), adapter, tmp_path / "never")


@pytest.mark.parametrize(("of_base", "version", "sound"), [
    ("matrices", "0.19.1", True),
    ("matrices", "0.19.0", False),
    ("matrices", None, False),
    ("stack", "0.21.2", False),
])  # fmt: skip
def test_square_experts(of_base: str, version: str | None, sound: bool, tmp_path: Path) -> None:
    """Where shapes do not say which way round a stack was taken, PEFT's version must, or it is refused."""
    base = write_plain(tmp_path / "base", experts(of_base, COLS))
    made = factors(STACK[:-1], RANK, COLS, COLS, experts=E)
    adapter = write_adapter(tmp_path / "a", made, r=RANK, target_parameters=["experts.down_proj"], peft_version=version)
    if not sound:
        with pytest.raises(UnsupportedFormatError, match="the stacked experts are square"):
            merge(base, adapter, tmp_path / "out")
        return
    merge(base, adapter, tmp_path / "out")
    old = experts("stack", COLS)[f"{STACK}down_proj"].array
    expected = expected_of("", old, made, 8 / RANK)
    found = read_directory(tmp_path / "out")
    assert all(np.array_equal(found[f"{STACK}{i}.down_proj.weight"].array, expected[i]) for i in range(E))


# ---------------------------------------------------------------- the numbers


@examples(30)
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.integers(1, 40),
    cols=st.integers(1, 70),
    rank=st.integers(1, 9),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
)
def test_within_the_rounding_of_its_terms(
    seed: int, rows: int, cols: int, rank: int, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of any shape, against float64: an error of at most a rounding for each product and each addition."""
    root = tmp_path_factory.mktemp("shape")
    base = {"m.q.weight": values(rows, cols, dtype="BF16", seed=seed)}
    (root / "base").mkdir()
    write_safetensors(root / "base/model.safetensors", base)
    made = factors("m.q", rank, cols, rows, dtype=dtype, seed=seed)
    merge(root / "base", write_adapter(root / "a", made, r=rank), root / "out")
    a, b = (made[f"m.q.lora_{side}.weight"].array.astype(np.float64) for side in "AB")
    value, scaling = base["m.q.weight"].array.astype(np.float64), 8 / rank
    exact = value + scaling * (b @ a)
    terms = np.abs(value) + scaling * (np.abs(b) @ np.abs(a))
    found = read_directory(root / "out")["m.q.weight"].array.astype(np.float64)
    assert (np.abs(found - exact) <= 2.0**-8 * np.abs(exact) + (2 * rank + 3) * 2.0**-24 * terms).all()

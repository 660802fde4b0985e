"""What a source does not store, and yet belongs to its base, in a conversion like the base: MTP layers, tied heads, and
what the user names. Nothing else is taken from the base.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8ckpt import convert, load_pretrained, save_model
from fp8ckpt.convert import Fp8Result
from fp8ckpt.errors import Fp8CheckpointError, ModelMismatchError
from tests.conftest import Run
from tests.distributed import rewrite
from tests.families.releases import RELEASES
from tests.families.test_tied import TIED, built
from tests.oracle import Stored, read_directory, tree

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Releases by name, and beside each what it is in BF16. Read-only."""
    root = tmp_path_factory.mktemp("made")
    for name in ("DeepSeek-V3", "Qwen3-Next", "Qwen3", "Qwen3 tied", "Qwen3 tied, head stored", "MiniMax-M2"):
        convert(RELEASES[name].write(root / name), root / f"{name}, bf16")
    return root


def without(source: Path, destination: Path, pattern: str) -> Path:
    return rewrite(source, destination, lambda t: {name: v for name, v in t.items() if not re.search(pattern, name)})


def back(source: Path, base: Path, destination: Path, **how: Any) -> Fp8Result:
    result = convert(source, destination, to="fp8", like=base, **how)
    assert isinstance(result, Fp8Result)
    return result


@pytest.mark.parametrize("scales", ["reuse", "fresh"])
@pytest.mark.parametrize(
    ("name", "mtp"), [("DeepSeek-V3", r"^model\.layers\.2\."), ("Qwen3-Next", r"^mtp\.")], ids=["numbered", "named"]
)
def test_mtp_layers_are_carried(name: str, mtp: str, scales: str, made: Path, tmp_path: Path) -> None:
    """Byte for byte, whatever becomes of the other scales; said in a note and in the report, which leaves them out."""
    base = made / name
    source = without(made / f"{name}, bf16", tmp_path / "source", mtp)
    result = back(source, base, tmp_path / "back", scales=scales)
    found, before = read_directory(tmp_path / "back"), read_directory(base)
    assert found.keys() == before.keys()
    differ = {key for key in before if found[key] != before[key]}
    assert not [key for key in differ if re.search(mtp, key)]
    assert bool(differ) == (scales == "fresh")
    assert result.report is not None
    assert len(result.report.carried) > 20
    assert all(re.search(mtp, key) for key in result.report.carried)
    assert not [row for row in result.report.weights if re.search(mtp, row.name)]
    assert [f"{len(result.report.carried)} tensors that the source lacks are carried" in n for n in result.notes] == [
        True
    ]


def test_mtp_layers_that_were_trained_are_not_carried(made: Path, tmp_path: Path) -> None:
    """A source that has some of their tensors is meant to have all: what lacks is the base's only where it is named."""
    base = made / "DeepSeek-V3"
    source = without(made / "DeepSeek-V3, bf16", tmp_path / "source", r"layers\.2\.(embed|eh_proj|self_attn)")
    with pytest.raises(ModelMismatchError, match=r"^.*: 8 tensors are only in the base.*eh_proj.*--carry REGEX"):
        back(source, base, tmp_path / "back")
    with pytest.raises(ModelMismatchError, match=r": 7 tensors are only in the base"):
        back(source, base, tmp_path / "back", carry="eh_proj")
    result = back(source, base, tmp_path / "back", carry=r"layers\.2\.")
    assert tree(tmp_path / "back") == tree(base)
    assert result.report is not None
    assert len(result.report.carried) == 8


def test_what_is_missing_for_no_known_reason_is_named(made: Path, tmp_path: Path, cli: Run) -> None:
    """The error says which option takes it from the base; with it the base comes back. On the command line, too."""
    base = made / "Qwen3"
    source = without(made / "Qwen3, bf16", tmp_path / "source", r"layers\.1\.mlp\.|lm_head")
    arguments = ("convert", source, tmp_path / "back", "--to", "fp8", "--like", base)
    refused = cli(*arguments)
    assert refused.returncode == 1
    assert "4 tensors are only in the base, 0 only in the source" in refused.stderr
    assert "or name the tensors to take from the base: --carry REGEX" in refused.stderr
    done = cli(*arguments, "--carry", r"layers\.1\.mlp|^lm_head")
    assert done.returncode == 0, done.stderr
    assert "note: 4 tensors that the source lacks are carried from the base: lm_head.weight" in done.stdout
    assert tree(tmp_path / "back") == tree(base)


@pytest.mark.parametrize(("how", "message"), [
    ({"to": "bf16", "carry": "x"}, "carry goes with like"),
    ({"to": "fp8", "scheme": "block", "carry": "x"}, "carry goes with like"),
    ({"to": "fp8", "like": "base", "carry": "("}, r"carry='\(' is no regular expression"),
])  # fmt: skip
def test_carry_is_refused_where_it_means_nothing(how: dict[str, Any], message: str, made: Path, tmp_path: Path) -> None:
    """Without a base there is nothing to take from."""
    if "like" in how:
        how = {**how, "like": made / "Qwen3"}
    with pytest.raises(ValueError, match=message):
        convert(made / "Qwen3, bf16", tmp_path / "out", **how)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- tied heads


def trained(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Other embeddings, and no head."""
    values = tensors[EMBEDDINGS].array.astype(np.float32) * np.float32(1.5)
    return {name: t for name, t in tensors.items() if name != HEAD} | {EMBEDDINGS: Stored.of(values, "BF16")}


def says(value: bool | None) -> Any:
    """A change of a configuration: what it says of tied embeddings."""

    def change(config: dict[str, Any]) -> None:
        config.pop("tie_word_embeddings")
        if value is not None:
            config["tie_word_embeddings"] = value

    return change


@pytest.mark.parametrize("stated", [True, None])
def test_a_tied_head_that_the_base_stores_is_the_sources_embeddings(
    stated: bool | None, made: Path, tmp_path: Path
) -> None:
    """The trained ones, not the base's; where the configuration is silent, the base's equal bytes say it is tied."""
    base = rewrite(made / "Qwen3 tied, head stored", tmp_path / "base", config=says(stated))
    source = rewrite(made / "Qwen3 tied, head stored, bf16", tmp_path / "source", trained)
    result = back(source, base, tmp_path / "back")
    found, before = read_directory(tmp_path / "back"), read_directory(base)
    assert found[HEAD] == found[EMBEDDINGS] == read_directory(source)[EMBEDDINGS]
    assert {name for name in before if found[name] != before[name]} == {HEAD, EMBEDDINGS}
    note = "lm_head.weight, which the source does not store, is tied to model.embed_tokens.weight, as in the base"
    assert note in result.notes


@pytest.mark.parametrize("why", ["not tied", "another head"])
def test_a_head_of_its_own_is_missed(why: str, made: Path, tmp_path: Path) -> None:
    """Where the base does not tie it, or holds another, nobody takes the embeddings for it."""

    def other(tensors: dict[str, Stored]) -> dict[str, Stored]:
        return tensors | {HEAD: Stored(*tensors[HEAD][:2], tensors[HEAD].data[::-1])}

    tied = made / "Qwen3 tied, head stored"
    how: dict[str, Any] = {"config": says(False)} if why == "not tied" else {"tensors": other}
    base = rewrite(tied, tmp_path / "base", **how)
    source = without(made / "Qwen3 tied, head stored, bf16", tmp_path / "source", "lm_head")
    with pytest.raises(ModelMismatchError, match=r"1 tensors are only in the base.*lm_head.*--carry REGEX"):
        back(source, base, tmp_path / "back")


def test_a_stored_copy_of_a_tied_head_is_left_out_where_the_base_stores_none(made: Path, tmp_path: Path) -> None:
    """It must be the embeddings, bit for bit: a head that went its own way has no place in such a base."""
    base, plain = made / "Qwen3 tied", made / "Qwen3 tied, bf16"
    copy = rewrite(plain, tmp_path / "copy", lambda t: t | {HEAD: t[EMBEDDINGS]})
    result = back(copy, base, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)
    note = "lm_head.weight of the source is tied to model.embed_tokens.weight and is not stored, as in the base"
    assert note in result.notes
    own = rewrite(plain, tmp_path / "own", lambda t: t | {HEAD: Stored.of(t[EMBEDDINGS].array * 2, "BF16")})
    said = r"^lm_head.weight in .*: it differs from model.embed_tokens.weight, which the base"
    with pytest.raises(ModelMismatchError, match=said):
        back(own, base, tmp_path / "own-back")
    untied = rewrite(base, tmp_path / "untied", config=says(False))
    with pytest.raises(ModelMismatchError, match=r"1 only in the source; the first is lm_head"):
        back(copy, untied, tmp_path / "own-back")


@pytest.mark.parametrize("name", TIED)
def test_a_copy_of_what_is_tied_is_left_out_whatever_its_name(name: str, tmp_path: Path) -> None:
    """So is one that the base stores and the source does not: the table of transformers' class says which are one."""
    model, release, fp8 = built(name), tmp_path / "release", tmp_path / "fp8"
    model.save_pretrained(release)
    convert(release, fp8, to="fp8", scheme="channel")
    convert(fp8, tmp_path / "once")
    tied = {key: source for key, source in model.all_tied_weights_keys.items() if "layers" not in key}
    copies = rewrite(tmp_path / "once", tmp_path / "twice", lambda t: t | {k: t[source] for k, source in tied.items()})
    back(copies, fp8, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(fp8)
    twice = rewrite(fp8, tmp_path / "fp8 twice", lambda t: t | {k: t[s] for k, s in tied.items()})
    back(tmp_path / "once", twice, tmp_path / "back twice")
    assert read_directory(tmp_path / "back twice") == read_directory(twice)
    head = next(iter(tied))
    own = rewrite(copies, tmp_path / "own", lambda t: t | {head: Stored.of(t[head].array * 2, "BF16")})
    with pytest.raises(ModelMismatchError, match=f"^{head} in .*: it differs from .*with --scheme"):
        back(own, fp8, tmp_path / "own back")


def test_what_has_fewer_bits_than_in_the_base_is_said(made: Path, tmp_path: Path) -> None:
    """An F32 router that was BF16 in the model does not come back as it was: a note names it."""
    base = made / "MiniMax-M2"
    whole = back(made / "MiniMax-M2, bf16", base, tmp_path / "whole")
    assert not [note for note in whole.notes if "fewer bits" in note]

    def rounded(tensors: dict[str, Stored]) -> dict[str, Stored]:
        return {k: Stored.of(t.array, "BF16") if k.endswith("gate.weight") else t for k, t in tensors.items()}

    source = rewrite(made / "MiniMax-M2, bf16", tmp_path / "source", rounded)
    result = back(source, base, tmp_path / "back")
    assert [
        note for note in result.notes if note.startswith("2 tensors have fewer bits in the source than in the base")
    ]


def test_other_defects_keep_their_names(made: Path, tmp_path: Path) -> None:
    """Carrying is for what lacks: a tensor of another shape, or one too many, is refused whatever is carried."""
    base, plain = made / "Qwen3", made / "Qwen3, bf16"
    extra = rewrite(plain, tmp_path / "extra", lambda t: t | {"model.extra.weight": t[EMBEDDINGS]})
    with pytest.raises(ModelMismatchError, match=r"1 only in the source; the first is model\.extra\.weight"):
        back(extra, base, tmp_path / "back", carry=".")
    shape = rewrite(plain, tmp_path / "shape", lambda t: t | {HEAD: t["model.norm.weight"]})
    with pytest.raises(Fp8CheckpointError, match=r"^lm_head.weight.*: shape \(160,\)"):
        back(shape, base, tmp_path / "back", carry=".")


def test_a_resized_vocabulary_is_refused_with_what_to_do_and_that_works(made: Path, tmp_path: Path) -> None:
    """The base's configuration and tokenizer are of another: what each message advises is done."""
    base, model = made / "Qwen3", load_pretrained(made / "Qwen3")
    tokens = model.config.vocab_size
    model.resize_token_embeddings(tokens + 8, mean_resizing=False)
    advice = rf"\({tokens}, .* resized, .* convert that with --scheme; or resize it back: .*\({tokens}\)"
    for to in ("bf16", "fp8"):
        with pytest.raises(ModelMismatchError, match=advice):
            save_model(model, tmp_path / "out", to=to, like=base)
    save_model(model, tmp_path / "bf16")
    with pytest.raises(ModelMismatchError, match=r"quantize the source with --scheme, which keeps its own config"):
        back(tmp_path / "bf16", base, tmp_path / "out")
    convert(tmp_path / "bf16", tmp_path / "fp8", scheme="channel")
    loaded = load_pretrained(tmp_path / "fp8")
    assert loaded.model.embed_tokens.weight.equal(model.model.embed_tokens.weight)
    model.resize_token_embeddings(tokens)
    save_model(model, tmp_path / "as it was", to="fp8", like=base)
    assert tree(tmp_path / "as it was") == tree(base)

"""Every family of `tests.families.releases`, as released: which steps of the way from FP8 through a model and back
work, row by row. ``python -m benchmarks families`` prints the matrix and writes docs/families.md.

A cell is a check of bytes or bits, never of closeness. A failed check says how, on the page too.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.distributed import assert_same, run
from tests.families.releases import RELEASES, Release
from tests.families.test_there_and_back import SHARDINGS, assert_loaded, assert_released, logits
from tests.oracle import tree
from transformers.distributed import DistributedConfig

from benchmarks.measuring import ROOT
from fp8ckpt import convert, inspect, load_pretrained, save_model, verify

PAGE = ROOT / "docs" / "families.md"
YES = "yes"


@dataclass
class Row:
    """A family under test, with what one check leaves for the next."""

    name: str
    root: Path
    sharded: dict[str, dict[str, str]]  # what was wrong on any rank, by sharding and family
    held: dict[str, Any] = field(default_factory=dict)

    @property
    def release(self) -> Release:
        """The row of the table."""
        return RELEASES[self.name]

    @property
    def path(self) -> Path:
        """The release's directory."""
        return self.root / self.name

    def out(self, what: str) -> Path:
        """Where a check writes."""
        return self.root / f"{self.name}, {what}"


def _inspect(row: Row) -> str:
    assert not inspect(row.path).defects
    return YES


def _convert(row: Row) -> str:
    for layout in ("file", "model"):
        convert(row.path, row.out(layout), layout=layout)
    found = verify(row.path, row.out("file"))
    assert found.ok, found.tensor_differences
    return YES


def _from_pretrained(row: Row) -> str:
    layout = "file" if row.release.understood else "model"
    cls = getattr(transformers, row.release.model)
    model, said = cls.from_pretrained(row.out(layout), dtype=torch.bfloat16, output_loading_info=True)
    assert not said["missing_keys"], said["missing_keys"]
    unexpected = {key for key in said["unexpected_keys"] if not key.startswith(row.release.mtp or "-")}
    assert not unexpected, unexpected
    row.held["theirs"] = model
    aside = "MTP aside" if said["unexpected_keys"] else YES
    return aside if layout == "file" else "`--layout model`"


def _load_pretrained(row: Row) -> str:
    model = row.held["ours"] = load_pretrained(row.path)
    assert_loaded(model, row.name, row.path)
    theirs = row.held["theirs"]
    for key, tensor in theirs.state_dict().items():
        assert_same(model.state_dict()[key], tensor, key)
    assert_same(logits(model), logits(theirs))
    return YES


def _save_model(row: Row) -> str:
    save_model(row.held["ours"], row.out("saved fp8"), to="fp8", like=row.path)
    assert_released(row.out("saved fp8"), row.name, row.path)
    save_model(row.held["ours"], row.out("saved bf16"), like=row.path)
    if not row.release.rounded:
        assert tree(row.out("saved bf16")) == tree(row.out("file"))
    return _all_but(row)


def _by_transformers(row: Row) -> str:
    row.held["theirs"].save_pretrained(row.out("theirs"))
    convert(row.out("theirs"), row.out("back"), to="fp8", like=row.path)
    assert_released(row.out("back"), row.name, row.path)
    return _all_but(row)


def _stacked(row: Row) -> str:
    convert(row.out("model"), row.out("unstacked"), to="fp8", like=row.path)
    assert tree(row.out("unstacked")) == tree(row.path)
    assert verify(row.path, row.out("model")).ok
    assert verify(row.out("model"), row.path).ok
    return YES


def _all_but(row: Row) -> str:
    return f"all but `{row.release.rounded[0]}`" if row.release.rounded else YES


def _sharded(sharding: str) -> Callable[[Row], str]:
    def check(row: Row) -> str:
        if (found := row.sharded[sharding].get(row.name)) is None:
            return "no experts"
        assert not found, found
        return _all_but(row)

    return check


def there_and_back(root: Path, sharding: str) -> dict[str, str]:
    """On a rank: load and save each family that has what is sharded so; what was wrong, by name."""
    found = {}
    for name, release in RELEASES.items():
        if sharding == "_experts" and not release.experts and name != "Mistral4":
            continue
        row, found[name] = Row(name, root, {}), ""
        try:
            how = SHARDINGS[sharding] if sharding in SHARDINGS else DistributedConfig(tp_size=2)
            model = load_pretrained(row.path, parallelize=how)
            assert_loaded(model, name, row.path)
            save_model(model, row.out(sharding), to="fp8", like=row.path)
            assert_released(row.out(sharding), name, row.path)
        except Exception as error:  # the others go on, if their ranks are still together
            found[name] = repr(error)
    return found


CHECKS: dict[str, Callable[[Row], str]] = {
    "inspect": _inspect,
    "convert": _convert,
    "from_pretrained": _from_pretrained,
    "load_pretrained": _load_pretrained,
    "FSDP2 x 2": _sharded("_fsdp"),
    "EP x 2": _sharded("_experts"),
    "tp_plan x 2": _sharded("tp_plan"),
    "save_model": _save_model,
    "save_pretrained, --like": _by_transformers,
    "stacked, --like; verify": _stacked,
}

INTRODUCTION = """# Families

Written by `python -m benchmarks families`, which makes each row: a miniature in the layout in which the family is
released, and every check on it. Nothing here is close: files are compared byte for byte, tensors and logits by bits.

| column | what was checked |
|---|---|
| inspect | no defect is found |
| convert | to BF16, in the file's layout and in the model's; `verify` finds the first equal to the release |
| from_pretrained | transformers loads that BF16 without missing or unexpected keys |
| load_pretrained | straight from the FP8 files: the parameters of that model, and its logits |
| FSDP2 x 2, EP x 2 | the same on two ranks, sharded, or each with half of the experts; saved: the release's bytes |
| tp_plan x 2 | the same, sharded by the model's own plan of tensor parallelism, as transformers shards it |
| save_model | as FP8: the release's bytes; as BF16: what `convert` writes |
| save_pretrained, --like | what transformers saves, back by `convert --to fp8 --like`: the release's bytes |
| stacked, --like; verify | the model's own layout, back by the same: the release's bytes; `verify` finds them equal |
"""

REMARKS = """
What is not as it was: of MiniMax-M2 the release holds the router and its bias in F32 and transformers' model in BF16,
so that a model cannot give them back; everything else of it comes back, and `save_model` and `convert` name what does
not. Where `--layout model` stands, transformers would leave the experts random, with a warning, if the file held them
one by one: `convert` advises that option.

MTP layers (DeepSeek-V3, GLM-4.5-MoE, Qwen3-Next, Qwen3.5-MoE) have no place in transformers' models: they are carried
from the release. Where "MTP aside" stands, transformers names them as unexpected: it knows them by the release's own
number of layers, and a miniature has fewer. A tied head that is stored all the same is the source's embeddings.

By transformers' own plans, tensors and experts together (`tp_plan` with `ep_plan`), experts beside FSDP2, and pipeline
stages come back as well (`tests/families/test_plans.py`); it has no pipeline for models that see, nor for one that is
also cut by tensors, and no `ep_plan` for Llama-4.

These are miniatures of true layouts. On 2026-11-30, with transformers 5.23, 55 further classes were saved by it, made
FP8 by `convert --scheme channel`, loaded, saved and converted back, by us and by transformers, and all came back: among
them OLMoE, Granite MoE, Ernie 4.5 MoE and its vision model, Hunyuan MoE, dots1, Phi-MoE, LongCat-Flash, Jamba, gpt-oss,
Nemotron-H, DeepSeek-V2, -V3.2 and -V4, Kimi Linear, Gemma 4; eight of them on two ranks by each plan that they have.
"""


def page(rows: Iterable[tuple[str, ...]]) -> str:
    """The text of docs/families.md, from rows of a family's name and its cells."""
    head = ("family", *CHECKS)
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join((INTRODUCTION, *lines)) + "\n" + REMARKS


def cells(row: Row) -> Iterable[str]:
    """Yield the outcome of each check; one that fails says how."""
    for name, check in CHECKS.items():
        try:
            yield check(row)
        except Exception as error:  # the matrix shows any failure
            first = str(error).strip().partition("\n")[0]
            print(f"  {row.name}, {name}: {type(error).__name__}: {first}", file=sys.stderr)
            yield f"no: {type(error).__name__}"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    found = []
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
        for name, release in RELEASES.items():
            release.write(Path(work) / name)
        sharded = {how: run(2, there_and_back, Path(work), how)[0] for how in ("_fsdp", "_experts", "tp_plan")}
        for name in RELEASES:
            row = Row(name, Path(work), sharded)
            found.append((name, *cells(row)))
            print(f"  {name:34} {' | '.join(found[-1][1:])}", flush=True)
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()

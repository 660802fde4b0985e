"""``fp8ckpt sample``."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fp8ckpt.cli.options import Json, Plan, Quiet, word
from fp8ckpt.cli.printing import answer, answer_plan, job
from fp8ckpt.cli.progress import progress


@dataclasses.dataclass(frozen=True)
class _Sampled:
    destination: Path


def sample(
    destination: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to make; it must not exist.")],
    scheme: Annotated[
        str, word("per-tensor", "block", help="per-tensor: a Mistral3 model; block: a DeepSeek-V3-shaped one.")
    ] = "per-tensor",
    layout: Annotated[
        str, word("identity", "nested", help="Names as in Mistral Medium 3.5 (identity) or Ministral 3 (nested).")
    ] = "identity",
    layers: Annotated[int | None, typer.Option(min=1, help="Text layers.")] = None,
    hidden: Annotated[int | None, typer.Option(min=16, help="Hidden size of the text model.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=16, help="Intermediate size of the text model.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key-value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=2, help="Size of a head.")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=320, help="Vocabulary size.")] = None,
    vision_layers: Annotated[int | None, typer.Option(min=1, help="Vision layers.")] = None,
    experts: Annotated[int | None, typer.Option(min=2, help="Experts a layer (block scheme).")] = None,
    files: Annotated[int, typer.Option(min=1, help="Safetensors files.")] = 3,
    true_shape: Annotated[
        bool, typer.Option(help="The released model's own sizes; with --sparse, in no space.")
    ] = False,
    sparse: Annotated[bool, typer.Option(help="True headers and scales, and holes for weights.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    plan: Plan = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a miniature, valid FP8 checkpoint in the released layout, from which a model can be built."""
    from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes, plan_sample
    from fp8ckpt.sample import sample as run

    given = {
        "layers": layers, "hidden": hidden, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "vocabulary": vocabulary, "vision_layers": vision_layers, "experts": experts,
    }  # fmt: skip
    family: type[Any] = Mistral3Sizes if scheme == "per-tensor" else DeepseekSizes
    known = {field.name for field in dataclasses.fields(family)}
    changed = {name: size for name, size in given.items() if size is not None}
    if foreign := sorted(changed.keys() - known):
        raise typer.BadParameter(f"--{foreign[0].replace('_', '-')} does not go with --scheme {scheme}")
    with job():
        sizes = dataclasses.replace(family.true_shape() if true_shape else family(), **changed)
        if plan:
            planned = partial(plan_sample, destination, sizes, layout=layout, files=files, sparse=sparse)
            answer_plan(planned, as_json=as_json, quiet=quiet)
            return
        with progress("making", quiet=quiet) as reported:
            made = run(destination, sizes, layout=layout, files=files, sparse=sparse, seed=seed, progress=reported)
    answer(_Sampled(made), lambda sampled: print(sampled.destination), as_json=as_json, quiet=quiet)

"""What keeping the base's scales means: a released FP8 model is updated at random and quantized again, with its scales
kept or made anew.

Every figure is from the library's own report and `verify`, on whole checkpoints: FP8 -> BF16 -> a random update -> FP8.
There are two kinds of update: *dense* moves every weight of the FP8 layers by normal deviates, *sparse* one in a
hundred. There are three kinds of base: scales of ``amax / 448`` per tensor, the same per block, and scales per tensor
that leave a fifth of the range unused, as calibrated or shared scales do. Writes the data and the figure of
docs/scales.md; needs matplotlib (`pip install '.[bench]'`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measuring import ROOT, facts
from fp8ckpt import convert, open_checkpoint, sample, verify
from fp8ckpt.encodings.results import Fp8Result
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes

FIGURE = ROOT / "docs" / "figures" / "scale-reuse"
_MISTRAL3 = Mistral3Sizes(layers=2, hidden=1024, intermediate=2048, heads=8, kv_heads=2, head_dim=128)
MODELS: dict[str, Mistral3Sizes | DeepseekSizes] = {
    "per tensor": _MISTRAL3,
    "per tensor, scales with a margin": _MISTRAL3,
    "128 x 128 blocks": DeepseekSizes(
        layers=2, dense_layers=2, hidden=1024, intermediate=2048, q_rank=512, kv_rank=256
    ),
}
#: Size of the update: its root mean square over the weight's own.
SIZES = [float(size) for size in np.logspace(-5, -1, 13)]
KINDS = {"dense": 1.0, "sparse": 0.01}
MARGIN = 1.25


def update(plain: Path, out: Path, names: set[str], size: float, share: float, seed: int) -> None:
    """Copy a BF16 checkpoint with a ``share`` of the elements of its FP8 weights moved."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(plain, out)
    generator = torch.Generator().manual_seed(seed)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name in sorted(names & tensors.keys()):
            weight = tensors[name].float()
            noise = torch.randn(weight.shape, generator=generator) * (size * weight.square().mean().sqrt())
            chosen = torch.rand(weight.shape, generator=generator) < share
            tensors[name] = torch.where(chosen & (noise != 0), weight + noise, weight).to(torch.bfloat16)
        save_file(tensors, file, {"format": "pt"})


def with_margin(base: Path, work: Path) -> Path:
    """The same model, quantized with scales that are `MARGIN` times as large."""
    import torch
    from safetensors.torch import load_file, save_file

    plain, wider, out = work / "as-bf16", work / "wider", work / "margin"
    convert(base, plain)
    shutil.copytree(base, wider)
    for file in wider.glob("*.safetensors"):
        tensors = load_file(file)
        scaled = {
            name: (t.float() * MARGIN).to(torch.bfloat16) if name.endswith("_scale_inv") else t
            for name, t in tensors.items()
        }
        save_file(scaled, file, {"format": "pt"})
    result = convert(plain, out, to="fp8", like=wider)
    assert isinstance(result, Fp8Result)
    assert result.report is not None
    assert result.report.total.fresh == 0
    return out


def measure(work: Path) -> list[dict[str, object]]:
    """A row for each model, kind and size of update, and scale policy."""
    rows: list[dict[str, object]] = []
    for model, sizes in MODELS.items():
        base = sample(work / model / "fp8", sizes, files=1)
        if "margin" in model:
            base = with_margin(base, work / model)
        convert(base, work / model / "bf16")
        names = {tensor.name for tensor in open_checkpoint(base).quantized}
        for kind, share in KINDS.items():
            for seed, size in enumerate([0.0, *SIZES]):
                trained = work / model / f"{kind}-{seed}"
                update(work / model / "bf16", trained, names, size, share, seed)
                changed = verify(work / model / "bf16", trained)
                for scales in ("reuse", "fresh"):
                    out = work / "out"
                    result = convert(trained, out, to="fp8", like=base, scales=scales)
                    differing = sum(difference.elements or 0 for difference in verify(trained, out).tensor_differences)
                    shutil.rmtree(out)
                    assert isinstance(result, Fp8Result)
                    assert result.report is not None
                    total = result.report.total
                    rows.append(
                        {
                            "model": model,
                            "update": kind,
                            "size": size,
                            "scales": scales,
                            "bf16_changed": sum(d.elements or 0 for d in changed.tensor_differences) / total.elements,
                            "codes_moved": (total.moved or 0) / total.elements,
                            "values_differ": differing / total.elements,
                            "fresh_scales": total.fresh / total.scales,
                            "mean_error": total.mean_error,
                        }
                    )
                shutil.rmtree(trained)
        print(f"{model}: done")
    return rows


def draw(rows: list[dict[str, object]], file: Path) -> None:
    """Two panels a model: codes moved, and values that are not the trained ones."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fp8ckpt"  # the same file at every run
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), sharex=True, sharey=True, layout="constrained")
    for column, model in enumerate(MODELS):
        for row, (key, label) in enumerate(
            {"codes_moved": "codes that moved (%)", "values_differ": "values that differ from the trained (%)"}.items()
        ):
            axis = axes[row][column]
            for kind, colour in (("dense", "#1f5a99"), ("sparse", "#c2571a")):
                for scales, line in (("reuse", "-"), ("fresh", "--")):
                    points = [
                        r for r in rows if (r["model"], r["update"], r["scales"]) == (model, kind, scales) and r["size"]
                    ]
                    xs, ys = [r["size"] for r in points], [100 * float(str(r[key])) for r in points]
                    axis.plot(
                        xs, ys, line, color=colour, marker="o", markersize=3, label=f"{kind} update, {scales} scales"
                    )
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylim(1e-4, 130)
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(model)
            if column == 0:
                axis.set_ylabel(label)
    figure.supxlabel("size of the update: its root mean square over the weight's own", fontsize=10)
    axes[0][0].legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
        rows = measure(Path(work))
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.with_suffix(".json").write_text(json.dumps({"facts": facts(), "rows": rows}, indent=1) + "\n")
    draw(rows, FIGURE.with_suffix(".svg"))
    for row in rows:
        if row["size"] in (0.0, SIZES[3], SIZES[6], SIZES[9]):
            print(row)


if __name__ == "__main__":
    main()

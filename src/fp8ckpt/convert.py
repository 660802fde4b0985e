"""Convert a directory of FP8 safetensors to the BF16 (or FP16, FP32) directory that a trainer can use, and back to FP8.

The planner runs first and returns pure data: the files, headers and offsets of the output follow from the headers of
the source or the base. Then worker threads take regions of the output, fill each from the source (a table look-up for
codes, a quantizer for values, a byte copy for the rest) and write it at its offset. The threads reuse their buffers, so
memory is a few MiB a worker for a checkpoint of any size.

The output appears at its name once it is whole and on disk. The same command resumes an interrupted run and gives the
same bytes. Under torchrun the ranks share the work: call `convert` on all of them.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8ckpt.collector import collector_paused
from fp8ckpt.encodings.asked import Asked
from fp8ckpt.encodings.plain import FILE, LAYOUTS, plan_plain
from fp8ckpt.encodings.results import ConvertResult, Fp8Result, PlainResult
from fp8ckpt.encodings.run import Written, run
from fp8ckpt.engine import Progress
from fp8ckpt.numerics.codes import SCALES
from fp8ckpt.output.forecast import Forecast
from fp8ckpt.output.partial import PartialOutput, writing
from fp8ckpt.stores.local import kept_open
from fp8ckpt.targets import FP8, refuse_count, refuse_other, target_of
from fp8ckpt.tensors.checkpoint import CheckpointLike, open_checkpoint

if TYPE_CHECKING:
    import torch

    from fp8ckpt.encodings.recipes import QuantizingPlan

SCHEMES = ("per-tensor", "block", "channel")


@kept_open()
def convert(
    source: CheckpointLike,
    destination: str | Path,
    *,
    to: str | torch.dtype | None = None,
    layout: str = "file",
    like: CheckpointLike | None = None,
    scheme: str | None = None,
    scales: str = "reuse",
    carry: str | None = None,
    report: bool = True,
    report_html: str | Path | None = None,
    serving: bool = False,
    only: str | None = None,
    skip: str | None = None,
    follow_index: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Convert ``source`` to ``destination``, a new directory or ``s3://bucket/prefix``. The output becomes visible once
    all of it is written. An output in a store is sent part by part; the working directory keeps the run's state.

    To BF16, FP16 or FP32: ``to`` is "bf16" (the default), "fp16" or "fp32", or torch's dtype. Every quantized weight is
    dequantized to it. The output has the same files with the same tensors, without the scales; tensors that were not
    quantized keep their bytes. The configuration loses its ``quantization_config``, the index is rewritten, and all
    other files are copied, except Mistral's own copy of the weights (``consolidated*.safetensors``) and
    ``hf_quant_config.json``. ``layout`` "model" writes the tensors under the names and in the stackings of their model
    in transformers, in files of at most 5 GB, for models whose own files transformers has no rule to read.

    To FP8 or four bits, in the layout of a base: ``like`` is the quantized checkpoint that the source came from; ``to``
    is then "fp8" and may be left out. The base decides names, files, grids, scale dtypes, activation scales,
    configuration and side files, and the source gives the values. ``scales`` "reuse" keeps the scale of each block
    whose values still fit it (`fp8ckpt.numerics.scaling` has the rule) and makes new scales for the other blocks;
    "fresh" makes all scales new. Weights that were not trained come back byte for byte. Two kinds of tensors that the
    source lacks are copied from the base: the layers that predict further tokens (MTP), and tensors in whose names the
    regular expression ``carry`` is found. A tied head takes the source's embeddings. The notes and the report list all
    of these. ``serving`` corrects what serving engines fail on in the base's own layout; the output is then not
    byte-identical to the base.

    To FP8 by a scheme: ``scheme`` is "per-tensor", "block" or "channel". Linear weights of the source are quantized by
    it, with dynamic activation scaling. With ``only`` or ``skip`` (regular expressions, as for `re.search`), these are
    the weights in whose names ``only`` is found and ``skip`` is not. The notes list what is not quantized, and why.

    ``report`` False makes no report on the quantization, and does not read the base's codes for it. ``report_html``
    names a file for the page of `fp8ckpt.report` on ``source`` (or ``like``) and the output; it is counted in the same
    pass, and implies ``report``. With ``follow_index``, tensors that an index does not list are ignored, see
    `fp8ckpt.open_checkpoint`. ``workers`` (default: the cores of this process) changes the speed and never the output.
    ``progress`` is called with (bytes written so far by this call, bytes in all, the current activity). Under torchrun,
    or where a process group is initialized, the ranks share the work, and every rank must call.

    Raises the `Fp8CheckpointError` of the defect before anything is written; `OutputExistsError` if the destination
    exists; `WeightValueError` for weights that are not finite; `StorageError` if the disk refuses a write, in which
    case the next run uses what was written; `SourceChangedError` if a file changes while it is read.

    >>> result = fp8ckpt.convert("sample-fp8", "sample-bf16", to="bf16")
    >>> result.dequantized, result.dropped_scales
    (14, 28)
    >>> back = fp8ckpt.convert("sample-bf16", "sample-back", to="fp8", like="sample-fp8")
    >>> back.report.total.moved
    0
    """
    from fp8ckpt.ranks import ranks_of_this_job, threads_of_this_rank

    to = str(to or (FP8 if like is not None or scheme is not None else "bf16"))
    report, see = report or report_html is not None, report_html is not None
    how = Asked(source, to, layout, like, scheme, scales, carry, report, see, serving, only, skip, follow_index)
    with writing(destination) as output, ranks_of_this_job() as ranks:
        how = ranks.together(lambda: _checked(how, workers))
        if report_html is not None:
            from fp8ckpt.report import draw, refuse_page

            page = ranks.together(lambda: refuse_page(report_html))
            where, whole, partial = (Path(os.path.realpath(p)) for p in (page, output.destination, output.partial))
            if where == whole or where.is_relative_to(partial):
                raise ValueError(f"report_html is {report_html}, where the output is written: choose another name")
        threads = threads_of_this_rank(workers)
        begun = time.monotonic()
        done = run(lambda: _plan(how, output), output, threads, progress, ranks)
        result = _result(done, output.destination, how.to, time.monotonic() - begun)
        if report_html is not None:
            before = done.plan.base or done.plan.source
            ranks.first(lambda: draw((before, open_checkpoint(output.destination)), done.seen, page))
        return result


def kept_of(destination: str | Path) -> Path | None:
    """Return the directory of the partial output that an interrupted run left, or None."""
    partial = PartialOutput(destination)
    return partial.partial if partial.directory.exists() else None


@kept_open()
def plan_convert(
    source: CheckpointLike,
    destination: str | Path,
    *,
    to: str | torch.dtype | None = None,
    layout: str = "file",
    like: CheckpointLike | None = None,
    scheme: str | None = None,
    scales: str = "reuse",
    carry: str | None = None,
    report: bool = True,
    serving: bool = False,
    only: str | None = None,
    skip: str | None = None,
    follow_index: bool = False,
) -> Forecast:
    """Return what `convert` would do with the same arguments: files, bytes to read and to write, room, time.

    Writes nothing. Raises what `convert` raises before its first byte, except `NoRoomError`: ``fits`` says if there is
    room.

    >>> forecast = fp8ckpt.plan_convert("sample-fp8", "planned")
    >>> forecast.fits, forecast.bytes_to_write > forecast.bytes_to_read
    (True, True)
    """
    from fp8ckpt.ranks import ranks_of_this_job

    to = str(to or (FP8 if like is not None or scheme is not None else "bf16"))
    how = Asked(source, to, layout, like, scheme, scales, carry, report, False, serving, only, skip, follow_index)
    with ranks_of_this_job() as ranks:
        return ranks.first(lambda: _forecast(_checked(how, None), PartialOutput(destination)))


@collector_paused()
def _forecast(how: Asked, output: PartialOutput) -> Forecast:
    return _plan(how, output).forecast(output)


def _checked(how: Asked, workers: int | None) -> Asked:
    """Return ``how`` with ``to`` under its canonical name. Raise `ValueError` if arguments do not go together."""
    how = replace(how, to=target_of(how.to))
    to, like, scheme, scales, carry, serving = how.to, how.like, how.scheme, how.scales, how.carry, how.serving
    selected = how.only is not None or how.skip is not None
    refuse_other("layout", how.layout, LAYOUTS)
    if to == FP8 and how.layout != FILE:
        raise ValueError(f"layout={how.layout!r} goes with bf16, fp16 and fp32: for fp8, like or scheme decides it")
    refuse_count("workers", workers)
    refuse_other("scales", scales, SCALES)
    if scheme is not None:
        refuse_other("scheme", scheme, SCHEMES)
    if to == FP8 and (like is None) == (scheme is None):
        raise ValueError("to='fp8' needs the base that the source came from (like), or a scheme; and not both")
    if to != FP8 and (like is not None or scheme is not None or scales != "reuse" or serving):
        raise ValueError(f"like, scheme, scales and serving go with to='fp8', and not with to={to!r}")
    if carry is not None and like is None:
        raise ValueError("carry goes with like, the checkpoint that is taken from")
    if scheme is None and selected:
        raise ValueError("only and skip go with scheme: a base decides itself what is quantized")
    if scheme is not None and (scales != "reuse" or serving):
        raise ValueError(
            "scales and serving go with like: a scheme makes all scales new, and writes what serving engines need"
        )
    return how


def _result(done: Written, destination: Path | str, to: str, seconds: float) -> PlainResult | Fp8Result:
    plan = done.plan
    common: dict[str, Any] = {
        "destination": destination,
        "to": to,
        "files": len(plan.output.names),
        "bytes_read": done.bytes_read,
        "bytes_written": plan.output.nbytes,
        "bytes_resumed": done.bytes_resumed,
        "notes": plan.notes,
        "seconds": seconds,
    }
    if to == FP8:
        return Fp8Result(
            **common,
            tensors=len(plan.source.tensors),
            quantized=len(plan.weights),
            base_bytes_read=done.base_bytes_read,
            bytes_rewritten=done.bytes_rewritten,
            report=done.report,
        )
    read, quantized = plan.source, plan.source.quantized
    return PlainResult(
        **common,
        tensors=len(plan.plain),
        dequantized=len(quantized),
        dropped_scales=sum(len(tensor.spans) - 1 for tensor in quantized) + len(read.cache_scales) + len(read.markers),
        nan_codes=done.nan_codes,
    )


@collector_paused()
def _plan(how: Asked, output: PartialOutput) -> QuantizingPlan:
    from fp8ckpt.encodings.like import plan_like
    from fp8ckpt.encodings.schemes import plan_scheme
    from fp8ckpt.serving.listing import served_config

    if how.to != FP8:
        return plan_plain(how, output)
    return (plan_scheme if how.like is None else plan_like)(how, output, served_config)

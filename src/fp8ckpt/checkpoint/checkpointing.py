"""Load a checkpoint into a model in place, whatever its sharding, and save a model as a checkpoint.

A load finds the assemblies (how each tensor of the model is made of the file's) and calls ``dcp.load`` with
`FP8StorageReader`, which dequantizes the file's bytes straight into the parameters. It is strict: a tensor that is
missing on either side is an error that names it.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fp8ckpt.checkpoint.directory_writer import DirectoryWriter, given_like
from fp8ckpt.checkpoint.fp8_storage_writer import FP8StorageWriter
from fp8ckpt.checkpoint.live import unwrapped
from fp8ckpt.checkpoint.load_plan import LoadPlan
from fp8ckpt.checkpoint.planners import AssemblyLoadPlanner, Part
from fp8ckpt.checkpoint.save_plan import SavePlan, plan_save
from fp8ckpt.checkpoint.storage_reader import FP8StorageReader
from fp8ckpt.checkpoint.storage_writer import SafetensorsStorageWriter, SideFiles
from fp8ckpt.encodings.results import ConvertResult
from fp8ckpt.errors import Fp8CheckpointError
from fp8ckpt.families.between import known_model
from fp8ckpt.families.transformers_tables import is_pretrained, kept_in_float32
from fp8ckpt.numerics.codes import SCALES
from fp8ckpt.ranks import Ranks, has_group, lost_ranks_named, ranks_of_group
from fp8ckpt.targets import FP8, TARGETS, refuse_other, target_of
from fp8ckpt.tensors.checkpoint import CheckpointLike, open_checkpoint
from fp8ckpt.tensors.config import CONFIG, dump_json, without_quantization
from fp8ckpt.tensors.reading import torch_dtype


class Checkpointer:
    """`fp8ckpt.load_model` and `fp8ckpt.save_model` for the ranks of ``process_group``, which together hold one model.

    The default is the default process group, which the two functions use. Every rank of the group must make each call.

    >>> checkpointer = fp8ckpt.Checkpointer()
    >>> model = fp8ckpt.load_pretrained("sample-fp8")
    >>> checkpointer.load_model(model, "sample-fp8")
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        self._group = process_group

    def load_model(
        self,
        model: nn.Module,
        path: CheckpointLike,
        *,
        partial: bool = False,
        narrow: bool = False,
        follow_index: bool = False,
    ) -> None:
        """Fill every parameter and persistent buffer of ``model`` from the checkpoint at ``path``.

        The model may be unsharded, or hold DTensors of any mesh and placement (FSDP2, TP, a PP stage). FP8 tensors are
        dequantized to the parameter's dtype (bfloat16, float16 or float32). Other tensors are cast to the parameter's
        dtype if it holds every value of the stored one. Names are translated by ``model.state_dict_adapter`` if there
        is one, otherwise by transformers' conversions or the prefixes found in the file. Tied weights end up tied, and
        non-persistent buffers of a transformers model, which ``to_empty`` leaves undefined, get their values back.

        ``partial``: the model is only a part of the checkpoint (a PP stage, the text model of a VLM). Without it, a
        checkpoint tensor that no part of the model takes is an error; a parameter that the checkpoint lacks always is.

        ``narrow``: tensors that are not FP8 may be rounded to a dtype that holds fewer values than the stored one, such
        as float32 to bfloat16; a warning names them. Without it, such a tensor is an error.

        ``follow_index``: ignore tensors that the index does not list (a sidecar of an MTP layer).

        Raises `ModelMismatchError` on every rank if any rank finds a mismatch, before any data is read; and the
        `Fp8CheckpointError` of a defective checkpoint.

        >>> model = fp8ckpt.load_pretrained("sample-fp8")
        >>> _ = model.lm_head.weight.data.zero_()
        >>> fp8ckpt.load_model(model, "sample-fp8")
        >>> bool(model.lm_head.weight.any())
        True
        """
        ranks = self._ranks()
        plan = ranks.together(lambda: LoadPlan(unwrapped(model), path, partial, narrow, follow_index))
        plan.log()
        reader = FP8StorageReader(plan.checkpoint)
        self._load(dict(plan.named), plan.parts, reader)
        if any(ranks.gather(lambda: len(plan.twice))):
            tensors, parts = ranks.together(plan.second)
            self._load(tensors, parts, reader)
            ranks.together(lambda: plan.compare(tensors))
        ranks.together(plan.finish)

    def save_model(
        self,
        model: nn.Module,
        path: str | Path,
        *,
        to: str | torch.dtype = "bf16",
        like: CheckpointLike | None = None,
        scales: str = "reuse",
        report: bool = True,
        carry: str | None = None,
        max_file_bytes: int | None = None,
        base: CheckpointLike | None = None,
    ) -> ConvertResult:
        """Write ``model`` to the new directory ``path`` as final Hugging Face files; each byte is written once.

        Every rank writes its own shards into the same files. Names and stackings are translated as in `load_model`.
        ``to``: the dtype of every floating-point tensor, "bf16", "fp16" or "fp32", or torch's; or "fp8". ``like``: the
        base, the checkpoint that the model came from. It decides names, files, the dtype of tensors that it does not
        hold as FP8, configuration and side files: the output equals what ``convert(like, ..., to=to)`` would write with
        the model's values. Without it, names are the model's own, a file ends at ``max_file_bytes`` (default: 5 GB),
        and the configuration is ``model.config``; tensors that both the model and its class keep in float32 stay so,
        and a warning and the result's notes name the others that are rounded. ``base`` is the former name of ``like``.

        Tensors that the model has no place for are carried from the base, and the log lists them: the layers that
        predict further tokens (MTP), what the model's class declares to ignore, and names that match the regular
        expression ``carry``.

        ``to`` "fp8": the output has the base's layout, and equals byte for byte, on any mesh, what ``convert(...,
        to="fp8", like=base)`` makes of the same values; each shard is quantized as it is written. ``like`` must be
        given. ``scales`` "reuse" keeps the scale of a block whose values still fit it (`fp8ckpt.numerics.scaling` has
        the rule), "fresh" makes all anew. ``report``: report what training changed; without it the base's codes are not
        read.

        Returns the result of the save, the same on every rank; for "fp8" an `Fp8Result`, with the report that
        ``convert`` makes.

        Raises `OutputExistsError` if the path exists, `ModelMismatchError` if model and base do not hold the same
        tensors, `RangeError` for finite values that the stored dtype cannot hold, and `StorageError` if the disk fails;
        for "fp8" also the errors of `FP8StorageWriter`; all on every rank. The directory appears only once it is
        complete and on disk.

        >>> model = fp8ckpt.load_pretrained("sample-fp8")
        >>> result = fp8ckpt.save_model(model, "saved-fp8", to="fp8", like="sample-fp8")
        >>> result.report.total.moved, fp8ckpt.verify("sample-fp8", "saved-fp8").ok
        (0, True)
        """
        like, asked = given_like(like, base), to

        def prepare() -> tuple[DirectoryWriter, SavePlan, str]:
            to = target_of(asked)
            _refuse_arguments(to, like, scales, carry, max_file_bytes)
            checkpoint = None if like is None else open_checkpoint(like)
            own = unwrapped(model)
            plan = plan_save(own, checkpoint, carry)
            how: dict[str, Any] = {"like": checkpoint, "carry": plan.carry, "process_group": self._group}
            if to == FP8:
                return FP8StorageWriter(path, scales=scales, report=report, **how), plan, to
            if checkpoint is None:
                how["side_files"] = SideFiles(_configuration_of(own, TARGETS[to]))
                how["keep"] = plan.scales.union(_kept(own, plan.state, torch_dtype(TARGETS[to])))
            return SafetensorsStorageWriter(path, dtype=to, max_file_bytes=max_file_bytes, **how), plan, to

        begun, ranks = time.monotonic(), self._ranks()
        writer, plan, to = ranks.together(prepare)
        ranks.together(plan.refuse_trained_apart)
        try:
            with _named_errors():
                dcp_save(plan.state, storage_writer=writer, planner=plan.planner, **self._how())
        finally:
            writer.release()
        done = ranks.gather(lambda: writer.result(to, time.monotonic() - begun))
        return writer.reported(next(result for result in done if result is not None))

    def _load(self, tensors: dict[str, torch.Tensor], parts: list[Part], reader: FP8StorageReader) -> None:
        with _named_errors():
            dcp_load(tensors, storage_reader=reader, planner=AssemblyLoadPlanner(parts), **self._how())

    def _how(self) -> dict[str, Any]:
        """The arguments that give DCP the process group, or tell it that there is none."""
        return {"process_group": self._group, "no_dist": not has_group()}

    def _ranks(self) -> Ranks:
        return ranks_of_group(self._group)


#: For the default process group, or a single process.
load_model = Checkpointer().load_model
save_model = Checkpointer().save_model


def _refuse_arguments(
    to: str, like: CheckpointLike | None, scales: str, carry: str | None, max_file_bytes: int | None
) -> None:
    refuse_other("scales", scales, SCALES)
    if carry is not None and like is None:
        raise ValueError("carry goes with like, the checkpoint that is taken from")
    if like is not None and max_file_bytes is not None:
        raise ValueError("max_file_bytes goes without like, which decides the files")
    if to == FP8 and like is None:
        raise ValueError(
            "to='fp8' needs like, the FP8 checkpoint that the model came from; "
            "without one, save in bf16 and convert --scheme"
        )
    if to != FP8 and scales != "reuse":
        raise ValueError(f"scales goes with to='fp8', and not with to={to!r}")


@contextmanager
def _named_errors() -> Iterator[None]:
    """Raise the named error that a rank met, which DCP wraps and raises on every rank. Errors that are not wrapped come
    from DCP's collectives. DCP's warning that a single process has no group is suppressed.
    """
    try:
        with warnings.catch_warnings(), lost_ranks_named() if has_group() else nullcontext():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, Fp8CheckpointError):
                raise cause from error
        raise


def _kept(model: nn.Module, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[str]:
    """The tensors that stay in float32 whatever the target: the model holds them so, and transformers loads them so, by
    its patterns or because the class makes them so.
    """
    held = [name for name, tensor in state.items() if tensor.dtype == torch.float32]
    if not held or not is_pretrained(model):
        return []
    kept = {*kept_in_float32(model, dtype, held)}
    if (known := known_model(json.loads(_configuration_of(model, "F32")[CONFIG]))) is not None:
        kept |= {name for name, made in known.model.state_dict().items() if made.dtype == torch.float32}
    return [name for name in held if name in kept]


def _configuration_of(model: Any, dtype: str) -> dict[str, bytes]:
    """Return the configuration files of a transformers model; none for any other model. A model that was made from a
    configuration, not loaded, gets the ``architectures`` that transformers would write.
    """
    files: dict[str, bytes] = {}
    for attribute, name in (("config", CONFIG), ("generation_config", "generation_config.json")):
        held: Any = getattr(model, attribute, None)
        if hasattr(held, "to_json_string"):
            text = json.loads(held.to_json_string())
            if name == CONFIG and is_pretrained(model) and not text.get("architectures"):
                text["architectures"] = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 puts that before it
            files[name] = dump_json(without_quantization(CONFIG, text, dtype) if name == CONFIG else text)
    return files

"""Load a checkpoint into a model, in place, whatever its sharding; and save a model as a checkpoint.

Loading is three verbs: names (`model.state_dict_adapter`, or the layout found in the file), ``dcp.load`` with
`FP8StorageReader`, and nothing else: every byte goes from the file through a table into the parameter. It is strict: a
tensor that is missing on either side is an error that names it.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from fp8ckpt.checkpoint.buffers import restore_buffers
from fp8ckpt.checkpoint.directory_writer import DirectoryWriter
from fp8ckpt.checkpoint.fp8_storage_writer import FP8StorageWriter
from fp8ckpt.checkpoint.regions import BEYOND, rounds
from fp8ckpt.checkpoint.storage_reader import FP8StorageReader
from fp8ckpt.checkpoint.storage_writer import DEFAULT_FILE_BYTES, SafetensorsStorageWriter, SideFiles
from fp8ckpt.errors import Fp8CheckpointError, ModelMismatchError, shown
from fp8ckpt.families.names import IDENTITY, find_layout
from fp8ckpt.numerics.codes import FP8, SCALES, TARGETS
from fp8ckpt.output.side_files import plain_side_files
from fp8ckpt.ranks import Ranks, ranks_of_group
from fp8ckpt.tensors.checkpoint import Checkpoint, open_checkpoint
from fp8ckpt.tensors.config import CONFIG, dump_json, without_quantization
from fp8ckpt.tensors.header import TensorSpan
from fp8ckpt.tensors.pairing import QuantizedTensor
from fp8ckpt.tensors.reading import torch_dtype

logger = logging.getLogger(__name__)

_MOST_NAMES = 10  # in one message


class Checkpointer:
    """Loads and saves models through torch's distributed checkpoint.

    ``process_group``: the ranks that hold the model together; by default all. All of them must make each call.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        self._group = process_group

    def load_model(
        self,
        model: nn.Module,
        path: str | Path | Checkpoint,
        *,
        partial: bool = False,
        narrow: bool = False,
        follow_index: bool = False,
    ) -> None:
        """Fill every parameter and persistent buffer of ``model`` from the checkpoint at ``path``.

        The model may be unsharded, or a mix of DTensors of any mesh and placement (FSDP2, TP, a PP stage). FP8 tensors
        are dequantized to the parameter's own dtype (bfloat16, float16 or float32), others are cast to it where it
        differs and can hold every value of the stored one. Names go through ``model.state_dict_adapter`` if there is
        one, otherwise through the layout found in the file. Tied weights end up tied, and a transformers model's
        non-persistent buffers, which ``to_empty`` leaves undefined, get their values back.

        ``partial``: the model is only a part of what is in the checkpoint (a PP stage, the text model of a VLM).
        Without it, a checkpoint tensor that no part of the model takes is an error; a parameter that the checkpoint
        lacks always is.

        ``narrow``: tensors that are not FP8 may be rounded to a dtype that holds fewer values than the stored one, such
        as float32 to bfloat16; a warning names them. Without it, that is an error.

        ``follow_index``: what the index does not list is no part of the checkpoint (a sidecar of an MTP layer).

        Raises `ModelMismatchError` on every rank where any rank finds one, before any data is read; and the
        checkpoint's own `Fp8CheckpointError`.
        """
        ranks = self._ranks()
        plan = ranks.together(lambda: _LoadPlan(model, path, partial, narrow, follow_index))
        plan.log()
        reader = FP8StorageReader(plan.checkpoint)
        self._load(plan.targets, reader)
        if any(ranks.gather(lambda: len(plan.twice))):
            second = ranks.together(lambda: {name: torch.empty_like(plan.named[name]) for name in plan.twice})
            self._load(second, reader)
            ranks.together(lambda: plan.compare(second))
        ranks.together(plan.finish)

    def save_model(
        self,
        model: nn.Module,
        path: str | Path,
        *,
        to: str = "bf16",
        base: str | Path | Checkpoint | None = None,
        scales: str = "reuse",
        max_file_bytes: int = DEFAULT_FILE_BYTES,
    ) -> None:
        """Write ``model`` to the new directory ``path`` as final Hugging Face files, each byte once.

        Every rank writes its own shards into the same files. Names go through ``model.state_dict_adapter`` if there is
        one. ``to``: the dtype of every floating-point tensor, "bf16", "fp16" or "fp32". ``base``: the checkpoint that
        the model came from: it decides names, files, the dtype of tensors that it does not hold as FP8, configuration
        and side files. Without it, names are the model's own, files end at ``max_file_bytes``, and the configuration is
        ``model.config``.

        ``to`` "fp8": the base's own layout, byte for byte what ``convert(..., to="fp8", like=base)`` makes of the same
        values, on any mesh; each shard is quantized as it is written. ``base`` must be given. ``scales`` "reuse" keeps
        the scale of a block whose values still fit it (`fp8ckpt.numerics.quantize` has the rule), "fresh" makes all
        anew.

        Raises `OutputExistsError` where the path exists, `ModelMismatchError` where model and base do not hold the same
        tensors, and `StorageError` where the disk refuses; for "fp8" what `FP8StorageWriter` raises. Each is raised on
        every rank. The directory is not seen until it is whole and on disk.
        """

        def prepare() -> tuple[DirectoryWriter, dict[str, torch.Tensor]]:
            _refuse_arguments(to, base, scales)
            checkpoint = open_checkpoint(base) if isinstance(base, str | Path) else base
            writer: DirectoryWriter
            if to == FP8:
                assert checkpoint is not None  # _refuse_arguments() saw to it
                writer = FP8StorageWriter(path, base=checkpoint, scales=scales, process_group=self._group)
            else:
                dtype = TARGETS[to]
                texts, copies = (
                    plain_side_files(checkpoint, dtype)
                    if checkpoint is not None
                    else (_configuration_of(model, dtype), {})
                )
                side_files = SideFiles(texts, copies)
                writer = SafetensorsStorageWriter(
                    path, dtype=dtype, base=checkpoint, side_files=side_files, max_file_bytes=max_file_bytes
                )
            return writer, _state_to_save(model, checkpoint)

        writer, state = self._ranks().together(prepare)
        try:
            with _named_errors():
                dcp_save(state, storage_writer=writer, process_group=self._group, no_dist=_alone())
        finally:
            writer.release()

    def _load(self, targets: dict[str, torch.Tensor], reader: FP8StorageReader) -> None:
        with _named_errors():
            dcp_load(targets, storage_reader=reader, process_group=self._group, no_dist=_alone())

    def _ranks(self) -> Ranks:
        return ranks_of_group(self._group)


def load_model(
    model: nn.Module,
    path: str | Path | Checkpoint,
    *,
    partial: bool = False,
    narrow: bool = False,
    follow_index: bool = False,
) -> None:
    """Fill ``model`` in place from an FP8 (or any other) checkpoint: see `Checkpointer.load_model`."""
    Checkpointer().load_model(model, path, partial=partial, narrow=narrow, follow_index=follow_index)


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    to: str = "bf16",
    base: str | Path | Checkpoint | None = None,
    scales: str = "reuse",
    max_file_bytes: int = DEFAULT_FILE_BYTES,
) -> None:
    """Write ``model`` as final Hugging Face files, in bf16, fp16, fp32, or as FP8 in its base's layout: see
    `Checkpointer.save_model`.
    """
    Checkpointer().save_model(model, path, to=to, base=base, scales=scales, max_file_bytes=max_file_bytes)


def _refuse_arguments(to: str, base: str | Path | Checkpoint | None, scales: str) -> None:
    if to not in (*TARGETS, FP8):
        raise ValueError(f"to={to!r}; expected one of {', '.join((*TARGETS, FP8))}")
    if scales not in SCALES:
        raise ValueError(f"scales={scales!r}; expected one of {', '.join(SCALES)}")
    if to == FP8 and base is None:
        raise ValueError(
            "to='fp8' needs base, the FP8 checkpoint that the model came from; "
            "without one, save in bf16 and convert --scheme"
        )
    if to != FP8 and scales != "reuse":
        raise ValueError(f"scales goes with to='fp8', and not with to={to!r}")


@contextmanager
def _named_errors() -> Iterator[None]:
    """DCP wraps what a rank raises, and tells every rank; take the named error out again.

    It also warns that a single process is alone, which the caller of a single process knows.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, Fp8CheckpointError):
                raise cause from error
        raise


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def _state_to_save(model: nn.Module, base: Checkpoint | None) -> dict[str, torch.Tensor]:
    """The tensors by their HF names; of those that are tied, the ones that the base has, or else the first."""
    native = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    adapter = getattr(model, "state_dict_adapter", None)
    layout = find_layout(native, base.tensors) if base is not None else IDENTITY
    pairs: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in native.items():
        if adapter is not None:
            pairs[name] = adapter.convert_single_tensor_to_hf(name, tensor, quantization=False)
        else:
            pairs[name] = [(layout.native_to_hf(name), tensor)]
    for group in _tied_groups(model):
        present = [name for name in group if name in pairs]
        kept = [
            name for name in present if base is not None and all(hf in base.tensors for hf, _ in pairs[name])
        ] or present[:1]
        for name in present:
            if name not in kept:
                del pairs[name]
    return {name: tensor for converted in pairs.values() for name, tensor in converted}


def _configuration_of(model: Any, dtype: str) -> dict[str, bytes]:
    """The configuration files of a transformers model; nothing for any other."""
    files: dict[str, bytes] = {}
    for attribute, name in (("config", CONFIG), ("generation_config", "generation_config.json")):
        held: Any = getattr(model, attribute, None)
        if hasattr(held, "to_json_string"):
            text = json.loads(held.to_json_string())
            files[name] = dump_json(without_quantization(CONFIG, text, dtype) if name == CONFIG else text)
    return files


class _LoadPlan:
    """What goes where, checked before the first byte is read."""

    def __init__(
        self, model: nn.Module, path: str | Path | Checkpoint, partial: bool, narrow: bool, follow_index: bool
    ) -> None:
        self.model = model
        self.checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path, follow_index=follow_index)
        self.adapter = getattr(model, "state_dict_adapter", None)
        _tie(model)
        native = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
        on_meta = [name for name, tensor in native.items() if tensor.is_meta]
        if on_meta:
            raise ModelMismatchError(
                f"{len(on_meta)} tensors are on the meta device: {_listed(on_meta)}",
                remedy="materialize the model first: model.to_empty(device=...)",
            )
        if self.adapter is not None:
            named = dict(self.adapter.to_hf(native))
        else:
            layout = find_layout(native, self.checkpoint.tensors)
            named = {layout.native_to_hf(name): tensor for name, tensor in native.items()}
        self.native, self.named = native, named
        self._sources, self.twice = self._find_sources()
        self._refuse_mismatches(partial)
        if not narrow:
            self._refuse_rounding()
        self.targets = {
            name: tensor for name, tensor in named.items() if self._sources[name] == name and name not in self.twice
        }

    def _find_sources(self) -> tuple[dict[str, str], dict[str, str]]:
        """For each HF name of the model the name on disk that fills it, if any: its own, or that of a tensor it is tied
        to.

        Also the tied tensors that are on disk twice, each with the one that is loaded: they must be the same.
        """
        stored = self.checkpoint.tensors
        hf_name = {id(tensor): name for name, tensor in self.named.items()}
        sources = {name: name for name in self.named if name in stored}
        twice: dict[str, str] = {}
        for group in _tied_groups(self.model):
            names = [
                hf_name[id(self.native[name])]
                for name in group
                if name in self.native and id(self.native[name]) in hf_name
            ]
            present = [name for name in names if name in stored]
            if present:
                sources.update((name, present[0]) for name in names if name not in stored)
                twice.update((name, present[0]) for name in present[1:])
        return sources, twice

    def _refuse_mismatches(self, partial: bool) -> None:
        stored, where = self.checkpoint.tensors, self.checkpoint.path
        missing = [name for name in self.named if name not in self._sources]
        if missing:
            remedy = "load another checkpoint, or give the model a state_dict_adapter that knows its names"
            raise ModelMismatchError(
                f"{len(missing)} tensors of the model are not in it: {_listed(missing)}", file=where, remedy=remedy
            )
        unused = [name for name in stored if name not in self.named]
        if unused and not partial:
            remedy = "if the model is meant to be only a part of it, say partial=True"
            raise ModelMismatchError(
                f"{len(unused)} of its tensors are not in the model: {_listed(unused)}", file=where, remedy=remedy
            )
        for name, tensor in self.named.items():
            expected = stored[self._sources[name]].shape
            if tuple(tensor.shape) != tuple(expected):
                raise ModelMismatchError(
                    f"shape {tuple(tensor.shape)} in the model", tensor=name, file=where, expected=f"{tuple(expected)}"
                )

    def _refuse_rounding(self) -> None:
        """What is stored as plain values must not lose any of them in passing."""
        for name, tensor in self.named.items():
            source = self.checkpoint.tensors[self._sources[name]]
            if isinstance(source, TensorSpan) and rounds(torch_dtype(source.dtype), tensor.dtype):
                raise ModelMismatchError(
                    f"{source.dtype} on disk, and {tensor.dtype} in the model",
                    tensor=source.name,
                    file=source.file,
                    expected="a dtype that holds every value of the stored one",
                    remedy="keep this parameter in the stored dtype, or say narrow=True to have it rounded",
                )

    def log(self) -> None:
        """The pre-flight line: what this rank will hold, what it will read, and what that takes beyond it."""
        held = sum(_local(tensor).nbytes for tensor in self.named.values())
        read = 0
        for name, tensor in self.targets.items():
            source = self.checkpoint.tensors[name]
            span = source.weight if isinstance(source, QuantizedTensor) else source
            read += span.nbytes * _local(tensor).numel() // max(1, span.numel)
        logger.info(
            "loading %s: this rank holds %d bytes, reads %d bytes of the source, "
            "and takes at most %d MiB beyond the model",
            self.checkpoint.path,
            held,
            read,
            BEYOND >> 20,
        )

    def compare(self, second: Mapping[str, torch.Tensor]) -> None:
        """Tied tensors that are on disk twice must be equal there."""
        for name, tensor in second.items():
            loaded = _local(self.named[self.twice[name]]), _local(tensor)
            if not torch.equal(*(part.contiguous().view(torch.uint8) for part in loaded)):
                found = f"the model ties it to {shown(self.twice[name])}, and on disk they differ"
                raise ModelMismatchError(
                    found,
                    tensor=name,
                    file=self.checkpoint.path,
                    remedy="set tie_word_embeddings to false in the configuration",
                )

    def finish(self) -> None:
        """Tied names, names that an adapter made new tensors of, and buffers that no checkpoint holds."""
        with torch.no_grad():
            for name, source in self._sources.items():
                if name != source:  # a copy onto itself, where the two are one tensor
                    self.named[name].copy_(self.named[source])
            if self.adapter is not None:
                for name, tensor in self.adapter.from_hf(dict(self.named)).items():
                    if name in self.native and tensor is not self.native[name]:
                        self.native[name].copy_(tensor)
        _tie(self.model)
        restore_buffers(self.model)


def _tied_by_configuration(model: nn.Module) -> dict[str, str]:
    """The parameters that a transformers model ties, {target: source}; empty for any other."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _tied_groups(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one, or that the configuration says should be; the source first."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [[source, target] for target, source in _tied_by_configuration(model).items()] + [
        group for group in groups.values() if len(group) > 1
    ]


def _tie(model: Any) -> None:
    """Make one parameter of what the configuration ties and `to_empty` has taken apart.

    Sharded parameters stay as the caller's parallelization made them: there it decides what is shared.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in _tied_by_configuration(model).items():
        a, b = parameters.get(target), parameters.get(source)
        if a is not None and b is not None and a is not b and not isinstance(a, DTensor) and not isinstance(b, DTensor):
            model.tie_weights()
            return


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(shown(name) for name in names[:_MOST_NAMES]) + more

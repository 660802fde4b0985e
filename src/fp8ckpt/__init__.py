"""Take an FP8-released model into BF16 training and back to FP8, losslessly.

This module holds the public names only. Each resolves on first use: ``import fp8ckpt`` imports neither torch nor numpy.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fp8ckpt.version import __version__

if TYPE_CHECKING:
    from fp8ckpt.checkpoint.checkpointing import Checkpointer, load_model, save_model
    from fp8ckpt.checkpoint.fp8_storage_writer import FP8StorageWriter
    from fp8ckpt.checkpoint.pretrained import load_pretrained
    from fp8ckpt.checkpoint.state_dict_adapter import StateDictAdapter
    from fp8ckpt.checkpoint.storage_reader import FP8StorageReader
    from fp8ckpt.checkpoint.storage_writer import SafetensorsStorageWriter
    from fp8ckpt.convert import convert, plan_convert
    from fp8ckpt.encodings.results import ConvertResult, Fp8Result, PlainResult
    from fp8ckpt.errors import Fp8CheckpointError
    from fp8ckpt.inspect import Inspection, inspect
    from fp8ckpt.merge import MergeResult, merge, plan_merge
    from fp8ckpt.output.forecast import Forecast
    from fp8ckpt.plan import Plan, plan
    from fp8ckpt.report import Report, report
    from fp8ckpt.sample import plan_sample, sample
    from fp8ckpt.tensors.assembly import Assembly, Piece
    from fp8ckpt.tensors.checkpoint import Checkpoint, open_checkpoint
    from fp8ckpt.tensors.scaled import QuantizedTensor
    from fp8ckpt.tensors.stored import TensorSpan
    from fp8ckpt.verify import VerifyResult, verify

_NAMES = {  # by module
    "checkpoint.checkpointing": "Checkpointer load_model save_model",
    "checkpoint.fp8_storage_writer": "FP8StorageWriter",
    "checkpoint.pretrained": "load_pretrained",
    "checkpoint.state_dict_adapter": "StateDictAdapter",
    "checkpoint.storage_reader": "FP8StorageReader",
    "checkpoint.storage_writer": "SafetensorsStorageWriter",
    "convert": "convert plan_convert",
    "encodings.results": "ConvertResult Fp8Result PlainResult",
    "errors": "Fp8CheckpointError",
    "inspect": "Inspection inspect",
    "merge": "MergeResult merge plan_merge",
    "output.forecast": "Forecast",
    "plan": "Plan plan",
    "report": "Report report",
    "sample": "plan_sample sample",
    "tensors.assembly": "Assembly Piece",
    "tensors.checkpoint": "Checkpoint open_checkpoint",
    "tensors.scaled": "QuantizedTensor",
    "tensors.stored": "TensorSpan",
    "verify": "VerifyResult verify",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "Assembly", "Checkpoint", "Checkpointer", "ConvertResult", "FP8StorageReader", "FP8StorageWriter", "Forecast",
    "Fp8CheckpointError", "Fp8Result", "Inspection", "MergeResult", "Piece", "PlainResult", "Plan",
    "QuantizedTensor", "Report", "SafetensorsStorageWriter", "StateDictAdapter", "TensorSpan", "VerifyResult",
    "__version__", "convert", "inspect", "load_model", "load_pretrained", "merge", "open_checkpoint", "plan",
    "plan_convert", "plan_merge", "plan_sample", "report", "sample", "save_model", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fp8ckpt' has no attribute {name!r}")
    value = getattr(import_module(f"fp8ckpt.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """A module that keeps ``fp8ckpt.convert`` the function after the submodule of the same name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

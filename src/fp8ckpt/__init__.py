"""Take an FP8-released model into BF16 training and back to FP8, losslessly.

The public names, and nothing else. ``import fp8ckpt`` imports neither torch nor numba; the names that are made of torch
classes are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fp8ckpt.convert import ConvertResult, convert
from fp8ckpt.errors import Fp8CheckpointError
from fp8ckpt.inspect import Inspection, inspect
from fp8ckpt.sample import sample
from fp8ckpt.tensors.checkpoint import Checkpoint, open_checkpoint
from fp8ckpt.tensors.header import TensorSpan
from fp8ckpt.tensors.pairing import QuantizedTensor
from fp8ckpt.verify import VerifyResult, verify

if TYPE_CHECKING:
    from fp8ckpt.checkpoint.checkpointing import Checkpointer, load_model, save_model
    from fp8ckpt.checkpoint.fp8_storage_writer import FP8StorageWriter
    from fp8ckpt.checkpoint.pretrained import load_pretrained
    from fp8ckpt.checkpoint.state_dict_adapter import StateDictAdapter
    from fp8ckpt.checkpoint.storage_reader import FP8StorageReader
    from fp8ckpt.checkpoint.storage_writer import SafetensorsStorageWriter

_ON_FIRST_USE = {
    "Checkpointer": "checkpoint.checkpointing",
    "FP8StorageReader": "checkpoint.storage_reader",
    "FP8StorageWriter": "checkpoint.fp8_storage_writer",
    "SafetensorsStorageWriter": "checkpoint.storage_writer",
    "StateDictAdapter": "checkpoint.state_dict_adapter",
    "load_model": "checkpoint.checkpointing",
    "load_pretrained": "checkpoint.pretrained",
    "save_model": "checkpoint.checkpointing",
}

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "ConvertResult",
    "FP8StorageReader",
    "FP8StorageWriter",
    "Fp8CheckpointError",
    "Inspection",
    "QuantizedTensor",
    "SafetensorsStorageWriter",
    "StateDictAdapter",
    "TensorSpan",
    "VerifyResult",
    "convert",
    "inspect",
    "load_model",
    "load_pretrained",
    "open_checkpoint",
    "sample",
    "save_model",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(f"fp8ckpt.{_ON_FIRST_USE[name]}"), name)
    raise AttributeError(f"module 'fp8ckpt' has no attribute {name!r}")

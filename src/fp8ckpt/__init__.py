"""Take an FP8-released model into BF16 training and back to FP8, losslessly.

The public names, and nothing else. Importing them imports neither torch nor numba.
"""

from fp8ckpt.convert import ConvertResult, convert
from fp8ckpt.errors import Fp8CheckpointError
from fp8ckpt.inspect import Inspection, inspect
from fp8ckpt.sample import sample
from fp8ckpt.storage.checkpoint import Checkpoint, open_checkpoint
from fp8ckpt.storage.header import TensorSpan
from fp8ckpt.storage.pairing import QuantizedTensor
from fp8ckpt.verify import VerifyResult, verify

__all__ = [
    "Checkpoint",
    "ConvertResult",
    "Fp8CheckpointError",
    "Inspection",
    "QuantizedTensor",
    "TensorSpan",
    "VerifyResult",
    "convert",
    "inspect",
    "open_checkpoint",
    "sample",
    "verify",
]

"""The tree of errors: every refusal has a name::

    Fp8CheckpointError
    ├── CheckpointNotFoundError   (FileNotFoundError)  no such directory, file or cached hub id
    ├── HeaderError               (ValueError)  a safetensors header that is malformed or wrong
    │   └── TruncatedFileError                  the file holds fewer bytes than its header says
    ├── IndexMismatchError        (ValueError)  the index and the headers disagree
    ├── ConfigError               (ValueError)  config.json cannot be understood
    ├── MissingScaleError         (ValueError)  an FP8 weight without a scale
    ├── OrphanScaleError          (ValueError)  a scale without an FP8 weight
    ├── AmbiguousScaleError       (ValueError)  two scales for one weight
    ├── ScaleShapeError           (ValueError)  a scale that does not tile its weight
    ├── ScaleDtypeError           (ValueError)  a scale of a dtype that no FP8 family uses
    ├── ScaleValueError           (ValueError)  a scale that is NaN, infinite, zero or negative
    ├── WeightValueError          (ValueError)  a weight that is not finite, so it cannot be quantized
    ├── UnsupportedFormatError    (ValueError)  packed or integer weights: recognised, not handled
    ├── UnknownTensorError        (KeyError)    no tensor of that name
    ├── RegionError               (IndexError)  offsets and sizes outside the tensor
    ├── RangeError                (OverflowError)  finite codes that the target dtype cannot hold
    ├── ModelMismatchError        (ValueError)  the model and the checkpoint do not hold the same tensors
    ├── ServingError              (ValueError)  a serving engine would refuse the directory, or serve something else
    ├── OutputExistsError         (FileExistsError)  the destination exists
    ├── OutputBusyError           (RuntimeError)  another process is writing the destination
    ├── RankLostError             (RuntimeError)  another rank ended, or did not answer
    ├── RanksDifferError          (ValueError)  ranks of one load or save got different arguments or files
    ├── ResumeMismatchError       (RuntimeError)  the partial output is another conversion's
    ├── UnsupportedSystemError    (ImportError) Windows, or another system without POSIX file semantics
    ├── MissingPackageError       (ImportError) a package that only an extra installs is missing
    ├── SourceChangedError        (RuntimeError)  a file changed while it was read
    ├── UnsupportedStoreError     (ValueError)  the URL of a store that cannot be read or written
    └── StorageError              (OSError)     a read or a write failed, or a name is not that of a regular file
        └── NoRoomError                         the disk has less space than the output needs

Each message has the form *tensor, file, found, expected, what to do*, on one line. Names that come from a file are
shown with control characters escaped and shortened, so that no input can break the line.
"""

from fp8ckpt.errors.base import Fp8CheckpointError, listed, shown, some
from fp8ckpt.errors.files import (
    CheckpointNotFoundError,
    ConfigError,
    HeaderError,
    IndexMismatchError,
    SourceChangedError,
    TruncatedFileError,
)
from fp8ckpt.errors.formats import UnsupportedFormatError
from fp8ckpt.errors.models import ModelMismatchError
from fp8ckpt.errors.outputs import (
    OutputBusyError,
    OutputExistsError,
    RankLostError,
    RanksDifferError,
    ResumeMismatchError,
)
from fp8ckpt.errors.scales import (
    AmbiguousScaleError,
    MissingScaleError,
    OrphanScaleError,
    ScaleDtypeError,
    ScaleShapeError,
    ScaleValueError,
)
from fp8ckpt.errors.serving import ServingError
from fp8ckpt.errors.stores import NoRoomError, StorageError, UnsupportedStoreError
from fp8ckpt.errors.system import MissingPackageError, UnsupportedSystemError
from fp8ckpt.errors.values import RangeError, RegionError, UnknownTensorError, WeightValueError

__all__ = [
    "AmbiguousScaleError", "CheckpointNotFoundError", "ConfigError", "Fp8CheckpointError",
    "HeaderError", "IndexMismatchError", "MissingPackageError", "MissingScaleError", "ModelMismatchError",
    "NoRoomError", "OrphanScaleError", "OutputBusyError", "OutputExistsError", "RangeError", "RankLostError",
    "RanksDifferError", "RegionError", "ResumeMismatchError", "ScaleDtypeError", "ScaleShapeError",
    "ScaleValueError", "ServingError", "SourceChangedError", "StorageError", "TruncatedFileError",
    "UnknownTensorError", "UnsupportedFormatError", "UnsupportedStoreError", "UnsupportedSystemError",
    "WeightValueError", "listed", "shown", "some",
]  # fmt: skip

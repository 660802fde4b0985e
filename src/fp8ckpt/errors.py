"""Every refusal has a name.

    Fp8CheckpointError
    ├── CheckpointNotFoundError   (FileNotFoundError)  no such directory, file or cached hub id
    ├── HeaderError               (ValueError)  a safetensors header that is malformed or lies
    │   └── TruncatedFileError                  the file holds fewer bytes than its header says
    ├── IndexMismatchError        (ValueError)  the index and the headers disagree
    ├── ConfigError               (ValueError)  config.json cannot be understood
    ├── MissingScaleError         (ValueError)  an FP8 weight without a scale
    ├── OrphanScaleError          (ValueError)  a scale without an FP8 weight
    ├── AmbiguousScaleError       (ValueError)  two scales for one weight
    ├── ScaleShapeError           (ValueError)  a scale that does not tile its weight
    ├── ScaleDtypeError           (ValueError)  a scale of a dtype that no FP8 family uses
    ├── ScaleValueError           (ValueError)  a scale that is NaN, infinite, zero or negative
    ├── WeightValueError          (ValueError)  a weight that cannot be quantized: it is not finite
    ├── UnsupportedFormatError    (ValueError)  FP4, packed or integer weights: recognised, not handled
    ├── UnknownTensorError        (KeyError)    no tensor of that name
    ├── RegionError               (IndexError)  offsets and sizes outside the tensor
    ├── RangeError                (OverflowError)  finite codes that the target dtype cannot hold
    ├── ModelMismatchError        (ValueError)  the model and the checkpoint do not hold the same tensors
    ├── ServingError              (ValueError)  a serving engine would refuse the directory, or serve something else
    ├── OutputExistsError         (FileExistsError)  the destination is there already
    ├── OutputBusyError           (RuntimeError)  another process is writing the destination
    ├── ResumeMismatchError       (RuntimeError)  a partial output of some other conversion
    └── StorageError              (OSError)     the disk refused a read or a write

Each message has the form *tensor, file, found, expected, what to do*, on one line. Names that come from a file are
shown with control characters escaped and shortened, so that no input can break the line.
"""

from __future__ import annotations

_LONGEST_NAME = 200  # characters; a header may hold names of megabytes


def shown(text: object) -> str:
    """``text`` as it may appear inside a one-line message."""
    clean = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)[: _LONGEST_NAME + 1]
    )
    return clean if len(clean) <= _LONGEST_NAME else clean[:_LONGEST_NAME] + "..."


class Fp8CheckpointError(Exception):
    """Base of all errors raised by fp8ckpt.

    Attributes: ``tensor`` and ``file`` (names, or None), ``found``, ``expected``, ``remedy`` (texts, or None).
    """

    def __init__(
        self,
        found: str,
        *,
        tensor: str | None = None,
        file: object = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.tensor = tensor
        self.file = None if file is None else str(getattr(file, "name", file))
        self.found = found
        self.expected = expected
        self.remedy = remedy
        subject = " in ".join(shown(part) for part in (self.tensor, self.file) if part is not None)
        message = f"{subject}: {found}" if subject else found
        if expected is not None:
            message += f"; expected {expected}"
        if remedy is not None:
            message += f"; {remedy}"
        self.message = message
        super().__init__(message)

    def __str__(self) -> str:  # KeyError would print the repr, OSError its errno
        return self.message

    def __reduce__(self) -> tuple[object, ...]:  # survives the pickling that ranks and processes need
        return _rebuild, (type(self), self.found, self.tensor, self.file, self.expected, self.remedy)


def _rebuild(
    kind: type[Fp8CheckpointError],
    found: str,
    tensor: str | None,
    file: str | None,
    expected: str | None,
    remedy: str | None,
) -> Fp8CheckpointError:
    return kind(found, tensor=tensor, file=file, expected=expected, remedy=remedy)


class CheckpointNotFoundError(Fp8CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path, nor a cached one of that hub id."""


class HeaderError(Fp8CheckpointError, ValueError):
    """A safetensors header is malformed, or claims what cannot be."""


class TruncatedFileError(HeaderError):
    """A file holds fewer bytes than its header describes."""


class IndexMismatchError(Fp8CheckpointError, ValueError):
    """The index and the files' own headers disagree, or the index names a file outside the directory."""


class ConfigError(Fp8CheckpointError, ValueError):
    """``config.json`` (or ``hf_quant_config.json``, ``params.json``) cannot be understood."""


class MissingScaleError(Fp8CheckpointError, ValueError):
    """An FP8 weight has no scale: its codes are not its values."""


class OrphanScaleError(Fp8CheckpointError, ValueError):
    """A scale belongs to no FP8 weight."""


class AmbiguousScaleError(Fp8CheckpointError, ValueError):
    """More than one tensor could be the scale of one weight."""


class ScaleShapeError(Fp8CheckpointError, ValueError):
    """A scale does not tile its weight."""


class ScaleDtypeError(Fp8CheckpointError, ValueError):
    """A scale has a dtype that no FP8 family uses."""


class ScaleValueError(Fp8CheckpointError, ValueError):
    """A scale is NaN, infinite, zero or negative."""


class WeightValueError(Fp8CheckpointError, ValueError):
    """A weight holds NaN or infinity, and has no FP8 code."""


class UnsupportedFormatError(Fp8CheckpointError, ValueError):
    """FP4, packed or integer quantization: recognised, and not handled."""


class UnknownTensorError(Fp8CheckpointError, KeyError):
    """The checkpoint has no tensor of that name."""


class RegionError(Fp8CheckpointError, IndexError):
    """Offsets and sizes reach outside the tensor."""


class RangeError(Fp8CheckpointError, OverflowError):
    """Finite values do not fit the range of the target dtype."""


class ModelMismatchError(Fp8CheckpointError, ValueError):
    """The model lacks tensors of the checkpoint, or the checkpoint lacks tensors of the model, or they are of other
    shapes.
    """


class ServingError(Fp8CheckpointError, ValueError):
    """A serving engine would refuse the directory, or serve something else than what is in it."""


class OutputExistsError(Fp8CheckpointError, FileExistsError):
    """The destination exists, and is never overwritten."""


class OutputBusyError(Fp8CheckpointError, RuntimeError):
    """Another process is writing the same destination."""


class ResumeMismatchError(Fp8CheckpointError, RuntimeError):
    """A partial output is there, and belongs to another conversion."""


class StorageError(Fp8CheckpointError, OSError):
    """The disk refused a read or a write; the operating system's reason is in the message."""

"""What the machine and its packages do not give."""

from __future__ import annotations

from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError


class UnsupportedSystemError(Fp8CheckpointError, ImportError):
    """The operating system does not promise of files what is needed."""

    expected = "Linux or macOS"
    remedy = "on Windows, run it in WSL, the Windows Subsystem for Linux"

    @classmethod
    def of(cls, system: str) -> Self:
        return cls(f"fp8ckpt does not run on {system}")


class MissingPackageError(Fp8CheckpointError, ImportError):
    """A package is needed that only an extra of this one brings."""

    @classmethod
    def of(cls, doing: str, file: object, package: str, install: str) -> Self:
        return cls(f"{doing} needs {package}", file=file, remedy=f"pip install {install}")

"""What the operating system and the installed packages lack."""

from __future__ import annotations

from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError


class UnsupportedSystemError(Fp8CheckpointError, ImportError):
    """The operating system lacks the file semantics that fp8ckpt needs."""

    expected = "Linux or macOS"
    remedy = "on Windows, run it in WSL, the Windows Subsystem for Linux"

    @classmethod
    def of(cls, system: str) -> Self:
        return cls(f"fp8ckpt does not run on {system}")


class MissingPackageError(Fp8CheckpointError, ImportError):
    """A package is missing that only an extra of this one installs."""

    @classmethod
    def of(cls, doing: str, file: object, package: str, install: str) -> Self:
        return cls(f"{doing} needs {package}", file=file, remedy=f"pip install {install}")

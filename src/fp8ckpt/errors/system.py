"""What the operating system and the installed packages lack."""

from __future__ import annotations

from fp8ckpt.errors.base import Fp8CheckpointError, Says


class UnsupportedSystemError(Fp8CheckpointError, ImportError):
    """The operating system lacks the file semantics that fp8ckpt needs."""

    expected = "Linux or macOS"
    remedy = "on Windows, run it in WSL, the Windows Subsystem for Linux"

    of = Says("fp8ckpt does not run on {system}")


class MissingPackageError(Fp8CheckpointError, ImportError):
    """A package is missing that only an extra of this one installs."""

    # fmt: off
    of_report = Says("a report is drawn by matplotlib, which is not installed",
        remedy="install the extra: pip install 'fp8ckpt[report]'")
    of_boto3 = Says("reading s3:// needs boto3", remedy="pip install 'fp8ckpt[s3]'")
    of_client = Says("reading {scheme}:// needs {package}", remedy="pip install {package}")
    # fmt: on

"""The decorator of the compiled loops, and the folder that caches the machine code.

Compiling all loops takes half a minute, so the result is cached: in the first writable folder of the package's, the
user's cache folder and a private temporary one. A container with an arbitrary user id may have none of them, and a disk
may be full: then each process compiles for itself, and nothing else changes.
"""

# mypy: disable-error-code="no-untyped-call,attr-defined"
# (numba ships no type information, and makes its configuration's attributes when it is imported.)

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import config
from numba.core.caching import FunctionCache

from fp8ckpt.collector import collector_paused

_ROOM = 1 << 20  # bytes; a folder that cannot take this much counts as full


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile a function at its first call; it releases the GIL while it runs. ``options`` are numba's own."""

    def decorate(function: Any) -> Any:
        dispatcher = njit(nogil=True, **options)(function)
        if (folder := cache_folder()) is not None:
            given, config.CACHE_DIR = config.CACHE_DIR, folder
            try:
                dispatcher._cache = _Cache(function)
            finally:
                config.CACHE_DIR = given
        return dispatcher

    return decorate


class _Cache(FunctionCache):
    """numba's cache of one function. Missing and damaged files are no errors: the function is compiled."""

    @collector_paused()
    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a damaged file can raise anything that a damaged pickle can
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)


@lru_cache(maxsize=1)
def cache_folder() -> str | None:
    """Return the folder for compiled code, or None if no folder is writable. NUMBA_CACHE_DIR has priority."""
    with suppress(OSError):
        for folder in _folders():
            with suppress(OSError):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if folder == _temporary() and not _is_private(folder):
                    continue
                with tempfile.TemporaryFile(dir=folder) as probe:
                    probe.write(bytes(_ROOM))
                    probe.flush()
                return str(folder)
    return None


def _folders() -> Iterator[Path]:
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR)
    yield Path(__file__).parent / "__pycache__"
    users = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(users))  # noqa: PTH111 - Path's raises without a home
    if home.is_absolute():
        yield home / "fp8ckpt"
    yield _temporary()


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"fp8ckpt-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def _is_private(folder: Path) -> bool:
    """Whether nobody else can put code there for us to run."""
    found = folder.lstat()
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)

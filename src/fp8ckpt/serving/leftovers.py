"""Files that an engine would load instead of the model's own; the index, and the metadata of each file."""

from __future__ import annotations

from collections.abc import Iterator

from fp8ckpt.errors import ServingError
from fp8ckpt.serving.subject import Finding, Subject
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG
from fp8ckpt.tensors.directory import is_native, is_of_another_kind

_LOADED = (".bin", ".pth", ".pt", ".gguf")


def second_copies(subject: Subject) -> Iterator[Finding]:
    """Find other weights, and Mistral's own configuration, beside the files that were read."""
    names = sorted(name for name in subject.checkpoint.store.files() if "/" not in name)
    if any(not is_native(header.file.name) for header in subject.checkpoint.files):
        if second := [name for name in names if is_native(name)]:
            yield ServingError.of_native_weights(file=second[0], names=second)
        if MISTRAL_CONFIG in names:
            yield ServingError.of_native_config(file=MISTRAL_CONFIG, config=CONFIG)
    if others := [name for name in names if name.endswith(_LOADED) and is_of_another_kind(name)]:
        yield ServingError.of_other_weights(file=others[0], names=others)


def index_and_metadata(subject: Subject) -> Iterator[Finding]:
    """Several files need an index, and each file's metadata must say which framework wrote it."""
    checkpoint = subject.checkpoint
    files = [header.file for header in checkpoint.files]
    if len(files) > 1 and checkpoint.index_name is None and not subject.is_native_only:
        yield ServingError.of_no_index(file=files[0], count=len(files))
    unmarked = [header for header in checkpoint.files if header.metadata.get("format") != "pt"]
    if unmarked:
        yield ServingError.of_metadata(file=unmarked[0].file, count=len(unmarked), all=len(files))

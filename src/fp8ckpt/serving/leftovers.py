"""Files that an engine would load instead of the model's own; the index, and the metadata of each file."""

from __future__ import annotations

from collections.abc import Iterator

from fp8ckpt.errors import ServingError
from fp8ckpt.serving.subject import Finding, Subject, some
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG
from fp8ckpt.tensors.directory import is_native, is_of_another_kind

_LOADED = (".bin", ".pth", ".pt", ".gguf")


def second_copies(subject: Subject) -> Iterator[Finding]:
    """Find other weights, and Mistral's own configuration, beside the files that were read."""
    names = sorted(name for name in subject.checkpoint.store.files() if "/" not in name)
    if any(not is_native(header.file.name) for header in subject.checkpoint.files):
        if second := [name for name in names if is_native(name)]:
            found = f"Mistral's own copy of the weights stands beside the others: {some(second)}"
            remedy = "move it away: vLLM serves it instead of the others"
            yield ServingError(found, file=second[0], expected="one copy", remedy=remedy)
        if MISTRAL_CONFIG in names:
            found = "Mistral's own configuration stands beside weights that it does not speak of"
            remedy = "move it away: vLLM reads it, and looks for consolidated*.safetensors"
            yield ServingError(found, file=MISTRAL_CONFIG, expected=f"{CONFIG} alone", remedy=remedy)
    if others := [name for name in names if name.endswith(_LOADED) and is_of_another_kind(name)]:
        found = f"weights of another kind stand beside the safetensors files: {some(others)}"
        remedy = "move them away: an engine may load them instead"
        yield ServingError(found, file=others[0], expected="one copy", remedy=remedy)


def index_and_metadata(subject: Subject) -> Iterator[Finding]:
    """Several files need an index, and each file's metadata must say which framework wrote it."""
    checkpoint = subject.checkpoint
    files = [header.file for header in checkpoint.files]
    if len(files) > 1 and checkpoint.index_name is None and not subject.is_native_only:
        found = f"{len(files)} safetensors files without an index"
        remedy = "take the index that was written with them, or write the directory anew with convert, which makes one"
        yield ServingError(found, file=files[0], expected="model.safetensors.index.json", remedy=remedy)
    unmarked = [header for header in checkpoint.files if header.metadata.get("format") != "pt"]
    if unmarked:
        found = f"the metadata does not say what wrote it, in {len(unmarked)} of {len(files)} files"
        remedy = "have it written anew with that: loaders that serve several frameworks refuse the file, or guess"
        yield ServingError(found, file=unmarked[0].file, expected='{"format": "pt"}', remedy=remedy)

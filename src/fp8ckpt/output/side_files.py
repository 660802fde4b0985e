"""The files of a checkpoint's directory that are not its weights: configuration, tokenizer, documentation."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fp8ckpt.errors import StorageError
from fp8ckpt.tensors.checkpoint import INDEX, NATIVE_INDEX, Checkpoint
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG, dump_json, load_json, without_quantization

_FOREIGN_DIRECTORIES = (".git", ".cache")  # of the tools that fetched the checkpoint; not part of it


def side_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Every file that belongs to the checkpoint and holds no weights, by its path in the directory.

    Left out are the safetensors files at the top, read or not (beside the Hugging Face files, Mistral's releases have a
    second copy, ``consolidated*``), but for those that are no part of the model, and the indexes. Raises `StorageError`
    for a broken link, or what is no file at all.
    """
    found: dict[str, Path] = {}
    top = str(checkpoint.path)
    for directory, folders, files in os.walk(top):
        folders[:] = sorted(set(folders) - set(_FOREIGN_DIRECTORIES))
        linked = [folder for folder in folders if Path(directory, folder).is_symlink()]  # os.walk does not follow these
        for name in sorted(files) + linked:
            file = Path(directory, name)
            of_weights = name.endswith(".safetensors") and name not in checkpoint.beside
            if directory == top and (of_weights or name in (INDEX, NATIVE_INDEX)):
                continue
            relative = file.relative_to(checkpoint.path).as_posix()
            try:
                mode = file.stat().st_mode
            except OSError as error:
                raise StorageError(
                    f"cannot be read: {error.strerror}", file=relative, remedy="restore the file, or remove the link"
                ) from error
            if not stat.S_ISREG(mode):
                raise StorageError(
                    "it is a link to a folder, or no file at all",
                    file=relative,
                    expected="a file",
                    remedy="move it away",
                )
            found[relative] = file
    return found


def notes_on_plain(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a user should know of the same weights without quantization."""
    notes = checkpoint.notes
    if checkpoint.cache_scales and not checkpoint.quantized:  # beside FP8 weights, nobody expects to find them again
        count = len(checkpoint.cache_scales)
        notes += (f"{count} scales of the key-value cache are left out, with the configuration that they belong to",)
    return notes


def plain_side_files(checkpoint: Checkpoint, dtype: str) -> tuple[dict[str, bytes], dict[str, Path]]:
    """For the same weights in ``dtype``: the configuration without quantization, and the files to copy."""
    texts: dict[str, bytes] = {}
    copies = side_files(checkpoint)
    copies.pop(MODELOPT_CONFIG, None)
    for name in (CONFIG, MISTRAL_CONFIG):
        if copies.pop(name, None) is not None:
            texts[name] = dump_json(without_quantization(name, load_json(checkpoint.path / name) or {}, dtype))
    return texts, copies

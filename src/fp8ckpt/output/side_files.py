"""The files of a checkpoint's directory other than its weights: configuration, tokenizer, documentation."""

from __future__ import annotations

from fp8ckpt.stores.store import File
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG, dump_json, load_json, without_quantization
from fp8ckpt.tensors.directory import INDEX, NATIVE_INDEX


def side_files(checkpoint: Checkpoint) -> dict[str, File]:
    """Return every file that belongs to the checkpoint and holds no weights, by its path in the directory.

    Left out are the indexes and the safetensors files at the top, read or not (Mistral's releases have a second copy,
    ``consolidated*``, beside the Hugging Face files), except those that are no part of the model. Raises `StorageError`
    for a link that is not followed, a folder that cannot be listed, or anything but a regular file.
    """
    found = {}
    for name in checkpoint.store.files():
        of_weights = name.endswith(".safetensors") and "/" not in name and name not in checkpoint.beside
        if not of_weights and name not in (INDEX, NATIVE_INDEX):
            found[name] = File(checkpoint.store, name)
            _ = found[name].stat  # refuses anything but a file, before anything is written
    return found


def notes_on_plain(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a user should know of the same weights without quantization."""
    notes = checkpoint.notes
    if checkpoint.cache_scales and not checkpoint.quantized:  # beside FP8 weights, nobody expects to keep them
        count = len(checkpoint.cache_scales)
        notes += (f"{count} scales of the key-value cache are left out, with the configuration that they belong to",)
    return notes


def plain_side_files(checkpoint: Checkpoint, dtype: str) -> tuple[dict[str, bytes], dict[str, File]]:
    """Return, for the same weights in ``dtype``, the configuration without quantization, and the files to copy."""
    texts: dict[str, bytes] = {}
    copies = side_files(checkpoint)
    copies.pop(MODELOPT_CONFIG, None)
    for name in (CONFIG, MISTRAL_CONFIG):
        if copies.pop(name, None) is not None:
            texts[name] = dump_json(without_quantization(name, load_json(checkpoint.store, name) or {}, dtype))
    return texts, copies

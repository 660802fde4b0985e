"""What engines join, and shard over GPUs: it must be all FP8 or none, and consist of whole blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

from fp8ckpt.errors import ServingError, some
from fp8ckpt.families.parallel import Block, Heads, Ragged, ragged, sibling_units
from fp8ckpt.numerics.codes import FP8_DTYPES
from fp8ckpt.serving import notes
from fp8ckpt.serving.subject import Finding, Subject
from fp8ckpt.tensors.blocks import block_sizes
from fp8ckpt.tensors.formats import module_of
from fp8ckpt.tensors.scaled import QuantizedTensor

_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class TensorParallel:
    """The largest tensor-parallel size, of the powers of two up to 64, to which weights in blocks can be sharded, and
    the reason why no larger one fits.
    """

    largest: int
    reason: str | None


def mixed(subject: Subject) -> Iterator[Finding]:
    """Weights that are joined must all be FP8, or none of them."""
    tensors = subject.checkpoint.tensors
    units = [unit for unit in sibling_units(tensors) if len({tensors[name].scaled is None for name in unit}) > 1]
    if units:
        tensor = next(name for name in units[0] if tensors[name].scaled is None)
        yield ServingError.of_mixed(tensor, file=subject.file, count=len(units), names=units[0])


def blocks(subject: Subject) -> Iterator[Finding]:
    """Joined rows must be whole blocks; and so must each GPU's part, for the requested size."""
    parts = partial(_ragged, subject)
    if one := parts(1):
        why = "are of FP8_PB_WO" if one[0].name in _in_whole_blocks(subject) else "are joined with others"
        yield ServingError.of_torn(_tensor(subject, one[0]), count=len(one), why=why, part=one[0])
    elif subject.size is not None and (many := parts(subject.size)):
        able, tensor = tensor_parallel(subject), _tensor(subject, many[0])
        largest = able.largest if able else 1
        yield ServingError.of_shares(tensor, size=subject.size, count=len(many), part=many[0], largest=largest)
    shapes = {tensor.name: tensor.shape for tensor in subject.quantized}
    columns = [name for name, block in _blocks(subject).items() if shapes[name][-1] % block[1]]
    if columns:
        yield notes.TORN_COLUMNS.format(len(columns), some(columns))
    yield from _torn_rows(subject, shapes)


def _torn_rows(subject: Subject, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Note what transformers does if the last block has fewer rows: it divides the rows by the number of scales."""
    if subject.stated is None or not subject.stated.row.by_transformers:
        return
    blocks = {name: block[0] for name, block in _blocks(subject).items() if len(shapes[name]) == 2}
    torn = {name: rows for name, block in blocks.items() if (rows := shapes[name][0]) > block and rows % block}
    divides = {name: rows % -(-rows // blocks[name]) == 0 for name, rows in torn.items()}
    for taken, note in ((True, notes.MISREAD_ROWS), (False, notes.REFUSED_ROWS)):
        if names := [name for name in torn if divides[name] is taken]:
            yield note.format(len(names), some(names))


def tensor_parallel(subject: Subject) -> TensorParallel | None:
    """Return the largest size to which the blocks can be sharded; None without blocks, or if not even one GPU fits."""
    if not _blocks(subject) or _ragged(subject, 1):
        return None
    able = list(takewhile(lambda size: not _ragged(subject, size), _SIZES))
    if able[-1] == _SIZES[-1]:
        return TensorParallel(able[-1], None)
    size = 2 * able[-1]
    return TensorParallel(able[-1], f"with {size}, {_ragged(subject, size)[0]}")


def _ragged(subject: Subject, size: int) -> list[Ragged]:
    shapes = {tensor.name: tensor.shape for tensor in subject.quantized}
    return list(ragged(shapes, _blocks(subject), size, _heads(subject), _in_whole_blocks(subject)))


def _in_whole_blocks(subject: Subject) -> set[str]:
    """What ModelOpt exports as FP8_PB_WO, with scales of twice the dimensions: vLLM takes only whole blocks."""
    return {tensor.name for tensor in subject.quantized if len(tensor.scale.shape) == 2 * len(tensor.shape)}


def _blocks(subject: Subject) -> dict[str, Block]:
    """The blocks of the matrices that are tiled; for a matrix smaller than a block, the stated block size."""
    stated = block_sizes(subject.checkpoint.store, subject.checkpoint.config)
    of_eight_bits = [tensor for tensor in subject.quantized if tensor.weight.dtype in FP8_DTYPES]
    sizes = {tensor.name: stated.of(module_of(tensor.name)) for tensor in of_eight_bits if len(tensor.shape) >= 2}
    return {name: (size[0], size[1]) for name, size in sizes.items() if size is not None and len(size) == 2}


def _heads(subject: Subject) -> Heads | None:
    config = subject.checkpoint.config
    for section in (config.get("text_config"), config):
        stated = section if isinstance(section, dict) else {}
        queries = stated.get("num_attention_heads")
        keys = stated.get("num_key_value_heads") or queries
        if type(keys) is int and keys > 0:
            return Heads(queries if type(queries) is int and queries > 0 else keys, keys)
    return None


def _tensor(subject: Subject, part: Ragged) -> QuantizedTensor:
    return next(tensor for tensor in subject.quantized if tensor.name == part.name)

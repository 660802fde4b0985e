"""Write a miniature, valid FP8 checkpoint in a released layout, for the demo, tests and benchmarks.

There are two families. `Mistral3Sizes`: a Mistral3 vision-language model with per-tensor e4m3 text Linears, 0-d BF16
scales and activation scales, all else BF16. `DeepseekSizes`: a model shaped like DeepSeek V3 with F32 scales of 128 x
128 blocks, ragged edges included. Weights are normal deviates quantized with ``amax / 448``, so a model made of them
runs. With several files, the scale of a file's last FP8 weight is in the next file, as in releases.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ckpt.families.miniatures import LAYOUTS, Weight, side_files
from fp8ckpt.families.miniatures import DeepseekSizes as DeepseekSizes
from fp8ckpt.families.miniatures import Mistral3Sizes as Mistral3Sizes
from fp8ckpt.numerics.geometry import BlockGrid
from fp8ckpt.output.files import OutputFiles
from fp8ckpt.output.forecast import Forecast
from fp8ckpt.output.layout import FileLayout, TensorSpec, index_text, lay_out
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan
from fp8ckpt.stores.address import local_path
from fp8ckpt.targets import refuse_other
from fp8ckpt.tensors.config import CONFIG, dump_json
from fp8ckpt.tensors.directory import INDEX
from fp8ckpt.tensors.stored import TensorSpan, tensor_nbytes

if TYPE_CHECKING:
    from fp8ckpt.engine import Progress

_POOL = 1 << 22  # deviates that all weights are cut from; new ones for each would take minutes for real sizes
_BAND = 128  # rows of a weight that are made at once


def sample(
    destination: str | Path,
    sizes: Mistral3Sizes | DeepseekSizes | None = None,
    *,
    layout: str = "identity",
    files: int = 3,
    sparse: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint of ``sizes`` to the new directory ``destination``, and return it.

    ``layout`` (Mistral3 only): "identity", the names of the model's own state dict, as in Mistral Medium 3.5; or
    "nested", as in Ministral 3 and Devstral. ``files``: the number of safetensors files. ``sparse``: write true
    headers, scales and side files, and leave holes for the weights. ``progress`` is called with (bytes of weights
    written, bytes in all, the current activity). Raises `fp8ckpt.errors.OutputExistsError` if the destination exists,
    and `fp8ckpt.errors.NoRoomError` if there is no room for it.

    >>> from fp8ckpt.sample import Mistral3Sizes
    >>> path = fp8ckpt.sample("small", Mistral3Sizes(layers=1), files=2)
    >>> len(fp8ckpt.open_checkpoint(path).quantized)
    7
    """
    planned = _plan(sizes or Mistral3Sizes(), layout, files, sparse, seed)
    output = PartialOutput(local_path(destination))
    planned.output.begin(output)
    opened = OutputFiles(output.directory)
    try:
        spans: dict[str, TensorSpan] = {}
        for file in planned.output.layouts:
            opened.of(file.name).write(_array(file.head), 0)
            spans.update((span.name, span) for span in file.spans)
        done, total = 0, sum(map(_nbytes, planned.weights))
        for weight in planned.weights:
            for name, offset, data in _parts(weight, planned.block, sparse, seed):
                opened.of(spans[name].file.name).write(data.reshape(-1).view("u1"), spans[name].start + offset)
            done += _nbytes(weight)
            if progress is not None:
                progress(done, total, f"writing {spans[weight.name].file.name}")
        opened.flush()
        planned.output.publish(output)
    finally:
        opened.close()
        output.release()
    return Path(output.destination)


def plan_sample(
    destination: str | Path,
    sizes: Mistral3Sizes | DeepseekSizes | None = None,
    *,
    layout: str = "identity",
    files: int = 3,
    sparse: bool = False,
) -> Forecast:
    """Return what `sample` would write with the same arguments: files, bytes, room, time. Writes nothing.

    >>> fp8ckpt.plan_sample("planned").files
    10
    """
    planned = _plan(sizes or Mistral3Sizes(), layout, files, sparse, 0)
    return planned.output.forecast(PartialOutput(local_path(destination)), {}, {})


class _Planned(NamedTuple):
    output: OutputPlan
    weights: list[Weight]
    block: tuple[int, int] | None


def _plan(sizes: Mistral3Sizes | DeepseekSizes, layout: str, files: int, sparse: bool, seed: int) -> _Planned:
    """Plan the output, and refuse what can be refused, before the first byte is written."""
    if files < 1:
        raise ValueError(f"files={files}; expected at least 1")
    refuse_other("layout", layout, LAYOUTS)
    if isinstance(sizes, Mistral3Sizes) and sizes.heads % sizes.kv_heads:
        raise ValueError(f"heads={sizes.heads} is no multiple of kv_heads={sizes.kv_heads}")
    weights, block = list(sizes.weights(layout)), sizes.block
    layouts = _partition(weights, block, files)
    texts = {**side_files(sizes.vocabulary), CONFIG: dump_json(sizes.config()), INDEX: index_text(layouts)}
    arguments = {
        "job": "sample",
        "sizes": repr(sizes),
        "layout": layout,
        "files": files,
        "sparse": sparse,
        "seed": seed,
    }
    holes = sum(_nbytes(weight) for weight in weights) if sparse else 0
    return _Planned(OutputPlan((), arguments, tuple(layouts), texts, holes=holes), weights, block)


def _array(data: bytes) -> Any:
    import numpy as np

    return np.frombuffer(data, np.uint8)


def _nbytes(weight: Weight) -> int:
    return tensor_nbytes("F8_E4M3" if weight.fp8 else weight.dtype, weight.shape)


def _scale_specs(weight: Weight, block: tuple[int, int] | None) -> list[TensorSpec]:
    if not weight.fp8:
        return []
    if block is not None:
        return [TensorSpec(weight.name + "_scale_inv", "F32", BlockGrid(weight.shape, block).shape)]
    return [
        TensorSpec(weight.name + "_scale_inv", "BF16", ()),
        TensorSpec(weight.name.removesuffix("weight") + "activation_scale", "BF16", ()),
    ]


def _partition(weights: list[Weight], block: tuple[int, int] | None, files: int) -> list[FileLayout]:
    """Fill the files one after the other with about the same number of bytes. A scale may go to the file after its
    weight's.
    """
    total = sum(map(_nbytes, weights))
    contents: list[list[TensorSpec]] = [[]]
    filled = 0
    carried: list[TensorSpec] = []
    for weight in weights:
        if filled >= total * len(contents) / files and len(contents) < files:
            contents.append(carried)
            carried = []
        spec = TensorSpec(weight.name, "F8_E4M3" if weight.fp8 else weight.dtype, weight.shape)
        filled += tensor_nbytes(spec.dtype, spec.shape)
        ends_file = filled >= total * len(contents) / files and len(contents) < files
        contents[-1].append(spec)
        (carried if ends_file else contents[-1]).extend(_scale_specs(weight, block))
    contents[-1].extend(carried)
    if len(contents) == 1:
        return [lay_out("model.safetensors", contents[0], {"format": "pt"})]
    return [
        lay_out(f"model-{i:05d}-of-{len(contents):05d}.safetensors", specs, {"format": "pt"})
        for i, specs in enumerate(contents, 1)
    ]


def _parts(weight: Weight, block: tuple[int, int] | None, sparse: bool, seed: int) -> Iterator[tuple[str, int, Any]]:
    """Yield (stored tensor, offset in it in bytes, array) for a weight and its scales."""
    import numpy as np

    if weight.fp8 and block is None:
        activation = 0.01 + (zlib.crc32(weight.name.encode()) % 1000) / 50000
        name = weight.name.removesuffix("weight") + "activation_scale"
        yield name, 0, _bf16(np.array([activation], np.float32))
    if sparse:
        if weight.fp8:
            ones = np.full(BlockGrid(weight.shape, block or weight.shape).shape, 2.0**-10, np.float32)
            yield weight.name + "_scale_inv", 0, ones if block else _bf16(ones)
    elif weight.fp8:
        yield from _quantized(weight, block, seed)
    else:
        for first, values in _bands(weight, seed):
            stored = values if weight.dtype == "F32" else _bf16(values)
            yield weight.name, first * stored.itemsize, stored


def _quantized(weight: Weight, block: tuple[int, int] | None, seed: int) -> Iterator[tuple[str, int, Any]]:
    """Yield the same for codes and their scales."""
    import numpy as np

    from fp8ckpt.numerics.quantize import encode, parts_of_run, values_of

    scale_name = weight.name + "_scale_inv"
    of_all: Any = None
    if block is None:
        largest = max(float(np.abs(values).max()) for _, values in _bands(weight, seed))
        stored = _bf16(np.array([[largest / 448]], np.float32), up=True)
        of_all = (stored.astype(np.uint32) << 16).view(np.float32)
        yield scale_name, 0, stored
    for first, values in _bands(weight, seed):
        grid, scales, codes = BlockGrid(values.shape, values.shape), of_all, np.empty(values.size, np.uint8)
        if block is not None:
            grid, edges = grid._replace(block_size=(len(values), block[1])), np.arange(0, values.shape[1], block[1])
            scales = np.maximum.reduceat(np.abs(values).max(axis=0), edges)[np.newaxis] / np.float32(448)
            yield scale_name, first // (values.shape[1] * block[0]) * len(edges) * 4, scales
        encode(parts_of_run(grid, 0, values.size), values_of(values.reshape(-1).view(np.uint8), "F32"), scales, codes)
        yield weight.name, first, codes


def _bf16(values: Any, *, up: bool = False) -> Any:
    """Return float32 values as bfloat16 bits: rounded to nearest even, or away from zero."""
    import numpy as np

    bits = values.view(np.uint32)
    return ((bits + (np.uint32(0xFFFF) if up else np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16).astype(np.uint16)


_pools: dict[int, Any] = {}


def _bands(weight: Weight, seed: int) -> Iterator[tuple[int, Any]]:
    """Yield (first element, values f32 [rows, row size]) in steps of `_BAND` rows; every call gives the same."""
    import numpy as np

    rows = weight.shape[0]
    width = 1
    for dim in weight.shape[1:]:
        width *= dim
    if weight.fill is None and seed not in _pools:
        _pools[seed] = np.random.default_rng(seed).standard_normal(_POOL, np.float32)
    start = zlib.crc32(f"{seed} {weight.name}".encode()) % _POOL
    for row in range(0, rows, _BAND):
        shape = (min(_BAND, rows - row), width)
        if weight.fill is not None:
            yield row * width, np.full(shape, weight.fill, np.float32)
        else:
            first = (start + row * width) % _POOL
            values = np.resize(np.concatenate((_pools[seed][first:], _pools[seed][:first])), shape)
            yield row * width, values * np.float32(width**-0.5)

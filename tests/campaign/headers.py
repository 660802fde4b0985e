"""Headers that are mutated: never a traceback, never slow; and what we take for sound, the safetensors library reads
alike.

``python -m tests.campaign.headers N`` has atheris make them, guided by the lines of the reader that each reaches; it
must be installed. `mutate_headers` makes them at random.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from functools import cache

import safetensors

from fp8ckpt.errors import Fp8CheckpointError
from fp8ckpt.stores.memory import MemoryStore
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.blocks import BlockSizes
from fp8ckpt.tensors.header import read_header
from fp8ckpt.tensors.pairing import pair
from tests.campaign.trial import Count

SECONDS = 1.0  # for a header of some KB
_WORDS = (
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"-0", b"1e3", b"1.0", b"null", b"true", b"\\u0000",
    b"\\ud800", b"F8_E4M3", b"BF16", b"F4", b"U8", b'"shape"', b'"dtype"', b'"data_offsets"', b'"__metadata__"',
    b"18446744073709551616", b"9223372036854775807", b"\xff", b"\0", b"_scale_inv", b".weight", b" ",
)  # fmt: skip


@cache
def seeds() -> tuple[bytes, ...]:
    """Sound files, small: of FP8 with scales in blocks, of one tensor, of none."""
    blocks = {
        "a.weight": {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [0, 8]},
        "a.weight_scale_inv": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
        "__metadata__": {"format": "pt"},
    }
    one = {"x": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}
    return tuple(framed(json.dumps(header).encode(), size) for header, size in ((blocks, 22), (one, 1), ({}, 0)))


def framed(text: bytes, size: int) -> bytes:
    """A file of this header, and so many bytes of data."""
    return len(text).to_bytes(8, "little") + text + bytes(size)


def mutations(seed: int) -> Iterator[bytes]:
    """Files whose headers were changed in a few places; most are framed right."""
    rng = random.Random(seed)
    while True:
        whole = rng.choice(seeds())
        length = int.from_bytes(whole[:8], "little")
        text, data = bytearray(whole[8 : 8 + length]), whole[8 + length :]
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            at, cut = rng.randrange(len(text) + 1), rng.choice((0, 1, 1, 4, 20))
            new = rng.choice((rng.choice(_WORDS), bytes([rng.randrange(256)]), bytes(text[at : at + cut]) * 2, b""))
            text[at : at + cut] = new
        size = rng.choice((len(data), len(data), len(data) + 1, 0))
        yield framed(bytes(text), size) if rng.random() < 0.95 else bytes(text) + data


def wrong(data: bytes) -> str | None:
    """What must not be of a file of these bytes; None where all is well."""
    begun = time.monotonic()
    file = File(MemoryStore({"model.safetensors": data}), "model.safetensors")
    header, defects = read_header(file)
    spans = {span.name: span for span in header.spans} if header is not None else {}
    pairing = pair(spans, BlockSizes(), complete=not defects)
    for defect in (*defects, *pairing.defects):
        if not isinstance(defect, Fp8CheckpointError) or "\n" in str(defect) or len(str(defect)) > 3000:
            return f"an odd defect: {defect!r}"
    if header is None and not defects:
        return "refused without a defect"
    if time.monotonic() - begun > SECONDS:
        return "slow"
    if header is not None and not defects:
        try:
            theirs = {name: (facts["dtype"], facts["shape"]) for name, facts in safetensors.deserialize(data)}
        except safetensors.SafetensorError as error:
            return f"taken for sound, and refused by the library: {error}"
        if theirs != {span.name: (span.dtype, list(span.shape)) for span in header.spans}:
            return "read otherwise than by the library"
    return None


def mutate_headers(mutants: int, seed: int) -> Count:
    """So many headers that were mutated at random, and every bit of the seeds."""
    from tests.campaign.flips import flipped

    count = Count("mutated headers")
    made = mutations(seed)
    flips = (raw for whole in seeds() for _, raw in flipped(whole))
    for i, data in enumerate(raw for source in (flips, made) for raw in source):
        if i >= mutants:
            return count
        count.trials += 1
        try:
            if (found := wrong(data)) is not None:
                count.silent.append(f"{found}: {data!r}")
        except Exception as error:
            count.unnamed.append(f"{error!r}: {data!r}")
    return count


def _fuzz(runs: int) -> None:
    """Have atheris make so many; it ends the process, with the figures of coverage, and fails on the first fault."""
    from pathlib import Path
    from tempfile import mkdtemp

    import atheris

    def one(data: bytes) -> None:
        found = wrong(data)
        assert found is None, found

    import fp8ckpt.tensors.formats
    import fp8ckpt.tensors.header
    import fp8ckpt.tensors.pairing

    for module in (fp8ckpt.tensors.header, fp8ckpt.tensors.pairing, fp8ckpt.tensors.formats):
        for name, value in list(vars(module).items()):
            if getattr(value, "__module__", "") == module.__name__ and callable(value) and not isinstance(value, type):
                setattr(module, name, atheris.instrument_func(value))
    globals().update(read_header=fp8ckpt.tensors.header.read_header, pair=fp8ckpt.tensors.pairing.pair)
    corpus = Path(mkdtemp())
    for i, whole in enumerate(seeds()):
        (corpus / str(i)).write_bytes(whole)
    words = corpus.with_suffix(".dict")
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in _WORDS))
    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=1024", f"-dict={words}", "-timeout=10", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    _fuzz(int(sys.argv[1]))

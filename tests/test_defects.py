"""Never silent: every defect that DESIGN.md section 7 lists, through the command line, each by its name and place."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fp8ckpt
from fp8ckpt.cli import main
from fp8ckpt.errors import StorageError
from fp8ckpt.tensors.checkpoint import survey
from tests.conftest import Run
from tests.oracle import Stored, read_safetensors, write_safetensors

ONE, TWO, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"
Q, QS, K, KS = "m.q.weight", "m.q.weight_scale_inv", "m.k.weight", "m.k.weight_scale_inv"
CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def codes(*shape: int) -> Stored:
    return Stored.codes(np.full(shape, 0x3A, np.uint8))


def floats(value: float, *shape: int, dtype: str = "F32") -> Stored:
    return Stored.of(np.full(shape, value, np.float32), dtype)


def with_index(directory: Path) -> None:
    """(Re)write the index so that it agrees with the files."""
    files = sorted(directory.glob("*.safetensors"))
    weight_map = {name: file.name for file in files for name in read_safetensors(file)}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def base(directory: Path) -> Path:
    """A sound checkpoint: per-tensor and block scales, an activation scale, plain tensors; scales in another file."""
    directory.mkdir()
    plain = {"lm_head.weight": floats(1, 8, 8, dtype="BF16"), "m.norm.weight": floats(1, 8, dtype="BF16")}
    write_safetensors(directory / ONE, {Q: codes(40, 24), K: codes(256, 256), **plain}, {"format": "pt"})
    scales = {QS: floats(0.5, dtype="BF16"), "m.q.activation_scale": floats(0.1, dtype="BF16"), KS: floats(0.25, 2, 2)}
    write_safetensors(directory / TWO, scales, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    with_index(directory)
    return directory


@dataclass(frozen=True)
class Case:
    """One defect: how it is made, and what must be said of it."""

    break_it: Callable[[Path], object]
    kind: str
    tensor: str | None
    file: str
    found: str
    expected: str = ""


CASES: dict[str, Case] = {}


def change(file: str, **changes: Stored | None) -> Callable[[Path], None]:
    """Replace, add or (None) remove tensors of a file, the index following; ``__`` in a name stands for a dot."""

    def do(directory: Path) -> None:
        tensors = read_safetensors(directory / file)
        for key, value in changes.items():
            name = key.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value
        write_safetensors(directory / file, tensors, {"format": "pt"})
        with_index(directory)

    return do


def header(file: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Edit the header's JSON and keep the data as it is."""

    def do(directory: Path) -> None:
        raw = (directory / file).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        edit(entries)
        text = json.dumps(entries).encode()
        (directory / file).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return do


def entry(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda entries: entries[name].update(changes)


def raw(file: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda directory: (directory / file).write_bytes(edit((directory / file).read_bytes()))


def text_header(text: bytes) -> Callable[[bytes], bytes]:
    return lambda _: len(text).to_bytes(8, "little") + text


def index(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        value = json.loads((directory / INDEX).read_text())
        edit(value)
        (directory / INDEX).write_text(json.dumps(value))

    return do


def add(name: str, *case: Any) -> None:
    assert name not in CASES
    CASES[name] = Case(*case)


# fmt: off
# Scales that are missing, orphan, misnamed, ambiguous, of a wrong shape or dtype.
add("scale missing", change(TWO, m__q__weight_scale_inv=None), "MissingScaleError", Q, ONE, "without a scale", QS)
add("scale of blocks missing", change(TWO, m__k__weight_scale_inv=None), "MissingScaleError", K, ONE, "without a scale",
    KS)
for misname in ("m__q__weight_scale_inverse", "m__q__scale_inv", "m__q__weight_scales"):
    name = misname.replace("__", ".")
    edit = change(TWO, **{"m__q__weight_scale_inv": None, misname: floats(0.5)})
    add(f"scale misnamed {name}", edit, "MissingScaleError", Q, ONE, f"is {name} its scale, misnamed?", QS)
add("scale of another module's name", change(TWO, m__q__weight_scale_inv=None, m__Q__weight_scale_inv=floats(0.5)),
    "MissingScaleError", Q, ONE, "without a scale", QS)
add("orphan scale", change(TWO, m__z__weight_scale_inv=floats(1)), "OrphanScaleError", "m.z.weight_scale_inv", TWO,
    "a scale without a weight", "m.z.weight")
add("orphan qscale", change(TWO, m__z__qscale_weight=floats(1)), "OrphanScaleError", "m.z.qscale_weight", TWO,
    "a scale without a weight", "m.z.weight")
add("orphan activation scale", change(TWO, m__z__activation_scale=floats(1)), "OrphanScaleError",
    "m.z.activation_scale", TWO, "a scale without a weight", "m.z.weight")
add("scale of a BF16 weight", change(TWO, lm_head__weight_scale_inv=floats(1)), "OrphanScaleError",
    "lm_head.weight_scale_inv", TWO, "a weight of dtype BF16", "lm_head.weight")
add("weight missing", change(ONE, m__q__weight=None), "OrphanScaleError", QS, TWO, "a scale without a weight", Q)
add("two scales", change(TWO, m__q__weight_scale=floats(1)), "AmbiguousScaleError", Q, ONE,
    "m.q.weight_scale_inv, m.q.weight_scale", "one scale")
for shape in ((3, 2), (2, 1), (2, 3), (1, 2), (2, 2, 1), (4,), (2, 256)):
    add(f"scale shape {shape}", change(TWO, m__k__weight_scale_inv=floats(1, *shape)), "ScaleShapeError", K, ONE,
        f"scale shape {shape} in {TWO} does not fit weight (256, 256) with block size (128, 128)", "expected (2, 2)")
add("scale without elements", change(TWO, m__q__weight_scale_inv=floats(1, 0)), "ScaleShapeError", Q, ONE,
    "scale shape (0,)", "(1, 1)")
add("blocks without a configured size", lambda directory: (directory / "config.json").write_text("{}"),
    "ScaleShapeError", K, ONE, "scale shape (2, 2)", "one scale, or one per row")
for dtype, itemsize in (("F64", 8), ("I32", 4), ("BOOL", 1)):
    add(f"scale dtype {dtype}", change(TWO, m__q__weight_scale_inv=Stored(dtype, (), b"\1" * itemsize)),
        "ScaleDtypeError", Q, ONE, f"dtype {dtype}", "F32")

# Values that cannot be a scale.
for word, value in (
    ("nan", float("nan")),
    ("inf", float("inf")),
    ("-inf", -float("inf")),
    ("0.0", 0.0),
    ("-0.0", -0.0),
    ("-0.5", -0.5),
):
    for dtype in ("F32", "BF16") if value != -0.5 else ("F16",):
        add(f"{dtype} scale {word}", change(TWO, m__q__weight_scale_inv=floats(value, dtype=dtype)), "ScaleValueError",
            QS, TWO, f"the first is {word}", "finite and positive")
    spoilt = np.full((2, 2), 0.25, np.float32)
    spoilt[1, 0] = value
    add(f"one block's scale {word}", change(TWO, m__k__weight_scale_inv=Stored.of(spoilt, "F32")), "ScaleValueError",
        KS, TWO, f"1 of 4 scales are not valid, the first is {word} at (1, 0)", "finite and positive")
    add(f"activation scale {word}", change(TWO, m__q__activation_scale=floats(value, dtype="BF16")), "ScaleValueError",
        "m.q.activation_scale", TWO, f"the first is {word}", "finite and positive")
for dtype in ("U8", "F8_E8M0"):
    add(f"exponent 255 in {dtype}",
        change(TWO, m__k__weight_scale_inv=Stored.codes(np.array([[127, 127], [255, 1]], np.uint8), dtype)),
        "ScaleValueError", KS, TWO, "the first is nan at (1, 0)", "finite and positive")

# Files that are cut off or too long.
add("data cut off", raw(ONE, lambda data: data[:-3]), "TruncatedFileError", None, ONE, "the file holds",
    "bytes, as the header says")
add("header cut off", raw(ONE, lambda data: data[:40]), "TruncatedFileError", None, ONE, "the file holds 40",
    "at least")
add("length cut off", raw(ONE, lambda data: data[:5]), "TruncatedFileError", None, ONE, "the file holds 5 bytes",
    "at least the 8 bytes")
add("empty file", raw(TWO, lambda _: b""), "TruncatedFileError", None, TWO, "the file holds 0 bytes",
    "at least the 8 bytes")
add("bytes after the end", raw(TWO, lambda data: data + b"\0"), "HeaderError", None, TWO,
    "1 bytes follow the last tensor", "a file of")
add("Git LFS pointer", raw(ONE, lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
    "HeaderError", None, ONE, "the header claims", "at most 100000000")

# Headers that lie.
add("header longer than any", raw(ONE, lambda data: b"\xff" * 8 + data[8:]), "HeaderError", None, ONE,
    "claims 18446744073709551615 bytes", "at most 100000000")
add("header is no JSON", raw(ONE, text_header(b'{"a":')), "HeaderError", None, ONE, "not valid JSON", "a JSON object")
add("header is not UTF-8", raw(ONE, text_header(b'{"\xff": 1}')), "HeaderError", None, ONE, "not valid JSON",
    "a JSON object")
add("header is an array", raw(ONE, text_header(b"[]")), "HeaderError", None, ONE, "the JSON is a list", "an object")
add("header nests too deep", raw(ONE, text_header(b"[" * 100_000)), "HeaderError", None, ONE, "not valid JSON",
    "a JSON object")
add("metadata is no text", header(ONE, lambda e: e.update(__metadata__={"format": 1})), "HeaderError", None, ONE,
    "__metadata__")
add("offsets hold too few bytes", header(ONE, entry(Q, data_offsets=[0, 959])), "HeaderError", Q, ONE,
    "[0, 959] hold 959 bytes", "960")
add("offsets go backwards", header(ONE, entry(Q, data_offsets=[960, 0])), "HeaderError", Q, ONE,
    "[960, 0] hold -960 bytes", "960")
add("offsets are negative", header(ONE, entry(Q, data_offsets=[-960, 0])), "HeaderError", Q, ONE,
    "[-960, 0] hold 960 bytes")
add("offsets beyond the file", header(ONE, entry(Q, data_offsets=[2**60, 2**60 + 960])), "HeaderError", Q, ONE,
    "begins at byte")
for name, offsets in (
    ("fractions", [0, 960.0]),
    ("text", ["0", "960"]),
    ("one number", [0]),
    ("three numbers", [0, 480, 960]),
    ("nothing", None),
    ("truth values", [False, 960]),
):
    add(f"offsets are {name}", header(ONE, entry(Q, data_offsets=offsets)), "HeaderError", Q, ONE, "is malformed",
        "two data offsets")
add("offsets missing", header(ONE, lambda e: e[Q].pop("data_offsets")), "HeaderError", Q, ONE, "is malformed",
    "two data offsets")
add("entry is no object", header(ONE, lambda e: e.update({Q: 5})), "HeaderError", Q, ONE, "the entry 5 is malformed",
    "a dtype")
add("shape too large", header(ONE, entry(Q, shape=[40, 25])), "HeaderError", Q, ONE, "hold 960 bytes", "1000")
add("shape beyond all numbers", header(ONE, entry(Q, shape=[2**62, 2**62, 2**62, 2**62])), "HeaderError", Q, ONE,
    "hold 960 bytes", "an impossible number of")
add("dimension beyond 64 bits", header(ONE, entry(Q, shape=[2**64, 0])), "HeaderError", Q, ONE, "is malformed",
    "a shape of whole numbers")
add("dimension negative", header(ONE, entry(Q, shape=[-40, -24])), "HeaderError", Q, ONE, "is malformed",
    "a shape of whole numbers")
add("dimension a fraction", header(ONE, entry(Q, shape=[40.0, 24])), "HeaderError", Q, ONE, "is malformed",
    "a shape of whole numbers")
add("dtype of another size", header(ONE, entry(Q, dtype="BF16")), "HeaderError", Q, ONE, "hold 960 bytes", "1920")
add("dtype unknown", header(ONE, entry(Q, dtype="F8_E3M4")), "HeaderError", Q, ONE, "unknown dtype F8_E3M4",
    "one of BOOL")
add("dtype in lower case", header(ONE, entry(Q, dtype="bf16")), "HeaderError", Q, ONE, "unknown dtype bf16",
    "one of BOOL")
add("dtype a number", header(ONE, entry(Q, dtype=8)), "HeaderError", Q, ONE, "is malformed", "a dtype")
add("spans overlap", header(ONE, entry(K, data_offsets=[0, 65536])), "HeaderError", K, ONE, f"overlaps {Q}", "byte")
add("spans overlap by a byte", header(ONE, entry(K, data_offsets=[959, 959 + 65536])), "HeaderError", K, ONE,
    f"overlaps {Q}", "byte")
add("spans leave a hole", header(ONE, lambda e: e.pop(Q)), "HeaderError", K, ONE,
    "leaves a hole of 960 bytes after the header", "byte")


def twice_in_a_header(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    first = json.dumps({Q: {"dtype": "F8_E4M3", "shape": [40, 24], "data_offsets": [0, 960]}})[:-1].encode()
    text = first + b"," + data[9 : 8 + length]
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def twice_in_files(directory: Path) -> None:
    """The index names the later file, as it would by the order of names."""
    change(TWO, m__q__weight=codes(40, 24))(directory)


add("name twice in a header", raw(ONE, twice_in_a_header), "HeaderError", Q, ONE, "the name occurs twice",
    "each name once")
add("name in two files", twice_in_files, "HeaderError", Q, TWO, f"it is also in {ONE}", "each name once")
add("name in two files, no index", lambda d: (twice_in_files(d), (d / INDEX).unlink()), "HeaderError", Q, TWO,
    f"it is also in {ONE}", "each name once")

# An index that disagrees, or leaves the directory.
agree = "the index and the headers to agree"
add("index lists a tensor that is nowhere", index(lambda i: i["weight_map"].update({"m.z": ONE})), "IndexMismatchError",
    "m.z", INDEX, f"{ONE} does not hold this tensor", agree)
add("index lacks a tensor", index(lambda i: i["weight_map"].pop("lm_head.weight")), "IndexMismatchError",
    "lm_head.weight", INDEX, f"{ONE} holds a tensor that the index {INDEX} does not list", agree)
add("index lacks a scale", index(lambda i: i["weight_map"].pop(QS)), "IndexMismatchError", QS, INDEX, "does not list",
    agree)
add("index names the wrong file", index(lambda i: i["weight_map"].update({Q: TWO})), "IndexMismatchError", Q, INDEX,
    f"says that it is in {TWO}, but it is in {ONE}", agree)
add("index names a missing file", lambda d: (d / TWO).unlink(), "IndexMismatchError", QS, INDEX,
    f"the file {TWO} does not exist", TWO)
add("index does not name a file", lambda d: write_safetensors(d / "more.safetensors", {"x": floats(1)}),
    "IndexMismatchError", None, "more.safetensors", "does not name this file")
for name in ("../evil.safetensors", "/etc/passwd", "sub/a.safetensors", "..\\a.safetensors", "..", ".", "", "a\0b"):
    add(f"index leaves the directory by {name!r}", index(lambda i, name=name: i["weight_map"].update({Q: name})),
        "IndexMismatchError", None, INDEX, "it names the file", "the name of a file in the directory")
add("index is no JSON", lambda d: (d / INDEX).write_text('{"weight_map": {'), "IndexMismatchError", None, INDEX,
    "not valid JSON", "JSON")
add("index has no weight_map", index(lambda i: i.pop("weight_map")), "IndexMismatchError", None, INDEX, "no weight_map",
    "weight_map")
add("index maps to numbers", index(lambda i: i["weight_map"].update({Q: 1})), "IndexMismatchError", None, INDEX,
    "no weight_map", "weight_map")
add("index lists a tensor twice",
    raw(INDEX, lambda data: data.replace(b'"weight_map": {', f'"weight_map": {{"{Q}": "{TWO}", '.encode())),
    "IndexMismatchError", Q, INDEX, "the name occurs twice", "each name once")
add("a part is missing, no index", lambda d: ((d / INDEX).unlink(), (d / TWO).unlink()), "IndexMismatchError", None,
    ONE, f"the part {TWO} does not exist", "all of the 2 parts")

# Codes of four bits, and packed weights that are none.
packed = "FP8, MXFP4 or NVFP4"
add("four bits without a scale", change(ONE, m__z__weight=Stored("F4", (4, 32), bytes(64))), "MissingScaleError",
    "m.z.weight", ONE, "without a scale", "m.z.weight_scale")
add("FP6", change(ONE, m__z__weight=Stored("F6_E2M3", (4, 4), bytes(12))), "UnsupportedFormatError", "m.z.weight", ONE,
    "packed", packed)
add("NVFP4 without its factor",
    change(ONE, m__z__weight=Stored("U8", (4, 16), bytes(64)), m__z__weight_scale=codes(4, 2)), "MissingScaleError",
    "m.z.weight", ONE, "without a scale", "m.z.weight_scale_2")
add("NVFP4 with a factor that is none",
    change(ONE, m__z__weight_packed=Stored("U8", (4, 16), bytes(64)), m__z__weight_global_scale=floats(0, 1),
        m__z__weight_scale=Stored("F8_E4M3", (4, 2), b"\x38" * 8)),
    "ScaleValueError", "m.z.weight_global_scale", ONE, "the first is 0.0", "finite and positive")
add("MXFP4 in other groups",
    change(ONE, m__up_blocks=Stored("U8", (2, 4, 1, 8), bytes(64)), m__up_scales=Stored("U8", (2, 4, 1), b"\x7f" * 8)),
    "ScaleShapeError", "m.up_blocks", ONE, "block size (32,)", "")
add("MXFP4 with a scale that is NaN",
    change(ONE, m__z__weight=Stored("I8", (4, 16), bytes(64)),
        m__z__scale=Stored("F8_E8M0", (4, 1), b"\x7f\x7f\xff\x7f")),
    "ScaleValueError", "m.z.scale", ONE, "the first is nan at (2, 0)", "finite and positive")
add("INT8", change(ONE, m__z__weight=Stored("I8", (4, 4), bytes(16)), m__z__weight_scale=floats(1, 4, 1)),
    "UnsupportedFormatError", "m.z.weight", ONE, "integer", packed)
add("a second factor beside FP8", change(ONE, m__q__weight_scale_2=floats(1)), "UnsupportedFormatError", Q, ONE,
    "m.q.weight_scale_2", "one scale")

# Configuration.
for file in ("config.json", "hf_quant_config.json"):
    for word, text in (("cut off", b'{"a": 1'), ("not UTF-8", b'{"a": "\xff"}'), ("empty", b"")):
        add(f"{file} {word}", lambda d, file=file, text=text: (d / file).write_bytes(text), "ConfigError", None, file,
            "not valid JSON", "a JSON object")
    add(f"{file} a list", lambda d, file=file: (d / file).write_text("[]"), "ConfigError", None, file,
        "the JSON is a list", "an object")
add("config.json has a key twice",
    raw("config.json", lambda _: b'{"quantization_config": {}, "quantization_config": {"weight_block_size": [8, 8]}}'),
    "ConfigError", "quantization_config", "config.json", "the name occurs twice", "each name once")
for size in ([0, 128], [128.0, 128], "128", [], [-1, 1], [True, 128], 128, {"a": 1}, [[128], 128]):
    add(f"block size {size!r}",
        raw("config.json", lambda _, s=size: json.dumps({"quantization_config": {"weight_block_size": s}}).encode()),
        "ConfigError", None, "config.json", "the block size is", "positive whole numbers")
add("two block sizes", lambda d: (d / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "MXFP8"}}'),
    "ConfigError", None, "config.json", "several block sizes", "one")
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_defect_is_refused_by_name(
    name: str, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """convert: exit 1, one line with tensor, file, found and expected, no output. inspect: exit 1, and lists it."""
    case = CASES[name]
    source = base(tmp_path / "fp8")
    case.break_it(source)
    before = {file.name: file.read_bytes() for file in source.iterdir()}

    done = cli("convert", source, tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("fp8ckpt: ")
    assert done.stderr.endswith("\n")
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["fp8"]

    # The same command line, in this process: a child for each would double the time.
    monkeypatch.setattr(sys, "argv", ["fp8ckpt", "inspect", str(source), "--json"])
    with pytest.raises(SystemExit) as exited:
        main()
    inspected = capsys.readouterr()
    assert (exited.value.code, inspected.err) == (1, "")
    defects = json.loads(inspected.out)["defects"]
    places = [(d["kind"], d["tensor"], Path(d["file"] or "?").name) for d in defects]
    assert (case.kind, case.tensor, case.file) in places
    matching = [d for d, place in zip(defects, places, strict=True) if place == (case.kind, case.tensor, case.file)]
    assert case.found in matching[0]["found"]
    assert case.expected in f"expected {matching[0]['expected']}"
    for part in (case.tensor or "", case.file, case.found):
        assert part in matching[0]["message"]
    # The line that convert prints is the first of these defects.
    first = defects[0]
    assert done.stderr.startswith("fp8ckpt: " + first["message"])
    if matching[0] is first:
        for part in (case.tensor or "", case.file, case.found, case.expected):
            assert part in done.stderr
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_sound_base_is_accepted(tmp_path: Path, cli: Run) -> None:
    """What the defects are made from has none, so each refusal is of its own defect."""
    source = base(tmp_path / "fp8")
    assert cli("inspect", source).returncode == 0
    done = cli("convert", source, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")


def test_message_has_the_form_of_the_design(tmp_path: Path, cli: Run) -> None:
    """Tensor, file, found, expected, what to do, in this order, on one line."""
    source = base(tmp_path / "fp8")
    change(TWO, m__k__weight_scale_inv=floats(1, 3, 2))(source)
    done = cli("convert", source, tmp_path / "out")
    assert done.stderr == (
        f"fp8ckpt: {K} in {ONE}: scale shape (3, 2) in {TWO} does not fit weight (256, 256) "
        "with block size (128, 128); expected (2, 2); "
        "check that the configuration belongs to these weights; if it does, the scales do not\n"
    )


#: What a remedy must not say, since the files may be the user's own: it would lose them, or mix them with a release's.
UNSAFE = re.compile(r"\b(remove|delete|overwrite|fetch|download|of the release|the base that it came from)\b")
#: What is safe of it: ours, and left to the user; what is nowhere on this machine; a base that is asked for.
SAFE = (
    " to start again without the work of that run",
    "fetch the files",
    "fetch it first",
    "hf download",
    ": --like BASE",
    "if it is dead, delete this object",  # our own mark that a run writes there
)


def remedies() -> Iterator[str]:
    """Every text that is part of a remedy, of the whole package."""
    for file in sorted(Path(fp8ckpt.__path__[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            named = isinstance(node, ast.keyword) and node.arg == "remedy"
            assigned = (
                isinstance(node, ast.Assign | ast.AugAssign)
                and "remed" in ast.dump(node.targets[0] if isinstance(node, ast.Assign) else node.target).lower()
            )
            if named or assigned:
                parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                yield "".join(part for part in parts if isinstance(part, str))


def test_no_remedy_can_lose_anything() -> None:
    """None advises to remove or to fetch what may be the user's own; there are many, and each is a sentence."""
    found = [*remedies()]
    assert len(found) > 60
    assert [text for text in found if UNSAFE.search(text) and not any(words in text for words in SAFE)] == []


@pytest.mark.parametrize(("code", "remedy"), [
    (errno.EACCES, "get the permission to read it"),
    (errno.EMFILE, "raise the limit on open files (ulimit -n)"),
    (errno.EIO, "check the disk"),
    (errno.ENOENT, "restore the file"),
])  # fmt: skip
def test_what_helps_where_a_file_cannot_be_read(code: int, remedy: str) -> None:
    """By what the operating system says."""
    error = StorageError.of_reading(OSError(code, os.strerror(code)), "x")
    assert (error.found, error.remedy) == (f"cannot be opened: {os.strerror(code)}", remedy)


def test_a_file_that_an_index_names_is_not_fetched_from_a_release(tmp_path: Path) -> None:
    """The index of the base beside weights of one's own: the released file would be old weights among new ones."""
    source = base(tmp_path / "fp8")
    (source / TWO).unlink()
    (first, *_) = survey(source).defects
    assert str(first.remedy).startswith(
        "get it from where the other files came from, and from nowhere else; or use the index that"
    )


def test_inspect_lists_every_defect_and_convert_counts_them(tmp_path: Path, cli: Run) -> None:
    """Defects of five kinds at once: inspect lists all, convert names the first and says how many more there are."""
    source = base(tmp_path / "fp8")
    change(TWO, m__q__weight_scale_inv=None, m__z__weight_scale_inv=floats(1), m__k__weight_scale_inv=floats(1, 3, 2))(
        source
    )
    change(
        TWO,
        m__r__weight=codes(4, 4),
        m__r__weight_scale=floats(float("nan")),
        m__s__weight=Stored("F6_E2M3", (4, 32), bytes(96)),
    )(source)
    index(lambda value: value["weight_map"].update({"ghost": ONE}))(source)
    shown = cli("inspect", source)
    assert (shown.returncode, shown.stderr) == (1, "")
    lines = shown.stdout[shown.stdout.index("defects: ") :].splitlines()
    kinds = ["IndexMismatchError", "MissingScaleError", "OrphanScaleError", "ScaleShapeError", "ScaleValueError"]
    kinds += ["UnsupportedFormatError"]
    # The activation scale of a weight that lost its scale is no orphan.
    assert lines[0] == "defects: 6"
    assert sorted(line.split(":")[0].strip() for line in lines[1:]) == kinds
    done = cli("convert", source, tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "4 more defects: see fp8ckpt inspect" in done.stderr  # of scales that fit, values are looked at last


def test_names_of_a_file_cannot_break_the_line(tmp_path: Path, cli: Run) -> None:
    """A tensor's name with line breaks and escape sequences is shown escaped, a long one shortened."""
    source = base(tmp_path / "fp8")
    change(ONE, **{"evil\n\x1b[31m\u2028.weight": codes(4, 4), "long" * 500 + "__weight": codes(4, 4)})(source)
    for command in ("convert", "inspect"):
        done = cli(command, source, *([tmp_path / "out"] if command == "convert" else []))
        assert done.returncode == 1
        text = done.stderr + done.stdout
        assert "\x1b" not in text
        assert "\u2028" not in text
        assert "evil\\n\\x1b[31m\\u2028.weight" in text
        assert "long" * 60 not in text
    assert len(cli("convert", source, tmp_path / "out").stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["missing", "empty", "no safetensors", "text file"])
def test_nothing_to_look_at(kind: str, tmp_path: Path, cli: Run) -> None:
    """No directory, an empty one, one without safetensors, a file that is none: every command exits 1 with one line."""
    path = tmp_path / "fp8"
    if kind == "text file":
        path.write_text("hello, this is no checkpoint at all, but a text of some length")
    elif kind != "missing":
        path.mkdir()
    if kind == "no safetensors":
        (path / "config.json").write_text("{}")
    for command in (["convert", path, tmp_path / "out"], ["inspect", path], ["verify", path], ["verify", path, path]):
        done = cli(*command)
        assert done.returncode == 1
        if kind != "text file":
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1
            assert str(path) in done.stderr
        assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ([] if kind == "missing" else ["fp8"])


@pytest.mark.parametrize("kind", ["broken link", "link to a folder", "pipe"])
def test_side_file_that_cannot_be_copied(kind: str, tmp_path: Path, cli: Run) -> None:
    """A broken link, a linked folder or a pipe beside the weights is refused before anything is written."""
    source = base(tmp_path / "fp8")
    if kind == "broken link":
        (source / "strange").symlink_to("nowhere")
    elif kind == "link to a folder":
        (source / "strange").symlink_to(tmp_path, target_is_directory=True)
    else:
        os.mkfifo(source / "strange")
    done = cli("convert", source, tmp_path / "out")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "strange" in done.stderr
    assert os.listdir(tmp_path) == ["fp8"]


def test_weights_file_that_is_a_broken_link(tmp_path: Path, cli: Run) -> None:
    """A snapshot whose blob is gone names the file."""
    source = base(tmp_path / "fp8")
    (source / ONE).unlink()
    (source / ONE).symlink_to("../blobs/gone")
    done = cli("convert", source, tmp_path / "out")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert ONE in done.stderr
    shutil.rmtree(source)
    assert os.listdir(tmp_path) == []

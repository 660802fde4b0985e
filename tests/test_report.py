"""The report: every number is the oracle's, the page stands alone, and a browser shows it in light and in dark."""

from __future__ import annotations

import builtins
import json
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fp8ckpt import Fp8CheckpointError, convert, figures, open_checkpoint, report
from fp8ckpt.errors import MissingPackageError, OutputExistsError, ResumeMismatchError
from fp8ckpt.families.kinds import Place, places
from fp8ckpt.figures import page_of
from fp8ckpt.output import extents
from fp8ckpt.report import Change, CodeUse, Report, SizeRow, WeightRow
from fp8ckpt.tensors.scale_ranges import ScaleRange, outliers
from tests.conftest import Run
from tests.miniatures import families, four_bits
from tests.oracle import Stored, read_directory, read_safetensors, scale_floats, write_safetensors
from tests.stopping import CHUNK, CHUNKS, run_until
from tests.support import ALL

FAMILIES = families()


def floats(tensor: Stored) -> Any:
    """The values of a stored BF16 tensor."""
    return (np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def trained(sample_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, its BF16 form, the same with some weights changed, and that in FP8 again."""
    folder = tmp_path_factory.mktemp("trained")
    convert(sample_fp8, folder / "bf16")
    shutil.copytree(folder / "bf16", folder / "trained")
    train(folder / "trained", "0.mlp.up_proj.weight", "1.self_attn.q_proj.weight", "norm.weight")
    convert(folder / "trained", folder / "fp8", to="fp8", like=sample_fp8)
    return {"base": sample_fp8, **{name: folder / name for name in ("bf16", "trained", "fp8")}}


@pytest.fixture(scope="module", autouse=True)
def drawing() -> Iterator[Callable[[Report], str]]:
    """Drawing a page takes seconds: of equal reports, whatever was read for them, it is done once."""
    pages: dict[str, str] = {}
    draw = figures.page_of

    def page_of_equal(found: Report) -> str:
        key = repr(replace(found, bytes_read=0))
        pages[key] = pages.get(key) or draw(found)
        return pages[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "page_of", page_of_equal)
        yield draw


def train(directory: Path, *endings: str) -> None:
    """Change the values of BF16 tensors whose names end so; of all, if none is said."""
    rng = np.random.default_rng(3)
    for file in directory.glob("*.safetensors"):
        tensors = read_safetensors(file)
        for name in sorted(tensors):
            if name.endswith(endings or ("",)) and tensors[name].dtype == "BF16":
                values = floats(tensors[name]) * (1 + 0.3 * rng.standard_normal(int(np.prod(tensors[name].shape))))
                tensors[name] = Stored.of(values.astype(np.float32).reshape(tensors[name].shape), "BF16")
        write_safetensors(file, tensors, {"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_of_every_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and their classes, scales and sizes are what the stored bytes say."""
    monkeypatch.setattr("fp8ckpt.figures.page_of", lambda found: "")  # the numbers alone
    family = FAMILIES[name]
    found = report(family.write(tmp_path / "fp8"), output=tmp_path / "page.html", workers=2)
    stored_as = {family.name(key): key for key in family.blocks}
    counts: dict[str, Any] = {}
    for weight in found.weights:
        key = stored_as[weight.name]
        stored, scale = family.tensors[key], family.tensors[family.blocks[key][0]]
        codes = np.frombuffer(stored.data, np.uint8)
        counts[weight.dtype] = counts.get(weight.dtype, 0) + np.bincount(codes, minlength=256)
        values = np.abs(stored.array.astype(np.float64)).reshape(-1)
        finite = values[np.isfinite(values)]
        largest = {"F8_E4M3": 448, "F8_E5M2": 57344, "F8_E4M3FNUZ": 240, "F8_E5M2FNUZ": 57344}[weight.dtype]
        normal = {"F8_E4M3": 2**-6, "F8_E5M2": 2**-14, "F8_E4M3FNUZ": 2**-7, "F8_E5M2FNUZ": 2**-15}[weight.dtype]
        assert weight.use == CodeUse(
            codes.size,
            int((finite == 0).sum()),
            int(((finite > 0) & (finite < normal)).sum()),
            int((finite == largest).sum()),
            values.size - finite.size,
        )
        scales = scale_floats(scale).astype(np.float64).reshape(-1)
        got = weight.scales
        assert (got.count, got.least, got.greatest) == (scales.size, scales.min(), scales.max())
        assert got.median == pytest.approx(np.median(scales), rel=1e-6)
    assert {weight.name for weight in found.weights} == set(stored_as)
    assert found.codes == {dtype: tuple(total) for dtype, total in counts.items()}
    apart = {*family.dropped, *family.markers} - set(activation_scales(tmp_path / "fp8"))  # of no one weight
    assert sum(row.bytes for row in found.sizes) == sum(
        len(tensor.data) for key, tensor in family.tensors.items() if key not in apart
    )
    assert found.changes is None


def activation_scales(path: Path) -> list[str]:
    """The names of those that belong to a weight."""
    return [span.name for tensor in open_checkpoint(path).quantized for span in tensor.activation_scales]


def test_a_conversion_moved_nothing(trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 against the BF16 that it was converted to: all is compared, nothing moved; and so with fp32."""
    convert(trained["base"], tmp_path / "fp32", to="fp32")
    for other in (trained["bf16"], tmp_path / "fp32"):
        found = report(trained["base"], other, output=tmp_path / f"{other.name}.html")
        assert found.changes is not None
        assert {change.name for change in found.changes} == set(open_checkpoint(other).tensors)
        assert [c for c in found.changes if c.moved or c.mean_error or c.largest_error or c.fresh is not None] == []
        assert found.apart == ()
        monkeypatch.setattr(figures, "page_of", lambda found: "")  # a page on which nothing moved was drawn


def test_what_training_moved(trained: dict[str, Path], tmp_path: Path) -> None:
    """Moved codes, errors and new scales of an FP8 fine-tune against its base are the oracle's."""
    found = report(trained["base"], trained["fp8"], output=tmp_path / "page.html", workers=2)
    before, after = read_directory(trained["base"]), read_directory(trained["fp8"])
    assert found.changes is not None
    for change in found.changes:
        a, b = before[change.name], after[change.name]
        if a.dtype == "F8_E4M3":
            assert change.moved == int((np.frombuffer(a.data, np.uint8) != np.frombuffer(b.data, np.uint8)).sum())
            scales = before[f"{change.name}_scale_inv"], after[f"{change.name}_scale_inv"]
            assert (change.fresh, change.scales) == (int(scales[0].data != scales[1].data), 1)
            x, y = (t.array.astype(np.float64) * scale_floats(s) for t, s in zip((a, b), scales, strict=True))
        else:
            x, y = floats(a), floats(b)
            assert (change.moved, change.fresh) == (int((x != y).sum()), None)
        assert change.mean_error == pytest.approx(np.abs(x - y).sum() / np.abs(x).sum(), rel=1e-5)
        assert change.largest_error == pytest.approx(np.abs(x - y).max() / np.abs(x).max(), rel=1e-5)
    moved = {change.name for change in found.changes if change.moved}
    assert {name.rpartition("layers.")[2] for name in moved} >= {"0.mlp.up_proj.weight", "1.self_attn.q_proj.weight"}
    page = (tmp_path / "page.html").read_text()
    assert all(name in page for name in moved)


def test_values_of_a_bf16_fine_tune_against_its_fp8_base(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way about, and of two kinds: what is FP8 in one is compared as values, and codes are the base's."""
    monkeypatch.setattr(figures, "page_of", lambda found: "")  # the numbers alone
    found = report(trained["trained"], trained["base"], output=tmp_path / "page.html")
    again = report(trained["trained"], trained["bf16"], output=tmp_path / "again.html")
    assert found.changes is not None
    assert again.changes is not None
    assert [(c.name, c.moved) for c in found.changes] == [(c.name, c.moved) for c in again.changes]
    assert sum(c.moved for c in found.changes) > 0
    assert len(found.weights) == 14
    assert again.weights == ()


def test_tensors_without_a_counterpart_are_named(tmp_path: Path) -> None:
    """Of one side only, of another shape, integers against floats: told apart; integers are compared as bytes."""
    one = {
        "a": Stored("I32", (2,), np.array([1, 2], np.int32).tobytes()),
        "b": Stored("I32", (1,), bytes(4)),
        "c": Stored("BF16", (2,), bytes(4)),
        "d": Stored("BF16", (2,), bytes(4)),
    }
    two = {
        "a": Stored("I32", (2,), np.array([1, 3], np.int32).tobytes()),
        "b": Stored("F32", (1,), bytes(4)),
        "c": Stored("BF16", (1,), bytes(2)),
        "e": Stored("BF16", (2,), bytes(4)),
    }
    for name, tensors in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "model.safetensors", tensors, {"format": "pt"})
    found = report(tmp_path / "one", tmp_path / "two", output=tmp_path / "page.html")
    assert found.changes == (Change("a", "a", None, 2, 1, 0.0, 0.0, None, None),)
    assert found.apart == ("b", "c", "d", "e")
    assert "4 tensors have no counterpart: b, c, d, ..." in (tmp_path / "page.html").read_text()


def test_nan_and_infinity_are_no_error_and_no_crash(tmp_path: Path) -> None:
    """NaN in both has not moved; NaN in one has; errors are of what is finite."""
    values = np.array([1, np.nan, np.inf, 2], np.float32)
    for name, change in (("one", values), ("two", np.array([1, np.nan, 5, np.nan], np.float32))):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "model.safetensors", {"a": Stored.of(change, "F32")}, {"format": "pt"})
    found = report(tmp_path / "one", tmp_path / "two", output=tmp_path / "page.html")
    assert found.changes == (Change("a", "a", None, 4, 2, 0.0, 0.0, None, None),)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", Place("mlp.up_proj", 3)),
        ("model.layers.12.mlp.experts.7.up_proj.weight", Place("mlp.experts.*.up_proj", 12)),
        ("model.layers.0.mlp.experts.gate_up_proj", Place("mlp.experts.gate_up_proj", 0)),
        ("vision_tower.layers.1.wq.weight", Place("vision_tower.layers.*.wq", 1)),
        ("lm_head.weight", Place("lm_head", None)),
        ("blocks.5", Place("blocks.*.*", 5)),
    ],
)
def test_kinds_and_layers(name: str, place: Place) -> None:
    """A number is a layer, or an expert behind one; parts of a model with fewer layers carry their name."""
    text = [f"model.layers.{i}.norm.weight" for i in range(40)]
    assert places([*text, name])[name] == place


def test_scales_that_stand_out() -> None:
    """More than eight times the median of the kind, or less than an eighth, at either end of a weight's scales."""
    ranges = {str(i): ScaleRange(4, 1.0, 2.0, 4.0) for i in range(9)}
    assert outliers(ranges) == {}
    odd = {
        "large": ScaleRange(4, 1.0, 2.0, 33.0),
        "small": ScaleRange(4, 0.1, 2.0, 4.0),
        "empty": ScaleRange(0, 0, 0, 0),
    }
    assert outliers({**ranges, **odd}) == {"large": 33.0 / 4, "small": 0.1}


def whole_model(layers: int, experts: int) -> Report:
    """What is found of a model as large as DeepSeek-V3, and all of it moved."""
    kinds = [*(f"self_attn.{leaf}" for leaf in ("q_a", "q_b", "kv_a", "kv_b", "o")), "mlp.shared_experts.up_proj"]
    names = [(f"{kind}", layer, "") for layer in range(layers) for kind in kinds]
    for layer in range(layers):
        for leaf in ("gate", "up", "down"):
            names += [(f"mlp.experts.*.{leaf}", layer, str(expert)) for expert in range(experts)]
    rng = np.random.default_rng(0)
    weights, changes = [], []
    for kind, layer, expert in names:
        name = f"model.layers.{layer}.{kind.replace('*', expert)}.weight"
        low, middle, high = sorted(rng.lognormal(-7, 1, 3))
        use = CodeUse(10**7, 10, 1000, 20, 0)
        weights.append(WeightRow(name, kind, layer, "F8_E4M3", ScaleRange(896, low, middle, high), high, use))
        moved = int(rng.integers(1, 10**6))
        changes.append(Change(name, kind, layer, 10**7, moved, rng.random() / 100, rng.random(), 5, 896))
    codes = {"F8_E4M3": tuple(int(count) for count in rng.integers(0, 10**9, 256))}
    sizes = tuple(SizeRow(f"kind {i}", "F8_E4M3", 61, 10**9 * i) for i in range(40))
    paths = (Path("a"), Path("b"))
    return Report(paths, len(names), 671 * 10**9, sizes, tuple(weights), codes, tuple(changes), (), 10**12)


def test_the_page_of_a_671b_model_is_small() -> None:
    """5,000 weights (in the campaign 45,000), all moved, all scales new in part: under 2 MB, and in no proportion to
    the weights.
    """
    page = page_of(whole_model(61, 256 if ALL else 24))
    assert len(page.encode()) < 2_000_000
    assert len(page.encode()) < 1.05 * len(page_of(whole_model(61, 8)).encode())


def test_the_page_stands_alone(
    trained: dict[str, Path], tmp_path: Path, drawing: Callable[[Report], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No script, no link that leads outside, no picture, font or style from elsewhere; the same page at each run."""
    monkeypatch.setattr(figures, "page_of", drawing)
    for name in ("a", "b"):
        report(trained["base"], trained["fp8"], output=tmp_path / name)
    page = (tmp_path / "a").read_text()
    assert page == (tmp_path / "b").read_text()
    outside = set(re.findall(r"\w+://[^\"'\s<>]+", page))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<script|<img|<iframe|@import|@font-face|src=", page)
    assert set(re.findall(r"(?:href|url)[=(]\"?([^\")]{1,5})", page)) <= {"data:"} | set(re.findall(r"#\w{4}", page))


def test_names_are_text_wherever_they_are_shown(tmp_path: Path) -> None:
    """What a header holds is no markup, no formula and no line break of the page; and no warning of a font's lack."""
    name = 'layers.0.\u5c42 <script>alert(1)</script> $x_1$ & "q" \'.weight'
    source = tmp_path / "<b>fp8"
    source.mkdir()
    tensors = {
        name: Stored.codes(np.full((4, 4), 0x3A, np.uint8)),
        f"{name}_scale_inv": Stored.of(np.float32(1), "F32"),
    }
    write_safetensors(source / "model.safetensors", tensors, {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(source, output=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<b>fp8" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x_1$" in page


def test_refusals(sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is there, a checkpoint that is defective, no plotting library: told before a byte is read, and
    nothing is left.
    """
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(OutputExistsError):
        report(sample_fp8, output=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "mine"
    broken = Path(shutil.copytree(sample_fp8, tmp_path / "broken"))
    min(broken.glob("*.safetensors")).unlink()
    with pytest.raises(Fp8CheckpointError):
        report(broken, output=tmp_path / "other.html")
    importing = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"pip install 'fp8ckpt\[report\]'"):
        report(sample_fp8, output=tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_command_line(trained: dict[str, Path], tmp_path: Path, cli: Run) -> None:
    """A line or two for people, all numbers for machines; the page is where it was asked for."""
    done = cli("report", trained["base"], trained["fp8"], "-o", tmp_path / "new" / "page.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"page.html: [\d.]+ kB, of [\d.]+ MB that were read\n.* elements moved\n", done.stdout)
    part = lacking(trained["fp8"], tmp_path / "part", "layers.1.mlp.up_proj")
    done = cli("report", trained["base"], part, "-o", tmp_path / "part.html")
    assert "elements moved; 1 tensors have no counterpart\n" in done.stdout
    done = cli("report", trained["base"], "--output", tmp_path / "page.html", "--json")
    found = json.loads(done.stdout)
    assert found["page"] == str(tmp_path / "page.html")
    assert len(found["weights"]) == 14
    assert found["changes"] is None
    assert cli("report", trained["base"], "-o", tmp_path / "page.html").returncode == 1


def lacking(source: Path, directory: Path, part: str) -> Path:
    """A copy in one file, without the tensors that have this in their names."""
    directory.mkdir()
    tensors = {name: tensor for name, tensor in read_directory(source).items() if part not in name}
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    shutil.copy(source / "config.json", directory)
    return directory


class InPassing(NamedTuple):
    """A conversion that draws, of ``trained`` or of a family: its arguments, and which side the page is of first."""

    source: str
    how: dict[str, Any]
    first: str


IN_PASSING = {
    **{name: InPassing(name, {"to": "bf16"}, name) for name in {**FAMILIES, **four_bits()}},
    "base to fp16": InPassing("base", {"to": "fp16"}, "base"),
    "back, untouched": InPassing("bf16", {"like": "base"}, "base"),
    "back, trained": InPassing("trained", {"like": "base"}, "base"),
    "back, without a report": InPassing("trained", {"like": "base", "report": False}, "base"),
    "back, fresh scales": InPassing("trained", {"like": "base", "scales": "fresh"}, "base"),
    "back, more carried": InPassing("less", {"like": "base", "carry": "layers.1"}, "base"),
    "in blocks": InPassing("trained", {"scheme": "block"}, "trained"),
    "by channel": InPassing("trained", {"scheme": "channel"}, "trained"),
    "one scale each": InPassing("trained", {"scheme": "per-tensor"}, "trained"),
    **{
        f"back to {name}": InPassing("turned", {"like": name}, name)
        for name in ("block 128 ragged BF16", "per-channel [o]", "experts in blocks", "gpt-oss", "ModelOpt NVFP4")
    },
    "back, a fresh factor": InPassing("turned", {"like": "ModelOpt NVFP4", "scales": "fresh"}, "ModelOpt NVFP4"),
}


@pytest.mark.parametrize("case", IN_PASSING)
def test_a_conversion_draws_in_the_same_pass(
    case: str, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it counts as the bytes pass is what `report` finds of both sides; and neither is read for it again."""
    source, how, first = IN_PASSING[case]
    pages: list[Report] = []
    monkeypatch.setattr("fp8ckpt.figures.page_of", lambda found: pages.append(found) or "")
    monkeypatch.setattr(extents, "CHUNK", 4096)
    monkeypatch.setattr(extents, "EXTENT", 16384)
    families = {**FAMILIES, **four_bits()}
    if first in families:
        families[first].write(tmp_path / first)
    paths = {**trained, first: trained.get(first, tmp_path / first), "turned": tmp_path / "turned"}
    if source == "less":
        paths["less"] = lacking(trained["trained"], tmp_path / "less", "layers.1.mlp")
    if source == "turned":
        convert(paths[first], tmp_path / "turned")
        train(tmp_path / "turned")
    if "like" in how:
        how = {**how, "like": paths[how["like"]]}
    with monkeypatch.context() as patch:
        patch.delattr(sys.modules["fp8ckpt.report"].Walk, "run")
        convert(paths[source], tmp_path / "out", **how, report_html=tmp_path / "drawn.html", workers=2)
    found = report(paths[first], tmp_path / "out", output=tmp_path / "page.html")
    drawn, expected = (replace(page, changes=None, bytes_read=0) for page in (pages[0], found))
    assert drawn == expected
    assert pages[0].changes is not None
    assert found.changes is not None
    for change, other in zip(pages[0].changes, found.changes, strict=True):
        errors = (other.mean_error, other.largest_error)
        assert (change.mean_error, change.largest_error) == pytest.approx(errors, rel=1e-6)
        assert replace(change, mean_error=0, largest_error=0) == replace(other, mean_error=0, largest_error=0)
    assert source not in ("trained", "turned") or any(change.moved for change in found.changes)


def test_a_page_of_a_run_that_was_cut_off(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was counted before is taken up with what was written, and only by a run that draws."""
    back = ("convert", trained["trained"], tmp_path / "out", "--like", trained["base"], "--workers", "1")
    drawing = ("--report-html", tmp_path / "page.html")
    assert run_until("record", 5, signal.SIGKILL, *back, *drawing).returncode < 0
    monkeypatch.setattr(extents, "CHUNK", CHUNK)
    monkeypatch.setattr(extents, "EXTENT", CHUNK * CHUNKS)
    with pytest.raises(ResumeMismatchError):
        convert(trained["trained"], tmp_path / "out", like=trained["base"])
    assert convert(
        trained["trained"], tmp_path / "out", like=trained["base"], report_html=tmp_path / "page.html"
    ).bytes_resumed
    report(trained["base"], tmp_path / "out", output=tmp_path / "same.html")
    assert (tmp_path / "page.html").read_text() == (tmp_path / "same.html").read_text()


def test_convert_draws_it_too(trained: dict[str, Path], tmp_path: Path, cli: Run) -> None:
    """--report-html is the page that `report` writes of base and output; a page that is there is refused first."""
    back = ("convert", trained["trained"], tmp_path / "fp8", "--to", "fp8", "--like", trained["base"])
    (tmp_path / "page.html").write_text("mine")
    assert cli(*back, "--report-html", tmp_path / "page.html").returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    done = cli(*back, "--report-html", tmp_path / "drawn.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{tmp_path / 'drawn.html'}: a picture of it\n")
    report(trained["base"], tmp_path / "fp8", output=tmp_path / "same.html")
    assert (tmp_path / "drawn.html").read_text() == (tmp_path / "same.html").read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
@pytest.mark.parametrize(("scheme", "paper"), [("light", (253, 253, 252)), ("dark", (21, 24, 28))])
def test_a_browser_shows_it(scheme: str, paper: tuple[int, ...], trained: dict[str, Path], tmp_path: Path) -> None:
    """In a real one, headless: the paper is the scheme's, text and bars are drawn on it, the console is silent, and all
    of the page fits its width.
    """
    from PIL import Image

    assert CHROMIUM is not None
    report(trained["base"], trained["fp8"], output=tmp_path / "page.html")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars"
    done = subprocess.run(
        [CHROMIUM]
        + [
            f"--{flag}"
            for flag in [*flags.split(), "disable-component-update", "disable-sync", "enable-logging=stderr"]
        ]
        + [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", f"--user-data-dir={tmp_path / 'profile'}"]
        + ["--window-size=1150,3600", f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert tuple(pixels[5, 5]) == paper
    drawn = (pixels != np.array(paper, np.uint8)).any(axis=2)
    assert 0.02 < drawn.mean() < 0.5
    assert drawn[300:2000].any(axis=1).mean() > 0.3  # figures and tables, all the way down
    assert not drawn[:, -8:].any()  # nothing runs over the edge
    contrast = np.abs(pixels.astype(int) - np.array(paper)).sum(axis=2)
    assert contrast.max() > 500  # text is legible on it


def test_what_stands_where_the_page_is_written(sample_fp8: Path, tmp_path: Path) -> None:
    """A file of somebody's at the page's name with ".partial" is refused before anything is read, and stays."""
    (tmp_path / "page.html.partial").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"page\.html\.partial: the path exists"):
        report(sample_fp8, output=tmp_path / "page.html")
    assert (tmp_path / "page.html.partial").read_text() == "mine"


@pytest.mark.parametrize("name", ["out", "out.partial/page.html", "../{}/out"])
def test_a_page_where_the_output_is_written(name: str, sample_fp8: Path, tmp_path: Path) -> None:
    """It could not be drawn once all is converted."""
    with pytest.raises(ValueError, match="where the output is written"):
        convert(sample_fp8, tmp_path / "out", report_html=tmp_path / name.format(tmp_path.name))
    assert not [*tmp_path.iterdir()]


def test_a_page_that_appears_meanwhile(sample_fp8: Path, tmp_path: Path) -> None:
    """It is not replaced."""
    page = tmp_path / "page.html"
    with pytest.raises(OutputExistsError):
        report(sample_fp8, output=page, progress=lambda *_: page.write_text("mine"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]

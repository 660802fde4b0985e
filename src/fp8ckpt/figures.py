"""A report as one HTML page: SVG figures inside it, tables, and no script; it never needs a network.

matplotlib draws. Its colours are placeholders for variables of the page, so that one drawing suits a light and a dark
screen. The meaning of a cell or a bar is a title that appears under the pointer. Everything is a row for each kind and
layer, so the page is small for a model of any size.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8ckpt.errors import MissingPackageError, shown
from fp8ckpt.numerics.codes import code_values
from fp8ckpt.tensors.scale_ranges import FAR, ScaleRange, joined, outliers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp8ckpt.report import Change, Report, WeightRow

_MOST_KINDS = 30  # rows of a figure or a table; the page says how many are left out
_MOST_ROWS = 20
_NARROW = 8
_MARKS = (2.0**-4, 1.0, 2.0**4, 2.0**8, 2.0**12)  # values that label the axis of codes, besides its ends and zero
_UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}  # the largest first

# Placeholders for the page's colours, which the style sheet below defines for light and for dark.
_INK, _MUTED, _GRID, _SERIES = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)", _SERIES: "var(--series)"}

_STYLE = """
:root { color-scheme: light dark; }
:root { --paper: #fdfdfc; --ink: #1d2126; --muted: #5c6570; --grid: #dfe2e6; --series: #1f6fb4; --card: #f3f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e8eb; --muted: #9aa4af; --grid: #343a42; --series: #6cb2eb; --card: #1e2329; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 40px 0 4px; }
p { margin: 4px 0 12px; color: var(--muted); max-width: 75ch; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0; }
.tile { background: var(--card); border-radius: 8px; padding: 8px 14px; } .tile b { display: block; font-size: 19px; }
.tile span { color: var(--muted); font-size: 13px; }
.wide { overflow-x: auto; } svg { display: block; height: auto; max-width: 100%; font-family: system-ui, sans-serif; }
table { border-collapse: collapse; font-size: 14px; } th { text-align: left; color: var(--muted); font-weight: 600; }
th, td { padding: 3px 14px 3px 0; border-bottom: 1px solid var(--grid); white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
"""


def require_library() -> None:
    """Raise `MissingPackageError` if the plotting library is missing."""
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise MissingPackageError.of_report() from error


def page_of(found: Report) -> str:
    """Return the whole page."""
    title = " and ".join(shown(PurePath(path).name or path) for path in found.paths)
    sections = [_overview(found), _sizes(found)]
    if found.changes is not None:
        sections += _moved(found.changes, found.apart)
    if found.weights:
        sections += [_scales(found.weights), _codes(found), _activations(found.weights), _stand_out(found.weights)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)} - fp8ckpt report</title>'
        f"<style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )


# ---------------------------------------------------------------- sections


def _section(title: str, text: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{''.join(parts)}</section>"


def _overview(found: Report) -> str:
    coded = sum(weight.use.codes for weight in found.weights)
    tiles = {"tensors": f"{found.tensors:,}", "elements": f"{found.elements:,}", "FP8 elements": f"{coded:,}"}
    if found.changes is not None:
        tiles["elements moved"] = _percent(
            sum(change.moved for change in found.changes), sum(change.elements for change in found.changes)
        )
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for label, value in tiles.items())
    paths = "<br>".join(html.escape(shown(path)) for path in found.paths)
    return f'<p>{paths}</p><div class="tiles">{cells}</div>'


def _sizes(found: Report) -> str:
    rows = found.sizes[:_MOST_ROWS]
    total = sum(row.bytes for row in found.sizes)
    unit, per_unit = next((unit for unit in _UNITS.items() if total >= 100 * unit[1]), ("B", 1))

    def draw(figure: Figure) -> dict[str, str]:
        axes = figure.add_subplot()
        bars = axes.barh(range(len(rows)), [row.bytes / per_unit for row in rows], color=_SERIES, height=0.7)
        axes.set_yticks(range(len(rows)), [f"{_short(row.kind)}  {row.dtype}" for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        _plain(axes, grid="x")
        titles = [f"{row.kind}, {row.dtype}: {row.tensors:,} tensors, {_size(row.bytes)}" for row in rows]
        return _name(bars, titles)

    text = f"What the tensors of each kind take, of {_size(total)} in all; scales are counted with their weights."
    return _section("Sizes", text + _left_out(len(found.sizes), len(rows)), _svg(draw, 9, 0.8 + 0.27 * len(rows)))


def _scales(weights: Sequence[WeightRow]) -> str:
    text = (
        "The scales of each kind by layer: the median, and the band from the least to the greatest. One axis for all."
    )
    return _section("Scales", *_panels(weights, lambda weight: weight.scales, text))


def _activations(weights: Sequence[WeightRow]) -> str:
    known = [weight for weight in weights if weight.activation_scale is not None]
    if not known:
        return _section("Activation scales", "There are none: activations are quantized as they come.")

    def one(weight: WeightRow) -> ScaleRange:
        scale = weight.activation_scale or 0.0
        return ScaleRange(1, scale, scale, scale)

    return _section("Activation scales", *_panels(known, one, "The same of the static scales of activations."))


def _panels(weights: Sequence[WeightRow], range_of: Callable[[WeightRow], ScaleRange], text: str) -> tuple[str, str]:
    """Return (the text, a small figure for each kind): ranges by layer."""
    kinds = _by_kind_and_layer(weights)
    names = list(kinds)[:_MOST_KINDS]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)

    def draw(figure: Figure) -> dict[str, str]:
        from matplotlib.ticker import MaxNLocator

        titles: dict[str, str] = {}
        spread: set[float] = set()
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
        for axes, name in zip(panels, names, strict=False):
            ranges = {layer: joined(map(range_of, group)) for layer, group in kinds[name].items()}
            ranges = {layer: each for layer, each in ranges.items() if each.least > 0}
            layers = list(ranges)
            each = ranges.values()
            axes.fill_between(
                layers, [r.least for r in each], [r.greatest for r in each], color=_SERIES, alpha=0.25, lw=0
            )
            axes.plot(layers, [r.median for r in each], color=_SERIES, lw=1.2, marker="o", ms=2.5)
            axes.set_title(_short(name), fontsize=9, color=_INK, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            spread.update(end for r in each for end in (r.least, r.greatest))
            _plain(axes, grid="y")
        if spread and max(spread) > _NARROW * min(spread):  # otherwise no power of two may be on the axis
            panels[0].set_yscale("log", base=2)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        for axes in panels[: len(names)][-columns:]:  # the last of each column
            axes.set_xlabel("layer")
            axes.tick_params(labelbottom=True)
        return titles

    return text + _left_out(len(kinds), len(names)), _svg(draw, 11, 0.6 + 1.7 * rows)


def _codes(found: Report) -> str:
    figures = [_svg(_histogram(dtype, counts), 11, 2.8) for dtype, counts in found.codes.items()]
    rows: list[tuple[str, ...]] = []
    for kind, layers in _by_kind_and_layer(found.weights).items():
        uses = [weight.use for group in layers.values() for weight in group]
        total = sum(use.codes for use in uses)
        parts = [sum(getattr(use, what) for use in uses) for what in ("zeros", "subnormals", "saturated", "nonfinite")]
        rows.append((kind, f"{total:,}", *(_percent(part, total) for part in parts)))
    text = (
        "How often each code occurs, in the order of the values that codes have before they are scaled. Many subnormal "
        "codes mean scales that are too large for their weights; saturated ones, that values were clipped or just fit."
    )
    head = ("kind", "codes", "zero", "subnormal", "saturated", "NaN or infinite")
    return _section("Codes", text + _left_out(len(rows), _MOST_KINDS), *figures, _table(head, rows[:_MOST_KINDS]))


def _histogram(dtype: str, counts: Sequence[int]) -> Callable[[Figure], dict[str, str]]:
    values = code_values(dtype)
    finite = sorted((float(value), code) for code, value in enumerate(values) if abs(value) < float("inf"))
    total = max(1, sum(counts))

    def draw(figure: Figure) -> dict[str, str]:
        axes = figure.add_subplot()
        shares = [100 * counts[code] / total for _, code in finite]
        bars = axes.bar(range(len(finite)), shares, width=0.9, color=_SERIES)
        marks = [i for i, (value, _) in enumerate(finite) if abs(value) in _MARKS]
        middle = [i for i, (value, _) in enumerate(finite) if value == 0][:1]
        ticks = [0, *marks, *middle, len(finite) - 1]
        axes.set_xticks(ticks, [f"{finite[i][0]:.4g}" for i in ticks], rotation=60, fontsize=8)
        axes.set_ylabel("% of all codes")
        axes.set_title(dtype, fontsize=9, color=_INK, loc="left")
        axes.margins(x=0.01)
        _plain(axes, grid="y")
        return _name(bars, [f"code {code:#04x}, {value:g}: {_percent(counts[code], total)}" for value, code in finite])

    return draw


def _stand_out(weights: Sequence[WeightRow]) -> str:
    found: list[tuple[float, WeightRow]] = []
    for layers in _by_kind_and_layer(weights).values():
        group = {weight.name: weight for members in layers.values() for weight in members}
        far = outliers({name: weight.scales for name, weight in group.items()})
        found += [(factor, group[name]) for name, factor in far.items()]
    text = f"Weights whose scales are more than {FAR:g} times those of their kind, or less than one in {FAR:g}."
    if not found:
        return _section("Scales that stand out", text + " There are none.")
    found.sort(key=lambda item: -max(item[0], 1 / item[0]))
    rows = [
        (weight.name, f"{factor:.3g} x", *(f"{each:.3g}" for each in (weight.scales.least, weight.scales.greatest)))
        for factor, weight in found[:_MOST_ROWS]
    ]
    head = ("weight", "of its kind's", "least", "greatest")
    return _section("Scales that stand out", text + _left_out(len(found), len(rows)), _table(head, rows))


def _moved(changes: Sequence[Change], apart: Sequence[str]) -> list[str]:
    coded = any(change.fresh is not None for change in changes)
    total, moved = sum(change.elements for change in changes), sum(change.moved for change in changes)
    scales, fresh = (sum(getattr(change, what) or 0 for change in changes) for what in ("scales", "fresh"))
    text = (
        f"{_percent(moved, total)} of {total:,} elements: FP8 codes that differ where both are FP8, values that differ "
        "elsewhere. An empty cell has not moved; kinds of which nothing moved have no row."
    )
    if coded:
        text += f" Of {scales:,} scales {scales - fresh:,} were kept, and {fresh:,} are new."
    if apart:
        first = ", ".join(html.escape(shown(name)) for name in apart[:3])
        text += f" {len(apart):,} tensors have no counterpart: {first}{', ...' if len(apart) > 3 else ''}."
    moving = {change.kind for change in changes if change.moved or change.fresh}
    kinds = _by_kind_and_layer(change for change in changes if change.kind in moving)
    names = list(kinds)[:_MOST_KINDS]
    maps = [
        _heat_map(kinds, names, "elements moved", lambda group: _ratio(group, "moved", "elements")),
        _heat_map(kinds, names, "mean error, of the mean magnitude", _mean_error),
    ]
    if fresh:
        maps.append(_heat_map(kinds, names, "scales that are new", lambda group: _ratio(group, "fresh", "scales")))
    most = sorted((change for change in changes if change.moved), key=lambda change: -change.moved / change.elements)
    rows = [
        (
            change.name,
            f"{change.moved:,}",
            _percent(change.moved, change.elements),
            f"{change.mean_error:.3g}",
            f"{change.largest_error:.3g}",
            "" if change.fresh is None else f"{change.fresh:,} of {change.scales:,}",
        )
        for change in most[:_MOST_ROWS]
    ]
    head = ("tensor", "moved", "share", "mean error", "largest error", "new scales")
    return [
        _section("What moved", text + _left_out(len(kinds), len(names)), *maps),
        _section(
            "Most moved", f"The {len(rows)} tensors of which most moved." if rows else "Nothing.", _table(head, rows)
        ),
    ]


def _ratio(group: Sequence[Change], part: str, whole: str) -> float:
    total = sum(getattr(change, whole) or 0 for change in group)
    return sum(getattr(change, part) or 0 for change in group) / total if total else 0.0


def _mean_error(group: Sequence[Change]) -> float:
    return sum(change.mean_error * change.elements for change in group) / max(1, sum(c.elements for c in group))


def _heat_map(
    kinds: Mapping[str, Mapping[int, Sequence[Change]]],
    names: Sequence[str],
    label: str,
    value_of: Callable[[Sequence[Change]], float],
) -> str:
    """Draw a cell for each kind and layer. Colours have a logarithmic scale; zero is no cell."""
    values = {(i, layer): value_of(group) for i, name in enumerate(names) for layer, group in kinds[name].items()}
    positive = [value for value in values.values() if value > 0]
    if not positive:
        return ""

    def draw(figure: Figure) -> dict[str, str]:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, LogNorm
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        most = max(positive)
        least = min(*positive, most / 10)
        norm = LogNorm(max(least, most * 1e-6), most, clip=True)
        colours = ListedColormap(colormaps["viridis"](np.linspace(0.12, 1.0, 256)))  # the first are lost on black
        titles = {}
        for (i, layer), value in values.items():
            cell = Rectangle((layer - 0.46, i - 0.46), 0.92, 0.92, lw=0.4, ec=_GRID)
            cell.set_facecolor(colours(norm(value)) if value > 0 else "none")
            cell.set_gid(f"cell-{i}-{layer}")
            axes.add_patch(cell)
            titles[f"cell-{i}-{layer}"] = f"{names[i]}, layer {layer}: {label} {_figure(value)}"
        last = max(layer for _, layer in values)
        axes.set_xlim(-0.6, last + 0.6)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.set_xlabel("layer")
        axes.set_title(label, fontsize=9, color=_INK, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(axes, grid="")
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.01, fraction=0.03, aspect=50)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=_MUTED, which="both", labelsize=8, length=0)
        return titles

    return _svg(draw, 11, 1.0 + 0.3 * len(names))


# ---------------------------------------------------------------- drawing


def _svg(draw: Callable[[Figure], dict[str, str]], width: float, height: float) -> str:
    """Return what ``draw`` draws, in inches, as an SVG element. ``draw`` returns the titles of parts by their ids."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "fp8ckpt", "font.family": "sans-serif", "font.size": 9,
        "text.color": _INK, "axes.labelcolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED,
        "axes.edgecolor": _GRID, "grid.color": _GRID,
    }  # fmt: skip
    out = io.StringIO()
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # only measured: the reader's fonts draw the text
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        titles = draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", drawn)  # the font family of the page
    for stand_in, variable in _VARIABLES.items():
        drawn = drawn.replace(stand_in, variable)
    for gid, text in titles.items():
        drawn = drawn.replace(f'<g id="{gid}">', f"<g><title>{html.escape(text)}</title>", 1)
    drawn = re.sub(r">\s+<", "><", drawn)
    return f'<div class="wide">{drawn}</div>'


def _plain(axes: Axes, grid: str) -> None:
    """Remove the frame and the tick marks, and draw a grid along one axis, or none."""
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, which="both")
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, lw=0.6)  # type: ignore[arg-type]  # one of three words


def _name(parts: Iterable[Any], titles: Sequence[str]) -> dict[str, str]:
    """Give ids to the drawn parts, and return their titles by id."""
    found = {}
    for i, (part, title) in enumerate(zip(parts, titles, strict=True)):
        part.set_gid(f"part-{i}")
        found[f"part-{i}"] = title
    return found


def _by_kind_and_layer(rows: Iterable[Any]) -> dict[str, dict[int, list[Any]]]:
    """Return rows by kind, then by layer, in order. Tensors outside of the layers count as layer 0."""
    kinds: dict[str, dict[int, list[Any]]] = {}
    for row in rows:
        kinds.setdefault(row.kind, {}).setdefault(row.layer or 0, []).append(row)
    return {kind: dict(sorted(layers.items())) for kind, layers in kinds.items()}


# ---------------------------------------------------------------- text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table. All columns except the first are aligned right."""
    if not rows:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i else ''}>{html.escape(shown(cell))}</{tag}>" for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{line(head, "th")}</tr>{body}</table></div>'


def _left_out(count: int, kept: int) -> str:
    return f" {count - kept:,} more are left out." if count > kept else ""


def _short(name: str) -> str:
    """Return a kind as a label, with dollar signs escaped, which matplotlib takes for formulas."""
    text = shown(name).replace("$", r"\$")
    return text if len(text) <= 44 else f"...{text[-41:]}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "-"


def _figure(value: float) -> str:
    return f"{value:.3g}"


def _size(count: float) -> str:
    unit, per_unit = next((unit for unit in _UNITS.items() if count >= unit[1]), ("B", 1))
    return f"{count / per_unit:.4g} {unit}"

"""The tables of the READMEs, made from the dated results: ``python -m benchmarks.table`` writes them into the pages.

The newest result of each benchmark counts. For repeated runs the median is shown, for whole processes the best. A ratio
is the peer's time divided by ours, in one run, and a floor's in the same way: above 1, ours takes less.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring import RESULTS, ROOT, TOUCH

BEGIN, END = "<!-- made by `python -m benchmarks.table` -->", "<!-- to here -->"


class Row(NamedTuple):
    """A line of a table; ``headline``: of the short one, too."""

    result: str  # the name of the benchmark's result
    what: str
    ours: str
    other: str
    ratio: float | None = None
    aim: str = ""
    headline: bool = False


def newest(name: str) -> dict[str, Any] | None:
    """The newest result of a benchmark, with its day; None if there is none."""
    found = sorted(RESULTS.glob(f"????-??-??-{name}.json"))
    return json.loads(found[-1].read_text()) if found else None


def rows() -> list[Row]:
    """All lines of which there are results."""
    return [row for name, make in MAKERS.items() if (result := newest(name)) is not None for row in make(name, result)]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _rate(per_second: float) -> str:
    return f"{per_second / 1e9:.2g} G elements/s"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def _floor(name: str, result: dict[str, Any]) -> Iterator[Row]:
    for what, row in result["seconds"].items():
        yield Row(name, f"the floor: {what}", f"{result['bytes'] / row['median'] / 1e9:.2g} GB/s", "")


def _kernel(name: str, result: dict[str, Any]) -> Iterator[Row]:
    for layout, rates in result["rates"].items():
        what = f"dequantize, {layout}, warm memory"
        peer = f"`(w.float() * s).to(bf16)`: {_rate(rates['torch'])}"
        yield Row(name, what, _rate(rates["ours"]), peer, rates["ours"] / rates["torch"], "10 x")
        yield Row(
            name, "", "", f"`copy_` of the result: {_rate(rates['copy'])}", rates["ours"] / rates["copy"], "0.9 x"
        )


def _four_bits(name: str, result: dict[str, Any]) -> Iterator[Row]:
    for layout, rates in result["rates"].items():
        for peer, rate in rates.items():
            if peer != "ours":
                what = f"dequantize, {layout}" if peer == "compressed-tensors" else ""
                label = "`copy_` of the result" if peer == "copy" else peer
                ours = _rate(rates["ours"]) if what else ""
                aim = "0.5 x" if peer == "copy" else ""
                yield Row(name, what, ours, f"{label}: {rate / 1e9:.2g} G", rates["ours"] / rate, aim)


def _one_weight(name: str, result: dict[str, Any]) -> Iterator[Row]:
    for layout in ("per tensor", "128 x 128"):
        seconds = {peer: row["median"] for peer, row in result[layout]["seconds"].items()}
        yield from _against(name, f"quantize one weight, 28672 x 12288, {layout}, fresh scales", seconds)


def _against(name: str, what: str, seconds: dict[str, float], ours: str = "ours", **more: Any) -> Iterator[Row]:
    """A line for each peer, the fastest first, which says what is measured."""
    first = True
    for peer, took in sorted(seconds.items(), key=lambda item: item[1]):
        if not peer.startswith("ours"):
            label = f"{peer}: {_time(took)}"
            own = (what, _time(seconds[ours])) if first else ("", "")
            yield Row(name, *own, label, took / seconds[ours], **(more if first else {}))
            first = False


def _opening(name: str, result: dict[str, Any]) -> Iterator[Row]:
    for model, found in result["checkpoints"].items():
        seconds = found["seconds"]
        what = f"open {model} ({found['stored_tensors']:,} tensors, {found['files']} files)"
        theirs = "torch HuggingFaceStorageReader"
        aim = "0.5 s" if found["files"] < 100 else "1 s"
        ratio = seconds[theirs] / seconds["open_checkpoint"]
        inspected, command = seconds["inspect, scales read"], seconds["inspect, whole process"]
        ours = f"{_time(seconds['open_checkpoint'])}; `inspect` {_time(inspected)}, the command {_time(command)}"
        yield Row(name, what, ours, f"torch's reader: {_time(seconds[theirs])}", ratio, aim, headline=True)


def _convert(name: str, result: dict[str, Any]) -> Iterator[Row]:
    what = f"`convert` {_gigabytes(result['source_bytes'])} to {_gigabytes(result['written_bytes'])}, on disk"
    seconds = {run: row["median"] for run, row in result["seconds"].items()}
    yield from _against(name, what, seconds, next(iter(seconds)), aim="0.87 x the raw write", headline=True)


def _compressed(name: str, result: dict[str, Any]) -> Iterator[Row]:
    best = {run: min(one["seconds"] for one in runs) for run, runs in result["runs"].items()}
    what = f"`convert` {_gigabytes(result['source_bytes'])} in 128 x 128 blocks, whole process"
    yield from _against(name, what, best)


def _quantize(name: str, result: dict[str, Any]) -> Iterator[Row]:
    seconds = {run: row["median"] for run, row in result["seconds"].items()}
    sizes = f"{_gigabytes(result['source'])} to {_gigabytes(result['output'])}"
    for ours in [run for run in seconds if run.startswith("ours")]:
        what = f"`convert --to fp8 --like`, {sizes}, {ours.removeprefix('ours, ')}"
        peers = {peer: took for peer, took in seconds.items() if not peer.startswith("ours")}
        yield from _against(name, what, {ours: seconds[ours], **peers}, ours, headline=ours.endswith("kept, report"))


def _memory(name: str, result: dict[str, Any]) -> Iterator[Row]:
    if "runs" in result:
        found = {
            f"{_gigabytes(run['source_bytes'])}": run["peak"] - result["torch_alone"] for run in result["runs"].values()
        }
    else:
        found = {what: run["above_torch"] for what, run in result.items() if what != "facts"}
    grown = "; ".join(f"{what}: {_mebibytes(above)}" for what, above in found.items())
    way = "to fp8" if name.startswith("quantize") else "to bf16"
    yield Row(
        name, f"memory of `convert` {way} above torch's import", grown, "", aim="256 MiB", headline="runs" in result
    )


def _ranks(name: str, result: dict[str, Any]) -> Iterator[Row]:
    runs = result["runs"]
    for ranks in dict.fromkeys(run.rpartition(", ")[2] for run in runs):
        of_ranks = {run.rpartition(", ")[0]: found for run, found in runs.items() if run.endswith(", " + ranks)}
        count = ranks.split()[0]
        model = "experts, `load_pretrained`" if name == "moe" else "`load_model`"
        for when, what in (("seconds", "fresh memory"), ("again", "the same memory again")):
            best = {way: min(r[when] for r in found) for way, found in of_ranks.items() if when in found[0]}
            if len(best) > 1:
                headline = when == "seconds" and name == "loading"
                floor = best.pop(TOUCH, None)
                yield from _against(name, f"{model}, {count} rank(s), {what}", best, aim="5 x", headline=headline)
                if floor is not None:
                    yield Row(name, "", "", f"the floor, {TOUCH}: {_time(floor)}", floor / best["ours"])


def _saving(name: str, result: dict[str, Any]) -> Iterator[Row]:
    best = {way: min(run["seconds"] for run in runs) for way, runs in result["runs"].items()}
    what = f"`save_model`, 2 ranks, {_gigabytes(result['bytes'])} of bf16"
    yield from _against(name, what, {"ours": best["ours"], "DCP's HF writer, consolidated": best["dcp"]}, aim="4 x")
    yield Row(name, f"the same to FP8, {_gigabytes(result['fp8_bytes'])}", _time(best["ours, FP8"]), "")


def _planning(name: str, result: dict[str, Any]) -> Iterator[Row]:
    for mesh, found in result.items():
        if mesh != "facts":
            seconds = found["processor_seconds"]
            reads = f"{found['items_of_a_rank']:,} reads"
            ours = f"{seconds['plan']:.1f} s of a processor, {found['mib']['plan']} MiB; {reads}"
            yield Row(name, f"plan a load of DeepSeek V3 on 64 ranks ({mesh}): one rank", ours, "", aim="5 s")


def _verify(name: str, result: dict[str, Any]) -> Iterator[Row]:
    for threads, seconds in result["seconds"].items():
        medians = {run: row["median"] for run, row in seconds.items()}
        what = f"`verify A B`, {_gigabytes(result['bytes'])}, {threads} thread(s)"
        yield from _against(name, what, medians, aim="0.77 x", headline=threads == "2")


def _timeline(name: str, result: dict[str, Any]) -> Iterator[Row]:
    for job, found in result.items():
        if job != "facts":
            floor = found["raw durable write"]
            other = f"raw durable write of as many bytes: {_time(floor)}"
            yield Row(
                name, f"`convert` {job}, timed step by step", _time(found["seconds"]), other, floor / found["seconds"]
            )


def _first(name: str, result: dict[str, Any]) -> Iterator[Row]:
    for job, runs in result.items():
        if job != "facts":
            what = f"`{job}`, whole process, nothing compiled yet (of processors)"
            then = f"the second run: {_time(runs['second'])}"
            yield Row(name, what, _time(runs["first"]), then, runs["second"] / runs["first"], "2 s more")


def _stores(name: str, result: dict[str, Any]) -> Iterator[Row]:
    found = result["converting"]
    for server, rows, what in (("moto", found["rows"], "convert s3://"), ("nginx", found["nginx"], "convert http://")):
        if rows:
            seconds = {run: row["median"] for run, row in rows.items()}
            size = _gigabytes(found["source_bytes"])
            yield from _against(
                name, f"`{what}` {size} from {server} on loopback", seconds, what, aim="0.83 x the maximum"
            )


MAKERS = {
    "floor": _floor,
    "kernel": _kernel,
    "four_bits": _four_bits,
    "quantize-one-weight": _one_weight,
    "first": _first,
    "opening": _opening,
    "convert-vs-cp": _convert,
    "convert-vs-compressed-tensors": _compressed,
    "timeline": _timeline,
    "quantize-per-tensor": _quantize,
    "quantize-blocks": _quantize,
    "convert-memory": _memory,
    "quantize-memory": _memory,
    "verify": _verify,
    "loading": _ranks,
    "moe": _ranks,
    "saving": _saving,
    "planning": _planning,
    "stores": _stores,
}


def table(found: list[Row]) -> str:
    """The lines as Markdown, each with the day of its result; and the machine of each day."""
    days: dict[str, dict[str, list[float]]] = {}  # the loads, by day and machine
    lines = ["| what | ours | floor, or peer | ratio | aim | measured |", "|---|---|---|---|---|---|"]
    for row in found:
        facts = (newest(row.result) or {})["facts"]
        days.setdefault(facts["date"], {}).setdefault(_machine(facts), []).append(facts.get("load", 0.0))
        ratio = "" if row.ratio is None else f"{row.ratio:.2g} x"
        lines.append(f"| {row.what} | {row.ours} | {row.other} | {ratio} | {row.aim} | {facts['date']} |")
    machines = [
        f"- {day}: {machine}{_busy(loads)}" for day, of_day in sorted(days.items()) for machine, loads in of_day.items()
    ]
    return "\n".join([*lines, "", "Measured on:", "", *machines])


def _machine(facts: dict[str, Any]) -> str:
    return f"{facts['cpu']}, {facts['memory_gib']} GiB, torch {facts['torch']}"


def _busy(loads: list[float]) -> str:
    """What a reader must know of a machine that others used, too: a benchmark alone makes a load of up to 3."""
    spread = " to ".join(map(str, sorted({min(loads), max(loads)})))
    return f", while others worked there (load {spread})" if max(loads) > 3 else ""


def growth() -> str:
    """The tables of growth, from the result of `benchmarks.scaling`."""
    if (result := newest("scaling")) is None:
        return "There is no result yet."
    lines = ["| job | FP8 bytes | seconds | of processors | memory beyond what is loaded |", "|---|---|---|---|---|"]
    for job, of_sizes in result["bytes"].items():
        for run in of_sizes.values():
            lines.append(
                f"| {job} | {_gigabytes(run['source_bytes'])} | {run['seconds']:.1f} | {run['processor_seconds']:.1f} "
                f"| {_mebibytes(run['beyond'])} |"
            )
    lines += ["", "| tensors | open | plan 64 ranks | plan 1,024 ranks |", "|---|---|---|---|"]
    for run in result["tensors"].values():
        seconds = " | ".join(f"{took:.2g} s" for took in run["processor_seconds"].values())
        lines.append(f"| {run['tensors']:,} | {seconds} |")
    lines += [
        "",
        "| ranks | tensors | bytes of a rank | bytes of all | of the files | one rank's plan |",
        "|---|---|---|---|---|---|",
    ]
    for run in result["ranks"].values():
        low, high = run["bytes_read_by_a_rank"]
        seconds = run["processor_seconds"]["plan"]
        lines.append(
            f"| {run['ranks']:,} | {run['tensors']:,} | {low:,} to {high:,} | {run['bytes_read_by_all_ranks']:,} "
            f"| {run['bytes']:,} | {seconds:.2g} s, {run['mib']['plan']} MiB |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Measured on {result['facts']['date']}: {_machine(result['facts'])}{_busy([result['facts']['load']])}.",
        ]
    )


PAGES = {
    ROOT / "README.md": lambda: [table([row for row in rows() if row.headline])],
    ROOT / "benchmarks" / "README.md": lambda: [table(rows()), growth()],
}


def made(page: Path) -> str:
    """The text of a page with its tables as the results make them."""
    text, rest = "", page.read_text()
    for part in PAGES[page]():
        before, _, after = rest.partition(BEGIN + "\n")
        text += before + BEGIN + "\n" + part + "\n"
        rest = after[after.index(END) :]
    return text + rest


def main() -> None:
    for page in PAGES:
        page.write_text(made(page))


if __name__ == "__main__":
    main()

"""A benchmark's figures: statistics of the samples, and the text that shows them."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peers import ALL_SYSTEMS, PEERS, RIVALS, STREAM
from shapes import SHAPES
from systems import OURS

from torch_lstm_quant import ops

VALID_DB = 25.0
"""The least signal-to-noise ratio of an output that is of use. A system below it is marked, and its time does not count."""


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th percentile and interquartile range, in ms."""
    milliseconds = torch.tensor(seconds, dtype=torch.float64) * 1e3
    p10, p25, median, p75 = milliseconds.quantile(torch.tensor([0.1, 0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median_ms": median, "p10_ms": p10, "iqr_ms": p75 - p25}


def add_ratios(systems: dict[str, dict[str, Any]]) -> None:
    """Each system's median over ours, in the same row: above 1, ours is faster."""
    ours = systems.get(OURS, {}).get("median_ms")
    for figures in systems.values():
        if ours and "median_ms" in figures:
            figures["over_ours"] = figures["median_ms"] / ours


def machine() -> dict[str, Any]:
    fields = json.loads(subprocess.run(["lscpu", "--json"], check=True, capture_output=True, text=True).stdout)["lscpu"]
    facts = {field["field"].rstrip(":"): field["data"] for field in fields}
    flags = [flag for flag in facts.get("Flags", "").split() if flag.startswith(("avx", "fma", "amx"))]
    wanted = ("Architecture", "Model name", "CPU family", "Model", "CPU(s)", "L1d cache", "L2 cache", "L3 cache")
    return {name: facts[name] for name in wanted if name in facts} | {"flags": " ".join(flags)}


def versions(systems: Sequence[str]) -> dict[str, str]:
    packages = dict.fromkeys(package for system in systems if (package := ALL_SYSTEMS[system].package))
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_lstm_quant": version("torch_lstm_quant"),
        "kernel": ops.isa_active(),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def ran_on(facts: dict[str, Any], packages: dict[str, str]) -> str:
    """Machine and versions in one line."""
    cpus = (
        f"{facts.get('Model name')}, family {facts.get('CPU family')} model {facts.get('Model')}, {facts.get('CPU(s)')} CPUs"
    )
    return f"{cpus}; " + ", ".join(f"{name} {value}" for name, value in packages.items())


def text(result: dict[str, Any]) -> str:
    """The report as Markdown tables, aligned so that they read well as they are."""
    lines = [
        ran_on(result["machine"], result["versions"]),
        f"Medians in ms a call; in brackets, how many times as long as {OURS} that is; then the signal-to-noise ratio of the "
        f"output to that of float32 (!: under {VALID_DB:.0f} dB, not valid). Spread: interquartile range.",
    ]
    for threads in sorted({row["threads"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["threads"] == threads]
        lines += ["", f"{threads} thread{'s' if threads > 1 else ''}:", "", *_times(rows), "", *_means(rows)]
    return "\n".join([*lines, *_failures(result["rows"])])


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in ALL_SYSTEMS if any(name in row["systems"] for row in rows)]


def _times(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = _names(rows)
    table = [["case", "shape", *names, f"spread of {OURS}", "floor", f"{OURS} / floor", *_best_titles(names)]]
    for row in rows:
        ours, floor, over = row["systems"].get(OURS, {}), row["floor_ms"], _over_floor(row)
        cells = [_time(name, row["systems"].get(name, {})) for name in names]
        cells.append(f"{100 * ours['iqr_ms'] / ours['median_ms']:.0f} %" if "iqr_ms" in ours else "-")
        cells.append(_milliseconds(floor) if floor else "-")
        cells.append(f"{over:.1f}" if over else "-")
        if _best_titles(names):
            best = [_best_over(row, own) for own in (OURS, STREAM)]
            cells += [_best(row) or "-", *(f"{over:.2f}" if over else "-" for over in best)]
        table.append([row["case"], str(SHAPES[row["case"]]), *cells])
    return _aligned(table)


def _best_titles(names: Sequence[str]) -> list[str]:
    peers = any(name in PEERS for name in names)
    return ["best valid peer", f"best / {OURS}", f"best / {STREAM}"] if peers else []


def _time(name: str, figures: dict[str, Any]) -> str:
    if "error" in figures:
        return "not installed" if figures["error"].startswith("ModuleNotFoundError") else "fails"
    if "median_ms" not in figures:
        return "-"
    ratio = f" ({figures['over_ours']:.2f})" if name != OURS and "over_ours" in figures else ""
    sqnr = "" if figures["sqnr_db"] is None else f" {figures['sqnr_db']:.1f} dB{'' if _valid(figures) else '!'}"
    return _milliseconds(figures["median_ms"]) + ratio + sqnr


def _valid(figures: dict[str, Any]) -> bool:
    """Whether there is a time, and it is that of a useful output."""
    return "median_ms" in figures and (figures["sqnr_db"] is None or figures["sqnr_db"] >= VALID_DB)


def _best(row: dict[str, Any]) -> str | None:
    times = {name: row["systems"][name]["median_ms"] for name in RIVALS if _valid(row["systems"].get(name, {}))}
    return min(times, key=times.__getitem__, default=None)


def _best_over(row: dict[str, Any], ours: str) -> float | None:
    """The best valid peer's time over that of a system of ours: above 1, ours is faster."""
    best, figures = _best(row), row["systems"].get(ours, {})
    return row["systems"][best]["median_ms"] / figures["median_ms"] if best and _valid(figures) else None


def _milliseconds(value: float) -> str:
    """About three significant digits, never as a power of ten."""
    digits = next((digits for limit, digits in ((0.1, 4), (1, 3), (10, 2), (100, 1)) if value < limit), 0)
    return f"{value:.{digits}f}"


def _means(rows: Sequence[dict[str, Any]]) -> list[str]:
    names, lines = _names(rows), []
    for name in names:
        if name != OURS:
            valid = [figures for row in rows if _valid(figures := row["systems"].get(name, {}))]
            lines += _mean(name, OURS, [figures.get("over_ours") for figures in valid])
    if _best_titles(names):
        for ours in (OURS, STREAM):
            lines += _mean("the best valid peer", ours, [_best_over(row, ours) for row in rows])
    return lines + _mean(OURS, "the floor", [_over_floor(row) for row in rows])


def _mean(name: str, other: str, ratios: Sequence[float | None]) -> list[str]:
    """A line on the rows that have a ratio, if any has."""
    known = [ratio for ratio in ratios if ratio]
    if not known:
        return []
    mean, count = statistics.geometric_mean(known), len(known)
    return [
        f"- {name} takes {mean:.2f} times as long as {other} (geometric mean of {count}; "
        f"from {min(known):.2f} to {max(known):.2f})"
    ]


def _over_floor(row: dict[str, Any]) -> float | None:
    ours = row["systems"].get(OURS, {}).get("median_ms")
    return ours / row["floor_ms"] if ours and row["floor_ms"] else None


def _failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each reason for which a system fails, with the rows where it does."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, figures in row["systems"].items():
            if "error" in figures:
                where.setdefault((name, figures["error"]), []).append(f"{row['case']} at {row['threads']}")
    return ["", *(f"{name} fails: {error} ({', '.join(places)})" for (name, error), places in where.items())] if where else []


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]

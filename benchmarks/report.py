"""A benchmark's figures: statistics of the samples, and the text that shows them."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from shapes import SHAPES
from systems import OURS, SYSTEMS

from torch_lstm_quant import ops


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


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_lstm_quant": version("torch_lstm_quant"),
        "kernel": ops.isa_active(),
    }


def text(result: dict[str, Any]) -> str:
    """The report as Markdown tables, aligned so that they read well as they are."""
    facts = result["machine"]
    lines = [
        f"{facts.get('Model name')}, family {facts.get('CPU family')} model {facts.get('Model')}, {facts.get('CPU(s)')} CPUs; "
        + ", ".join(f"{name} {value}" for name, value in result["versions"].items()),
        f"Medians in ms a call; in brackets, how many times as long as {OURS} that is. Spread: interquartile range.",
    ]
    for threads in sorted({row["threads"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["threads"] == threads]
        lines += ["", f"{threads} thread{'s' if threads > 1 else ''}:", "", *_times(rows), "", *_means(rows)]
    first = [row for row in result["rows"] if row["threads"] == result["rows"][0]["threads"]]
    lines += ["", "Signal-to-noise ratio of the output to that of float32, dB:", "", *_accuracy(first)]
    return "\n".join([*lines, *_failures(result["rows"])])


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in SYSTEMS if any(name in row["systems"] for row in rows)]


def _times(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = _names(rows)
    table = [["case", "shape", *names, f"spread of {OURS}", "floor", f"{OURS} / floor"]]
    for row in rows:
        ours, floor, over = row["systems"].get(OURS, {}), row["floor_ms"], _over_floor(row)
        cells = [_time(name, row["systems"].get(name, {})) for name in names]
        cells.append(f"{100 * ours['iqr_ms'] / ours['median_ms']:.0f} %" if "iqr_ms" in ours else "-")
        cells.append(_milliseconds(floor) if floor else "-")
        cells.append(f"{over:.1f}" if over else "-")
        table.append([row["case"], str(SHAPES[row["case"]]), *cells])
    return _aligned(table)


def _time(name: str, figures: dict[str, Any]) -> str:
    if "median_ms" not in figures:
        return "fails" if "error" in figures else "-"
    ratio = f" ({figures['over_ours']:.2f})" if name != OURS and "over_ours" in figures else ""
    return _milliseconds(figures["median_ms"]) + ratio


def _milliseconds(value: float) -> str:
    """About three significant digits, never as a power of ten."""
    digits = next((digits for limit, digits in ((0.1, 4), (1, 3), (10, 2), (100, 1)) if value < limit), 0)
    return f"{value:.{digits}f}"


def _means(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for name in _names(rows):
        ratios = [row["systems"].get(name, {}).get("over_ours") for row in rows]
        known = [ratio for ratio in ratios if ratio]
        if name != OURS and known:
            mean = statistics.geometric_mean(known)
            lines.append(
                f"- {name} takes {mean:.2f} times as long as {OURS} (geometric mean of {len(known)}; "
                f"from {min(known):.2f} to {max(known):.2f})"
            )
    floors = [over for row in rows if (over := _over_floor(row))]
    if floors:
        lines.append(f"- {OURS} takes {statistics.geometric_mean(floors):.2f} times as long as the floor")
    return lines


def _over_floor(row: dict[str, Any]) -> float | None:
    ours = row["systems"].get(OURS, {}).get("median_ms")
    return ours / row["floor_ms"] if ours and row["floor_ms"] else None


def _accuracy(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = [name for name in _names(rows) if name != "float32"]
    table = [["case", *names]]
    for row in rows:
        values = [row["systems"].get(name, {}).get("sqnr_db") for name in names]
        table.append([row["case"], *(f"{value:.1f}" if value else "-" for value in values)])
    return _aligned(table)


def _failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{row['case']}, {row['threads']} threads, {name} fails: {figures['error']}"
        for row in rows
        for name, figures in row["systems"].items()
        if "error" in figures
    ]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]

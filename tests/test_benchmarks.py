"""The benchmark runs and reports what it should; its figures are not judged here."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script of the benchmarks, and gives what it prints: in this process, as torch takes seconds to import."""
    monkeypatch.syspath_prepend(str(BENCH.parent))

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(BENCH.with_name(script)), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks bind processes to CPUs, which only Linux can")
def test_a_run_reports_every_system(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [sys.executable, str(BENCH), "--quick", "--cases", "step_128", "--threads", "1", "--json", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert set(row["systems"]) == {"int8", "int8_gates16", "float32", "quantize_dynamic", "fx_reference"}
    for system, figures in row["systems"].items():
        assert figures["p10_ms"] <= figures["median_ms"], system
        assert figures["over_ours"] == figures["median_ms"] / row["systems"]["int8"]["median_ms"]
        assert (figures["sqnr_db"] is None) == (system == "float32")
        assert system in text
    assert result["machine"]["flags"]
    assert set(result["versions"]) == {"python", "torch", "torch_lstm_quant", "kernel"}


def test_an_unknown_case_is_refused_with_the_known_ones(run: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("bench.py", "--cases", "no_such_case")
    assert exit_.value.code == 2
    assert "'no_such_case' is not one of step_128" in capsys.readouterr().err


def test_all_sizes_are_timed(run: Callable[..., str]) -> None:
    text = run("sizes.py", "--sizes", "3,8", "--calls", "1,1", "5,2", "--seconds", "0")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith(("| 3 ", "| 8 "))]
    assert [len(row[1:]) for row in rows] == [2, 2]
    assert text.splitlines()[-1].startswith("geometric mean ")


def test_signals_that_stand_still_are_timed(run: Callable[..., str]) -> None:
    text = run("standing_still.py", "--sizes", "8", "--seconds", "0")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| 8 ")]
    assert [row[1].strip() for row in rows] == ["`Stream`, one step", "module, all steps"]
    assert all(len(row) == 7 and "(1.00)" in row[2] for row in rows)


def test_rows_of_different_lengths_are_timed(run: Callable[..., str]) -> None:
    text = run("packed.py", "--shapes", "3,2,4,8 2,3,4,8,2,2", "--seconds", "0")
    rows = [line.split("|")[1:-1] for line in text.splitlines()[-2:]]
    assert [row[0].strip() for row in rows] == ["3,2,4,8", "2,3,4,8,2,2"]
    assert all(len(row) == 6 and 0 < float(row[1]) <= 1 and float(row[2]) > 0 for row in rows)


def test_rows_of_a_stream_are_timed(run: Callable[..., str]) -> None:
    text = run("rows.py", "--rows", "1,3", "--of", "4", "--sizes", "8", "--seconds", "0")
    rows = [line.split("|")[1:-1] for line in text.splitlines()[-2:]]
    assert [row[:2] for row in rows] == [[" 8 ", " 1 "], [" 8 ", " 3 "]]
    assert all(len(row) == 7 and row[2].endswith("(1.00) ") for row in rows)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_other_forms_are_timed_and_judged(run: Callable[..., str]) -> None:
    text = run("variants.py", "--shapes", "3,2,8,16", "--seconds", "0")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| T")]
    assert [row[0] for row in rows] == [
        *("T3 B2 8->16->8", "T3 B2 8->16", "T3 B2 8->16->8"),
        *["T1 B2 8->16"] * 3,
        *["T3 B2 8->16"] * 12,
    ]
    accuracy = {(row[0], row[1]): row[4] for row in rows}
    for _, name, milliseconds, over, sqnr in rows:
        assert float(milliseconds) > 0
        assert over.startswith("1.00 ") or "int8()" not in name or "not projected" in name
        assert (sqnr == "-") == (name in ("float32 `nn.LSTM`", "float32, projected"))
    # the exported model has our bits; where x and h have no coarse grid, less is lost
    assert accuracy["T3 B2 8->16", "`export_onnx`, in ONNX Runtime"] == accuracy["T3 B2 8->16", "`int8()`"]
    assert float(accuracy["T3 B2 8->16", "x and h 16 bits"]) > float(accuracy["T3 B2 8->16", "`int8()`"]) + 3


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    return importlib.import_module("report")


def _report_of(report: ModuleType, systems: dict[str, dict[str, Any]]) -> str:
    """Of one step with these figures."""
    report.add_ratios(systems)
    row = {"case": "step_128", "threads": 1, "floor_ms": None, "systems": systems}
    return str(report.text({"machine": {}, "versions": {}, "rows": [row]}))


def _figures(median: float, sqnr: float | None) -> dict[str, Any]:
    return {"median_ms": median, "iqr_ms": 0.0, "sqnr_db": sqnr}


def _cells(text: str) -> dict[str, str]:
    titles, _, row = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("|"))
    return {title.strip(): cell.strip() for title, cell in zip(titles, row, strict=True)}


def test_the_report_compares_with_the_fastest_peer_that_is_accurate(report: ModuleType) -> None:
    text = _report_of(
        report,
        {
            "int8": _figures(2.0, 40.0),
            "ours_stream": _figures(1.0, 40.0),
            "float32": _figures(8.0, None),
            "ort_int8": _figures(1.0, 24.9),
            "ort_int8_7bit": _figures(3.0, 25.0),
        },
    )
    cells = _cells(text)
    assert cells["int8"] == "2.00 40.0 dB"
    assert cells["float32"] == "8.00 (4.00)"
    assert cells["ort_int8"] == "1.00 (0.50) 24.9 dB!"
    assert cells["ort_int8_7bit"] == "3.00 (1.50) 25.0 dB"
    assert cells["best valid peer"] == "ort_int8_7bit"
    assert (cells["best / int8"], cells["best / ours_stream"]) == ("1.50", "3.00")
    assert "the best valid peer takes 1.50 times as long as int8 (geometric mean of 1;" in text
    assert "the best valid peer takes 3.00 times as long as ours_stream" in text
    assert "- ort_int8 takes" not in text  # no mean of times that do not count


def test_the_report_says_which_peers_are_missing_or_fail(report: ModuleType) -> None:
    missing = {"error": "ModuleNotFoundError: No module named 'ncnn'"}
    text = _report_of(report, {"int8": _figures(2.0, 40.0), "ort_int8": {"error": "RuntimeError: no"}, "ncnn_int8": missing})
    cells = _cells(text)
    assert (cells["ort_int8"], cells["ncnn_int8"]) == ("fails", "not installed")
    assert (cells["best valid peer"], cells["best / int8"], cells["best / ours_stream"]) == ("-", "-", "-")
    assert "ncnn_int8 fails: ModuleNotFoundError: No module named 'ncnn' (step_128 at 1)" in text
    assert "ort_int8 fails: RuntimeError: no (step_128 at 1)" in text


def test_the_report_has_no_columns_for_peers_that_were_not_asked_for(report: ModuleType) -> None:
    text = _report_of(report, {"int8": _figures(2.0, 40.0), "float32": _figures(8.0, None)})
    assert "best valid peer" not in text

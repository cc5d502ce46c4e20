"""The benchmark runs and reports what it should; its figures are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench.py"


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


def test_an_unknown_case_is_refused_with_the_known_ones() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--cases", "no_such_case"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'no_such_case' is not one of step_128" in done.stderr

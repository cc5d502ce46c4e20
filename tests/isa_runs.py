"""Scripts of these tests that run in a process of their own, since a process keeps the instruction set that it began with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torch_lstm_quant import ops


def run_on(isa: str, script: str, *arguments: object) -> dict[str, Any]:
    """What a script of this folder prints, a JSON object, held to one ISA; skips the test where this CPU lacks that."""
    if isa not in ops.isas_usable():
        pytest.skip(f"this CPU lacks {isa}; it has {', '.join(ops.isas_usable())}")
    (result,) = _run(script, *arguments, TORCH_LSTM_QUANT_ISA=isa)
    assert result["isa"] == isa
    return result


def run_on_all(script: str, *arguments: object) -> list[dict[str, Any]]:
    """The same of a script that takes all ISAs of this CPU at its arguments' end, having what they share done once."""
    isas = ops.isas_usable()
    results = _run(script, *arguments, *isas)
    assert [result["isa"] for result in results] == isas
    return results


def _run(script: str, *arguments: object, **environment: str) -> list[dict[str, Any]]:
    """What a script prints, one JSON object a line."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]

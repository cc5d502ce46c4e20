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
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)],
        env=os.environ | {"TORCH_LSTM_QUANT_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    assert result["isa"] == isa
    return result

"""The memory that a call takes beyond its input and results does not grow with the steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STEPS, SIZE = 40_000, 64
LAYER = 4 * STEPS * SIZE
"""Bytes of a layer's output in one direction: 10 MB."""
WORKER = f"""
import torch
from length import extra_memory
from torch import nn
import torch_lstm_quant as tlq

layers, directions, streamed = %d, %d, %d
lstm = nn.LSTM({SIZE}, {SIZE}, layers, bidirectional=directions == 2)
module = tlq.quantize(lstm, [torch.randn(9, 1, {SIZE})], progress=False)
call = tlq.Stream(module) if streamed else lambda x: module(x)[0]
x = torch.ones({STEPS}, 1, {SIZE})
call(x[:40])
print(extra_memory(lambda: call(x)))
"""


def extra(layers: int, directions: int, streamed: bool = False) -> float:
    """Bytes beyond input and results, in outputs of a layer of one direction."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER % (layers, directions, streamed)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / LAYER


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to say how much memory was taken")
@pytest.mark.parametrize(
    ("layers", "directions", "streamed"), [(1, 1, 0), (3, 1, 0), (3, 1, 1), (1, 2, 0), (2, 2, 0), (4, 2, 0)]
)
def test_memory_does_not_grow_with_the_steps(layers: int, directions: int, streamed: bool) -> None:
    # two directions need all of the layer below before they begin; a layer reads one such output and writes the next
    held = 2 * min(2, layers - 1) if directions == 2 else 0
    assert held - 0.2 < extra(layers, directions, streamed) < held + 0.2

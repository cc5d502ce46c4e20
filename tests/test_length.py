"""With the steps grow neither the memory that a call takes beyond its input and results, nor its distance from float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from streamed import equal, same_states
from test_stress import sqnr
from torch import nn

import torch_lstm_quant as tlq

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STEPS, SIZE = 40_000, 64
LAYER = 4 * STEPS * SIZE
"""Bytes of a layer's output in one direction: 10 MB."""
FORMS = [(1, 1, 0), (3, 1, 0), (3, 1, 1), (1, 2, 0), (2, 2, 0), (4, 2, 0)]
"""Layers, directions, whether it is a stream."""
WORKER = f"""
import os, sys
import torch
from length import extra_memory
from torch import nn
import torch_lstm_quant as tlq

for layers, directions, streamed in {FORMS}:
    if os.fork():  # each form in a process of its own, none of which imports torch again
        if os.wait()[1]:
            sys.exit(1)
        continue
    lstm = nn.LSTM({SIZE}, {SIZE}, layers, bidirectional=directions == 2)
    module = tlq.quantize(lstm, [torch.randn(9, 1, {SIZE})], progress=False)
    call = tlq.Stream(module) if streamed else lambda x: module(x)[0]
    x = torch.ones({STEPS}, 1, {SIZE})
    call(x[:40])
    print(extra_memory(lambda: call(x)))
    break
"""


@pytest.fixture(scope="module")
def extra() -> dict[tuple[int, int, int], float]:
    """Bytes beyond input and results, in outputs of a layer of one direction, for each form."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {form: int(line) / LAYER for form, line in zip(FORMS, done.stdout.splitlines(), strict=True)}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to say how much memory was taken")
@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_the_steps(form: tuple[int, int, int], extra: dict[tuple[int, int, int], float]) -> None:
    layers, directions, _ = form
    # two directions need all of the layer below before they begin; a layer reads one such output and writes the next
    held = 2 * min(2, layers - 1) if directions == 2 else 0
    assert held - 0.2 < extra[form] < held + 0.2


@pytest.mark.parametrize("remembers", [False, True])
def test_accuracy_does_not_fall_with_the_steps(remembers: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 16).eval().requires_grad_(False)
    if remembers:
        lstm.bias_ih_l0[16:32] += 2.0  # forget gates of about 0.9
    x = 2 * torch.rand(100_000, 1, 8) - 1
    fused = tlq.quantize(lstm, [2 * torch.rand(300, 32, 8) - 1], progress=False)
    assert isinstance(fused, tlq.LSTM)
    output, states = fused(x)
    want = lstm(x)[0]
    early, late = (sqnr(output[steps], want[steps]) for steps in (slice(1_000, 2_000), slice(99_000, None)))
    assert early > 39.0  # 40.2, with long memories 45.6
    assert abs(late - early) < 1.0  # less than 0.05 in both

    # a stream comes to the same in pieces, of which the first are of one step
    stream = tlq.Stream(fused)
    pieces = [stream(piece) for piece in (*x[:50].split(1), *x[50:].split(7_001))]
    assert equal(torch.cat(pieces), output)
    assert same_states(stream, states)

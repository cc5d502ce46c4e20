"""What a long sequence costs: nanoseconds a step, and memory beyond input and output, from 40 to 100,000 steps.

python benchmarks/length.py --threads 1
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import torch_lstm_quant as tlq

STEPS = (40, 400, 4_000, 40_000, 100_000)
STACKS = (1, 1), (2, 1), (1, 2), (2, 2)
"""Layers and directions."""
SECONDS = 0.5
"""Of calls, of which the fastest counts."""


def memory(field: str) -> int:
    """Bytes that /proc/self/status says: VmRSS now, VmHWM at most since the process began."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def extra_memory(call: Callable[[], Tensor]) -> int:
    """The most bytes that a call took at any time beyond those that were there and its result."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    result = call()
    return memory("VmHWM") - before - result.nbytes


def seconds(call: Callable[[], Tensor]) -> float:
    times: list[float] = []
    while sum(times) < SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(module: tlq.LSTM, steps: int, threads: int) -> str:
    torch.set_num_threads(threads)
    x = torch.full((steps, 1, module.input_size), 0.5)
    with torch.inference_mode():
        module(x[:40])  # starts threads, binds the weights
        extra = extra_memory(lambda: module(x)[0])
        return f"{seconds(lambda: module(x)[0]) / steps * 1e9:,.0f} ({extra / 1e6:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", default="128,512", help="comma-separated: as many features as hidden units")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not outlive a fork
    print("ns a step (MB beyond input and output) | " + " | ".join(f"T{steps:,}" for steps in STEPS))
    for size, (layers, directions) in itertools.product(map(int, options.sizes.split(",")), STACKS):
        lstm = nn.LSTM(size, size, layers, bidirectional=directions == 2).eval()
        module = tlq.quantize(lstm, [torch.randn(64, 4, size)], progress=False)
        cells = []
        for steps in STEPS:
            # a process of its own, whose memory no earlier call has used
            with multiprocessing.get_context("fork").Pool(1) as pool:
                cells.append(pool.apply(measure, (module, steps, options.threads)))
        name = f"{size}->{size}{f' x{layers}' * (layers > 1)}{' bidirectional' * (directions > 1)}"
        print(f"{name} | " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()

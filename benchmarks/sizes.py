"""Times int8() beside float32 and quantize_dynamic over all sizes, a layer of as many features as hidden units.

python benchmarks/sizes.py --sizes 1,128,2048 --calls 1,1 20,8 --threads 1
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from systems import dynamic
from torch import nn
from turns import quartiles_over, take_turns

import torch_lstm_quant as tlq

SIZES = "1,2,3,5,8,13,16,24,32,48,64,100,128,192,256,384,512,768,1024,1536,2048"
CALLS = ["1,1", "20,1", "20,8", "5,64"]
BLOCK_SECONDS = 1e-3
"""A block is of as many calls of each as take float32 about this long."""


def lstms(size: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    lstm = nn.LSTM(size, size).eval().requires_grad_(False)
    fused = tlq.quantize(lstm, [torch.randn(20, 4, size)], progress=False)
    return {"float32": lstm, "quantize_dynamic": dynamic(lstm), "int8": fused}


def blocks(systems: dict[str, nn.Module], size: int, steps: int, rows: int) -> dict[str, Callable[[], object]]:
    """As many calls of each."""
    x, states = torch.randn(steps, rows, size), (torch.zeros(1, rows, size), torch.zeros(1, rows, size))
    taken = take_turns({"float32": lambda: systems["float32"](x, states)}, 0)["float32"]
    times = max(1, int(BLOCK_SECONDS / min(taken)))

    def block(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            for _ in range(times):
                module(x, states)

        return run

    return {name: block(module) for name, module in systems.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help="features and hidden units, separated by commas")
    parser.add_argument("--calls", nargs="+", default=CALLS, help="T,B of the columns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each cell of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calls = [tuple(int(number) for number in call.split(",")) for call in options.calls]
    titles = [f"T{steps} B{rows}" for steps, rows in calls]
    print(f"float32 / quantize_dynamic over int8(), medians; {options.threads} threads\n")
    print("| units | " + " | ".join(titles) + " |\n" + "| --- " * (1 + len(titles)) + "|")
    logs: dict[str, list[float]] = {"float32": [], "quantize_dynamic": []}
    for size in map(int, options.sizes.split(",")):
        systems, cells = lstms(size), []
        for steps, rows in calls:
            with torch.inference_mode():
                taken = take_turns(blocks(systems, size, steps, rows), options.seconds, warm_up=True)
            ratios = [quartiles_over(taken[name], taken["int8"])[1] for name in logs]
            for log, ratio in zip(logs.values(), ratios, strict=True):
                log.append(math.log(ratio))
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in ratios))
        print(f"| {size} | " + " | ".join(cells) + " |", flush=True)
    means = " / ".join(f"{math.exp(sum(log) / len(log)):.2f}" for log in logs.values())
    print(f"\ngeometric mean {means}")


if __name__ == "__main__":
    main()

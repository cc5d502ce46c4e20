"""Times our LSTM on signals that stand still for some time beside one that always moves, of which nothing is skipped.

python benchmarks/standing_still.py --sizes 128,512 --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from shapes import Case, Shape
from systems import int8
from torch import Tensor
from turns import take_turns, undisturbed

import torch_lstm_quant as tlq

STEPS = 800
BURST = 100


def _silence(x: Tensor) -> Tensor:
    x = x.clone()
    for start in range(0, STEPS, 4 * BURST):
        x[start + BURST : start + 4 * BURST] = 0
    return x


def _held(steps: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[torch.arange(STEPS) // steps * steps]


def _one_by_one(x: Tensor) -> Tensor:
    x = x.clone()
    for t in range(1, STEPS):
        feature = t % x.shape[2]
        new = x[t, :, feature].clone()
        x[t] = x[t - 1]
        x[t, :, feature] = new
    return x


SIGNALS: dict[str, Callable[[Tensor], Tensor]] = {
    "moving": lambda x: x,
    f"{BURST} steps of sound, {3 * BURST} of silence": _silence,
    "new values every 10th step": _held(10),
    "new values every 100th step": _held(100),
    "one feature a step": _one_by_one,
}


def _streamed(lstm: tlq.LSTM, x: Tensor) -> Callable[[], object]:
    stream, out, steps = tlq.Stream(lstm), torch.empty(1, lstm.hidden_size), list(x)
    return lambda: [stream(step, out) for step in steps]


def _at_once(lstm: tlq.LSTM, x: Tensor) -> Callable[[], object]:
    return lambda: lstm(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="128,512,1024", help="comma-separated: as many features as hidden units")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row of the table")
    arguments = parser.parse_args()
    print(f"microseconds a step, and how many times faster than moving; {arguments.threads} threads\n")
    print("| size | call | " + " | ".join(SIGNALS) + " |\n" + "| --- " * (2 + len(SIGNALS)) + "|")
    for size in map(int, arguments.sizes.split(",")):
        torch.set_num_threads(1)
        case = Case(Shape(f"standing_still_{size}", STEPS, 1, size, size))
        lstm = int8(case)
        assert isinstance(lstm, tlq.LSTM)
        torch.set_num_threads(arguments.threads)
        for name, make in (("`Stream`, one step", _streamed), ("module, all steps", _at_once)):
            with torch.inference_mode():
                calls = {signal: make(lstm, change(case.x)) for signal, change in SIGNALS.items()}
                taken = take_turns(calls, arguments.seconds, warm_up=True)
            times = {signal: undisturbed(seconds) / STEPS * 1e6 for signal, seconds in taken.items()}
            cells = [f"{us:.2f} ({times['moving'] / us:.2f})" for us in times.values()]
            print(f"| {size} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Times steps of some rows of a ``Stream`` beside a ``Stream`` of just so many rows, which always go on together.

python benchmarks/rows.py --rows 1,8,64 --of 256 --sizes 128 --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from shapes import Case, Shape
from systems import int8
from turns import quartiles_over, take_turns, undisturbed

import torch_lstm_quant as tlq

WAYS = ("alone", "the same rows", "other rows each step", "these as a tensor", "module, states gathered")
BLOCK = 16
"""Calls that are timed as one."""


def ways(lstm: tlq.LSTM, rows: int, of: int) -> dict[str, Callable[[], object]]:
    """Each takes a block of steps."""
    x, out = torch.randn(BLOCK, rows, lstm.input_size), torch.empty(rows, lstm.hidden_size)
    chosen = [torch.randperm(of)[:rows] for _ in range(BLOCK)]
    steps, alone, stream = list(x), tlq.Stream(lstm, rows), tlq.Stream(lstm, of)
    listed = [numbers.tolist() for numbers in chosen]
    h, c = stream.state()

    def by_module() -> None:
        for step, numbers in zip(steps, chosen, strict=True):
            _, (h_n, c_n) = lstm(step[None], (h[:, numbers], c[:, numbers]))
            h[:, numbers], c[:, numbers] = h_n, c_n

    calls: list[Callable[[], object]] = [
        lambda: [alone(step, out) for step in steps],
        lambda: [stream(step, out, rows=listed[0]) for step in steps],
        lambda: [stream(step, out, rows=numbers) for step, numbers in zip(steps, listed, strict=True)],
        lambda: [stream(step, out, rows=numbers) for step, numbers in zip(steps, chosen, strict=True)],
        by_module,
    ]
    return dict(zip(WAYS, calls, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,64", help="comma-separated: how many rows go on")
    parser.add_argument("--of", type=int, default=256, help="rows of the stream")
    parser.add_argument("--sizes", default="128", help="comma-separated: as many features as hidden units")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row of the table")
    options = parser.parse_args()
    print(f"microseconds a step of n of {options.of} rows (median of the ratios to alone); {options.threads} threads\n")
    print("| size | n | " + " | ".join(WAYS) + " |\n" + "| --- " * (2 + len(WAYS)) + "|")
    for size in map(int, options.sizes.split(",")):
        torch.set_num_threads(1)
        lstm = int8(Case(Shape(f"rows_{size}", 20, 1, size, size)))
        assert isinstance(lstm, tlq.LSTM)
        torch.set_num_threads(options.threads)
        for rows in map(int, options.rows.split(",")):
            with torch.inference_mode():
                taken = take_turns(ways(lstm, rows, options.of), options.seconds)
            cells = []
            for times in taken.values():
                _, ratio, _ = quartiles_over(times, taken["alone"])
                cells.append(f"{undisturbed(times) / BLOCK * 1e6:.2f} ({ratio:.2f})")
            print(f"| {size} | {rows} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

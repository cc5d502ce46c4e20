"""Times batches whose rows have different lengths: as a padded batch worked through whole, with ``lengths``, and packed.

python benchmarks/packed.py --shapes 50,16,256,256 --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from turns import take_turns, undisturbed

import torch_lstm_quant as tlq

SHAPES = "50,16,256,256 100,16,256,256,1,2 50,64,512,512 100,8,128,128"


def ways(shape: list[int]) -> tuple[float, dict[str, Callable[[], object]]]:
    """How much of a padded batch is no padding, and the ways to work through it."""
    steps, rows, input_size, hidden_size, layers, directions = (*shape, 1, 1)[:6]
    torch.manual_seed(0)
    lstm = nn.LSTM(input_size, hidden_size, layers, bidirectional=directions == 2).eval()
    fused = tlq.quantize(lstm, [torch.randn(20, 4, input_size)], progress=False)
    x, lengths = torch.randn(steps, rows, input_size), torch.randint(1, steps + 1, (rows,))
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    return int(lengths.sum()) / (steps * rows), {
        "padded": lambda: fused(x),
        "lengths": lambda: fused(x, lengths=lengths),
        "packed": lambda: fused(packed),
        "float32": lambda: lstm(packed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="T,B,input,hidden[,layers[,directions]], separated by spaces")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row of the table")
    options = parser.parse_args()
    print(f"milliseconds (over those of the padded batch), lengths uniform from 1 to T; {options.threads} threads\n")
    print("| shape | share of no padding | padded | `lengths=` | packed | float32, packed |\n" + "| --- " * 6 + "|")
    for shape in options.shapes.split():
        torch.set_num_threads(1)
        share, calls = ways([int(size) for size in shape.split(",")])
        torch.set_num_threads(options.threads)
        with torch.inference_mode():
            taken = take_turns(calls, options.seconds)
        padded, *others = (1e3 * undisturbed(times) for times in taken.values())
        cells = [f"{ms:.3f} ({ms / padded:.2f})" for ms in others]
        print(f"| {shape} | {share:.2f} | {padded:.3f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

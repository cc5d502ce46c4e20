"""Compares rows of different lengths in one call with each row alone, in a process of its own.

The ISA is chosen once a process, so ``test_packed.py`` runs this for each of them, with ``TORCH_LSTM_QUANT_ISA`` set:
``python packed_worker.py CALLS`` prints one line of JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from kernel_worker import THREADS, same
from random_cells import PRESETS, Dice, random_input, random_layers, random_proj_size, random_states
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torch_lstm_quant as tlq
from torch_lstm_quant import ops, reference
from torch_lstm_quant.call_forms import States
from torch_lstm_quant.cell import Cell

Results = tuple[Tensor, Tensor, Tensor]


def random_lengths(dice: Dice, steps: int, rows: int) -> Tensor:
    """Any, sometimes sorted, sometimes one row much longer than the others."""
    most = 1 if dice.chance(0.2) else steps
    lengths = torch.randint(1, most + 1, (rows,), generator=dice.generator)
    lengths[dice.integer(0, rows - 1)] = dice.integer(1, steps)
    return lengths.sort(descending=True).values if dice.chance(0.3) else lengths


def by_reference(layers: list[list[Cell]], x: Tensor, hx: States | None, lengths: Tensor) -> Results:
    """The integer reference, rows of one length at a time, zero where a row has ended."""
    rows, cell, count = x.shape[1], layers[0][0], len(layers) * len(layers[0])
    output = torch.zeros(len(x), rows, len(layers[0]) * cell.h_size)
    h_n, c_n = torch.zeros(count, rows, cell.h_size), torch.zeros(count, rows, cell.hidden_size)
    for length in lengths.unique().tolist():
        chosen = (lengths == length).nonzero().flatten()
        h0, c0 = (None, None) if hx is None else (state[:, chosen] for state in hx)
        output[:length, chosen], h_n[:, chosen], c_n[:, chosen] = reference.lstm(layers, x[:length, chosen], h0, c0)
    return output, h_n, c_n


def alone(module: tlq.LSTM, x: Tensor, hx: States | None, row: int, length: int) -> Results:
    """One row through the fused module."""
    states = None if hx is None else (hx[0][:, row, None], hx[1][:, row, None])
    output, (h, c) = module(x[:length, row, None], states)
    return torch.cat([output, torch.zeros(len(x) - length, 1, output.shape[2])]), h, c


def packed(module: tlq.LSTM, x: Tensor, hx: States | None, lengths: Tensor, enforce_sorted: bool) -> Results:
    output, (h, c) = module(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted), hx)
    return pad_packed_sequence(output, total_length=len(x))[0], h, c


def compare(seed: int) -> dict[int, int]:
    """How many values of one random call differ from what they should be, by threads."""
    dice = Dice(seed)
    input_size, hidden_size = dice.integer(1, 40), dice.integer(1, 70)
    layers, directions, steps, rows = dice.integer(1, 3), dice.integer(1, 2), dice.integer(1, 24), dice.integer(1, 30)
    preset = PRESETS[seed % 5] if seed % 5 < len(PRESETS) else None
    proj_size = random_proj_size(dice, hidden_size)
    cells = random_layers(dice, input_size, hidden_size, layers, directions, preset, proj_size)
    module, lengths = tlq.LSTM(cells), random_lengths(dice, steps, rows)
    x = random_input(dice, steps, rows, input_size)
    x[torch.arange(steps)[:, None] >= lengths] = float("nan")  # what is padding is not to be read
    hx = random_states(dice, cells, rows) if dice.chance(0.5) else None
    given = lengths if dice.chance(0.5) else lengths.tolist()
    enforce_sorted = bool((lengths.diff() <= 0).all()) and dice.chance(0.5)
    want = by_reference(cells, x, hx, lengths)
    differing = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        output, (h, c) = module(x, hx, lengths=given)
        results = [(output, h, c), packed(module, x, hx, lengths, enforce_sorted)]
        rows_alone = [alone(module, x, hx, row, length) for row, length in enumerate(lengths.tolist())]
        torch.set_num_threads(1)  # more would only slow the reference's small operations down
        results.append(tuple(torch.cat(parts, 1) for parts in zip(*rows_alone, strict=True)))  # type: ignore[arg-type]
        differing[threads] = sum(
            int((~same(one, other)).sum()) for got in results for one, other in zip(got, want, strict=True)
        )
    return differing


def main(calls: int) -> None:
    torch.set_num_threads(1)
    failed = [
        f"seed {seed}, {threads} threads: {count} values"
        for seed in range(calls)
        for threads, count in compare(seed).items()
        if count
    ]
    print(json.dumps({"isa": ops.isa_active(), "threads": THREADS, "failed": failed}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

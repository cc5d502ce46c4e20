"""Compares the fused op with the integer reference over deep and random configurations, in a process of its own.

The ISA is chosen once a process, so ``test_kernel.py`` runs this for each of them, with ``TORCH_LSTM_QUANT_ISA`` set:
``python kernel_worker.py SEED VALUES`` prints one line of JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from deep_cells import DEEP
from random_cells import PRESETS, SIGNALS, Dice, make_signal, random_input, random_layers, random_proj_size, random_states
from torch import Tensor

import torch_lstm_quant as tlq
from torch_lstm_quant import ops, reference
from torch_lstm_quant.call_forms import Shape
from torch_lstm_quant.cell import Cell

THREADS = (1, 2)
"""With each of which the op runs everything; the reference, which takes most of the time, only once."""


def same(one: Tensor, other: Tensor) -> Tensor:
    """Where two float32 tensors have the same bits, any NaN being like any other."""
    return (one.view(torch.int32) == other.view(torch.int32)) | (one.isnan() & other.isnan())


def compare(seed: int, most_rows: int) -> tuple[int, dict[int, int]]:
    """How many values one random configuration gave, and how many of them were not the reference's, by threads."""
    dice = Dice(seed)
    num_layers, directions = dice.integer(1, 3), dice.integer(1, 2)
    large = dice.chance(0.3)
    input_size, hidden_size = (dice.integer(1, 300 if large else 70) for _ in range(2))
    steps, rows = dice.integer(1, 40 if large else 20), int(dice.one_of([1, 1, 2, 3, 5, 8, 17, most_rows if large else 9]))
    preset = dice.one_of([None, None, *PRESETS])
    proj_size = random_proj_size(dice, hidden_size)
    layers = random_layers(dice, input_size, hidden_size, num_layers, directions, preset, proj_size)  # type: ignore[arg-type]
    x = random_input(dice, steps, rows, input_size)
    x = make_signal(x, str(dice.one_of(["moving", *SIGNALS])), dice.integer(1, 10))
    h0, c0 = random_states(dice, layers, rows) if dice.chance(0.5) else (None, None)
    return compare_cells(dice, layers, x, h0, c0)


def compare_cells(
    dice: Dice, layers: list[list[Cell]], x: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[int, dict[int, int]]:
    """The same of one call of these cells."""
    want = reference.lstm(layers, x, h0, c0)
    compared, differing = 0, {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        pairs = results(dice, layers, x, h0, c0, want)
        torch.set_num_threads(1)  # more would only slow the reference's small operations down
        compared = sum(one.numel() for one, _ in pairs)
        differing[threads] = sum(int((~same(one, other)).sum()) for one, other in pairs)
    return compared, differing


def results(
    dice: Dice, layers: list[list[Cell]], x: Tensor, h0: Tensor | None, c0: Tensor | None, want: tuple[Tensor, ...]
) -> list[tuple[Tensor, Tensor]]:
    """What the op, a stream and a cell give of the call, each beside what it should be."""
    first = layers[0][0]
    shape = Shape(first.input_size, first.hidden_size, len(layers), len(layers[0]), False, first.proj_size)
    got = ops.lstm(x, h0, c0, ops.pack(layers), shape)
    streamed = stream(dice, layers, x, h0, c0) if len(layers[0]) == 1 else ()
    stepped = step_by_step(first, x, h0, c0) if len(layers) == len(layers[0]) == 1 and not first.proj_size else ()
    return [*zip(got, want, strict=True), *zip(streamed, want, strict=False), *zip(stepped, want, strict=False)]


def stream(dice: Dice, layers: list[list[Cell]], x: Tensor, h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, ...]:
    """Output and states by a stream, in two calls."""
    one = tlq.Stream(tlq.LSTM(layers), x.shape[1])
    one.reset(None if h0 is None or c0 is None else (h0, c0))
    split = dice.integer(0, len(x))
    return torch.cat([one(x[:split]), one(x[split:])]), *one.state()


def step_by_step(cell: Cell, x: Tensor, h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, ...]:
    """Output and states by an ``LSTMCell``."""
    module, output = tlq.LSTMCell(cell), []
    hx = None if h0 is None or c0 is None else (h0[0], c0[0])
    for step in x:
        hx = module(step, hx)
        output.append(hx[0])
    assert hx is not None
    return torch.stack(output), hx[0][None], hx[1][None]


def main(seed: int, values: int) -> None:
    torch.set_num_threads(1)
    compared, differing, failed = 0, dict.fromkeys(THREADS, 0), []

    def add(name: str, count: int, wrong: dict[int, int]) -> None:
        nonlocal compared
        compared += count
        for threads in THREADS:
            differing[threads] += wrong[threads]
            if wrong[threads]:
                failed.append(f"{name}, {threads} threads")

    for name, deep in DEEP.items():
        add(name, *compare_cells(Dice(seed), [[deep.cell()]], *deep.inputs()))
    most_rows = 64 if values < 10_000_000 else 1024  # the reference is slow at small batches
    while compared < values:
        add(f"seed {seed}", *compare(seed, most_rows))
        seed += 1
    print(json.dumps({"isa": ops.isa_active(), "compared": compared, "differing": differing, "failed": failed[:20]}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

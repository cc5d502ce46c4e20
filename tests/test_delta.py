"""Signals that stand still, of which the kernel sums only what changed: the integer reference's bits all the same.

That it does so is shown by ``tests/cpp/test_delta.cpp``, which counts.
"""

from __future__ import annotations

import pytest
import torch
from random_cells import PRESETS, SIGNALS, Dice, make_signal, random_layers
from torch import Tensor

import torch_lstm_quant as tlq
from torch_lstm_quant import reference


def check(got: Tensor, states: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor, Tensor]) -> None:
    for one, other in zip((got, *states), want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(("input_size", "hidden_size"), [(5, 70), (64, 64), (130, 96), (257, 128)])
def test_module_and_stream(preset: str, signal: str, input_size: int, hidden_size: int) -> None:
    dice = Dice(hidden_size)
    layers = random_layers(dice, input_size, hidden_size, 2, 1, preset)
    x = make_signal(dice.normal(240, 1, input_size), signal, 30)
    want = reference.lstm(layers, x, None, None)
    module = tlq.LSTM(layers)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        check(*module(x), want)
        stream = tlq.Stream(module)
        for _ in range(2):  # the second time from what the first one kept
            stream.reset()
            chunks = [*x[:150], x[150:200], *x[200:]]
            got = [stream(chunk) if chunk.dim() == 3 else stream(chunk)[None] for chunk in chunks]
            check(torch.cat(got), stream.state(), want)


@pytest.mark.parametrize("signal", SIGNALS)
def test_units_shared_by_threads(signal: str) -> None:
    dice = Dice(0)
    layers = random_layers(dice, 256, 512, 1, 1, "int8")
    x = make_signal(dice.normal(120, 1, 256), signal, 15)
    want = reference.lstm(layers, x, None, None)
    module, stream = tlq.LSTM(layers), tlq.Stream(tlq.LSTM(layers))
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        check(*module(x), want)
        stream.reset()
        check(torch.cat([stream(step)[None] for step in x]), stream.state(), want)


@pytest.mark.parametrize("signal", SIGNALS)
def test_two_directions(signal: str) -> None:
    dice = Dice(1)
    layers = random_layers(dice, 40, 64, 2, 2, "int8")
    x = make_signal(dice.normal(200, 1, 40), signal, 25)
    check(*tlq.LSTM(layers)(x), reference.lstm(layers, x, None, None))

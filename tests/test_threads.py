"""Threads: any number of torch's, and calls from several of Python's at once, give the same bits."""

from __future__ import annotations

import threading

import pytest
import torch
from random_cells import Dice, random_layers
from torch import Tensor

import torch_lstm_quant as tlq
from torch_lstm_quant import reference

I, H = 7, 6  # noqa: E741


@pytest.fixture
def fused() -> tlq.LSTM:
    return tlq.LSTM(random_layers(Dice(1), I, H, 1, 1, "int8"))


def test_calls_from_many_threads(fused: tlq.LSTM) -> None:
    inputs = [torch.randn(20, 2, I) for _ in range(8)]
    want = [fused(x)[0] for x in inputs]
    got: list[list[Tensor]] = [[] for _ in inputs]

    def work(index: int) -> None:
        got[index] = [fused(inputs[index])[0] for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(outputs) == 20 for outputs in got)
    assert all(torch.equal(output, one) for outputs, one in zip(got, want, strict=True) for output in outputs)


SHARED = {  # (layers, directions, steps, rows, hidden): by rows, units, directions and layers
    "rows": (1, 1, 20, 40, 80),
    "units": (1, 1, 60, 1, 300),
    "directions": (2, 2, 60, 2, 80),
    "layers": (3, 1, 100, 1, 80),
}


def shared(way: str) -> tuple[tlq.LSTM, Tensor]:
    """A module and an input so large that threads share the work in one of the ways that there are."""
    layers, directions, steps, rows, hidden = SHARED[way]
    return tlq.LSTM(random_layers(Dice(2), 80, hidden, layers, directions, "int8")), torch.randn(steps, rows, 80)


@pytest.mark.parametrize("way", SHARED)
@pytest.mark.parametrize("threads", [2, 3, 8, 100])
def test_any_number_of_threads(way: str, threads: int) -> None:
    module, x = shared(way)
    want = module(x)[0]
    torch.set_num_threads(threads)
    for _ in range(3):
        assert torch.equal(module(x)[0], want)


@pytest.mark.parametrize("threads", [0, -1])
def test_numbers_of_threads_that_are_none(fused: tlq.LSTM, threads: int) -> None:
    with pytest.raises(RuntimeError, match="positive"):
        torch.set_num_threads(threads)
    x = torch.randn(5, 3, I)
    assert torch.equal(fused(x)[0], reference.lstm(fused.cells(), x, None, None)[0])


@pytest.mark.parametrize("way", SHARED)
def test_calls_from_many_threads_that_each_take_several(way: str) -> None:
    module, x = shared(way)
    want = module(x)[0]
    torch.set_num_threads(2)
    equal: list[bool] = []

    def work() -> None:
        torch.set_num_threads(2)  # torch keeps the number for each of Python's threads
        equal.extend(torch.equal(module(x)[0], want) for _ in range(10))

    others = [threading.Thread(target=work) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert equal == [True] * 40

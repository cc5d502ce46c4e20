"""Streams to test, and when their states are the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from random_cells import Dice, random_layers
from torch import Tensor

import torch_lstm_quant as tlq

I, H, B = 7, 6, 5  # noqa: E741


def fused(layers: int = 1, preset: str | None = "int8", size: tuple[int, int] = (I, H), seed: int = 5) -> tlq.LSTM:
    return tlq.LSTM(random_layers(Dice(seed), *size, layers, 1, preset))


def equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


def started(module: tlq.LSTM, rows: int = B) -> tlq.Stream:
    """A stream each row of which has its own state."""
    stream = tlq.Stream(module, rows)
    stream(torch.randn(3, rows, module.input_size, generator=torch.Generator().manual_seed(1)))
    return stream


def same_states(stream: tlq.Stream, before: tuple[Tensor, Tensor]) -> bool:
    return all(equal(now, then) for now, then in zip(stream.state(), before, strict=True))


def refusals_beside(worker: threading.Thread, uses: Sequence[Callable[[], object]]) -> int:
    """How many of ``uses`` a stream refuses while ``worker``, which is started and waited for, uses it too."""
    worker.start()
    refusals = 0
    while worker.is_alive():
        for use in uses:
            try:
                use()
            except RuntimeError as error:
                assert "used by two threads at once" in str(error)  # noqa: PT017
                refusals += 1
    worker.join()
    return refusals

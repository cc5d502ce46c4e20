"""What the demo measures of a model: bits per character, size, speed, and how exact its LSTM is."""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import torch_lstm_quant as tlq
from torch_lstm_quant import reference


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the saved state dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue())


@torch.no_grad()
def characters_per_second(models: Mapping[str, tuple[nn.Module, Tensor]], rounds: int) -> dict[str, float]:
    """Of each model on its text ``[T, 1]``.

    The models take turns, and the median of the rounds counts, as a machine's other work comes and goes.
    """
    for model, text in models.values():
        model(text)
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, (model, text) in models.items():
            started = time.perf_counter()
            model(text)
            speeds[name].append(len(text) / (time.perf_counter() - started))
    return {name: statistics.median(of_name) for name, of_name in speeds.items()}


@dataclass(frozen=True)
class Difference:
    """Between a fused LSTM's values and others."""

    compared: int
    unequal: int
    steps: int
    """The largest difference, in steps of the hidden state's grid."""


@dataclass(frozen=True)
class Exactness:
    """A fused LSTM against the integer reference and the FX reference graph."""

    integers: Difference
    """All outputs and last states."""

    graph_each_step: Difference
    """The outputs of single steps, each from the state that the fused LSTM was in."""

    graph_running: Difference
    """All outputs of a graph that goes on from its own states: where one value was rounded another way, others follow."""


@torch.no_grad()
def exactness(fused: tlq.LSTM, graph: nn.Module, x: Tensor) -> Exactness:
    """Compare a fused LSTM of one layer and direction on ``x`` ``[T, B, input_size]``."""
    output, (h_n, c_n) = fused(x)
    integers = reference.lstm(fused.cells(), x)
    h, c = states_before_each_step(fused, x)
    every_step = (x.flatten(0, 1)[None], (h.flatten(0, 1)[None], c.flatten(0, 1)[None]))
    grid = fused.cells()[0][0].qparams.ogate_cy
    assert grid is not None, "every preset quantizes the hidden state"
    return Exactness(
        integers=_difference([output, h_n, c_n], list(integers), grid.scale),
        graph_each_step=_difference([fused(*every_step)[0]], [graph(*every_step)[0]], grid.scale),
        graph_running=_difference([output], [graph(x)[0]], grid.scale),
    )


def states_before_each_step(lstm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden and the cell states ``[T, B, hidden_size]`` in which an LSTM of one layer reads ``x`` step by step."""
    zeros = torch.zeros(1, x.shape[1], lstm.hidden_size)
    states = [(zeros, zeros)]
    for x_t in x[:-1]:
        states.append(lstm(x_t[None], states[-1])[1])
    return torch.cat([h for h, _ in states]), torch.cat([c for _, c in states])


def _difference(values: list[Tensor], others: list[Tensor], scale: float) -> Difference:
    pairs = list(zip(values, others, strict=True))
    return Difference(
        compared=sum(a.numel() for a, _ in pairs),
        unequal=sum(int((a != b).sum()) for a, b in pairs),
        steps=max(math.ceil((a - b).abs().max().item() / scale - 0.01) for a, b in pairs),
    )

"""What the demo measures of a model: bits per character, size, speed, and how exact its LSTM is."""

from __future__ import annotations

import io
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
class Exactness:
    """How a fused LSTM's values compare with the integer reference's and with the FX reference graph's."""

    compared: int
    unequal_to_integers: int
    compared_with_graph: int
    unequal_to_graph: int
    largest_step: int
    """The largest difference from the graph, in steps of the hidden state's grid."""


@torch.no_grad()
def exactness(fused: tlq.LSTM, graph: nn.Module, x: Tensor) -> Exactness:
    """Run ``x`` ``[T, B, input_size]`` through all three: every output and last state against the integer reference, every
    output against the graph.
    """
    output, (h_n, c_n) = fused(x)
    of_integers = reference.lstm(fused.cells(), x)
    unequal = sum(int((a != b).sum()) for a, b in zip((output, h_n, c_n), of_integers, strict=True))
    grid = fused.cells()[-1][0].qparams.ogate_cy
    assert grid is not None, "every preset quantizes the hidden state"
    steps = ((output - graph(x)[0]) / grid.scale).round().abs()
    return Exactness(
        compared=output.numel() + h_n.numel() + c_n.numel(),
        unequal_to_integers=unequal,
        compared_with_graph=output.numel(),
        unequal_to_graph=int(steps.count_nonzero()),
        largest_step=int(steps.max()),
    )

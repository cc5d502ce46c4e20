"""Observed and converted LSTMs, and what their graphs say: shared by the tests of the two LSTM utilities."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FixedQParamsObserver,
    MinMaxObserver,
    PlaceholderObserver,
    QConfig,
    default_weight_observer,
)
from torch.fx import GraphModule, Node

from torch_lstm_quant import lstm_utils as ours

no_warnings = pytest.mark.filterwarnings("error")

INPUT, HIDDEN, STEPS, BATCH = 5, 6, 7, 3
FLOAT32 = PlaceholderObserver.with_args(dtype=torch.float32)
FLOAT = QConfig(activation=FLOAT32, weight=FLOAT32)
STATIC = QConfig(activation=MinMaxObserver.with_args(dtype=torch.quint8), weight=default_weight_observer)

NODE_OF_PART = {
    "x": "x",
    "hx": "getitem_2",
    "cx": "getitem_3",
    "gates": "add",
    "fgate_cx": "mul",
    "igate_cgate": "mul_1",
    "fgate_cx_igate_cgate": "add_1",
    "tanh_cy_input": "add_1",
    "tanh_cy": "tanh",
    "ogate_cy": "mul_2",
}
"""The node whose value is the part, where it has another name."""

QUANTIZE = (torch.quantize_per_tensor, torch.ops.quantized_decomposed.quantize_per_tensor.default)


def float_lstm(qconfig: QConfig = FLOAT, **options: Any) -> nn.LSTM:
    lstm = nn.LSTM(INPUT, HIDDEN, **{"num_layers": 1, **options}).eval()
    lstm.qconfig = qconfig
    return lstm


def observe(lstm: nn.LSTM, **arguments: Any) -> torch.ao.nn.quantizable.LSTM:
    return ours._get_lstm_with_individually_observed_parts(lstm, (), **arguments)


def convert(lstm: nn.LSTM, x: Tensor, **arguments: Any) -> ours.ReferenceLSTM:
    """Observe, calibrate on ``x`` and convert."""
    observed = observe(lstm, **arguments)
    with torch.no_grad():
        observed(x)
    return ours._get_reference_quantized_lstm_module(observed)


def directions(lstm: nn.Module) -> list[nn.Module]:
    """The cells, layer by layer."""
    return [single.cell for layer in lstm.layers for single in layer.children()]


def quantizes(cell: GraphModule) -> dict[Node, Node]:
    """Every quantize node, and the node whose value it takes; a clamp belongs to the quantize."""
    found = {}
    for node in cell.graph.nodes:
        if node.target in QUANTIZE:
            value = node.args[0]
            found[node] = value.args[0] if value.target is torch.clamp else value
    return found


def fixed(scale: float, zero_point: int, dtype: torch.dtype, **limits: int) -> Callable[[], nn.Module]:
    return FixedQParamsObserver.with_args(scale=scale, zero_point=zero_point, dtype=dtype, **limits)


def data(*shape: int) -> Tensor:
    return torch.randn(*(shape or (STEPS, BATCH, INPUT)))


@contextmanager
def without_deprecation() -> Iterator[None]:
    """For quantized tensors that the test itself creates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, torch.quantize_per_channel")
        yield


def quantized(x: Tensor) -> Tensor:
    with without_deprecation():
        return torch.quantize_per_tensor(x, 0.03, 128, torch.quint8)


def flat(result: tuple[Tensor, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    output, (h_n, c_n) = result
    return output, h_n, c_n

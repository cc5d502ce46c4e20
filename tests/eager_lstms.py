"""LSTMs of torch.ao's eager mode, observed and converted, and how a fused LSTM is checked against the integer reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from converted_lstms import grid_of
from torch import Tensor, nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    convert,
    disable_observer,
    get_default_qat_qconfig,
    get_default_qconfig,
    prepare,
)

from torch_lstm_quant import reference
from torch_lstm_quant.quantized_adapter import QuantizedBoundaryLSTM

eager_warnings = pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning",
    "ignore:All inputs of this cat operator must share:UserWarning",
    "ignore:QConfig must specify a FixedQParamsObserver:UserWarning",
    "ignore:Please use quant_min and quant_max to specify the range:UserWarning",
    "ignore:torch.ao.quantization is deprecated",
    "ignore:.*reduce_range will be deprecated",
    "ignore:TypedStorage is deprecated",
    "ignore:must run observer before calling calculate_qparams",
    "ignore::torch_lstm_quant.LossWarning",
)
"""Hides what torch's own flow says of itself, and what ours says of its grids."""

INPUT, HIDDEN, STEPS, BATCH = 6, 16, 12, 8
OBSERVED_CLASS = {"float_to_observed_custom_module_class": {nn.LSTM: torch.ao.nn.quantizable.LSTM}}
QUANTIZED_CLASS = {"observed_to_quantized_custom_module_class": {torch.ao.nn.quantizable.LSTM: torch.ao.nn.quantized.LSTM}}


def data(steps: int = STEPS, batch: int = BATCH, size: int = INPUT) -> Tensor:
    return torch.randn(steps, batch, size)


class Eager(nn.Module):
    """A model as torch.ao's eager mode needs it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.quant, self.lstm, self.dequant = QuantStub(), nn.LSTM(INPUT, HIDDEN, **arguments), DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.lstm(self.quant(x))[0])  # type: ignore[no-any-return]


def eager_observed(*, qat: bool = False, **arguments: Any) -> Any:
    """Prepared and calibrated by torch.ao's eager mode."""
    torch.manual_seed(0)
    model = Eager(**arguments).train(qat)
    model.qconfig = get_default_qat_qconfig("x86") if qat else get_default_qconfig("x86")  # type: ignore[assignment]
    prepared = prepare(model, prepare_custom_config_dict=OBSERVED_CLASS)
    for _ in range(4):
        prepared(data())
    return prepared.eval().apply(disable_observer)


def eager_converted(**arguments: Any) -> Any:
    return convert(eager_observed(**arguments), convert_custom_config_dict=QUANTIZED_CLASS)


def quantized_data() -> Tensor:
    """As torch.ao's own kernels need it: in 7 of 8 bits, as they saturate on CPUs without VNNI."""
    return torch.quantize_per_tensor(data(100).clamp(-3, 3), 0.05, 64, torch.quint8)


def assert_integers(fused: Any, x: Tensor) -> None:
    """The fused LSTM gives the bits of the integer reference of its cells.

    Args:
        x: float32, or a quantized tensor, which brings the grid of the first layer's input.
    """
    cells = fused.cells()
    output, (h_n, c_n) = fused(x)
    if isinstance(fused, QuantizedBoundaryLSTM):
        cells[0] = [replace(cell, qparams=replace(cell.qparams, x=grid_of(x))) for cell in cells[0]]
        x = x.dequantize()
    expected = reference.lstm(cells, x)
    for got, wanted in zip((output, h_n, c_n), expected, strict=True):
        # torch.ao joins two directions on one grid, which is behind the LSTM
        grid = None if got.dtype == torch.qint32 else grid_of(got)
        if len(cells[0]) == 1 or got is output:
            assert torch.equal(got.dequantize(), wanted if grid is None else grid.dequantize(grid.quantize(wanted)))

"""What a module is on its way from float to fused, whoever made it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.ao.nn.quantized import dynamic
from torch.ao.nn.quantized import reference as weight_only
from torch.fx import GraphModule

from torch_lstm_quant.cell_stack import cells_of
from torch_lstm_quant.float_lstms import FLOAT_LSTMS
from torch_lstm_quant.modules import LSTM, LSTMCell
from torch_lstm_quant.observed import ObservedLSTMCell, ReferenceLSTMCell
from torch_lstm_quant.quantized_adapter import QuantizedBoundaryLSTM

Stage = Literal["float", "observed", "quantized", "reference", "fused"]
"""``"quantized"``: by torch.ao alone: dynamically, so that there are no grids, or in its eager mode, which ``lower`` takes."""

_FUSED = (LSTM, LSTMCell, QuantizedBoundaryLSTM)
_OBSERVED = (torch.ao.nn.quantizable.LSTM, torch.ao.nn.quantizable.LSTMCell, ObservedLSTMCell)
_DYNAMIC_LSTMS = (dynamic.LSTM, dynamic.LSTMCell, weight_only.LSTM, weight_only.LSTMCell)
_DYNAMIC = (
    *_DYNAMIC_LSTMS,
    dynamic.GRU,
    dynamic.GRUCell,
    dynamic.RNNCell,
    weight_only.GRU,
    weight_only.GRUCell,
    weight_only.RNNCell,
)
"""What torch.ao makes of modules whose ranges are found anew in each call, so that no grid is in them."""

_NEXT: dict[Stage, str] = {
    "fused": ", which is fused already",
    "reference": ", which is converted: use torch_lstm_quant.lower",
    "quantized": ", which torch.ao's eager mode converted: use torch_lstm_quant.lower",
    "observed": ", which is observed: convert the model first (torch_lstm_quant.convert, or convert_fx)",
    "float": ", which is float: use torch_lstm_quant.quantize, or prepare, calibrate and convert the model first",
}


def stage_of(module: nn.Module) -> Stage | None:
    """The stage of an LSTM, GRU, RNN or a cell of one; None for any other module."""
    if isinstance(module, _FUSED):
        return "fused"
    if isinstance(module, torch.ao.nn.quantized.LSTM):
        cells = [cell for layer in cells_of(module) for cell in layer]
        return "reference" if any(isinstance(cell, GraphModule) for cell in cells) else "quantized"
    if isinstance(module, ReferenceLSTMCell):
        return "reference"
    if isinstance(module, _OBSERVED):
        return "observed"
    if isinstance(module, _DYNAMIC):
        return "quantized"
    return "float" if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else None


def is_lstm(module: nn.Module) -> bool:
    """Whether it is an LSTM or LSTM cell, at whatever stage."""
    return isinstance(module, (*FLOAT_LSTMS, *_OBSERVED, ReferenceLSTMCell, *_DYNAMIC_LSTMS, *_FUSED))


def what_was_found(model: nn.Module) -> str:
    """What a model has in place of the LSTMs that it should have."""
    for path, module in model.named_modules():
        stage = stage_of(module)
        if stage is not None and is_lstm(module):
            kind = type(module).__name__
            next_step = _NEXT[stage]
            if isinstance(module, _DYNAMIC_LSTMS):
                next_step = " of torch.ao's dynamic quantization, which has no grids: quantize the float model instead"
            if isinstance(module, torch.ao.nn.quantizable.LSTMCell):
                next_step = " of torch.ao's eager mode, which converts none by itself: quantize the float model instead"
            return f"{path or 'it'} is {'an' if kind.startswith(('LSTM', 'Observed')) else 'a'} {kind}{next_step}"
    names = sorted({type(module).__name__ for module in model.modules()})
    return f"found no LSTM, only {', '.join(names)}"

"""From converted reference LSTMs to the fused kernel: what can be lowered, and what to say of what cannot."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.fx import GraphModule

from torch_lstm_quant import lstm_utils
from torch_lstm_quant.cell_stack import cell_name, cells_of, check_forward
from torch_lstm_quant.eager_cell import is_eager_cell, read_eager_cell
from torch_lstm_quant.modules import LSTM, LSTMCell
from torch_lstm_quant.observed import ReferenceLSTM, ReferenceLSTMCell
from torch_lstm_quant.quantized_adapter import QuantizedBoundaryLSTM
from torch_lstm_quant.reference_graph import ReadCell, read_cell
from torch_lstm_quant.stages import what_was_found

_FORWARDS = (torch.ao.nn.quantizable.LSTM.forward, lstm_utils.ReferenceLSTM.forward, ReferenceLSTM.forward)
"""What a converted LSTM does around its cells, so far as it is known here."""


def lower(module_or_model: nn.Module) -> nn.Module:
    """Put the fused kernel in place of every converted LSTM or LSTM cell.

    Args:
        module_or_model: a converted LSTM, whoever converted it (``torch_lstm_quant.lstm_utils``, torch.ao's functions of the
            same names, torch.ao's eager mode, ``convert`` with ``backend="reference"``), an LSTM cell that ``convert`` made
            so, or a model that contains such. It is left as it is.

    Returns:
        The fused LSTM or LSTM cell, or a copy of the model with these in it. They take and give what the reference ones do:
        float32 tensors, or quantized ones where that is the convention of the flow that made them.

    Raises:
        TypeError: not a module.
        ValueError: nothing to lower, or an LSTM that the kernel cannot compute exactly: the message names the module, layer,
            direction and node, what was found and expected, and what to do.
    """
    if not isinstance(module_or_model, nn.Module):
        raise TypeError(f"needed a converted LSTM or a model that contains one, got {type(module_or_model).__name__}")
    kinds = (torch.ao.nn.quantized.LSTM, ReferenceLSTMCell)
    references = {path: module for path, module in module_or_model.named_modules() if isinstance(module, kinds)}
    if not references:
        raise ValueError(f"nothing to lower: {what_was_found(module_or_model)}")
    # what is replaced need not be copied: deepcopy takes the fused LSTMs for copies that it has already made
    fused = {id(module): lower_module(module, path) for path, module in references.items()}
    return copy.deepcopy(module_or_model, fused)


def lower_module(reference: nn.Module, where: str = "") -> LSTM | LSTMCell | QuantizedBoundaryLSTM:
    """The fused module that computes what a converted reference LSTM or LSTM cell does; ``where`` is its module path."""
    if isinstance(reference, ReferenceLSTMCell):
        return lower_cell(reference, where or "LSTMCell")
    return lower_lstm(reference, where or "LSTM")


def lower_cell(reference: ReferenceLSTMCell, where: str) -> LSTMCell:
    """The fused LSTM cell that computes what a converted one does.

    Raises:
        ValueError: as :func:`lower`.
    """
    read = _read(reference.cell, where)
    if read.outside:
        found = ", ".join(sorted(read.outside))
        raise ValueError(f"{where}: found a cell that takes {found} as quantized tensors, expected float32 ones")
    try:
        return LSTMCell(read.cell)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def lower_lstm(reference: nn.Module, where: str) -> LSTM | QuantizedBoundaryLSTM:
    """The fused LSTM that computes what a converted reference LSTM does.

    Args:
        reference: laid out as torch.ao's: ``layers[i].layer_fw.cell`` and ``layer_bw.cell`` are graphs.
        where: its module path: every message begins with it.

    Raises:
        ValueError: as :func:`lower`.
    """
    advice = "leave it as it is, or let it contain a converted LSTM instead of being one"
    check_forward(reference, _FORWARDS, where, advice)
    layers = [
        [_read(cell, cell_name(where, layer, direction)) for direction, cell in enumerate(cells)]
        for layer, cells in enumerate(cells_of(reference))
    ]
    outside = {read.outside for cells in layers for read in cells}
    batch_first, dropout = bool(reference.batch_first), float(reference.dropout)  # type: ignore[arg-type]
    try:
        if outside == {frozenset()}:
            cells = [[read.cell for read in cells] for cells in layers]
            return LSTM(cells, batch_first=batch_first, dropout=dropout)
        if outside == {frozenset(("x", "hx", "cx"))}:
            torchs_own = type(reference).forward is torch.ao.nn.quantizable.LSTM.forward
            return QuantizedBoundaryLSTM(layers, batch_first=batch_first, dropout=dropout, joins_on_first_grid=torchs_own)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    found = " and ".join(f"{', '.join(sorted(parts)) or 'nothing'}" for parts in outside)
    raise ValueError(
        f"{where}: found cells that take {found} as quantized tensors, expected x, hx and cx in all cells or in none: "
        "convert it with torch_lstm_quant.lstm_utils"
    )


def _read(cell: object, place: str) -> ReadCell:
    if isinstance(cell, GraphModule):
        return read_cell(cell, place)
    if is_eager_cell(cell):
        return read_eager_cell(cell, place)  # type: ignore[arg-type]
    raise ValueError(f"{place}: {_why_no_cell(cell)}")


def _why_no_cell(cell: object) -> str:
    expected = "expected a converted cell's GraphModule or quantized modules"
    advice = "use torch_lstm_quant.prepare and convert, or both functions of torch_lstm_quant.lstm_utils"
    linear = getattr(cell, "igates", None)
    if isinstance(linear, nn.ModuleDict):
        linear = next(iter(linear.values()), None)
    if isinstance(linear, nn.Linear):
        return (
            f"found a {type(cell).__name__} of float modules, {expected}: torch.ao's functions do not convert the backward "
            f"direction, and give it random weights: {advice}"
        )
    return f"found {type(cell).__name__}, {expected}: {advice}"

"""Reads a cell of ``torch.ao.nn.quantized.LSTM`` as torch.ao's eager mode converts it: quantized modules instead of a graph.

Every module of such a cell takes and gives ``quint8`` tensors: linears with packed weights, ``QFunctional`` for sums and
products, and torch's sigmoid and tanh, whose outputs have one grid in all models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq

from torch_lstm_quant.cell import Cell
from torch_lstm_quant.cell_graph import GATE_NAMES
from torch_lstm_quant.cell_stack import check_forward
from torch_lstm_quant.qparams import GATES, CellQParams, QParams
from torch_lstm_quant.reference_graph import ReadCell
from torch_lstm_quant.reference_linear import Rows, join

_LOW, _HIGH = 0, 255  # of quint8
_SIGMOID, _TANH = QParams(1 / 256, 0, _LOW, _HIGH), QParams(1 / 128, 128, _LOW, _HIGH)
"""The grids of ``torch.sigmoid`` and ``torch.tanh`` of a ``quint8`` tensor, which torch has fixed."""

FUNCTIONALS = ("fgate_cx", "igate_cgate", "fgate_cx_igate_cgate", "ogate_cy")
"""Parts that are sums or products, each a module of its own in torch.ao's cell, split gates or not."""

_ADVICE = "convert the observed model again, or quantize the float one with torch_lstm_quant.quantize"


def is_eager_cell(cell: object) -> bool:
    """Whether torch.ao's eager mode has converted a cell."""
    kinds = (nnq.Linear, nnq.QFunctional)
    return isinstance(cell, torch.ao.nn.quantizable.LSTMCell) and any(isinstance(m, kinds) for m in cell.modules())


def read_eager_cell(cell: torch.ao.nn.quantizable.LSTMCell, where: str) -> ReadCell:
    """Read a converted cell.

    Args:
        cell: of quantized modules.
        where: module path, layer and direction: every message begins with it.

    Raises:
        ValueError: a module that such a cell does not have, a grid that is none: the message names it.
    """
    advice = "leave it as it is, or quantize an nn.LSTM with torch_lstm_quant.quantize"
    check_forward(cell, (torch.ao.nn.quantizable.LSTMCell.forward,), where, advice)
    ih, hh = ([_linear(cell, part, gate, where) for gate in range(len(GATES))] for part in ("igates", "hgates"))
    grids: dict[str, Any] = {part: _functional(cell, part, where) for part in FUNCTIONALS}
    grids |= {part: _function(cell, part, where) for part in GATES}
    grids |= {
        "hx": grids["ogate_cy"],  # each step reads what the one before it wrote
        "igates": tuple(grid for _, grid in ih),
        "hgates": tuple(grid for _, grid in hh),
        "gates": tuple(_functional(cell, _name(cell, "gates", gate), where) for gate in range(len(GATES))),
        "tanh_cy": _TANH,
    }
    try:
        (weight_ih, bias_ih, grid_ih), (weight_hh, bias_hh, grid_hh) = (join([rows for rows, _ in side]) for side in (ih, hh))
        qparams = CellQParams(**grids, weight_ih=grid_ih, weight_hh=grid_hh)
        read = Cell(qparams, weight_ih, weight_hh, bias_ih, bias_hh)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return ReadCell(read, frozenset(("x", "hx", "cx")), torch.quint8, torch.quint8)


def _name(cell: torch.ao.nn.quantizable.LSTMCell, part: str, gate: int) -> str:
    """The module of one gate's part: one for all four unless gates are split."""
    return f"{part}.{GATE_NAMES[gate]}" if cell.split_gates else part


def _functional(cell: nn.Module, name: str, where: str) -> QParams:
    """The grid of a sum or product."""
    module = _module(cell, name, (nnq.QFunctional,), where)
    return _grid(module.scale, module.zero_point, f"{where}, module {name}")


def _function(cell: nn.Module, name: str, where: str) -> QParams:
    """The grid of what a gate's function gives: torch's own, unless the sigmoid was observed."""
    module = _module(cell, name, (nn.Tanh,) if name == "cell_gate" else (nn.Sigmoid, nnq.Sigmoid), where)
    if isinstance(module, nnq.Sigmoid):
        return _grid(module.output_scale, module.output_zero_point, f"{where}, module {name}")
    return _TANH if name == "cell_gate" else _SIGMOID


def _linear(cell: torch.ao.nn.quantizable.LSTMCell, part: str, gate: int, where: str) -> tuple[Rows, QParams]:
    """One gate's rows of a projection, and the grid of what it gives."""
    name = _name(cell, part, gate)
    linear = _module(cell, name, (nnq.Linear,), where)
    place = f"{where}, module {name}"
    weight, bias = linear.weight(), linear.bias()
    rows = len(weight)
    if weight.qscheme() == torch.per_tensor_affine:
        scale, zero_point = torch.tensor([weight.q_scale()]), torch.tensor([weight.q_zero_point()])
    else:
        scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        if weight.q_per_channel_axis() != 0:
            raise ValueError(
                f"{place}: expected weights with a scale a row, got axis {weight.q_per_channel_axis()}: {_ADVICE}"
            )

    def each_row(values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).expand(rows).contiguous()

    all_rows = Rows(
        weight.int_repr(),
        torch.zeros(rows) if bias is None else bias.detach(),
        each_row(scale, torch.float32),
        each_row(zero_point, torch.int32),
    )
    return all_rows if cell.split_gates else all_rows.quarter(gate), _grid(linear.scale, linear.zero_point, place)


def _module(cell: nn.Module, name: str, kinds: tuple[type[nn.Module], ...], where: str) -> Any:
    module = dict(cell.named_modules(remove_duplicate=False)).get(name)
    # not isinstance: linears that are quantized dynamically are a subclass
    if type(module) not in kinds:
        expected = " or ".join(f"a {'quantized ' * kind.__module__.startswith(nnq.__name__)}{kind.__name__}" for kind in kinds)
        got = "nothing" if module is None else f"{type(module).__module__}.{type(module).__name__}"
        raise ValueError(f"{where}, module {name}: expected {expected}, got {got}: {_ADVICE}")
    return module


def _grid(scale: Any, zero_point: Any, place: str) -> QParams:
    try:
        return QParams(float(scale), int(zero_point), _LOW, _HIGH)
    except ValueError as error:
        raise ValueError(f"{place}: {error}: {_ADVICE}") from error

"""The integer reference: the numerics contract of docs/numerics.md in plain torch operations, one step after the other.

It is the oracle that every kernel is held to, bit for bit. So it is written to be read, not to be fast, and shares neither
tables nor kernels with what it judges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qparams import GATES, CellQParams, QParams, WeightQParams


def lstm(
    layers: Sequence[Sequence[Cell]], x: Tensor, h0: Tensor | None = None, c0: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a stack of quantized LSTM layers.

    Args:
        layers: a list of layers, each a list of one or two directions.
        x: float32 ``[T, B, input_size]``.
        h0: float32 ``[num_layers * num_directions, B, h_size]``, zeros if None; ``h_size`` is ``proj_size``, or
            ``hidden_size`` where that is 0.
        c0: float32 ``[num_layers * num_directions, B, hidden_size]``, likewise.

    Returns:
        ``output`` float32 ``[T, B, num_directions * h_size]`` and the last ``h_n``, ``c_n``, shaped as ``h0`` and ``c0``.
    """
    directions, first = len(layers[0]), layers[0][0]
    rows = len(layers) * directions, x.shape[1]
    h0 = torch.zeros(*rows, first.h_size) if h0 is None else h0
    c0 = torch.zeros(*rows, first.hidden_size) if c0 is None else c0
    h_n, c_n = [], []
    for layer, cells in enumerate(layers):
        outputs = []
        for direction, cell in enumerate(cells):
            index = layer * directions + direction
            steps = x.flip(0) if direction else x
            output, h, c = _run_cell(cell, steps, h0[index], c0[index])
            outputs.append(output.flip(0) if direction else output)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(outputs, dim=2)
    return x, torch.stack(h_n), torch.stack(c_n)


def _run_cell(cell: Cell, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All steps ``x`` ``[T, B, input_size]`` through one cell."""
    qparams = cell.qparams
    # the input projection has no state, so it is done for all steps at once
    igates = _project(x.flatten(0, 1), qparams.x, cell.weight_ih, qparams.weight_ih, cell.bias_ih)
    igates = _on_gate_grids(igates, qparams.igates).unflatten(0, x.shape[:2])
    output = []
    for t in range(x.shape[0]):
        hgates = _project(h, qparams.hx, cell.weight_hh, qparams.weight_hh, cell.bias_hh)
        gates = _on_gate_grids(igates[t] + _on_gate_grids(hgates, qparams.hgates), qparams.gates)
        ogate_cy, c = _update(qparams, gates, c)
        h = _project_h(cell, ogate_cy)
        output.append(h)
    return torch.stack(output) if output else h.new_empty(0, *h.shape), h, c


def _project_h(cell: Cell, ogate_cy: Tensor) -> Tensor:
    """The new hidden state: what the output gate lets through, projected where the cell has a ``weight_hr``."""
    if cell.weight_hr is None:
        return ogate_cy
    qparams = cell.qparams
    no_bias = torch.zeros(cell.proj_size)
    return _on_grid(_project(ogate_cy, qparams.ogate_cy, cell.weight_hr, qparams.weight_hr, no_bias), qparams.hy)


def _update(qparams: CellQParams, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The pointwise half of a cell: gates ``[B, 4 * hidden_size]`` and the cell state to ogate_cy and the new cell state."""
    i, f, g, o = gates.chunk(4, 1)
    input_gate = _gate("sigmoid", i, qparams, 0)
    forget_gate = _gate("sigmoid", f, qparams, 1)
    cell_gate = _gate("tanh", g, qparams, 2)
    output_gate = _gate("sigmoid", o, qparams, 3)
    fgate_cx = _on_grid(forget_gate * _on_grid(c, qparams.cx), qparams.fgate_cx)
    igate_cgate = _on_grid(input_gate * cell_gate, qparams.igate_cgate)
    cy = _on_grid(fgate_cx + igate_cgate, qparams.fgate_cx_igate_cgate)
    tanh_input = _on_grid(cy, qparams.tanh_cy_input)
    tanh_cy = _function("tanh", tanh_input, qparams.tanh_input, qparams.tanh_cy)
    return _on_grid(output_gate * tanh_cy, qparams.ogate_cy), cy


def _gate(function: str, v: Tensor, qparams: CellQParams, gate: int) -> Tensor:
    """One gate, with the second grids that torch.ao's own utilities put before and after its function."""
    output_grid = getattr(qparams, GATES[gate])
    value = _function(function, _on_grid(v, qparams.gates_again[gate]), qparams.gates[gate], output_grid)
    return _on_grid(value, qparams.outputs_again[gate])


def _on_grid(v: Tensor, grid: QParams | None) -> Tensor:
    """Quantize and dequantize, or leave as it is where the part has no grid."""
    return v if grid is None else grid.dequantize(grid.quantize(v))


def _on_gate_grids(v: Tensor, grids: Sequence[QParams | None]) -> Tensor:
    """``v`` ``[..., 4 * hidden_size]``, each quarter on its gate's grid."""
    return torch.cat([_on_grid(part, grid) for part, grid in zip(v.chunk(4, -1), grids, strict=True)], dim=-1)


def _project(v: Tensor, grid: QParams | None, weight: Tensor, weight_grid: WeightQParams | None, bias: Tensor) -> Tensor:
    """``v @ weight.T + bias`` for ``v`` ``[B, K]``: in integers where both sides have a grid, else in float32, k ascending."""
    if grid is not None and weight_grid is not None:
        scale = grid.scale * weight_grid.scale
        return _integer_sums(grid.quantize(v), grid, weight, weight_grid).to(torch.float32) * scale + bias
    v = _on_grid(v, grid)
    if weight_grid is not None:
        weight = (weight.to(torch.int32) - weight_grid.zero_point[:, None]).to(torch.float32) * weight_grid.scale[:, None]
    total = torch.zeros(v.shape[0], weight.shape[0])
    for k in range(v.shape[1]):
        total = total + v[:, k, None] * weight[None, :, k]
    return total + bias


def _integer_sums(q: Tensor, grid: QParams, weight: Tensor, weight_grid: WeightQParams) -> Tensor:
    """``sum over k of (q - zero_point) * (weight - zero_point)``, exactly: in int32 where that holds every sum, or int64."""
    largest = weight.shape[1] * (grid.quant_max - grid.quant_min) * 255
    dtype = torch.int32 if largest < 2**31 else torch.int64
    return (q.to(dtype) - grid.zero_point) @ (weight.to(dtype) - weight_grid.zero_point[:, None].to(dtype)).T


def _function(function: str, v: Tensor, input_grid: QParams | None, output_grid: QParams | None) -> Tensor:
    """Sigmoid or tanh: of a quantized value in float64, rounded once; of a float32 value by :func:`_float_function`."""
    if input_grid is None:
        return _on_grid(_float_function(function, v), output_grid)
    exact = torch.sigmoid(v.double()) if function == "sigmoid" else torch.tanh(v.double())
    if output_grid is None:
        return exact.float()
    q = torch.round(exact / output_grid.scale) + output_grid.zero_point
    return output_grid.dequantize(q.clamp(output_grid.quant_min, output_grid.quant_max))


_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_TAYLOR = [1.0]
for _n in range(1, 14):
    _TAYLOR.append(_TAYLOR[-1] / _n)


def _exp(y: Tensor) -> Tensor:
    """exp of a float64 ``y <= 0``: a Taylor series of degree 13 on [-ln(2)/2, ln(2)/2], scaled by a power of two."""
    y = y.clamp(min=-708.0)  # the smallest whose power of two is a normal float64
    n = torch.round(y * _LOG2_E)
    r = y - n * _LN_2
    total = torch.full_like(r, _TAYLOR[13])
    for coefficient in reversed(_TAYLOR[:13]):
        total = total * r + coefficient
    power_of_two = ((n.nan_to_num().to(torch.int64) + 1023) << 52).view(torch.float64)
    return total * power_of_two


def _float_function(function: str, v: Tensor) -> Tensor:
    """Sigmoid or tanh of an unquantized float32: fixed float64 operations, rounded once, so that every machine agrees."""
    x = v.double()
    if function == "sigmoid":
        e = _exp(-x.abs())
        return torch.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e)).float()
    e = _exp(-2.0 * x.abs())
    large = (1.0 - e) / (1.0 + e)
    large = torch.where(x < 0, -large, large)
    # near zero 1 - e loses digits; two terms of the series are exact to float32 there
    return torch.where(x.abs() < 2.0**-12, x - x * x * x / 3.0, large).float()

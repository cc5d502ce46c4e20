"""A quantized cell in standard ONNX operators, each of which is exact or rounds as ``docs/numerics.md`` says.

What runtimes may do, and how it is avoided:

- A product of uint8 and int8 saturates in ONNX Runtime on x86 CPUs without VNNI; one of two uint8 does not, on any. So the
  weights are stored with 128 added.
- Sums that ``MatMulInteger`` cannot hold are products of float64 matrices: integers below 2**53, so that no order and no fused
  multiply-add changes them.
- QuantizeLinear and DequantizeLinear are not used: optimizers replace the operators between them by quantized ones.
- Adding 0.0 to make -0.0 the integers' only zero is optimized away; a conversion to int32 and back is not.
- Clip, Max and Min do not say what they make of NaN; a comparison does.
- Sigmoid, Tanh and Exp differ from runtime to runtime: tables, or products, sums and quotients of float64, stand for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_lstm_quant.cell import Cell
from torch_lstm_quant.exported_cell import Function, Projection, functions, projections
from torch_lstm_quant.onnx_graph import Graph
from torch_lstm_quant.qparams import CellQParams, QParams

_GATES = 4
_INT32 = 2**31
_LARGE = 1e15
"""Sums and products of two values below this stay finite in float32."""


def add_layers(
    graph: Graph, layers: Sequence[Sequence[Cell]], x: str, h_0: str | None, c_0: str | None, lengths: str | None = None
) -> tuple[str, str, str]:
    """Adds a stack of layers.

    Args:
        graph: where to.
        layers: a list of layers, each a list of one or two directions.
        x: name of float32 ``[T, B, input_size]``.
        h_0, c_0: names of the states, float32 ``[num_layers * num_directions, B, hidden_size]``, None for zeros. Hidden
            states are ``proj_size`` wide, where there is one.
        lengths: name of int64 ``[B]``, how many steps each row has, None for all.

    Returns:
        names of the output ``[T, B, num_directions * hidden_size]`` and of the new states.
    """
    directions, count = len(layers[0]), len(layers) * len(layers[0])
    h = _states(graph, h_0, x, count, layers[0][0].h_size)
    c = _states(graph, c_0, x, count, layers[0][0].hidden_size)
    runs = None if lengths is None else _runs(graph, x, lengths)
    h_n, c_n = [], []
    for layer, cells in enumerate(layers):
        outputs = []
        for direction, cell in enumerate(cells):
            index = layer * directions + direction
            output, new_h, new_c = _run_cell(graph, cell, x, h[index], c[index], runs, reverse=direction == 1)
            outputs.append(output)
            h_n.append(new_h)
            c_n.append(new_c)
        x = graph.op("Concat", *outputs, axis=2) if directions == 2 else outputs[0]
    return x, _stack(graph, h_n), _stack(graph, c_n)


def _states(graph: Graph, states: str | None, x: str, count: int, width: int) -> list[str]:
    """``count`` states ``[B, width]``."""
    if states is not None:
        return [graph.op("Gather", states, graph.constant(index), axis=0) for index in range(count)]
    shape = graph.op("Concat", graph.op("Shape", x, start=1, end=2), graph.constant([width]), axis=0)
    return [graph.op("Expand", graph.constant(0.0), shape)] * count


def _stack(graph: Graph, states: Sequence[str]) -> str:
    rows = [graph.op("Unsqueeze", state, graph.constant([0])) for state in states]
    return graph.op("Concat", *rows, axis=0)


def _runs(graph: Graph, x: str, lengths: str) -> str:
    """bool ``[T, B, 1]``: whether a row has the step."""
    count = graph.op("Squeeze", graph.op("Shape", x, start=0, end=1))
    steps = graph.op("Range", graph.constant(0), count, graph.constant(1))
    rows = graph.op("Less", graph.op("Unsqueeze", steps, graph.constant([1])), lengths)
    return graph.op("Unsqueeze", rows, graph.constant([2]))


def _run_cell(graph: Graph, cell: Cell, x: str, h: str, c: str, runs: str | None, *, reverse: bool) -> tuple[str, str, str]:
    """Adds a cell over a whole sequence ``x``; returns the output, in the order of time, and the new states.

    Where ``runs`` is not true, a row keeps its states and its output is zero.
    """
    qparams, sides = cell.qparams, projections(cell)
    igates = _on_gate_grids(graph, _project(graph, sides["ih"], x, steps=True), qparams.igates)
    h, c = _first_states(graph, cell, h, c)
    body = graph.inner("step")
    names = [body.name(name) for name in ("h", "c", "igates", "runs")]
    new_h, new_c = _step(body, cell, *names[:3])
    if runs is None:
        outputs = [new_h, new_c, body.op("Identity", new_h)]  # a value may be an output only once
    else:
        kept = ((new_h, names[0]), (new_c, names[1]), (new_h, body.constant(0.0)))
        outputs = [body.op("Where", names[3], new, old) for new, old in kept]
    inputs = [body.value_info(name, torch.float32, None) for name in names[:3]]
    inputs += [] if runs is None else [body.value_info(names[3], torch.bool, None)]
    proto = body.proto(body.name("body"), inputs, [body.value_info(name, torch.float32, None) for name in outputs])
    scanned = [igates] if runs is None else [igates, runs]
    directions = {"scan_input_directions": [int(reverse)] * len(scanned), "scan_output_directions": [int(reverse)]}
    h_n, c_n, output = graph.ops("Scan", 3, h, c, *scanned, body=proto, num_scan_inputs=len(scanned), **directions)
    return output, h_n, c_n


def add_step(graph: Graph, cell: Cell, x: str, h: str, c: str) -> tuple[str, str]:
    """Adds one step of a cell: from float32 ``[B, input_size]`` and the states ``[B, hidden_size]`` to the new states."""
    igates = _on_gate_grids(graph, _project(graph, projections(cell)["ih"], x, steps=False), cell.qparams.igates)
    return _step(graph, cell, *_first_states(graph, cell, h, c), igates)


def _first_states(graph: Graph, cell: Cell, h: str, c: str) -> tuple[str, str]:
    """The states from which on each is on the grid on which it is read, where a step writes it on that grid."""
    qparams = cell.qparams
    h = _on_grid(graph, h, qparams.hx) if _keeps_h(cell) else h
    return h, _on_grid(graph, c, qparams.cx) if _keeps_c(qparams) else c


def _step(graph: Graph, cell: Cell, h: str, c: str, igates: str) -> tuple[str, str]:
    """Adds one step, from the input projection ``[B, 4 * hidden_size]`` and the states to the new states."""
    qparams, sides = cell.qparams, projections(cell)
    hgates = _on_gate_grids(graph, _project(graph, sides["hh"], h, steps=False, on_grid=_keeps_h(cell)), qparams.hgates)
    bounded = _bounded_functions(cell)
    i, f, g, o = _gates(graph, cell, graph.op("Add", igates, hgates))
    cx = c if _keeps_c(qparams) else _on_grid(graph, c, qparams.cx)
    fgate_cx = _on_grid(graph, graph.op("Mul", f, cx), qparams.fgate_cx)
    igate_cgate = _on_grid(graph, graph.op("Mul", i, g), qparams.igate_cgate, bounded=bounded)
    cy = _on_grid(graph, graph.op("Add", fgate_cx, igate_cgate), qparams.fgate_cx_igate_cgate)
    tanh_cy = _function(graph, functions(cell)[_GATES], cy)
    ogate_cy = _on_grid(graph, graph.op("Mul", o, tanh_cy), qparams.ogate_cy, bounded=bounded)
    if "hr" not in sides:
        return ogate_cy, cy
    return _on_grid(graph, _project(graph, sides["hr"], ogate_cy, steps=False, on_grid=True), qparams.hy), cy


def _keeps_h(cell: Cell) -> bool:
    """Whether ``h`` is written on the grid on which it is read, where quantizing again changes nothing."""
    return cell.qparams.hx is not None and cell.qparams.hx == cell.h_grid


def _keeps_c(qparams: CellQParams) -> bool:
    """The same of the cell state."""
    return qparams.cx is not None and qparams.cx == qparams.fgate_cx_igate_cgate and not qparams.cx.unbounded


def _bounded_functions(cell: Cell) -> bool:
    """Whether no function gives NaN, nor a product of two of them."""
    tables = [function.table() for function in functions(cell)]
    return all(table is not None and bool(table.abs().max() < _LARGE) for table in tables)


def _bounded_gates(cell: Cell) -> bool:
    """Whether no sum of the two projections is NaN."""
    sides = projections(cell)
    return all(sides[side].is_integer and sides[side].largest_value() < _LARGE for side in ("ih", "hh"))


def _gates(graph: Graph, cell: Cell, sums: str) -> list[str]:
    """The functions of the four gates: in one look-up where all have tables."""
    four = functions(cell)[:_GATES]
    if all(function.input_grids for function in four):
        return _split(graph, _look_up_gates(graph, cell, sums))
    return [_function(graph, function, part) for function, part in zip(four, _split(graph, sums), strict=True)]


def _look_up_gates(graph: Graph, cell: Cell, sums: str) -> str:
    """All gates by one table, in which those of the gates follow one another, equal ones being there once."""
    four, units = functions(cell)[:_GATES], cell.hidden_size
    parts: list[Tensor] = []
    lows = []
    for function in four:
        table = function.table()
        assert table is not None
        if not any(torch.equal(part, table) for part in parts):
            parts.append(table)
        index = next(index for index, part in enumerate(parts) if torch.equal(part, table))
        lows.append(sum(part.numel() for part in parts[:index]) - _low(function.input_grids[0]))
    grids = [function.input_grids[0] for function in four]
    steps = graph.cast(_rounded(graph, sums, grids, units, bounded=_bounded_gates(cell)), torch.int32)
    places = graph.op("Add", steps, graph.constant(torch.tensor(lows, dtype=torch.int32).repeat_interleave(units)))
    return graph.op("Gather", graph.constant(torch.cat(parts)), places)


def _function(graph: Graph, function: Function, value: str) -> str:
    table = function.table()
    if table is None:
        value = _float_function(graph, function.name, value)
        for grid in function.output_grids:
            value = _on_grid(graph, value, grid)
        return value
    grid = function.input_grids[0]
    steps = graph.cast(_rounded(graph, value, [grid]), torch.int32)
    places = graph.op("Add", steps, graph.constant(-_low(grid), torch.int32))
    return graph.op("Gather", graph.constant(table), places)


def _project(graph: Graph, projection: Projection, value: str, *, steps: bool, on_grid: bool = False) -> str:
    """``[value] · W + b``, value ``[B, K]`` or, with ``steps``, ``[T, B, K]``; ``on_grid`` says that it is on its grid."""
    if not projection.is_integer:
        total = _float_sums(graph, projection, value, steps=steps)
    else:
        sums = _integer_sums(graph, projection, value, on_grid=on_grid)
        total = graph.op("Mul", sums, graph.constant(projection.multiplier()))
    return graph.op("Add", total, graph.constant(projection.bias))


def _integer_sums(graph: Graph, projection: Projection, value: str, *, on_grid: bool) -> str:
    """The exact sums, rounded once to float32."""
    grid, weight_grid = projection.grid, projection.weight_grid
    assert grid is not None
    assert weight_grid is not None
    if on_grid:
        steps = graph.op("Round", graph.op("Mul", value, graph.constant(grid.inv_scale, torch.float32)))
    else:
        steps = _rounded(graph, value, [grid])
    span, depth = grid.quant_max - grid.quant_min, projection.weight.shape[1]
    if span <= 255 and span * 255 * depth < _INT32:
        operand = graph.cast(graph.op("Add", steps, graph.constant(float(-_low(grid)))), torch.uint8)
        weight = (projection.weight.to(torch.int32) + 128).to(torch.uint8).T
        zero_point = graph.constant(-_low(grid), torch.uint8)
        weight_zero_point = graph.constant((weight_grid.zero_point + 128).to(torch.uint8))
        sums = graph.op("MatMulInteger", operand, graph.constant(weight), zero_point, weight_zero_point)
    else:
        weight = projection.centred_weight().to(torch.float64).T
        sums = graph.op("MatMul", graph.cast(steps, torch.float64), graph.constant(weight))
    return graph.cast(sums, torch.float32)


def _float_sums(graph: Graph, projection: Projection, value: str, *, steps: bool) -> str:
    """Sums of float32s, k ascending, by a Scan over k: ``MatMul`` takes them in any order."""
    value = _on_grid(graph, value, projection.grid)
    columns = graph.op("Transpose", value, perm=[2, 0, 1] if steps else [1, 0])
    columns = graph.op("Unsqueeze", columns, graph.constant([-1]))
    weight = projection.float_weight()
    # zeros [..., 4 * hidden_size]
    shape = graph.op("Shape", value, start=0, end=2 if steps else 1)
    shape = graph.op("Concat", shape, graph.constant([weight.shape[0]]), axis=0)
    zeros = graph.op("Expand", graph.constant(0.0), shape)
    body = graph.inner("product")
    total, column, row = (body.name(name) for name in ("total", "column", "row"))
    new_total = body.op("Add", total, body.op("Mul", column, row))
    proto = body.proto(
        body.name("body"),
        [body.value_info(name, torch.float32, None) for name in (total, column, row)],
        [body.value_info(new_total, torch.float32, None)],
    )
    return graph.op("Scan", zeros, columns, graph.constant(weight.T), body=proto, num_scan_inputs=2)


def _low(grid: QParams) -> int:
    """The grid's least steps."""
    return grid.quant_min - grid.zero_point


def _rounded(graph: Graph, value: str, grids: Sequence[QParams], units: int = 1, *, bounded: bool = False) -> str:
    """A value's steps as float32, -0.0 among them; of several grids, one for each gate of ``units`` columns.

    ``bounded`` says that the value is never NaN.
    """

    def each(numbers: Sequence[float]) -> str:
        if len(set(numbers)) == 1:
            return graph.constant(numbers[0], torch.float32)
        return graph.constant(torch.tensor(numbers, dtype=torch.float32).repeat_interleave(units))

    low, high = each([_low(grid) for grid in grids]), each([grid.quant_max - grid.zero_point for grid in grids])
    steps = graph.op("Mul", value, each([grid.inv_scale for grid in grids]))
    if bounded and len(set(grids)) == 1:
        return graph.op("Round", graph.op("Clip", steps, low, high))
    steps = graph.op("Where", graph.op("Greater", steps, low), steps, low)  # NaN is not greater
    return graph.op("Round", graph.op("Min", steps, high))


def _on_grid(graph: Graph, value: str, grid: QParams | None, *, bounded: bool = False) -> str:
    if grid is None:
        return value
    steps = graph.cast(graph.cast(_rounded(graph, value, [grid], bounded=bounded), torch.int32), torch.float32)
    return graph.op("Mul", steps, graph.constant(grid.scale, torch.float32))


def _on_gate_grids(graph: Graph, value: str, grids: Sequence[QParams | None]) -> str:
    """``[..., 4 * hidden_size]``, each quarter on its gate's grid."""
    if len(set(grids)) == 1:
        return _on_grid(graph, value, grids[0])
    parts = [_on_grid(graph, part, grid) for part, grid in zip(_split(graph, value), grids, strict=True)]
    return graph.op("Concat", *parts, axis=-1)


def _split(graph: Graph, value: str) -> list[str]:
    """The quarters of the last axis."""
    return graph.ops("Split", _GATES, value, axis=-1, num_outputs=_GATES)


_TAYLOR = [1.0]
for _n in range(1, 14):
    _TAYLOR.append(_TAYLOR[-1] / _n)
_SMALLEST = -708.0


def _float_function(graph: Graph, name: str, value: str) -> str:
    """Sigmoid or tanh of a float32 without a grid: the float64 operations of csrc/kernels/float_function.cpp."""

    def number(one: float) -> str:
        return graph.constant(one, torch.float64)

    x = graph.cast(value, torch.float64)
    magnitude = graph.op("Abs", x)
    e = _exponential(graph, graph.op("Mul", magnitude, number(-2.0 if name == "tanh" else -1.0)))
    below = graph.op("Add", number(1.0), e)
    if name == "sigmoid":
        above = graph.op("Where", graph.op("GreaterOrEqual", x, number(0.0)), number(1.0), e)
        return graph.cast(graph.op("Div", above, below), torch.float32)
    large = graph.op("Div", graph.op("Sub", number(1.0), e), below)
    large = graph.op("Where", graph.op("Less", x, number(0.0)), graph.op("Neg", large), large)
    cube = graph.op("Mul", graph.op("Mul", x, x), x)
    small = graph.op("Sub", x, graph.op("Div", cube, number(3.0)))
    return graph.cast(graph.op("Where", graph.op("Less", magnitude, number(2.0**-12)), small, large), torch.float32)


def _exponential(graph: Graph, y: str) -> str:
    """exp of a float64 ``y <= 0``: a Taylor series times a power of two, which a table has."""

    def number(one: float) -> str:
        return graph.constant(one, torch.float64)

    y = graph.op("Where", graph.op("Less", y, number(_SMALLEST)), number(_SMALLEST), y)
    n = graph.op("Round", graph.op("Mul", y, number(1.4426950408889634)))
    r = graph.op("Sub", y, graph.op("Mul", n, number(0.6931471805599453)))
    total = number(_TAYLOR[13])
    for coefficient in reversed(_TAYLOR[:13]):
        total = graph.op("Add", graph.op("Mul", total, r), number(coefficient))
    powers = torch.pow(torch.tensor(2.0, dtype=torch.float64), torch.arange(-1022, 1))
    place = graph.op("Add", n, number(1022.0))
    place = graph.op("Where", graph.op("Greater", place, number(0.0)), place, number(0.0))  # NaN, which has made `total` NaN
    return graph.op("Mul", total, graph.op("Gather", graph.constant(powers), graph.cast(place, torch.int64)))

"""Reads a converted cell's graph, whoever made it: the grids, int8 weights and biases with which it computes.

The graph is matched backwards, from what it returns, by what each node computes, not by what it is called. What does not
match is a ``ValueError`` that names the node, what was found there, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from torch_lstm_quant.cell import Cell
from torch_lstm_quant.graph_values import GraphValues, Value, fold
from torch_lstm_quant.qparams import GATES, MAX_STEPS, CellQParams, Grids, QParams
from torch_lstm_quant.reference_linear import Rows, join, read_linear
from torch_lstm_quant.tables import cut_unbounded


@dataclass(frozen=True)
class ReadCell:
    """A cell as its graph computes it.

    Args:
        cell: grids, weights and biases.
        outside: those of ``x``, ``hx`` and ``cx`` that the graph takes as quantized tensors, whose grids come with them at run
            time. In ``cell`` they have no grid, but ``hx`` has the one that the cell itself writes.
        h_dtype, c_dtype: the quantized dtypes in which the graph returns the states; None for float32.
    """

    cell: Cell
    outside: frozenset[str]
    h_dtype: torch.dtype | None
    c_dtype: torch.dtype | None


def read_cell(graph_module: GraphModule, where: str) -> ReadCell:
    """Read a converted cell.

    Args:
        graph_module: ``forward(x, (hx, cx)) -> (hy, cy)``, made of quantize and dequantize ops (of quantized dtypes or of
            ``quantized_decomposed``), linears, sigmoid, tanh, add, mul and chunk.
        where: module path, layer and direction: every message begins with it.

    Raises:
        ValueError: a graph that computes anything else, grids that the kernel cannot hold, weights that are not finite.
    """
    return _Reader(graph_module, where).read()


@dataclass(frozen=True)
class _Projection:
    """One gate's rows of a linear, or all of them, what it reads, and the grid of what it gives."""

    reads: Value
    rows: Rows
    grid: QParams | None


@dataclass(frozen=True)
class _Gate:
    """A gate: its two projections, and the grids before and after its function."""

    ih: _Projection
    hh: _Projection
    inputs: Grids
    outputs: Grids


class _Reader:
    """The matching of one cell's graph."""

    def __init__(self, graph_module: GraphModule, where: str) -> None:
        self._where = where
        self._values = GraphValues(graph_module, where)
        self._rows: dict[Node, Rows] = {}

    def read(self) -> ReadCell:
        values = self._values
        (hy, h_dtype), (c, c_dtype) = values.returned()
        h, projection = self._projected(hy)
        output_gate, tanh_cy = values.operands(h.source, "mul", ("sigmoid", "tanh"), "the hidden state")
        fgate_cx, igate_cgate = values.operands(c.source, "add", ("fgate_cx", "igate_cgate"), "the cell state")
        forget_gate, cx = values.operands(fgate_cx.source, "mul", ("sigmoid", "cx"), "the forget gate times the cell state")
        input_gate, cell_gate = values.operands(
            igate_cgate.source, "mul", ("sigmoid", "tanh"), "the input gate times the cell gate"
        )
        gates = [self._gate(index, value) for index, value in enumerate((input_gate, forget_gate, cell_gate, output_gate))]
        x, hx = self._shared_input("x", [gate.ih for gate in gates]), self._shared_input("hx", [gate.hh for gate in gates])
        outside = frozenset(name for name, value in (("x", x), ("hx", hx), ("cx", cx)) if value.outside and not value.grids)
        state, tanh_input = self._cell_state(c, tanh_cy)
        ogate_cy = values.one_grid(h, "ogate_cy")
        if ogate_cy is not None and ogate_cy.unbounded:
            ogate_cy = _cut_to_products(ogate_cy, output_gate.grids, tanh_cy.grids)
        written = projection.grid if projection else ogate_cy
        fields = {
            "x": values.one_grid(x, "x"),
            "hx": written if "hx" in outside else values.one_grid(hx, "hx"),
            "cx": values.one_grid(cx, "cx"),
            "igates": tuple(gate.ih.grid for gate in gates),
            "hgates": tuple(gate.hh.grid for gate in gates),
            "gates": tuple(_first(gate.inputs) for gate in gates),
            **{part: _first(gate.outputs) for part, gate in zip(GATES, gates, strict=True)},
            "fgate_cx": values.one_grid(fgate_cx, "fgate_cx"),
            "igate_cgate": values.one_grid(igate_cgate, "igate_cgate"),
            "fgate_cx_igate_cgate": state,
            "tanh_cy_input": tanh_input,
            "tanh_cy": values.one_grid(tanh_cy, "tanh_cy"),
            "ogate_cy": ogate_cy,
            "hy": projection.grid if projection else None,
            "gates_again": tuple(_first(gate.inputs[1:]) for gate in gates),
            "outputs_again": tuple(_first(gate.outputs[1:]) for gate in gates),
        }
        return ReadCell(self._cell(fields, gates, projection), outside, h_dtype, c_dtype)

    def _projected(self, hy: Value) -> tuple[Value, _Projection | None]:
        """What the output gate lets through, and the projection from there to the hidden state, where there is one."""
        values = self._values
        if values.kind(hy.source) != "linear":
            return hy, None
        projection = self._projection(hy, "hy", None)
        if projection.rows.bias.any():
            raise values.error(hy.source, "a bias in the projection of the hidden state", "none, as nn.LSTM has it")
        return projection.reads, projection

    def _cell(self, fields: Mapping[str, object], gates: list[_Gate], projection: _Projection | None) -> Cell:
        try:
            weight_ih, bias_ih, grid_ih = join([gate.ih.rows for gate in gates])
            weight_hh, bias_hh, grid_hh = join([gate.hh.rows for gate in gates])
            weight_hr, _, grid_hr = join([projection.rows]) if projection else (None, None, None)
            qparams = CellQParams(**fields, weight_ih=grid_ih, weight_hh=grid_hh, weight_hr=grid_hr)  # type: ignore[arg-type]
            return Cell(qparams, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}") from error

    def _gate(self, index: int, value: Value) -> _Gate:
        """The gate whose function's output is ``value``."""
        values, function = self._values, value.source
        read = values.argument(function)
        if read.quarter not in (None, index):
            raise values.error(
                function, f"quarter {read.quarter} of the gates as input", f"quarter {index}, that of {GATES[index]}"
            )
        ih, hh = values.operands(read.source, "add", ("igates", "hgates"), f"the sum that {GATES[index]} reads")
        inputs, outputs = self._function_grids(function, read.grids, fold(value.grids))
        for part, grids in (("input", inputs), ("output", outputs)):
            if len(grids) > 2:
                raise values.error(function, f"its {part} quantized {len(grids)} times", "at most two different grids")
        return _Gate(
            self._projection(ih, "igates", read.quarter), self._projection(hh, "hgates", read.quarter), inputs, outputs
        )

    def _function_grids(self, function: Node, inputs: Grids, outputs: Grids) -> tuple[Grids, Grids]:
        """The grids of a function's input and output, without those that change nothing, and the input's within limits."""
        if inputs and inputs[0].unbounded:
            try:
                inputs = (cut_unbounded(self._values.kind(function), inputs, outputs), *inputs[1:])
            except ValueError as error:
                raise ValueError(f"{self._where}, node {function.name!r}: {error}") from error
        return fold(inputs), outputs

    def _cell_state(self, c: Value, tanh_cy: Value) -> tuple[QParams | None, QParams | None]:
        """The grids of the new cell state, and of tanh's input where that has another."""
        values, function = self._values, tanh_cy.source
        read = values.argument(function)
        if read.source is not c.source or read.quarter is not None:
            raise values.error(
                function, f"tanh of {read.source.name!r}", f"tanh of the cell state that is returned, {c.source.name!r}"
            )
        if read.grids[: len(c.grids)] != c.grids:
            raise values.error(
                function, "tanh of the unquantized cell state", "tanh of the cell state on its own grid, as it is returned"
            )
        state = values.one_grid(c, "fgate_cx_igate_cgate")
        own = read.grids[len(c.grids) :]
        if not own and state is not None and state.unbounded:
            own = (state,)
        inputs, _ = self._function_grids(function, own, fold(tanh_cy.grids))
        if len(inputs) > 1:
            raise values.error(
                function, f"its input quantized {len(read.grids)} times", "at most one grid beside the cell state's"
            )
        return state, _first(inputs)

    def _projection(self, value: Value, part: str, quarter: int | None) -> _Projection:
        """A quarter of a linear's outputs, or, where gates are split, all of them."""
        node = value.source
        if node not in self._rows:
            try:
                self._rows[node] = read_linear(self._values.module(node))
            except ValueError as error:
                raise ValueError(f"{self._where}, node {node.name!r}: {error}") from error
        rows = self._rows[node] if quarter is None else self._rows[node].quarter(quarter)
        return _Projection(self._values.argument(node), rows, self._values.one_grid(value, part))

    def _shared_input(self, part: str, projections: list[_Projection]) -> Value:
        """What the four gates' projections read, which must be one thing."""
        first = projections[0].reads
        for projection in projections[1:]:
            if (projection.reads.grids, projection.reads.outside) != (first.grids, first.outside):
                raise self._values.error(
                    first.source, f"{part} on different grids for different gates", "one grid for all four"
                )
        return first


def _cut_to_products(grid: QParams, sigmoid_grids: Grids, tanh_grids: Grids) -> QParams:
    """A grid without limits, cut to what a sigmoid times a tanh can reach; as it is where that takes more than 16 bits."""
    sigmoid, tanh = torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 1.0])
    for again in sigmoid_grids:
        sigmoid = again.dequantize(again.quantize(sigmoid))
    for again in tanh_grids:
        tanh = again.dequantize(again.quantize(tanh))
    largest = sigmoid.abs().max() * tanh.abs().max()
    low, high = grid.quantize(torch.stack([-largest, largest])).tolist()
    if not 0 < high - low <= MAX_STEPS:
        return grid
    return replace(grid, quant_min=low, quant_max=high)


def _first(grids: Grids) -> QParams | None:
    return grids[0] if grids else None

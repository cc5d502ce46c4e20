"""A fake-quantized cell beside the integer reference, part by part: each from equal values of the parts that it reads."""

from __future__ import annotations

import torch
from converted_lstms import assert_near, torchs_own_functions
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from torch_lstm_quant import reference
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.cell_graph import OBSERVER, _nodes_of_slots
from torch_lstm_quant.qparams import GATES, PER_GATE_PARTS, QParams


@torch.no_grad()
def values_of_parts(graph: GraphModule, x: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
    """What each part of an observed cell is in one step, as the other parts read it."""
    interpreter = Interpreter(graph, garbage_collect_values=False)
    interpreter.run(x, (h, c))
    (tanh,) = (node for node in graph.graph.nodes if node.name == "tanh")
    values = {"tanh_cy_input": interpreter.env[tanh.args[0]]}
    for part, node in _nodes_of_slots(graph.graph, split_gates=False).items():
        targets = {str(user.target): user for user in node.users}
        targets.pop(f"{OBSERVER}tanh_cy_input", None)  # a part of its own, which tanh alone reads
        value = interpreter.env[next((user for name, user in targets.items() if name.startswith(OBSERVER)), node)]
        if part in PER_GATE_PARTS:
            values |= {f"{part} of {gate}": quarter for gate, quarter in zip(GATES, value.chunk(4, 1), strict=True)}
        else:
            values[part] = value
    return values


def assert_parts_follow(cell: Cell, graph: GraphModule, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
    """Only sums of projections, and torch's sigmoid and tanh, round otherwise than the reference: to the next step of a grid.

    Sums are unlike in at most 1 value of 1,000. All else is equal, and so are the functions with torch's in their place.

    Args:
        cell: what the fake-quantized cell ``graph``, without a projection of h, was converted to.
        x, h, c: of one step, ``[B, input_size]`` and ``[B, hidden_size]``.

    Returns:
        bool ``[B, hidden_size]``: where a unit has a part that was rounded the other way.
    """
    qparams = cell.qparams
    theirs = values_of_parts(graph, x, h, c)
    otherwise = torch.zeros_like(c, dtype=torch.bool)

    def near(part: str, value: Tensor, grid: QParams | None) -> Tensor:
        """What the next parts read: from a grid the fake-quantized value, so that each part answers for itself."""
        ours, its = reference._on_grid(value, grid), theirs[part]
        assert_near(ours, its, grid, one_step=True)
        if grid is None:
            return ours
        otherwise.logical_or_(ours != its)
        return its

    def equal(part: str, value: Tensor, grid: QParams | None) -> Tensor:
        ours = reference._on_grid(value, grid)
        assert torch.equal(ours, theirs[part]), part
        return ours

    def function(part: str, name: str, value: Tensor, read: QParams | None) -> Tensor:
        grid, its = getattr(qparams, part), theirs[part]
        with torchs_own_functions():
            assert torch.equal(reference._function(name, value, read, grid), its), part
        ours = reference._function(name, value, read, grid)
        assert (ours - its).abs().max() <= 1.01 * grid.scale
        otherwise.logical_or_(ours != its)
        return its

    def gate(index: int) -> Tensor:
        name = GATES[index]
        of_x = near(f"igates of {name}", igates[index], qparams.igates[index])
        of_h = near(f"hgates of {name}", hgates[index], qparams.hgates[index])
        gates = near(f"gates of {name}", of_x + of_h, qparams.gates[index])
        return function(name, "tanh" if name == "cell_gate" else "sigmoid", gates, qparams.gates[index])

    xq, hq, cq = equal("x", x, qparams.x), equal("hx", h, qparams.hx), equal("cx", c, qparams.cx)
    igates = reference._project(xq, qparams.x, cell.weight_ih, qparams.weight_ih, cell.bias_ih).chunk(4, 1)
    hgates = reference._project(hq, qparams.hx, cell.weight_hh, qparams.weight_hh, cell.bias_hh).chunk(4, 1)
    input_gate, forget_gate, cell_gate, output_gate = map(gate, range(4))
    fgate_cx = equal("fgate_cx", forget_gate * cq, qparams.fgate_cx)
    igate_cgate = equal("igate_cgate", input_gate * cell_gate, qparams.igate_cgate)
    cy = equal("fgate_cx_igate_cgate", fgate_cx + igate_cgate, qparams.fgate_cx_igate_cgate)
    tanh_cy = function("tanh_cy", "tanh", equal("tanh_cy_input", cy, qparams.tanh_cy_input), qparams.tanh_input)
    equal("ogate_cy", output_gate * tanh_cy, qparams.ogate_cy)
    return otherwise

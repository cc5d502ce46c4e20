"""Where quantization errs: every part of the cell, in the reference graph against float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

READ_BY = {
    "x": ("igates", 0),
    "igates": ("add", 0),
    "hgates": ("add", 1),
    "gates": ("chunk", 0),
    "input_gate": ("mul_1", 0),
    "forget_gate": ("mul", 0),
    "cell_gate": ("mul_1", 1),
    "output_gate": ("mul_2", 0),
    "fgate_cx": ("add_1", 0),
    "igate_cgate": ("add_1", 1),
    "tanh_cy_input": ("tanh", 0),
    "tanh_cy": ("mul_2", 1),
}
"""The node of the cell's graph that reads a part, and as which argument: what it reads is quantized as the part asks."""

PARTS = (*READ_BY, "fgate_cx_igate_cgate", "ogate_cy")
"""The parts that are compared: the two states as the cell returns them."""

FLAT_BEYOND = {"gates": 12.0, "tanh_cy_input": 10.0}
"""Where sigmoid and tanh no longer change: the presets cut these parts there, and nothing is lost by it."""


@torch.no_grad()
def values_of_parts(lstm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run ``x`` ``[T, B, input_size]`` through the first cell of a reference LSTM and look at every part of it.

    Returns:
        ``[T, B, *]`` for each of :data:`PARTS`, quantized and dequantized as the part asks.
    """
    cell: fx.GraphModule = lstm.layers[0].layer_fw.cell
    nodes = {node.name: node for node in cell.graph.nodes}
    interpreter = fx.Interpreter(cell, garbage_collect_values=False)
    zeros = torch.zeros(x.shape[1], lstm.hidden_size)
    state = (zeros, zeros)
    steps: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for x_t in x:
        state = interpreter.run(x_t, state)
        for part, (reader, argument) in READ_BY.items():
            steps[part].append(interpreter.env[nodes[reader].args[argument]])
        steps["ogate_cy"].append(state[0])
        steps["fgate_cx_igate_cgate"].append(state[1])
    return {part: torch.stack(values) for part, values in steps.items()}


def signal_to_noise(values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """The power of each part over the power of its error, in dB; infinite where there is none."""
    return {part: _ratio(_seen(part, values[part]), _seen(part, wanted[part])) for part in values}


def _seen(part: str, values: Tensor) -> Tensor:
    """A part as the function behind it sees it: what lies where that is flat counts as the edge of the flat."""
    return values.clamp(-FLAT_BEYOND[part], FLAT_BEYOND[part]) if part in FLAT_BEYOND else values


def _ratio(values: Tensor, wanted: Tensor) -> float:
    return 10.0 * torch.log10(wanted.square().sum() / (values - wanted).square().sum()).item()

"""LSTMs as torch.ao lays them out, cells at ``layers[i].layer_fw.cell`` and ``layer_bw.cell``: how they are built and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantizable import LSTMCell

_LAYERS = ("layer_fw", "layer_bw")
_DIRECTIONS = ("forward", "backward")


def cell_name(lstm: str, layer: int, direction: int) -> str:
    """What messages call a cell of the LSTM that they call ``lstm``."""
    return f"{lstm}, layer {layer}, {_DIRECTIONS[direction]} direction"


def cells_of(lstm: Any) -> list[list[Any]]:
    """The cells of an LSTM: a list of layers, each a list of one or two directions; None where one is missing."""
    names = _LAYERS if lstm.bidirectional else _LAYERS[:1]
    return [[getattr(getattr(layer, name, None), "cell", None) for name in names] for layer in lstm.layers]


def float_cell(lstm: nn.LSTM | nn.LSTMCell, layer: int = 0, direction: int = 0, split_gates: bool = False) -> LSTMCell:
    """torch.ao's cell of ordinary float modules, with a copy of one direction's parameters."""
    suffix = "" if isinstance(lstm, nn.LSTMCell) else f"_l{layer}" + ("_reverse" if direction else "")
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if lstm.bias else ("weight_ih", "weight_hh")
    parameters: list[Any] = [getattr(lstm, f"{name}{suffix}").detach().clone() for name in names]
    with torch.device("meta"):  # the modules' own initial values are thrown away
        return LSTMCell.from_params(*parameters, split_gates=split_gates)  # type: ignore[no-any-return,misc]


def assemble(kind: type[Any], like: Any, cell: Callable[[int, int], nn.Module]) -> Any:
    """A quantizable or quantized LSTM of the sizes of ``like``, made of the cells ``cell(layer, direction)``."""
    with torch.device("meta"):  # the float cells that it comes with are replaced
        # its constructor warns of dropout that it does not apply
        lstm = kind(like.input_size, like.hidden_size, like.num_layers, like.bias, like.batch_first, 0.0, like.bidirectional)
    lstm.dropout = like.dropout
    for index, layer in enumerate(lstm.layers):
        for direction, name in enumerate(_LAYERS if like.bidirectional else _LAYERS[:1]):
            getattr(layer, name).cell = cell(index, direction)
    return lstm


def run_cells(
    layers: Sequence[Sequence[nn.Module]],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    hidden_size: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of cells, one step after the other, as ``nn.LSTM`` runs it.

    Args:
        layers: a list of layers, each a list of one or two directions: modules ``cell(x, (h, c)) -> (h, c)``.
        x: ``[T, B, input_size]``, at least one step; this and the states may be quantized tensors if the cells take such.
        h0, c0: ``[num_layers * num_directions, B, hidden_size]``, zeros if None.
        hidden_size: of every cell.
        dropout: probability of an element to be zeroed between layers.

    Returns:
        output ``[T, B, num_directions * hidden_size]``, h_n and c_n, shaped as ``h0``. Cells that return quantized tensors
        give quantized ones, or, where the qparams in one of the three would differ, float32.
    """
    directions = len(layers[0])
    # float32 for quantized x too: zero is on every grid, and a cell's dequantize() leaves floats as they are
    zeros = torch.zeros(len(layers) * directions, x.shape[1], hidden_size)
    h0, c0 = zeros if h0 is None else h0, zeros if c0 is None else c0
    h_n, c_n = [], []
    for layer, cells in enumerate(layers):
        outputs = []
        for direction, cell in enumerate(cells):
            index = layer * directions + direction
            steps, h, c = x.flip(0) if direction else x, h0[index], c0[index]
            output = []
            for step in steps:
                h, c = cell(step, (h, c))
                output.append(h)
            outputs.append(torch.stack(output[::-1] if direction else output))
            h_n.append(h)
            c_n.append(c)
        x = _join(torch.cat, outputs, 2)
        if dropout and layer + 1 < len(layers):
            x = nn.functional.dropout(x, dropout)
    return x, _join(torch.stack, h_n, 0), _join(torch.stack, c_n, 0)


def _join(function: Callable[..., Tensor], tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Join tensors; quantized ones as floats where their qparams differ, since one quantized tensor cannot hold them."""
    qparams = {(t.dtype, t.q_scale(), t.q_zero_point()) if t.is_quantized else None for t in tensors}
    if len(qparams) > 1:
        tensors = [t.dequantize() for t in tensors]
    return function(tensors, dim)

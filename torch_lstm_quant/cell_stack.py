"""LSTMs as torch.ao lays them out, cells at ``layers[i].layer_fw.cell`` and ``layer_bw.cell``: how they are built and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantizable import LSTMCell

from torch_lstm_quant.call_forms import Shape
from torch_lstm_quant.projected_cell import ProjectedLSTMCell

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

    def own(name: str) -> Tensor:
        return getattr(lstm, f"{name}{suffix}").detach().clone()  # type: ignore[no-any-return]

    proj_size = lstm.proj_size if isinstance(lstm, nn.LSTM) else 0
    cell: Any
    with torch.device("meta"):  # the modules' own initial values are thrown away
        if proj_size:
            input_size = own("weight_ih").shape[1]
            cell = ProjectedLSTMCell(input_size, lstm.hidden_size, proj_size, bias=lstm.bias, split_gates=split_gates)
            cell.hy.weight = nn.Parameter(own("weight_hr"))
        else:
            cell = LSTMCell(own("weight_ih").shape[1], lstm.hidden_size, lstm.bias, split_gates=split_gates)
    for side, linears in (("ih", cell.igates), ("hh", cell.hgates)):
        gates = list(linears.values()) if split_gates else [linears]
        for kind in ("weight", "bias") if lstm.bias else ("weight",):
            for gate, rows in zip(gates, own(f"{kind}_{side}").chunk(len(gates)), strict=True):
                setattr(gate, kind, nn.Parameter(rows))
    return cell  # type: ignore[no-any-return]


def assemble(kind: type[Any], like: Any, cell: Callable[[int, int], nn.Module]) -> Any:
    """A quantizable or quantized LSTM of the sizes of ``like``, made of the cells ``cell(layer, direction)``."""
    with torch.device("meta"):  # the float cells that it comes with are replaced
        # its constructor warns of dropout that it does not apply
        lstm = kind(like.input_size, like.hidden_size, like.num_layers, like.bias, like.batch_first, 0.0, like.bidirectional)
    lstm.dropout = like.dropout
    lstm.proj_size = getattr(like, "proj_size", 0)  # torch.ao's have none
    for index, layer in enumerate(lstm.layers):
        for direction, name in enumerate(_LAYERS if like.bidirectional else _LAYERS[:1]):
            getattr(layer, name).cell = cell(index, direction)
    return lstm


def check_forward(module: nn.Module, forwards: Sequence[Callable[..., Any]], where: str, advice: str) -> None:
    """Refuse a class with a ``forward`` of its own, since what takes its place would not run it."""
    if type(module).forward not in forwards:
        raise ValueError(f"{where}: {type(module).__name__} overrides forward, which would be lost: {advice}")


def run_cells(
    layers: Sequence[Sequence[nn.Module]],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    sizes: Shape,
    dropout: float = 0.0,
    batch_sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of cells, one step after the other, as ``nn.LSTM`` runs it.

    Args:
        layers: a list of layers, each a list of one or two directions: modules ``cell(x, (h, c)) -> (h, c)``.
        x: ``[T, B, input_size]``, at least one step; this and the states may be quantized tensors if the cells take such.
        h0, c0: ``[num_layers * num_directions, B, hidden_size]``, h0 ``h_size`` wide; zeros if None.
        sizes: of every cell.
        dropout: probability of an element to be zeroed between layers.
        batch_sizes: how many rows each step has, never more than the one before. Then ``x`` and the output are
            ``[sum(batch_sizes), ...]``, as in a ``PackedSequence``, and no cell sees a row before its first or after its last
            step.

    Returns:
        output ``[T, B, num_directions * h's width]``, h_n and c_n, shaped as the states. Cells that return quantized tensors
        give quantized ones, or, where the qparams in one of the three would differ, float32.
    """
    directions = len(layers[0])
    # float32 for quantized x too: zero is on every grid, and a cell's dequantize() leaves floats as they are
    rows = len(layers) * directions, x.shape[1] if batch_sizes is None else batch_sizes[0]
    join = torch.stack if batch_sizes is None else torch.cat
    h0 = torch.zeros(*rows, sizes.h_size) if h0 is None else h0
    c0 = torch.zeros(*rows, sizes.hidden_size) if c0 is None else c0
    h_n, c_n = [], []
    for layer, cells in enumerate(layers):
        outputs = []
        for direction, cell in enumerate(cells):
            index = layer * directions + direction
            steps = x.unbind() if batch_sizes is None else x.split(list(batch_sizes))
            output, h, c = _run_cell(cell, steps[::-1] if direction else steps, h0[index], c0[index])
            outputs.append(join(output[::-1] if direction else output))
            h_n.append(h)
            c_n.append(c)
        x = _join(torch.cat, outputs, -1)
        if dropout and layer + 1 < len(layers):
            x = nn.functional.dropout(x, dropout)
    return x, _join(torch.stack, h_n, 0), _join(torch.stack, c_n, 0)


def _run_cell(cell: nn.Module, steps: Sequence[Tensor], h0: Tensor, c0: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """One cell through steps, each with the first rows of the batch, as many as it has."""
    rows = len(steps[0])
    h, c = (h0, c0) if rows == len(h0) else (h0[:rows], c0[:rows])
    output, ended = [], []
    for step in steps:
        before, rows = rows, len(step)
        if rows < before:
            ended.append((h[rows:], c[rows:]))
            h, c = h[:rows], c[:rows]
        elif rows > before:
            h, c = torch.cat([h, h0[before:rows]]), torch.cat([c, c0[before:rows]])
        h, c = cell(step, (h, c))
        output.append(h)
    if ended:
        h, c = (torch.cat(states) for states in zip((h, c), *reversed(ended), strict=True))
    return output, h, c


def _join(function: Callable[..., Tensor], tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Join tensors; quantized ones as floats where their qparams differ, since one quantized tensor cannot hold them."""
    qparams = {(t.dtype, t.q_scale(), t.q_zero_point()) if t.is_quantized else None for t in tensors}
    if len(qparams) > 1:
        tensors = [t.dequantize() for t in tensors]
    return function(tensors, dim)

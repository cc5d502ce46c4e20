"""Tables of sigmoid and tanh over the finite grids that quantized LSTM cells put in front of them.

An entry is the function of the grid's float32 value, computed in float64 and rounded once: to the nearest value of the output
part's grid, or to float32 where that part stays float32. So a table depends on the two grids alone, not on the machine.
(torch's own float32 ops differ from it in 2 to 71 entries of a 12- or 16-bit grid, by one step.)
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from torch_lstm_quant.float64_functions import sigmoid, tanh
from torch_lstm_quant.qparams import MAX_STEPS, UNBOUNDED, CellQParams, Grids, QParams

_FUNCTIONS = {"sigmoid": sigmoid, "tanh": tanh}


@lru_cache(maxsize=64)
def function_table(function: str, input_grids: Grids, output_grids: Grids = ()) -> Tensor:
    """float32 ``[quant_max - quant_min + 1]``: the values of ``function`` ("sigmoid" or "tanh"), indexed by ``q - quant_min``.

    Args:
        function: "sigmoid" or "tanh".
        input_grids: the grid whose integers ``q`` are, and the one on which the value is quantized again, if any.
        output_grids: likewise for what the function gives; none for float32.

    The tensor is shared between callers: do not write to it.
    """
    first = input_grids[0]
    q = torch.arange(first.quant_min, first.quant_max + 1, dtype=torch.int32)
    return _evaluate(function, q, input_grids, output_grids)


def cut_unbounded(function: str, input_grids: Grids, output_grids: Grids = ()) -> QParams:
    """The first of ``input_grids``, which has no limits, cut where the function's output no longer changes.

    Args:
        function, input_grids, output_grids: as for :func:`function_table`.

    Raises:
        ValueError: the output changes over more than ``MAX_STEPS``, so that no table can hold it.
    """
    first = input_grids[0]
    steps = torch.arange(-MAX_STEPS, MAX_STEPS + 1, dtype=torch.int32)
    values = _evaluate(function, first.zero_point + steps, input_grids, output_grids)
    low, high = _evaluate(function, torch.tensor([-UNBOUNDED, UNBOUNDED]), input_grids, output_grids)
    # the outermost step on each side stands for all beyond it; zero stays inside
    quant_min = int((steps * (values != low)).min()) - 1
    quant_max = int((steps * (values != high)).max()) + 1
    if quant_max - quant_min > MAX_STEPS:
        raise ValueError(
            f"{function} of a grid without limits, in steps of {first.scale:.6g}, changes over more than the {MAX_STEPS} "
            "steps of a table: give the grid limits, or coarser steps"
        )
    return replace(first, quant_min=first.zero_point + quant_min, quant_max=first.zero_point + quant_max)


def function_tables(qparams: CellQParams) -> list[Tensor]:
    """The tables of the four gates and of tanh_cy, in that order; empty where the function's input has no grid."""
    return [
        function_table(function, input_grids, output_grids) if input_grids else torch.empty(0)
        for _, function, input_grids, output_grids in qparams.function_grids()
    ]


def _evaluate(function: str, q: Tensor, input_grids: Grids, output_grids: Grids) -> Tensor:
    """float32 values of ``function`` at the integers ``q`` of the first grid."""
    inputs = _quantize_again(input_grids[0].dequantize(q), input_grids[1:])
    exact = _FUNCTIONS[function](inputs.double())
    if not output_grids:
        return exact.float()
    return _quantize_again(_round_once(exact, output_grids[0]), output_grids[1:])


def _round_once(exact: Tensor, grid: QParams) -> Tensor:
    """float64 to the float32 value of the nearest point of ``grid``."""
    low, high = (limit - grid.zero_point for limit in (grid.quant_min, grid.quant_max))
    # + 0.0 turns a rounded -0.0 into +0.0, as integers have only one zero
    return (torch.round(exact / grid.scale).clamp(low, high) + 0.0).float() * grid.scale


def _quantize_again(values: Tensor, grids: Grids) -> Tensor:
    for grid in grids:
        values = grid.dequantize(grid.quantize(values))
    return values

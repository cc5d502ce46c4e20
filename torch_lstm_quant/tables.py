"""Tables of sigmoid and tanh over the finite grids that quantized LSTM cells put in front of them.

An entry is the function of the grid's float32 value, computed in float64 and rounded once: to the nearest value of the output
part's grid, or to float32 where that part stays float32. So a table depends on the two grids alone, not on the machine.
(torch's own float32 ops differ from it in 2 to 71 entries of a 12- or 16-bit grid, by one step.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from torch_lstm_quant.qparams import CellQParams, QParams

_FUNCTIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


@lru_cache(maxsize=64)
def function_table(function: str, input_grid: QParams, output_grid: QParams | None) -> Tensor:
    """float32 ``[quant_max - quant_min + 1]``: the values of ``function`` ("sigmoid" or "tanh"), indexed by ``q - quant_min``.

    The tensor is shared between callers: do not write to it.
    """
    q = torch.arange(input_grid.quant_min, input_grid.quant_max + 1, dtype=torch.int32)
    values = _FUNCTIONS[function](input_grid.dequantize(q).double())
    if output_grid is None:
        return values.float()
    low, high = (limit - output_grid.zero_point for limit in (output_grid.quant_min, output_grid.quant_max))
    steps = torch.round(values / output_grid.scale).clamp(low, high)
    # + 0.0 turns a rounded -0.0 into +0.0, as integers have only one zero
    return (steps + 0.0).float() * output_grid.scale


def function_tables(qparams: CellQParams) -> list[Tensor]:
    """The tables of the four gates and of tanh_cy, in that order; empty where the function's input has no grid."""
    return [
        function_table(function, input_grid, output_grid) if input_grid else torch.empty(0)
        for _, function, input_grid, output_grid in qparams.function_grids()
    ]

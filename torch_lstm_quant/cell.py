"""One layer's one direction as plain tensors: what lowering reads from a graph and what the kernel is packed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_lstm_quant.qparams import CellQParams


@dataclass(frozen=True, eq=False)
class Cell:
    """The qparams, weights and biases of one direction of one layer.

    Args:
        qparams: the grids.
        weight_ih: ``[4 * hidden_size, input_size]``, rows of the input, forget, cell and output gate: int8 where
            ``qparams.weight_ih`` is given, float32 where it is None.
        weight_hh: ``[4 * hidden_size, hidden_size]``, likewise.
        bias_ih, bias_hh: float32 ``[4 * hidden_size]``; zeros for ``bias=False``.

    Raises:
        ValueError: shapes or dtypes that do not fit together, weights outside their grid, NaN or infinities.
    """

    qparams: CellQParams
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor

    def __post_init__(self) -> None:
        rows = 4 * self.hidden_size
        for side in ("ih", "hh"):
            weight, bias = getattr(self, f"weight_{side}"), getattr(self, f"bias_{side}")
            grid = getattr(self.qparams, f"weight_{side}")
            dtype = torch.int8 if grid else torch.float32
            if weight.dim() != 2 or weight.shape[0] != rows or weight.dtype != dtype:
                raise ValueError(f"weight_{side} must be {dtype} [{rows}, K], got {weight.dtype} {list(weight.shape)}")
            if bias.shape != (rows,) or bias.dtype != torch.float32:
                raise ValueError(f"bias_{side} must be torch.float32 [{rows}], got {bias.dtype} {list(bias.shape)}")
            if grid and grid.scale.shape != (rows,):
                raise ValueError(f"weight_{side}'s qparams must have {rows} rows, got {grid.scale.numel()}")
            if grid and weight.numel() and not grid.quant_min <= weight.min() <= weight.max() <= grid.quant_max:
                raise ValueError(f"weight_{side} must lie in [{grid.quant_min}, {grid.quant_max}], got values outside")
            for name, tensor in ((f"weight_{side}", weight), (f"bias_{side}", bias)):
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"{name} must be finite, got NaN or infinities")

    @property
    def input_size(self) -> int:
        return self.weight_ih.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.weight_hh.shape[1]

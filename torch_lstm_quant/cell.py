"""One layer's one direction as plain tensors: what lowering reads from a graph and what the kernel is packed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_lstm_quant.qparams import PROJECTION, CellQParams, QParams


@dataclass(frozen=True, eq=False)
class Cell:
    """The qparams, weights and biases of one direction of one layer.

    Args:
        qparams: the grids.
        weight_ih: ``[4 * hidden_size, input_size]``, rows of the input, forget, cell and output gate: int8 where
            ``qparams.weight_ih`` is given, float32 where it is None.
        weight_hh: ``[4 * hidden_size, h_size]``, likewise.
        bias_ih, bias_hh: float32 ``[4 * hidden_size]``; zeros for ``bias=False``.
        weight_hr: ``[proj_size, hidden_size]``, int8 or float32 as ``weight_ih`` is: what projects the hidden state. None: it
            is not projected.

    Raises:
        ValueError: shapes or dtypes that do not fit together, weights outside their grid, NaN or infinities; grids of a
            projection that there is not, or an ``ogate_cy`` without limits that one reads.
    """

    qparams: CellQParams
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor
    weight_hr: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight_hr is None:
            for part in PROJECTION:
                if getattr(self.qparams, part) is not None:
                    raise ValueError(f"part {part} is of a cell with proj_size, got a grid for it without a weight_hr")
        elif self.qparams.ogate_cy is not None and self.qparams.ogate_cy.unbounded:
            raise ValueError(
                f"part ogate_cy is read by a projection: it needs a grid of at most 16 bits, got {self.qparams.ogate_cy}: "
                "give its observer quant_min and quant_max"
            )
        else:
            self._check_weight("weight_hr", self.proj_size, self.hidden_size)
        rows = 4 * self.hidden_size
        self._check_weight("weight_ih", rows, None)
        self._check_weight("weight_hh", rows, self.h_size)
        for name in ("bias_ih", "bias_hh"):
            bias = getattr(self, name)
            if bias.shape != (rows,) or bias.dtype != torch.float32:
                raise ValueError(f"{name} must be torch.float32 [{rows}], got {bias.dtype} {list(bias.shape)}")
            _check_finite(name, bias)

    def _check_weight(self, name: str, rows: int, columns: int | None) -> None:
        weight, grid = getattr(self, name), getattr(self.qparams, name)
        dtype = torch.int8 if grid else torch.float32
        if weight.dim() != 2 or weight.shape[0] != rows or columns not in (None, weight.shape[1]) or weight.dtype != dtype:
            needed = f"{dtype} [{rows}, {'K' if columns is None else columns}]"
            raise ValueError(f"{name} must be {needed}, got {weight.dtype} {list(weight.shape)}")
        if grid and grid.scale.shape != (rows,):
            raise ValueError(f"{name}'s qparams must have {rows} rows, got {grid.scale.numel()}")
        if grid and weight.numel() and not grid.quant_min <= weight.min() <= weight.max() <= grid.quant_max:
            raise ValueError(f"{name} must lie in [{grid.quant_min}, {grid.quant_max}], got values outside")
        _check_finite(name, weight)

    @property
    def input_size(self) -> int:
        return self.weight_ih.shape[1]

    @property
    def hidden_size(self) -> int:
        return (self.weight_hh if self.weight_hr is None else self.weight_hr).shape[1]

    @property
    def proj_size(self) -> int:
        """As in ``nn.LSTM``: 0 where the hidden state is not projected."""
        return 0 if self.weight_hr is None else self.weight_hr.shape[0]

    @property
    def h_size(self) -> int:
        """The width of the hidden state that the cell gives, and reads at the next step."""
        return self.proj_size or self.hidden_size

    @property
    def h_grid(self) -> QParams | None:
        """The grid of the hidden state that the cell gives: part ``hy``, or ``ogate_cy`` where it is not projected."""
        return getattr(self.qparams, self.h_part)  # type: ignore[no-any-return]

    @property
    def h_part(self) -> str:
        """The part that is the hidden state."""
        return "ogate_cy" if self.weight_hr is None else "hy"


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got NaN or infinities")

"""Cells so deep that their integer sums leave int32, or just do not, with operands and weights at the ends of their ranges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from random_cells import Dice
from torch import Tensor

from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qparams import CellQParams, QParams, WeightQParams

ROWS, STEPS = 4, 2
UINT8, INT16 = (0, 255), (-32768, 32767)


@dataclass(frozen=True)
class Deep:
    """One layer whose part ``x`` or ``hx`` is as deep as named; the other is shallow."""

    depth: int
    limits: tuple[int, int]
    zero_point: int
    weight_zero_point: int = 0
    of_h: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """``input_size`` and ``hidden_size``."""
        return (9, self.depth) if self.of_h else (self.depth, 17)

    def cell(self) -> Cell:
        dice, (input_size, hidden_size) = Dice(self.depth), self.sizes
        rows = 4 * hidden_size
        grid = QParams(1 / (self.limits[1] - self.limits[0]), self.zero_point, *self.limits)
        plain = QParams(1 / 255, 128, *UINT8)
        x, h = (plain, grid) if self.of_h else (grid, plain)

        def weights(grid: QParams, depth: int) -> tuple[WeightQParams, Tensor]:
            # the largest sum makes a pre-activation of 6, so that one that wraps around is seen
            scale = torch.full((rows,), 6 / (grid.scale * (grid.quant_max - grid.quant_min) * 128 * depth))
            values = torch.where(dice.normal(rows, depth) > 0, 127, -128).to(torch.int8)
            for first, value in enumerate((127, -127, -128)):
                values[first::4] = value  # the fourth row keeps its mix
            return WeightQParams(scale, torch.full((rows,), self.weight_zero_point, dtype=torch.int32)), values

        grid_ih, weight_ih = weights(x, input_size)
        grid_hh, weight_hh = weights(h, hidden_size)
        qparams = CellQParams(x=x, hx=h, ogate_cy=h, weight_ih=grid_ih, weight_hh=grid_hh)
        return Cell(qparams, weight_ih, weight_hh, torch.zeros(rows), torch.zeros(rows))

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """``x``, ``h_0`` and ``c_0``: rows of the largest values, of the smallest, and of a mix."""
        dice, (input_size, hidden_size) = Dice(1), self.sizes

        def ends(*shape: int) -> Tensor:
            values = dice.normal(*shape).sign()
            values[:, 0], values[:, 1] = 1, -1
            return 2 * values  # beyond any grid

        return ends(STEPS, ROWS, input_size), ends(1, ROWS, hidden_size), dice.normal(1, ROWS, hidden_size)


DEEP = {
    # 255 * 128 * 65,793 is the last below 2**31
    "8 bits, last in int32": Deep(65_793, UINT8, 0),
    "8 bits, last in int32, negative": Deep(65_793, UINT8, 255),
    "8 bits, first beyond": Deep(65_794, UINT8, 0),
    "8 bits, beyond": Deep(70_000, UINT8, 0),
    "8 bits, beyond, negative": Deep(70_000, UINT8, 255),
    "8 bits, beyond, affine weights": Deep(70_000, UINT8, 3, -128),
    # 16 bits are summed in two parts of int32 up to a depth of 32,767
    "16 bits, last in parts": Deep(32_767, INT16, 0),
    "16 bits, last in parts, negative": Deep(32_767, INT16, 32_767, 127),
    "16 bits, beyond": Deep(32_768, INT16, -32_768),
    "16 bits, far beyond": Deep(70_000, INT16, 32_767),
    "2^16 + 1 values": Deep(600, (-(1 << 15), 1 << 15), 0),
    "2^16 + 1 values, positive": Deep(600, (0, 1 << 16), 0),
    "16-bit h": Deep(600, INT16, 0, of_h=True),
    "16-bit h, affine": Deep(600, INT16, -32_768, 5, of_h=True),
}

"""A fused LSTM's cells as constants that other runtimes compute with: what firmware and ONNX exports share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_lstm_quant.cell import Cell
from torch_lstm_quant.modules import LSTM, LSTMCell
from torch_lstm_quant.qparams import Grids, QParams, WeightQParams
from torch_lstm_quant.tables import function_table

Fused = LSTM | LSTMCell

SIDES = {"ih": "x", "hh": "hx", "hr": "ogate_cy"}
"""The projections, and the part that each reads; only cells with ``proj_size`` have ``hr``."""


@dataclass(frozen=True, eq=False)
class Projection:
    """One product of a cell, ``[v]_part · W + b``, with all that does not depend on ``v`` worked out.

    Where both sides have grids: ``float32(offset + sum over k of q[k] * (weight[k] - zero_point)) * multiplier + bias``.
    """

    part: str
    grid: QParams | None
    weight: Tensor
    weight_grid: WeightQParams | None
    bias: Tensor

    @property
    def is_integer(self) -> bool:
        """Whether the sums are of integers; else they are of float32s, k ascending."""
        return self.grid is not None and self.weight_grid is not None

    def centred_weight(self) -> Tensor:
        """int64 ``weight - zero_point``."""
        assert self.weight_grid is not None
        return self.weight.to(torch.int64) - self.weight_grid.zero_point[:, None]

    def offset(self) -> Tensor:
        """int64 ``[rows]``: what the zero point of ``v`` adds to each sum, a bias in integers."""
        assert self.grid is not None
        return -self.grid.zero_point * self.centred_weight().sum(1)

    def multiplier(self) -> Tensor:
        """float32 ``[rows]``: what a sum in steps is multiplied with."""
        assert self.grid is not None
        assert self.weight_grid is not None
        return self.grid.scale * self.weight_grid.scale

    def largest_sum(self) -> int:
        """A bound for the magnitude of ``offset`` and of the sum, and of any part of it, in whatever order it is taken."""
        assert self.grid is not None
        largest = max(abs(self.grid.quant_min), abs(self.grid.quant_max))
        sums = largest * self.centred_weight().abs().sum(1) + self.offset().abs()
        return int(sums.max())

    def largest_value(self) -> float:
        """A bound for the magnitude of what comes out, before it is put on a grid."""
        return self.largest_sum() * self.multiplier().max().item() + self.bias.abs().max().item()

    def float_weight(self) -> Tensor:
        """float32 weights, as a sum of float32s takes them."""
        if self.weight_grid is None:
            return self.weight
        return self.centred_weight().to(torch.float32) * self.weight_grid.scale[:, None]


@dataclass(frozen=True)
class Function:
    """One of a cell's five functions: ``part`` is what it gives, grids are in the order in which they quantize."""

    part: str
    name: str
    input_grids: Grids
    output_grids: Grids

    def table(self) -> Tensor | None:
        """float32 values indexed by ``q - quant_min`` of the first input grid; None where the input is any float32."""
        return function_table(self.name, self.input_grids, self.output_grids) if self.input_grids else None


def projections(cell: Cell) -> dict[str, Projection]:
    """The projections of a cell, by side. That of ``hr`` has no bias, which is a bias of zeros."""
    no_bias = torch.zeros(cell.proj_size)
    return {
        side: Projection(
            part,
            getattr(cell.qparams, part),
            getattr(cell, f"weight_{side}"),
            getattr(cell.qparams, f"weight_{side}"),
            getattr(cell, f"bias_{side}", no_bias),
        )
        for side, part in SIDES.items()
        if side != "hr" or cell.proj_size
    }


def functions(cell: Cell) -> list[Function]:
    """The functions of the four gates and that of the cell state, in that order."""
    return [Function(*function) for function in cell.qparams.function_grids()]


def check_fused(module: object, caller: str) -> Fused:
    """``module``, or a TypeError that says what to pass to ``caller``."""
    if isinstance(module, (LSTM, LSTMCell)):
        if module.packed().is_meta:
            raise ValueError(f"{caller} needs an LSTM on the CPU, got one on the meta device: load its state first")
        return module
    found = []
    if isinstance(module, nn.Module):
        found = [path for path, child in module.named_modules() if path and isinstance(child, (LSTM, LSTMCell))]
    advice = f"pass one of its fused LSTMs: {', '.join(found)}" if found else "quantize(...) or lower(...) makes one"
    name = f"torch.nn.{type(module).__name__}" if isinstance(module, (nn.LSTM, nn.LSTMCell)) else type(module).__name__
    raise TypeError(f"{caller} takes a fused torch_lstm_quant.LSTM or LSTMCell, got {name}: {advice}")


def check_folder(path: Path) -> None:
    """Raise a FileNotFoundError that names the folder unless ``path`` can be written there."""
    if not path.parent.is_dir():
        made = f"pathlib.Path({str(path.parent)!r}).mkdir(parents=True)"
        raise FileNotFoundError(f"path must lie in a folder that exists, got {str(path)!r}: make the folder, {made}")

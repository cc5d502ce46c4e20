"""The fused LSTM behind quantized tensors, as torch.ao's custom module flow passes them: the only file that touches these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_lstm_quant.call_forms import Shape, States
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.modules import LSTM
from torch_lstm_quant.observed_grid import without_warning
from torch_lstm_quant.qparams import QParams
from torch_lstm_quant.reference_graph import ReadCell

_DTYPES = (torch.float32, torch.quint8, torch.qint8, torch.qint32)
_LIMITS = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}
_MOST_VARIANTS = 16


class QuantizedBoundaryLSTM(nn.Module):
    """A fused LSTM that takes and gives quantized tensors, in place of a reference LSTM that does.

    The grids of ``x`` and ``h_0`` come with the tensors: kernels are packed for those that are met, and kept. (``c_0`` is only
    multiplied, so its grid does not matter.) Inference only, on the CPU. Made by ``lower``.

    Args:
        layers: what was read of the reference LSTM's cells: a list of layers, each a list of one or two directions.
        batch_first, dropout: as in :class:`torch_lstm_quant.modules.LSTM`.
        joins_on_first_grid: whether what is joined in one tensor is brought onto the grid of the first, as torch.ao's
            ``forward`` does: the outputs of two directions onto the forward one's, the states of all layers onto layer 0's.
            Else it is returned in float32 where grids differ.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[ReadCell]],
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        joins_on_first_grid: bool = False,
    ) -> None:
        super().__init__()
        read = [cell for layer in layers for cell in layer]
        self._h_dtypes, self._c_dtypes = [cell.h_dtype for cell in read], [cell.c_dtype for cell in read]
        self._joins_on_first_grid = joins_on_first_grid
        cells = _with_x_grids([[read.cell for read in layer] for layer in layers], joins_on_first_grid)
        self.fused = LSTM(cells, batch_first=batch_first, dropout=dropout)
        self._variants: dict[_Variant, LSTM] = {}
        self._known_cells: list[Cell] = []

    def forward(self, x: Tensor, hidden: States | None = None) -> tuple[Tensor, States]:
        """``output, (h_n, c_n)`` as the reference LSTM returns them.

        Args:
            x: ``[T, B, input_size]``, ``[B, T, input_size]`` with ``batch_first``, or ``[T, input_size]``: a quantized tensor
                (per tensor), or float32, which is not quantized. So is what comes as ``qint32``, which is no 16-bit grid.
            hidden: None (zeros) or ``(h_0, c_0)``, ``[num_layers * num_directions, B, hidden_size]``, likewise; ``h_0``
                ``proj_size`` wide, where there is one.

        Returns:
            Quantized tensors on the grids of the cells; float32 where a cell returns float32, or where the grids of layers or
            directions differ (but see ``joins_on_first_grid``).

        Raises:
            TypeError, ValueError: as :class:`torch_lstm_quant.modules.LSTM`.
        """
        shape = Shape.of(self.fused)
        steps, h0, c0 = shape.unpack(x, hidden, _DTYPES)
        x_grid = _grid_of(steps)
        steps = steps.dequantize()
        if h0 is None or c0 is None:
            output, (h_n, c_n) = self._variant(_Variant(x_grid))(steps)
        else:
            h_grid, h0, c0 = _grid_of(h0), h0.dequantize(), c0.dequantize()
            if all(_lies_on(h, cell.qparams.hx) for h, cell in zip(h0, self._all_cells(), strict=True)):
                output, (h_n, c_n) = self._variant(_Variant(x_grid))(steps, (h0, c0))
            else:
                output, h_n, c_n = self._first_step_apart(x_grid, steps, h_grid, h0, c0)
        return shape.repack(x.dim(), *self._quantize(output, h_n, c_n))

    def cells(self) -> list[list[Cell]]:
        """The cells, as :meth:`torch_lstm_quant.modules.LSTM.cells`. The grid of layer 0's ``x`` comes with the input."""
        return self.fused.cells()

    def flatten_parameters(self) -> None:
        """Does nothing: there for models that call it, as they may on ``nn.LSTM``."""

    def _first_step_apart(
        self, x_grid: QParams | None, x: Tensor, h_grid: QParams | None, h0: Tensor, c0: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every cell's first step reads ``h_0`` on the grid that it came with, its other steps what the cell itself wrote."""
        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        directions = 2 if self.fused.bidirectional else 1
        for layer in range(self.fused.num_layers):
            outputs = []
            for direction in range(directions):
                index = len(h_n)
                steps = x.flip(0) if direction else x
                first = self._variant(_Variant(x_grid, (layer, direction), True, h_grid))
                output, (h, c) = first(steps[:1], (h0[index : index + 1], c0[index : index + 1]))
                if len(steps) > 1:
                    rest, (h, c) = self._variant(_Variant(x_grid, (layer, direction)))(steps[1:], (h, c))
                    output = torch.cat([output, rest])
                outputs.append(output.flip(0) if direction else output)
                h_n.append(h)
                c_n.append(c)
            x = torch.cat(outputs, dim=2)
        return x, torch.cat(h_n), torch.cat(c_n)

    def _variant(self, variant: _Variant) -> LSTM:
        if variant not in self._variants:
            cells = self.cells()
            cells[0] = [_with(cell, x=variant.x_grid) for cell in cells[0]]
            if variant.place is not None:
                cell = cells[variant.place[0]][variant.place[1]]
                cells = [[_with(cell, hx=variant.h_grid) if variant.first_step else cell]]
            if len(self._variants) >= _MOST_VARIANTS:
                self._variants.clear()
            self._variants[variant] = LSTM(cells)
        return self._variants[variant]

    def _all_cells(self) -> list[Cell]:
        if not self._known_cells:
            self._known_cells = [cell for cells in self.cells() for cell in cells]
        return self._known_cells

    def _quantize(self, output: Tensor, h_n: Tensor, c_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values on the cells' grids, as quantized tensors where the cells return such."""
        cells = self._all_cells()
        h = list(zip([cell.h_grid for cell in cells], self._h_dtypes, strict=True))
        c = list(zip([cell.qparams.fgate_cx_igate_cgate for cell in cells], self._c_dtypes, strict=True))
        directions = 2 if self.fused.bidirectional else 1
        last = h[-directions:]
        with without_warning("torch.quantize_per_tensor, torch.quantize_per_channel"):
            if self._joins_on_first_grid:
                last = last[:1] * directions
                h_n, c_n = _on_grids_of_layers(h_n, h, directions), _on_grids_of_layers(c_n, c, directions)
                h, c = h[:1] * len(h), c[:1] * len(c)
            outputs = _quantize_each(output.chunk(directions, -1), last)
            return torch.cat(outputs, -1), torch.stack(_quantize_each(h_n, h)), torch.stack(_quantize_each(c_n, c))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._variants, self._known_cells = {}, []


class _Variant(NamedTuple):
    """What one packed kernel is for.

    Args:
        x_grid: of layer 0's input.
        place: layer and direction of a single cell, None for all.
        first_step, h_grid: whether ``hx`` is on ``h_grid`` and not on the cell's own.
    """

    x_grid: QParams | None
    place: tuple[int, int] | None = None
    first_step: bool = False
    h_grid: QParams | None = None


def _with_x_grids(layers: Sequence[Sequence[Cell]], joins_on_first_grid: bool) -> list[list[Cell]]:
    """The cells, each layer after the first with the grid on which the one before it returns its output, if that is one."""
    cells = [list(layer) for layer in layers]
    for index in range(1, len(cells)):
        grids = [cell.h_grid for cell in cells[index - 1]]
        x_grid = grids[0] if joins_on_first_grid or len(set(grids)) == 1 else None
        cells[index] = [_with(cell, x=x_grid) for cell in cells[index]]
    return cells


def _with(cell: Cell, **grids: QParams | None) -> Cell:
    return replace(cell, qparams=replace(cell.qparams, **grids))  # type: ignore[arg-type]


def _grid_of(tensor: Tensor) -> QParams | None:
    """The grid of a quantized tensor, None for what is read as float32."""
    if tensor.dtype not in _LIMITS:
        return None
    return QParams(tensor.q_scale(), tensor.q_zero_point(), *_LIMITS[tensor.dtype])


def _lies_on(v: Tensor, grid: QParams | None) -> bool:
    return grid is None or torch.equal(grid.dequantize(grid.quantize(v)), v)


_StateGrids = Sequence[tuple[QParams | None, torch.dtype | None]]


def _on_grids_of_layers(states: Tensor, grids: _StateGrids, directions: int) -> Tensor:
    """States of two directions, each rounded to the grid on which torch.ao joins those of its layer."""
    if directions == 1:
        return states
    firsts = [grids[index - index % directions][0] for index in range(len(grids))]
    return torch.stack(
        [state if grid is None else grid.dequantize(grid.quantize(state)) for state, grid in zip(states, firsts, strict=True)]
    )


def _quantize_each(values: Iterable[Tensor], grids: _StateGrids) -> list[Tensor]:
    """Quantized tensors, each on its grid, or, where one tensor cannot hold all, float32 ones."""
    grid, dtype = grids[0]
    if len(set(grids)) > 1 or grid is None or dtype is None:
        return list(values)
    return [torch.quantize_per_tensor(v, grid.scale, grid.zero_point, dtype) for v in values]

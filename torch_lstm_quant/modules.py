"""The fused modules: the call forms of ``nn.LSTM`` and ``nn.LSTMCell`` in front of one call of the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torch_lstm_quant import _direct
from torch_lstm_quant.call_forms import Lengths, States
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.packed_cells import INTEGERS, PackedCells


class LSTM(PackedCells):
    """A stack of quantized LSTM layers, computed in integers by one call of the fused kernel.

    It is called as ``nn.LSTM`` is, float32 in and out. Inference only, on the CPU. Made by ``quantize``, ``convert_fx`` or
    ``lower``, seldom by hand.

    Args:
        layers: a list of layers, each a list of one or two directions.
        batch_first: as in ``nn.LSTM``.
        dropout: kept for ``repr``; nothing is dropped at inference.

    Raises:
        ValueError: cells whose sizes do not fit together.
    """

    __constants__ = ("input_size", "hidden_size", "num_layers", "bidirectional", "batch_first", "proj_size")

    def __init__(self, layers: Sequence[Sequence[Cell]], *, batch_first: bool = False, dropout: float = 0.0) -> None:
        _check_layers(layers)
        super().__init__(layers, batch_first=batch_first)
        self.num_layers = len(layers)
        self.bidirectional = len(layers[0]) == 2
        self.batch_first = batch_first
        self.dropout = dropout

    def forward(
        self, input: Tensor | PackedSequence, hx: States | None = None, lengths: Lengths | None = None
    ) -> tuple[Tensor | PackedSequence, States]:
        """``output, (h_n, c_n)`` as ``nn.LSTM`` returns them, all float32.

        Args:
            input: float32 ``[T, B, input_size]``, ``[B, T, input_size]`` with ``batch_first``, or ``[T, input_size]``; or a
                ``PackedSequence`` of such rows, sorted or not: then so is the output.
            hx: None (zeros) or ``(h_0, c_0)``, float32 ``[num_layers * num_directions, B, hidden_size]`` or without ``B``;
                ``h_0`` is ``proj_size`` wide where that is not 0, as the output is.
            lengths: of a padded batch, how many steps each row has, from 1 to ``T`` in any order; None for all. What a row has
                beyond is not read, its output there is zero, and ``h_n`` and ``c_n`` are those of its own last step (of a
                backward direction, which begins there, its first).

        Raises:
            TypeError, ValueError: a call that ``nn.LSTM`` would refuse too, tensors that are not float32 on the CPU, lengths
                that do not fit.
            RuntimeError: from a backward pass.
        """
        direct = self._run_direct(input, hx) if lengths is None else None
        if direct is not None:
            return direct
        shape, device = self._shape, self.packed().device
        if lengths is not None:
            x, h0, c0, lengths = shape.unpack_padded(input, hx, lengths, device)
            return shape.repack(x.dim(), *self._run(x, h0, c0, lengths=lengths))
        if isinstance(input, PackedSequence):
            x, h0, c0 = shape.unpack_packed(input, hx, device=device)
            return shape.repack_packed(input, *self._run(x, h0, c0, batch_sizes=input.batch_sizes))
        x, h0, c0 = shape.unpack(input, hx, device=device)
        return shape.repack(input.dim(), *self._run(x, h0, c0))

    def forward_integers(
        self, input: Tensor | PackedSequence, hx: States | None = None
    ) -> tuple[Tensor | PackedSequence, States]:
        """As ``forward`` without ``lengths``, on plain integers: those of the grids that ``cells()`` names.

        Args:
            input: integers on the grid of layer 0's part ``x``, shaped as for ``forward``.
            hx: None (the integers that stand for zero) or integers on the grids of ``hx`` and ``cx`` of each cell; ``c_0`` is
                float32 if a cell has no grid for ``cx``.

        Returns:
            ``output, (h_n, c_n)`` on the grids of ``ogate_cy`` (``hy`` with ``proj_size``) and ``fgate_cx_igate_cgate``
            (float32 where the cell state has no grid), each in the smallest of uint8, int8, int16 and int32 that holds all
            its grids.

        Raises:
            ValueError: ``x``, ``hx`` or ``ogate_cy`` (``hy``) have no grid, or the directions' ``x`` differ.
        """
        form, shape, device = self._integer_form(), self._shape, self.packed().device
        if isinstance(input, PackedSequence):
            x, h0, c0 = shape.unpack_packed(input, hx, INTEGERS, form.c_dtypes, device)
            return shape.repack_packed(input, *self._run(x, h0, c0, form.h_dtype, form.c_dtype, input.batch_sizes))
        x, h0, c0 = shape.unpack(input, hx, INTEGERS, form.c_dtypes, device)
        return shape.repack(input.dim(), *self._run(x, h0, c0, form.h_dtype, form.c_dtype))

    def flatten_parameters(self) -> None:
        """Does nothing: there for models that call it, as they may on ``nn.LSTM``."""

    def extra_repr(self) -> str:
        words = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"num_layers": 1, "bidirectional": False, "batch_first": False, "dropout": 0.0, "proj_size": 0}
        words += [f"{name}={getattr(self, name)}" for name, default in defaults.items() if getattr(self, name) != default]
        return ", ".join([*words, *self._describe_grids()])

    def _run_direct(self, input: Any, hx: object) -> tuple[Tensor, States] | None:
        plain = self._plain_call(input, hx)
        if plain is None or input.dim() != 3:
            return None
        layers, h0, c0 = plain
        outputs = _direct.lstm(layers, input.transpose(0, 1) if self.batch_first else input, h0, c0)
        return None if outputs is None else self._shape.repack(3, *outputs)

    def _suffixes(self) -> list[str]:
        """As ``nn.LSTM`` names its parameters."""
        directions = ("", "_reverse")[: self._shape.num_directions]
        return [f"_l{layer}{direction}" for layer in range(self._shape.num_layers) for direction in directions]


class LSTMCell(PackedCells):
    """One step of one quantized LSTM layer in one direction, computed in integers by the fused kernel.

    It is called as ``nn.LSTMCell`` is, float32 in and out, and gives what :class:`LSTM` of the same cell gives for that step,
    bit for bit. Inference only, on the CPU. Made by ``quantize``, ``convert_fx`` or ``lower``, seldom by hand. Where a fused
    LSTM is needed, as in ``Stream``, ``LSTM(module.cells())`` is one.

    Args:
        cell: its grids, integer weights and biases.

    Raises:
        ValueError: the cell has a ``weight_hr``, which ``nn.LSTMCell`` has not.
    """

    __constants__ = ("input_size", "hidden_size", "bias")

    def __init__(self, cell: Cell) -> None:
        if cell.proj_size:
            raise ValueError(
                f"an LSTMCell has no projection, got a cell with proj_size={cell.proj_size}: use LSTM([[cell]]) or a Stream"
            )
        super().__init__([[cell]])

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """``(h, c)`` after the step, as ``nn.LSTMCell`` returns them, float32 and shaped as the states.

        Args:
            input: float32 ``[B, input_size]`` or ``[input_size]``.
            hx: None (zeros) or ``(h, c)``, float32 ``[B, hidden_size]``, or ``[hidden_size]`` for an input without ``B``.

        Raises:
            TypeError, ValueError: a call that ``nn.LSTMCell`` would refuse too, or tensors that are not float32 on the CPU.
            RuntimeError: from a backward pass.
        """
        plain = self._plain_call(input, hx)
        states = None if plain is None else _direct.lstm_cell(plain[0], input, plain[1], plain[2])
        if states is not None:
            return states
        x, h0, c0 = self._shape.unpack_step(input, hx, device=self.packed().device)
        return self._shape.repack_step(input.dim(), *self._run(x, h0, c0))

    def forward_integers(self, input: Tensor, hx: States | None = None) -> States:
        """As ``forward``, on plain integers, as :meth:`LSTM.forward_integers` takes and gives them."""
        form = self._integer_form()
        x, h0, c0 = self._shape.unpack_step(input, hx, INTEGERS, form.c_dtypes, self.packed().device)
        return self._shape.repack_step(input.dim(), *self._run(x, h0, c0, form.h_dtype, form.c_dtype))

    def extra_repr(self) -> str:
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *self._describe_grids()])

    def _suffixes(self) -> list[str]:
        """None: as ``nn.LSTMCell`` names its parameters."""
        return [""]


def _check_layers(layers: Sequence[Sequence[Cell]]) -> None:
    if not layers or not layers[0]:
        raise ValueError("an LSTM needs at least one layer of one cell, got none")
    directions, first = len(layers[0]), layers[0][0]
    for index, cells in enumerate(layers):
        needed = first.input_size if index == 0 else directions * first.h_size, first.hidden_size, first.proj_size
        if len(cells) != directions or directions > 2:
            raise ValueError(f"every layer must have the same 1 or 2 directions, got {[len(cells) for cells in layers]}")
        for direction, cell in enumerate(cells):
            got = cell.input_size, cell.hidden_size, cell.proj_size
            if got != needed:
                raise ValueError(
                    f"layer {index} direction {direction} must have input_size={needed[0]}, hidden_size={needed[1]}, "
                    f"proj_size={needed[2]}, got {', '.join(map(str, got))}"
                )

"""The fused LSTM: ``nn.LSTM``'s call forms in front of one call of the kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_lstm_quant import _direct, ops
from torch_lstm_quant.call_forms import Shape, States
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qparams import QParams, WeightQParams, pack_grids, smallest_dtype, unpack_grids

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


class LSTM(nn.Module):
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

    __constants__ = ("input_size", "hidden_size", "num_layers", "bidirectional", "batch_first")
    proj_size = 0
    _packed: Tensor
    _bound: tuple[tuple[int, int], object] | None = None

    def __init__(self, layers: Sequence[Sequence[Cell]], *, batch_first: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        _check_layers(layers)
        self.input_size = layers[0][0].input_size
        self.hidden_size = layers[0][0].hidden_size
        self.num_layers = len(layers)
        self.bidirectional = len(layers[0]) == 2
        self.batch_first = batch_first
        self.dropout = dropout
        self.bias = any(bool(b.any()) for cells in layers for cell in cells for b in (cell.bias_ih, cell.bias_hh))
        self._shape = Shape.of(self)
        self._limits: dict[str, tuple[int, int]] = {}
        for suffix, cell in zip(self._suffixes(), (cell for cells in layers for cell in cells), strict=True):
            self._register(suffix, cell)
        self.register_buffer("_packed", ops.pack(self.cells()), persistent=False)
        self.eval()

    def forward(self, input: Tensor, hx: States | None = None) -> tuple[Tensor, States]:
        """``output, (h_n, c_n)`` as ``nn.LSTM`` returns them, all float32.

        Args:
            input: float32 ``[T, B, input_size]``, ``[B, T, input_size]`` with ``batch_first``, or ``[T, input_size]``.
            hx: None (zeros) or ``(h_0, c_0)``, float32 ``[num_layers * num_directions, B, hidden_size]`` or without ``B``.

        Raises:
            TypeError, ValueError: a call that ``nn.LSTM`` would refuse too, or tensors that are not float32 on the CPU.
            RuntimeError: in training mode with an input or state that requires a gradient. (In eval mode none is returned.)
        """
        direct = self._run_direct(input, hx)
        if direct is not None:
            return direct
        x, h0, c0 = self._shape.unpack(input, hx, device=self.packed().device)
        return self._shape.repack(input.dim(), *self._run(x, h0, c0))

    def forward_integers(self, input: Tensor, hx: States | None = None) -> tuple[Tensor, States]:
        """As ``forward``, on plain integers: those of the grids that ``cells()`` names.

        Args:
            input: integers on the grid of layer 0's part ``x``, shaped as for ``forward``.
            hx: None (the integers that stand for zero) or integers on the grids of ``hx`` and ``cx`` of each cell; ``c_0`` is
                float32 if a cell has no grid for ``cx``.

        Returns:
            ``output, (h_n, c_n)`` on the grids of ``ogate_cy`` and ``fgate_cx_igate_cgate`` (float32 where the cell state
            has no grid), each in the smallest of uint8, int8, int16 and int32 that holds all its grids.

        Raises:
            ValueError: ``x``, ``hx`` or ``ogate_cy`` have no grid, or the directions' ``x`` differ.
        """
        cells = [cell.qparams for layer in self.cells() for cell in layer]
        first = cells[: self._shape.num_directions]
        if any(cell.x is None or cell.x != first[0].x for cell in first):
            raise ValueError(f"integer input needs one grid for part x of layer 0, got {[str(cell.x) for cell in first]}")
        if any(cell.ogate_cy is None for cell in cells):
            raise ValueError("integer output needs a grid for part ogate_cy of every cell, got float32")
        c_dtypes = INTEGERS if all(cell.cx for cell in cells) else (torch.float32,)
        x, h0, c0 = self._shape.unpack(input, hx, INTEGERS, c_dtypes, self.packed().device)
        h_dtype = _common_dtype([cell.ogate_cy for cell in cells])
        c_dtype = _common_dtype([cell.fgate_cx_igate_cgate for cell in cells])
        return self._shape.repack(input.dim(), *self._run(x, h0, c0, h_dtype, c_dtype))

    def cells(self) -> list[list[Cell]]:
        """The cells, layer by layer, each layer's directions in order: all qparams, integer weights and biases."""
        cells = [self._cell(suffix) for suffix in self._suffixes()]
        directions = self._shape.num_directions
        return [cells[i : i + directions] for i in range(0, len(cells), directions)]

    def packed(self) -> Tensor:
        """All cells in the form that the kernel reads, uint8 ``[bytes]``; derived from the buffers, and not to be changed."""
        packed = self._buffers["_packed"]  # as an attribute it takes nn.Module ten times as long to find
        assert packed is not None
        return packed

    def flatten_parameters(self) -> None:
        """Does nothing: there for models that call it, as they may on ``nn.LSTM``."""

    def extra_repr(self) -> str:
        words = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"num_layers": 1, "bidirectional": False, "batch_first": False, "dropout": 0.0}
        words += [f"{name}={getattr(self, name)}" for name, default in defaults.items() if getattr(self, name) != default]
        if self.packed().is_meta:
            return ", ".join(words)
        qparams = self.cells()[0][0].qparams
        parts = ("x", "ogate_cy", "fgate_cx_igate_cgate")
        words += [f"{part}={_width(getattr(qparams, part))}" for part in parts]
        words += [f"gates={_width(qparams.gates[0])}", f"weights={'int8' if qparams.weight_hh else 'float32'}"]
        return ", ".join([*words, f"kernel={ops.isa_active()}"])

    def _run(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        h_dtype: torch.dtype | None = None,
        c_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel, which gives no gradient."""
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0)):
            self._check_inference()
            x, h0, c0 = x.detach(), *(None if state is None else state.detach() for state in (h0, c0))
        return ops.lstm(x, h0, c0, self.packed(), self._shape, h_dtype, c_dtype)

    def _run_direct(self, input: object, hx: object) -> tuple[Tensor, States] | None:
        """The plainest calls, around torch's dispatcher, which takes longer than a small step. None: it is another call."""
        if self.training or type(input) is not Tensor or input.dim() != 3 or not _nobody_watches():
            return None
        h0 = c0 = None
        if hx is not None:
            if type(hx) is not tuple or len(hx) != 2 or any(type(s) is not Tensor for s in hx):
                return None
            h0, c0 = hx
        x = input.transpose(0, 1) if self.batch_first else input
        layers = self._bound_layers()
        outputs = None if layers is None else _direct.lstm(layers, x, h0, c0)
        return None if outputs is None else self._shape.repack(3, *outputs)

    def _bound_layers(self) -> object | None:
        """The packed cells as ``_direct`` takes them; None where they are not on the CPU."""
        packed = self.packed()
        # share_memory_() gives the same tensor other memory
        place = id(packed), packed.data_ptr() if packed.is_cpu else 0
        if self._bound is None or self._bound[0] != place:
            if not packed.is_cpu:
                return None
            self._bound = place, ops.bind(_direct.bind_layers, packed)
        return self._bound[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}  # it holds addresses

    def _check_inference(self) -> None:
        if self.training:
            raise RuntimeError(
                "a fused LSTM is for inference only, got a tensor that requires a gradient in training mode: "
                "train before converting (prepare(..., LSTMQConfig.int8(qat=True))), or call eval() or torch.no_grad()"
            )

    def _suffixes(self) -> list[str]:
        """``l0``, ``l0_reverse``, ``l1``, ...: as ``nn.LSTM`` names its parameters."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _register(self, suffix: str, cell: Cell) -> None:
        self.register_buffer(f"grids_{suffix}", pack_grids(cell.qparams))
        for side in ("ih", "hh"):
            self.register_buffer(f"weight_{side}_{suffix}", getattr(cell, f"weight_{side}").contiguous())
            self.register_buffer(f"bias_{side}_{suffix}", getattr(cell, f"bias_{side}").contiguous())
            grid: WeightQParams | None = getattr(cell.qparams, f"weight_{side}")
            if grid is not None:
                self.register_buffer(f"weight_{side}_scale_{suffix}", grid.scale)
                self.register_buffer(f"weight_{side}_zero_point_{suffix}", grid.zero_point)
                self._limits[f"weight_{side}_{suffix}"] = (grid.quant_min, grid.quant_max)

    def _cell(self, suffix: str) -> Cell:
        def weight_grid(side: str) -> WeightQParams | None:
            if f"weight_{side}_{suffix}" not in self._limits:
                return None
            scale, zero_point = (getattr(self, f"weight_{side}_{name}_{suffix}") for name in ("scale", "zero_point"))
            return WeightQParams(scale, zero_point, *self._limits[f"weight_{side}_{suffix}"])

        qparams = unpack_grids(getattr(self, f"grids_{suffix}"), weight_grid("ih"), weight_grid("hh"))
        return Cell(qparams, *(getattr(self, f"{name}_{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        known_errors = len(error_msgs)
        own = dict(self.named_buffers(remove_duplicate=False))
        for name, buffer in own.items():
            loaded = state_dict.get(prefix + name)
            # copying would truncate floats to integers
            if isinstance(loaded, Tensor) and loaded.dtype != buffer.dtype and not _are_floats(loaded, buffer):
                error_msgs.append(
                    f"{prefix}{name} must be {buffer.dtype}, got {loaded.dtype}: the state is of another kind of LSTM"
                )
        # loaded into copies, so that the module stays as it was where anything does not fit
        self._buffers.update({name: buffer.clone() for name, buffer in own.items() if name != "_packed"})
        super()._load_from_state_dict(state_dict, prefix, *args)
        try:
            if not any(buffer.is_meta for name, buffer in self.named_buffers() if name != "_packed"):
                self._packed = ops.pack(self.cells())
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.') or 'LSTM'}: {error}")
        if len(error_msgs) > known_errors:
            self._buffers.update(own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LSTM:
        for dtype in (torch.float32, torch.uint8):
            moved = fn(torch.zeros(1, dtype=dtype))
            if moved.dtype != dtype or moved.device.type not in ("cpu", "meta"):
                raise TypeError(
                    f"a fused LSTM runs in integers and float32 on the CPU, cannot be moved to {moved.dtype} on {moved.device}"
                    ": move the model before quantizing, or its other modules one by one"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]


def _nobody_watches() -> bool:
    """Whether the operator itself need not be seen: by a compiler, an exporter, a tracer, a dispatch mode or a profiler."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
    )


def _check_layers(layers: Sequence[Sequence[Cell]]) -> None:
    if not layers or not layers[0]:
        raise ValueError("an LSTM needs at least one layer of one cell, got none")
    directions, hidden_size = len(layers[0]), layers[0][0].hidden_size
    for index, cells in enumerate(layers):
        needed = layers[0][0].input_size if index == 0 else directions * hidden_size
        if len(cells) != directions or directions > 2:
            raise ValueError(f"every layer must have the same 1 or 2 directions, got {[len(cells) for cells in layers]}")
        for direction, cell in enumerate(cells):
            if cell.hidden_size != hidden_size or cell.input_size != needed:
                raise ValueError(
                    f"layer {index} direction {direction} must have input_size={needed}, hidden_size={hidden_size}, "
                    f"got {cell.input_size}, {cell.hidden_size}"
                )


def _are_floats(*tensors: Tensor) -> bool:
    return all(tensor.is_floating_point() for tensor in tensors)


def _common_dtype(grids: Sequence[QParams | None]) -> torch.dtype | None:
    """The smallest dtype that holds all grids, None for float32."""
    present = [grid for grid in grids if grid is not None]
    if len(present) < len(grids):
        return None
    return smallest_dtype(min(grid.quant_min for grid in present), max(grid.quant_max for grid in present))


def _width(grid: QParams | None) -> str:
    return f"{grid.bits} bit" if grid else "float32"

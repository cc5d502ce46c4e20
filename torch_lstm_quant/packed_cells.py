"""Quantized cells as a module's buffers, and packed as the kernel reads them: what the fused modules have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torch_lstm_quant import _direct, ops, saved_states
from torch_lstm_quant.call_forms import Shape
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.format_version import FORMAT_VERSION, format_problem
from torch_lstm_quant.qparams import WEIGHTS, QParams, WeightQParams, grid_names, pack_grids, smallest_dtype, unpack_grids

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)

_Self = TypeVar("_Self", bound="PackedCells")


class IntegerForm(NamedTuple):
    """What a call on plain integers takes and gives.

    Args:
        c_dtypes: what ``c_0`` may be.
        h_dtype: of the hidden values that are given.
        c_dtype: of the cell states that are given; None for float32.
    """

    c_dtypes: tuple[torch.dtype, ...]
    h_dtype: torch.dtype | None
    c_dtype: torch.dtype | None


class PackedCells(nn.Module):
    """The base of the fused modules. State dicts hold the cells as plain tensors, from which the packed form is derived.

    Args:
        layers: a list of layers, each a list of one or two directions, whose sizes fit together.
        batch_first: as in ``nn.LSTM``.
    """

    _shape: Shape
    _packed: Tensor
    _bound: tuple[tuple[int, int], object] | None = None
    _known: tuple[Tensor, str] | None = None  # packed cells, and their fingerprint

    def __init__(self, layers: Sequence[Sequence[Cell]], *, batch_first: bool = False) -> None:
        super().__init__()
        cells = [cell for layer in layers for cell in layer]
        self.input_size = cells[0].input_size
        self.hidden_size = cells[0].hidden_size
        self.proj_size = cells[0].proj_size
        self.bias = _have_bias(layers)
        self._shape = Shape(self.input_size, self.hidden_size, len(layers), len(layers[0]), batch_first, self.proj_size)
        self._limits: dict[str, tuple[int, int]] = {}
        for suffix, cell in zip(self._suffixes(), cells, strict=True):
            self._register(suffix, cell)
        self.register_buffer("_packed", ops.pack(self.cells()), persistent=False)
        self.eval()

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

    def fingerprint(self) -> str:
        """What tells these cells from others: the SHA-256 of their grids, weights and biases, in hex."""
        packed = self.packed()
        if self._known is None or self._known[0] is not packed:
            self._known = packed, saved_states.fingerprint(self.cells())
        return self._known[1]

    def _suffixes(self) -> list[str]:
        """What follows ``weight_ih`` in the names of each cell's buffers, in the order of :meth:`cells`."""
        raise NotImplementedError

    def _describe_grids(self) -> list[str]:
        """How many bits the first cell has where it matters most, and what runs it: for ``repr``."""
        if self.packed().is_meta:
            return []
        cell = self.cells()[0][0]
        qparams = cell.qparams
        words = [f"{part}={_width(getattr(qparams, part))}" for part in ("x", cell.h_part, "fgate_cx_igate_cgate")]
        words += [f"gates={_width(qparams.gates[0])}", f"weights={'int8' if qparams.weight_hh else 'float32'}"]
        return [*words, f"kernel={ops.isa_active()}"]

    def _run(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        h_dtype: torch.dtype | None = None,
        c_dtype: torch.dtype | None = None,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # an operator has no formula for forward mode, and would give zeros
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0 and _have_tangent(x, h0, c0):
            raise NotImplementedError(
                "a fused LSTM or LSTMCell is for inference only, got a call that forward mode (torch.func.jvp, jacfwd) "
                "differentiates: call it on detached tensors"
            )
        return ops.lstm(x, h0, c0, self.packed(), self._shape, h_dtype, c_dtype, batch_sizes, lengths)

    def _integer_form(self) -> IntegerForm:
        """What ``forward_integers`` takes and gives.

        Raises:
            ValueError: a part that has no grid, or directions that read ``x`` on different ones.
        """
        cells = [cell for layer in self.cells() for cell in layer]
        first = [cell.qparams.x for cell in cells[: self._shape.num_directions]]
        if any(x is None or x != first[0] for x in first):
            raise ValueError(f"integer input needs one grid for part x of layer 0, got {list(map(str, first))}")
        if any(cell.h_grid is None for cell in cells):
            raise ValueError(f"integer output needs a grid for part {cells[0].h_part} of every cell, got float32")
        return IntegerForm(
            INTEGERS if all(cell.qparams.cx for cell in cells) else (torch.float32,),
            _common_dtype([cell.h_grid for cell in cells]),
            _common_dtype([cell.qparams.fgate_cx_igate_cgate for cell in cells]),
        )

    def _plain_call(self, input: object, hx: object) -> tuple[object, Tensor | None, Tensor | None] | None:
        """The packed cells and the states of a plain call, for ``_direct``. None: another call.

        Those go around torch's dispatcher, which takes longer than a small step.
        """
        if type(input) is not Tensor or not _nobody_watches():
            return None
        h0 = c0 = None
        if hx is not None:
            if type(hx) is not tuple or len(hx) != 2 or any(type(s) is not Tensor for s in hx):
                return None
            h0, c0 = hx
        if _wants_gradient(input, h0, c0):
            return None
        bound = self._bound_layers()
        return None if bound is None else (bound, h0, c0)

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

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script cannot compile the call forms of nn.LSTM, got a fused {type(self).__name__}: use "
            "torch.jit.trace or torch.export.export, which take models that contain one"
        )

    def __getstate__(self) -> dict[str, Any]:
        # what is bound holds addresses, what is known a tensor
        return {**self.__dict__, "_bound": None, "_known": None, "_format_version": FORMAT_VERSION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        problem = format_problem(state.get("_format_version", 0))
        if problem is not None:
            raise RuntimeError(f"this {type(self).__name__} cannot be loaded: {problem}")
        super().__setstate__({name: value for name, value in state.items() if name != "_format_version"})  # type: ignore[no-untyped-call]
        packed = self.packed()
        if type(packed) is Tensor and packed.is_cpu and not ops.is_packed(packed):  # another version's
            self._packed = ops.pack(self.cells())

    def get_extra_state(self) -> Tensor:
        """The format version, which goes into state dicts: as a tensor, since safetensors holds nothing else."""
        return torch.tensor(FORMAT_VERSION, device="cpu")

    def set_extra_state(self, state: object) -> None:
        """Nothing is kept: the version is looked at before anything is loaded."""

    def _register(self, suffix: str, cell: Cell) -> None:
        self.register_buffer(f"grids{suffix}", pack_grids(cell.qparams))
        for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr"):
            tensor: Tensor | None = getattr(cell, name)
            if tensor is None:
                continue
            self.register_buffer(f"{name}{suffix}", _own(tensor))
            grid: WeightQParams | None = getattr(cell.qparams, name, None)
            if grid is not None:
                self.register_buffer(f"{name}_scale{suffix}", _own(grid.scale))
                self.register_buffer(f"{name}_zero_point{suffix}", _own(grid.zero_point))
                self._limits[f"{name}{suffix}"] = (grid.quant_min, grid.quant_max)

    def _cell(self, suffix: str) -> Cell:
        def weight_grid(weight: str) -> WeightQParams | None:
            if f"{weight}{suffix}" not in self._limits:
                return None
            scale, zero_point = (getattr(self, f"{weight}_{name}{suffix}") for name in ("scale", "zero_point"))
            try:
                return WeightQParams(scale, zero_point, *self._limits[f"{weight}{suffix}"])
            except ValueError as error:
                raise ValueError(f"{weight}{suffix}: {error}") from error

        qparams = unpack_grids(getattr(self, f"grids{suffix}"), *map(weight_grid, WEIGHTS))
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        return Cell(qparams, *(getattr(self, f"{name}{suffix}", None) for name in names))  # type: ignore[arg-type]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        kind = type(self).__name__
        error_msgs: list[str] = args[-1]
        own = dict(self.named_buffers(remove_duplicate=False))
        found = state_dict.setdefault(f"{prefix}_extra_state", 0)
        # what is on the meta device as a whole has no version, and no values that could be of another
        if _holds_values([found, *(state_dict[prefix + name] for name in own if prefix + name in state_dict)]):
            problem = format_problem(found)
            if problem is not None:
                error_msgs.append(f"{prefix.removesuffix('.') or kind}: {problem}")
                return
        known_errors = len(error_msgs)
        for name, buffer in own.items():
            loaded = state_dict.get(prefix + name)
            # copying would truncate floats to integers
            if isinstance(loaded, Tensor) and loaded.dtype != buffer.dtype and not _are_floats(loaded, buffer):
                error_msgs.append(
                    f"{prefix}{name} must be {buffer.dtype}, got {loaded.dtype}: the state is of another kind of {kind}"
                )
            elif isinstance(loaded, Tensor) and loaded.layout != torch.strided:
                error_msgs.append(f"{prefix}{name} must be a dense tensor, got layout {loaded.layout}")
            elif isinstance(loaded, Tensor) and loaded.is_meta and not buffer.is_meta:
                error_msgs.append(f"{prefix}{name} must hold values, got a tensor on the meta device")
            elif name.startswith("grids") and isinstance(loaded, Tensor):
                problem = _grids_problem(loaded, buffer)
                if problem is not None:
                    error_msgs.append(f"{prefix}{name} {problem}")
        # loaded into copies, so that the module stays as it was where a value does not fit; of keys too many or too few, torch
        # does not tell whether they are allowed (strict)
        self._buffers.update({name: buffer.clone() for name, buffer in own.items() if name != "_packed"})
        super()._load_from_state_dict(state_dict, prefix, *args)
        on_meta = any(buffer.is_meta for name, buffer in self.named_buffers() if name != "_packed")
        if len(error_msgs) == known_errors and not on_meta:
            try:
                layers = self.cells()
                self._packed, self.bias = ops.pack(layers), _have_bias(layers)
            except ValueError as error:
                error_msgs.append(f"{prefix.removesuffix('.') or kind}: {error}")
        if len(error_msgs) > known_errors:
            self._buffers.update(own)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        for dtype in (torch.float32, torch.uint8):
            moved = fn(torch.zeros(1, dtype=dtype))
            if moved.dtype != dtype or moved.device.type not in ("cpu", "meta"):
                raise TypeError(
                    f"a fused {type(self).__name__} runs in integers and float32 on the CPU, cannot be moved to {moved.dtype} "
                    f"on {moved.device}: move the model before quantizing, or its other modules one by one"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _have_tangent(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _nobody_watches() -> bool:
    """Whether the operator itself need not be seen: by a compiler, exporter, tracer, mode, profiler or forward mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def _grids_problem(loaded: Tensor, own: Tensor) -> str | None:
    """What is wrong where other parts have grids than in the module: a state of another configuration, or a spoilt one."""
    if loaded.shape != own.shape or loaded.is_meta or own.is_meta:
        return None
    for name, found, needed in zip(grid_names(len(own)), loaded.any(1).tolist(), own.any(1).tolist(), strict=True):
        if found != needed:
            words = ("a grid for part {}, got none" if needed else "no grid for part {}, got one").format(name)
            return f"must have {words}: load it into a module that was quantized with the same configuration"
    return None


def _have_bias(layers: Sequence[Sequence[Cell]]) -> bool:
    """Whether any is not zero: cells without biases have zeros in their place."""
    return any(bool(bias.any()) for cells in layers for cell in cells for bias in (cell.bias_ih, cell.bias_hh))


def _holds_values(state: Sequence[object]) -> bool:
    return not all(isinstance(value, Tensor) and value.is_meta for value in state)


def _own(tensor: Tensor) -> Tensor:
    """A copy that is contiguous and shares its memory with no other tensor, as files and shared modules want buffers."""
    return tensor.clone(memory_format=torch.contiguous_format)


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

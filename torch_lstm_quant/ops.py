"""The compiled operators ``torch.ops.torch_lstm_quant``: loads their library, gives them fake kernels and typed wrappers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_lstm_quant.call_forms import Shape
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qparams import WEIGHTS, WeightQParams, own_parts, pack_grids
from torch_lstm_quant.tables import function_tables

_ALIGNMENT = 64  # of what kernels read; torch's own allocations have it


def library_path() -> Path:
    """The library of the compiled operators, for programs that load it themselves. It needs libtorch, and no Python.

    Raises:
        ImportError: it was not built.
    """
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        library = folder / f"_C{suffix}"
        if library.exists():
            return library
    raise ImportError(
        f"torch_lstm_quant's compiled library is missing from {folder}: "
        "build it with `pip install --no-build-isolation -e .` in the source folder, or, if the package is installed already, "
        "run Python from another folder than the source's, which hides it"
    )


torch.ops.load_library(library_path())


def _fake_pack(
    weights: list[Tensor],
    biases: list[Tensor],
    weight_scales: list[Tensor],
    weight_zero_points: list[Tensor],
    grids: list[Tensor],
    tables: list[Tensor],
    num_directions: int,
) -> Tensor:
    # how many bytes it takes depends on which tables are equal
    size = torch.library.get_ctx().new_dynamic_size()
    return weights[0].new_empty(size, dtype=torch.uint8)


def _fake_lstm(
    x: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    packed: Tensor,
    hidden_size: int,
    num_layers: int,
    num_directions: int,
    h_dtype: torch.dtype | None = None,
    c_dtype: torch.dtype | None = None,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    proj_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    devices = {str(tensor.device) for tensor in (x, hx, cx, packed, batch_sizes, lengths) if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"torch_lstm_quant: all tensors of a call must be on one device, got {', '.join(sorted(devices))}")
    rows: int | torch.SymInt = x.shape[-2]
    if batch_sizes is not None:  # its first item says how many rows there are, unless states do
        state = cx if hx is None else hx
        rows = torch.library.get_ctx().new_dynamic_size() if state is None else state.shape[1]
    cells, h_size = num_layers * num_directions, proj_size or hidden_size
    output = x.new_empty((*x.shape[:-1], num_directions * h_size), dtype=h_dtype or torch.float32)
    c_n = x.new_empty((cells, rows, hidden_size), dtype=c_dtype or torch.float32)
    return output, output.new_empty((cells, rows, h_size)), c_n


torch.library.register_fake("torch_lstm_quant::pack", _fake_pack)
torch.library.register_fake("torch_lstm_quant::lstm", _fake_lstm)


# The backward pass, which raises: giving no gradient, as an operator without one does, would train what stands before an LSTM
# with nothing, and say nothing. It is an operator of its own, so that what is compiled raises when it runs. It takes all
# gradients, since a compiler moves into the forward pass what depends on none that is given.
@torch.library.custom_op("torch_lstm_quant::lstm_backward", mutates_args=())
def _lstm_backward(output: Tensor | None, h_n: Tensor | None, c_n: Tensor | None, wanted: Tensor) -> Tensor:
    raise RuntimeError(
        "a fused LSTM or LSTMCell is for inference only, got a backward pass: train before converting "
        "(torch_lstm_quant.prepare_qat), or call it under torch.no_grad() or on detached tensors"
    )


@_lstm_backward.register_fake
def _fake_lstm_backward(output: Tensor | None, h_n: Tensor | None, c_n: Tensor | None, wanted: Tensor) -> Tensor:
    return torch.empty_like(wanted)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # no others, which may be inference tensors: those cannot be saved
    pairs = zip(inputs[:3], ctx.needs_input_grad, strict=False)
    ctx.save_for_backward(*(tensor if needs else None for tensor, needs in pairs))


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = zip_longest(ctx.saved_tensors, ctx.needs_input_grad)
    return tuple(_lstm_backward(*gradients, wanted) if needs else None for wanted, needs in inputs)


torch.library.register_autograd("torch_lstm_quant::lstm", _backward, setup_context=_keep_inputs)


def pack(layers: Sequence[Sequence[Cell]]) -> Tensor:
    """The cells in the form that the kernel reads: uint8 ``[bytes]``, the same on every machine of the same byte order.

    Args:
        layers: a list of layers, each a list of one or two directions.

    Raises:
        RuntimeError: cells whose sizes do not fit together.
    """
    cells = [cell for layer in layers for cell in layer]
    weights, biases, scales, zero_points = [], [], [], []
    for cell in cells:
        weights += [cell.weight_ih, cell.weight_hh] + ([] if cell.weight_hr is None else [cell.weight_hr])
        biases += [cell.bias_ih, cell.bias_hh]
        for name in own_parts(WEIGHTS, projects=cell.proj_size > 0):
            grid = getattr(cell.qparams, name)
            scales.append(_field(grid, "scale", torch.float32))
            zero_points.append(_field(grid, "zero_point", torch.int32))
    grids = [pack_grids(cell.qparams) for cell in cells]
    tables = [table for cell in cells for table in function_tables(cell.qparams)]
    packed: Tensor = torch.ops.torch_lstm_quant.pack.default(
        weights, biases, scales, zero_points, grids, tables, len(layers[0])
    )
    return packed


def bind(bind_function: Callable[..., object], packed: Tensor, *arguments: int) -> object:
    """What a function of ``_direct`` that binds, ``bind_layers`` or a stream's ``_bind``, makes of the packed cells.

    Raises:
        ValueError: ``packed`` has no memory of the CPU, as on the meta device.
    """
    if packed.device.type != "cpu":
        raise ValueError(f"needs an LSTM on the CPU, got one on {packed.device}: load its state first")
    if not packed.is_contiguous() or packed.data_ptr() % _ALIGNMENT != 0:
        packed = packed.clone()
    return bind_function(packed, packed.data_ptr(), packed.numel(), torch.Tensor.__dlpack_c_exchange_api__, *arguments)


def _field(grid: WeightQParams | None, name: str, dtype: torch.dtype) -> Tensor:
    """Empty for a weight that stays float32."""
    return torch.empty(0, dtype=dtype) if grid is None else getattr(grid, name)


def lstm(
    x: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    packed: Tensor,
    shape: Shape,
    h_dtype: torch.dtype | None = None,
    c_dtype: torch.dtype | None = None,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run packed cells over a sequence: :func:`torch_lstm_quant.reference.lstm`, bit for bit.

    Args:
        x: ``[T, B, input_size]`` on the CPU, any strides: float32, or uint8, int8, int16 or int32 integers on layer 0's
            grids of part ``x``. Integers beyond a grid's limits count as its nearest.
        hx, cx: ``[num_layers * num_directions, B, h_size]`` (``proj_size``, or ``hidden_size`` where that is 0) and ``[.., B,
            hidden_size]``, None for zeros: float32, or integers on each cell's grid of part ``hx`` or ``cx``.
        packed: what :func:`pack` gave.
        shape: the sizes that were packed.
        h_dtype, c_dtype: None for float32, or the integer dtype in which output and ``h_n``, or ``c_n``, are given: on each
            cell's grids of ``ogate_cy`` and ``fgate_cx_igate_cgate``.
        batch_sizes: int64 ``[T]``: how many rows each step has, as in a ``PackedSequence``. Then ``x`` is
            ``[sum(batch_sizes), input_size]``, and so is the output; states are in the order of its rows.
        lengths: int64 ``[B]``, from 1 to ``T``: how many steps each row has. The output is zero where a row has ended.

    Returns:
        ``output`` ``[T, B, num_directions * h_size]``, ``h_n`` and ``c_n``, shaped as ``hx`` and ``cx``.

    Raises:
        RuntimeError: arguments that do not fit ``packed``. (``Shape.unpack`` checks a call before it gets here.)
    """
    sizes = shape.hidden_size, shape.num_layers, shape.num_directions
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.torch_lstm_quant.lstm.default(
        x, hx, cx, packed, *sizes, h_dtype, c_dtype, batch_sizes, lengths, shape.proj_size
    )
    return outputs


def sums(packed: Tensor) -> list[tuple[str, ...]]:
    """How each of the packed cells sums its input and its hidden projection, and, with ``proj_size``, that by ``weight_hr``:

    - ``"int8"``: products of 8 bits, summed in int32, for which instruction sets have instructions of their own
    - ``"wide"``: integers too, exact in 64 bits, where the operand has more bits, the weights have zero points or K is so
      large that int32 could overflow
    - ``"float"``: float32, one product after the other, where the operand or the weights have no grid

    Raises:
        RuntimeError: ``packed`` is not what :func:`pack` gave.
    """
    return [tuple(_split(cell)) for cell in torch.ops.torch_lstm_quant.sums.default(packed).split("; ")]


def is_packed(packed: Tensor) -> bool:
    """Whether ``packed`` is what :func:`pack` gives in this version."""
    try:
        sums(packed)
    except RuntimeError:
        return False
    return True


def isa_active() -> str:
    """The instruction set whose kernels run; the environment variable ``TORCH_LSTM_QUANT_ISA`` forces one.

    Raises:
        RuntimeError: that variable names none that this machine runs.
    """
    name: str = torch.ops.torch_lstm_quant.isa_active()
    return name


def isas_built() -> list[str]:
    """The instruction sets that this build has kernels for, the preferred first."""
    return _split(torch.ops.torch_lstm_quant.isas_built())


def isas_usable() -> list[str]:
    """Those of :func:`isas_built` that this machine can run."""
    return _split(torch.ops.torch_lstm_quant.isas_usable())


def _split(names: str) -> list[str]:
    return names.split(", ")

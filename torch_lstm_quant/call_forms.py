"""The ways in which ``nn.LSTM`` and ``nn.LSTMCell`` can be called, brought to one form and back.

Shared by the observed, reference and fused modules.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

States = tuple[Tensor, Tensor]
Lengths = Tensor | Sequence[int]
CPU = torch.device("cpu")

_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
INTEGER_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, *_UNSIGNED)


@dataclass(frozen=True)
class Shape:
    """What ``nn.LSTM``'s constructor says of the shapes that a call takes and gives."""

    input_size: int
    hidden_size: int
    num_layers: int
    num_directions: int
    batch_first: bool
    proj_size: int = 0

    @property
    def h_size(self) -> int:
        """The width of a hidden state; ``hidden_size`` is that of a cell state."""
        return self.proj_size or self.hidden_size

    @staticmethod
    def of(lstm: nn.Module) -> Shape:
        """The shape of a module that has ``nn.LSTM``'s attributes."""
        directions = 2 if lstm.bidirectional else 1
        proj_size: int = getattr(lstm, "proj_size", 0)  # torch.ao's have none
        return Shape(lstm.input_size, lstm.hidden_size, lstm.num_layers, directions, lstm.batch_first, proj_size)  # type: ignore[arg-type]

    @staticmethod
    def of_cell(cell: nn.Module) -> Shape:
        """That of a module that has ``nn.LSTMCell``'s attributes: for :meth:`unpack_step`."""
        return Shape(cell.input_size, cell.hidden_size, 1, 1, batch_first=False)  # type: ignore[arg-type]

    def unpack(
        self,
        input: object,
        hx: object,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        c_dtypes: Sequence[torch.dtype] | None = None,
        device: torch.device = CPU,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``x`` ``[T, B, input_size]`` and the states of a call: ``h_0`` ``[num_layers * num_directions, B, h_size]`` and
        ``c_0``, which is ``hidden_size`` wide.

        Args:
            input: ``[T, B, input_size]``, ``[B, T, input_size]`` with ``batch_first``, or unbatched ``[T, input_size]``.
            hx: None or ``(h_0, c_0)``, shaped so, or without ``B`` if unbatched.
            dtypes: what ``input`` and the states may be.
            c_dtypes: what ``c_0`` may be, if that differs.
            device: where the module is.

        Raises:
            TypeError: a value that is no tensor, a dtype, layout or device that is not supported.
            ValueError: a shape that ``nn.LSTM`` would refuse too.
        """
        input = self._checked_input(input, (2, 3), "2-D (unbatched) or 3-D", dtypes, device)
        x = input.unsqueeze(1) if input.dim() == 2 else input.transpose(0, 1) if self.batch_first else input
        if x.shape[0] == 0:
            raise ValueError(f"the sequence must have at least one step, as in nn.LSTM, got input {list(input.shape)}")
        if hx is None:
            return x, None, None
        h, c = split_states(hx)
        h0 = self._state("h_0", h, input, x.shape[1], self.h_size, dtypes)
        return x, h0, self._state("c_0", c, input, x.shape[1], self.hidden_size, c_dtypes or dtypes)

    def _checked_input(
        self, input: object, dims: Sequence[int], needed: str, dtypes: Sequence[torch.dtype], device: torch.device
    ) -> Tensor:
        """``input``, if it is a tensor of the right width with one of ``dims`` dimensions, which messages call ``needed``."""
        check_tensor("input", input, dtypes, device)
        assert isinstance(input, Tensor)
        if input.dim() not in dims:
            raise ValueError(f"input must be {needed}, got {input.dim()}-D {list(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise ValueError(f"input's last dimension must be input_size={self.input_size}, got {list(input.shape)}")
        return input

    def _state(self, name: str, state: object, input: Tensor, batch: int, width: int, dtypes: Sequence[torch.dtype]) -> Tensor:
        rows = self.num_layers * self.num_directions
        unbatched = input.dim() == 2
        needed = (rows, width) if unbatched else (rows, batch, width)
        checked = check_state(name, state, needed, input, dtypes)
        return checked.unsqueeze(1) if unbatched else checked

    def unpack_packed(
        self,
        input: PackedSequence,
        hx: object,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        c_dtypes: Sequence[torch.dtype] | None = None,
        device: torch.device = CPU,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The rows of all steps ``[sum(input.batch_sizes), input_size]``, and the states in their order.

        Args:
            input: rows of different lengths, sorted or not.
            hx: None or ``(h_0, c_0)``, shaped as in :meth:`unpack`, in the order that the rows had before they were sorted.
            dtypes, c_dtypes, device: as in :meth:`unpack`.

        Raises:
            TypeError, ValueError: as :meth:`unpack`; parts that do not belong together.
        """
        x, _, order, _ = input
        check_tensor("input.data", x, dtypes, device)
        if x.dim() != 2 or x.shape[1] != self.input_size:
            needed = f"[rows of all steps, input_size={self.input_size}]"
            raise ValueError(f"input.data must be {needed}, got {list(x.shape)}")
        sizes = batch_sizes_of(input)
        if sizes is None:  # who traces needs no rows: the operator checks them where it runs
            batch = None if order is None else order.shape[0]
        else:
            batch = sizes[0]
            _check_orders(input, batch)
        if hx is None:
            return x, None, None
        states = []
        kinds = (("h_0", self.h_size, dtypes), ("c_0", self.hidden_size, c_dtypes or dtypes))
        for (name, width, allowed), state in zip(kinds, split_states(hx), strict=True):
            check_tensor(name, state, allowed, x.device)
            assert isinstance(state, Tensor)
            rows = self.num_layers * self.num_directions, batch, width
            if state.dim() != 3 or any(n is not None and n != size for n, size in zip(rows, state.shape, strict=True)):
                raise ValueError(f"{name} must be {list(rows)} for a packed input of {batch} rows, got {list(state.shape)}")
            states.append(_permute(state, order))
        return x, states[0], states[1]

    def unpack_padded(
        self, input: object, hx: object, lengths: object, device: torch.device = CPU
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """What :meth:`unpack` gives of a padded batch, and the lengths of its rows as :func:`check_lengths` gives them.

        Raises:
            TypeError, ValueError: as both; an input that has no rows to be of different lengths, or is packed already.
        """
        if isinstance(input, PackedSequence):
            raise ValueError(f"a PackedSequence has lengths of its own: lengths must be None, got {lengths!r}")
        x, h0, c0 = self.unpack(input, hx, device=device)
        assert isinstance(input, Tensor)
        if input.dim() == 2:
            raise ValueError(f"lengths are those of a batch: input must be 3-D, got 2-D {list(input.shape)}")
        return x, h0, c0, check_lengths(lengths, x.shape[0], x.shape[1], device)

    def repack_packed(self, input: PackedSequence, output: Tensor, h_n: Tensor, c_n: Tensor) -> tuple[PackedSequence, States]:
        """What ``nn.LSTM`` would return for ``input``: packed as it is, the states in the order before it was sorted."""
        packed = PackedSequence(output, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        return packed, (_permute(h_n, input.unsorted_indices), _permute(c_n, input.unsorted_indices))

    def repack(self, input_dim: int, output: Tensor, h_n: Tensor, c_n: Tensor) -> tuple[Tensor, States]:
        """What ``nn.LSTM`` would return for an input of ``input_dim`` dimensions."""
        if input_dim == 2:
            return output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return output.transpose(0, 1) if self.batch_first else output, (h_n, c_n)

    def unpack_step(
        self,
        input: object,
        hx: object,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        c_dtypes: Sequence[torch.dtype] | None = None,
        device: torch.device = CPU,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A call of ``nn.LSTMCell`` as one of an LSTM for one step: what :meth:`unpack` gives.

        Args:
            input: ``[B, input_size]``, or unbatched ``[input_size]``.
            hx: None or ``(h, c)``, each ``[B, hidden_size]``, without ``B`` if unbatched.
            dtypes, c_dtypes, device: as for :meth:`unpack`.

        Raises:
            TypeError: a value that is no tensor, a dtype, layout or device that is not supported.
            ValueError: a shape that ``nn.LSTMCell`` would refuse too.
        """
        input = self._checked_input(input, (1, 2), "1-D (unbatched) or 2-D, one step", dtypes, device)
        x = input[None] if input.dim() == 2 else input[None, None]
        if hx is None:
            return x, None, None
        h, c = split_states(hx)
        needed = (*input.shape[:-1], self.hidden_size)
        h = check_state("h_0", h, needed, input, dtypes)
        c = check_state("c_0", c, needed, input, c_dtypes or dtypes)
        return (x, h[None], c[None]) if input.dim() == 2 else (x, h[None, None], c[None, None])

    def repack_step(self, input_dim: int, output: Tensor, h_n: Tensor, c_n: Tensor) -> States:
        """What ``nn.LSTMCell`` would return for an input of ``input_dim`` dimensions: the states after the step."""
        return (h_n[0], c_n[0]) if input_dim == 2 else (h_n[0, 0], c_n[0, 0])


def check_state(name: str, state: object, needed: Sequence[int], input: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """``state``, if it is a tensor of the shape ``needed`` that goes with ``input``; else a TypeError or ValueError."""
    check_tensor(name, state, dtypes, input.device)
    assert isinstance(state, Tensor)
    if state.shape != tuple(needed):
        raise ValueError(f"{name} must be {list(needed)} for input {list(input.shape)}, got {list(state.shape)}")
    return state


def batch_sizes_of(input: PackedSequence) -> list[int] | None:
    """How many rows each step has; None to who traces or compiles, for whom they are no numbers yet.

    Raises:
        TypeError: batch sizes that are no int64 tensor on the CPU.
        ValueError: batch sizes that are not positive, grow, or do not add up to the rows of ``input.data``.
    """
    sizes = input.batch_sizes
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None  # not even their dtype is right there: the operator checks them where it runs
    if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64 or sizes.device.type != "cpu" or sizes.dim() != 1:
        is_tensor = isinstance(sizes, Tensor)
        got = f"{sizes.dtype} {list(sizes.shape)} on {sizes.device}" if is_tensor else type(sizes).__name__
        raise TypeError(f"input.batch_sizes must be torch.int64, 1-D and on the CPU, got {got}")
    check_tensor("input.batch_sizes", sizes, (torch.int64,), CPU)
    values: list[int] = sizes.tolist()
    if not values or values[-1] < 1 or values != sorted(values, reverse=True) or sum(values) != len(input.data):
        raise ValueError(
            f"input.batch_sizes must be positive, never grow and add up to the {len(input.data)} rows of input.data, "
            f"got {reprlib.repr(values)}: make packed sequences with pack_padded_sequence"
        )
    return values


def _check_orders(input: PackedSequence, rows: int) -> None:
    """Raise a TypeError or ValueError unless the indices are the numbers of all rows in some order, and back."""
    orders = []
    for name in ("sorted_indices", "unsorted_indices"):
        indices = getattr(input, name)
        if indices is None:
            continue
        check_tensor(f"input.{name}", indices, (torch.int64, torch.int32), input.data.device)
        if indices.shape != (rows,):
            raise ValueError(f"input.{name} must be [{rows}], one for each row, got {list(indices.shape)}")
        if indices.is_meta:
            return
        orders.append(indices.tolist())
        if sorted(orders[-1]) != list(range(rows)):
            raise ValueError(f"input.{name} must have each row from 0 to {rows - 1} once, got {reprlib.repr(orders[-1])}")
    if len(orders) == 2 and any(orders[1][row] != place for place, row in enumerate(orders[0])):
        raise ValueError(
            f"input.unsorted_indices must undo sorted_indices {reprlib.repr(orders[0])}, got {reprlib.repr(orders[1])}"
        )


def check_lengths(lengths: object, steps: int, rows: int, device: torch.device) -> Tensor:
    """The lengths of a padded batch's rows as int64 ``[rows]``.

    Args:
        lengths: a tensor on the CPU or a sequence, of integers from 1 to ``steps``.
        steps: of the padded batch.
        rows: of the batch.
        device: where the module is.

    Raises:
        TypeError: values that are no integers, or not on the CPU.
        ValueError: another number of lengths, or lengths out of range.
    """
    if not isinstance(lengths, Tensor):
        values = _integers(lengths)
        if any(value.bit_length() > 63 for value in values):  # more than int64 holds
            raise _out_of_range(steps, min(values), max(values))
        lengths = torch.tensor(values, dtype=torch.int64)
    if lengths.dtype not in INTEGER_DTYPES:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.layout != torch.strided or lengths.is_nested:
        raise TypeError(f"lengths must be a dense tensor, got {'a nested one' if lengths.is_nested else lengths.layout}")
    if lengths.device.type not in ("cpu", device.type):
        raise TypeError(f"lengths must be on the CPU, as for pack_padded_sequence, got a tensor on {lengths.device}")
    if lengths.shape != (rows,):
        raise ValueError(f"lengths must be [{rows}], one for each row of input, got {list(lengths.shape)}")
    given, lengths = lengths, lengths.to(torch.int64)
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return lengths  # the operator checks them where it runs
    if rows and not lengths.is_meta and (int(lengths.min()) < 1 or int(lengths.max()) > steps):
        values = given.tolist()  # uint64 has values that int64 has not
        raise _out_of_range(steps, min(values), max(values))
    return lengths


def _out_of_range(steps: int, least: int, most: int) -> ValueError:
    return ValueError(f"lengths must be from 1 to the {steps} steps of input, got {least} to {most}")


def _integers(lengths: object) -> list[int]:
    """Those of a list, tuple or array. Sets and dicts have no order of rows."""
    ordered = hasattr(lengths, "__getitem__") and not isinstance(lengths, (Mapping, str, bytes, bytearray))
    try:
        if ordered:
            return [integer_of(value) for value in lengths]  # type: ignore[attr-defined]
    except TypeError:
        pass
    raise TypeError(f"lengths must be integers, as a tensor or a sequence, got {lengths!r}")


def integer_of(value: object) -> int:
    """An integer, of Python or a scalar of another kind; else a TypeError.

    Python takes bools and tensors of one element as an index too, but they are seldom meant as one.
    """
    if "bool" not in str(getattr(value, "dtype", type(value))) and not getattr(value, "shape", ()):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except RuntimeError:  # of a tensor that has no value
            pass
    raise TypeError(f"needed an integer, got {value!r}")


def _permute(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)


def split_states(hx: object) -> tuple[object, object]:
    """``h_0`` and ``c_0``; a TypeError unless there are two."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        got = f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"hx must be None or a tuple (h_0, c_0), got {got}")
    return hx[0], hx[1]


def check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Raise a TypeError that calls the value ``name`` unless it is a dense tensor of one of ``dtypes`` on ``device``."""
    if (
        isinstance(value, Tensor)
        and value.dtype in dtypes
        and value.device == device
        and value.layout == torch.strided
        and not value.is_nested
    ):
        return  # a step of a small LSTM takes less time than the checks below
    if isinstance(value, PackedSequence):
        raise TypeError(f"{name} must be a tensor, got PackedSequence")
    if isinstance(value, fx.Proxy):
        raise TypeError(
            f"{name} must be a tensor, got a Proxy: FX traces into the LSTM, which it must not. Name its class to it, with "
            "PrepareCustomConfig().set_non_traceable_module_classes([torch_lstm_quant.LSTM, torch_lstm_quant.LSTMCell])"
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {value.dtype}: convert it, e.g. with .to({dtypes[0]})")
    if value.device.type != device.type:
        raise TypeError(
            f"{name} must be on the {device.type} device, got a tensor on {value.device}: move it with .to({str(device)!r})"
        )
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got {'a nested one' if value.is_nested else f'layout {value.layout}'}"
        )

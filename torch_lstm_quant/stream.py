"""``Stream``: a fused LSTM that goes on from call to call, all its rows or some, with their states inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_lstm_quant import _direct, ops, saved_states
from torch_lstm_quant.call_forms import CPU, INTEGER_DTYPES, States, check_tensor, integer_of, split_states
from torch_lstm_quant.modules import LSTM, LSTMCell

_FORM = "[{rows}, {size}] (one step) or [T, {count}, {size}] (a chunk, steps first)"

_OTHER_ROWS = ": say with rows=[...] which rows take what was saved, as many as save(rows=[...]) was given"

_FLOAT32 = (torch.float32,)
_MOST_ROWS = 1 << 24  # csrc/blob.h: no product of sizes overflows

Rows = Sequence[int] | Tensor


class Stream(_direct.Stream):
    """Feeds a sequence to a fused LSTM as it comes in.

    It gives the same values, bit for bit, as the module gives for the whole sequence, however the sequence is divided into
    calls. A call goes around torch's dispatcher, so that a step costs little more than its arithmetic; it is not seen by
    autograd, compilers, tracers or torch's profiler.

    ``stream(x, out=None, *, rows=None)`` gives the hidden state of the last layer after each step of ``x``: float32
    ``[batch_size, hidden_size]`` for one step, ``[T, batch_size, hidden_size]`` for a chunk. With ``rows`` only those rows go
    on, and ``len(rows)`` stands for ``batch_size``. Of an LSTM with ``proj_size`` hidden states are that wide instead.

    - ``x``: float32 ``[batch_size, input_size]`` or ``[T, batch_size, input_size]``, steps first whether or not the module is
      ``batch_first``.
    - ``out``: where to write what is returned, float32 and contiguous, without overlap with ``x``; None: a new tensor.
      Autograd does not see the writing, so it should not be a tensor that a backward pass still needs.
    - ``rows``: which row of the stream each row of ``x`` is for, a list of ints or a tensor of integers, in any order, each
      once; or none at all. The others stay as they are, and cost nothing. None: all.

    So a server gives each caller a row, and each step the callers that have sent something. A row's values do not depend on
    which others go on with it. ``reset(rows=[row])`` makes a row anew for the next caller; ``save`` and ``restore`` move one
    to another row, stream or machine.

    It raises TypeError where ``x`` or ``out`` is no dense float32 tensor on the CPU or ``rows`` are no ints, ValueError for
    another shape, an ``out`` that is not contiguous or overlaps ``x``, a row that the stream does not have or that comes
    twice, RuntimeError while another thread uses the stream, whatever its rows.

    Args:
        module: a fused LSTM of one direction. The stream has a copy of its packed weights, and does not follow a state
            dict that the module loads later.
        batch_size: number of rows, each a sequence of its own.

    Raises:
        TypeError: ``module`` is not a fused LSTM, ``batch_size`` is no int.
        ValueError: the LSTM has two directions or is not on the CPU; ``batch_size`` is not positive, or absurd.

    Example:
        >>> stream = Stream(quantized.lstm)
        >>> for x in steps:  # [1, input_size]
        ...     y = stream(x)  # [1, hidden_size]
        >>> server = Stream(quantized.lstm, batch_size=256)
        >>> y = server(x, rows=[3, 17, 4])  # [3, input_size] -> [3, hidden_size]
        >>> server.reset(rows=[17])
    """

    def __init__(self, module: LSTM, batch_size: int = 1) -> None:
        if not isinstance(module, LSTM):
            advice = "pass the LSTM itself, not the model around it, after quantize(...) or lower(...)"
            if isinstance(module, LSTMCell):
                advice = "pass the LSTM of that cell, torch_lstm_quant.LSTM(module.cells())"
            raise TypeError(f"Stream takes a fused LSTM, torch_lstm_quant.LSTM, got {type(module).__name__}: {advice}")
        if module.bidirectional:
            raise ValueError("Stream goes one way, got a bidirectional LSTM, whose backward direction begins at the end")
        if not isinstance(batch_size, int) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size must be an int, got {type(batch_size).__name__}")
        if not 1 <= batch_size <= _MOST_ROWS:
            raise ValueError(f"batch_size must be at least 1 and at most {_MOST_ROWS}, got {batch_size}")
        # first, as it refuses a second time; a copy, as share_memory_() would take the memory away
        ops.bind(self._bind, module.packed().clone(), batch_size)
        self.input_size: Final = module.input_size
        self.hidden_size: Final = module.hidden_size
        self.num_layers: Final = module.num_layers
        self.proj_size: Final = module.proj_size
        self.batch_size: Final = batch_size
        self._fingerprint = module.fingerprint()

    def reset(self, hx: States | None = None, rows: Rows | None = None) -> None:
        """Begin a new sequence in all rows or some.

        Args:
            hx: the states to go on from, ``(h_0, c_0)``, each float32 ``[num_layers, batch_size, hidden_size]``, with ``rows``
                ``[num_layers, len(rows), hidden_size]``, ``h_0`` ``proj_size`` wide where there is one; None: zeros.
            rows: those that begin anew, a list of ints or a tensor of integers; None: all.

        Raises:
            TypeError, ValueError: other values than these. The stream stays as it was.
            RuntimeError: the stream is being used by another thread.
        """
        numbers = self._numbers(rows)
        if hx is None:
            h_shape, c_shape = self._state_shapes(numbers)
            self._set_state(0, 0, math.prod(h_shape), math.prod(c_shape), numbers)
        else:
            self._set(("h_0", "c_0"), split_states(hx), numbers)

    def state(self, rows: Rows | None = None) -> States:
        """``(h_n, c_n)`` after the last step, float32 and shaped as for :meth:`reset`, as the module gives.

        With ``rows``, those of these rows, in that order. Rows of a stream of the same module that are ``reset`` to them go on
        as these would.

        Raises:
            TypeError, ValueError: ``rows`` that are not rows of the stream, each once.
            RuntimeError: the stream is being used by another thread.
        """
        numbers = self._numbers(rows)
        h_n, c_n = (torch.empty(shape, dtype=torch.float32, device=CPU) for shape in self._state_shapes(numbers))
        self._copy_state(h_n.data_ptr(), c_n.data_ptr(), h_n.numel(), c_n.numel(), numbers)
        return h_n, c_n

    def save(self, rows: Rows | None = None) -> dict[str, Any]:
        """The state of all rows or some, for :meth:`restore`: a dict of plain values and tensors, with which module it is of.

        ``torch.save`` and ``pickle`` take it, and ``torch.load`` reads it with ``weights_only=True``.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`state`.
        """
        return saved_states.save(self._fingerprint, self.state(rows))

    def restore(self, saved: dict[str, Any], rows: Rows | None = None) -> None:
        """Go on from what :meth:`save` gave, here or elsewhere: bit for bit as the rows would have that were saved.

        Args:
            saved: of as many rows, of this module or one with the same grids, weights and biases.
            rows: those that take the states, in the order in which they were saved; None: all.

        Raises:
            TypeError, ValueError: what ``save`` did not give, or gave for another module or another number of rows; a newer
                format. The stream stays as it was.
            RuntimeError: the stream is being used by another thread.
        """
        states = saved_states.load(saved, self._fingerprint)
        self._set(("saved h", "saved c"), states, self._numbers(rows), _OTHER_ROWS)

    def __repr__(self) -> str:
        proj = f", proj_size={self.proj_size}" if self.proj_size else ""
        sizes = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}{proj}"
        return f"Stream({sizes}, batch_size={self.batch_size})"

    def __reduce__(self) -> str:
        raise TypeError("a Stream cannot be copied or pickled: make another of its module and restore what save() gives")

    def _numbers(self, rows: object) -> list[int] | None:
        """``rows``, if they are rows of the stream, each once; else a TypeError or ValueError."""
        if rows is None:
            return None
        if isinstance(rows, Tensor):
            if rows.dtype == torch.bool:
                raise TypeError("rows must be numbers of rows, got a mask of torch.bool: pass mask.nonzero()[:, 0]")
            if rows.dtype not in INTEGER_DTYPES:
                raise TypeError(f"rows must be integers, got {rows.dtype}")
            check_tensor("rows", rows, INTEGER_DTYPES, CPU)
            if rows.dim() != 1:
                raise ValueError(f"rows must be one-dimensional, got {list(rows.shape)}")
            _check_memory("rows", rows)
            numbers: list[int] = rows.tolist()
        elif isinstance(rows, Sequence) and not isinstance(rows, (str, bytes)):
            numbers = [_number(row) for row in rows]
        else:
            raise TypeError(f"rows must be a list of ints or a tensor of integers, got {type(rows).__name__}")
        seen = set()
        for row in numbers:
            if not 0 <= row < self.batch_size:
                raise ValueError(f"rows must be from 0 to batch_size - 1 = {self.batch_size - 1}, got {row}")
            if row in seen:
                raise ValueError(f"rows must each come once, got {row} twice")
            seen.add(row)
        return numbers

    @property
    def _h_size(self) -> int:
        return self.proj_size or self.hidden_size

    def _state_shapes(self, numbers: list[int] | None) -> tuple[list[int], list[int]]:
        """Of h and c."""
        rows = self.num_layers, self.batch_size if numbers is None else len(numbers)
        return [*rows, self._h_size], [*rows, self.hidden_size]

    def _set(self, names: tuple[str, str], states: tuple[object, object], numbers: list[int] | None, advice: str = "") -> None:
        shapes = self._state_shapes(numbers)
        widths = "proj_size" if self.proj_size else "hidden_size", "hidden_size"
        h, c = (_plain_state(*state, advice) for state in zip(names, states, shapes, widths, strict=True))
        self._set_state(h.data_ptr(), c.data_ptr(), h.numel(), c.numel(), numbers)

    def _run_unusual(self, x: Tensor, out: Tensor | None, rows: Rows | None) -> Tensor:
        """What the compiled call does not take as it is: says what is wrong with it, or makes it plain."""
        numbers = self._numbers(rows)
        check_tensor("x", x, _FLOAT32, CPU)
        count = self.batch_size if numbers is None else len(numbers)
        if x.dim() not in (2, 3) or list(x.shape[-2:]) != [count, self.input_size]:
            of_rows = f"{'batch_size' if numbers is None else 'len(rows)'}={count}"
            form = _FORM.format(rows=of_rows, count=count, size=self.input_size)
            raise ValueError(f"x must be {form}, got {list(x.shape)}")
        if out is not None:
            check_tensor("out", out, _FLOAT32, CPU)
            needed = [*x.shape[:-1], self._h_size]
            if list(out.shape) != needed:
                raise ValueError(f"out must be {needed} for x {list(x.shape)}, got {list(out.shape)}")
            if not out.is_contiguous() or out.is_neg():
                raise ValueError(f"out must be contiguous and no negated view, got strides {list(out.stride())}")
        if x.stride(-1) != 1 or x.is_neg() or x._is_zerotensor():
            x = x.clone(memory_format=torch.contiguous_format)
        y: Tensor | None = self._run(x, out, numbers)
        if y is not None:
            return y
        for name, value in (("x", x), ("out", out)):
            if value is not None:
                _check_memory(name, value)
        raise ValueError("out must not overlap x: leave it out, or pass another tensor")


def _number(row: object) -> int:
    try:
        return integer_of(row)
    except TypeError as error:
        raise TypeError(f"rows must be ints, got {row!r}") from error


def _plain_state(name: str, state: object, needed: list[int], width: str, advice: str) -> Tensor:
    """A plain copy of ``state``, if it is float32 of that shape, of which ``width`` is the last size; ``advice`` if not."""
    check_tensor(name, state, _FLOAT32, CPU)
    assert isinstance(state, Tensor)
    if list(state.shape) != needed:
        raise ValueError(f"{name} must be {needed} (num_layers, rows, {width}), got {list(state.shape)}{advice}")
    plain = state.clone(memory_format=torch.contiguous_format)
    _check_memory(name, plain)
    return plain


def _check_memory(name: str, value: Tensor) -> None:
    try:
        has_memory = value.numel() == 0 or value.data_ptr() != 0
    except RuntimeError:  # torch's way to say that it has none
        has_memory = False
    if not has_memory:
        raise TypeError(f"{name} must have memory of its own, got a tensor that a transform or a mode has wrapped")

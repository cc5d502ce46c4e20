"""``Stream``: a fused LSTM that goes on from call to call, one step or chunk at a time, with its states inside."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_lstm_quant import _direct, ops
from torch_lstm_quant.call_forms import CPU, States, check_tensor, split_states
from torch_lstm_quant.modules import LSTM, LSTMCell

_FORM = "[batch_size={rows}, {size}] (one step) or [T, {rows}, {size}] (a chunk, steps first)"

_FLOAT32 = (torch.float32,)
_MOST_ROWS = 1 << 24  # csrc/blob.h: no product of sizes overflows


class Stream(_direct.Stream):
    """Feeds a sequence to a fused LSTM as it comes in.

    It gives the same values, bit for bit, as the module gives for the whole sequence, however the sequence is divided into
    calls. A call goes around torch's dispatcher, so that a step costs little more than its arithmetic; it is not seen by
    autograd, compilers, tracers or torch's profiler.

    ``stream(x, out=None)`` gives the hidden state of the last layer after each step of ``x``: float32
    ``[batch_size, hidden_size]`` for one step, ``[T, batch_size, hidden_size]`` for a chunk.

    - ``x``: float32 ``[batch_size, input_size]`` or ``[T, batch_size, input_size]``, steps first whether or not the module is
      ``batch_first``.
    - ``out``: where to write what is returned, float32 and contiguous, without overlap with ``x``; None: a new tensor.
      Autograd does not see the writing, so it should not be a tensor that a backward pass still needs.

    It raises TypeError where ``x`` or ``out`` is no dense float32 tensor on the CPU, ValueError for another shape or an
    ``out`` that is not contiguous or overlaps ``x``, RuntimeError while another thread uses the stream.

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
        self.input_size = module.input_size
        self.hidden_size = module.hidden_size
        self.num_layers = module.num_layers
        self.batch_size = batch_size

    def reset(self, hx: States | None = None) -> None:
        """Begin a new sequence.

        Args:
            hx: the states to go on from, ``(h_0, c_0)``, each float32 ``[num_layers, batch_size, hidden_size]``; None: zeros.

        Raises:
            TypeError, ValueError: other values than these. The stream stays as it was.
            RuntimeError: the stream is being used by another thread.
        """
        if hx is None:
            self._set_state(0, 0, math.prod(self._state_shape))
            return
        h0, c0 = (self._state(name, state) for name, state in zip(("h_0", "c_0"), split_states(hx), strict=True))
        self._set_state(h0.data_ptr(), c0.data_ptr(), h0.numel())

    def state(self) -> States:
        """``(h_n, c_n)`` after the last step, each float32 ``[num_layers, batch_size, hidden_size]``, as the module gives.

        Another stream of the same module that is ``reset`` to them goes on as this one would.
        """
        h_n, c_n = (torch.empty(self._state_shape, dtype=torch.float32, device=CPU) for _ in range(2))
        self._copy_state(h_n.data_ptr(), c_n.data_ptr(), h_n.numel())
        return h_n, c_n

    def __repr__(self) -> str:
        return f"Stream({self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_size={self.batch_size})"

    def __reduce__(self) -> str:
        raise TypeError("a Stream cannot be copied or pickled: make another of its module and reset it to state()")

    @property
    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_layers, self.batch_size, self.hidden_size

    def _state(self, name: str, state: object) -> Tensor:
        """A plain copy."""
        check_tensor(name, state, _FLOAT32, CPU)
        assert isinstance(state, Tensor)
        needed = list(self._state_shape)
        if list(state.shape) != needed:
            raise ValueError(f"{name} must be {needed} (num_layers, batch_size, hidden_size), got {list(state.shape)}")
        plain = state.clone(memory_format=torch.contiguous_format)
        _check_memory(name, plain)
        return plain

    def _run_unusual(self, x: Tensor, out: Tensor | None) -> Tensor:
        """What the compiled call does not take as it is: says what is wrong with it, or makes it plain."""
        check_tensor("x", x, _FLOAT32, CPU)
        if x.dim() not in (2, 3) or list(x.shape[-2:]) != [self.batch_size, self.input_size]:
            raise ValueError(f"x must be {_FORM.format(rows=self.batch_size, size=self.input_size)}, got {list(x.shape)}")
        if out is not None:
            check_tensor("out", out, _FLOAT32, CPU)
            needed = [*x.shape[:-1], self.hidden_size]
            if list(out.shape) != needed:
                raise ValueError(f"out must be {needed} for x {list(x.shape)}, got {list(out.shape)}")
            if not out.is_contiguous() or out.is_neg():
                raise ValueError(f"out must be contiguous and no negated view, got strides {list(out.stride())}")
        if x.stride(-1) != 1 or x.is_neg() or x._is_zerotensor():
            x = x.clone(memory_format=torch.contiguous_format)
        y: Tensor | None = self._run(x, out)
        if y is not None:
            return y
        for name, value in (("x", x), ("out", out)):
            if value is not None:
                _check_memory(name, value)
        raise ValueError("out must not overlap x: leave it out, or pass another tensor")


def _check_memory(name: str, value: Tensor) -> None:
    try:
        has_memory = value.numel() == 0 or value.data_ptr() != 0
    except RuntimeError:  # torch's way to say that it has none
        has_memory = False
    if not has_memory:
        raise TypeError(f"{name} must have memory of its own, got a tensor that a transform or a mode has wrapped")

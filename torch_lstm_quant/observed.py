"""The stages between a float and a fused LSTM: observed (an observer at every part) and reference (quantize, dequantize).

LSTMs are built as torch.ao's are, with a cell at ``layers[i].layer_fw.cell`` and ``layer_bw.cell``; LSTM cells have it at
``cell``. They take every call form of the float module and have float32 in and out: quantization happens inside the cells.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, PlaceholderObserver, QConfig, default_weight_observer
from torch.fx import GraphModule
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from torch_lstm_quant.call_forms import Lengths, Shape, States
from torch_lstm_quant.cell_graph import GATE_NAMES, OBSERVER, ObservedLinear, convert_cell, observe_cell, part_of
from torch_lstm_quant.cell_stack import assemble, cell_name, cells_of, float_cell, run_cells
from torch_lstm_quant.float_lstms import FloatLSTM, checked_qconfig, name_of
from torch_lstm_quant.observed_grid import without_warning
from torch_lstm_quant.observers import cut_projections
from torch_lstm_quant.qconfig import DIRECTIONS, LSTMQConfig
from torch_lstm_quant.signal_loss import LossWarning, losses, watch
from torch_lstm_quant.user_warning import warn_user

_FLOAT32 = PlaceholderObserver.with_args(dtype=torch.float32)

FLOAT_BOUNDARY = QConfig(activation=_FLOAT32, weight=default_weight_observer)
"""What an observed LSTM's own qconfig says: float activations, so that ``convert_fx`` swaps it and rewires nothing."""


class ObservedLSTM(torch.ao.nn.quantizable.LSTM):
    """``nn.LSTM`` with an observer or fake quantize at every part that an ``LSTMQConfig`` names. Made by ``from_float``.

    In training mode (with a ``qat=True`` configuration) it trains; in eval mode its calls are the calibration. Its first
    call warns where it would calibrate with dropout.
    """

    where: str
    calls: Tensor

    @classmethod
    def from_float(cls, other: nn.LSTM, qconfig: LSTMQConfig | None = None, where: str = "") -> ObservedLSTM:
        """Observe ``other``, which is not changed and shares nothing with the result.

        Args:
            other: a float LSTM on the CPU.
            qconfig: what to observe where ``other.qconfig``, which torch.ao's flow puts there, has no ``LSTMQConfig``.
            where: the module path, for messages.

        Raises:
            ValueError: no ``LSTMQConfig``, parameters that are not finite float32, or what would be dropped in silence: a
                ``forward`` or hooks of the LSTM's own, overrides for layers that it does not have.
            TypeError: ``other`` is no ``nn.LSTM``, or ``qconfig`` no ``LSTMQConfig``.
        """
        where = name_of(nn.LSTM, other, where)
        config = checked_qconfig(other, qconfig, where)

        def cell(layer: int, direction: int) -> nn.Module:
            return _observe(other, config, cell_name(where, layer, direction), layer, direction)

        observed: ObservedLSTM = assemble(cls, other, cell)
        observed.qconfig = FLOAT_BOUNDARY  # type: ignore[assignment]
        observed.where = where
        # part of the state, as the ranges of the observers are
        observed.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        return observed.train(other.training)

    def forward(
        self, input: Tensor | PackedSequence, hx: States | None = None, lengths: Lengths | None = None
    ) -> tuple[Tensor | PackedSequence, States]:
        """As the fused LSTM's: with ``lengths`` no observer sees what a row has beyond its own."""
        if lengths is not None:
            return _run_padded(self, input, hx, lengths)
        x, h0, c0 = _unpack(self, input, hx)
        _check_finite(self.where, x, h0, c0)
        if self.training and self.dropout and not self.calls:
            _warn_of_dropout(self)
        self.calls += 1
        dropout = self.dropout if self.training else 0.0
        with _ready_to_run(self):
            return _run(self, input, x, h0, c0, dropout)

    def flatten_parameters(self) -> None:
        """Does nothing: there for models that call it, as they may on ``nn.LSTM``."""


class ReferenceLSTM(torch.ao.nn.quantized.LSTM):
    """The converted LSTM as graphs of explicit quantize and dequantize ops: the definition that the fused LSTM implements."""

    @classmethod
    def from_observed(cls, other: ObservedLSTM) -> ReferenceLSTM:  # type: ignore[override]
        """Convert a calibrated or trained LSTM, which is not changed; warn of grids that lose the signal that calibration saw.

        Raises:
            ValueError: it never ran, or an observer gives an impossible grid (the message names layer, direction and part).
        """
        _check_ran(other)
        cells = cells_of(other)

        def cell(layer: int, direction: int) -> nn.Module:
            return _convert(cells[layer][direction], cell_name(other.where, layer, direction))

        reference: ReferenceLSTM = assemble(cls, other, cell)
        return reference.eval()

    def forward(
        self, input: Tensor | PackedSequence, hx: States | None = None, lengths: Lengths | None = None
    ) -> tuple[Tensor | PackedSequence, States]:
        """As the fused LSTM's."""
        if lengths is not None:
            return _run_padded(self, input, hx, lengths)
        x, h0, c0 = _unpack(self, input, hx)
        # torch warns that quantized tensors will go: its reference Linear makes one of the weight
        with without_warning("torch.quantize_per_tensor, torch.quantize_per_channel"):
            return _run(self, input, x, h0, c0)

    def flatten_parameters(self) -> None:
        """Does nothing: there for models that call it, as they may on ``nn.LSTM``."""


class _StepModule(nn.Module):
    """A cell's graph behind the call forms of ``nn.LSTMCell``.

    Args:
        like: a module with the attributes of ``nn.LSTMCell``.
        cell: ``forward(x, (h, c)) -> (h, c)``.
    """

    def __init__(self, like: Any, cell: nn.Module) -> None:
        super().__init__()
        self.input_size: int = like.input_size
        self.hidden_size: int = like.hidden_size
        self.bias: bool = like.bias
        self.cell = cell

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")


class ObservedLSTMCell(_StepModule):
    """``nn.LSTMCell`` with observers or fake quantizes, as :class:`ObservedLSTM` is ``nn.LSTM``: each call is a step."""

    where: str
    calls: Tensor

    @classmethod
    def from_float(cls, other: nn.LSTMCell, qconfig: LSTMQConfig | None = None, where: str = "") -> ObservedLSTMCell:
        """Observe ``other``, which is not changed and shares nothing with the result.

        Args, Raises: as :meth:`ObservedLSTM.from_float`; of ``qconfig`` a cell takes what is for layer 0, forwards.
        """
        where = name_of(nn.LSTMCell, other, where)
        observed = cls(other, _observe(other, checked_qconfig(other, qconfig, where), where))
        observed.qconfig = FLOAT_BOUNDARY  # type: ignore[assignment]
        observed.where = where
        observed.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        return observed.train(other.training)

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        shape = Shape.of_cell(self)
        x, h0, c0 = shape.unpack_step(input, hx)
        _check_finite(self.where, x, h0, c0)
        self.calls += 1
        with _ready_to_run(self):
            return shape.repack_step(input.dim(), *run_cells([[self.cell]], x, h0, c0, shape))


class ReferenceLSTMCell(_StepModule):
    """The converted cell as a graph of explicit quantize and dequantize ops: what the fused ``LSTMCell`` implements."""

    @classmethod
    def from_observed(cls, other: ObservedLSTMCell) -> ReferenceLSTMCell:
        """As :meth:`ReferenceLSTM.from_observed`."""
        _check_ran(other)
        return cls(other, _convert(other.cell, other.where)).eval()

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        shape = Shape.of_cell(self)
        x, h0, c0 = shape.unpack_step(input, hx)
        with without_warning("torch.quantize_per_tensor, torch.quantize_per_channel"):
            return shape.repack_step(input.dim(), *run_cells([[self.cell]], x, h0, c0, shape))


Observed = ObservedLSTM | ObservedLSTMCell
OBSERVED_LSTMS = (ObservedLSTM, ObservedLSTMCell)
"""What becomes of :data:`FLOAT_LSTMS` when they are prepared."""


def observe(module: nn.Module, qconfig: LSTMQConfig | None, where: str = "") -> Observed:
    """The observed form of a float LSTM or LSTM cell: see :meth:`ObservedLSTM.from_float`."""
    if isinstance(module, nn.LSTMCell):
        return ObservedLSTMCell.from_float(module, qconfig, where)
    return ObservedLSTM.from_float(module, qconfig, where)  # type: ignore[arg-type]


def observers_of(observed: Observed) -> Iterator[tuple[str, nn.Module]]:
    """(path within it, observer or fake quantize) of every part and weight."""
    for path, module in observed.named_modules():
        if isinstance(module, ObservedLinear):
            yield path, module.weight_post_process
        elif path.rpartition(".")[2].startswith(OBSERVER):
            yield path, module


def to_reference(observed: Observed) -> ReferenceLSTM | ReferenceLSTMCell:
    """The reference form of a calibrated or trained LSTM or LSTM cell: see :meth:`ReferenceLSTM.from_observed`."""
    if isinstance(observed, ObservedLSTMCell):
        return ReferenceLSTMCell.from_observed(observed)
    return ReferenceLSTM.from_observed(observed)


def _observe(other: FloatLSTM, config: LSTMQConfig, place: str, layer: int = 0, direction: int = 0) -> nn.Module:
    """One observed cell."""
    constructors = config.constructors(layer, DIRECTIONS[direction])
    cell = float_cell(other, layer, direction, split_gates=any(part_of(slot) != slot for slot in constructors))
    return watch(observe_cell(cell, constructors, place))


def _convert(observed: nn.Module, place: str) -> GraphModule:
    """One converted cell; warns of grids that lose the signal."""
    # a copy, as it may go on training: cuts are those of the ranges seen so far
    observed = copy.deepcopy(observed)
    _cut_projections(observed)
    for loss in losses(observed, place):
        warn_user(loss, LossWarning)
    return convert_cell(observed, place)


def _cut_projections(observed: nn.Module) -> None:
    """Cut the ranges of an observed cell's projections by what was seen so far."""
    for gate in ("", *(f"_{name}" for name in GATE_NAMES)):
        cut_projections(*(getattr(observed, OBSERVER + side + gate, None) for side in ("igates", "hgates")))


@contextmanager
def _ready_to_run(observed: nn.Module) -> Iterator[None]:
    """Cut ranges as converting does, so that it is what was trained that is converted; and fake-quantize weights once."""
    for cell in observed.modules():
        if isinstance(cell, GraphModule):
            _cut_projections(cell)
    with ExitStack() as held:
        for linear in observed.modules():
            if isinstance(linear, ObservedLinear):
                held.enter_context(linear.held())
        yield


def _unpack(lstm: nn.Module, input: Tensor | PackedSequence, hx: States | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Input and states in one form, as ``Shape`` makes them."""
    shape = Shape.of(lstm)
    return shape.unpack_packed(input, hx) if isinstance(input, PackedSequence) else shape.unpack(input, hx)


def _run_padded(
    lstm: ObservedLSTM | ReferenceLSTM, input: Tensor | PackedSequence, hx: States | None, lengths: Lengths
) -> tuple[Tensor, States]:
    """A call with ``lengths`` as one with the PackedSequence of the same rows."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            f"torch.jit.trace would keep the lengths of its example for every call: a {type(lstm).__name__} must be traced "
            "without lengths, got some: trace the fused LSTM (backend='fused'), which reads them at each call"
        )
    x, _, _, checked = Shape.of(lstm).unpack_padded(input, hx, lengths)
    if not checked.numel():  # which torch cannot pack
        return lstm.forward(input, hx)  # type: ignore[return-value]
    packed, states = lstm.forward(pack_padded_sequence(x, checked, enforce_sorted=False), hx)
    assert isinstance(packed, PackedSequence)
    return pad_packed_sequence(packed, lstm.batch_first, total_length=x.shape[0])[0], states


def _run(
    lstm: torch.ao.nn.quantizable.LSTM,
    input: Tensor | PackedSequence,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    dropout: float = 0.0,
) -> tuple[Tensor | PackedSequence, States]:
    """What the cells make of what ``_unpack`` made of ``input``, in the form of ``nn.LSTM``."""
    shape = Shape.of(lstm)
    batch_sizes = input.batch_sizes.tolist() if isinstance(input, PackedSequence) else None
    results = run_cells(cells_of(lstm), x, h0, c0, shape, dropout, batch_sizes)
    if isinstance(input, PackedSequence):
        return shape.repack_packed(input, *results)
    return shape.repack(input.dim(), *results)


def _check_ran(observed: Observed) -> None:
    if not observed.calls:
        raise ValueError(
            f"{observed.where} never ran: call the prepared model on calibration data before converting it, or leave it "
            "float if no input reaches it (quantize takes a mapping from paths to configurations, None for float)"
        )


def _check_finite(where: str, x: Tensor, h0: Tensor | None, c0: Tensor | None) -> None:
    for name, value in (("input", x), ("h_0", h0), ("c_0", c0)):
        if value is not None and not torch.isfinite(value).all():
            raise ValueError(f"{where}: {name} must be finite during calibration and training, got NaN or infinities")


def _warn_of_dropout(observed: ObservedLSTM) -> None:
    """What calibrates has observers alone: dropout is for training, with fake quantizes."""
    observers = [observer for _, observer in observers_of(observed)]
    if observed.num_layers > 1 and observers and not any(isinstance(observer, FakeQuantizeBase) for observer in observers):
        warn_user(
            f"{observed.where}: calibrating in training mode, with dropout of {observed.dropout} between its layers, finds "
            "ranges of what inference never sees: call eval() on the prepared model first, or to train it take a "
            "configuration with qat=True"
        )

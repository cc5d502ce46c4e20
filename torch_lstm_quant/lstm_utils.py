"""torch.ao's two LSTM utilities (``torch.ao.quantization.fx.lstm_utils``), with every part of both directions in reach."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, FakeQuantizeBase, QConfig
from torch.ao.quantization.backend_config import BackendConfig
from torch.ao.quantization.utils import activation_is_statically_quantized

from torch_lstm_quant.call_forms import Shape
from torch_lstm_quant.cell_graph import SHARED, convert_cell, observe_cell
from torch_lstm_quant.cell_stack import assemble, cell_name, cells_of, float_cell, run_cells
from torch_lstm_quant.observed_grid import Constructor, without_warning
from torch_lstm_quant.qparams import PARTS, WEIGHTS

_GROUPS = {
    "gates": "linear_output",
    "input_gate": "sigmoid",
    "forget_gate": "sigmoid",
    "output_gate": "sigmoid",
    "cell_gate": "tanh",
    "fgate_cx": "cell_state",
    "igate_cgate": "cell_state",
    "fgate_cx_igate_cgate": "cell_state",
    "ogate_cy": "hidden_state",
    "hy": "hidden_state",
}
"""The parts that torch.ao's own arguments configure."""


def _get_lstm_with_individually_observed_parts(
    float_lstm: nn.LSTM,
    example_inputs: tuple[Any, ...],
    backend_config: BackendConfig | None = None,
    linear_output_obs_ctr: Constructor | None = None,
    sigmoid_obs_ctr: Constructor | None = None,
    tanh_obs_ctr: Constructor | None = None,
    cell_state_obs_ctr: Constructor | None = None,
    hidden_state_obs_ctr: Constructor | None = None,
    split_gates: bool = False,
    *,
    x_obs_ctr: Constructor | None = None,
    hx_obs_ctr: Constructor | str | None = None,
    cx_obs_ctr: Constructor | str | None = None,
    igates_obs_ctr: Constructor | None = None,
    hgates_obs_ctr: Constructor | None = None,
    gates_obs_ctr: Constructor | None = None,
    input_gate_obs_ctr: Constructor | None = None,
    forget_gate_obs_ctr: Constructor | None = None,
    cell_gate_obs_ctr: Constructor | None = None,
    output_gate_obs_ctr: Constructor | None = None,
    fgate_cx_obs_ctr: Constructor | None = None,
    igate_cgate_obs_ctr: Constructor | None = None,
    fgate_cx_igate_cgate_obs_ctr: Constructor | None = None,
    tanh_cy_input_obs_ctr: Constructor | None = None,
    tanh_cy_obs_ctr: Constructor | None = None,
    ogate_cy_obs_ctr: Constructor | None = None,
    hy_obs_ctr: Constructor | None = None,
    weight_ih_obs_ctr: Constructor | None = None,
    weight_hh_obs_ctr: Constructor | None = None,
    weight_hr_obs_ctr: Constructor | None = None,
) -> torch.ao.nn.quantizable.LSTM:
    """Return an observed LSTM with an observer or fake quantize of its own at every part of every cell.

    The result can be swapped in by torch.ao's custom module flow, and converted with
    :func:`_get_reference_quantized_lstm_module`. Beside ``torch.ao``'s own function of this name it observes both directions,
    puts each constructor at the part it is for and nowhere else, takes any dtype and kind of observer, and raises where it
    cannot do what it is asked for.

    Each part takes the constructor of its own argument, else of its group, else ``float_lstm.qconfig``:

    ========================  =====================  =============================================================
    argument (``_obs_ctr``)   group                  value
    ========================  =====================  =============================================================
    ``x``                                            input of the layer, ``[B, input_size]``
    ``hx``, ``cx``                                   hidden and cell state as they are read, ``[B, hidden_size]``
    ``igates``, ``hgates``                           ``W_ih x + b_ih`` and ``W_hh h + b_hh``, ``[B, 4 * hidden_size]``
    ``gates``                 ``linear_output``      their sum
    ``input_gate``            ``sigmoid``            sigmoid of its quarter of the sum
    ``forget_gate``           ``sigmoid``            sigmoid of its quarter of the sum
    ``cell_gate``             ``tanh``               tanh of its quarter of the sum
    ``output_gate``           ``sigmoid``            sigmoid of its quarter of the sum
    ``fgate_cx``              ``cell_state``         forget gate times cell state
    ``igate_cgate``           ``cell_state``         input gate times cell gate
    ``fgate_cx_igate_cgate``  ``cell_state``         the sum of the two: the new cell state
    ``tanh_cy_input``                                the new cell state as tanh reads it; not observed unless given
    ``tanh_cy``                                      tanh of the new cell state
    ``ogate_cy``              ``hidden_state``       output gate times that: the new hidden state
    ``weight_ih``                                    ``[4 * hidden_size, input_size]``, per tensor or per row (axis 0)
    ``weight_hh``                                    ``[4 * hidden_size, hidden_size]``, likewise
    ``hy``                    ``hidden_state``       with ``proj_size``: ``W_hr`` times ``ogate_cy``, the new hidden state
    ``weight_hr``                                    with ``proj_size``: ``[proj_size, hidden_size]``, likewise
    ========================  =====================  =============================================================

    A constructor is called without arguments, once for each cell. If its observer has dtype float32
    (``PlaceholderObserver.with_args(dtype=torch.float32)``), the part stays float32. Grids have at most 16 bits, except a
    fixed one of dtype ``qint32``, which then has no limits. Where a constructor makes fake quantizes, the weights are
    fake-quantized too: with their own constructor, or with one around the observer that the qconfig names.

    The qconfig decides what the LSTM takes and gives. If it promises static activations, these are quantized tensors, as
    torch.ao's flow passes them: then ``x``, ``hx`` and ``cx`` have their grids from outside. If its activation is float32,
    they are float32 tensors, ``hx`` and ``cx`` are by default ``"shared"``: read with the observer that ``ogate_cy`` (``hy``
    with ``proj_size``) and ``fgate_cx_igate_cgate`` are written with.

    Args:
        float_lstm: an LSTM with float32 parameters and a ``qconfig``; it is left as it is and shares no parameter.
        example_inputs: not looked at, as the cells are traced without; there because torch.ao's function has it.
        backend_config: None allows every dtype; else a part's dtype must be one that it lists for the part's op
            (``nn.Linear``, ``nn.Sigmoid``, ``nn.Tanh``, ``torch.tanh``, ``torch.add``, ``torch.mul``).
        linear_output_obs_ctr, ...: constructors of observers or fake quantizes, such as ``MinMaxObserver.with_args(...)``.
        split_gates: compute each gate's projections apart: four linears a side, whose parts each have four observers.

    Returns:
        A ``torch.ao.nn.quantizable.LSTM`` in the mode of ``float_lstm`` with a ``GraphModule`` at
        ``layers[i].layer_fw.cell``, and at ``layer_bw.cell`` if it is bidirectional.

    Raises:
        TypeError: a constructor that is none.
        ValueError: no qconfig; parameters that are not float32; a part that cannot be quantized as asked (the message names
            layer, direction and part).
    """
    given = locals()  # by name, as each argument is named for its group or part
    _check_float_lstm(float_lstm)
    asked = {part: given[f"{part}_obs_ctr"] or given.get(f"{_GROUPS.get(part)}_obs_ctr") for part in (*PARTS, *WEIGHTS)}
    quantized_boundary = has_quantized_boundary(float_lstm)
    constructors = _with_defaults(asked, _quiet_qconfig(float_lstm), quantized_boundary)

    def cell(layer: int, direction: int) -> nn.Module:
        cell, where = float_cell(float_lstm, layer, direction, split_gates), cell_name("LSTM", layer, direction)
        return observe_cell(cell, constructors, where, backend_config, quantized_boundary)

    observed: torch.ao.nn.quantizable.LSTM = assemble(torch.ao.nn.quantizable.LSTM, float_lstm, cell)
    for layer in list(observed.layers)[1:] if float_lstm.dropout and not float_lstm.proj_size else []:
        layer.register_forward_pre_hook(_DropoutBefore(float_lstm.dropout))
    observed.qconfig = float_lstm.qconfig
    if float_lstm.proj_size:
        # of the object, as torch.ao finds what converts it by its class
        observed.forward = functools.partial(_run_projected, observed)  # type: ignore[method-assign]
    return observed.train(float_lstm.training)


def _get_reference_quantized_lstm_module(
    observed_lstm: torch.ao.nn.quantizable.LSTM,
    backend_config: BackendConfig | None = None,
) -> torch.ao.nn.quantized.LSTM:
    """Return the reference quantized LSTM of an observed one: graphs that quantize and dequantize at every observed part.

    In a cell's graph an observed part is followed by ``torch.quantize_per_tensor`` and ``dequantize`` where its dtype is
    quint8, qint8 or qint32 (behind a ``torch.clamp`` where the grid's limits are nearer than the dtype's), and by
    ``quantized_decomposed.quantize_per_tensor`` and ``dequantize_per_tensor`` where it is uint8, int8, int16 or int32. The
    projections are torch's reference ``Linear`` where the weight is quantized.

    Args:
        observed_lstm: from :func:`_get_lstm_with_individually_observed_parts`, calibrated or trained; it is left as it is.
        backend_config: as for :func:`_get_lstm_with_individually_observed_parts`.

    Returns:
        A :class:`ReferenceLSTM` in eval mode, with a ``GraphModule`` at ``layers[i].layer_fw.cell`` and ``layer_bw.cell``.

    Raises:
        ValueError: a cell that is not observed; an observer that never ran, that saw NaN or infinities, or that gives an
            impossible grid; a dtype that the backend config does not allow. The message names layer, direction and part.
    """
    cells, quantized_boundary = cells_of(observed_lstm), has_quantized_boundary(observed_lstm)

    def cell(layer: int, direction: int) -> nn.Module:
        where = cell_name("LSTM", layer, direction)
        return convert_cell(cells[layer][direction], where, backend_config, quantized_boundary)

    reference: ReferenceLSTM = assemble(ReferenceLSTM, observed_lstm, cell)
    return reference.eval()


class ReferenceLSTM(torch.ao.nn.quantized.LSTM):
    """A converted LSTM. Every layer and direction keeps its own qparams, up to and including ``h_n`` and ``c_n``."""

    def _get_name(self) -> str:
        return "QuantizedLSTM(Reference)"

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the cells, one step after the other.

        Args:
            x: ``[T, B, input_size]`` (``[B, T, input_size]`` if ``batch_first``), float32 or a quantized tensor.
            hidden: ``(h_0, c_0)``, each ``[num_layers * num_directions, B, hidden_size]``, likewise; zeros if None. With
                ``proj_size`` hidden states are that wide.

        Returns:
            ``output`` ``[T, B, num_directions * hidden_size]`` (``[B, T, ...]``; with ``proj_size`` that instead of
            ``hidden_size``) and ``(h_n, c_n)``, shaped as ``hidden``.
            Where the boundary is quantized they are quantized tensors if all that is in them has the same qparams, and
            else float32: the dequantized values exactly. (A quantized op of ``convert_fx`` cannot read these: give the parts
            one fixed grid, or the LSTM a qconfig with float32 activations.)

        Raises:
            ValueError: a sequence without steps, or states of another shape.
        """
        sizes = Shape.of(self)
        steps, batch = x.transpose(0, 1).shape[:2] if self.batch_first else x.shape[:2]
        rows = sizes.num_layers * sizes.num_directions, batch
        needed = [*rows, sizes.h_size], [*rows, sizes.hidden_size]
        if not steps:
            raise ValueError("needed at least one step, got none")
        if hidden is not None and (got := tuple(list(state.shape) for state in hidden)) != needed:
            raise ValueError(f"needed states h_0 {needed[0]} and c_0 {needed[1]}, got {got[0]} and {got[1]}")
        # torch warns that quantized tensors will go: they are what torch.ao's reference form is made of
        with without_warning("torch.quantize_per_tensor, torch.quantize_per_channel"):
            return _run(self, x, hidden, dropout=0.0)


def _run_projected(
    lstm: torch.ao.nn.quantizable.LSTM, x: Tensor, hidden: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``forward`` of an observed LSTM with ``proj_size``, of which torch.ao's own makes hidden states of another width."""
    return _run(lstm, x, hidden, dropout=lstm.dropout if lstm.training else 0.0)


def _run(
    lstm: torch.ao.nn.quantizable.LSTM, x: Tensor, hidden: tuple[Tensor, Tensor] | None, dropout: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = x.transpose(0, 1) if lstm.batch_first else x
    h_0, c_0 = (None, None) if hidden is None else hidden
    output, h_n, c_n = run_cells(cells_of(lstm), x, h_0, c_0, Shape.of(lstm), dropout)
    return (output.transpose(0, 1) if lstm.batch_first else output), (h_n, c_n)


class _DropoutBefore:
    """A forward pre-hook: what ``nn.LSTM`` does between layers while it trains, and ``quantizable.LSTM`` leaves out."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (nn.functional.dropout(args[0], self.probability, layer.training), *args[1:])


def _check_float_lstm(lstm: nn.LSTM) -> None:
    if getattr(lstm, "qconfig", None) is None:
        raise ValueError("float_lstm must have a qconfig: it says how to observe the parts that no argument is given for")
    for name, parameter in lstm.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} must be torch.float32, got {parameter.dtype}: call float() on the model first")


def _construct_quietly(constructor: Callable[..., Any], **arguments: Any) -> Any:
    """Construct what a qconfig names: torch warns of an argument that its own qconfigs use."""
    with without_warning("Please use quant_min and quant_max to specify the range"):
        return constructor(**arguments)


def _quiet_qconfig(lstm: nn.Module) -> QConfig:
    qconfig: Any = lstm.qconfig
    return QConfig(*(functools.partial(_construct_quietly, constructor) for constructor in qconfig))


def has_quantized_boundary(lstm: nn.Module) -> bool:
    """Whether an LSTM's qconfig promises static activations: then torch.ao's flow gives it quantized tensors."""
    return getattr(lstm, "qconfig", None) is not None and activation_is_statically_quantized(_quiet_qconfig(lstm))


def _with_defaults(asked: Mapping[str, Any], qconfig: QConfig, quantized_boundary: bool) -> dict[str, Any]:
    """The constructor of every part: what was asked for, or what the qconfig says."""
    constructors = dict(asked)
    for part in PARTS:
        outside = part in ("x", "hx", "cx") and quantized_boundary
        if part != "tanh_cy_input" and not outside:
            constructors[part] = asked[part] or ("shared" if part in SHARED else qconfig.activation)
    for weight in WEIGHTS:
        constructors[weight] = asked[weight] or _default_weight(constructors, qconfig.weight)
    return constructors


def _default_weight(constructors: Mapping[str, Any], weight: Constructor) -> Constructor:
    """The qconfig's constructor for weights, within a fake quantize where any other part has one."""
    others = (constructor for part, constructor in constructors.items() if part not in WEIGHTS)
    if any(map(_makes_fake_quantize, others)) and not _makes_fake_quantize(weight):
        return FakeQuantize.with_args(observer=weight)  # type: ignore[no-any-return]
    return weight


def _makes_fake_quantize(constructor: Any) -> bool:
    # what is no constructor is an error later, which says where
    return callable(constructor) and not isinstance(constructor, nn.Module) and isinstance(constructor(), FakeQuantizeBase)

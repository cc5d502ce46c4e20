"""LSTMs that torch.ao or its users have observed, not our ``prepare``: their observers are taken as they are.

Such an LSTM is a ``torch.ao.nn.quantizable.LSTM``, or a subclass with observers of the user's own. Its cells are graphs, which
``torch_lstm_quant.lstm_utils`` made, or, in torch.ao's eager mode, modules of which each has its own observer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.ao.nn.quantizable import LSTMCell
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import FakeQuantizeBase
from torch.ao.quantization.observer import ObserverBase
from torch.fx import GraphModule

from torch_lstm_quant.cell_graph import GATE_NAMES, convert_cell, observe_cell
from torch_lstm_quant.cell_stack import assemble, cell_name, cells_of, check_forward
from torch_lstm_quant.eager_cell import FUNCTIONALS
from torch_lstm_quant.lstm_utils import ReferenceLSTM, has_quantized_boundary
from torch_lstm_quant.qparams import GATES

_ADVICE = "leave it as it is, or quantize an nn.LSTM with torch_lstm_quant.quantize"


def is_observed_by_torch(module: nn.Module) -> bool:
    """Whether it is an observed LSTM of torch.ao's flow. (Its converted LSTM is a subclass.)"""
    return isinstance(module, torch.ao.nn.quantizable.LSTM) and not isinstance(module, torch.ao.nn.quantized.LSTM)


def to_reference(observed: torch.ao.nn.quantizable.LSTM, where: str) -> ReferenceLSTM:
    """The reference form of a calibrated or trained LSTM, which is left as it is.

    What has no observer stays float32. (``torch.ao.quantization.convert`` gives sigmoid and tanh 8 bits, observed or not.)
    In eager mode ``x``, ``hx`` and ``cx`` come as quantized tensors, with their grids.

    Args:
        observed: see :func:`is_observed_by_torch`.
        where: its module path: every message begins with it.

    Raises:
        ValueError: a cell that torch.ao's own FX utility observed, or that is none; an observer that never ran, that saw NaN
            or infinities or that gives an impossible grid. The message names layer, direction and part.
    """
    check_forward(observed, (torch.ao.nn.quantizable.LSTM.forward,), where, _ADVICE)
    cells = cells_of(observed)
    eager = not any(isinstance(cell, GraphModule) for layer in cells for cell in layer)
    quantized_boundary = eager or has_quantized_boundary(observed)

    def convert(layer: int, direction: int) -> nn.Module:
        cell, place = cells[layer][direction], cell_name(where, layer, direction)
        return convert_cell(_observed_graph(cell, place) if eager else cell, place, None, quantized_boundary)

    reference: ReferenceLSTM = assemble(ReferenceLSTM, observed, convert)
    return reference.eval()


def _observed_graph(cell: object, place: str) -> GraphModule:
    """A cell of observed modules as a graph with copies of their observers."""
    if not isinstance(cell, LSTMCell):
        raise ValueError(f"{place}: expected a quantizable LSTMCell, got {type(cell).__name__}: {_ADVICE}")
    check_forward(cell, (LSTMCell.forward,), place, _ADVICE)
    suffixes = [f"_{gate}" for gate in GATE_NAMES] if cell.split_gates else [""]
    linears: dict[str, list[nn.Linear]] = {"igates": [], "hgates": []}
    constructors: dict[str, Callable[[], Any]] = {}
    for suffix in suffixes:
        for part, weight in (("igates", "weight_ih"), ("hgates", "weight_hh")):
            linear = _module(cell, part, suffix, nn.Linear, place)
            linears[part].append(linear)
            constructors |= _constructor(f"{part}{suffix}", getattr(linear, "activation_post_process", None))
            constructors |= _weight_constructor(f"{weight}{suffix}", linear)
        functional = _module(cell, "gates", suffix, FloatFunctional, place)
        constructors |= _constructor(f"gates{suffix}", functional.activation_post_process)
    for part in FUNCTIONALS:
        constructors |= _constructor(part, _module(cell, part, "", FloatFunctional, place).activation_post_process)
    for part in GATES:
        function = _module(cell, part, "", nn.Tanh if part == "cell_gate" else nn.Sigmoid, place)
        constructors |= _constructor(part, getattr(function, "activation_post_process", None))
    weights = [torch.cat([linear.weight.detach() for linear in side]) for side in linears.values()]
    biases = [torch.cat([linear.bias.detach() for linear in side]) for side in linears.values()] if cell.bias else []
    with torch.device("meta"):  # the modules' own initial values are thrown away
        plain = LSTMCell.from_params(*weights, *biases, split_gates=cell.split_gates)  # type: ignore[misc]
    return observe_cell(plain, constructors, place, quantized_boundary=True)


def _module(cell: LSTMCell, part: str, suffix: str, kind: type[nn.Module], place: str) -> Any:
    """The module of a part, or of one gate of it."""
    found: Any = getattr(cell, part, None)
    module = found[suffix.removeprefix("_")] if suffix else found
    # a linear may be one of a subclass, as those that fake-quantize their weight are; a function may not
    if not isinstance(module, kind) or (kind is not nn.Linear and type(module) is not kind):
        raise ValueError(f"{place}, part {part}{suffix}: expected a {kind.__name__}, got {type(module).__name__}: {_ADVICE}")
    return module


def _constructor(slot: str, observer: object) -> dict[str, Callable[[], Any]]:
    """A constructor that copies what was calibrated or trained; none where nothing observes."""
    return {slot: partial(copy.deepcopy, observer)} if isinstance(observer, (ObserverBase, FakeQuantizeBase)) else {}


def _weight_constructor(slot: str, linear: nn.Linear) -> dict[str, Callable[[], Any]]:
    """The fake quantize with which a weight was trained, or else what the linear's qconfig says."""
    fake_quantize = getattr(linear, "weight_fake_quant", None)
    if fake_quantize is not None:
        return _constructor(slot, fake_quantize)
    qconfig: Any = getattr(linear, "qconfig", None)
    return {} if qconfig is None else {slot: qconfig.weight}

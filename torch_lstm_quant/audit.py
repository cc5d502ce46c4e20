"""``audit``: what each LSTM, GRU and RNN of a model is now, and what keeps it from running on the fused kernel.

Why something cannot be fused is not written down here: what would fuse it is tried, and its message is passed on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule

from torch_lstm_quant import ops
from torch_lstm_quant.audit_table import as_markdown, as_text
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.custom_config import Converter
from torch_lstm_quant.float_lstms import FLOAT_LSTMS, qconfig_of
from torch_lstm_quant.lowering import lower, lower_module
from torch_lstm_quant.observed import OBSERVED_LSTMS, observe
from torch_lstm_quant.packed_cells import PackedCells
from torch_lstm_quant.qconfig import DIRECTIONS, Direction, LSTMQConfig
from torch_lstm_quant.qparams import GATES, PARTS, PER_GATE_PARTS, WEIGHTS, QParams, WeightQParams, own_parts
from torch_lstm_quant.quantized_adapter import QuantizedBoundaryLSTM
from torch_lstm_quant.stages import Stage, is_lstm, stage_of

_FIRST = "what the message says, then "
_NOT_CONVERTED = "it is observed, but not converted"
_FROM_FLOAT = "torch_lstm_quant.quantize on the float model"
_ONLY_LSTMS = "only nn.LSTM and nn.LSTMCell can be fused: put one in its place, or leave it as it is"


@dataclass(frozen=True)
class AuditedCell:
    """One direction of one layer of a reference or fused LSTM.

    Args:
        layer: counted from 0.
        direction: ``"forward"`` or ``"backward"``.
        float_parts: the parts that stay float32, since nothing quantizes them: no observer was asked for. A part of which
            some gates have a grid is named gate by gate: ``gates.forget_gate``.
        input_sums, hidden_sums: how the fused kernel sums the two projections: ``"int8"``, ``"wide"`` (integers too, more
            slowly) or ``"float"``; None where there is no kernel yet.
        slowed_by: what keeps a projection from int8 sums, in words.
        hy_sums: how it sums that of the hidden state, of an LSTM with ``proj_size``; None of others.
    """

    layer: int
    direction: Direction
    float_parts: tuple[str, ...]
    input_sums: str | None = None
    hidden_sums: str | None = None
    slowed_by: tuple[str, ...] = ()
    hy_sums: str | None = None


@dataclass(frozen=True)
class AuditedModule:
    """What a module is now.

    Args:
        path: where it is in the model; "" is the model itself.
        also_at: its other names, if it has any.
        kind: its class.
        stage: ``"float"``; ``"observed"`` (not converted yet); ``"reference"`` (converted, not lowered); ``"fused"``; or
            ``"quantized"``, by torch.ao alone: dynamically, or in its eager mode.
        isa: the instruction set on whose kernels it runs; None unless it is fused, or where the environment names a wrong one.
        cells: of a fused LSTM, and of a reference LSTM that can be lowered; else empty.
        why: what keeps it from being fused; "" if it is fused. Where something refuses it, this is that error's message.
        to_fuse: what would have to change for it to be fused; "" if it is.
    """

    path: str
    also_at: tuple[str, ...]
    kind: str
    stage: Stage
    isa: str | None = None
    cells: tuple[AuditedCell, ...] = ()
    why: str = ""
    to_fuse: str = ""


class Audit(tuple[AuditedModule, ...]):
    """The modules in the order in which the model has them: a tuple whose ``str`` is a table, with the reasons below it."""

    __slots__ = ()

    def __str__(self) -> str:
        return as_text(self)

    def markdown(self) -> str:
        """The same as one Markdown table."""
        return as_markdown(self)


def audit(model: nn.Module) -> Audit:
    """Say of each LSTM, GRU, RNN and cell of one in a model what it is, and what it would take to have it fused.

    It sees modules of PyTorch (float, observed, reference, dynamic) and of this package, subclasses of them, and what lies
    inside FX's graph modules; not what a trace, a script or an export has made of them. Nothing is changed or printed.

    Args:
        model: any module. It need not run.

    Returns:
        An :class:`Audit`: empty where there is none of these modules.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> print(audit(model))
        >>> assert all(module.stage == "fused" for module in audit(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit needs a module, got {type(model).__name__}")
    paths, graphs = _find(model)
    touched = any(stage_of(module) != "float" for module in paths)

    def audited(module: nn.Module, names: Sequence[str]) -> AuditedModule:
        path, *also_at = names
        inside = [graph for graph_path, graph in graphs.items() if path.startswith(graph_path)]
        place = _Place(path, inside[0] if inside else None, touched)
        stage = stage_of(module)
        assert stage is not None
        # what is tried is thrown away, so it should leave no trace
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _AUDITORS[stage](module, place)
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return AuditedModule(path, tuple(also_at), kind, stage, **found._asdict())

    return Audit(audited(module, names) for module, names in paths.items())


def _find(model: nn.Module) -> tuple[dict[nn.Module, list[str]], dict[str, GraphModule]]:
    """The modules that are audited with all their paths, and the graph modules by the prefix of what is in them."""
    paths: dict[nn.Module, list[str]] = {}
    graphs: dict[str, GraphModule] = {}
    parts: list[str] = []  # prefixes of what is a part of a module that was found
    for path, module in _named_modules(model):
        if path.startswith(tuple(parts)):
            continue
        prefix = f"{path}." if path else ""
        if isinstance(module, GraphModule):
            graphs[prefix] = module
        if stage_of(module) is not None:
            paths.setdefault(module, []).append(path)
        if stage_of(module) not in (None, "float"):
            parts.append(prefix)
    return paths, graphs


def _named_modules(module: nn.Module, path: str = "", above: tuple[nn.Module, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Every path and its module, as ``named_modules(remove_duplicate=False)``, but none within itself."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and child is not module and child not in above:
            yield from _named_modules(child, f"{path}.{name}" if path else name, (*above, module))


@dataclass(frozen=True)
class _Place:
    """Where a module is: its path, the graph module around it, and whether any module of the model has left float."""

    path: str
    graph: GraphModule | None
    touched: bool

    @property
    def is_prepared_graph(self) -> bool:
        """Whether ``prepare_fx`` made the graph, and ``convert_fx`` has yet to come."""
        return self.graph is not None and "_observed_graph_module_attrs" in self.graph.meta


class _Finding(NamedTuple):
    """What is found out about a module: the fields of :class:`AuditedModule`."""

    why: str = ""
    to_fuse: str = ""
    isa: str | None = None
    cells: tuple[AuditedCell, ...] = ()


def _refusal(attempt: Callable[[], object]) -> str | None:
    """The message with which something refuses what it is asked for; None where it does it."""
    try:
        attempt()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _audit_float(module: nn.Module, place: _Place) -> _Finding:
    quantize = f"torch_lstm_quant.quantize(model, batches, {{{place.path!r}: LSTMQConfig.int8()}})"
    refusal = _refusal_to_observe(module, place)
    if refusal is not None:
        return _Finding(refusal, f"{_FIRST}{quantize}" if is_lstm(module) else _ONLY_LSTMS)
    kind = "" if type(module) in FLOAT_LSTMS else f"lstm_classes=({type(module).__name__},)"
    prepare = f"prepare_fx with torch_lstm_quant.prepare_custom_config({kind})"
    mapping = f"torch_lstm_quant.qconfig_mapping(LSTMQConfig.int8(), mapping{kind and ', '}{kind})"
    if qconfig_of(module) is not None:
        return _Finding("it has an LSTMQConfig, but prepare_fx was not told to observe LSTMs", prepare)
    if getattr(module, "qconfig", None) is not None:
        return _Finding("its qconfig is torch.ao's, which does nothing to an LSTM", f"{prepare} and {mapping}")
    if place.is_prepared_graph:
        return _Finding("the QConfigMapping gives it no qconfig", f"{prepare} and {mapping}")
    if place.graph is not None:
        return _Finding(
            "convert_fx left it float, as it does in silence where the QConfigMapping leaves an LSTM out, or where prepare_fx "
            "was not given torch_lstm_quant.prepare_custom_config()",
            quantize,
        )
    if place.touched:
        return _Finding("it was left out when other modules of the model were quantized", quantize)
    return _Finding("nothing has quantized it", quantize)


def _refusal_to_observe(module: nn.Module, place: _Place) -> str | None:
    return _refusal(lambda: observe(module, LSTMQConfig.int8(), place.path))


def _audit_observed(module: nn.Module, place: _Place) -> _Finding:
    if isinstance(module, torch.ao.nn.quantizable.LSTMCell):
        return _Finding("it is of torch.ao's eager mode, which converts no LSTMCell by itself", _FROM_FLOAT)
    ours = isinstance(module, OBSERVED_LSTMS)
    convert = "torch_lstm_quant.convert(model)"
    if place.is_prepared_graph:
        convert = (
            "convert_fx with torch_lstm_quant.convert_custom_config()" if ours else "convert_fx, then torch_lstm_quant.lower"
        )
    refusal = _refusal(lambda: _convert(module, place.path))
    if refusal is not None:
        return _Finding(refusal, _FIRST + convert)
    if ours and place.graph is not None and not place.is_prepared_graph:
        return _Finding("convert_fx left it observed: it was not given torch_lstm_quant.convert_custom_config()", convert)
    return _Finding(_NOT_CONVERTED, convert)


def _convert(module: nn.Module, path: str) -> nn.Module:
    """An observed LSTM, fused."""
    if isinstance(module, (*OBSERVED_LSTMS, torch.ao.nn.quantizable.LSTM)):
        return Converter("fused").from_observed(module, path)
    return lower(module)


def _audit_quantized(module: nn.Module, place: _Place) -> _Finding:
    if not is_lstm(module):
        return _Finding(_refusal_to_observe(module, place) or "", _ONLY_LSTMS)
    refusal = _refusal(lambda: lower(module))
    if refusal is None:
        return _Finding("torch.ao's eager mode converted it, but it is not lowered", "torch_lstm_quant.lower(model)")
    return _Finding(refusal, _FROM_FLOAT)


def _audit_reference(module: nn.Module, place: _Place) -> _Finding:
    try:
        lowered = lower_module(module, place.path)
    except ValueError as error:
        return _Finding(str(error), f"{_FIRST}torch_lstm_quant.lower(model)")
    cells = [replace(cell, input_sums=None, hidden_sums=None, slowed_by=(), hy_sums=None) for cell in _cells(lowered)]
    return _Finding("it is converted, but not lowered", "torch_lstm_quant.lower(model)", cells=tuple(cells))


def _audit_fused(module: nn.Module, place: _Place) -> _Finding:
    try:
        isa = ops.isa_active()
    except RuntimeError as error:  # it is fused, but would not run
        return _Finding(str(error), "correct TORCH_LSTM_QUANT_ISA, or unset it, in the environment")
    return _Finding(isa=isa, cells=tuple(_cells(module)))


_AUDITORS: dict[Stage, Callable[[nn.Module, _Place], _Finding]] = {
    "float": _audit_float,
    "observed": _audit_observed,
    "quantized": _audit_quantized,
    "reference": _audit_reference,
    "fused": _audit_fused,
}


def _cells(fused: nn.Module) -> Iterator[AuditedCell]:
    """The cells of a fused LSTM."""
    assert isinstance(fused, (PackedCells, QuantizedBoundaryLSTM))
    if any(buffer.is_meta for buffer in fused.buffers()):
        return  # it has no values yet
    layers = fused.cells()
    if isinstance(fused, PackedCells):
        packed, outside = fused.packed(), ""
    else:
        # the grids of x and c come with the input; quantized tensors that have one have 8 bits
        layers[0] = [replace(cell, qparams=replace(cell.qparams, x=QParams(1.0, 0, 0, 255))) for cell in layers[0]]
        packed, outside = ops.pack(layers), "cx"
    sums = iter(ops.sums(packed))
    for layer, cells in enumerate(layers):
        for direction, cell in zip(DIRECTIONS, cells, strict=False):
            kinds = next(sums)
            slowed_by = [
                reason
                for kind, projection in zip(kinds, _PROJECTIONS, strict=False)
                for reason in _slowed_by(*projection, kind, cell)
            ]
            float_parts = tuple(part for part in _float_parts(cell) if part != outside)
            hy_sums = kinds[2] if cell.proj_size else None
            yield AuditedCell(layer, direction, float_parts, kinds[0], kinds[1], tuple(slowed_by), hy_sums)


_PROJECTIONS = (("input", "x", "weight_ih"), ("hidden", "hx", "weight_hh"), ("hidden state's", "ogate_cy", "weight_hr"))
"""What each projection is called, what it reads, and its weight."""


def _slowed_by(projection: str, operand: str, weight: str, sums: str, cell: Cell) -> Iterator[str]:
    """Why the packer did not choose int8 sums for a projection."""
    grid: QParams | None = getattr(cell.qparams, operand)
    weight_grid: WeightQParams | None = getattr(cell.qparams, weight)
    if sums == "int8":
        return
    if grid is None or weight_grid is None:
        floats = [part for part, one in ((operand, grid), (weight, weight_grid)) if one is None]
        yield f"{projection} projection in float32, as there is no grid for {' and '.join(floats)}"
    elif grid.quant_max - grid.quant_min > 255:
        yield f"{projection} projection in wide sums, as {operand} has {grid.bits} bits"
    elif weight_grid.zero_point.any():
        yield f"{projection} projection in wide sums, as {weight} has zero points"
    else:
        depth = getattr(cell, weight).shape[1]
        yield f"{projection} projection in wide sums, as int32 could overflow over {depth} values"


def _float_parts(cell: Cell) -> Iterator[str]:
    qparams = cell.qparams
    for part in own_parts((*PARTS, *WEIGHTS), projects=cell.proj_size > 0):
        if part in PER_GATE_PARTS:
            gates = [gate for gate, grid in zip(GATES, getattr(qparams, part), strict=True) if grid is None]
            yield from [part] if len(gates) == len(GATES) else [f"{part}.{gate}" for gate in gates]
        elif (qparams.tanh_input if part == "tanh_cy_input" else getattr(qparams, part)) is None:
            yield part

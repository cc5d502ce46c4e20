"""What ``torch.onnx.export(dynamo=True)`` needs to write models in which the fused operator stands."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from torch_lstm_quant.cell import Cell
from torch_lstm_quant.exported_cell import check_fused
from torch_lstm_quant.modules import LSTM, LSTMCell
from torch_lstm_quant.onnx_cell import add_layers
from torch_lstm_quant.onnx_graph import Graph, require_onnx
from torch_lstm_quant.quantized_adapter import QuantizedBoundaryLSTM
from torch_lstm_quant.stages import what_was_found


def onnx_translation_table(model: nn.Module) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` with which ``torch.onnx.export(model, ..., dynamo=True)`` writes fused LSTMs.

    The table is for this model: it has its LSTMs' weights and grids. ``export_onnx`` calls both.

    Raises:
        ImportError: there is no ``onnx`` or no ``onnxscript``.
        TypeError: not a module.
        ValueError: the model has no fused LSTM, or one that ONNX cannot express.
    """
    _require_onnxscript()
    if not isinstance(model, nn.Module):
        raise TypeError(f"needed a fused LSTM or a model that contains one, got {type(model).__name__}")
    cells = _cells_by_name(model)
    if not cells:
        raise ValueError(f"nothing to translate: {what_was_found(model)}")

    calls = itertools.count()

    def lstm(
        x: Any,
        hx: Any,
        cx: Any,
        packed: Any,
        hidden_size: int,
        num_layers: int,
        num_directions: int,
        h_dtype: int | None = None,
        c_dtype: int | None = None,
        batch_sizes: Any = None,
        lengths: Any = None,
        proj_size: int = 0,
    ) -> Sequence[Any]:
        if h_dtype is not None or c_dtype is not None:
            raise ValueError("forward_integers cannot be written to ONNX, only forward, which takes and gives float32")
        if batch_sizes is not None:
            raise ValueError("a PackedSequence cannot be written to ONNX, got one: pass the padded batch and its lengths")
        if packed.name not in cells:
            raise ValueError(f"the weights {packed.name} are of no LSTM of the model that the table was made for")
        return _emit(f"{x.name}_lstm{next(calls)}_", cells[packed.name], x, hx, cx, lengths)

    return {torch.ops.torch_lstm_quant.lstm.default: lstm}


def _require_onnxscript() -> Any:
    require_onnx()
    try:
        import onnxscript
    except ImportError as error:
        raise ImportError(
            "torch.onnx.export of a model needs onnxscript, got none: pip install 'torch-lstm-quant[onnx]'"
        ) from error
    return onnxscript


def _cells_by_name(model: nn.Module) -> dict[str, list[list[Cell]]]:
    """The cells of each fused LSTM by the name that ``torch.export`` gives its packed weights."""
    paths: dict[str, str] = {}
    cells = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedBoundaryLSTM):
            raise ValueError(
                f"{path or 'the LSTM'} takes and gives quantized tensors, which cannot be written to ONNX: quantize the model "
                "with torch_lstm_quant.quantize, whose LSTMs take and give float32"
            )
        if isinstance(module, (LSTM, LSTMCell)):
            name = "b_" + re.sub(r"[^a-zA-Z0-9]", "_", f"{path}._packed" if path else "_packed")
            if name in paths:
                raise ValueError(f"the paths of {paths[name]} and {path} become the same name in ONNX, got {name}: rename one")
            paths[name] = path
            cells[name] = check_fused(module, "export to ONNX").cells()
    return cells


def _emit(prefix: str, layers: Sequence[Sequence[Cell]], x: Any, hx: Any, cx: Any, lengths: Any) -> Sequence[Any]:
    """Records the nodes of an LSTM, named with ``prefix``, with the exporter that is translating; returns its outputs."""
    onnxscript = _require_onnxscript()
    from onnxscript import ir

    recorder = onnxscript.evaluator.default()
    given = {name: value for name, value in (("x", x), ("h_0", hx), ("c_0", cx), ("lengths", lengths)) if value is not None}
    names = {name: name for name in given}
    graph = Graph(prefix)
    results = add_layers(graph, layers, "x", names.get("h_0"), names.get("c_0"), names.get("lengths"))
    inputs = [graph.value_info(name, torch.int64 if name == "lengths" else torch.float32, None) for name in given]
    outputs = [graph.value_info(name, torch.float32, None) for name in results]
    built = ir.serde.deserialize_graph(graph.proto("lstm", inputs, outputs))
    nodes = list(built)
    constants = [_constant_node(ir, value) for value in built.initializers.values()]
    replaced = [*zip(built.inputs, given.values(), strict=True)]
    replaced += [(value, node.outputs[0]) for value, node in zip(built.initializers.values(), constants, strict=True)]
    for value, by in replaced:
        ir.convenience.replace_all_uses_with(value, by)
    values = list(built.outputs)
    built.outputs.clear()
    built.remove(nodes)
    recorder.nodes.extend([*constants, *nodes])
    # through the exporter, so that its own kind of values comes out
    return [recorder.opset.Identity(value) for value in values]


def _constant_node(ir: Any, value: Any) -> Any:
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)])
    node.outputs[0].name = value.name
    return node

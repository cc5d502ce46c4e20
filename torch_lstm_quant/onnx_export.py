"""``export_onnx``: a fused LSTM, or a model with such in it, as ONNX in standard operators that give its bits."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_lstm_quant.exported_cell import Fused, check_folder, check_fused
from torch_lstm_quant.modules import LSTM, LSTMCell
from torch_lstm_quant.onnx_cell import add_layers, add_step
from torch_lstm_quant.onnx_graph import OPSET, Graph, require_onnx
from torch_lstm_quant.onnx_translation import onnx_translation_table

if TYPE_CHECKING:
    import onnx

_IR_VERSION = 8  # the one of OPSET

Axes = list[str | int]
Inputs = dict[str, Axes]
Outputs = dict[str, tuple[str, Axes]]  # what the graph calls it, and its axes


def export_onnx(
    model_or_module: nn.Module, path: str | Path, args: tuple[Any, ...] | Tensor | None = None, **options: Any
) -> None:
    """Write a fused LSTM, or a model that contains some, to ONNX in standard operators.

    In ONNX Runtime on a CPU the LSTMs give the bits of the fused module, on every machine. (What surrounds them in a model is
    what ``torch.onnx.export`` makes of it.)

    A fused LSTM has the inputs ``input``, ``h_0`` and ``c_0`` and the outputs ``output``, ``h_n`` and ``c_n``, all float32 and
    shaped as for the module, numbers of steps and rows being free. A fused LSTMCell has ``input``, ``h_0``, ``c_0`` and
    ``h_1``, ``c_1``.

    Args:
        model_or_module: what to write; every part may have a grid or be float32.
        path: the file.
        args: for a model: example inputs, as for ``torch.onnx.export``. None for a fused LSTM.
        options: for a model: further arguments of ``torch.onnx.export``: ``dynamic_shapes``, ``input_names`` and so on.

    Raises:
        ImportError: there is no ``onnx``, or, for a model, no ``onnxscript``.
        TypeError: not a module; a path that is none; ``args`` that are missing, or given for a fused LSTM.
        FileNotFoundError: the folder of ``path`` does not exist.
        ValueError: a model without a fused LSTM, or with one that ONNX cannot express: the message names it. A subclass of the
            fused LSTM with a ``forward`` of its own.
    """
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"path must be a str or Path, got {path!r}")
    check_folder(Path(path))
    if isinstance(model_or_module, (LSTM, LSTMCell)):
        if args is not None or options:
            given = ", ".join(["args"] * (args is not None) + list(options))
            raise TypeError(
                f"a fused LSTM is written without example inputs and options, all its sizes being known, got {given}"
            )
        kind = LSTMCell if isinstance(model_or_module, LSTMCell) else LSTM
        if type(model_or_module).forward is not kind.forward:
            raise ValueError(
                f"expected the forward of {kind.__name__}, as that is what is written, got {type(model_or_module).__name__} "
                f"with its own: let a module contain the {kind.__name__}, and export that with args"
            )
        require_onnx().save(lstm_model(model_or_module), str(path))
        return
    table = onnx_translation_table(model_or_module)
    if args is None:
        raise TypeError("a model is traced, which needs args, example inputs for it, got None")
    options = {"verbose": False, **options}  # the library prints nothing
    args = args if isinstance(args, tuple) else (args,)
    torch.onnx.export(model_or_module, args, path, dynamo=True, custom_translation_table=table, **options)


def lstm_model(module: Fused) -> onnx.ModelProto:
    """A model of one fused LSTM or LSTMCell."""
    onnx = require_onnx()
    check_fused(module, "export_onnx")
    graph = Graph("lstm_")
    inputs, outputs = _add_cell(graph, module) if isinstance(module, LSTMCell) else _add_lstm(graph, module)
    for name, (value, _) in outputs.items():
        graph.nodes.append(onnx.helper.make_node("Identity", [value], [name], name=f"{name}_node"))
    proto = graph.proto(
        "torch_lstm_quant",
        [graph.value_info(name, torch.float32, shape) for name, shape in inputs.items()],
        [graph.value_info(name, torch.float32, shape) for name, (_, shape) in outputs.items()],
    )
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(proto, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="torch_lstm_quant")
    onnx.checker.check_model(model)
    return model


def _add_lstm(graph: Graph, module: LSTM) -> tuple[Inputs, Outputs]:
    """Adds the module in its own call form; returns its inputs and outputs."""
    x = graph.op("Transpose", "input", perm=[1, 0, 2]) if module.batch_first else "input"
    layers = module.cells()
    output, h_n, c_n = add_layers(graph, layers, x, "h_0", "c_0")
    output = graph.op("Transpose", output, perm=[1, 0, 2]) if module.batch_first else output
    order: Axes = ["batch", "steps"] if module.batch_first else ["steps", "batch"]
    directions = 1 + module.bidirectional
    rows: Axes = [module.num_layers * directions, "batch"]
    h_size = layers[0][0].h_size
    h, c = [*rows, h_size], [*rows, module.hidden_size]
    wide: Axes = [*order, directions * h_size]
    inputs: Inputs = {"input": [*order, module.input_size], "h_0": h, "c_0": c}
    return inputs, {"output": (output, wide), "h_n": (h_n, h), "c_n": (c_n, c)}


def _add_cell(graph: Graph, module: LSTMCell) -> tuple[Inputs, Outputs]:
    ((cell,),) = module.cells()
    h_1, c_1 = add_step(graph, cell, "input", "h_0", "c_0")
    states: Axes = ["batch", module.hidden_size]
    inputs: Inputs = {"input": ["batch", module.input_size], "h_0": states, "c_0": states}
    return inputs, {"h_1": (h_1, states), "c_1": (c_1, states)}

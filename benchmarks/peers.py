"""The LSTMs of other runtimes, ONNX Runtime and ncnn, as systems to time; each package is imported where it is used."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from shapes import Case
from systems import OURS, SYSTEMS, Call, System, int8, without_projection
from torch import Tensor

import torch_lstm_quant as tlq


def _stream(case: Case, threads: int) -> Call:
    lstm = int8(case)
    assert isinstance(lstm, tlq.LSTM)
    stream = tlq.Stream(lstm, case.shape.B)
    stream.reset(case.states)
    x = case.x[0]
    # the first call, whose output is judged, goes on from the case's states, each other one from where the last call ended
    return lambda: [stream(x)]


def _parameters(case: Case, layer: int, gates: Sequence[int]) -> list[Tensor]:
    """A layer's weights and biases, its directions stacked, the gates (i, f, g, o in ``nn.LSTM``) in the order asked for."""

    def stacked(name: str) -> Tensor:
        suffixes = ("", "_reverse")[: case.shape.directions]
        parameters = [getattr(case.lstm, f"{name}_l{layer}{suffix}") for suffix in suffixes]
        return torch.stack([parameter.unflatten(0, (4, -1))[list(gates)].flatten(0, 1) for parameter in parameters])

    return [stacked(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def _states(case: Case) -> dict[str, Tensor]:
    """By name: ``h0`` and ``c0`` of the first layer, ``h1`` and ``c1`` of the next one, each of all directions."""
    layers = range(case.shape.layers)
    of_layers = [state.unflatten(0, (case.shape.layers, -1)) for state in case.states]
    return {f"{name}{layer}": state[layer] for layer in layers for name, state in zip("hc", of_layers, strict=True)}


# ---- ONNX Runtime


def _onnx_model(case: Case) -> Any:
    """An ONNX LSTM for each layer. States are inputs, named as ``_states`` does, and outputs, named the same with an ``n``."""
    from onnx import TensorProto, helper, numpy_helper

    def floats(name: str, size: Iterable[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(size))

    shape, states = case.shape, _states(case)
    sequence = (shape.T, shape.B, shape.directions * shape.H)
    nodes, constants = [], [numpy_helper.from_array(torch.tensor(sequence).numpy(), "sequence")]
    for layer in range(shape.layers):
        w_ih, w_hh, b_ih, b_hh = _parameters(case, layer, (0, 3, 1, 2))
        parameters = {f"W{layer}": w_ih, f"R{layer}": w_hh, f"B{layer}": torch.cat([b_ih, b_hh], 1)}
        constants += [numpy_helper.from_array(value.numpy(), name) for name, value in parameters.items()]
        nodes += [
            helper.make_node(
                "LSTM",
                [f"x{layer}", *parameters, "", f"h{layer}", f"c{layer}"],
                [f"split{layer}", f"hn{layer}", f"cn{layer}"],
                hidden_size=shape.H,
                direction="bidirectional" if shape.directions == 2 else "forward",
            ),
            # from [T, directions, B, H] to what the next layer reads
            helper.make_node("Transpose", [f"split{layer}"], [f"rows{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"rows{layer}", "sequence"], [f"x{layer + 1}"]),
        ]
    inputs = [floats("x0", case.x.shape), *(floats(name, state.shape) for name, state in states.items())]
    outputs = [floats(f"x{shape.layers}", sequence)]
    outputs += [floats(f"{name[0]}n{name[1:]}", state.shape) for name, state in states.items()]
    graph = helper.make_graph(nodes, "lstm", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _quantized_onnx(model: Any, reduce_range: bool) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it warns that a preparation, of no use to an LSTM, was left out
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/float32.onnx", f"{folder}/int8.onnx"]
        onnx.save(model, files[0])
        quantize_dynamic(*files, weight_type=QuantType.QInt8, reduce_range=reduce_range)
        quantized = onnx.load(files[1])
    if any(node.op_type == "LSTM" for node in quantized.graph.node):
        raise RuntimeError("quantize_dynamic of ONNX Runtime left an LSTM in float32")
    return quantized


class OnnxRuntime:
    """A session with its inputs and outputs bound to tensors once, which takes less of a call than passing arrays does."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor], threads: int) -> None:
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.tensors = inputs, outputs  # which must live as long as they are bound
        for tensors, bind in zip(self.tensors, (self.binding.bind_input, self.binding.bind_output), strict=True):
            for name, tensor in tensors.items():
                bind(name, "cpu", 0, np.float32, list(tensor.shape), tensor.data_ptr())
        self.results = list(outputs.values())

    def __call__(self) -> list[Tensor]:
        self.session.run_with_iobinding(self.binding)
        return self.results


def _bound(model: Any, case: Case, threads: int) -> Call:
    states = _states(case)
    outputs = {f"x{case.shape.layers}": torch.empty_like(case.expected)}
    outputs |= {f"{name[0]}n{name[1:]}": torch.empty_like(state) for name, state in states.items()}
    return OnnxRuntime(model, {"x0": case.x} | states, outputs, threads)


def _ort_float32(case: Case, threads: int) -> Call:
    return _bound(_onnx_model(case), case, threads)


def _ort_int8(reduce_range: bool) -> Callable[[Case, int], Call]:
    return lambda case, threads: _bound(_quantized_onnx(_onnx_model(case), reduce_range), case, threads)


# ---- ncnn

_NCNN_MAGIC = "7767517"
_NCNN_INT8, _NCNN_FLOAT32 = (0x000D4B38).to_bytes(4, "little"), bytes(4)
"""What weights of a type begin with in ncnn's files. Scales, always float32, begin with nothing."""


def _ncnn_int8_weights(weights: Tensor) -> tuple[bytes, bytes]:
    """Weights as ncnn2int8, which is not in the pip package, has them: a scale for each row. The weights and the scales."""
    scales = 127 / weights.abs().amax(2)
    values = (weights * scales[..., None]).round().to(torch.int8).numpy().tobytes()
    return _NCNN_INT8 + values + bytes(-len(values) % 4), scales.numpy().tobytes()


def _ncnn_files(case: Case) -> tuple[str, bytes]:
    """The network, with inputs and outputs named as in ``_onnx_model``, and its weights."""
    shape = case.shape
    inputs = ["x0", *_states(case)]
    layers = [f"Input {name} 0 1 {name}" for name in inputs]
    weights = b""
    for layer, size in enumerate(shape.input_sizes()):
        w_ih, w_hh, b_ih, b_hh = _parameters(case, layer, (0, 1, 3, 2))
        (x_values, x_scales), (h_values, h_scales) = _ncnn_int8_weights(w_ih), _ncnn_int8_weights(w_hh)
        weights += x_values + _NCNN_FLOAT32 + (b_ih + b_hh).numpy().tobytes() + h_values + x_scales + h_scales
        settings = {0: shape.H, 1: 4 * shape.H * size * shape.directions, 2: 2 if shape.directions == 2 else 0, 8: 2}
        names = f"x{layer} h{layer} c{layer} x{layer + 1} hn{layer} cn{layer}"
        layers.append(f"LSTM lstm{layer} 3 3 {names} {' '.join(f'{key}={value}' for key, value in settings.items())}")
    blobs = len(inputs) + 3 * shape.layers
    return "\n".join([_NCNN_MAGIC, f"{len(layers)} {blobs}", *layers, ""]), weights


class _Ncnn:
    def __init__(self, case: Case, threads: int) -> None:
        import ncnn

        network, weights = _ncnn_files(case)
        self.net = ncnn.Net()
        self.net.opt.num_threads = threads
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder, "lstm.param"), Path(folder, "lstm.bin")
            files[0].write_text(network)
            files[1].write_bytes(weights)
            if self.net.load_param(str(files[0])) or self.net.load_model(str(files[1])):
                raise RuntimeError("ncnn does not load the network")
        inputs = {"x0": case.x[:, 0]} | _states(case)
        # copies of ncnn's own, as a Mat does not keep an array alive
        self.inputs = {name: ncnn.Mat(tensor.flatten(1).contiguous().numpy()).clone() for name, tensor in inputs.items()}
        self.outputs = [f"x{case.shape.layers}", *(f"{name[0]}n{name[1:]}" for name in _states(case))]

    def __call__(self) -> list[Any]:
        extractor = self.net.create_extractor()
        for name, value in self.inputs.items():
            extractor.input(name, value)
        return [extractor.extract(name)[1] for name in self.outputs]


PEERS = {
    "ort_float32": System(_ort_float32, "ONNX Runtime, LSTM", takes=without_projection, package="onnxruntime"),
    "ort_int8": System(
        _ort_int8(reduce_range=False),
        "ONNX Runtime, quantize_dynamic, weights QInt8; gates and cell float32",
        takes=without_projection,
        package="onnxruntime",
    ),
    "ort_int8_7bit": System(
        _ort_int8(reduce_range=True),
        "ONNX Runtime, quantize_dynamic, weights QInt8 with reduce_range; gates and cell float32",
        takes=without_projection,
        package="onnxruntime",
    ),
    "ncnn_int8": System(
        _Ncnn,
        "ncnn, LSTM with int8 weights; gates and cell float32",
        takes=lambda shape: shape.B == 1 and not shape.proj,  # its LSTM has no batches
        package="ncnn",
    ),
}
STREAM = "ours_stream"
RIVALS = ("float32", "quantize_dynamic", *PEERS)
"""Those among which the best is sought."""
COMPARED = (OURS, STREAM, *RIVALS)
"""What ``--peers`` times."""
ALL_SYSTEMS = {
    **SYSTEMS,
    STREAM: System(
        _stream,
        "torch_lstm_quant.Stream of preset int8, one step a call",
        takes=lambda shape: shape.T == 1 and shape.directions == 1,
    ),
    **PEERS,
}

"""torch's own tests of its LSTM utilities, in our words and with ours in their place: the flow that users know keeps working.

They follow ``test_static_lstm_with_custom_fixed_qparams``, ``test_static_lstm`` and ``test_static_lstm_consume_tuple`` of
torch's ``test/quantization/fx/test_quantize_fx.py``. The last two use torch's default LSTM classes there; here the LSTM is
observed and converted by our utilities.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import pytest
import torch
from converted_lstms import torchs_warnings
from torch import nn
from torch.ao.quantization import FixedQParamsObserver, get_default_qconfig_mapping
from torch.ao.quantization.backend_config import BackendConfig, DTypeConfig, get_qnnpack_backend_config
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule

from torch_lstm_quant.lstm_utils import _get_lstm_with_individually_observed_parts, _get_reference_quantized_lstm_module

pytestmark = torchs_warnings

STEPS, BATCH, SIZE = 5, 3, 50

FIXED_QPARAMS = {
    "linear_output": FixedQParamsObserver.with_args(scale=2**-11, zero_point=2**15, dtype=torch.qint32),
    "sigmoid": FixedQParamsObserver.with_args(scale=2**-16, zero_point=0, dtype=torch.qint32),
    "tanh": FixedQParamsObserver.with_args(scale=2**-15, zero_point=2**15, dtype=torch.qint32),
    "cell_state": FixedQParamsObserver.with_args(scale=2**-11, zero_point=0, dtype=torch.qint32),
    "hidden_state": FixedQParamsObserver.with_args(scale=2**-7, zero_point=2**7, dtype=torch.quint8),
}

EXPECTED: dict[str, tuple[float | None, int | None, torch.dtype]] = {
    "igates": (None, None, torch.quint8),
    "hgates": (None, None, torch.quint8),
    "add": (2**-11, 2**15, torch.qint32),
    "input_gate": (2**-16, 0, torch.qint32),
    "forget_gate": (2**-16, 0, torch.qint32),
    "cell_gate": (2**-15, 2**15, torch.qint32),
    "output_gate": (2**-16, 0, torch.qint32),
    "mul": (2**-11, 0, torch.qint32),
    "mul_1": (2**-11, 0, torch.qint32),
    "add_1": (2**-11, 0, torch.qint32),
    "mul_2": (2**-7, 2**7, torch.quint8),
}
"""Scale, zero point and dtype of the quantize that follows each node of the cell (None: as calibrated)."""


def example_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.rand(STEPS, BATCH, SIZE), torch.rand(1, BATCH, SIZE), torch.randn(1, BATCH, SIZE)


def observed_class(backend_config: BackendConfig | None, **constructors: Any) -> type:
    class ObservedLSTM(torch.ao.nn.quantizable.LSTM):
        @classmethod
        def from_float(cls, float_lstm: nn.LSTM) -> torch.ao.nn.quantizable.LSTM:
            x, h, c = example_inputs()
            return _get_lstm_with_individually_observed_parts(float_lstm, (x, (h, c)), backend_config, **constructors)

    return ObservedLSTM


def quantized_class(backend_config: BackendConfig | None) -> type:
    class QuantizedLSTM(torch.ao.nn.quantized.LSTM):
        @classmethod
        def from_observed(cls, observed_lstm: torch.ao.nn.quantizable.LSTM) -> torch.ao.nn.quantized.LSTM:
            return _get_reference_quantized_lstm_module(observed_lstm, backend_config)

    return QuantizedLSTM


def prepare_and_convert(model: nn.Module, backend_config: BackendConfig | None, **constructors: Any) -> GraphModule:
    """Run the whole flow of torch.ao's custom modules, the prepared and the converted model included."""
    prepare_custom_config = PrepareCustomConfig().set_float_to_observed_mapping(
        nn.LSTM, observed_class(backend_config, **constructors)
    )
    convert_custom_config = ConvertCustomConfig().set_observed_to_quantized_mapping(
        torch.ao.nn.quantizable.LSTM, quantized_class(backend_config)
    )
    mapping = get_default_qconfig_mapping("qnnpack")
    prepared = prepare_fx(model, mapping, example_inputs(), prepare_custom_config, backend_config=backend_config)
    assert [type(module) for module in prepared.modules()].count(torch.ao.nn.quantizable.LSTM) == 1
    prepared(*example_inputs())
    converted = convert_fx(prepared, convert_custom_config, backend_config=backend_config)
    converted(*example_inputs())
    return converted


class OneLSTM(nn.Module):
    """What becomes of the LSTM's outputs is left to :meth:`consume`."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(SIZE, SIZE, 1)

    def forward(self, inputs: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor) -> Any:
        return self.consume(self.lstm(inputs, (h0, c0)))

    def consume(self, outputs: Any) -> Any:
        return outputs


class ThreeLinears(OneLSTM):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2, self.linear3 = (nn.Linear(SIZE, 10) for _ in range(3))

    def consume(self, outputs: Any) -> Any:
        output, (h_n, c_n) = outputs
        return self.linear1(output), (self.linear2(h_n), self.linear3(c_n))


class ThroughIdentity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, values: Any) -> Any:
        return self.identity(values)


class WholeTuple(OneLSTM):
    def __init__(self) -> None:
        super().__init__()
        self.after = ThroughIdentity()

    def consume(self, outputs: Any) -> Any:
        return self.after(outputs)


class HiddenTuple(WholeTuple):
    def consume(self, outputs: Any) -> Any:
        return self.after(outputs[1])


def test_fixed_qparams_reach_every_node() -> None:
    backend_config = get_qnnpack_backend_config()
    for config in backend_config.configs:
        if config.pattern in (nn.Sigmoid, nn.Tanh, torch.add, torch.mul):
            config.add_dtype_config(DTypeConfig(input_dtype=torch.qint32, output_dtype=torch.qint32))
    constructors = {f"{group}_obs_ctr": constructor for group, constructor in FIXED_QPARAMS.items()}
    converted = prepare_and_convert(OneLSTM(), backend_config, **constructors)

    cell = converted.lstm.layers.get_submodule("0").layer_fw.cell
    nodes = {node.name: node for node in cell.graph.nodes}
    for name, (scale, zero_point, dtype) in EXPECTED.items():
        node = nodes[name]
        assert all(arg.target == "dequantize" for arg in node.args), name
        assert node.users, name
        for user in node.users:
            assert user.target is torch.quantize_per_tensor, name
            assert user.args[-1] is dtype, name
            if scale is not None and zero_point is not None:
                assert getattr(cell, user.args[1].target) == scale, name
                assert getattr(cell, user.args[2].target) == zero_point, name


CONSUMERS = {
    # three quantize and three dequantize ops: the model's inputs, and the linears' outputs or the LSTM's
    "test_static_lstm": (ThreeLinears, {torch.quantize_per_tensor: 3, "dequantize": 3, operator.getitem: 4, tuple: 0}),
    "whole tuple": (WholeTuple, {torch.quantize_per_tensor: 3, "dequantize": 3, operator.getitem: 4, tuple: 2}),
    "hidden tuple": (HiddenTuple, {torch.quantize_per_tensor: 3, "dequantize": 2, operator.getitem: 3, tuple: 1}),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_outputs_are_dequantized_for_whoever_consumes_them(consumer: str) -> None:
    kind, expected = CONSUMERS[consumer]
    converted = prepare_and_convert(kind(), None)

    lstms = [node for node in converted.graph.nodes if node.target == "lstm"]
    assert len(lstms) == 1
    assert isinstance(converted.lstm, torch.ao.nn.quantized.LSTM)
    counts = Counter(node.target for node in converted.graph.nodes)
    assert {target: counts[target] for target in expected} == expected

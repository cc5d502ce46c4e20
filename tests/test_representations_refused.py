"""Converted and observed LSTMs that the fused kernel cannot represent: refused by name, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from converted_lstms import torchs
from eager_lstms import HIDDEN, INPUT, assert_integers, data, eager_converted, eager_observed, eager_warnings, quantized_data
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, get_default_qconfig

import torch_lstm_quant as tlq

pytestmark = eager_warnings


def changed(lstm: Any, part: str, module: nn.Module) -> Any:
    lstm.layers[0].layer_fw.cell.set_submodule(part, module)
    return lstm


class OtherCell(torch.ao.nn.quantizable.LSTMCell):
    def forward(self, x: Tensor, hidden: Any = None) -> Any:
        return super().forward(x * 2, hidden)


def with_other_cell(lstm: Any) -> Any:
    lstm.layers[0].layer_fw.cell.__class__ = OtherCell
    return lstm


class OtherLSTM(torch.ao.nn.quantized.LSTM):
    def forward(self, x: Tensor, hidden: Any = None) -> Any:
        return super().forward(x * 2, hidden)


def of_another_class(lstm: Any, kind: type[nn.Module]) -> Any:
    lstm.__class__ = kind
    return lstm


class OtherObserved(torch.ao.nn.quantizable.LSTM):
    def forward(self, x: Tensor, hidden: Any = None) -> Any:
        return super().forward(x * 2, hidden)


PLACE = "^lstm, layer 0, forward direction, "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: changed(m, "forget_gate", nn.Hardsigmoid()),
            PLACE + "module forget_gate: expected a Sigmoid or .*Hardsigmoid",
        ),
        (lambda m: changed(m, "cell_gate", nn.Sigmoid()), PLACE + "module cell_gate: expected a Tanh, got .*Sigmoid"),
        (
            lambda m: changed(m, "gates", nn.Identity()),
            PLACE + "module gates: expected a quantized QFunctional, got .*Identity",
        ),
        (
            lambda m: changed(m, "hgates", torch.ao.nn.quantized.dynamic.Linear(16, 64)),
            PLACE + "module hgates: expected a quantized Linear, got .*dynamic",
        ),
        (lambda m: changed(m, "igates", nn.Linear(6, 64)), PLACE + "module igates: expected a quantized Linear, got .*Linear"),
        (with_other_cell, "^lstm, layer 0, forward direction: OtherCell overrides forward, which would be lost: leave it"),
        (lambda m: of_another_class(m, OtherLSTM), "^lstm: OtherLSTM overrides forward, which would be lost: leave it"),
    ],
)
def test_converted_lstms_that_are_refused(change: Callable[[Any], Any], message: str) -> None:
    model = eager_converted()
    change(model.lstm)
    with pytest.raises(ValueError, match=message):
        tlq.lower(model)


def test_a_grid_of_torchs_eager_mode_that_is_none() -> None:
    model = eager_converted()
    model.lstm.layers[0].layer_fw.cell.fgate_cx.scale = 0.0
    with pytest.raises(ValueError, match=PLACE + "module fgate_cx: scale must be positive, .* got 0.0: convert"):
        tlq.lower(model)
    model.lstm.layers[0].layer_fw.cell.fgate_cx.scale = 0.1
    model.lstm.layers[0].layer_fw.cell.igates.zero_point = 256
    with pytest.raises(ValueError, match=PLACE + r"module igates: zero_point must lie in .*, got 256: convert"):
        tlq.lower(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: changed(m, "forget_gate", nn.Hardsigmoid()),
            PLACE + "part forget_gate: expected a Sigmoid, got Hardsigmoid",
        ),
        (lambda m: changed(m, "gates", nn.Identity()), PLACE + "part gates: expected a FloatFunctional, got Identity"),
        (with_other_cell, "^lstm, layer 0, forward direction: OtherCell overrides forward, which would be lost: leave it"),
        (
            lambda m: of_another_class(m, OtherObserved),
            "^lstm: OtherObserved overrides forward, which would be lost: leave it",
        ),
        (
            lambda m: changed(m, "gates.activation_post_process", MinMaxObserver()),
            PLACE + "part gates: its observer never ran",
        ),
    ],
)
def test_observed_lstms_that_are_refused(change: Callable[[Any], Any], message: str) -> None:
    model = eager_observed()
    change(model.lstm)
    with pytest.raises(ValueError, match=message):
        tlq.convert(model)


def test_what_torchs_fx_utility_observed_is_torchs_to_convert() -> None:
    lstm = nn.LSTM(INPUT, HIDDEN).eval()
    lstm.qconfig = get_default_qconfig("qnnpack")  # type: ignore[assignment]
    cell_inputs = torch.zeros(2, INPUT), (torch.zeros(2, HIDDEN), torch.zeros(2, HIDDEN))
    observed = torchs._get_lstm_with_individually_observed_parts(lstm, cell_inputs)
    observed(data())
    with pytest.raises(ValueError, match=r"^rnn, layer 0, .*: activation_post_process_0 is not .*convert it with torch.ao's"):
        tlq.convert(nn.ModuleDict({"rnn": observed}))
    assert_integers(tlq.lower(torchs._get_reference_quantized_lstm_module(observed)), quantized_data())


def test_what_is_converted_is_not_converted_again() -> None:
    with pytest.raises(ValueError, match=r"lstm is an LSTM, which torch\.ao's eager mode converted: use .*lower$"):
        tlq.convert(eager_converted())


def test_a_cell_of_eager_mode_by_itself_is_sent_back_to_float() -> None:
    model = nn.ModuleDict({"cell": torch.ao.nn.quantizable.LSTMCell(INPUT, HIDDEN)})
    advice = "cell is an LSTMCell of torch.ao's eager mode, which converts none by itself: quantize the float model instead$"
    for call in (tlq.lower, tlq.convert):
        with pytest.raises(ValueError, match=advice):
            call(model)
    (found,) = tlq.audit(model)
    assert found.why == "it is of torch.ao's eager mode, which converts no LSTMCell by itself"
    assert found.to_fuse == "torch_lstm_quant.quantize on the float model"

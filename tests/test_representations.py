"""What a user arrives with, each through one public call: ``lower`` for what is converted, ``convert`` for what is observed.

Of each, the fused LSTM must equal the integer reference of the cells that were read, and be near the source's own output.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from converted_lstms import TORCHS_OWN_CONSTRUCTORS, assert_near, converted_model, ours, torchs
from eager_lstms import (
    HIDDEN,
    INPUT,
    OBSERVED_CLASS,
    QUANTIZED_CLASS,
    Eager,
    assert_integers,
    data,
    eager_converted,
    eager_observed,
    eager_warnings,
    quantized_data,
)
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MinMaxObserver,
    QConfig,
    convert,
    default_weight_observer,
    disable_observer,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
    get_default_qconfig_mapping,
    prepare,
)
from torch.ao.quantization.quantize_fx import (
    _convert_to_reference_decomposed_fx,
    convert_fx,
    convert_to_reference_fx,
    prepare_fx,
    prepare_qat_fx,
)

import torch_lstm_quant as tlq
from torch_lstm_quant import LSTMQConfig
from torch_lstm_quant.quantized_adapter import QuantizedBoundaryLSTM

pytestmark = eager_warnings

FORMS: list[dict[str, Any]] = [{}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True, "bias": False}]


class Traced(nn.Module):
    """A model as FX takes it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INPUT, HIDDEN, **arguments)
        self.head = nn.Linear(HIDDEN * (2 if self.lstm.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


def fx_observed(*, qat: bool = False, **arguments: Any) -> Any:
    """Prepared and calibrated by torch.ao's FX mode with our configurations."""
    torch.manual_seed(0)
    model = Traced(**arguments).train(qat)
    base = get_default_qat_qconfig_mapping("x86") if qat else get_default_qconfig_mapping("x86")
    mapping = tlq.qconfig_mapping(LSTMQConfig.int8(qat=qat), base)
    prepared = (prepare_qat_fx if qat else prepare_fx)(model, mapping, (data(),), tlq.prepare_custom_config())
    for _ in range(4):
        prepared(data())
    return prepared.eval().apply(disable_observer)


# How each is checked.


def assert_follows(fused: Any, source: Any, x: Tensor) -> None:
    """Step by step from equal states, as the second witness is held to: one step of the grid, for 1 value in 1,000."""
    output_grid = fused.cells()[-1][0].qparams.ogate_cy
    state_grid = fused.cells()[0][0].qparams.fgate_cx_igate_cgate
    state, got, wanted = None, [], []
    with torch.no_grad():
        for step in x.split(1):
            got.append(fused(step, state))
            wanted.append(source(step, state))
            state = wanted[-1][1]

    def joined(results: list[Any], which: Callable[[Any], Tensor]) -> Tensor:
        return torch.cat([which(result).dequantize() for result in results])

    assert_near(joined(got, lambda r: r[0]), joined(wanted, lambda r: r[0]), output_grid, one_step=True)
    assert_near(joined(got, lambda r: r[1][1][0]), joined(wanted, lambda r: r[1][1][0]), state_grid, one_step=True)


# Converted: lower.


@pytest.mark.parametrize("arguments", FORMS)
def test_torchs_eager_mode(arguments: dict[str, Any]) -> None:
    model = eager_converted(**arguments)
    fused = tlq.lower(model)
    x = quantized_data()
    assert_integers(fused.lstm, x)
    assert_follows(fused.lstm, model.lstm, x)
    wanted, got = model.lstm(x), fused.lstm(x)
    for its, mine in zip((wanted[0], *wanted[1]), (got[0], *got[1]), strict=True):
        assert (mine.dtype, mine.q_scale(), mine.q_zero_point()) == (its.dtype, its.q_scale(), its.q_zero_point())
    assert fused(data()).dtype == torch.float32


def test_split_gates_of_torchs_eager_mode() -> None:
    lstm = nn.LSTM(INPUT, HIDDEN).eval()
    lstm.qconfig = get_default_qconfig("x86")  # type: ignore[assignment]
    observed = torch.ao.nn.quantizable.LSTM.from_float(lstm, split_gates=True)
    observed(data())
    converted = torch.ao.nn.quantized.LSTM.from_observed(observed)
    fused: Any = tlq.lower(converted)
    assert len({grid.scale for grid in fused.cells()[0][0].qparams.gates}) == 4
    assert_integers(fused, quantized_data())
    assert_follows(fused, converted, quantized_data())
    assert_integers(tlq.convert(observed), quantized_data())


def test_an_old_checkpoint_of_torchs_eager_mode() -> None:
    """Its state dict in a module that was converted without calibration, and the module as a whole."""
    model, x = eager_converted(num_layers=2), quantized_data()
    expected = tlq.lower(model).lstm(x)[0]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = Eager(num_layers=2).eval()
    fresh.qconfig = get_default_qconfig("x86")  # type: ignore[assignment]
    fresh = convert(prepare(fresh, prepare_custom_config_dict=OBSERVED_CLASS), convert_custom_config_dict=QUANTIZED_CLASS)
    fresh.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(tlq.lower(fresh).lstm(x)[0].dequantize(), expected.dequantize())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(tlq.lower(torch.load(file, weights_only=False)).lstm(x)[0].dequantize(), expected.dequantize())


@pytest.mark.parametrize("constructors", TORCHS_OWN_CONSTRUCTORS)
def test_torchs_fx_utility_with_a_users_backend_config(constructors: str) -> None:
    model: Any = converted_model(torchs, TORCHS_OWN_CONSTRUCTORS[constructors], INPUT, HIDDEN)
    fused: Any = tlq.lower(model).my_lstm
    assert_integers(fused, quantized_data())


def test_our_fx_utility() -> None:
    model: Any = converted_model(ours, {}, INPUT, HIDDEN, num_layers=2)
    fused: Any = tlq.lower(model).my_lstm
    assert_integers(fused, quantized_data())
    assert_follows(fused, model.my_lstm, quantized_data())


@pytest.mark.parametrize("to_reference", [convert_to_reference_fx, _convert_to_reference_decomposed_fx])
@pytest.mark.parametrize("qat", [False, True])
def test_cells_that_torchs_fx_mode_converts_for_themselves(to_reference: Any, qat: bool) -> None:
    """With torch's observers, in graphs of quantized dtypes and decomposed ones, float32 in and out."""
    torch.manual_seed(0)
    lstm = nn.LSTM(INPUT, HIDDEN, num_layers=2).train(qat)
    lstm.qconfig = get_default_qat_qconfig("qnnpack") if qat else get_default_qconfig("qnnpack")  # type: ignore[assignment]
    cell_inputs = torch.zeros(2, INPUT), (torch.zeros(2, HIDDEN), torch.zeros(2, HIDDEN))
    observed = torchs._get_lstm_with_individually_observed_parts(lstm, cell_inputs)
    for _ in range(3):
        observed(data())
    converted = torch.ao.nn.quantized.LSTM(INPUT, HIDDEN, 2)
    for layer, of_observed in zip(converted.layers, observed.layers, strict=True):
        layer.layer_fw.cell = to_reference(copy.deepcopy(of_observed.layer_fw.cell.eval()))  # type: ignore[union-attr]
    fused = tlq.lower(converted)
    assert type(fused) is tlq.LSTM
    assert_integers(fused, data(100))
    assert_follows(fused, converted, data(100))


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("to_model", [convert_fx, convert_to_reference_fx, _convert_to_reference_decomposed_fx])
def test_models_in_every_form_of_torchs_fx_mode(to_model: Any, qat: bool) -> None:
    prepared = fx_observed(qat=qat, num_layers=2, bidirectional=True)
    model = to_model(copy.deepcopy(prepared), tlq.convert_custom_config(backend="reference"))
    fused = tlq.lower(model)
    assert_integers(fused.lstm, data(100))
    assert_follows(fused.lstm, model.lstm, data(100))
    assert torch.equal(to_model(prepared, tlq.convert_custom_config())(data()), fused(data())) is False  # other data
    x = data()
    at_once = to_model(copy.deepcopy(prepared), tlq.convert_custom_config())
    assert torch.equal(at_once.lstm(x)[0], fused.lstm(x)[0])
    if qat:
        assert_follows(fused.lstm, prepared.lstm, data(100))


# Observed: convert.


@pytest.mark.parametrize("arguments", FORMS)
def test_what_torchs_eager_mode_trained(arguments: dict[str, Any]) -> None:
    """The fused LSTM gives what the fake-quantized one does, in a model that torch.ao then converts."""
    observed = eager_observed(qat=True, **arguments)
    fused = tlq.convert(observed)
    assert_integers(fused.lstm, quantized_data())
    assert_follows(fused.lstm, observed.lstm, observed.quant(data(100)))
    whole = convert(fused)
    assert isinstance(whole.lstm, QuantizedBoundaryLSTM)
    assert whole(data()).dtype == torch.float32


def test_what_torchs_eager_mode_observed() -> None:
    observed = eager_observed(num_layers=2)
    fused, graph = tlq.convert(observed), tlq.convert(observed, backend="reference")
    assert_integers(fused.lstm, quantized_data())
    assert_follows(fused.lstm, graph.lstm, quantized_data())
    qparams = fused.lstm.cells()[0][0].qparams
    assert (qparams.input_gate, qparams.tanh_cy) == (None, None), "what has no observer stays float32"
    cell = observed.lstm.layers[0].layer_fw.cell
    assert qparams.gates[0].scale == cell.gates.activation_post_process.calculate_qparams()[0]


class WideObserver(MinMaxObserver):
    """A user's own, of a dtype that torch.ao's kernels do not have."""

    def __init__(self, **_: Any) -> None:
        super().__init__(dtype=torch.int16, quant_min=-30000, quant_max=30000, qscheme=torch.per_tensor_symmetric)


class HandMade(torch.ao.nn.quantizable.LSTM):
    """A user's own observed LSTM: torch.ao's, with other fake quantizes at some parts."""

    @classmethod
    def from_float(cls, other: nn.LSTM, **arguments: Any) -> torch.ao.nn.quantizable.LSTM:
        observed = super().from_float(other, **arguments)
        for layer in observed.layers:
            cell = layer.layer_fw.cell
            for part in (cell.gates, cell.fgate_cx, cell.igate_cgate, cell.fgate_cx_igate_cgate):
                part.activation_post_process = FakeQuantize(WideObserver, quant_min=-30000, quant_max=30000, dtype=torch.int16)
        return observed


def test_a_users_subclass_of_torchs_lstm_with_observers_of_its_own() -> None:
    torch.manual_seed(0)
    model = Eager(num_layers=2).train()
    model.qconfig = get_default_qat_qconfig("x86")  # type: ignore[assignment]
    mapping = {"float_to_observed_custom_module_class": {nn.LSTM: HandMade}}
    observed: Any = prepare(model, prepare_custom_config_dict=mapping)
    assert type(observed.lstm) is HandMade
    for _ in range(3):
        observed(data())
    observed.eval().apply(disable_observer)
    fused: Any = tlq.convert(observed)
    qparams = fused.lstm.cells()[0][0].qparams
    grids = (qparams.gates[0], qparams.fgate_cx_igate_cgate, qparams.ogate_cy)
    assert [grid.quant_max for grid in grids] == [30000, 30000, 127]
    assert_follows(fused.lstm, observed.lstm, observed.quant(data(100)))
    assert_integers(fused.lstm, quantized_data())


def test_what_our_utility_observed() -> None:
    lstm = nn.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True).eval()
    lstm.qconfig = QConfig(activation=MinMaxObserver.with_args(dtype=torch.quint8), weight=default_weight_observer)
    observed = ours._get_lstm_with_individually_observed_parts(lstm, ())
    observed(data())
    model = nn.ModuleDict({"rnn": observed})
    expected = tlq.lower(ours._get_reference_quantized_lstm_module(observed))
    x = quantized_data()
    assert torch.equal(tlq.convert(model)["rnn"](x)[0].dequantize(), expected(x)[0].dequantize())


class UsersLSTM(nn.LSTM):
    """A subclass that computes what nn.LSTM does."""


def test_a_subclass_of_nn_lstm_with_observers_of_the_users_own() -> None:
    lstm = UsersLSTM(INPUT, HIDDEN).eval()
    config = LSTMQConfig.int8().replace(fgate_cx=WideObserver, igates=WideObserver)
    fused: Any = tlq.quantize(lstm, [data()], config)
    assert fused.cells()[0][0].qparams.fgate_cx.quant_max == 30000
    assert_integers(fused, data(100))
    prepared = tlq.prepare(lstm, config)
    prepared(data(100))
    assert_follows(tlq.convert(prepared), tlq.convert(prepared, "reference"), data(100))

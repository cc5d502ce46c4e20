"""lower(): what it takes and leaves alone, that the kernel gives what was lowered, and what it says of the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from converted_lstms import (
    TORCHS_OWN_CONSTRUCTORS,
    assert_near,
    converted_model,
    model_inputs,
    read_layers,
    torchs,
    torchs_warnings,
)
from torch import nn
from torch.ao.quantization import PlaceholderObserver, QConfig, default_weight_observer, quantize_dynamic

import torch_lstm_quant as tlq
from torch_lstm_quant import lstm_utils as ours
from torch_lstm_quant import reference
from torch_lstm_quant.lowering import lower_lstm
from torch_lstm_quant.quantized_adapter import QuantizedBoundaryLSTM

pytestmark = torchs_warnings

PRESETS = ("int8", "int8_gates16", "fixed16", "all_int8")
X = torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(0))


def converted(lstm: nn.Module, preset: str = "int8") -> nn.Module:
    return tlq.quantize(lstm, [X], getattr(tlq.LSTMQConfig, preset)(), backend="reference")


class Model(nn.Module):
    """One LSTM under two names, and other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 5), nn.LSTM(5, 8))
        self.same, self.head = self.encoder[1], nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x)[0]) + self.head(self.same(x)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arguments", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}])
def test_the_kernel_gives_what_was_lowered(preset: str, arguments: dict[str, Any]) -> None:
    lstm = converted(nn.LSTM(5, 8, **arguments), preset)
    fused = tlq.lower(lstm)
    assert type(fused) is tlq.LSTM
    cells = [[read.cell for read in cells] for cells in read_layers(lstm)]
    states = 0.3 * torch.randn(2, sum(map(len, cells)), 12 if arguments.get("batch_first") else 3, 8)
    output, (h_n, c_n) = fused(X, (states[0], states[1]))
    steps = X.transpose(0, 1) if arguments.get("batch_first") else X
    expected = reference.lstm(cells, steps, states[0], states[1])
    assert torch.equal(output.transpose(0, 1) if arguments.get("batch_first") else output, expected[0])
    assert torch.equal(h_n, expected[1])
    assert torch.equal(c_n, expected[2])


def test_a_model_is_copied_and_its_lstms_replaced_wherever_they_are() -> None:
    model = converted(Model())
    before = copy.deepcopy(model)
    lowered = tlq.lower(model)
    assert isinstance(lowered.encoder[1], tlq.LSTM)
    assert lowered.same is lowered.encoder[1]
    assert torch.equal(lowered.head.weight, model.head.weight)
    assert lowered.head.weight is not model.head.weight
    assert (lowered(X) - before(X)).abs().max() < 0.01
    assert torch.equal(model(X), before(X))
    assert type(model.same) is type(before.same)


def test_what_is_not_converted_stays_as_it_is() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(5, 8), "b": nn.LSTM(5, 8)})
    model["b"] = converted(model["b"])
    lowered = tlq.lower(model)
    assert type(lowered["a"]) is nn.LSTM
    assert type(lowered["b"]) is tlq.LSTM


@pytest.mark.parametrize("constructors", TORCHS_OWN_CONSTRUCTORS)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_models_of_torchs_own_flow(constructors: str, num_layers: int) -> None:
    model = converted_model(torchs, TORCHS_OWN_CONSTRUCTORS[constructors], 9, 12, num_layers=num_layers)
    lowered = tlq.lower(model)
    assert isinstance(lowered.my_lstm, QuantizedBoundaryLSTM)
    x, *states = model_inputs(model, 60, 4)
    got, (got_h, got_c) = lowered.my_lstm.fused(x, states)
    for mine, its in zip((got, got_h, got_c), reference.lstm(lowered.my_lstm.cells(), x, *states), strict=True):
        assert torch.equal(mine, its)
    # one step: where all parts have 8 bits, or zero points of 2**15 round in torch's way, single differences would spread
    inputs = model_inputs(model, 1, 256)
    (output, (h_n, c_n)), (expected, (expected_h, expected_c)) = lowered(*inputs), model(*inputs)
    qparams = [cells[0].qparams for cells in lowered.my_lstm.cells()]
    assert_near(output, expected, qparams[-1].ogate_cy, one_step=True)
    # torch's own forward brings the states of all layers onto the grids of layer 0
    assert_near(h_n, expected_h, qparams[0].ogate_cy, one_step=True)
    assert_near(c_n, expected_c, qparams[0].fgate_cx_igate_cgate)


def test_dropout_and_batch_first_are_kept() -> None:
    fused: Any = tlq.lower(converted(nn.LSTM(5, 8, num_layers=2, dropout=0.25, batch_first=True)))
    assert (fused.dropout, fused.batch_first) == (0.25, True)


@pytest.mark.filterwarnings("error")
def test_no_warning_reaches_the_user() -> None:
    tlq.lower(converted(nn.LSTM(5, 8)))(X)


FLOAT = nn.LSTM(5, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (FLOAT, "nothing to lower: it is an LSTM, which is float: use torch_lstm_quant.quantize"),
        (nn.Sequential(nn.Linear(2, 5), FLOAT), "nothing to lower: 1 is an LSTM, which is float"),
        (tlq.prepare(FLOAT), "nothing to lower: it is an ObservedLSTM, which is observed: convert"),
        (tlq.quantize(FLOAT, [X]), "nothing to lower: it is an LSTM, which is fused already"),
        (
            quantize_dynamic(nn.Sequential(FLOAT), {nn.LSTM}),
            "nothing to lower: 0 is an LSTM of torch.ao.s dynamic quantization, which has no grids: quantize",
        ),
        (nn.GRU(5, 8), "nothing to lower: found no LSTM, only GRU"),
        (nn.Sequential(nn.Linear(2, 5), nn.ReLU()), "nothing to lower: found no LSTM, only Linear, ReLU, Sequential"),
    ],
)
def test_nothing_to_lower_says_what_was_found(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tlq.lower(model)


def test_only_modules_are_taken() -> None:
    with pytest.raises(TypeError, match="needed a converted LSTM or a model that contains one, got Tensor"):
        tlq.lower(X)


def test_the_backward_direction_that_torch_leaves_out_is_refused() -> None:
    model = converted_model(torchs, {}, 5, 8, bidirectional=True)
    with pytest.raises(ValueError, match=r"^my_lstm, layer 0, backward direction: found a LSTMCell of float modules"):
        tlq.lower(model)


def test_refusals_name_module_layer_direction_and_node_and_change_nothing() -> None:
    model = converted(nn.Sequential(nn.Linear(5, 5), nn.LSTM(5, 8, num_layers=2, bidirectional=True)))
    cell: Any = model[1].layers[1].layer_bw.cell
    cell.forget_gate = nn.Hardsigmoid()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^1, layer 1, backward direction, node 'forget_gate': found .*Hardsigmoid"):
        tlq.lower(model)
    assert isinstance(model[1], torch.ao.nn.quantized.LSTM)
    assert state.keys() == model.state_dict().keys()


def test_a_missing_cell_is_named() -> None:
    lstm: Any = converted(nn.LSTM(5, 8))
    del lstm.layers[0].layer_fw.cell
    with pytest.raises(ValueError, match="LSTM, layer 0, forward direction: found NoneType, expected a converted"):
        tlq.lower(lstm)


def test_cells_with_different_boundaries_are_refused() -> None:
    lstm: Any = converted(nn.LSTM(5, 5, num_layers=2), "all_int8")
    lstm.layers[1].layer_fw.cell = converted_model(torchs, {}, 5, 5).my_lstm.layers[0].layer_fw.cell
    with pytest.raises(ValueError, match=r"rnn: found cells that take .* as quantized tensors, expected x, hx and cx in all"):
        lower_lstm(lstm, "rnn")


def test_layers_that_do_not_fit_together_are_refused() -> None:
    lstm: Any = converted(nn.LSTM(5, 8, num_layers=2))
    lstm.layers[1].layer_fw.cell = converted(nn.LSTM(5, 8)).layers[0].layer_fw.cell
    with pytest.raises(ValueError, match="rnn: layer 1 direction 0 must have input_size=8"):
        lower_lstm(lstm, "rnn")


def test_a_hidden_state_without_limits_is_refused() -> None:
    lstm = nn.LSTM(5, 8).eval()
    float32 = PlaceholderObserver.with_args(dtype=torch.float32)
    lstm.qconfig = QConfig(activation=float32, weight=default_weight_observer)
    unlimited = torch.ao.quantization.FixedQParamsObserver.with_args(scale=2**-7, zero_point=0, dtype=torch.qint32)
    observed = ours._get_lstm_with_individually_observed_parts(lstm, (), ogate_cy_obs_ctr=unlimited)
    with pytest.raises(ValueError, match="LSTM, layer 0, forward direction: part hx is read by a projection"):
        tlq.lower(ours._get_reference_quantized_lstm_module(observed))

"""audit(): what every kind of module is, that reasons are those of the code that refuses, and that its advice works.

What it says of fused modules is in ``test_audit_fused``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from converted_lstms import converted_model, torchs, torchs_warnings
from random_cells import Dice, random_layers
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping, default_qconfig, get_default_qconfig_mapping, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import torch_lstm_quant as tlq
from torch_lstm_quant import AuditedModule, LSTMQConfig, ops
from torch_lstm_quant.quantized_adapter import QuantizedBoundaryLSTM

pytestmark = torchs_warnings

X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Two LSTMs, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.LSTM(5, 8), nn.LSTM(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0])  # type: ignore[no-any-return]


def only(model: nn.Module) -> AuditedModule:
    (module,) = tlq.audit(model)
    return module


def stages(model: nn.Module) -> dict[str, str]:
    return {module.path: module.stage for module in tlq.audit(model)}


def advised(module: AuditedModule, model: nn.Module) -> nn.Module:
    """What the advice gives, which is Python here."""
    names = {"torch_lstm_quant": tlq, "LSTMQConfig": LSTMQConfig, "model": model, "batches": [X]}
    fused: nn.Module = eval(module.to_fuse.removeprefix("what the message says, then "), names)
    return fused


# float


def test_a_float_lstm_that_nothing_has_touched() -> None:
    model = Model()
    first, second = tlq.audit(model)
    assert (first.path, second.path) == ("first", "second")
    assert (first.stage, first.kind, first.isa, first.cells) == ("float", "torch.nn.modules.rnn.LSTM", None, ())
    assert first.why == "nothing has quantized it"
    assert stages(advised(first, model)) == {"first": "fused", "second": "float"}
    assert only(advised(only(model.first), model.first)).stage == "fused"


def test_what_a_configuration_left_out() -> None:
    model = tlq.quantize(Model(), [X], {"": LSTMQConfig.int8(), "second": None})
    first, second = tlq.audit(model)
    assert (first.stage, first.why, first.to_fuse) == ("fused", "", "")
    assert second.why == "it was left out when other modules of the model were quantized"
    assert stages(advised(second, model)) == {"first": "fused", "second": "fused"}


class OwnForward(nn.LSTM):
    def forward(self, *arguments: Any) -> Any:
        return super().forward(*arguments)


def hooked() -> nn.LSTM:
    lstm = nn.LSTM(5, 8)
    lstm.register_forward_hook(lambda *arguments: None)
    return lstm


def infinite() -> nn.LSTM:
    lstm = nn.LSTM(5, 8)
    lstm.weight_hh_l0.data[0, 0] = float("inf")
    return lstm


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(5, 8, dtype=torch.float64),
        lambda: nn.LSTM(5, 8, device="meta"),
        lambda: OwnForward(5, 8),
        hooked,
        infinite,
    ],
)
def test_why_a_float_lstm_cannot_be_quantized_is_what_prepare_says(make: Callable[[], nn.LSTM]) -> None:
    model = nn.ModuleDict({"rnn": make()})
    with pytest.raises(ValueError, match="rnn") as refusal:
        tlq.prepare(model)
    module = only(model)
    assert (module.stage, module.why) == ("float", str(refusal.value))
    assert module.to_fuse.startswith("what the message says, then torch_lstm_quant.quantize(model, batches, {'rnn'")


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN, nn.GRUCell, nn.RNNCell])
def test_other_networks_cannot_be_fused(kind: type[nn.Module]) -> None:
    module = only(nn.Sequential(kind(5, 8)))
    assert (module.path, module.stage) == ("0", "float")
    assert module.why == f"0 must be an nn.LSTM, got {kind.__name__}"
    assert "only nn.LSTM and nn.LSTMCell can be fused" in module.to_fuse


def test_a_projected_hidden_state_is_seen_with_its_parts() -> None:
    model = nn.Sequential(nn.LSTM(5, 8, proj_size=3)).eval()
    assert only(model).why == "nothing has quantized it"
    (cell,) = only(tlq.quantize(model, [X], tlq.LSTMQConfig.int8())).cells
    assert (cell.input_sums, cell.hidden_sums, cell.hy_sums) == ("int8", "int8", "int8")
    qconfig = tlq.LSTMQConfig.int8().replace(hy=None, weight_hr=None)
    (cell,) = only(tlq.quantize(model, [X], qconfig)).cells
    assert (cell.hidden_sums, cell.hy_sums) == ("float", "float")
    assert {"hy", "hx", "weight_hr"} <= set(cell.float_parts)
    assert cell.slowed_by == (
        "hidden projection in float32, as there is no grid for hx",
        "hidden state's projection in float32, as there is no grid for weight_hr",
    )


def test_a_cell_from_float_to_fused() -> None:
    model = nn.Sequential(nn.LSTMCell(5, 8))
    module = only(model)
    assert (module.stage, module.why) == ("float", "nothing has quantized it")
    observed = tlq.prepare(model)
    assert "never ran" in only(observed).why
    observed(X[0])
    module = only(observed)
    assert (module.stage, module.why) == ("observed", "it is observed, but not converted")
    reference = tlq.convert(observed, "reference")
    module = only(reference)
    assert (module.stage, module.why, len(module.cells)) == ("reference", "it is converted, but not lowered", 1)
    fused = only(advised(module, reference))
    assert (fused.stage, fused.isa, fused.cells[0].input_sums) == ("fused", ops.isa_active(), "int8")


def test_a_subclass_is_named_in_what_fx_needs() -> None:
    class Mine(nn.LSTM):
        pass

    model = nn.Sequential(Mine(5, 8))
    model[0].qconfig = LSTMQConfig.int8().as_qconfig()
    assert only(model).to_fuse == "prepare_fx with torch_lstm_quant.prepare_custom_config(lstm_classes=(Mine,))"


# torch.ao's FX flow, which leaves LSTMs float in silence

OURS = tlq.qconfig_mapping(LSTMQConfig.int8(), get_default_qconfig_mapping("x86"))


def prepared(mapping: QConfigMapping, *custom_config: Any) -> nn.Module:
    model = prepare_fx(Model().eval(), mapping, (X,), *custom_config)
    model(X)
    return model  # type: ignore[no-any-return]


def test_fx_without_our_configuration_or_custom_config() -> None:
    model = prepared(get_default_qconfig_mapping("x86"))
    first, _ = tlq.audit(model)
    assert first.why == "its qconfig is torch.ao's, which does nothing to an LSTM"
    assert "prepare_custom_config() and torch_lstm_quant.qconfig_mapping(LSTMQConfig.int8(), mapping)" in first.to_fuse
    converted = convert_fx(model)
    first, _ = tlq.audit(converted)
    assert first.stage == "float"
    assert first.why.startswith("convert_fx left it float")
    assert stages(advised(first, converted)) == {"first": "fused", "second": "float"}


def test_fx_with_our_configuration_but_no_custom_config() -> None:
    first, second = tlq.audit(prepared(OURS))
    assert first.why == second.why == "it has an LSTMQConfig, but prepare_fx was not told to observe LSTMs"
    assert first.to_fuse == "prepare_fx with torch_lstm_quant.prepare_custom_config()"


def test_fx_with_an_lstm_that_the_mapping_leaves_out_and_the_converters_custom_config_forgotten() -> None:
    mapping = copy.deepcopy(OURS).set_module_name("second", None)
    model = prepared(mapping, tlq.prepare_custom_config())
    first, second = tlq.audit(model)
    assert (first.stage, first.why) == ("observed", "it is observed, but not converted")
    assert first.to_fuse == "convert_fx with torch_lstm_quant.convert_custom_config()"
    assert (second.stage, second.why) == ("float", "the QConfigMapping gives it no qconfig")
    assert stages(convert_fx(copy.deepcopy(model), tlq.convert_custom_config())) == {"first": "fused", "second": "float"}
    forgotten = convert_fx(model)
    first, second = tlq.audit(forgotten)
    assert first.why == "convert_fx left it observed: it was not given torch_lstm_quant.convert_custom_config()"
    assert second.why.startswith("convert_fx left it float")
    assert stages(advised(first, forgotten)) == {"first": "fused", "second": "float"}


# observed, quantized by torch.ao alone, reference


def test_what_was_never_calibrated_is_refused_as_by_convert() -> None:
    model = tlq.prepare(nn.Sequential(nn.LSTM(5, 8)))
    with pytest.raises(ValueError, match="never ran") as refusal:
        tlq.convert(model)
    module = only(model)
    assert (module.stage, module.why) == ("observed", str(refusal.value))
    model(X)
    assert only(model).why == "it is observed, but not converted"
    assert only(advised(module, model)).stage == "fused"


def test_what_is_converted_but_not_lowered() -> None:
    model = tlq.quantize(nn.Sequential(nn.LSTM(5, 8, bidirectional=True)), [X], backend="reference")
    module = only(model)
    assert (module.stage, module.why) == ("reference", "it is converted, but not lowered")
    assert [(cell.layer, cell.direction, cell.input_sums) for cell in module.cells] == [
        (0, "forward", None),
        (0, "backward", None),
    ]
    fused = only(advised(module, model))
    assert fused.stage == "fused"
    assert [cell.float_parts for cell in module.cells] == [cell.float_parts for cell in fused.cells]


def test_what_cannot_be_lowered_is_refused_as_by_lower() -> None:
    model = tlq.quantize(nn.Sequential(nn.LSTM(5, 8)), [X], backend="reference")
    model[0].layers[0].layer_fw.cell.forget_gate = nn.Hardsigmoid()
    with pytest.raises(ValueError, match="Hardsigmoid") as refusal:
        tlq.lower(model)
    module = only(model)
    assert (module.stage, module.why, module.cells) == ("reference", str(refusal.value), ())
    assert module.to_fuse == "what the message says, then torch_lstm_quant.lower(model)"


def test_quantize_dynamic() -> None:
    kinds = {nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell}
    model = nn.ModuleList([nn.LSTM(5, 8), nn.GRU(5, 8), nn.LSTMCell(5, 8), nn.GRUCell(5, 8), nn.RNNCell(5, 8)])
    lstm, *others = tlq.audit(quantize_dynamic(model, kinds, torch.qint8))
    assert (lstm.stage, lstm.kind) == ("quantized", "torch.ao.nn.quantized.dynamic.modules.rnn.LSTM")
    assert "of torch.ao's dynamic quantization, which has no grids" in lstm.why
    assert lstm.to_fuse == "torch_lstm_quant.quantize on the float model"
    assert [module.stage for module in others] == ["quantized"] * 4
    assert others[0].why == "1 must be an nn.LSTM, got GRU"


def test_torchs_eager_mode() -> None:
    lstm = nn.LSTM(5, 8)
    lstm.qconfig = default_qconfig
    observed = torch.ao.nn.quantizable.LSTM.from_float(lstm)
    observed(X)
    module = only(observed)
    assert (module.path, module.stage, module.to_fuse) == ("", "observed", "torch_lstm_quant.convert(model)")
    assert only(advised(module, observed)).stage == "fused"
    converted = torch.ao.nn.quantized.LSTM.from_observed(observed)
    module = only(converted)
    assert (module.stage, module.to_fuse) == ("quantized", "torch_lstm_quant.lower(model)")
    assert module.why == "torch.ao's eager mode converted it, but it is not lowered"
    assert only(advised(module, converted)).stage == "fused"
    converted.layers[0].layer_fw.cell.output_gate = nn.Hardsigmoid()
    module = only(converted)
    assert "module output_gate: expected a Sigmoid or a quantized Sigmoid, got" in module.why
    assert module.to_fuse == "torch_lstm_quant.quantize on the float model"


def test_torchs_own_reference_lstm_and_what_it_is_lowered_to() -> None:
    model = converted_model(torchs, {}, 5, 8)
    module = only(model)
    assert (module.path, module.stage, module.why) == ("my_lstm", "reference", "it is converted, but not lowered")
    lowered = tlq.lower(model)
    assert isinstance(lowered.my_lstm, QuantizedBoundaryLSTM)
    fused = only(lowered)
    assert (fused.path, fused.stage) == ("my_lstm", "fused")
    assert [(cell.input_sums, cell.hidden_sums, cell.float_parts) for cell in fused.cells] == [("int8", "int8", ())]


def test_the_backward_direction_that_torch_leaves_out() -> None:
    module = only(converted_model(torchs, {}, 5, 8, bidirectional=True))
    assert module.stage == "reference"
    assert module.why.startswith("my_lstm, layer 0, backward direction: found a LSTMCell of float modules")


# as a whole


class Zoo(nn.Module):
    """One of each, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = tlq.LSTM(random_layers(Dice(0), 5, 8, 2, 1, "int8_gates16"))
        self.gru, self.same = nn.GRU(5, 8), self.lstm


def test_the_table_is_readable() -> None:
    isa = ops.isa_active()
    width = max(len(isa), len("kernel"))
    expected = f"""\
module       class  stage  {"kernel".ljust(width)}  input sums  hidden sums
lstm = same  LSTM   fused  {isa.ljust(width)}  int8        int8
gru          GRU    float  {"-".ljust(width)}  -           -

gru:
  not fused: gru must be an nn.LSTM, got GRU
  to fuse it: only nn.LSTM and nn.LSTMCell can be fused: put one in its place, or leave it as it is"""
    assert str(tlq.audit(Zoo())) == expected
    lines = tlq.audit(Zoo()).markdown().splitlines()
    assert lines[0] == "| module | class | stage | kernel | input sums | hidden sums | notes |"
    assert lines[2] == f"| lstm = same | LSTM | fused | {isa} | int8 | int8 |  |"
    assert lines[3].startswith("| gru | GRU | float | - | - | - | not fused: gru must be an nn.LSTM, got GRU<br>to fuse it: ")


def test_cells_that_differ_are_told_apart_in_the_table() -> None:
    byte = {"scale": 0.02, "zero_point": 128, "dtype": "uint8"}
    cell = {"x": byte, "ogate_cy": byte, "weight_ih": "per_channel", "weight_hh": "per_channel"}
    fused = tlq.from_float(nn.LSTM(5, 8, num_layers=2), {"": cell, "l0": {**cell, "x": None}})
    table = str(tlq.audit(fused))
    assert "float/int8  int8" in table
    assert "\n  layer 0, forward: no grid, so float32: x, cx," in table
    assert "\n  layer 1, forward: no grid, so float32: cx," in table
    assert "\n  layer 0, forward: input projection in float32, as there is no grid for x" in table


def test_it_is_data() -> None:
    module = tlq.audit(Zoo())[0]
    assert (module.path, module.also_at) == ("lstm", ("same",))
    assert dataclasses.asdict(module)["cells"][1]["hidden_sums"] == "int8"
    assert {module} == {tlq.audit(Zoo())[0]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.stage = "float"  # type: ignore[misc]


def test_without_any_such_module_it_is_empty() -> None:
    assert tlq.audit(nn.Linear(2, 2)) == ()
    assert str(tlq.audit(nn.Linear(2, 2))) == tlq.audit(nn.Linear(2, 2)).markdown() == "no LSTM, GRU or RNN"


def test_only_modules_are_taken() -> None:
    with pytest.raises(TypeError, match="audit needs a module, got Tensor"):
        tlq.audit(X)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_nothing_is_changed_warned_of_or_printed(capsys: pytest.CaptureFixture[str]) -> None:
    # an observer that would be warned of when it is converted: all of its signal is below a step
    prepared = tlq.prepare(nn.LSTM(5, 8))
    prepared(torch.cat([torch.full((1, 1, 5), 1e6), torch.ones(500, 1, 5)]))
    model = nn.ModuleList([nn.LSTM(5, 8).train(), prepared, Zoo(), nn.LSTM(5, 8, proj_size=2)])
    before, random, training = copy.deepcopy(model.state_dict()), torch.get_rng_state(), [m.training for m in model.modules()]
    tlq.audit(model)
    assert torch.equal(random, torch.get_rng_state())
    assert training == [m.training for m in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert capsys.readouterr() == ("", "")


def test_a_module_that_contains_itself() -> None:
    model = Model()
    model.first.owner = model
    model.itself = model
    assert [module.path for module in tlq.audit(model)] == ["first", "second"]

"""torchao's ``quantize_`` with our config: the same LSTMs as ``prepare`` and ``convert`` make."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_lstm_quant as tlq
from torch_lstm_quant.observed import ObservedLSTM, ReferenceLSTM

pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

from torch_lstm_quant.torchao import LSTMConfig, is_lstm

BATCHES = [torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(5, 8, bidirectional=True)})
        self.decoder, self.linear = nn.LSTM(16, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.decoder(self.encoder["lstm"](x)[0])[0])


def _calibrated(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    return model


@pytest.mark.parametrize("qconfig", [None, tlq.LSTMQConfig.int8_gates16()])
def test_the_two_steps_give_what_quantize_gives(qconfig: tlq.LSTMQConfig | None) -> None:
    model = Model().eval()
    expected = tlq.quantize(model, BATCHES, qconfig)
    quantize_(model, LSTMConfig(qconfig, step="prepare"), is_lstm)
    assert isinstance(model.encoder["lstm"], ObservedLSTM)
    _calibrated(model)
    quantize_(model, LSTMConfig(step="convert"), is_lstm)
    assert isinstance(model.encoder["lstm"], tlq.LSTM)
    assert type(model.linear) is nn.Linear
    assert torch.equal(model(BATCHES[0]), expected(BATCHES[0]))


def test_cells() -> None:
    x, model = torch.randn(3, 5), nn.Sequential(nn.Linear(5, 5), nn.LSTMCell(5, 8))
    expected = tlq.quantize(model, [x])
    quantize_(model, LSTMConfig(), is_lstm)
    model(x)
    quantize_(model, LSTMConfig(step="convert"), is_lstm)
    assert isinstance(model[1], tlq.LSTMCell)
    assert torch.equal(model(x)[0], expected(x)[0])
    with pytest.raises(ValueError, match="got a bare LSTMCell: put it into a module"):
        quantize_(nn.LSTMCell(5, 8), LSTMConfig(), is_lstm)


def test_a_reference_model() -> None:
    model = Model().eval()
    quantize_(model, LSTMConfig(), is_lstm)
    _calibrated(model)
    quantize_(model, LSTMConfig(step="convert", backend="reference"), is_lstm)
    assert isinstance(model.decoder, ReferenceLSTM)


def test_training_in_between() -> None:
    model = Model().train()
    quantize_(model, LSTMConfig(tlq.LSTMQConfig.int8(qat=True)), is_lstm)
    before = model.decoder.layers[0].layer_fw.cell.igates.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in BATCHES:
        model(batch).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.decoder.layers[0].layer_fw.cell.igates.weight, before)
    expected = tlq.convert(model.eval())
    quantize_(model, LSTMConfig(step="convert"), is_lstm)
    assert torch.equal(model(BATCHES[0]), expected(BATCHES[0]))


def test_modules_by_name_beside_torchaos_own_configs() -> None:
    model = Model().eval()
    quantize_(model, FqnToConfig({"re:encoder.*lstm": LSTMConfig(), "linear": Int8WeightOnlyConfig()}), filter_fn=None)
    assert isinstance(model.encoder["lstm"], ObservedLSTM)
    assert type(model.decoder) is nn.LSTM
    assert type(model.linear.weight) is not nn.Parameter
    _calibrated(model)
    quantize_(model, LSTMConfig(step="convert"), lambda module, fqn: isinstance(module, ObservedLSTM))
    assert isinstance(model.encoder["lstm"], tlq.LSTM)


def test_lstms_that_never_ran_are_refused_by_name_before_any_is_converted() -> None:
    model = Model().eval()
    model.cell = nn.LSTMCell(5, 8)
    quantize_(model, LSTMConfig(), is_lstm)
    with pytest.raises(
        ValueError, match=r"but LSTM 'encoder\.lstm', LSTM 'decoder', LSTMCell 'cell' never ran: call the model"
    ):
        quantize_(model, LSTMConfig(step="convert"), is_lstm)
    _calibrated(model)
    with pytest.raises(
        ValueError, match=r"every LSTM of the model was prepared, but LSTMCell 'cell' never ran: .* or prepare it"
    ):
        quantize_(model, LSTMConfig(step="convert"), is_lstm)
    assert [type(lstm) for lstm in (model.encoder["lstm"], model.decoder)] == [ObservedLSTM, ObservedLSTM]
    quantize_(model, LSTMConfig(step="convert"), lambda module, fqn: fqn == "decoder")
    assert [type(lstm) for lstm in (model.encoder["lstm"], model.decoder)] == [ObservedLSTM, tlq.LSTM]


def test_two_steps_of_preparing() -> None:
    """What was prepared and never ran is no error while there is more to prepare."""
    model, configs = Model().eval(), {"decoder": tlq.LSTMQConfig.int8(), "encoder.lstm": tlq.LSTMQConfig.fixed16()}
    expected = tlq.quantize(model, BATCHES, configs)
    for path, config in configs.items():
        quantize_(model, LSTMConfig(config), lambda module, fqn, path=path: is_lstm(module, fqn) and fqn == path)
    quantize_(_calibrated(model), LSTMConfig(step="convert"), is_lstm)
    assert torch.equal(model(BATCHES[0]), expected(BATCHES[0]))


@pytest.mark.parametrize("wanted", ["decoder", "encoder.lstm"])
def test_an_lstm_that_never_ran_is_named_where_others_are_float(wanted: str) -> None:
    model = Model().eval()
    quantize_(model, LSTMConfig(), lambda module, fqn: fqn == wanted)
    with pytest.raises(ValueError, match=f"^LSTM '{wanted}' never ran"):
        quantize_(model, LSTMConfig(step="convert"), lambda module, fqn: is_lstm(module, fqn) and fqn == wanted)


def test_a_model_that_is_itself_an_lstm_is_refused() -> None:
    with pytest.raises(ValueError, match="got a bare LSTM: put it into a module"):
        quantize_(nn.LSTM(5, 8), LSTMConfig(), is_lstm)


@pytest.mark.parametrize("step", ["prepare", "convert"])
def test_a_model_with_nothing_to_do_is_refused(step: Any) -> None:
    fused = tlq.quantize(Model(), BATCHES)
    cases = {r"encoder\.lstm is an LSTM, which is fused already": fused, "found no LSTM, only Linear": nn.Linear(5, 2)}
    for found, model in cases.items():
        with pytest.raises(ValueError, match=f"must contain an LSTM that is float or was prepared: {found}"):
            quantize_(model, LSTMConfig(step=step), is_lstm)
    mixed = nn.ModuleDict({"fused": fused, "new": nn.LSTM(5, 8)})
    quantize_(mixed, LSTMConfig(), is_lstm)
    assert isinstance(mixed["new"], ObservedLSTM)
    assert isinstance(mixed["fused"].decoder, tlq.LSTM)


@pytest.mark.parametrize(
    ("step", "filter_fn", "message"),
    [
        (
            "prepare",
            None,
            "needed a float nn.LSTM or nn.LSTMCell, got Linear.*is_lstm",
        ),  # torchao's default filter takes Linear
        ("convert", is_lstm, "needed an LSTM that was prepared, got LSTM.*first to prepare"),
    ],
)
def test_modules_that_a_step_is_not_for(step: Any, filter_fn: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        quantize_(Model(), LSTMConfig(step=step), filter_fn)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": "train"}, ValueError, "step must be 'prepare' or 'convert', got 'train'"),
        ({"backend": "fast"}, ValueError, "backend must be one of .*, got 'fast'"),
        ({"qconfig": "int8"}, TypeError, "qconfig must be an LSTMQConfig, got str"),
        ({"qconfig": tlq.LSTMQConfig.int8(), "step": "convert"}, ValueError, "qconfig must be None for step='convert'"),
    ],
)
def test_configs_that_make_no_sense(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LSTMConfig(**arguments)


def test_without_torchao_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['torchao'] = None; import torch_lstm_quant.torchao"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "needs torchao: pip install torch-lstm-quant[torchao]" in result.stderr

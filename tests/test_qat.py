"""Quantization-aware training: what was trained is what is converted, and it is better than what was only calibrated."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_lstms import assert_near, torchs_warnings
from part_by_part import assert_parts_follow
from torch import Tensor, nn
from torch.ao.quantization import disable_fake_quant, disable_observer, enable_fake_quant
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import torch_lstm_quant as tlq
from torch_lstm_quant import LSTMQConfig, reference
from torch_lstm_quant.cell_graph import ObservedLinear

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "char_lm"))

import data
import qat
from model import CharLM

pytestmark = [torchs_warnings, pytest.mark.filterwarnings("ignore::torch_lstm_quant.LossWarning")]

PRESETS = ["int8", "int8_gates16", "fixed16", "all_int8"]
X = torch.randn(40, 8, 5, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Model:
    """It keeps what it has read, and one unit counts, so that the increments of the others are lost in steps of 8 bits."""
    torch.manual_seed(0)
    model = Model().eval()
    with torch.no_grad():
        model.lstm.bias_hh_l0[16:32] += 4
        model.lstm.bias_hh_l0[[0, 16, 32]] += 10
    return model


def prepared_by(route: str, model: nn.Module, config: LSTMQConfig) -> Any:
    if route == "prepare_qat":
        return tlq.prepare_qat(model, config)
    mapping = tlq.qconfig_mapping(config)
    return prepare_qat_fx(copy.deepcopy(model).train(), mapping, (X,), tlq.prepare_custom_config())


def converted_by(route: str, prepared: Any) -> Any:
    return tlq.convert(prepared) if route == "prepare_qat" else convert_fx(prepared, tlq.convert_custom_config())


def train(prepared: nn.Module, wanted: Tensor, steps: int) -> None:
    """Train without a dice, so that what is shown is shown each time."""
    optimizer = torch.optim.Adam(prepared.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (prepared(X) - wanted).square().mean().backward()
        optimizer.step()


def assert_follows(fused: tlq.LSTM, fake_quantized: Any) -> None:
    """Step by step from equal states: unlike in at most 1 value in 1,000, and only where a part was rounded the other way.

    A part may be one step of its own grid off, whose steps may be larger than those of the hidden state.
    """
    x = torch.randn(100, 8, fused.input_size, generator=torch.Generator().manual_seed(1))
    states = [(torch.zeros(1, 8, fused.hidden_size), torch.zeros(1, 8, fused.hidden_size))]
    with torch.no_grad():
        for step in x.split(1):
            states.append(fake_quantized(step, states[-1])[1])
        h, c = (torch.cat(of_steps) for of_steps in zip(*states, strict=True))
        read = x.flatten(0, 1), h[:-1].flatten(0, 1), c[:-1].flatten(0, 1)
        steps = fused(read[0][None], (read[1][None], read[2][None]))[1]
        whole = fused(x)
    cell: Any = fused.cells()[0][0]
    otherwise = assert_parts_follow(cell, fake_quantized.layers[0].layer_fw.cell, *read)
    for got, state, part in zip(steps, (h, c), ("ogate_cy", "fgate_cx_igate_cgate"), strict=True):
        wanted, grid = state[1:].flatten(0, 1), getattr(cell.qparams, part)
        assert_near(got[0], wanted, grid)
        alike = got[0] == wanted if grid else (got[0] - wanted).abs() <= 1e-5 * wanted.abs().max()
        assert (alike | otherwise).all()
    for got, wanted in zip((whole[0], *whole[1]), reference.lstm(fused.cells(), x), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("route", ["prepare_qat", "prepare_qat_fx"])
def test_training_recovers_what_calibrating_loses(model: Model, route: str) -> None:
    with torch.no_grad():
        wanted = model(X)
    config = LSTMQConfig.all_int8(qat=True)
    prepared = prepared_by(route, model, config)
    assert prepared.training
    prepared(X)
    prepared.apply(disable_observer)
    calibrated = converted_by(route, copy.deepcopy(prepared).eval())
    train(prepared, wanted, 30)
    prepared.eval()
    fake_quantized = copy.deepcopy(prepared)
    trained = converted_by(route, prepared)
    with torch.no_grad():
        before, after = ((module(X) - wanted).square().mean() for module in (calibrated, trained))
    assert after < 0.7 * before
    assert_follows(trained.lstm, fake_quantized.lstm)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_was_trained_is_what_is_converted(model: Model, preset: str, frozen: bool) -> None:
    """Ranges kept from the first call on, or going on to the end."""
    prepared = tlq.prepare_qat(model, getattr(LSTMQConfig, preset)(qat=True))
    prepared(X)
    if frozen:
        prepared.apply(disable_observer)
    train(prepared, torch.zeros(()), 3)
    prepared.eval()
    with torch.no_grad():
        for _ in range(2):  # the last step of training has moved weights, and so ranges
            prepared(X)
    fused: Any = tlq.convert(prepared)
    assert_follows(fused.lstm, prepared.apply(disable_observer).lstm)


def test_torchs_switches(model: Model) -> None:
    prepared: Any = tlq.prepare_qat(model).eval()
    with torch.no_grad():
        prepared(X)
        prepared.apply(disable_observer)
        ranges = {name: value.clone() for name, value in prepared.state_dict().items() if "calls" not in name}
        rounded = prepared(9 * X)
        assert all(torch.equal(prepared.state_dict()[name], value) for name, value in ranges.items())
        prepared.apply(disable_fake_quant)
        torch.testing.assert_close(prepared(9 * X), model(9 * X))
        prepared.apply(enable_fake_quant)
        assert torch.equal(prepared(9 * X), rounded)


def test_weights_are_fake_quantized_once_a_call(model: Model) -> None:
    prepared: Any = tlq.prepare_qat(model, LSTMQConfig.int8(qat=True))
    prepared(X)
    prepared.apply(disable_observer)
    linears = [module for module in prepared.modules() if isinstance(module, ObservedLinear)]
    calls: list[nn.Module] = []
    for linear in linears:
        linear.weight_post_process.register_forward_hook(lambda module, args, output: calls.append(module))
    prepared(X).square().mean().backward()
    assert len(calls) == len(linears) == 2
    assert all(linear.weight.grad is not None and linear.weight.grad.abs().sum() > 0 for linear in linears)
    gradients = [linear.weight.grad.clone() for linear in linears]  # type: ignore[union-attr]
    prepared.zero_grad()
    prepared.head(torch.stack(one_by_one(prepared.lstm))).square().mean().backward()
    assert len(calls) == 2 + 2 * len(X)
    for linear, gradient in zip(linears, gradients, strict=True):
        torch.testing.assert_close(linear.weight.grad, gradient, rtol=1e-3, atol=1e-6)


def one_by_one(lstm: Any) -> list[Tensor]:
    """Step by step, the weights anew each time."""
    state: Any = torch.zeros(8, 16), torch.zeros(8, 16)
    outputs = []
    for step in X:
        state = lstm.layers[0].layer_fw.cell(step, state)
        outputs.append(state[0])
    return outputs


def test_a_part_that_would_be_trained_without_its_rounding_is_named(model: Model) -> None:
    for config, part in (
        (LSTMQConfig.int8().replace(weight_ih=None, weight_hh=None), "activation_post_process_x"),
        (LSTMQConfig.int8(qat=True).replace(weight_hh=LSTMQConfig.int8().weight_hh), "hgates"),
    ):
        message = rf"^LSTM 'lstm': a part must have a fake quantize .*, got \w+ at .*{part}: use a preset with qat=True"
        with pytest.raises(ValueError, match=message):
            tlq.prepare_qat(model, config)


def test_the_examples_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps on a small model, whose loss goes down and whose fused LSTM follows."""
    torch.manual_seed(0)
    model = CharLM(hidden_size=16, embedding_size=8).eval()
    with torch.no_grad():
        for parameter in model.lstm.parameters():
            parameter.mul_(6)
    text = torch.randint(len(data.ALPHABET), (33, 8), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(qat, "STEPS", 8)
    prepared = qat.prepare(model, [text])
    assert prepared.training
    losses = [loss for _ in range(4) for loss in qat.train(prepared, model, text[:32])]
    assert sum(losses[-4:]) < sum(losses[:4])
    prepared.eval()
    fused: Any = tlq.convert(prepared)
    assert_follows(fused.lstm, prepared.lstm)

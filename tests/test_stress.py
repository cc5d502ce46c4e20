"""Models that break careless grids, each with the bound to which ``int8()`` keeps its float answer.

Beside each bound: what was measured. Bounds leave room for another random initialization, not for a worse grid.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torch_lstm_quant as tlq


def sqnr(got: Tensor, want: Tensor) -> float:
    """Signal to quantization noise ratio in dB."""
    return float(10 * torch.log10(want.pow(2).sum() / (got - want).pow(2).sum()))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_unit(weight_ih: list[float], weight_hh: list[float], bias: list[float]) -> nn.LSTM:
    """An LSTM of one unit and one input with given rows for the input, forget, cell and output gate."""
    lstm = nn.LSTM(1, 1)
    with torch.no_grad():
        for parameter, values in zip(lstm.parameters(), (weight_ih, weight_hh, bias, [0.0] * 4), strict=True):
            parameter.copy_(torch.tensor(values).reshape(parameter.shape))
    return lstm.eval()


@torch.no_grad()
def test_pre_activations_of_500() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(32, 64).eval()
    lstm.weight_ih_l0.mul_(500.0)
    x = noise(200, 4, 32, seed=1)
    reach = (x @ lstm.weight_ih_l0.T).abs().max()
    assert reach > 450
    fused = tlq.quantize(lstm, [noise(200, 4, 32, seed=2)])
    assert sqnr(fused(x)[0], lstm(x)[0]) > 15  # measured 18: gates that saturate flip on errors of the 8-bit weights


@torch.no_grad()
def test_a_cell_that_integrates_to_174() -> None:
    # forget gate 1, output gate 1, each step adds sigmoid(-5.81) * tanh(20) = 0.003
    lstm = one_unit([0.0, 0.0, 20.0, 0.0], [0.0] * 4, [-5.806, 30.0, 0.0, 30.0])
    x = torch.ones(58_000, 1, 1)
    fused = tlq.quantize(lstm, [x[:100]])
    want = float(lstm(x)[1][1])
    assert 170 < want < 178
    # the input gate of 0.003 lies on a grid of steps of 2**-15: 0.5 % at most, and as much again for its input; measured 0.7 %
    assert abs(float(fused(x)[1][1]) / want - 1) < 0.01


@torch.no_grad()
def test_a_cell_that_remembers_one_value_for_100_000_steps() -> None:
    # the first step, with x = 1, writes tanh(0.5); afterwards, with x = 0, the input gate is shut and the forget gate open
    lstm = one_unit([40.0, 0.0, 0.0, 0.0], [0.0] * 4, [-20.0, 20.0, 0.5, 20.0])
    x = torch.zeros(100_000, 1, 1)
    x[0] = 1.0
    fused = tlq.quantize(lstm, [x[:100]])
    after_one, at_the_end = fused(x[:1])[1][1], fused(x)[1][1]
    assert torch.equal(after_one, at_the_end)
    # half a step of the grid in front of tanh, times its slope; measured 0.0013
    assert abs(float(at_the_end) - float(lstm(x)[1][1])) < 0.0024


@torch.no_grad()
def test_a_backward_direction_of_five_times_the_range() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(16, 32, bidirectional=True).eval()
    for name, parameter in lstm.named_parameters():
        parameter.mul_(1.5 if "reverse" in name else 0.15)
    x = noise(50, 4, 16, seed=1)
    want = lstm(x)[0]
    forward, backward = want.chunk(2, dim=2)
    assert backward.abs().max() > 5 * forward.abs().max()
    fused = tlq.quantize(lstm, [noise(50, 4, 16, seed=2)])
    got_forward, got_backward = fused(x)[0].chunk(2, dim=2)
    assert sqnr(got_forward, forward) > 24  # measured 27: its pre-activations are some twenty steps of the gates' grid
    assert sqnr(got_backward, backward) > 32  # measured 36


@torch.no_grad()
def test_a_power_spectrum_with_its_first_projection_in_float() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(40, 64, 2).eval()
    # most bins near 3e-4, a few at 30; the weights of such a model are as large as the small bins need
    lstm.weight_ih_l0.mul_(torch.logspace(3, -1, 40))
    level = torch.logspace(-4, 1, 40)
    x, calibration = (level * torch.exp(noise(100, 4, 40, seed=seed)) for seed in (1, 2))
    config = tlq.LSTMQConfig.int8().override(layer=0, x=None, weight_ih=None)
    want = lstm(x)[0]
    good, bad = tlq.quantize(lstm, [calibration], config)(x)[0], with_warning(lstm, calibration)(x)[0]
    assert sqnr(good, want) > 33  # measured 37
    assert sqnr(bad, want) < 10  # measured 6


def with_warning(lstm: nn.LSTM, calibration: Tensor) -> nn.Module:
    """Quantized in 8 bits all the same, of which calibration warns."""
    with pytest.warns(tlq.LossWarning, match=r"layer 0, forward direction, part x: .*rounded to zero.*x=None, weight_ih=None"):
        return tlq.quantize(lstm, [calibration])

"""The estimate of what a grid loses, against what quantizing really loses; the warning says where, how much and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torch_lstm_quant as tlq
from torch_lstm_quant.qparams import QParams
from torch_lstm_quant.signal_loss import SignalHistogram, describe_loss


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def histogram_of(*values: Tensor) -> SignalHistogram:
    histogram = SignalHistogram()
    for value in values:
        histogram(nn.Identity(), (value,))
    return histogram


def sqnr(v: Tensor, grid: QParams) -> float:
    error = grid.dequantize(grid.quantize(v)) - v
    return float(10 * torch.log10(v.double().pow(2).sum() / error.double().pow(2).sum()))


@pytest.mark.parametrize("largest", [0.5, 1.0, 2.0, 4.0, 20.0, 200.0])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_the_estimate_is_within_4_db(largest: float, spread: float) -> None:
    v = noise(20_000) * torch.exp(spread * noise(20_000).roll(1))
    grid = QParams(largest / 127, 0, -127, 127)
    assert abs(histogram_of(*v.split(5000)).sqnr(grid) - sqnr(v, grid)) < 4


def test_values_beyond_flat_count_as_flat() -> None:
    v, grid = noise(10_000) * 100, QParams(12 / 2047, 0, -2048, 2047)
    assert histogram_of(v).sqnr(grid) < 2
    assert histogram_of(v).sqnr(grid, flat=12.0) > 60


def test_silence_and_zeros_lose_nothing() -> None:
    grid = QParams(1.0, 0, 0, 255)
    assert histogram_of(torch.zeros(10)).sqnr(grid) == float("inf")
    assert histogram_of(torch.zeros(10)).fraction_rounded_to_zero(grid) == 0.0
    sparse = torch.zeros(1000)
    sparse[::100] = 200.0
    assert describe_loss("x", histogram_of(sparse), grid) is None


def test_a_power_spectrum_is_told_from_a_waveform() -> None:
    spectrum = torch.exp(3 * noise(10_000) - 7)
    message = describe_loss("x", histogram_of(spectrum), QParams(float(spectrum.max()) / 255, 0, 0, 255))
    assert message is not None
    assert message.startswith("part x: 9")
    assert "rounded to zero" in message
    assert message.endswith("x=None, weight_ih=None")
    assert describe_loss("x", histogram_of(noise(10_000)), QParams(8 / 255, 128, 0, 255)) is None


def test_a_range_of_which_hardly_any_is_used() -> None:
    x = noise(50, 4, 5)
    x[0, 0, 0] = 300.0
    with pytest.warns(tlq.LossWarning, match=r"LSTM\(5, 8\), layer 0, forward direction, part x: keeps \d\.\d dB"):
        tlq.quantize(nn.LSTM(5, 8), [x])
    x[0, 0, 0] = 100.0
    with pytest.warns(tlq.LossWarning, match=r"part x: keeps 1\d\.\d dB of its signal on 8 bit .*Set x=None, weight_ih=None"):
        tlq.quantize(nn.LSTM(5, 8), [x])

"""The estimate of what a grid loses, against what quantizing really loses; the warning says where, how much and what to do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import HistogramObserver, MovingAverageMinMaxObserver

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


def warned_of(x: Tensor, config: tlq.LSTMQConfig, hx: Any = None) -> list[str]:
    """The parts that are named when converting."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", tlq.LossWarning)
        tlq.quantize(nn.LSTM(5, 8), [(x, hx)], config)
    messages = [str(warning.message) for warning in caught if warning.category is tlq.LossWarning]
    assert all(message.startswith("LSTM(5, 8), layer 0, forward direction, part ") for message in messages)
    return [message.partition("direction, part ")[2] for message in messages]


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_an_input_of_a_single_value(value: float) -> None:
    (message,) = warned_of(torch.full((20, 3, 5), value), tlq.LSTMQConfig.int8())
    assert message.startswith(f"x: calibration saw no value but {value:g}, and all others are cut off on 8 bit ")
    assert message.endswith(". Calibrate with typical input")


@pytest.mark.parametrize("observer", [MovingAverageMinMaxObserver, HistogramObserver])
def test_a_single_value_whatever_observes(observer: Any) -> None:
    config = tlq.LSTMQConfig.int8().replace(x=observer.with_args(dtype=torch.quint8))
    (message,) = warned_of(torch.zeros(20, 3, 5), config)
    assert message.startswith("x: calibration saw no value but 0,")


def test_states_that_one_step_shows_as_zeros() -> None:
    x, config = noise(1, 3, 5), tlq.LSTMQConfig.int8_gates16()
    (message,) = warned_of(x, config)
    assert message.startswith("fgate_cx: calibration saw no value but 0, and all others are cut off on 16 bit ")
    assert message.endswith("of more than one step or with states, or set fgate_cx=None (float32)")
    own = config.replace(hx=config.ogate_cy, cx=config.fgate_cx)
    assert [message.partition(":")[0] for message in warned_of(x, own)] == ["fgate_cx", "hx", "cx"]
    states = noise(1, 3, 8).tanh(), noise(1, 3, 8)
    assert not warned_of(x, own, states)
    assert not warned_of(noise(2, 3, 5), config)
    assert not warned_of(x, tlq.LSTMQConfig.int8())  # products and cell state are float32
    assert not warned_of(x, tlq.LSTMQConfig.fixed16())  # and here their grids are given


def test_a_cell_so_small_that_a_part_has_one_value() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", tlq.LossWarning)
        tlq.quantize(nn.LSTM(2, 1), [torch.tensor([[[0.5, -1.0]]])])

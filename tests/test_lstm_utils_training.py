"""Quantization-aware training of an observed LSTM."""

from __future__ import annotations

import pytest
import torch
from observed_lstms import (
    FLOAT,
    FLOAT32,
    data,
    directions,
    float_lstm,
    no_warnings,
    observe,
    without_deprecation,
)
from torch import nn
from torch.ao.quantization import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FixedQParamsObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    default_weight_observer,
    get_default_qat_qconfig,
)
from torch.ao.quantization.fake_quantize import FakeQuantizeBase

from torch_lstm_quant import lstm_utils as ours
from torch_lstm_quant.qconfig import LSTMQConfig


@no_warnings
class TestTraining:
    QCONFIG = QConfig(
        activation=FakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver, dtype=torch.quint8, quant_min=0, quant_max=255
        ),
        weight=default_weight_observer,
    )

    @pytest.mark.parametrize("qconfig", [QCONFIG, get_default_qat_qconfig("qnnpack")], ids=["observed weights", "default"])
    def test_gradients_reach_every_parameter(self, qconfig: QConfig) -> None:
        lstm = float_lstm(qconfig, num_layers=2, bidirectional=True).train()
        observed = observe(lstm)
        assert observed.training
        for linear in (linear for cell in directions(observed) for linear in (cell.igates, cell.hgates)):
            assert isinstance(linear.weight_post_process, FakeQuantizeBase)
        optimizer = torch.optim.SGD(observed.parameters(), lr=0.5)
        x = data()
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = (observed(x)[0] - 0.4).square().mean()
            loss.backward()
            losses.append(loss.item())
            assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in observed.parameters())
            optimizer.step()
        assert losses[-1] < losses[0]
        assert all(parameter.grad is None for parameter in lstm.parameters())

    def test_weights_that_the_qconfig_keeps_float_stay_float(self) -> None:
        (cell,) = directions(observe(float_lstm().train(), sigmoid_obs_ctr=self.QCONFIG.activation))
        assert {type(cell.igates), type(cell.hgates)} == {nn.Linear}

    def test_what_was_trained_is_what_is_converted(self) -> None:
        """With the presets' grids the forward pass in training and the converted cell agree but for ties."""
        config = LSTMQConfig.all_int8(qat=True)
        lstm = float_lstm(FLOAT).train()
        observed = observe(lstm, **{f"{part}_obs_ctr": constructor or FLOAT32 for part, constructor in config.parts()})
        x = data()
        for _ in range(3):
            observed(x)
        observed.apply(torch.ao.quantization.disable_observer)
        with torch.no_grad():
            expected = observed(x)[0]
            (cell,) = directions(observed)
            linear = cell.igates
            converted = ours._get_reference_quantized_lstm_module(observed)
            with without_deprecation():
                torch.testing.assert_close(
                    directions(converted)[0].igates.get_weight(), linear.weight_post_process(linear.weight)
                )
            step = float(cell.activation_post_process_ogate_cy.calculate_qparams()[0])
            torch.testing.assert_close(converted(x)[0], expected, rtol=0, atol=2.01 * step)

    def test_weights_on_a_fixed_grid_in_training(self) -> None:
        grid = FixedQParamsObserver.with_args(scale=2**-7, zero_point=0, dtype=torch.qint8, quant_min=-128, quant_max=127)
        observed = observe(float_lstm().train(), weight_hh_obs_ctr=FixedQParamsFakeQuantize.with_args(observer=grid))
        observed(data())
        (cell,) = directions(ours._get_reference_quantized_lstm_module(observed))
        assert cell.hgates.weight_scale == 2**-7
        assert type(cell.igates) is nn.Linear

    def test_weights_are_kept_within_narrow_limits(self) -> None:
        """A moving average lags behind a weight that grew: what is beyond the grid is cut, as it was in training."""
        grid = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
        constructor = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, **grid)
        observed = observe(float_lstm().train(), weight_ih_obs_ctr=constructor)
        observed(data())
        (cell,) = directions(observed)
        cell.igates.weight_post_process.disable_observer()
        with torch.no_grad():
            cell.igates.weight.mul_(3)
            expected = cell.igates.weight_post_process(cell.igates.weight)
        (cell,) = directions(ours._get_reference_quantized_lstm_module(observed))
        with without_deprecation():
            assert torch.equal(cell.igates.get_weight(), expected)
            assert cell.igates.get_quantized_weight().int_repr().min() == -127

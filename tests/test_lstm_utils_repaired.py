"""What torch 2.13's version of the two LSTM utilities gets wrong: ours must pass these tests, and torch's must fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from observed_lstms import (
    BATCH,
    HIDDEN,
    INPUT,
    STATIC,
    data,
    directions,
    fixed,
    float_lstm,
    no_warnings,
    quantized,
    quantizes,
)
from torch import nn
from torch.ao.quantization import (
    FixedQParamsObserver,
    MinMaxObserver,
    get_default_qat_qconfig,
    get_default_qconfig,
)
from torch.ao.quantization.backend_config import DTypeConfig, get_qnnpack_backend_config
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.ao.quantization.fx import lstm_utils as upstream
from torch.ao.quantization.observer import ObserverBase
from torch.fx import GraphModule

from torch_lstm_quant import lstm_utils as ours

TORCHS_DEFECT = pytest.mark.xfail(strict=True, raises=AssertionError, reason="torch's defect")


@pytest.fixture(
    params=[
        pytest.param(ours, id="ours", marks=no_warnings),
        pytest.param(upstream, id="torch", marks=[TORCHS_DEFECT, pytest.mark.filterwarnings("ignore")]),
    ]
)
def utilities(request: pytest.FixtureRequest) -> Any:
    """Both versions. torch's must fail by an assertion of the test; once it passes, the defect is gone and so is this mark."""

    def observe(lstm: nn.LSTM, **arguments: Any) -> torch.ao.nn.quantizable.LSTM:
        # torch's wants the arguments of one cell
        example_inputs = (data(BATCH, INPUT), (data(BATCH, HIDDEN), data(BATCH, HIDDEN)))
        return request.param._get_lstm_with_individually_observed_parts(lstm, example_inputs, **arguments)

    return SimpleNamespace(observe=observe, convert=request.param._get_reference_quantized_lstm_module)


class TestRepaired:
    """What torch 2.13 gets wrong."""

    def test_a_gates_constructor_leaves_its_input_alone(self, utilities: Any) -> None:
        """torch puts the observer of the sigmoid on the gate's input too, and clips the sum to 0..1 there."""
        observed = utilities.observe(float_lstm(STATIC), sigmoid_obs_ctr=fixed(1 / 256, 0, torch.quint8))
        observed(data())
        (cell,) = directions(utilities.convert(observed))
        behind_chunk = [n for n, source in quantizes(cell).items() if source.name in {f"getitem_{i}" for i in range(4, 8)}]
        assert behind_chunk == []

    def test_a_value_is_quantized_once(self, utilities: Any) -> None:
        """torch quantizes a gate's 16-bit output again, to quint8, before the product."""
        backend_config = get_qnnpack_backend_config()
        for config in backend_config.configs:
            if config.pattern in (nn.Sigmoid, nn.Tanh, torch.add, torch.mul):
                config.add_dtype_config(DTypeConfig(input_dtype=torch.qint32, output_dtype=torch.qint32))
        observed = utilities.observe(
            float_lstm(STATIC),
            backend_config=backend_config,
            sigmoid_obs_ctr=fixed(2**-16, 0, torch.qint32),
            tanh_obs_ctr=fixed(2**-15, 0, torch.qint32),
        )
        observed(data())
        (cell,) = directions(utilities.convert(observed, backend_config))
        assert not any(source.target == "dequantize" for source in quantizes(cell).values())

    @pytest.mark.parametrize("group", ["sigmoid", "tanh"])
    @pytest.mark.parametrize(
        "constructor",
        [
            fixed(1 / 128, 0, torch.qint8),
            fixed(2**-15, 0, torch.qint32),
            fixed(1 / 100, 90, torch.quint8),
            MinMaxObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=7),
        ],
        ids=["qint8", "qint32", "other scale", "MinMax"],
    )
    def test_any_dtype_and_kind_of_observer_is_honoured(
        self, utilities: Any, group: str, constructor: Callable[[], nn.Module]
    ) -> None:
        """torch drops these without a word."""
        observed = utilities.observe(float_lstm(STATIC), **{f"{group}_obs_ctr": constructor})
        observed(data())
        (cell,) = directions(utilities.convert(observed))
        gate = "cell_gate" if group == "tanh" else "forget_gate"
        (quantize,) = [node for node, source in quantizes(cell).items() if source.name == gate]
        asked = constructor()
        assert quantize.args[-1] is asked.dtype
        if isinstance(asked, FixedQParamsObserver):
            assert getattr(cell, quantize.args[1].target) == asked.scale
            assert getattr(cell, quantize.args[2].target) == asked.zero_point
        else:
            assert getattr(cell, quantize.args[1].target) > 0.3 / 7

    @pytest.mark.parametrize("dtype", [torch.int16, torch.uint8])
    def test_plain_integers_are_quantized_to(self, utilities: Any, dtype: torch.dtype) -> None:
        """torch leaves such parts in float, and their observers in the converted model."""
        grid = {"quant_min": 0, "quant_max": 200}
        observed = utilities.observe(float_lstm(STATIC), linear_output_obs_ctr=fixed(0.01, 100, dtype, **grid))
        observed(data())
        converted = utilities.convert(observed)
        assert not any(isinstance(module, (ObserverBase, FakeQuantizeBase)) for module in converted.modules())
        (cell,) = directions(converted)
        assert [n.args[-1] for n, source in quantizes(cell).items() if source.name == "add"] == [dtype]

    def test_every_layer_keeps_its_qparams(self, utilities: Any) -> None:
        """torch stacks the layers' last states into one quantized tensor with the scale of the first."""
        lstm = float_lstm(STATIC, num_layers=2)
        with torch.no_grad():
            lstm.weight_hh_l1.mul_(8)
            lstm.weight_ih_l1.mul_(8)
        observed = utilities.observe(lstm)
        observed(data())
        output, (h_n, _) = utilities.convert(observed)(quantized(data()), (torch.zeros(2, BATCH, HIDDEN),) * 2)
        assert torch.equal(h_n[1].dequantize(), output[-1].dequantize())

    def test_both_directions_are_converted(self, utilities: Any) -> None:
        """torch gives the backward direction random weights, and no qparams."""
        lstm = float_lstm(STATIC, bidirectional=True)
        observed = utilities.observe(lstm)
        observed(data())
        forward, backward = directions(utilities.convert(observed))
        assert isinstance(backward, GraphModule)
        for cell, suffix in ((forward, ""), (backward, "_reverse")):
            for side in ("ih", "hh"):
                linear = cell.igates if side == "ih" else cell.hgates
                torch.testing.assert_close(linear.weight, getattr(lstm, f"weight_{side}_l0{suffix}"))
                torch.testing.assert_close(linear.bias, getattr(lstm, f"bias_{side}_l0{suffix}"))
        assert len(quantizes(forward)) == len(quantizes(backward)) == 12

    def test_parameters_are_not_shared(self, utilities: Any) -> None:
        """torch's observed LSTM has the float LSTM's parameters, so that training one changes the other."""
        lstm = float_lstm(STATIC)
        observed, x = utilities.observe(lstm), data()
        before = observed(x)[0]
        with torch.no_grad():
            for parameter in lstm.parameters():
                parameter.zero_()
        assert torch.equal(observed(x)[0], before)

    def test_training_quantizes_the_weights(self, utilities: Any) -> None:
        """torch trains with float weights, and quantizes them at convert."""
        observed = utilities.observe(float_lstm(get_default_qat_qconfig("qnnpack")).train())
        fake_quantized: list[torch.Size] = []
        for module in observed.modules():
            if isinstance(module, FakeQuantizeBase):
                module.register_forward_pre_hook(lambda module, args: fake_quantized.append(args[0].shape))
        observed(data())
        assert (4 * HIDDEN, INPUT) in fake_quantized
        assert (4 * HIDDEN, HIDDEN) in fake_quantized

    def test_no_warning_reaches_the_user(self, utilities: Any) -> None:
        """torch warns of its own deprecations and of qconfigs that it made itself, up to 155 times a layer."""
        x = quantized(data())
        torch.set_warn_always(True)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                observed = utilities.observe(float_lstm(get_default_qconfig("fbgemm"), num_layers=2, dropout=0.5))
                observed(data())
                utilities.convert(observed)(x)
        finally:
            torch.set_warn_always(False)
        assert [str(warning.message) for warning in caught] == []

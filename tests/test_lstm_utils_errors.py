"""What the two LSTM utilities refuse, and that they say where."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from observed_lstms import (
    BATCH,
    FLOAT,
    FLOAT32,
    HIDDEN,
    INPUT,
    STATIC,
    convert,
    data,
    directions,
    fixed,
    float_lstm,
    no_warnings,
    observe,
    quantizes,
)
from torch import nn
from torch.ao.quantization import (
    FixedQParamsObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    QConfig,
    default_weight_observer,
    get_default_qat_qconfig,
)
from torch.ao.quantization.backend_config import get_qnnpack_backend_config
from torch.ao.quantization.fx import lstm_utils as upstream

from torch_lstm_quant import lstm_utils as ours


@no_warnings
class TestBackendConfig:
    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            ({"sigmoid_obs_ctr": fixed(2**-15, 0, torch.qint32)}, "input_gate"),
            ({"cell_gate_obs_ctr": fixed(2**-15, 0, torch.qint32)}, "cell_gate"),
            ({"linear_output_obs_ctr": fixed(0.01, 0, torch.int16, quant_min=-2048, quant_max=2047)}, "gates"),
            ({"tanh_cy_obs_ctr": fixed(2**-15, 0, torch.qint32)}, "tanh_cy"),
            ({"tanh_cy_input_obs_ctr": fixed(2**-9, 0, torch.qint32)}, "tanh_cy_input"),
            ({"hgates_obs_ctr": fixed(2**-9, 0, torch.qint32)}, "hgates"),
            ({"weight_hh_obs_ctr": fixed(2**-7, 0, torch.int8, quant_min=-128, quant_max=127)}, "weight_hh"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_it_does_not_allow_is_an_error_that_names_the_part(self, arguments: dict[str, Any], part: str) -> None:
        with pytest.raises(ValueError, match=f"forward direction, part {part}: backend_config 'qnnpack' allows .* got torch"):
            observe(float_lstm(STATIC), backend_config=get_qnnpack_backend_config(), **arguments)
        observed = observe(float_lstm(STATIC), **arguments)
        observed(data())
        with pytest.raises(ValueError, match=f"forward direction, part {part}: backend_config"):
            ours._get_reference_quantized_lstm_module(observed, get_qnnpack_backend_config())

    def test_what_it_allows_and_what_stays_float_passes(self) -> None:
        observed = observe(float_lstm(STATIC), backend_config=get_qnnpack_backend_config(), cell_state_obs_ctr=FLOAT32)
        observed(data())
        (cell,) = directions(ours._get_reference_quantized_lstm_module(observed, get_qnnpack_backend_config()))
        assert not {"mul", "mul_1", "add_1"} & {source.name for source in quantizes(cell).values()}


class Broken(FixedQParamsObserver):
    """An observer whose qparams can be anything."""

    def __init__(self, scale: float = 1.0, zero_point: int = 0, **arguments: Any) -> None:
        super().__init__(scale, zero_point, **arguments)


@no_warnings
class TestErrors:
    @pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf"), 1e-39, 3e38])
    def test_an_impossible_scale(self, scale: float) -> None:
        lstm = float_lstm(num_layers=2, bidirectional=True)
        constructor = Broken.with_args(scale=scale, dtype=torch.uint8)
        with pytest.raises(ValueError, match="LSTM, layer 0, forward direction, part forget_gate: its scale must be"):
            convert(lstm, data(), forget_gate_obs_ctr=constructor)

    @pytest.mark.parametrize("zero_point", [-1, 256])
    def test_a_zero_point_out_of_range(self, zero_point: int) -> None:
        constructor = Broken.with_args(zero_point=zero_point, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"part igates: its zero_point must lie in .*\[0, 255\], got"):
            convert(float_lstm(), data(), igates_obs_ctr=constructor)

    @pytest.mark.parametrize(
        ("constructor", "message"),
        [
            (fixed(1.0, 0, torch.int8), r"torch.int8's \[-128, 127\], got 0 and 255"),
            (fixed(1.0, 0, torch.uint8, quant_min=5, quant_max=5), "quant_min must be less than quant_max"),
            (fixed(1.0, 0, torch.int32, quant_min=0, quant_max=1 << 17), "at most 16 bits"),
            (MinMaxObserver.with_args(dtype=torch.qint32), "at most 16 bits"),
            (MinMaxObserver.with_args(dtype=torch.int32), "at most 16 bits"),
            (PlaceholderObserver.with_args(dtype=torch.float16), "has dtype torch.float16, needed one of quint8"),
            (PlaceholderObserver.with_args(dtype=torch.quint8, is_dynamic=True), "finds no static grid"),
            (PerChannelMinMaxObserver.with_args(dtype=torch.quint8), "needed a per-tensor scheme"),
        ],
    )
    def test_constructors_that_cannot_be_honoured(self, constructor: Callable[[], nn.Module], message: str) -> None:
        with pytest.raises(ValueError, match=f"layer 0, forward direction, part tanh_cy: .*{message}"):
            observe(float_lstm(), tanh_cy_obs_ctr=constructor)

    @pytest.mark.parametrize(
        ("constructor", "message"),
        [
            (MinMaxObserver.with_args(dtype=torch.quint8), "needed one of qint8, int8, float32"),
            (PerChannelMinMaxObserver.with_args(dtype=torch.qint8, ch_axis=1), "ch_axis=0"),
        ],
    )
    def test_weight_constructors_that_cannot_be_honoured(self, constructor: Callable[[], nn.Module], message: str) -> None:
        with pytest.raises(ValueError, match=f"part weight_ih: .*{message}"):
            observe(float_lstm(), weight_ih_obs_ctr=constructor)

    @pytest.mark.parametrize("value", [MinMaxObserver(), 5, "share", int])
    def test_what_is_no_constructor(self, value: Any) -> None:
        with pytest.raises(TypeError, match="part hx: "):
            observe(float_lstm(), hx_obs_ctr=value)

    def test_an_observer_that_never_ran(self) -> None:
        observer = MinMaxObserver.with_args(dtype=torch.quint8)
        observed = observe(float_lstm(num_layers=2, bidirectional=True), output_gate_obs_ctr=observer)
        with pytest.raises(ValueError, match="layer 0, forward direction, part output_gate: its observer never ran"):
            ours._get_reference_quantized_lstm_module(observed)
        observed(data())
        observed.layers[1].layer_bw.cell.activation_post_process_output_gate.reset_min_max_vals()
        with pytest.raises(ValueError, match="layer 1, backward direction, part output_gate: its observer never ran"):
            ours._get_reference_quantized_lstm_module(observed)

    def test_a_fake_quantize_that_never_ran(self) -> None:
        observed = observe(float_lstm(get_default_qat_qconfig("qnnpack")).train())
        with pytest.raises(ValueError, match="layer 0, forward direction, part igates: its observer never ran"):
            ours._get_reference_quantized_lstm_module(observed)

    @pytest.mark.parametrize("observer", [MinMaxObserver, MovingAverageMinMaxObserver])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_calibration_with_nan_or_infinities(self, observer: Any, value: float) -> None:
        x = data()
        x[2, 1, 0] = value
        with pytest.raises(ValueError, match="layer 0, forward direction, part x: its observer saw NaN or infinities"):
            convert(float_lstm(), x, x_obs_ctr=observer.with_args(dtype=torch.quint8))

    def test_weights_with_nan(self) -> None:
        lstm = float_lstm(QConfig(activation=FLOAT32, weight=default_weight_observer), bidirectional=True)
        with torch.no_grad():
            lstm.weight_hh_l0_reverse[3, 2] = float("nan")
        with pytest.raises(ValueError, match="layer 0, backward direction, part weight_hh: its observer saw NaN"):
            convert(lstm, data())

    def test_an_lstm_that_cannot_be_observed(self) -> None:
        lstm = nn.LSTM(INPUT, HIDDEN)
        with pytest.raises(ValueError, match="must have a qconfig"):
            observe(lstm)
        lstm.qconfig = FLOAT
        with pytest.raises(ValueError, match=r"weight_ih_l0 must be torch.float32, got torch.float64: call float\(\)"):
            observe(lstm.double())

    def test_a_cell_that_is_not_observed(self) -> None:
        with pytest.raises(
            ValueError, match="layer 0, forward direction: the cell must be one that our utility observed, got LSTMCell"
        ):
            ours._get_reference_quantized_lstm_module(torch.ao.nn.quantizable.LSTM(INPUT, HIDDEN))

    def test_a_cell_that_torch_observed(self) -> None:
        cell = data(BATCH, INPUT), (data(BATCH, HIDDEN), data(BATCH, HIDDEN))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            observed = upstream._get_lstm_with_individually_observed_parts(float_lstm(STATIC), cell)
        observed(data())
        with pytest.raises(ValueError, match="activation_post_process_0 is not the observer of a part"):
            ours._get_reference_quantized_lstm_module(observed)

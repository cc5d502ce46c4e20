"""What LSTMQConfig refuses when it is made, by the part's name, and what it must not refuse."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FixedQParamsObserver,
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    NoopObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)

import torch_lstm_quant as tlq
from torch_lstm_quant import reference
from torch_lstm_quant.observers import CutMinMaxObserver
from torch_lstm_quant.qconfig import Override
from torch_lstm_quant.qparams import PARTS, WEIGHTS

INT8 = tlq.LSTMQConfig.int8()
X = torch.linspace(-1.5, 1.5, 30).reshape(5, 2, 3)


def fixed(scale: float, zero_point: int = 0, **arguments: Any) -> Any:
    return FixedQParamsObserver.with_args(scale=scale, zero_point=zero_point, **{"dtype": torch.int16, **arguments})


def unlimited(scale: float, zero_point: int = 0) -> Any:
    return fixed(scale, zero_point, dtype=torch.qint32)


def min_max(dtype: torch.dtype, **arguments: Any) -> Any:
    return MinMaxObserver.with_args(dtype=dtype, **arguments)


BYTE = {"quant_min": 0, "quant_max": 255}
REFUSED_ANYWHERE = {
    "uint16": (
        min_max(torch.uint16),
        ValueError,
        "has dtype torch.uint16, needed one of .*uint16 is int32 with limits",
    ),
    "float16": (NoopObserver, ValueError, "has dtype torch.float16, needed one of"),
    "17 bits": (min_max(torch.int32, quant_min=-(1 << 16), quant_max=(1 << 16) - 1), ValueError, "at most 16 bits, got"),
    "int32 without limits": (min_max(torch.int32), ValueError, "at most 16 bits, got"),
    "qint32 from data": (min_max(torch.qint32), ValueError, "at most 16 bits, got"),
    "no value": (fixed(1.0, quant_min=5, quant_max=5), ValueError, "must be less than quant_max.*got 5 and 5"),
    "per channel": (PerChannelMinMaxObserver, ValueError, "needed a per-tensor scheme"),
    "dynamic": (min_max(torch.quint8, is_dynamic=True), ValueError, "finds no static grid"),
    "no observer": (PlaceholderObserver.with_args(dtype=torch.qint8), ValueError, "finds no static grid"),
    "scale 0": (fixed(0.0, **BYTE), ValueError, "its scale must be positive, finite.*got 0.0"),
    "scale of a fake quantize": (
        FixedQParamsFakeQuantize.with_args(observer=fixed(float("nan"), **BYTE)),
        ValueError,
        "its scale must be positive, finite.*got nan",
    ),
    "its inverse": (fixed(3e38, **BYTE), ValueError, "normal float32 as its inverse"),
    "zero point": (fixed(1.0, 256, **BYTE), ValueError, r"its zero_point must lie in .*\[0, 255\], got 256"),
    "zero point without limits": (unlimited(1.0, 1 << 24), ValueError, "zero_point must lie in .*got 16777216"),
    "eps": (min_max(torch.uint8, eps=float("inf")), ValueError, "its scale must be positive, finite.*got inf"),
    "headroom below 0": (CutMinMaxObserver.with_args(headroom=-1.0), ValueError, "no grid for a range of -1 to 1: min 1.0"),
    "headroom NaN": (CutMinMaxObserver.with_args(headroom=float("nan")), ValueError, "its scale must be positive.*got nan"),
    "torch refuses": (min_max(torch.int8, quant_min=1, quant_max=9), TypeError, "constructor failed: .*must include 0"),
}
REFUSED_AS_WEIGHT = {
    "quint8": (min_max(torch.quint8), "has dtype torch.quint8, needed one of qint8, int8, float32"),
    "16 bits": (min_max(torch.int16), "has dtype torch.int16, needed one of qint8, int8, float32"),
    "columns": (PerChannelMinMaxObserver.with_args(dtype=torch.qint8, ch_axis=1), "ch_axis=0"),
    "9 bits": (
        fixed(1.0, dtype=torch.qint8, quant_min=-256, quant_max=255),
        r"within torch.qint8's \[-128, 127\], got -256 and 255",
    ),
    "scale 0": (fixed(0.0, dtype=torch.qint8, quant_min=-8, quant_max=7), "its scale must be positive, finite.*got 0.0"),
    "eps of rows": (
        PerChannelMinMaxObserver.with_args(dtype=torch.qint8, eps=float("inf")),
        "its scale must be positive, finite.*got inf",
    ),
}
OBSERVED = [part for part in PARTS if part not in ("hx", "cx")]


@pytest.mark.parametrize("name", REFUSED_ANYWHERE)
def test_activations_that_are_refused(name: str) -> None:
    constructor, error, message = REFUSED_ANYWHERE[name]
    for part in PARTS:
        with pytest.raises(error, match=f"^part {part}: .*{message}"):
            tlq.LSTMQConfig(**{part: constructor})
        with pytest.raises(error, match=f"^layer 2, forward, part {part}: .*{message}"):
            INT8.override(2, "forward", **{part: constructor})
    with pytest.raises(error, match=f"^layer any, both directions, cell gate, part gates: .*{message}"):
        INT8.override(gate="cell", gates=constructor)


@pytest.mark.parametrize("name", REFUSED_AS_WEIGHT)
def test_weights_that_are_refused(name: str) -> None:
    constructor, message = REFUSED_AS_WEIGHT[name]
    for part in WEIGHTS:
        with pytest.raises(ValueError, match=f"^part {part}: .*{message}"):
            INT8.replace(**{part: constructor})


def test_what_is_no_constructor_in_an_override_that_is_given() -> None:
    with pytest.raises(TypeError, match=r"^layer 0, backward, part x must be a constructor .* got 8$"):
        tlq.LSTMQConfig(overrides=(Override(0, "backward", None, {"x": 8}),))


@pytest.mark.parametrize("part", ["x", "hx", "ogate_cy", "hy"])
def test_a_projection_needs_limits(part: str) -> None:
    message = "is what projections read, .* 16 bits, got qint32 without limits: give its observer quant_min and quant_max$"
    with pytest.raises(ValueError, match=f"^part {part} {message}"):
        INT8.replace(**{part: unlimited(1e-3)})
    with pytest.raises(ValueError, match=f"^layer any, backward, part {part} {message}"):
        INT8.override(direction="backward", **{part: unlimited(1e-3)})


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        ({"gates": unlimited(1e-4)}, "layer 0, forward direction, part gates: sigmoid"),
        ({"fgate_cx_igate_cgate": unlimited(1e-4), "tanh_cy_input": None}, "part fgate_cx_igate_cgate: tanh"),
        ({"tanh_cy_input": unlimited(1e-4)}, "part tanh_cy_input: tanh"),
    ],
)
def test_a_function_whose_table_would_have_no_end(parts: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=f"{place} of a grid without limits, in steps of 0.0001, changes over more than"):
        INT8.replace(**parts)
    assert_runs(INT8.replace(**{part: constructor and unlimited(1e-2) for part, constructor in parts.items()}))


def test_it_is_known_of_each_gate_layer_and_direction() -> None:
    with pytest.raises(ValueError, match=r"^layer 0, forward direction, part gates_forget: sigmoid of a grid without limits"):
        INT8.override(gate="forget", gates=unlimited(1e-4))
    with pytest.raises(ValueError, match=r"^layer 3, backward direction, part gates: sigmoid of a grid without limits"):
        INT8.override(3, "backward", gates=unlimited(1e-4))
    overrides = Override(None, None, None, {"gates": unlimited(1e-4)}), Override(0, None, None, {"gates": unlimited(1e-2)})
    with pytest.raises(ValueError, match=r"^layer 1, forward direction, part gates: sigmoid of a grid without limits"):
        replace(INT8, overrides=overrides)


def test_where_only_data_can_tell_the_message_comes_from_it() -> None:
    outputs = dict.fromkeys(("input_gate", "forget_gate", "output_gate", "cell_gate"), min_max(torch.uint8))
    config = INT8.replace(gates=unlimited(1e-4), **outputs)
    with pytest.raises(ValueError, match=r"layer 0, forward direction, node .* of a grid without limits"):
        tlq.quantize(nn.LSTM(3, 4), [X], config)


class Recorded(MinMaxObserver):
    """An observer that needs what it saw."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: list[Tensor] = []

    def forward(self, x_orig: Tensor) -> Tensor:
        self.seen.append(x_orig.detach())
        return super().forward(x_orig)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        self.min_val, self.max_val = torch.cat(self.seen).min(), torch.cat(self.seen).max()
        return super().calculate_qparams()


@pytest.mark.parametrize(
    "constructor",
    [
        Recorded,
        HistogramObserver,
        HistogramObserver.with_args(dtype=torch.int16),
        MovingAverageMinMaxObserver,
        FakeQuantize,
        FusedMovingAvgObsFakeQuantize,
        FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, dtype=torch.int16, quant_min=-2000, quant_max=2000),
        FixedQParamsFakeQuantize.with_args(observer=fixed(0.01, 3, dtype=torch.quint8)),
        lambda: MinMaxObserver(dtype=torch.int8, quant_min=-3, quant_max=5),
        CutMinMaxObserver.with_args(dtype=torch.int16, headroom=0.5, cut=2.0),
    ],
)
def test_what_is_not_refused_runs(constructor: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a grid loses, and torch's on histograms
        assert_runs(INT8.replace(**dict.fromkeys(OBSERVED, constructor)))


def test_fake_quantized_weights_run() -> None:
    four = {"dtype": torch.qint8, "quant_min": -8, "quant_max": 7}
    for scheme in (torch.per_channel_symmetric, torch.per_channel_affine):
        weight = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, qscheme=scheme, **four)
        assert_runs(INT8.replace(weight_ih=weight, weight_hh=weight))


def assert_runs(config: tlq.LSTMQConfig) -> None:
    fused: Any = tlq.quantize(nn.LSTM(3, 4), [X], config)
    assert torch.equal(fused(X)[0], reference.lstm(fused.cells(), X)[0])

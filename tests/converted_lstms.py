"""Converted reference LSTMs of every origin, and how near the integer reference must come to them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FixedQParamsObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    QConfig,
    default_weight_observer,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.backend_config import DTypeConfig, get_qnnpack_backend_config
from torch.ao.quantization.fx import lstm_utils as torchs
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule

from torch_lstm_quant import lstm_utils as ours
from torch_lstm_quant import reference
from torch_lstm_quant.qparams import GATES, PARTS, WEIGHTS, QParams
from torch_lstm_quant.reference_graph import ReadCell, read_cell

torchs_warnings = pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning",
    "ignore:All inputs of this cat operator must share:UserWarning",
    "ignore:QConfig must specify a FixedQParamsObserver:UserWarning",
    "ignore:Please use quant_min and quant_max to specify the range:UserWarning",
)
"""Hides what torch's own flow says: that its quantized tensors will go, and of what it does itself."""

FLOAT32 = PlaceholderObserver.with_args(dtype=torch.float32)
QUANTIZED_LIMITS = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}

TORCHS_OWN_CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "defaults": {},
    # torch's example: gates are quantized twice, and qint32 has no limits
    "16 bit in qint32": {
        "linear_output_obs_ctr": FixedQParamsObserver.with_args(scale=2**-11, zero_point=2**15, dtype=torch.qint32),
        "sigmoid_obs_ctr": FixedQParamsObserver.with_args(scale=2**-16, zero_point=0, dtype=torch.qint32),
        "tanh_obs_ctr": FixedQParamsObserver.with_args(scale=2**-15, zero_point=2**15, dtype=torch.qint32),
        "cell_state_obs_ctr": FixedQParamsObserver.with_args(scale=2**-11, zero_point=0, dtype=torch.qint32),
        "hidden_state_obs_ctr": FixedQParamsObserver.with_args(scale=2**-7, zero_point=2**7, dtype=torch.quint8),
    },
    # the functions' inputs are put on the functions' grids, which end at 0 and 1
    "8 bit functions": {
        "sigmoid_obs_ctr": FixedQParamsObserver.with_args(scale=2**-8, zero_point=0, dtype=torch.quint8),
        "tanh_obs_ctr": FixedQParamsObserver.with_args(scale=2**-7, zero_point=2**7, dtype=torch.quint8),
    },
    "qint8 states": {
        "cell_state_obs_ctr": MinMaxObserver.with_args(dtype=torch.qint8),
        "hidden_state_obs_ctr": MinMaxObserver.with_args(dtype=torch.qint8),
    },
}


class Model(nn.Module):
    """An LSTM called in the one form that torch's flow knows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.my_lstm = nn.LSTM(*args, **kwargs)

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.my_lstm(x, (h0, c0))  # type: ignore[no-any-return]


def converted_model(
    utilities: Any,
    constructors: Mapping[str, Any],
    *args: Any,
    split_gates: bool = False,
    engine: str = "qnnpack",
    **kwargs: Any,
) -> nn.Module:
    """A ``Model`` through torch's custom module flow, as its documentation shows it.

    Args:
        utilities: ``torch.ao.quantization.fx.lstm_utils`` or ours.
        constructors: arguments of ``_get_lstm_with_individually_observed_parts``.
        engine: whose default qconfigs the rest takes.
        args, kwargs: of ``nn.LSTM``.
    """
    backend_config = get_qnnpack_backend_config()
    for config in backend_config.configs:
        if config.pattern in (nn.Sigmoid, nn.Tanh, torch.add, torch.mul):
            config.add_dtype_config(DTypeConfig(input_dtype=torch.qint32, output_dtype=torch.qint32))
    model = Model(*args, **kwargs).eval()
    lstm = model.my_lstm
    cell_inputs = torch.zeros(2, lstm.input_size), (torch.zeros(2, lstm.hidden_size), torch.zeros(2, lstm.hidden_size))

    class Observed(torch.ao.nn.quantizable.LSTM):
        @classmethod
        def from_float(cls, float_lstm: nn.LSTM) -> torch.ao.nn.quantizable.LSTM:  # type: ignore[override]
            observe = utilities._get_lstm_with_individually_observed_parts
            backend = backend_config if utilities is torchs else None
            return observe(float_lstm, cell_inputs, backend, split_gates=split_gates, **constructors)  # type: ignore[no-any-return]

    class Quantized(torch.ao.nn.quantized.LSTM):
        @classmethod
        def from_observed(cls, observed: torch.ao.nn.quantizable.LSTM) -> torch.ao.nn.quantized.LSTM:  # type: ignore[override]
            backend = backend_config if utilities is torchs else None
            return utilities._get_reference_quantized_lstm_module(observed, backend)  # type: ignore[no-any-return]

    inputs = model_inputs(model, 20, 4)
    prepare_config = PrepareCustomConfig().set_float_to_observed_mapping(nn.LSTM, Observed)
    convert_config = ConvertCustomConfig().set_observed_to_quantized_mapping(torch.ao.nn.quantizable.LSTM, Quantized)
    mapping = get_default_qconfig_mapping(engine)
    prepared = prepare_fx(model, mapping, inputs, prepare_config, backend_config=backend_config)
    for _ in range(3):
        prepared(*model_inputs(model, 20, 4))
    return convert_fx(prepared, convert_config, backend_config=backend_config)


def model_inputs(model: nn.Module, steps: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """``x [T, B, I]`` and states of ordinary size."""
    lstm: Any = model.my_lstm
    rows = lstm.num_layers * (2 if lstm.bidirectional else 1), batch
    h0, c0 = (
        0.3 * torch.randn(*rows, width) for width in (getattr(lstm, "proj_size", 0) or lstm.hidden_size, lstm.hidden_size)
    )
    return torch.randn(steps, batch, lstm.input_size), h0, c0


FUNCTIONS = (*GATES, "tanh_cy", "ogate_cy")
SOMETIMES = ("hx", "cx", "tanh_cy_input")


def mixed_lstm(seed: int, *, split_gates: bool, bias: bool, bidirectional: bool) -> torch.ao.nn.quantized.LSTM:
    """Made by our utilities with float32 in and out: each part on a grid of a random dtype and limits, or in float32."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    parts = [part for part in PARTS if part not in SOMETIMES or dice.random() < 0.3]
    constructors: dict[str, Any] = {f"{part}_obs_ctr": _constructor(dice, part) for part in parts}
    for weight in WEIGHTS:
        constructors[f"{weight}_obs_ctr"] = dice.choice(
            [
                FLOAT32,
                default_weight_observer,
                PerChannelMinMaxObserver.with_args(dtype=torch.qint8, quant_min=-127, quant_max=127),
                PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_channel_affine),
            ]
        )
    lstm = nn.LSTM(dice.randint(1, 20), dice.randint(1, 20), bias=bias, bidirectional=bidirectional).eval()
    lstm.qconfig = QConfig(activation=FLOAT32, weight=FLOAT32)
    observed = ours._get_lstm_with_individually_observed_parts(lstm, (), split_gates=split_gates, **constructors)
    for _ in range(3):
        observed(torch.randn(20, 4, lstm.input_size))
    return ours._get_reference_quantized_lstm_module(observed)


def _constructor(dice: random.Random, part: str) -> Any:
    if dice.random() < 0.2:
        return FLOAT32
    if dice.random() < 0.2 and part not in ("x", "hx", "ogate_cy"):
        step = 2**-12 if part in FUNCTIONS else 2**-9
        return FixedQParamsObserver.with_args(scale=step, zero_point=0, dtype=torch.qint32)
    dtype, limits, scheme = dice.choice(_GRIDS)
    return MinMaxObserver.with_args(dtype=dtype, quant_min=limits[0], quant_max=limits[1], qscheme=scheme)


_SYMMETRIC, _AFFINE = torch.per_tensor_symmetric, torch.per_tensor_affine
# torch.quantize_per_tensor adds the zero point in float32 before it rounds, which breaks ties another way where it is odd, and
# loses bits where it is large: 1 value in 500 in 16 bits. So grids of the quantized dtypes have even and small ones here.
_GRIDS = [
    (torch.quint8, (0, 255), _SYMMETRIC),
    (torch.quint8, (0, 128), _SYMMETRIC),
    (torch.qint8, (-128, 127), _SYMMETRIC),
    (torch.qint8, (-127, 127), _SYMMETRIC),
    (torch.qint32, (-2048, 2047), _SYMMETRIC),
    (torch.qint32, (-32768, 32767), _SYMMETRIC),
    (torch.uint8, (0, 255), _AFFINE),
    (torch.uint8, (0, 127), _AFFINE),
    (torch.int8, (-64, 63), _AFFINE),
    (torch.int16, (-2048, 2047), _AFFINE),
    (torch.int16, (-32768, 32767), _SYMMETRIC),
    (torch.int32, (0, 65535), _AFFINE),
]


def read_layers(lstm: Any) -> list[list[ReadCell]]:
    """Every cell of a converted LSTM."""
    names = ["layer_fw", "layer_bw"] if lstm.bidirectional else ["layer_fw"]
    return [
        [read_cell(getattr(layer, name).cell, f"lstm: layer {index} {name}") for name in names]
        for index, layer in enumerate(lstm.layers)
    ]


def grid_of(tensor: Tensor) -> QParams | None:
    """The grid of an 8-bit quantized tensor."""
    return QParams(tensor.q_scale(), tensor.q_zero_point(), *QUANTIZED_LIMITS[tensor.dtype]) if tensor.is_quantized else None


def assert_cell_follows(read: ReadCell, graph: GraphModule, x: Tensor, h: Tensor, c: Tensor) -> None:
    """Step by step from equal states: the integer reference on what was read, against the graph.

    Args:
        x: ``[T, B, input_size]``, and the states ``[B, hidden_size]``: quantized tensors where the graph takes such.
    """
    got_h, got_c, expected_h, expected_c = [], [], [], []
    for step, value in enumerate(x):
        cell = read.cell
        if read.outside:
            hx = grid_of(h) if step == 0 else cell.qparams.hx
            cell = replace(cell, qparams=replace(cell.qparams, x=grid_of(value), hx=hx))
        states = h.dequantize()[None], c.dequantize()[None]
        _, h_n, c_n = reference.lstm([[cell]], value.dequantize()[None], *states)
        with torch.no_grad():
            h, c = graph(value, (h, c))
        got_h.append(h_n[0])
        got_c.append(c_n[0])
        expected_h.append(h.dequantize())
        expected_c.append(c.dequantize())
    assert_near(torch.stack(got_h), torch.stack(expected_h), read.cell.h_grid)
    assert_near(torch.stack(got_c), torch.stack(expected_c), read.cell.qparams.fgate_cx_igate_cgate)


def assert_near(got: Tensor, expected: Tensor, grid: QParams | None, *, one_step: bool = False) -> None:
    """Unlike in at most 1 value of 1,000: in float32 that means a relative error beyond 1e-5.

    Args:
        one_step: values that are unlike may differ by one step of the grid only. (Where an inner part has coarser steps than
            the grid, one step there is many here.)
    """
    assert got.shape == expected.shape
    difference = (got - expected).abs()
    unlike = difference > (1e-5 * float(expected.abs().max()) if grid is None else 0.01 * grid.scale)
    assert unlike.sum() <= max(1, unlike.numel() // 1000), f"{int(unlike.sum())} of {unlike.numel()} differ"
    assert grid is None or not one_step or difference.max() <= 1.01 * grid.scale


@contextmanager
def torchs_own_functions() -> Iterator[None]:
    """The integer reference with torch's float32 sigmoid and tanh, as graphs have them, in place of correctly rounded ones.

    The two differ in a few entries of a table, which can be a good part of the values where a grid is coarse.
    """

    def function(name: str, v: Tensor, input_grid: QParams | None, output_grid: QParams | None) -> Tensor:
        value = torch.sigmoid(v) if name == "sigmoid" else torch.tanh(v)
        return value if output_grid is None else output_grid.dequantize(output_grid.quantize(value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_function", function)
        yield


@contextmanager
def torchs_own_rounding() -> Iterator[None]:
    """Grids that quantize as ``torch.quantize_per_tensor`` does: it adds the zero point in float32 before it rounds.

    ``quantized_decomposed`` and the numerics contract add it afterwards. With a zero point of 2**15 the sum has eight bits
    behind the point, so that 1 value in 500 goes to the neighbouring step.
    """

    def quantize(self: QParams, v: Tensor) -> Tensor:
        if self.bits > 8:
            steps = torch.round(v * self.inv_scale + self.zero_point)
        else:  # with one rounding
            steps = torch.round((v.double() * self.inv_scale + self.zero_point).float())
        return steps.clamp(self.quant_min, self.quant_max).to(torch.int32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QParams, "quantize", quantize)
        yield

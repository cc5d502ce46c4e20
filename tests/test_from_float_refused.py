"""from_float(): grids, cells and LSTMs that are none, by layer, direction and part, with what to give instead."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torch_lstm_quant as tlq
from torch_lstm_quant.qparams import WEIGHTS, CellQParams, QParams, WeightQParams

BYTE = {"scale": 0.02, "zero_point": 128, "dtype": torch.uint8}
PLAIN = {"x": BYTE, "ogate_cy": BYTE, "weight_ih": "per_channel", "weight_hh": "per_tensor"}
CELL = r"^LSTM\(5, 8\), layer 0, forward direction"
GIVEN = QParams(0.02, 128, 0, 255)
ROWS = [0.01] * 32
WEIGHT = {"scale": ROWS, "zero_point": 0, "dtype": "int8"}


def with_entry(rows: list[float], value: float) -> list[float]:
    return [*rows[:-1], value]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"xx": BYTE}, ": needs parts of x, hx, .* such as gates.input_gate, got 'xx'"),
        ({"x.forget_gate": BYTE}, ": needs parts of .*, got 'x.forget_gate'"),
        ({3: BYTE}, ": needs parts of .*, got 3"),
        ({"x": 3}, r", part x: needs a dict of scale, .*, a QParams, or None for float32, got 3"),
        ({"x": "shared"}, ", part x: needs a dict of .*, got 'shared'"),
        ({"x": {}}, ", part x: needs a scale, got nothing"),
        ({"x": {"scale": 0.1, "dtype": "uint8"}}, ", part x: needs a zero_point, got scale, dtype"),
        ({"x": {**BYTE, "zeropoint": 1}}, ", part x: needs a dict of scale, .*, got 'zeropoint'"),
        ({"x": {"scale": 0.1, "zero_point": 0}}, ", part x: needs quant_min and quant_max, or a dtype, got scale, zero_point"),
        ({"x": {"scale": 0.1, "zero_point": 0, "quant_min": 0}}, ", part x: needs quant_min and quant_max, or a dtype, got"),
        ({"x": {**BYTE, "dtype": "float16"}}, ", part x: dtype must be one of uint8, .*, got 'float16'"),
        ({"x": {**BYTE, "dtype": torch.int32}}, ", part x: a grid has at most 16 bits .*, got quant_min=-2147483648"),
        (
            {"x": {**BYTE, "quant_min": -128, "quant_max": 127}},
            r", part x: quant_min and quant_max must lie within uint8's \[0, 255\], got -128 and 127",
        ),
        ({"x": {**BYTE, "quant_min": 9, "quant_max": 9}}, ", part x: quant_min must be less than quant_max, got 9 and 9"),
        ({"x": {**BYTE, "scale": math.nan}}, ", part x: scale must be positive, finite, .*, got nan"),
        ({"x": {**BYTE, "scale": 0.0}}, ", part x: scale must be positive, .*, got 0.0"),
        ({"x": {**BYTE, "scale": -0.5}}, ", part x: scale must be positive, .*, got -0.5"),
        ({"x": {**BYTE, "scale": math.inf}}, ", part x: scale must be positive, .*, got inf"),
        ({"x": {**BYTE, "scale": 10**400}}, ", part x: scale must be a finite float, got an integer of 401 digits"),
        ({"x": {**BYTE, "zero_point": math.inf}}, ", part x: zero_point must be one int, got inf"),
        ({"weight_ih": {**WEIGHT, "scale": with_entry(ROWS, 10**400)}}, ", part weight_ih: scale must be a finite float, got"),
        ({"x": {**BYTE, "scale": 1e-40}}, ", part x: scale must be positive, .*, got 1e-40"),
        ({"x": {**BYTE, "scale": [0.1, 0.2]}}, r", part x: scale must be one float, got \[0.1, 0.2\]"),
        ({"x": {**BYTE, "scale": "0.1"}}, ", part x: scale must be one float, got '0.1'"),
        ({"x": {**BYTE, "zero_point": 256}}, r", part x: zero_point must lie in .* \[0, 255\], got 256"),
        ({"x": {**BYTE, "zero_point": 2**70}}, r", part x: zero_point must lie in .*, got 1180591620717411303424"),
        ({"x": {**BYTE, "zero_point": 1.5}}, ", part x: zero_point must be one int, got 1.5"),
        ({"x": {**BYTE, "zero_point": True}}, ", part x: zero_point must be one int, got True"),
        ({"x": replace(GIVEN, inv_scale=50.000004)}, r", part x: inv_scale must be 1 / scale .*, got 50.00000"),
        ({"x": {**BYTE, "dtype": "qint32"}}, ": part x is read by a projection or a function"),
        ({"ogate_cy": None, "hx": "same"}, ", part hx: needs a dict of .*, got 'same'"),
        ({"gates.forget_gate": {**BYTE, "scale": 0}}, ", part gates.forget_gate: scale must be positive"),
        ({"weight_ih": "per_row"}, ", part weight_ih: needs a dict of .*, 'per_channel' or 'per_tensor' .*, got 'per_row'"),
        ({"weight_ih": GIVEN}, ", part weight_ih: needs a dict of .*, a WeightQParams, .*, got QParams"),
        ({"weight_ih": {**WEIGHT, "scale": [0.1] * 8}}, ", part weight_ih: needs one scale, or 32, one a row, got 8"),
        (
            {"weight_ih": {**WEIGHT, "scale": torch.ones(4, 8)}},
            r", part .*: needs one scale, .*, got the shape \[4, 8\]: flatten",
        ),
        ({"weight_ih": {**WEIGHT, "scale": torch.ones(32, 1)}}, r", part .*, got the shape \[32, 1\]: flatten it to \[32\]"),
        ({"weight_ih": {**WEIGHT, "scale": np.ones((1, 32))}}, r", part .*, or 32, one a row, got the shape \[1, 32\]: flat"),
        ({"weight_ih": {**WEIGHT, "scale": ((0.1,),) * 32}}, r", part .*, got the shape \[32, 1\]: flatten it to \[32\]"),
        ({"weight_ih": {**WEIGHT, "zero_point": [[]]}}, r", part weight_ih: .*, got the shape \[1, 0\]: flatten"),
        ({"weight_ih": {**WEIGHT, "zero_point": [0] * 31}}, ", part weight_ih: needs one zero_point, or 32, .*, got 31"),
        (
            {"weight_ih": {**WEIGHT, "scale": with_entry(ROWS, math.nan)}},
            ", part weight_ih: weight scale .*, got nan in row 31",
        ),
        ({"weight_ih": {**WEIGHT, "scale": with_entry(ROWS, 0.0)}}, ", part weight_ih: weight scale .*, got 0.0 in row 31"),
        ({"weight_ih": {**WEIGHT, "scale": with_entry(ROWS, -1.0)}}, ", part weight_ih: weight scale .*, got -1.0 in row 31"),
        ({"weight_ih": {**WEIGHT, "scale": 1e300}}, ", part weight_ih: weight scale .*, got inf in row 0"),
        ({"weight_hh": {**WEIGHT, "zero_point": 128}}, r", part weight_hh: zero_point .* \[-128, 127\], got 128 in row 0"),
        ({"weight_hh": {**WEIGHT, "zero_point": 2**32}}, ", part weight_hh: zero_point .*, got 4294967296 in row 0"),
        ({"weight_hh": {**WEIGHT, "zero_point": [0.0] * 32}}, ", part weight_hh: zero_point must be one int, got 0.0"),
        ({"weight_hh": {**WEIGHT, "dtype": "uint8"}}, r", part weight_hh: weight limits must lie in \[-128, 127\], got .*255"),
        (
            {"weight_hh": WeightQParams(torch.ones(16), torch.zeros(16, dtype=torch.int32))},
            ", part weight_hh: needs 32 scales, one a row, got 16",
        ),
    ],
)
def test_grids_that_are_none_are_refused(parts: dict[Any, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=CELL + message):
        tlq.from_float(nn.LSTM(5, 8), {"l0": {**PLAIN, **parts}})


@pytest.mark.parametrize("missing", WEIGHTS[:2])
def test_weights_must_be_there(missing: str) -> None:
    parts = {name: grid for name, grid in PLAIN.items() if name != missing}
    with pytest.raises(ValueError, match=f"{CELL}: needs {missing}, got x, ogate_cy, weight_.*: give its grid, .* or None"):
        tlq.from_float(nn.LSTM(5, 8), {"l0": parts})


def test_second_grids_are_refused() -> None:
    gates = (GIVEN,) * 4
    with pytest.raises(ValueError, match=f"{CELL}: second grids cannot be given, got gates_again"):
        tlq.from_float(nn.LSTM(5, 8), {"": CellQParams(gates=gates, gates_again=gates)})


def test_messages_name_layer_and_direction() -> None:
    bad = {**PLAIN, "x": {**BYTE, "scale": 0}}
    with pytest.raises(ValueError, match=r"^LSTM\(5, 8\), layer 1, backward direction, part x: scale must be"):
        tlq.from_float(nn.LSTM(5, 8, num_layers=2, bidirectional=True), {"": PLAIN, "l1_reverse": bad})


@pytest.mark.parametrize(
    ("qparams", "message"),
    [
        ({"l0": PLAIN}, "qparams must have all of l0, l0_reverse, or '' for the rest, got 'l0'"),
        ({}, "qparams must have all of l0, l0_reverse, or '' for the rest, got none"),
        ({"": PLAIN, "l1": PLAIN}, "qparams must be for l0, l0_reverse, or '' for the rest, got 'l1'"),
        (PLAIN, "qparams must be for l0, .*, got a part, 'x': put the grids of a cell under its name, {\"\": grids}"),
        ({"gates.cell_gate": None}, "got a part, 'gates.cell_gate': put"),
        (CellQParams(), 'to their grids, got a CellQParams: put the grids of a cell under its name, {"": grids}'),
        ([PLAIN], r"qparams must be a dict from cells \(l0, l0_reverse, or '' for the rest\) to their grids, got"),
        ({"": [PLAIN]}, "layer 0, forward direction: needs a dict from parts to grids, or a CellQParams, got"),
    ],
)
def test_cells_that_are_missing_or_are_none_are_refused(qparams: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tlq.from_float(nn.LSTM(5, 8, bidirectional=True), qparams)


def test_lstms_that_cannot_be_quantized_are_refused() -> None:
    with pytest.raises(TypeError, match=r"takes one nn\.LSTM or nn\.LSTMCell, got GRU: other modules cannot"):
        tlq.from_float(nn.GRU(5, 8), {"": PLAIN})  # type: ignore[arg-type]
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "first": nn.LSTM(5, 8), "second": nn.LSTMCell(8, 8)})
    with pytest.raises(TypeError, match=r"got ModuleDict: pass one of its LSTMs, and put .* in its place: first, second"):
        tlq.from_float(model, {"": PLAIN})  # type: ignore[arg-type]
    lstm = nn.LSTM(5, 8)
    lstm.bias_ih_l0.data[3] = math.nan
    with pytest.raises(ValueError, match="bias_ih_l0 must be finite"):
        tlq.from_float(lstm, {"": PLAIN})
    with pytest.raises(ValueError, match="backend must be one of 'fused', 'reference', got 'fast'"):
        tlq.from_float(nn.LSTM(5, 8), {"": PLAIN}, "fast")

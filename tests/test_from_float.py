"""from_float(): the bits of calibrating and converting to the same grids, and ways to write them down."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed_lstms import flat
from random_cells import PRESETS, Dice, random_input, random_qparams
from torch import Tensor, nn
from torch.ao.quantization import FixedQParamsObserver, MinMaxObserver, PerChannelMinMaxObserver

import torch_lstm_quant as tlq
from torch_lstm_quant import LSTMQConfig
from torch_lstm_quant.observed import ReferenceLSTM
from torch_lstm_quant.qparams import GATES, PER_GATE_PARTS, SECOND_GRIDS, WEIGHTS, CellQParams, QParams, WeightQParams

X = torch.randn(9, 3, 5, generator=torch.Generator().manual_seed(0))
BYTE = {"scale": 0.02, "zero_point": 128, "dtype": torch.uint8}
PLAIN = {"x": BYTE, "ogate_cy": BYTE, "weight_ih": "per_channel", "weight_hh": "per_tensor"}

any_seed = st.integers(0, 2**32 - 1)


def taken_out(fused: tlq.LSTM) -> dict[str, CellQParams]:
    """The grids of a fused LSTM, by cell."""
    directions = ("", "_reverse") if fused.bidirectional else ("",)
    return {
        f"l{layer}{direction}": cell.qparams
        for layer, cells in enumerate(fused.cells())
        for direction, cell in zip(directions, cells, strict=True)
    }


def written_down(qparams: CellQParams, dice: Dice, projects: bool) -> dict[str, Any]:
    """As a user would write it, with Python's numbers, torch's or numpy's; grids that are the default left out."""
    weights = WEIGHTS if projects else WEIGHTS[:2]

    def fields(grid: QParams | WeightQParams) -> dict[str, Any]:
        scale, zero_point = grid.scale, grid.zero_point
        if isinstance(scale, Tensor):
            assert isinstance(zero_point, Tensor)
            form: Any = dice.one_of([Tensor.tolist, Tensor.numpy, Tensor.clone])
            scale, zero_point = form(scale), form(zero_point)
        elif dice.chance(0.3):
            scale, zero_point = np.float32(scale), np.int64(zero_point)
        elif dice.chance(0.3):
            scale, zero_point = torch.tensor(scale), torch.tensor([zero_point])
        return {"scale": scale, "zero_point": zero_point, "quant_min": grid.quant_min, "quant_max": grid.quant_max}

    names = [name for name, _ in qparams.rows() if not name.startswith(SECOND_GRIDS)]
    grids: dict[str, Any] = dict(qparams.rows()) | {name: getattr(qparams, name) for name in (*weights, "hy")}
    written = {name: None if grids[name] is None else fields(grids[name]) for name in (*names, *weights)}
    for part in PER_GATE_PARTS:
        if len(set(getattr(qparams, part))) == 1:
            written[part] = written[f"{part}.{GATES[0]}"]
            for gate in GATES:
                del written[f"{part}.{gate}"]
    for part, source in (("hx", "hy" if projects else "ogate_cy"), ("cx", "fgate_cx_igate_cgate")):
        if grids[part] == grids[source]:
            del written[part]
    return {name: grid for name, grid in written.items() if grid is not None or name in ("hx", "cx", *weights)}


def random_lstm(dice: Dice) -> nn.LSTM:
    hidden_size = dice.integer(1, 20)
    return nn.LSTM(
        dice.integer(1, 20),
        hidden_size,
        proj_size=dice.integer(0, hidden_size - 1) if dice.chance(0.4) else 0,
        num_layers=dice.integer(1, 2),
        bidirectional=dice.chance(0.5),
        bias=dice.chance(0.7),
        batch_first=dice.chance(0.5),
    ).eval()


def random_config(dice: Dice, lstm: nn.LSTM) -> LSTMQConfig:
    """Random grids for each cell and weight, as constructors."""
    config = LSTMQConfig()
    for layer in range(lstm.num_layers):
        for direction in ("forward", "backward") if lstm.bidirectional else ("forward",):
            override: Any = partial(config.override, layer, direction)
            qparams = random_qparams(dice, lstm.hidden_size, lstm.proj_size)
            single = {name: grid for name, grid in qparams.rows() if "." not in name}
            config = override(
                **{name: fixed(grid) for name, grid in single.items()},
                **{part: fixed(getattr(qparams, part)[0]) for part in PER_GATE_PARTS},
                **{weight: random_weight_constructor(dice) for weight in WEIGHTS},
            )
            for part in PER_GATE_PARTS:
                for gate, grid in zip(GATES, getattr(qparams, part), strict=True):
                    if grid != getattr(qparams, part)[0]:
                        name: Any = gate.removesuffix("_gate")
                        config = config.override(layer, direction, name, **{part: fixed(grid)})  # type: ignore[arg-type]
    return config


def fixed(grid: QParams | None) -> Any:
    if grid is None:
        return None
    if grid.unbounded:
        return FixedQParamsObserver.with_args(scale=grid.scale, zero_point=grid.zero_point, dtype=torch.qint32)
    limits = {"quant_min": grid.quant_min, "quant_max": grid.quant_max, "dtype": grid.dtype}
    return FixedQParamsObserver.with_args(scale=grid.scale, zero_point=grid.zero_point, **limits)


def random_weight_constructor(dice: Dice) -> object:
    symmetric = {"qscheme": torch.per_tensor_symmetric, "dtype": torch.qint8}
    return dice.one_of(
        [
            None,
            MinMaxObserver.with_args(**symmetric),
            MinMaxObserver.with_args(qscheme=torch.per_tensor_affine, dtype=torch.qint8),
            PerChannelMinMaxObserver.with_args(dtype=torch.qint8, quant_min=-127, quant_max=127),
            PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_affine),
        ]
    )


def assert_same(got: nn.Module, expected: nn.Module, dice: Dice) -> None:
    """Outputs and states for batched and unbatched input, with and without states."""
    assert isinstance(got, tlq.LSTM)
    assert isinstance(expected, tlq.LSTM)
    assert (got.batch_first, got.dropout, got.bias) == (expected.batch_first, expected.dropout, expected.bias)
    cells, width = got.num_layers * (2 if got.bidirectional else 1), got.proj_size or got.hidden_size
    for rows in ((), (dice.integer(1, 4),)):
        steps = (*rows, 7) if got.batch_first else (7, *rows)
        x = random_input(dice, *steps, got.input_size)
        hx = dice.normal(cells, *rows, width), dice.normal(cells, *rows, got.hidden_size)
        for call in ((x,), (x, hx)):
            for mine, its in zip(flat(got(*call)), flat(expected(*call)), strict=True):
                assert torch.equal(mine.nan_to_num(7.0), its.nan_to_num(7.0))


@pytest.mark.filterwarnings("ignore::torch_lstm_quant.LossWarning")
@settings(max_examples=15, deadline=None)
@given(any_seed)
def test_the_bits_of_observing_calibrating_converting_and_lowering(seed: int) -> None:
    dice = Dice(seed)
    torch.manual_seed(seed)
    lstm = random_lstm(dice)
    preset = dice.one_of([*PRESETS, None, None, None])
    config = getattr(LSTMQConfig, str(preset))() if preset else random_config(dice, lstm)
    converted: Any = tlq.quantize(lstm, [dice.normal(4, 3, lstm.input_size)], config)
    qparams = taken_out(converted)
    assert_same(tlq.from_float(lstm, qparams), converted, dice)
    written = {name: written_down(one, dice, lstm.proj_size > 0) for name, one in qparams.items()}
    reference = tlq.from_float(lstm, written, "reference")
    assert isinstance(reference, ReferenceLSTM)
    assert_same(tlq.from_float(lstm, written), converted, dice)
    assert_same(tlq.lower(reference), converted, dice)


def test_the_reference_gives_what_the_fused_does_to_a_step() -> None:
    lstm = nn.LSTM(5, 8)
    byte = {"scale": 1 / 127, "zero_point": 128, "dtype": "uint8"}
    qparams = {"": {**PLAIN, "ogate_cy": byte}}
    output, _ = tlq.from_float(lstm, qparams, "reference")(X)
    expected, _ = tlq.from_float(lstm, qparams)(X)
    assert (output - expected).abs().max() <= 1.001 / 127
    assert (expected - lstm(X)[0]).abs().max() < 0.05


def test_the_float_lstm_is_left_as_it_is_and_shares_nothing() -> None:
    lstm = nn.LSTM(5, 8, num_layers=2, dropout=0.25).train()
    before = copy.deepcopy(lstm.state_dict())
    qparams = {"": {**PLAIN, "weight_ih": None, "weight_hh": None}}
    fused, reference = tlq.from_float(lstm, qparams), tlq.from_float(lstm, qparams, "reference")
    assert lstm.training
    assert not fused.training
    assert not reference.training
    assert (fused.dropout, reference.dropout) == (0.25, 0.25)
    assert all(torch.equal(value, before[name]) for name, value in lstm.state_dict().items())
    outputs = [module(X)[0] for module in (fused, reference)]
    lstm.weight_hh_l0.data.zero_()
    assert all(torch.equal(module(X)[0], output) for module, output in zip((fused, reference), outputs, strict=True))


def test_cells_are_named_as_parameters_are_and_the_rest_is_for_the_others() -> None:
    narrow, wide = {**PLAIN, "x": {**BYTE, "scale": 0.01}}, {**PLAIN, "x": {**BYTE, "scale": 0.5}}
    fused: Any = tlq.from_float(nn.LSTM(5, 8, num_layers=2, bidirectional=True), {"": PLAIN, "l0_reverse": narrow, "l1": wide})
    scales = [[round(cell.qparams.x.scale, 6) for cell in cells] for cells in fused.cells()]
    assert scales == [[0.02, 0.01], [0.5, 0.02]]


def test_states_have_the_grids_that_write_them_unless_they_are_given_others() -> None:
    state = {"scale": 2**-11, "zero_point": 0, "dtype": torch.int16}
    cell = {**PLAIN, "fgate_cx_igate_cgate": state}

    def grids(**parts: Any) -> CellQParams:
        fused: Any = tlq.from_float(nn.LSTM(5, 8), {"l0": {**cell, **parts}})
        qparams: CellQParams = fused.cells()[0][0].qparams
        return qparams

    for qparams in (grids(), grids(hx="shared", cx="shared")):
        assert (qparams.hx, qparams.cx) == (qparams.ogate_cy, qparams.fgate_cx_igate_cgate)
        assert None not in (qparams.hx, qparams.cx)
    assert (grids(hx=None).hx, grids(cx=None).cx) == (None, None)
    other = {**BYTE, "scale": 0.25}
    assert grids(hx=other).hx == QParams(0.25, 128, 0, 255)


def test_one_gate_of_a_part_wins_over_the_part() -> None:
    four, own = {"scale": 0.01, "zero_point": 0, "dtype": "int16"}, {"scale": 0.5, "zero_point": 3, "dtype": "int8"}
    cell = {**PLAIN, "gates": four, "gates.forget_gate": own, "gates.cell_gate": None, "igates.input_gate": own}
    fused: Any = tlq.from_float(nn.LSTM(5, 7), {"": cell})
    qparams = fused.cells()[0][0].qparams
    wide, narrow = QParams(0.01, 0, -32768, 32767), QParams(0.5, 3, -128, 127)
    assert qparams.gates == (wide, narrow, None, wide)
    assert qparams.igates == (narrow, None, None, None)


@pytest.mark.parametrize("split", [{}, {"gates.input_gate": {**BYTE, "scale": 0.1}}])
def test_computed_weights_have_one_grid_a_row_or_one_for_all(split: Mapping[str, Any]) -> None:
    lstm = nn.LSTM(5, 7)
    fused: Any = tlq.from_float(lstm, {"": {**PLAIN, **split}})
    cell = fused.cells()[0][0]
    largest = lstm.weight_ih_l0.detach().abs().amax(1)
    assert torch.allclose(cell.qparams.weight_ih.scale, largest / 127, rtol=1e-6)
    assert torch.equal(cell.weight_ih.abs().amax(1), torch.full((28,), 127))
    largest = lstm.weight_hh_l0.detach().abs().max()
    assert torch.allclose(cell.qparams.weight_hh.scale, largest / 127, rtol=1e-6)
    assert len(cell.qparams.weight_hh.scale.unique()) == 1


@pytest.mark.parametrize("split", [{}, {"gates.input_gate": {**BYTE, "scale": 0.1}}])
def test_a_cell_gives_what_an_lstm_of_one_step_does(split: Mapping[str, Any]) -> None:
    lstm, cell = nn.LSTM(5, 7), nn.LSTMCell(5, 7)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    qparams = {"": {**PLAIN, **split}}
    fused, reference = tlq.from_float(cell, qparams), tlq.from_float(cell, qparams, "reference")
    assert isinstance(fused, tlq.LSTMCell)
    states = torch.randn(2, 3, 7)
    output, (h_n, c_n) = tlq.from_float(lstm, qparams)(X[:1], (states[:1], states[1:]))
    for module in (fused, tlq.lower(reference)):
        h, c = module(X[0], (states[0], states[1]))
        assert torch.equal(h, output[0])
        assert torch.equal(h, h_n[0])
        assert torch.equal(c, c_n[0])
    with pytest.raises(ValueError, match=r"^LSTMCell\(5, 7\): qparams must be for '' for the cell, got 'l0'"):
        tlq.from_float(cell, {"l0": PLAIN})
    with pytest.raises(ValueError, match=r"^LSTMCell\(5, 7\), part x: scale must be positive"):
        tlq.from_float(cell, {"": {**PLAIN, "x": {**BYTE, "scale": 0}}})


def test_weights_beyond_a_given_grid_are_cut() -> None:
    lstm = nn.LSTM(5, 8)
    grid = {"scale": 0.001, "zero_point": 0, "quant_min": -8, "quant_max": 7}
    fused: Any = tlq.from_float(lstm, {"": {**PLAIN, "weight_ih": grid}})
    expected = torch.round(lstm.weight_ih_l0.detach() / 0.001).clamp(-8, 7).to(torch.int8)
    assert torch.equal(fused.cells()[0][0].weight_ih, expected)
    # so that its grids, read and given again, cut the same
    assert "[-8, 7] per tensor scale=0.001" in str(fused.cells()[0][0].qparams)
    again: Any = tlq.from_float(lstm, {"": fused.cells()[0][0].qparams})
    assert torch.equal(again.cells()[0][0].weight_ih, expected)


@pytest.mark.parametrize("make", [LSTMQConfig.int8, partial(LSTMQConfig.int8, qat=True)])
def test_a_cell_shows_the_limits_that_its_configuration_shows(make: Any) -> None:
    with torch.no_grad():
        observed = tlq.prepare(nn.LSTM(5, 8), make())
        observed(X)
    fused: Any = tlq.convert(observed.eval())
    for text in (str(make()), str(fused.cells()[0][0].qparams)):
        assert all("[-127, 127]" in line for line in text.splitlines() if line.startswith("weight"))


@pytest.mark.parametrize(
    ("dtype", "limits"),
    [("uint8", (0, 255)), (torch.qint8, (-128, 127)), (torch.int16, (-32768, 32767)), ("uint16", (0, 65535))],
)
def test_a_dtype_gives_the_limits(dtype: Any, limits: tuple[int, int]) -> None:
    fused: Any = tlq.from_float(nn.LSTM(5, 8), {"": {**PLAIN, "x": {"scale": 0.1, "zero_point": 7, "dtype": dtype}}})
    assert fused.cells()[0][0].qparams.x == QParams(0.1, 7, *limits)


def test_qint32_without_limits_has_none() -> None:
    unlimited = {"scale": 2**-11, "zero_point": 0, "dtype": torch.qint32}
    fused: Any = tlq.from_float(nn.LSTM(5, 8), {"": {**PLAIN, "fgate_cx": unlimited}})
    assert fused.cells()[0][0].qparams.fgate_cx.unbounded

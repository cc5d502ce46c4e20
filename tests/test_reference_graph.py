"""Reading converted graphs: what is read computes what the graph does, whoever made it; what cannot be read is named."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines the ops
from converted_lstms import (
    FLOAT32,
    TORCHS_OWN_CONSTRUCTORS,
    assert_cell_follows,
    assert_near,
    converted_model,
    mixed_lstm,
    read_layers,
    torchs,
    torchs_own_functions,
    torchs_own_rounding,
    torchs_warnings,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import FixedQParamsObserver, MinMaxObserver, QConfig
from torch.fx import GraphModule

from torch_lstm_quant import lstm_utils as ours
from torch_lstm_quant import reference
from torch_lstm_quant.observed import ObservedLSTM, ReferenceLSTM
from torch_lstm_quant.qconfig import LSTMQConfig
from torch_lstm_quant.qparams import GATES, UNBOUNDED, QParams
from torch_lstm_quant.reference_graph import read_cell

pytestmark = torchs_warnings

SEEDS = st.integers(0, 2**31)


@settings(max_examples=16)
@given(SEEDS, st.booleans(), st.booleans(), st.booleans())
def test_any_mix_of_parts_dtypes_and_limits(seed: int, split_gates: bool, bias: bool, bidirectional: bool) -> None:
    lstm = mixed_lstm(seed, split_gates=split_gates, bias=bias, bidirectional=bidirectional)
    layer: Any = lstm.layers[0]
    for read, name in zip(read_layers(lstm)[0], ("layer_fw", "layer_bw"), strict=False):
        assert not read.outside
        x, states = torch.randn(20, 16, lstm.input_size), 0.5 * torch.randn(2, 16, lstm.hidden_size)
        with torchs_own_functions():
            assert_cell_follows(read, getattr(layer, name).cell, x, states[0], states[1])


@settings(max_examples=8)
@given(
    SEEDS,
    st.sampled_from(["int8", "int8_gates16", "fixed16", "all_int8"]),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)
def test_presets(seed: int, preset: str, layers: int, bidirectional: bool, bias: bool) -> None:
    torch.manual_seed(seed)
    lstm = nn.LSTM(9, 12, layers, bidirectional=bidirectional, bias=bias).eval()
    observed = ObservedLSTM.from_float(lstm, getattr(LSTMQConfig, preset)())
    for _ in range(3):
        observed(torch.randn(20, 4, 9))
    converted = ReferenceLSTM.from_observed(observed)
    cells = [[read.cell for read in cells] for cells in read_layers(converted)]
    grids = [cell.qparams for cells in cells for cell in cells]
    states = 0.3 * torch.randn(2, len(grids), 4, 12)
    for steps in (1, 60):
        x = torch.randn(steps, 4, 9)
        with torch.no_grad():
            output, (h_n, c_n) = converted(x, (states[0], states[1]))
        # a cell state remembers each table entry in which torch's functions differ: over many steps it must not count them
        with torchs_own_functions() if steps > 1 else nullcontext():
            got = reference.lstm(cells, x, states[0], states[1])
        assert_near(got[0], output, grids[-1].ogate_cy, one_step=True)
        for index, grid in enumerate(grids):
            assert_near(got[1][index], h_n[index], grid.ogate_cy, one_step=True)
            assert_near(got[2][index], c_n[index], grid.fgate_cx_igate_cgate)


@pytest.mark.parametrize(
    ("constructors", "engine", "split_gates"),
    [
        ("defaults", "qnnpack", False),
        ("defaults", "x86", True),
        ("16 bit in qint32", "qnnpack", False),
        ("8 bit functions", "qnnpack", True),
        ("qint8 states", "qnnpack", False),
    ],
)
@pytest.mark.parametrize("utilities", [torchs, ours])
def test_quantized_boundary_of_torchs_flow(utilities: Any, constructors: str, engine: str, split_gates: bool) -> None:
    arguments = TORCHS_OWN_CONSTRUCTORS[constructors]
    model = converted_model(utilities, arguments, 9, 12, split_gates=split_gates, engine=engine)
    graph = model.my_lstm.layers[0].layer_fw.cell
    read = read_cell(graph, "my_lstm")
    assert read.outside == {"x", "hx", "cx"}
    assert read.h_dtype in (torch.quint8, torch.qint8)
    x = torch.quantize_per_tensor(torch.randn(40, 8, 9), 0.03, 100, torch.quint8)
    h = torch.quantize_per_tensor(0.3 * torch.randn(8, 12), 0.01, 110, torch.quint8)
    c = torch.quantize_per_tensor(0.3 * torch.randn(8, 12), 0.02, 90, torch.quint8)
    # in torch's example the 16-bit grids have zero points of 2**15, with which torch.quantize_per_tensor rounds in its own way
    with torchs_own_rounding() if constructors == "16 bit in qint32" else nullcontext():
        assert_cell_follows(read, graph, x, h, c)


def test_gates_that_torch_quantizes_twice() -> None:
    def again(constructors: str) -> tuple[list[bool], list[bool]]:
        model = converted_model(torchs, TORCHS_OWN_CONSTRUCTORS[constructors], 9, 12)
        qparams = read_cell(model.my_lstm.layers[0].layer_fw.cell, "my_lstm").cell.qparams
        return [grid is not None for grid in qparams.gates_again], [grid is not None for grid in qparams.outputs_again]

    assert again("defaults") == ([False] * 4, [False] * 4)
    # the functions' grids hold every value of the gates' grid, so the second quantization there changes nothing
    assert again("16 bit in qint32") == ([False] * 4, [True] * 4)
    assert again("8 bit functions") == ([True] * 4, [False] * 4)


def float_cell_with(bias: bool = True, **constructors: Any) -> GraphModule:
    """A converted cell of 2 inputs and 3 hidden units, in float32 but for the parts that ``constructors`` quantize.

    Its weights are small integers, so that sums of them are exact.
    """
    lstm = nn.LSTM(2, 3, bias=bias).eval()
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(torch.arange(24).view(12, 2) % 5 - 2)
        lstm.weight_hh_l0.copy_(torch.arange(36).view(12, 3) % 3 - 1)
    lstm.qconfig = QConfig(activation=FLOAT32, weight=FLOAT32)
    constructors = {f"{part}_obs_ctr": constructor for part, constructor in constructors.items()}
    observed = ours._get_lstm_with_individually_observed_parts(lstm, (), **constructors)
    observed(torch.randn(4, 2, 2))
    converted: Any = ours._get_reference_quantized_lstm_module(observed)
    return converted.layers[0].layer_fw.cell  # type: ignore[no-any-return]


def a_scale_with_two_inverses() -> float:
    """A float64 scale for which 1 / scale in float32 depends on whether the scale is rounded to float32 first."""
    scales = (0.01 + 1e-5 * step for step in range(1000))
    return next(s for s in scales if torch.tensor(1.0 / s) != torch.tensor(1.0 / float(torch.tensor(s))))


@pytest.mark.parametrize("dtype", [torch.int8, torch.qint8])
def test_the_inverse_of_a_scale_is_the_graphs(dtype: torch.dtype) -> None:
    """torch.quantize_per_tensor rounds the scale to float32 and inverts it, the decomposed op the other way round."""
    scale = a_scale_with_two_inverses()
    cell = float_cell_with(x=MinMaxObserver.with_args(dtype=dtype))
    for node in cell.graph.nodes:
        if "quantize_per_tensor" in str(node.target):
            node.args = (node.args[0], scale, 0, *node.args[3:])
    halves = (torch.arange(-128, 127) + 0.5) * scale
    values = torch.cat([halves, torch.nextafter(halves, torch.tensor(9.0)), torch.nextafter(halves, torch.tensor(-9.0))])
    native = torch.quantize_per_tensor(values, scale, 0, torch.qint8).int_repr()
    decomposed = torch.ops.quantized_decomposed.quantize_per_tensor(values, scale, 0, -128, 127, torch.int8)
    assert not torch.equal(native, decomposed)
    grid = read_cell(cell, "cell").cell.qparams.x
    assert grid is not None
    assert torch.equal(grid.quantize(values), native if dtype == torch.qint8 else decomposed)


UNLIMITED = FixedQParamsObserver.with_args(scale=2**-9, zero_point=0, dtype=torch.qint32)
UNIT = FixedQParamsObserver.with_args(scale=2**-15, zero_point=0, quant_min=-32768, quant_max=32768, dtype=torch.int32)
FUNCTIONS = dict.fromkeys((*GATES, "tanh_cy"), UNIT)
EXTREMES = torch.tensor([0.0, 2**-9, 0.5, 3, 10.5, 11, 12, 20, 100, 1000.5, 2**17])


def test_gates_without_limits_are_cut_where_nothing_changes() -> None:
    graph = float_cell_with(bias=False, gates=UNLIMITED, **FUNCTIONS)
    read = read_cell(graph, "cell")
    for grid in read.cell.qparams.gates:
        assert grid.quant_max - grid.quant_min < 1 << 14
    x = torch.cartesian_prod(torch.cat([EXTREMES, -EXTREMES]), torch.cat([EXTREMES, -EXTREMES]))
    states = torch.zeros(1, len(x), 3), torch.ones(1, len(x), 3)
    h, c = graph(x, (states[0][0], states[1][0]))
    with torchs_own_functions():
        _, got_h, got_c = reference.lstm([[read.cell]], x[None], *states)
    assert torch.equal(got_h[0], h)
    assert torch.equal(got_c[0], c)


@pytest.mark.parametrize("functions", [FUNCTIONS, {}], ids=["quantized", "float32"])
def test_a_cell_state_without_limits_and_the_tanh_of_it(functions: dict[str, Any]) -> None:
    graph = float_cell_with(bias=False, fgate_cx=UNLIMITED, igate_cgate=UNLIMITED, fgate_cx_igate_cgate=UNLIMITED, **functions)
    read = read_cell(graph, "cell")
    state, tanh_input = read.cell.qparams.fgate_cx_igate_cgate, read.cell.qparams.tanh_cy_input
    assert (state.quant_min, state.quant_max) == (-UNBOUNDED, UNBOUNDED)
    assert (tanh_input.scale, tanh_input.zero_point) == (state.scale, state.zero_point)
    assert tanh_input.quant_max < 1 << 13
    c = torch.cat([EXTREMES[:-1], -EXTREMES[:-1], torch.tensor([16000.0, -16000.0])])[:, None].expand(-1, 3)
    x, h = torch.zeros(len(c), 2), torch.zeros(len(c), 3)
    new_h, new_c = graph(x, (h, c))
    with torchs_own_functions():
        _, got_h, got_c = reference.lstm([[read.cell]], x[None], h[None], c[None])
    assert torch.equal(got_h[0], new_h)
    assert torch.equal(got_c[0], new_c)


def test_a_hidden_state_without_limits_is_cut_where_no_product_comes() -> None:
    sixteen_bit = FixedQParamsObserver.with_args(scale=2**-15, zero_point=0, dtype=torch.qint32)
    model = converted_model(ours, {"hidden_state_obs_ctr": sixteen_bit}, 9, 12)
    graph = model.my_lstm.layers[0].layer_fw.cell
    read = read_cell(graph, "my_lstm")
    grid = read.cell.qparams.ogate_cy
    assert read.cell.qparams.hx == grid
    assert read.h_dtype == torch.qint32
    # min-max observers of functions leave their outputs below 1
    assert 1 << 13 < grid.quant_max == -grid.quant_min < 1 << 15
    h, c = (torch.quantize_per_tensor(0.2 * torch.randn(8, 12), 0.01, 110, torch.quint8) for _ in range(2))
    assert_cell_follows(read, graph, torch.quantize_per_tensor(9 * torch.randn(40, 8, 9), 0.1, 100, torch.quint8), h, c)


def test_an_observer_that_torch_left_in_its_graph_is_named() -> None:
    sixteen_bit = MinMaxObserver.with_args(dtype=torch.int16, quant_min=-32768, quant_max=32767)
    model = converted_model(torchs, {"cell_state_obs_ctr": sixteen_bit}, 9, 12)
    with pytest.raises(ValueError, match=r"my_lstm, node 'activation_post_process_.*': found MinMaxObserver, which is still"):
        read_cell(model.my_lstm.layers[0].layer_fw.cell, "my_lstm")


def test_narrow_limits_of_quantized_dtypes() -> None:
    observer = FixedQParamsObserver.with_args(scale=0.25, zero_point=4, quant_min=3, quant_max=9, dtype=torch.quint8)
    assert read_cell(float_cell_with(x=observer), "cell").cell.qparams.x == QParams(0.25, 4, 3, 9)

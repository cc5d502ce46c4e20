"""The two LSTM utilities: what they observe, and the graphs and values that come of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed_lstms import (
    BATCH,
    FLOAT,
    FLOAT32,
    HIDDEN,
    INPUT,
    NODE_OF_PART,
    STATIC,
    convert,
    data,
    directions,
    fixed,
    flat,
    float_lstm,
    no_warnings,
    observe,
    quantized,
    quantizes,
    without_deprecation,
)
from torch import nn
from torch.ao.quantization import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    default_weight_observer,
)
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.ao.quantization.observer import ObserverBase
from torch.fx import GraphModule

from torch_lstm_quant import lstm_utils as ours
from torch_lstm_quant import reference
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qconfig import LSTMQConfig
from torch_lstm_quant.qparams import PARTS, PER_GATE_PARTS, CellQParams, QParams, WeightQParams


@no_warnings
class TestFloat:
    @given(
        layers=st.integers(1, 3),
        bidirectional=st.booleans(),
        bias=st.booleans(),
        batch_first=st.booleans(),
        split_gates=st.booleans(),
        states=st.booleans(),
        sizes=st.tuples(*[st.integers(1, 6)] * 4),
    )
    @settings(max_examples=30)
    def test_all_parts_float_is_the_float_lstm(
        self,
        layers: int,
        bidirectional: bool,
        bias: bool,
        batch_first: bool,
        split_gates: bool,
        states: bool,
        sizes: tuple[int, int, int, int],
    ) -> None:
        steps, batch, input_size, hidden_size = sizes
        lstm = nn.LSTM(input_size, hidden_size, layers, bias, batch_first, bidirectional=bidirectional).eval()
        lstm.qconfig = FLOAT
        x = data(batch, steps, input_size) if batch_first else data(steps, batch, input_size)
        state_shape = (layers * (1 + bidirectional), batch, hidden_size)
        hidden = (data(*state_shape), data(*state_shape)) if states else None
        observed = observe(lstm, split_gates=split_gates)
        assert type(observed) is torch.ao.nn.quantizable.LSTM
        converted = ours._get_reference_quantized_lstm_module(observed)
        expected, (h_n, c_n) = lstm(x, hidden)
        for module in (observed, converted):
            output, (h, c) = module(x, hidden)
            torch.testing.assert_close((output, h, c), (expected, h_n, c_n), rtol=1e-5, atol=1e-6)

    def test_dropout_between_layers_while_training(self) -> None:
        lstm = float_lstm(num_layers=2, dropout=1.0)
        observed, x = observe(lstm), data()
        torch.testing.assert_close(observed(x), lstm(x))
        observed.train()
        torch.testing.assert_close(observed(x), lstm.train()(x))

    @pytest.mark.parametrize("training", [False, True])
    def test_the_float_lstm_and_the_random_state_are_left_as_they_are(self, training: bool) -> None:
        lstm = float_lstm(STATIC, num_layers=2, dropout=0.5).train(training)
        before, random_state = copy.deepcopy(lstm.state_dict()), torch.get_rng_state()
        observed = observe(lstm)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert observed.training == training
        torch.testing.assert_close(lstm.state_dict(), before, rtol=0, atol=0)


@no_warnings
class TestEachPart:
    @pytest.mark.parametrize("dtype", [torch.quint8, torch.qint32, torch.int16])
    @pytest.mark.parametrize("part", PARTS)
    def test_one_quantized_part_is_one_quantize_in_its_place(self, part: str, dtype: torch.dtype) -> None:
        constructors = {"hx_obs_ctr": FLOAT32, "cx_obs_ctr": FLOAT32}
        constructors[f"{part}_obs_ctr"] = fixed(2**-6, 100, dtype, quant_min=0, quant_max=201)
        converted = convert(float_lstm(proj_size=4 if part == "hy" else 0), data(), **constructors)
        (cell,) = directions(converted)
        ((quantize, source),) = quantizes(cell).items()
        assert source.name == NODE_OF_PART.get(part, part)
        assert quantize.args[-1] is dtype
        (dequantize,) = quantize.users
        if part == "tanh_cy_input":
            assert {reader.name for reader in dequantize.users} == {"tanh"}
        else:
            assert len(source.users) == 1, "the value is also read unquantized"
        assert not any(isinstance(linear, torch.ao.nn.quantized.reference.Linear) for linear in cell.modules())

    @pytest.mark.parametrize("per_channel", [False, True])
    @pytest.mark.parametrize(("part", "name"), [("weight_ih", "igates"), ("weight_hh", "hgates"), ("weight_hr", "hy")])
    def test_one_quantized_weight(self, part: str, name: str, per_channel: bool) -> None:
        observer = (
            PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
            if per_channel
            else MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        )
        lstm = float_lstm(proj_size=4 if name == "hy" else 0)
        (cell,) = directions(convert(lstm, data(), **{f"{part}_obs_ctr": observer}))
        assert not quantizes(cell)
        linears = {child: getattr(cell, child) for child in ("igates", "hgates", "hy") if hasattr(cell, child)}
        quantized_linear = linears.pop(name)
        weight = getattr(lstm, f"{part}_l0")
        largest = weight.abs().amax(1) if per_channel else weight.abs().max()
        torch.testing.assert_close(quantized_linear.weight_scale, largest / 127.5)
        with without_deprecation():
            error = (quantized_linear.get_weight() - weight).abs()
        assert (error <= 0.51 * quantized_linear.weight_scale.reshape(-1, 1)).all()
        assert {type(linear) for linear in linears.values()} == {nn.Linear}

    def test_groups_and_parts(self) -> None:
        """A part's own constructor goes before its group's, and its group's before the qconfig's."""
        default = QConfig(activation=fixed(0.5, 7, torch.quint8), weight=default_weight_observer)
        groups = {
            "linear_output": (2**-11, "gates"),
            "sigmoid": (2**-12, "input_gate", "forget_gate", "output_gate"),
            "tanh": (2**-13, "cell_gate"),
            "cell_state": (2**-14, "fgate_cx", "igate_cgate", "fgate_cx_igate_cgate"),
            "hidden_state": (2**-7, "ogate_cy"),
        }
        arguments = {f"{group}_obs_ctr": fixed(scale, 0, torch.qint32) for group, (scale, *_) in groups.items()}
        arguments["forget_gate_obs_ctr"] = fixed(2**-15, 0, torch.qint32)
        expected = dict.fromkeys(("igates", "hgates", "tanh"), 0.5)
        expected |= {NODE_OF_PART.get(part, part): scale for scale, *parts in groups.values() for part in parts}
        expected["forget_gate"] = 2**-15
        (cell,) = directions(convert(float_lstm(default), data(), **arguments))
        found = {source.name: getattr(cell, node.args[1].target).item() for node, source in quantizes(cell).items()}
        assert found == expected

    def test_states_share_the_observer_that_writes_them(self) -> None:
        observer = MinMaxObserver.with_args(dtype=torch.quint8)
        lstm = float_lstm(QConfig(activation=FLOAT32, weight=default_weight_observer))
        observed = observe(lstm, ogate_cy_obs_ctr=observer, fgate_cx_igate_cgate_obs_ctr=observer)
        (cell,) = directions(observed)
        targets = [str(node.target) for node in cell.graph.nodes if node.op == "call_module"]
        for written in ("ogate_cy", "fgate_cx_igate_cgate"):
            assert targets.count(f"activation_post_process_{written}") == 2
        observed(data(), (torch.full((1, BATCH, HIDDEN), 3.0), torch.zeros(1, BATCH, HIDDEN)))
        (cell,) = directions(ours._get_reference_quantized_lstm_module(observed))
        scales = {source.name: getattr(cell, node.args[1].target) for node, source in quantizes(cell).items()}
        assert set(scales) == {"getitem_2", "getitem_3", "mul_2", "add_1"}
        assert scales["getitem_2"] == scales["mul_2"] > 3 / 255
        assert scales["getitem_3"] == scales["add_1"]

    def test_states_with_observers_of_their_own_or_none(self) -> None:
        observer = MinMaxObserver.with_args(dtype=torch.quint8)
        cells = directions(convert(float_lstm(), data(), hidden_state_obs_ctr=observer, hx_obs_ctr=FLOAT32))
        assert {source.name for source in quantizes(cells[0]).values()} == {"mul_2"}
        own = fixed(0.25, 0, torch.quint8)
        cells = directions(convert(float_lstm(), data(), hidden_state_obs_ctr=observer, hx_obs_ctr=own))
        scales = {source.name: getattr(cells[0], node.args[1].target) for node, source in quantizes(cells[0]).items()}
        assert scales["getitem_2"] == 0.25 != scales["mul_2"]

    def test_split_gates(self) -> None:
        observer = MinMaxObserver.with_args(dtype=torch.quint8)
        lstm, x = float_lstm(STATIC, bidirectional=True), data()
        converted = convert(lstm, x, split_gates=True, gates_obs_ctr=observer)
        gates = ("input", "forget", "cell", "output")
        for cell in directions(converted):
            sources = {source.name for source in quantizes(cell).values()}
            assert sources == {f"{side}_{gate}" for side in ("igates", "hgates") for gate in gates} | {
                *("add", "add_1", "add_2", "add_3", "add_4"),
                *(f"{gate}_gate" for gate in gates),
                *("mul", "mul_1", "mul_2", "tanh"),
            }
            linears = [module for module in cell.modules() if isinstance(module, torch.ao.nn.quantized.reference.Linear)]
            assert len(linears) == 8
        torch.testing.assert_close(converted(x)[0], lstm(x)[0], rtol=0, atol=0.05)
        assert not torch.equal(
            converted.layers[0].layer_fw.cell.gates_input_scale, converted.layers[0].layer_fw.cell.gates_cell_scale
        )


@no_warnings
class TestGrids:
    @pytest.mark.parametrize(
        ("dtype", "limits"),
        [(torch.int16, (-2048, 2047)), (torch.int32, (0, 4095)), (torch.qint32, (-2048, 2047)), (torch.quint8, (0, 63))],
    )
    @given(
        scale=st.floats(0.001, 0.01), offset=st.integers(0, 63), values=st.lists(st.floats(-100, 100, width=32), min_size=1)
    )
    @settings(max_examples=15)
    def test_narrow_grids_round_and_clamp(
        self, dtype: torch.dtype, limits: tuple[int, int], scale: float, offset: int, values: list[float]
    ) -> None:
        low, high = limits
        grid = QParams(scale, low + offset, low, high)
        # the sum of the gates is b_ih where the weights are zero, and so the grid's value of it is what tanh(cy) shows
        lstm = nn.LSTM(1, 1).eval()
        lstm.qconfig = FLOAT
        constructor = fixed(scale, grid.zero_point, dtype, quant_min=low, quant_max=high)
        (cell,) = directions(convert(lstm, torch.zeros(1, 1, 1), fgate_cx_igate_cgate_obs_ctr=constructor, cx_obs_ctr=FLOAT32))
        with torch.no_grad():
            for linear in (cell.igates, cell.hgates):
                linear.weight.zero_()
                linear.bias.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0]))
        c = torch.tensor(values)[:, None]
        with without_deprecation():
            _, new_c = cell(torch.zeros(len(c), 1), (torch.zeros(len(c), 1), c))
        assert torch.equal(new_c, grid.dequantize(grid.quantize(c)))

    def test_qint32_without_limits_does_not_clamp(self) -> None:
        constructor = fixed(2**-16, 0, torch.qint32)
        (cell,) = directions(convert(float_lstm(), data(), cell_state_obs_ctr=constructor))
        assert not any(node.target is torch.clamp for node in cell.graph.nodes)
        with without_deprecation():
            c = cell(torch.zeros(1, INPUT), (torch.zeros(1, HIDDEN), torch.full((1, HIDDEN), 1000.0)))[1]
        assert c.min() > 255

    @pytest.mark.parametrize("name", ["int8", "int8_gates16", "fixed16", "all_int8"])
    @pytest.mark.parametrize("options", [{"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
    def test_presets_compute_what_the_integer_reference_computes(self, name: str, options: dict[str, Any]) -> None:
        """From equal states in each step. Where the two differ it is by the rounding of the graph's float32 matmul."""
        config = getattr(LSTMQConfig, name)()
        constructors = {f"{part}_obs_ctr": constructor or FLOAT32 for part, constructor in config.parts()}
        lstm = nn.LSTM(24, 32, **options).eval()
        lstm.qconfig = FLOAT
        with torch.no_grad():
            for parameter in lstm.parameters():
                parameter.mul_(2)
            observed = observe(lstm, **constructors)
            observed(data(10, 32, 24))
            converted = ours._get_reference_quantized_lstm_module(observed)
            for pair in zip(directions(observed), directions(converted), strict=True):
                compare_with_integer_reference(cell_of(*pair), pair[1])


def compare_with_integer_reference(cell: Cell, graph: GraphModule) -> None:
    steps, batch = 20, 32
    grids = cell.qparams
    h_step = grids.ogate_cy.scale
    # a gates' sum that is one step off moves the cell state by at most that much, which is then rounded twice
    c_grid = grids.fgate_cx_igate_cgate
    c_error = grids.gates[0].scale + (2 * c_grid.scale if c_grid else 0.0)
    h = c = torch.zeros(1, batch, cell.hidden_size)
    unequal_h = unequal_c = 0
    for x in data(steps, batch, cell.input_size):
        h_graph, c_graph = graph(x, (h[0], c[0]))
        _, h, c = reference.lstm([[cell]], x[None], h, c)
        assert ((h_graph - h[0]).abs() <= 1.0001 * h_step).all()
        assert ((c_graph - c[0]).abs() <= 1.0001 * c_error).all()
        unequal_h += int((h_graph != h[0]).sum())
        unequal_c += int(((c_graph - c[0]).abs() > 1e-5 * c[0].abs() + 1e-7).sum())
    assert unequal_h <= steps * h.numel() / 1000
    assert unequal_c <= steps * c.numel() / 250


def cell_of(observed: GraphModule, converted: GraphModule) -> Cell:
    """A cell on the grids that an observed cell's observers found, with the weights of the converted one."""
    fields: dict[str, Any] = {}
    for part in PARTS:
        observer = getattr(observed, f"activation_post_process_{part}", None)
        if observer is not None:
            scale, zero_point = observer.calculate_qparams()
            grid = QParams(float(scale), int(zero_point), observer.quant_min, observer.quant_max)
            fields[part] = (grid,) * 4 if part in PER_GATE_PARTS else grid
    fields |= {"hx": fields.get("ogate_cy"), "cx": fields.get("fgate_cx_igate_cgate")}
    tensors = []
    for side, linear in (("ih", converted.igates), ("hh", converted.hgates)):
        with without_deprecation():
            tensors.append(linear.get_quantized_weight().int_repr())
        fields[f"weight_{side}"] = WeightQParams(linear.weight_scale, linear.weight_zero_point.int(), -127, 127)
    rows = len(tensors[0])
    biases = [
        torch.zeros(rows) if linear.bias is None else linear.bias.detach() for linear in (converted.igates, converted.hgates)
    ]
    return Cell(CellQParams(**fields), *tensors, *biases)


@no_warnings
class TestBoundary:
    def test_quantized_in_and_out(self) -> None:
        lstm, x = float_lstm(STATIC), data()
        converted = convert(lstm, x)
        (cell,) = directions(converted)
        hidden = quantized(torch.zeros(1, BATCH, HIDDEN))
        for states in (None, (hidden, hidden)):
            output, (h_n, c_n) = converted(quantized(x), states)
            assert output.dtype == h_n.dtype == c_n.dtype == torch.quint8
            assert (output.q_scale(), output.q_zero_point()) == (cell.ogate_cy_scale, cell.ogate_cy_zero_point)
            assert c_n.q_scale() == cell.fgate_cx_igate_cgate_scale
            assert torch.equal(output[-1].int_repr(), h_n[0].int_repr())
            torch.testing.assert_close(output.dequantize(), lstm(x)[0], rtol=0, atol=0.05)
        assert not {node.name for node in quantizes(cell).values()} & {"x", "getitem_2", "getitem_3"}

    def test_states_on_different_grids_are_returned_as_floats(self) -> None:
        lstm, x = float_lstm(STATIC, num_layers=2, bidirectional=True), data()
        converted = convert(lstm, x)
        output, (h_n, c_n) = converted(quantized(x))
        assert output.dtype == h_n.dtype == c_n.dtype == torch.float32
        for h, c, cell in zip(h_n, c_n, directions(converted), strict=True):
            for state, part in ((h, "ogate_cy"), (c, "fgate_cx_igate_cgate")):
                grid = QParams(float(getattr(cell, f"{part}_scale")), int(getattr(cell, f"{part}_zero_point")), 0, 255)
                assert torch.equal(grid.dequantize(grid.quantize(state)), state)
        again = converted(quantized(x), (h_n, c_n))[0]
        torch.testing.assert_close(again, lstm(x, (h_n, c_n))[0], rtol=0, atol=0.05)

    def test_states_on_one_grid_are_returned_quantized(self) -> None:
        state = fixed(2**-7, 128, torch.quint8)
        converted = convert(
            float_lstm(STATIC, num_layers=2, bidirectional=True), data(), cell_state_obs_ctr=state, hidden_state_obs_ctr=state
        )
        output, (h_n, c_n) = converted(quantized(data()))
        assert output.dtype == h_n.dtype == c_n.dtype == torch.quint8
        assert h_n.q_scale() == 2**-7

    @pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
    def test_states_that_no_quantized_tensor_holds_are_returned_as_floats(self, dtype: torch.dtype) -> None:
        state = FLOAT32 if dtype == torch.float32 else fixed(2**-11, 0, dtype, quant_min=-32768, quant_max=32767)
        converted = convert(float_lstm(STATIC), data(), cell_state_obs_ctr=state)
        output, (h_n, c_n) = converted(quantized(data()))
        assert output.dtype == h_n.dtype == torch.quint8
        assert c_n.dtype == torch.float32

    @pytest.mark.parametrize("part", ["x", "hx", "cx"])
    def test_what_comes_quantized_cannot_be_configured(self, part: str) -> None:
        lstm = float_lstm(STATIC)
        with pytest.raises(ValueError, match=f"layer 0, forward direction, part {part}: cannot be configured"):
            observe(lstm, **{f"{part}_obs_ctr": MinMaxObserver})

    def test_float_in_and_out_with_omitted_states(self) -> None:
        observer = MinMaxObserver.with_args(dtype=torch.quint8)
        lstm, x = float_lstm(num_layers=2, bidirectional=True), data()
        converted = convert(lstm, x, hidden_state_obs_ctr=observer, cell_state_obs_ctr=observer, x_obs_ctr=observer)
        zeros = torch.zeros(4, BATCH, HIDDEN)
        for omitted, given_ in zip(flat(converted(x)), flat(converted(x, (zeros, zeros))), strict=True):
            assert omitted.dtype == torch.float32
            assert torch.equal(omitted, given_)

    def test_refuses_states_of_another_shape_and_no_steps(self) -> None:
        converted = convert(float_lstm(), data())
        state = torch.zeros(1, 1, HIDDEN)
        with pytest.raises(ValueError, match=r"h_0 \[1, 3, 6\] and c_0 \[1, 3, 6\], got \[1, 1, 6\] and \[1, 1, 6\]"):
            converted(data(), (state, state))
        with pytest.raises(ValueError, match="at least one step"):
            converted(data(0, BATCH, INPUT))


@no_warnings
def test_converted_and_observed_can_be_copied_pickled_and_converted_again() -> None:
    lstm, x = float_lstm(STATIC, num_layers=2, bidirectional=True), data()
    observed = observe(lstm)
    observed(x)
    before = copy.deepcopy(observed.state_dict())
    converted = ours._get_reference_quantized_lstm_module(observed)
    torch.testing.assert_close(observed.state_dict(), before, rtol=0, atol=0)
    assert not any(isinstance(module, (ObserverBase, FakeQuantizeBase)) for module in converted.modules())
    expected = flat(converted(quantized(x)))
    copies = (
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        ours._get_reference_quantized_lstm_module(pickle.loads(pickle.dumps(observed))),
    )
    for other in copies:
        assert all(torch.equal(a, b) for a, b in zip(flat(other(quantized(x))), expected, strict=True))

"""The two LSTM utilities. Tests that take ``utilities`` hold for ours and must fail on torch's: they pin what is repaired."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FixedQParamsObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    QConfig,
    default_weight_observer,
    get_default_qat_qconfig,
    get_default_qconfig,
)
from torch.ao.quantization.backend_config import DTypeConfig, get_qnnpack_backend_config
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.ao.quantization.fx import lstm_utils as upstream
from torch.ao.quantization.observer import ObserverBase
from torch.fx import GraphModule, Node

from torch_lstm_quant import lstm_utils as ours
from torch_lstm_quant import reference
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.cell_graph import PARTS, WEIGHTS
from torch_lstm_quant.qconfig import LSTMQConfig
from torch_lstm_quant.qparams import PER_GATE_PARTS, CellQParams, QParams, WeightQParams

no_warnings = pytest.mark.filterwarnings("error")

INPUT, HIDDEN, STEPS, BATCH = 5, 6, 7, 3
FLOAT32 = PlaceholderObserver.with_args(dtype=torch.float32)
FLOAT = QConfig(activation=FLOAT32, weight=FLOAT32)
STATIC = QConfig(activation=MinMaxObserver.with_args(dtype=torch.quint8), weight=default_weight_observer)
ACTIVATIONS = tuple(part for part in PARTS if part not in WEIGHTS)

NODE_OF_PART = {
    "x": "x",
    "hx": "getitem_2",
    "cx": "getitem_3",
    "gates": "add",
    "fgate_cx": "mul",
    "igate_cgate": "mul_1",
    "fgate_cx_igate_cgate": "add_1",
    "tanh_cy_input": "add_1",
    "tanh_cy": "tanh",
    "ogate_cy": "mul_2",
}
"""The node whose value is the part, where it has another name."""

QUANTIZE = (torch.quantize_per_tensor, torch.ops.quantized_decomposed.quantize_per_tensor.default)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tensors as small as these only lose time in torch's thread pool."""
    torch.set_num_threads(1)


def float_lstm(qconfig: QConfig = FLOAT, **options: Any) -> nn.LSTM:
    lstm = nn.LSTM(INPUT, HIDDEN, **{"num_layers": 1, **options}).eval()
    lstm.qconfig = qconfig
    return lstm


def observe(lstm: nn.LSTM, **arguments: Any) -> torch.ao.nn.quantizable.LSTM:
    return ours._get_lstm_with_individually_observed_parts(lstm, (), **arguments)


def convert(lstm: nn.LSTM, x: Tensor, **arguments: Any) -> ours.ReferenceLSTM:
    """Observe, calibrate on ``x`` and convert."""
    observed = observe(lstm, **arguments)
    with torch.no_grad():
        observed(x)
    return ours._get_reference_quantized_lstm_module(observed)


def directions(lstm: nn.Module) -> list[nn.Module]:
    """The cells, layer by layer."""
    return [single.cell for layer in lstm.layers for single in layer.children()]


def quantizes(cell: GraphModule) -> dict[Node, Node]:
    """Every quantize node, and the node whose value it takes; a clamp belongs to the quantize."""
    found = {}
    for node in cell.graph.nodes:
        if node.target in QUANTIZE:
            value = node.args[0]
            found[node] = value.args[0] if value.target is torch.clamp else value
    return found


def fixed(scale: float, zero_point: int, dtype: torch.dtype, **limits: int) -> Callable[[], nn.Module]:
    return FixedQParamsObserver.with_args(scale=scale, zero_point=zero_point, dtype=dtype, **limits)


def data(*shape: int) -> Tensor:
    return torch.randn(*(shape or (STEPS, BATCH, INPUT)))


@contextmanager
def without_deprecation() -> Iterator[None]:
    """For quantized tensors that the test itself creates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, torch.quantize_per_channel")
        yield


def quantized(x: Tensor) -> Tensor:
    with without_deprecation():
        return torch.quantize_per_tensor(x, 0.03, 128, torch.quint8)


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
    @pytest.mark.parametrize("part", ACTIVATIONS)
    def test_one_quantized_part_is_one_quantize_in_its_place(self, part: str, dtype: torch.dtype) -> None:
        constructors = {"hx_obs_ctr": FLOAT32, "cx_obs_ctr": FLOAT32}
        constructors[f"{part}_obs_ctr"] = fixed(2**-6, 100, dtype, quant_min=0, quant_max=201)
        converted = convert(float_lstm(), data(), **constructors)
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
    @pytest.mark.parametrize(("part", "name"), [("weight_ih", "igates"), ("weight_hh", "hgates")])
    def test_one_quantized_weight(self, part: str, name: str, per_channel: bool) -> None:
        observer = (
            PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
            if per_channel
            else MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        )
        lstm = float_lstm()
        (cell,) = directions(convert(lstm, data(), **{f"{part}_obs_ctr": observer}))
        assert not quantizes(cell)
        linears = {child: getattr(cell, child) for child in ("igates", "hgates")}
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
    @pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
    def test_presets_compute_what_the_integer_reference_computes(self, name: str, options: dict[str, Any]) -> None:
        """From equal states in each step. Where the two differ it is by the rounding of the graph's float32 matmul."""
        config = getattr(LSTMQConfig, name)()
        constructors = {f"{part}_obs_ctr": constructor or FLOAT32 for part, constructor in config.parts()}
        lstm = nn.LSTM(24, 32, **options).eval()
        lstm.qconfig = FLOAT
        with torch.no_grad():
            for parameter in lstm.parameters():
                parameter.mul_(2)
        x = data(10, 32, 24)
        observed = observe(lstm, **constructors)
        with torch.no_grad():
            observed(x)
            converted = ours._get_reference_quantized_lstm_module(observed)
            cells = [
                [
                    cell_of(single.cell, converted.layers[i].get_submodule(f"{direction}.cell"))
                    for direction, single in layer.named_children()
                ]
                for i, layer in enumerate(observed.layers)
            ]
            h = c = torch.zeros(len(directions(converted)), 32, 32)
            unequal = values = 0
            grid_steps = torch.tensor([cell.qparams.ogate_cy.scale for layer in cells for cell in layer])[:, None, None]
            for step in x.split(1):
                _, (h_n, c_n) = converted(step, (h, c))
                _, h, c = reference.lstm(cells, step, h, c)
                assert ((h_n - h).abs() <= 1.0001 * grid_steps).all()
                unequal += int((h_n != h).sum())
                values += h.numel()
                torch.testing.assert_close(c_n, c, rtol=0, atol=0.02)
        assert unequal <= values / 1000


def cell_of(observed: GraphModule, converted: GraphModule) -> Cell:
    """A cell on the grids that an observed cell's observers found, with the weights of the converted one."""
    fields: dict[str, Any] = {}
    for part in ACTIVATIONS:
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
        with pytest.raises(ValueError, match=r"states \[1, 3, 6\], got 7 steps, h_0 \[1, 1, 6\]"):
            converted(data(), (state, state))
        with pytest.raises(ValueError, match="at least one step"):
            converted(data(0, BATCH, INPUT))


def flat(result: tuple[Tensor, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    output, (h_n, c_n) = result
    return output, h_n, c_n


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
        with pytest.raises(ValueError, match="LSTM layer 0, forward direction, part forget_gate: its scale must be"):
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
        lstm = nn.LSTM(INPUT, HIDDEN, proj_size=2)
        lstm.qconfig = FLOAT
        with pytest.raises(ValueError, match="proj_size=2"):
            observe(lstm)

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

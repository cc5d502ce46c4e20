"""Reading converted graphs: what is read computes what the graph does, whoever made it; what cannot be read is named."""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable
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
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import FixedQParamsObserver, MinMaxObserver, QConfig
from torch.fx import GraphModule, Node

from torch_lstm_quant import lstm_utils as ours
from torch_lstm_quant import reference
from torch_lstm_quant.observed import ObservedLSTM, ReferenceLSTM
from torch_lstm_quant.qconfig import LSTMQConfig
from torch_lstm_quant.qparams import GATES, UNBOUNDED, QParams
from torch_lstm_quant.reference_graph import read_cell

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:QConfig must specify a FixedQParamsObserver:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max to specify the range:UserWarning"),
]

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


def test_narrow_limits_of_quantized_dtypes() -> None:
    observer = FixedQParamsObserver.with_args(scale=0.25, zero_point=4, quant_min=3, quant_max=9, dtype=torch.quint8)
    assert read_cell(float_cell_with(x=observer), "cell").cell.qparams.x == QParams(0.25, 4, 3, 9)


def edited(edit: Callable[[GraphModule, dict[str, Node]], object]) -> GraphModule:
    """An ``int8_gates16`` cell after ``edit(cell, nodes by name)``."""
    torch.manual_seed(0)
    observed = ObservedLSTM.from_float(nn.LSTM(5, 4).eval(), LSTMQConfig.int8_gates16())
    observed(torch.randn(6, 2, 5))
    cell: Any = ReferenceLSTM.from_observed(observed).layers[0].layer_fw.cell
    edit(cell, {node.name: node for node in cell.graph.nodes})
    return cell  # type: ignore[no-any-return]


def quantize_of(nodes: dict[str, Node], name: str) -> Node:
    """The quantize node of the value ``name``."""
    return next(user for user in nodes[name].users if "quantize_per_tensor" in str(user.target))


def set_target(node: Node, target: Any) -> None:
    node.target = target


def observe(cell: GraphModule, nodes: dict[str, Node]) -> None:
    cell.add_module("activation_post_process_9", MinMaxObserver())
    with cell.graph.inserting_after(nodes["mul"]):
        observer = cell.graph.call_module("activation_post_process_9", (nodes["mul"],))
    quantize_of(nodes, "mul").args = (observer, *quantize_of(nodes, "mul").args[1:])


def quantize_again(cell: GraphModule, nodes: dict[str, Node]) -> None:
    ops, first = torch.ops.quantized_decomposed, quantize_of(nodes, "mul_1")
    qparams = (0.013, 0, -128, 127, torch.int8)
    with cell.graph.inserting_before(first):
        quantized = cell.graph.call_function(ops.quantize_per_tensor.default, (nodes["mul_1"], *qparams))
        again = cell.graph.call_function(ops.dequantize_per_tensor.default, (quantized, *qparams))
    first.args = (again, *first.args[1:])


def without_dequantize(nodes: dict[str, Node], name: str) -> None:
    quantize = quantize_of(nodes, name)
    next(iter(quantize.users)).replace_all_uses_with(quantize)


def change(nodes: dict[str, Node], name: str, **changes: Any) -> None:
    """Change scale, zero_point, quant_min, quant_max or dtype of the quantize of ``name``, and of its dequantize."""
    index = ["", "scale", "zero_point", "quant_min", "quant_max", "dtype"]
    quantize = quantize_of(nodes, name)
    for node in (quantize, *quantize.users):
        for key, value in changes.items():
            node.update_arg(index.index(key), value)


EDITS: dict[str, tuple[Callable[[GraphModule, dict[str, Node]], object], str]] = {
    "a product replaced": (
        lambda c, n: set_target(n["mul_1"], torch.sub),
        "node 'mul_1': found .*sub.*expected the cell state",
    ),
    "a sum replaced": (lambda c, n: set_target(n["add_1"], torch.mul), "node 'add_1': found mul.*fgate_cx and igate_cgate"),
    "a function replaced": (lambda c, n: set_target(n["tanh"], torch.relu), "node 'tanh': found .*relu.*sigmoid and tanh"),
    "a module replaced": (lambda c, n: setattr(c, "forget_gate", nn.Hardsigmoid()), "node 'forget_gate': found .*Hardsigmoid"),
    "a module gone": (lambda c, n: delattr(c, "hgates"), "node 'hgates': found .*hgates"),
    "a linear replaced": (lambda c, n: setattr(c, "igates", nn.Identity()), "node 'igates': found add of .*Identity"),
    "a node bypassed": (lambda c, n: n["add_1"].replace_all_uses_with(n["mul"]), "expected the cell state, add of"),
    "a gate read twice": (
        lambda c, n: n["cell_gate"].update_arg(0, n["input_gate"].args[0]),
        "node 'cell_gate': .*quarter 0.*quarter 2",
    ),
    "chunks of rows": (lambda c, n: n["chunk"].update_arg(2, 0), r"found item 0 of chunk\(4, 0\)"),
    "chunks of other numbers": (lambda c, n: n["chunk"].update_arg(1, 8), r"found item 0 of chunk\(8, 1\)"),
    "tanh of something else": (
        lambda c, n: n["tanh"].update_arg(0, n["mul"]),
        "node 'tanh': found tanh of 'mul', expected .*'add_1'",
    ),
    "a scaled sum": (lambda c, n: setattr(n["add"], "kwargs", {"alpha": 2}), "node 'add': found arguments .*alpha"),
    "one output": (
        lambda c, n: n["output"].update_arg(0, (n["mul_2"],)),
        r"graph returns .*expected \(hidden state, cell state\)",
    ),
    "states swapped": (lambda c, n: n["output"].update_arg(0, n["output"].args[0][::-1]), "expected the hidden state, mul of"),
    "integers returned": (lambda c, n: without_dequantize(n, "mul_2"), "plain integers returned"),
    "integers multiplied": (lambda c, n: without_dequantize(n, "mul_1"), "found add of .*quantize"),
    "another dequantize": (
        lambda c, n: next(iter(quantize_of(n, "mul_1").users)).update_arg(1, 0.5),
        "found other qparams than in 'quantize_per_tensor",
    ),
    "an observer left": (observe, "node 'activation_post_process_9': found MinMaxObserver, which is still observing"),
    "a product quantized twice": (
        quantize_again,
        "node 'mul_1': found part igate_cgate quantized 2 times: 8 bit.*then 16 bit",
    ),
    "scale zero": (lambda c, n: change(n, "mul_1", scale=0.0), "scale must be positive"),
    "scale negative": (lambda c, n: change(n, "mul_1", scale=-1.0), "scale must be positive"),
    "scale infinite": (lambda c, n: change(n, "mul_1", scale=float("inf")), "scale must be positive"),
    "scale denormal": (lambda c, n: change(n, "mul_1", scale=1e-45), "scale must be positive"),
    "scale found at run time": (lambda c, n: quantize_of(n, "mul_1").update_arg(1, n["mul"]), "known before the model runs"),
    "zero point out of range": (lambda c, n: change(n, "mul_1", zero_point=1 << 20), "zero_point must lie in"),
    "zero point not whole": (lambda c, n: change(n, "mul_1", zero_point=0.5), "found qparams .*0.5"),
    "limits reversed": (lambda c, n: change(n, "mul_1", quant_min=5, quant_max=-5), "quant_min must be less"),
    "more than 16 bits": (lambda c, n: change(n, "mul_1", quant_min=-(1 << 17), quant_max=1 << 17), "at most 16 bits"),
    "x without limits": (lambda c, n: change(n, "x", quant_min=-(2**31), quant_max=2**31 - 1), "part x .*16 bits"),
    "weight NaN": (
        lambda c, n: c.igates.weight.data.fill_(float("nan")),
        "node 'igates': found NaN or infinities in its weight",
    ),
    "bias infinite": (lambda c, n: c.hgates.bias.data.fill_(float("inf")), "bias_hh must be finite"),
    "weight qparams gone": (lambda c, n: delattr(c.igates, "weight_scale"), "node 'igates': found no weight_scale"),
    "weight scale zero": (lambda c, n: c.igates.weight_scale.zero_(), "node 'igates': found a weight_scale that is zero"),
    "weight scale NaN": (
        lambda c, n: c.igates.weight_scale.fill_(float("nan")),
        "node 'igates': found a weight_scale .*not finite",
    ),
    "weight of 4 bits": (
        lambda c, n: setattr(c.igates, "weight_dtype", torch.quint4x2),
        "node 'igates': found a weight of torch.quint4x2",
    ),
    "weight per column": (lambda c, n: setattr(c.igates, "weight_axis_int", 1), "node 'igates': .*axis 1"),
}


@pytest.mark.parametrize("name", EDITS)
def test_graphs_edited_by_hand_are_refused_by_node(name: str) -> None:
    edit, message = EDITS[name]
    with pytest.raises(ValueError, match=message) as caught:
        read_cell(edited(edit), "encoder.lstm: layer 0 forward")
    assert str(caught.value).startswith("encoder.lstm: layer 0 forward")


@pytest.mark.parametrize("gone", ["x_scale", "x_zero_point"])
def test_a_buffer_that_is_gone_is_named(gone: str) -> None:
    cell = float_cell_with(x=MinMaxObserver.with_args(dtype=torch.quint8))
    delattr(cell, gone)
    with pytest.raises(ValueError, match=f"node 'quantize_per_tensor': found none as buffer {gone!r}"):
        read_cell(cell, "cell")


def test_a_scale_per_channel_is_refused() -> None:
    cell = float_cell_with(x=MinMaxObserver.with_args(dtype=torch.quint8))
    cell.register_buffer("x_scale", torch.ones(2))
    with pytest.raises(ValueError, match=r"found Tensor \[2\] as buffer 'x_scale'"):
        read_cell(cell, "cell")


TARGETS = (torch.add, torch.mul, torch.sub, torch.tanh, torch.clamp, operator.getitem, torch.quantize_per_tensor, torch.chunk)
CONSTANTS = (None, 0, -1, float("nan"), 1e-45, "x", torch.quint8, torch.float32, 1 << 20, True, 0.5)


def mutate(dice: random.Random, cell: GraphModule) -> None:
    """Change something at random, as a slip of the hand would."""
    nodes = list(cell.graph.nodes)
    node = dice.choice(nodes)
    kind = dice.randrange(6)
    if kind == 0 and node.op == "call_function":
        node.target = dice.choice(TARGETS)
    elif kind == 1:
        node.args = node.args[:-1]
    elif kind == 2 and node.op in ("get_attr", "call_module"):
        node.target = dice.choice(["nothing", "igates", "igates.nothing"])
    elif kind == 3:
        node.kwargs = {dice.choice(["alpha", "dim", "min", "max"]): dice.choice(CONSTANTS)}
    elif node.args:
        node.update_arg(dice.randrange(len(node.args)), dice.choice(nodes if kind == 4 else CONSTANTS))


@pytest.fixture(scope="module")
def cells_to_mutate() -> list[GraphModule]:
    mixed = [mixed_lstm(seed, split_gates=seed % 2 == 1, bias=True, bidirectional=False) for seed in range(4)]
    torchs_own = converted_model(torchs, TORCHS_OWN_CONSTRUCTORS["16 bit in qint32"], 5, 4).my_lstm
    return [lstm.layers[0].layer_fw.cell for lstm in (*mixed, torchs_own)]


@settings(max_examples=300)
@given(SEEDS)
def test_whatever_is_edited_is_read_or_refused(cells_to_mutate: list[GraphModule], seed: int) -> None:
    dice = random.Random(seed)
    cell = copy.deepcopy(dice.choice(cells_to_mutate))
    for _ in range(dice.choice([1, 1, 2, 4])):
        mutate(dice, cell)
    message = ""
    try:
        read_cell(cell, "encoder.lstm")
    except ValueError as error:
        message = str(error)
    assert not message or message.startswith("encoder.lstm")

"""Converted graphs that were edited by hand: read as what they compute, or refused with the node, and never by accident."""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from converted_lstms import TORCHS_OWN_CONSTRUCTORS, converted_model, mixed_lstm, torchs, torchs_warnings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import MinMaxObserver
from torch.fx import GraphModule, Node

from torch_lstm_quant.observed import ObservedLSTM, ReferenceLSTM
from torch_lstm_quant.qconfig import LSTMQConfig
from torch_lstm_quant.reference_graph import read_cell

pytestmark = torchs_warnings


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


def cell_with_buffers() -> GraphModule:
    """A cell of torch's own, whose qparams are buffers."""
    cell: Any = converted_model(torchs, {}, 5, 4).my_lstm.layers[0].layer_fw.cell
    return cell  # type: ignore[no-any-return]


@pytest.mark.parametrize("gone", ["igates_scale_0", "igates_zero_point_0"])
def test_a_buffer_that_is_gone_is_named(gone: str) -> None:
    cell = cell_with_buffers()
    delattr(cell, gone)
    with pytest.raises(ValueError, match=f"node 'quantize_per_tensor_3': found none as buffer {gone!r}"):
        read_cell(cell, "cell")


def test_a_scale_per_channel_is_refused() -> None:
    cell = cell_with_buffers()
    cell.register_buffer("igates_scale_0", torch.ones(2))
    with pytest.raises(ValueError, match=r"found Tensor \[2\] as buffer 'igates_scale_0'"):
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
@given(st.integers(0, 2**31))
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

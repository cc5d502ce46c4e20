"""One LSTM cell as an FX graph: an observer after every part, then explicit quantize and dequantize in the observer's place.

torch.ao's ``prepare_fx`` decides by tables of dtypes and patterns which ops it observes, and drops in silence what it does
not find there. Here each part names its node, so what is asked for is done or is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantizable import LSTMCell
from torch.ao.nn.quantized.reference import Linear as ReferenceLinear
from torch.ao.quantization import FakeQuantizeBase
from torch.ao.quantization.backend_config import BackendConfig
from torch.ao.quantization.quantize_fx import _swap_ff_with_fxff
from torch.fx import Graph, GraphModule, Node, Tracer

from torch_lstm_quant.observed_grid import QUANTIZED_DTYPES, Grid, make_observer, observer_of, read_grid
from torch_lstm_quant.qparams import WEIGHTS, own_parts

OBSERVER = "activation_post_process_"
"""An observed cell holds the observer of a part as ``activation_post_process_<part>`` (split gates: ``..._igates_input``)."""

SHARED = {"hx": "ogate_cy", "cx": "fgate_cx_igate_cgate"}
"""The states that are read, and the parts that write them: where ``"shared"`` is asked for, both have one observer.

In a cell with ``proj_size``, ``hy`` writes the hidden state.
"""

SPLIT_PARTS = ("igates", "hgates", "gates")
"""Parts that a cell with split gates has once for each of :data:`GATE_NAMES`: ``gates_forget`` is the forget gate's sum.

So it has the weights, of which ``weight_ih_forget`` are the forget gate's rows.
"""

SPLIT_WEIGHTS = own_parts(WEIGHTS, projects=False)
"""Weights with rows for each gate."""

GATE_NAMES = ("input", "forget", "cell", "output")

_BACKEND_OPS: dict[str, tuple[Any, str]] = {
    "x": (nn.Linear, "input_dtype"),
    "hx": (nn.Linear, "input_dtype"),
    "cx": (torch.mul, "input_dtype"),
    "igates": (nn.Linear, "output_dtype"),
    "hgates": (nn.Linear, "output_dtype"),
    "gates": (torch.add, "output_dtype"),
    "input_gate": (nn.Sigmoid, "output_dtype"),
    "forget_gate": (nn.Sigmoid, "output_dtype"),
    "cell_gate": (nn.Tanh, "output_dtype"),
    "output_gate": (nn.Sigmoid, "output_dtype"),
    "fgate_cx": (torch.mul, "output_dtype"),
    "igate_cgate": (torch.mul, "output_dtype"),
    "fgate_cx_igate_cgate": (torch.add, "output_dtype"),
    "tanh_cy_input": (torch.tanh, "input_dtype"),
    "tanh_cy": (torch.tanh, "output_dtype"),
    "ogate_cy": (torch.mul, "output_dtype"),
    "hy": (nn.Linear, "output_dtype"),
    "weight_ih": (nn.Linear, "weight_dtype"),
    "weight_hh": (nn.Linear, "weight_dtype"),
    "weight_hr": (nn.Linear, "weight_dtype"),
}
"""The op of a backend config that speaks of a part, and the dtype of it that the part is: every part there is."""


class ObservedLinear(nn.Linear):
    """A projection whose weight has an observer, which sees it at convert, or a fake quantize, which it passes each time.

    Within :meth:`held` it passes once for all steps: they share the weight, and fake-quantizing it takes longer than a step.
    """

    _held: tuple[Tensor] | None = None  # in a tuple, as a module takes a parameter for its own

    def __init__(self, linear: nn.Linear, weight_post_process: nn.Module) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_post_process = weight_post_process

    def forward(self, input: Tensor) -> Tensor:
        weight = self._passed() if self._held is None else self._held[0]
        return nn.functional.linear(input, weight, self.bias)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Pass the weight now, and not again before the end."""
        self._held = (self._passed(),)
        try:
            yield
        finally:
            self._held = None

    def _passed(self) -> Tensor:
        if not isinstance(self.weight_post_process, FakeQuantizeBase):
            return self.weight
        weight: Tensor = self.weight_post_process(self.weight)
        return weight


def observe_cell(
    cell: LSTMCell,
    constructors: Mapping[str, Any],
    where: str,
    backend_config: BackendConfig | None = None,
    quantized_boundary: bool = False,
) -> GraphModule:
    """Trace a float cell and put the observer or fake quantize of each part after the node that computes it.

    Args:
        cell: with float32 parameters; it is taken apart, and the result holds its parameters.
        constructors: of observers or fake quantizes, by part, the weights too. A part that is left out, None, or whose
            observer has dtype float32 stays float32. ``hx`` and ``cx`` may be ``"shared"``: see :data:`SHARED`. Where gates
            are split, one gate of a part or weight can have its own: ``gates_forget``, ``weight_ih_forget``. What is for
            ``hy`` and ``weight_hr`` counts where the cell has a projection.
        where: module path, layer and direction, for messages.
        backend_config: None allows everything; else the dtypes that it lists for the part's op.
        quantized_boundary: ``x`` and the states come as quantized tensors, on grids that are found elsewhere.

    Returns:
        The observed cell: ``forward(x [B, input_size], (h, c)) -> (h, c)``, states ``[B, hidden_size]``.

    Raises:
        TypeError: a constructor that is none, or an unknown part.
        ValueError: what is asked for cannot be honoured (the message names ``where`` and the part).
    """
    for slot in constructors:
        if (part_of(slot) if cell.split_gates else slot) not in _BACKEND_OPS:
            raise TypeError(f"{where}: unknown part {slot!r}; the parts are {', '.join(_BACKEND_OPS)}")
    _swap_ff_with_fxff(cell)
    observed = GraphModule(cell, Tracer().trace(cell))
    graph = observed.graph
    graph.eliminate_dead_code()

    def make(slot: str) -> nn.Module | None:
        part = part_of(slot)
        place = f"{where}, part {slot}"
        module = make_observer(constructors.get(slot, constructors.get(part)), place, weight=part in WEIGHTS)
        _check_backend(backend_config, part, module, place)
        return module

    slots = _nodes_of_slots(graph, cell.split_gates)
    written = SHARED | ({"hx": "hy"} if "hy" in slots else {})
    for slot, node in slots.items():
        shared = written.get(slot) if constructors.get(slot) == "shared" else None
        if slot in ("x", *SHARED) and quantized_boundary:
            _check_outside(constructors.get(slot), f"{where}, part {slot}")
        elif shared:
            if hasattr(observed, OBSERVER + shared):
                _check_backend(backend_config, slot, getattr(observed, OBSERVER + shared), f"{where}, part {slot}")
                _insert_observer(graph, node, OBSERVER + shared)
        elif (module := make(slot)) is not None:
            observed.add_submodule(OBSERVER + slot, module)
            _insert_observer(graph, node, OBSERVER + slot)
    tanh_cy_input = make("tanh_cy_input")
    if tanh_cy_input is not None:
        observed.add_submodule(OBSERVER + "tanh_cy_input", tanh_cy_input)
        _insert_tanh_observer(graph)
    for name, (slot, linear) in _linears(observed).items():
        weight = make(slot)
        if weight is not None:
            observed.set_submodule(name, ObservedLinear(linear, weight))
    graph.lint()
    observed.recompile()
    return observed


def convert_cell(
    cell: nn.Module,
    where: str,
    backend_config: BackendConfig | None = None,
    quantized_boundary: bool = False,
) -> GraphModule:
    """Replace each observer by quantize and dequantize ops on the grid that it found; the observed cell is left as it is.

    Args:
        cell: from :func:`observe_cell`, calibrated or trained.
        where, backend_config, quantized_boundary: as for :func:`observe_cell`.

    Returns:
        The reference cell. Where the boundary is quantized, a state whose grid has a quantized dtype is returned as a
        quantized tensor.

    Raises:
        ValueError: not an observed cell; an observer that never ran or saw NaN or infinities; an impossible grid; a dtype
            that the backend config does not allow. The message names layer, direction and part.
    """
    if not isinstance(cell, GraphModule):
        raise ValueError(f"{where}: the cell must be one that our utility observed, got {type(cell).__name__}")
    cell = copy.deepcopy(cell)
    for node in list(cell.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(OBSERVER):
            slot = str(node.target).removeprefix(OBSERVER)
            if part_of(slot) not in _BACKEND_OPS:
                raise ValueError(
                    f"{where}: {node.target} is not the observer of a part: observe the LSTM with our utility, or convert it "
                    "with torch.ao's, if that observed it, and lower what it gives"
                )
            module = cell.get_submodule(str(node.target))
            place = f"{where}, part {slot}"
            _check_backend(backend_config, part_of(slot), module, place)
            _quantize(cell, node, slot, read_grid(module, place))
    for name, (slot, linear) in _linears(cell).items():
        if isinstance(linear, ObservedLinear):
            _check_backend(backend_config, part_of(slot), linear.weight_post_process, f"{where}, part {slot}")
            cell.set_submodule(name, _reference_linear(linear, f"{where}, part {slot}"))
    _dequantize_after_chunk(cell.graph)
    if quantized_boundary:
        _open_boundary(cell.graph)
    cell.graph.eliminate_dead_code()
    cell.graph.lint()
    cell.delete_all_unused_submodules()
    cell.recompile()
    return cell


def part_of(slot: str) -> str:
    """The part of a slot: ``igates_input`` is a slot of part ``igates``; without split gates the two are the same."""
    part, _, gate = slot.rpartition("_")
    return part if part in (*SPLIT_PARTS, *SPLIT_WEIGHTS) and gate in GATE_NAMES else slot


def _nodes_of_slots(graph: Graph, split_gates: bool) -> dict[str, Node]:
    """The node that computes each slot, the states that are read last, since they may share the observers of others."""
    nodes = {node.name: node for node in graph.nodes}
    names = ["igates", "hgates"]
    adds = ["gates", "fgate_cx_igate_cgate"]
    if split_gates:
        names = [f"{side}_{gate}" for gate in GATE_NAMES for side in ("igates", "hgates")]
        adds = [*(f"gates_{gate}" for gate in GATE_NAMES), "fgate_cx_igate_cgate"]
    slots = {"x": nodes["x"]} | {name: nodes[name] for name in names}
    slots |= {slot: nodes[f"add_{index}" if index else "add"] for index, slot in enumerate(adds)}
    slots |= {f"{gate}_gate": nodes[f"{gate}_gate"] for gate in GATE_NAMES}
    slots |= {"fgate_cx": nodes["mul"], "igate_cgate": nodes["mul_1"], "tanh_cy": nodes["tanh"], "ogate_cy": nodes["mul_2"]}
    if "hy" in nodes:
        slots["hy"] = nodes["hy"]
    hx, cx = sorted(nodes["hidden"].users, key=lambda getitem: getitem.args[1])
    return slots | {"hx": hx, "cx": cx}


def _insert_observer(graph: Graph, node: Node, target: str) -> None:
    """Let everything that reads ``node`` read it through the observer."""
    with graph.inserting_after(node):
        observer = graph.call_module(target, (node,))
    node.replace_all_uses_with(observer, delete_user_cb=lambda user: user is not observer)


def _insert_tanh_observer(graph: Graph) -> None:
    """Let tanh alone read the new cell state through an observer of its own."""
    tanh = next(node for node in graph.nodes if node.name == "tanh")
    with graph.inserting_before(tanh):
        tanh.args = (graph.call_module(OBSERVER + "tanh_cy_input", tanh.args),)


def _linears(cell: GraphModule) -> dict[str, tuple[str, nn.Linear]]:
    """The projections by name, each with the slot that its weight is."""
    return {name: (_slot_of(name), module) for name, module in cell.named_modules() if isinstance(module, nn.Linear)}


def _slot_of(linear: str) -> str:
    """The slot of a linear's weight: ``weight_ih`` of ``igates``, ``weight_ih_forget`` of ``igates.forget``."""
    side, _, gate = linear.partition(".")
    weight = {"igates": "weight_ih", "hgates": "weight_hh", "hy": "weight_hr"}[side]
    return f"{weight}_{gate}" if gate else weight


def _check_backend(backend_config: BackendConfig | None, part: str, module: nn.Module | None, place: str) -> None:
    """Refuse a dtype that a backend config does not list for the part's op."""
    if backend_config is None or module is None:
        return
    op, role = _BACKEND_OPS[part]
    dtype = observer_of(module).dtype
    allowed = {
        getattr(config, role)
        for pattern in backend_config.configs
        if pattern.pattern is op
        for config in pattern.dtype_configs
    }
    if dtype not in allowed:
        raise ValueError(
            f"{place}: backend_config {backend_config.name!r} allows {sorted(map(str, allowed - {None}))} as {role} of "
            f"{op.__name__}, got {dtype}: add a DTypeConfig for it, or pass backend_config=None"
        )


def _check_outside(constructor: object, place: str) -> None:
    """Where the boundary is quantized, the grids of ``x`` and the states come with the tensors."""
    if constructor not in (None, "shared"):
        raise ValueError(
            f"{place}: cannot be configured, as the LSTM's qconfig has static activations: it is given quantized tensors. "
            "Observe what the model passes to the LSTM, or give the LSTM a qconfig with float32 activations"
        )


def _quantize(cell: GraphModule, observer: Node, slot: str, grid: Grid) -> None:
    """Put quantize and dequantize where ``observer`` is."""
    graph = cell.graph
    value = observer.args[0]
    low, high = (float(limit) for limit in grid.float_limits())
    with graph.inserting_before(observer):
        if grid.dtype in QUANTIZED_DTYPES:
            if grid.narrow:
                value = graph.call_function(torch.clamp, (value, low, high))
            cell.register_buffer(f"{slot}_scale", grid.scale)
            cell.register_buffer(f"{slot}_zero_point", grid.zero_point)
            scale, zero_point = graph.get_attr(f"{slot}_scale"), graph.get_attr(f"{slot}_zero_point")
            quantized = graph.call_function(torch.quantize_per_tensor, (value, scale, zero_point, grid.dtype))
            dequantized = graph.call_method("dequantize", (quantized,))
        else:
            ops = torch.ops.quantized_decomposed
            qparams = (float(grid.scale), int(grid.zero_point), grid.quant_min, grid.quant_max, grid.dtype)
            quantized = graph.call_function(ops.quantize_per_tensor.default, (value, *qparams))
            dequantized = graph.call_function(ops.dequantize_per_tensor.default, (quantized, *qparams))
    observer.replace_all_uses_with(dequantized)
    graph.erase_node(observer)


def _reference_linear(linear: ObservedLinear, place: str) -> ReferenceLinear:
    """torch's reference Linear: the float weight, and the qparams that its forward quantizes it with."""
    module = linear.weight_post_process
    if not isinstance(module, FakeQuantizeBase) or module.observer_enabled:
        module(linear.weight)  # as it is now, after the last step of training
    grid = read_grid(module, place)
    per_channel = grid.scale.dim() == 1
    qparams = {
        "qscheme": torch.per_channel_affine if per_channel else torch.per_tensor_affine,
        "dtype": torch.qint8,  # the reference Linear knows int8 by this name only
        "scale": grid.scale,
        "zero_point": grid.zero_point,
        "quant_min": grid.quant_min,
        "quant_max": grid.quant_max,
        "axis": 0,
    }
    reference = ReferenceLinear.from_float(linear, qparams)
    if grid.narrow:
        # it quantizes without limits, so the weight is brought within the grid's
        low, high = (limit[:, None] if per_channel else limit for limit in grid.float_limits())
        reference.weight = nn.Parameter(linear.weight.detach().clamp(low, high))
    return reference


def _dequantize_after_chunk(graph: Graph) -> None:
    """Let each gate read a ``dequantize`` of its own, as torch.ao's reference form has it in front of every op."""
    for chunk in [node for node in graph.nodes if node.target == "chunk"]:
        if chunk.args[0].target == "dequantize":
            chunk.args = (chunk.args[0].args[0], *chunk.args[1:])
            for quarter in list(chunk.users):
                _dequantize(graph, quarter)


def _dequantize(graph: Graph, node: Node) -> None:
    """Let everything that reads ``node`` read it dequantized."""
    with graph.inserting_after(node):
        dequantized = graph.call_method("dequantize", (node,))
    node.replace_all_uses_with(dequantized, delete_user_cb=lambda user: user is not dequantized)


def _open_boundary(graph: Graph) -> None:
    """Let a reference cell take ``x`` and the states as quantized tensors, and return them so."""
    nodes = {node.name: node for node in graph.nodes}
    for node in (nodes["x"], *nodes["hidden"].users):
        _dequantize(graph, node)
    output = nodes["output"]
    output.args = (tuple(v.args[0] if v.target == "dequantize" else v for v in output.args[0]),)

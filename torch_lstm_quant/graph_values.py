"""The values of a converted cell's graph: what computes each, and the grids on which it was quantized on the way."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.ao.nn.quantized.reference import Linear as ReferenceLinear
from torch.ao.quantization import FakeQuantizeBase
from torch.ao.quantization.observer import ObserverBase
from torch.fx import GraphModule, Node

from torch_lstm_quant.qparams import UNBOUNDED, Grids, QParams

_KINDS: dict[Any, str] = {
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Linear: "linear",
    ReferenceLinear: "linear",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    torch.add: "add",
    operator.add: "add",
    torch.mul: "mul",
    operator.mul: "mul",
    torch.chunk: "chunk",
    torch.clamp: "clamp",
    torch.dequantize: "dequantize",
    torch.quantize_per_tensor: "quantize",
    operator.getitem: "item",
}
"""What the targets of modules and functions compute. Methods go by their names."""

_METHODS = ("sigmoid", "tanh", "add", "mul", "chunk", "clamp", "dequantize")
_DECOMPOSED = "quantized_decomposed."
_LIMITS = {torch.quint8: (0, 255), torch.qint8: (-128, 127), torch.qint32: (-UNBOUNDED, UNBOUNDED)}
_CONVERT_AGAIN = (
    "lower it as it was converted, or convert with torch_lstm_quant.lstm_utils._get_reference_quantized_lstm_module"
)


@dataclass(frozen=True)
class Value:
    """What an op reads.

    Args:
        source: the node that computed it, or that stands for ``x``, ``hx`` or ``cx``.
        grids: on which it was quantized and dequantized since then, in that order.
        outside: whether the graph dequantizes the source itself, which comes as a quantized tensor.
        quarter: which of four chunks of the source's columns it is; None for all of them.
    """

    source: Node
    grids: Grids = ()
    outside: bool = False
    quarter: int | None = None


class GraphValues:
    """A converted cell's graph, read node by node. Every ``ValueError`` names the node."""

    def __init__(self, graph_module: GraphModule, where: str) -> None:
        self._graph_module = graph_module
        self._where = where
        self._inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._check_nodes()

    def error(self, node: Node, found: str, expected: str, advice: str = _CONVERT_AGAIN) -> ValueError:
        return ValueError(f"{self._where}, node {node.name!r}: found {found}, expected {expected}: {advice}")

    def _check_nodes(self) -> None:
        """Refuse what would make a nonsense of any further reading."""
        computed = set()
        for node in self._graph_module.graph.nodes:
            missing = [argument.name for argument in node.all_input_nodes if argument not in computed]
            if missing:
                raise self.error(node, f"{missing[0]!r} read before it is computed", "nodes in order")
            computed.add(node)
            module = self._attribute(node) if node.op == "call_module" else None
            if isinstance(module, (ObserverBase, FakeQuantizeBase)):
                raise self.error(
                    node,
                    f"{type(module).__name__}, which is still observing",
                    "quantize and dequantize in its place",
                    "convert the observed LSTM with torch_lstm_quant.lstm_utils (torch.ao's leaves observers of some dtypes)",
                )

    def kind(self, node: Node) -> str:
        """What a node computes: a word of this file, or a description where it is nothing that a cell has."""
        other = self._describe(node)
        if node.op == "placeholder":
            return ("x", "states")[self._inputs.index(node)] if len(self._inputs) == 2 else other
        if node.op == "call_module":
            return _KINDS.get(type(self._attribute(node)), other)
        if node.op == "call_method":
            return str(node.target) if node.target in _METHODS else other
        if self._is_decomposed(node):
            name = str(node.target).removeprefix(_DECOMPOSED).split(".")[0]
            return {"quantize_per_tensor": "quantize", "dequantize_per_tensor": "dequantize"}.get(name, other)
        kind = _KINDS.get(node.target, other) if node.op == "call_function" else other
        return self._kind_of_item(node) if kind == "item" else kind

    def returned(self) -> tuple[tuple[Value, torch.dtype | None], tuple[Value, torch.dtype | None]]:
        """The new hidden and the new cell state, each with the quantized dtype in which it is returned."""
        output = next((node for node in self._graph_module.graph.nodes if node.op == "output"), None)
        states = output.args[0] if output is not None and output.args else None
        if not isinstance(states, (tuple, list)) or len(states) != 2 or not all(isinstance(state, Node) for state in states):
            raise ValueError(
                f"{self._where}: the graph returns {states}, expected (hidden state, cell state): {_CONVERT_AGAIN}"
            )
        h, c = (self._returned(state) for state in states)
        return h, c

    def operands(self, node: Node, kind: str, parts: tuple[str, str], meaning: str) -> tuple[Value, Value]:
        """The two values that ``node`` adds or multiplies, in the order of ``parts``, whichever order the graph has."""
        expected = f"{meaning}, {kind} of {' and '.join(parts)}"
        if self.kind(node) != kind:
            raise self.error(node, self.kind(node), expected)
        values = self._two_values(node)
        found = [self._part(value) for value in values]
        if sorted(found) != sorted(parts):
            suspect = next((v.source for v, part in zip(values, found, strict=True) if part not in parts), node)
            raise self.error(suspect, f"{kind} of {' and '.join(found)}", expected)
        return values if tuple(found) == parts else (values[1], values[0])

    def argument(self, node: Node) -> Value:
        """What a function or a linear reads."""
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Node):
            raise self.error(node, f"arguments {node.args} {node.kwargs or ''}", "one tensor")
        return self._value(node.args[0])

    def one_grid(self, value: Value, part: str) -> QParams | None:
        """The grid of a part that can have only one, None for float32."""
        grids = fold(value.grids)
        if len(grids) > 1:
            chain = ", then ".join(map(str, grids))
            raise self.error(value.source, f"part {part} quantized {len(grids)} times: {chain}", "one grid")
        return grids[0] if grids else None

    def module(self, node: Node) -> nn.Module:
        """The module that a ``call_module`` node calls."""
        module = self._attribute(node)
        if not isinstance(module, nn.Module):
            raise self.error(node, f"no module {node.target!r} in the cell", "the module that the node calls")
        return module

    def _value(self, node: Node) -> Value:
        """Back over pairs of quantize and dequantize, and over chunks of either, to what computed the value."""
        grids: Grids = ()
        quarter: int | None = None
        dequantize: Node | None = None
        while True:
            kind = self.kind(node)
            if kind == "dequantize" and dequantize is None:
                dequantize, node = node, self._dequantized(node)
            elif kind == "quantize" and dequantize is not None:
                self._check_pair(node, dequantize)
                dequantize = None
                grid, node = self._grid(node)
                grids = (grid, *grids)
            elif kind == "item of chunk" and quarter is None:
                quarter, node = self._quarter(node)
            else:
                break
        if dequantize is not None and self._is_decomposed(dequantize):
            raise self.error(dequantize, f"{kind} before it", "the quantize op that it belongs to")
        return Value(node, grids, dequantize is not None, quarter)

    def _check_pair(self, quantize: Node, dequantize: Node) -> None:
        decomposed = self._is_decomposed(quantize)
        if decomposed != self._is_decomposed(dequantize) or (
            decomposed and self._qparams(quantize) != self._qparams(dequantize)
        ):
            raise self.error(
                dequantize, f"other qparams than in {quantize.name!r}", "those with which the value was quantized"
            )

    def _dequantized(self, node: Node) -> Node:
        if not self._is_decomposed(node) and (len(node.args) != 1 or node.kwargs):
            raise self.error(node, f"arguments {node.args} {node.kwargs}", "one tensor")
        return self._first_argument(node)

    def _quarter(self, item: Node) -> tuple[int, Node]:
        """Which quarter of the columns of what."""
        chunk, index = item.args
        assert isinstance(chunk, Node)
        sizes = (*chunk.args[1:], *chunk.kwargs.values())
        if sizes not in ((4, 1), (4, -1)) or index not in range(4):
            raise self.error(item, f"item {index} of chunk{sizes}", "one of the four items of chunk(4, 1)")
        return index, self._first_argument(chunk)  # type: ignore[return-value]

    def _first_argument(self, node: Node) -> Node:
        if not node.args or not isinstance(node.args[0], Node):
            raise self.error(node, f"arguments {node.args}", "a tensor")
        return node.args[0]

    def _returned(self, node: Node) -> tuple[Value, torch.dtype | None]:
        if self.kind(node) != "quantize":
            return self._value(node), None
        if self._is_decomposed(node):
            raise self.error(node, "plain integers returned", "a float32 or quantized tensor: dequantize it in the graph")
        grid, source = self._grid(node)
        before = self._value(source)
        return replace(before, grids=(*before.grids, grid)), node.args[3]  # type: ignore[return-value]

    def _grid(self, node: Node) -> tuple[QParams, Node]:
        """The grid of a quantize node, and the node before it: a clamp there gives the limits."""
        scale, zero_point, low, high = self._qparams(node)
        # torch.quantize_per_tensor rounds the scale to float32 before it inverts it, the decomposed op afterwards
        inverse = 1.0 / scale if self._is_decomposed(node) and scale else 0.0
        if low <= -UNBOUNDED and high >= UNBOUNDED:
            low, high = -UNBOUNDED, UNBOUNDED
        source = node.args[0]
        assert isinstance(source, Node)
        try:
            if self.kind(source) == "clamp":
                source, limits = self._clamp(source)
                low, high = QParams(scale, zero_point, low, high, inverse).quantize(torch.tensor(limits)).tolist()
            return QParams(scale, zero_point, low, high, inverse), source
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._where}, node {node.name!r}: {error}: {_CONVERT_AGAIN}") from error

    def _qparams(self, node: Node) -> tuple[float, int, int, int]:
        """scale, zero_point, quant_min and quant_max of a quantize or a decomposed dequantize node."""
        count = 6 if self._is_decomposed(node) else 4
        if len(node.args) != count or node.kwargs or not isinstance(node.args[0], Node):
            raise self.error(
                node, f"arguments {node.args} {node.kwargs or ''}", f"a tensor, its qparams and dtype: {count} arguments"
            )
        _, scale, zero_point, *limits, dtype = (self._constant(node, argument) for argument in node.args)
        if not self._is_decomposed(node):
            if dtype not in _LIMITS:
                raise self.error(node, f"dtype {dtype}", " or ".join(map(str, _LIMITS)))
            limits = list(_LIMITS[dtype])
        if (
            isinstance(scale, bool)
            or not isinstance(scale, (int, float))
            or not all(type(v) is int for v in (zero_point, *limits))
        ):
            raise self.error(
                node, f"qparams {scale}, {zero_point}, {limits}", "a number, and integers, known before the model runs"
            )
        return float(scale), zero_point, limits[0], limits[1]

    def _constant(self, node: Node, argument: Any) -> Any:
        """The value of an argument that may be a buffer of the cell."""
        if not isinstance(argument, Node) or argument.op != "get_attr":
            return argument
        value = self._attribute(argument)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            found = "none" if value is None else f"{type(value).__name__} {list(getattr(value, 'shape', []))}"
            raise self.error(node, f"{found} as buffer {argument.target!r} of the cell", "a tensor of one value")
        return value.item()

    def _clamp(self, node: Node) -> tuple[Node, list[float]]:
        values = [*node.args[1:], *(node.kwargs[name] for name in ("min", "max") if name in node.kwargs)]
        if not isinstance(node.args[0], Node) or len(values) != 2 or not all(isinstance(v, (int, float)) for v in values):
            raise self.error(node, f"clamp to {values}", "a clamp to two constants")
        return node.args[0], [float(v) for v in values]  # type: ignore[arg-type]

    def _two_values(self, node: Node) -> tuple[Value, Value]:
        if len(node.args) != 2 or node.kwargs or not all(isinstance(argument, Node) for argument in node.args):
            raise self.error(node, f"arguments {node.args} {node.kwargs or ''}", "two tensors")
        first, second = (self._value(argument) for argument in node.args)  # type: ignore[arg-type]
        return first, second

    def _part(self, value: Value) -> str:
        """The part that a product or a linear computes, by what it reads; of anything else its kind."""
        kind = self.kind(value.source)
        if value.quarter is not None:
            return f"a quarter of {kind}"
        if kind == "linear":
            read = self.argument(value.source)
            return {"x": "igates", "hx": "hgates"}.get(self.kind(read.source), kind) if read.quarter is None else kind
        if kind == "mul":
            operands = {self.kind(operand.source) for operand in self._two_values(value.source)}
            return "fgate_cx" if "cx" in operands else "igate_cgate" if operands == {"sigmoid", "tanh"} else kind
        return kind

    def _kind_of_item(self, node: Node) -> str:
        whole, index = node.args if len(node.args) == 2 else (None, None)
        kind = self.kind(whole) if isinstance(whole, Node) else str(whole)
        if kind == "states" and isinstance(index, int) and 0 <= index <= 1:
            return ("hx", "cx")[index]
        return "item of chunk" if kind == "chunk" else f"item {index} of {kind}"

    def _attribute(self, node: Node) -> Any:
        """What a ``get_attr`` or ``call_module`` node names; None where it is gone."""
        value: Any = self._graph_module
        for name in str(node.target).split("."):
            value = getattr(value, name, None)
        return value

    def _describe(self, node: Node) -> str:
        if node.op == "call_module":
            return f"{type(self._attribute(node)).__name__} {node.target!r}"
        return f"{node.op} {getattr(node.target, '__name__', node.target)}"

    @staticmethod
    def _is_decomposed(node: Node) -> bool:
        return str(node.target).startswith(_DECOMPOSED)


def fold(grids: Grids) -> Grids:
    """The grids without those that leave every value of the one before as it is."""
    folded: Grids = ()
    for grid in grids:
        if not folded or not _is_kept(folded[-1], grid):
            folded = (*folded, grid)
    return folded


def _is_kept(grid: QParams, again: QParams) -> bool:
    """Whether quantizing on ``again`` leaves every value of ``grid`` as it is."""
    if grid.unbounded:
        return grid == again
    values = grid.dequantize(torch.arange(grid.quant_min, grid.quant_max + 1, dtype=torch.int32))
    return torch.equal(again.dequantize(again.quantize(values)), values)

"""A small builder of ONNX graphs: nodes in order, constants by value, names that are unique in a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx

OPSET = 18
"""The oldest opset that has all that is used."""


def require_onnx() -> Any:
    """The ``onnx`` package, or an ImportError that says how to install it."""
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError("export to ONNX needs the onnx package, got none: pip install 'torch-lstm-quant[onnx]'") from error
    return onnx


class Graph:
    """Nodes and constants of one graph, of which :meth:`body` makes the inside of a Scan.

    Args:
        prefix: begins every name, so that the graph can become part of another.
    """

    def __init__(self, prefix: str) -> None:
        self._onnx = require_onnx()
        self._prefix = prefix
        self._count = 0
        self._known: dict[tuple[torch.dtype, tuple[int, ...], bytes], str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def name(self, hint: str) -> str:
        """A name that this graph has not given before."""
        self._count += 1
        return f"{self._prefix}{hint}_{self._count}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of one output, which is returned."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Adds a node of ``count`` outputs, which are returned."""
        outputs = [self.name(kind) for _ in range(count)]
        self.nodes.append(self._onnx.helper.make_node(kind, inputs, outputs, name=self.name("node"), **attributes))
        return outputs

    def constant(self, value: Tensor | float | int | list[int], dtype: torch.dtype | None = None) -> str:
        """The name of a constant; equal ones have the same."""
        tensor = torch.as_tensor(value, dtype=dtype).contiguous()
        array = tensor.numpy()
        key = (tensor.dtype, tuple(tensor.shape), array.tobytes())
        if key not in self._known:
            self._known[key] = self.name("constant")
            self.constants.append(self._onnx.numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """Adds a conversion."""
        return self.op("Cast", value, to=self._type(dtype))

    def value_info(self, name: str, dtype: torch.dtype, shape: list[str | int] | None) -> onnx.ValueInfoProto:
        """What an input or output is declared as."""
        return self._onnx.helper.make_tensor_value_info(name, self._type(dtype), shape)

    def inner(self, hint: str) -> Graph:
        """A graph for the body of a node in this one."""
        return Graph(self.name(hint) + "_")

    def proto(self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.GraphProto:
        """The graph as ONNX has it."""
        return self._onnx.helper.make_graph(self.nodes, name, inputs, outputs, self.constants)

    def _type(self, dtype: torch.dtype) -> int:
        types = self._onnx.TensorProto
        names = {
            torch.float32: types.FLOAT,
            torch.float64: types.DOUBLE,
            torch.uint8: types.UINT8,
            torch.int32: types.INT32,
            torch.int64: types.INT64,
            torch.bool: types.BOOL,
        }
        return int(names[dtype])

"""From a float LSTM and grids that are known beforehand, as a datasheet has them, to the fused LSTM: nothing is calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torch_lstm_quant.cell_graph import convert_cell, observe_cell, part_of
from torch_lstm_quant.cell_stack import assemble, cell_name, float_cell
from torch_lstm_quant.custom_config import check_backend
from torch_lstm_quant.given_grids import constructors_of
from torch_lstm_quant.lowering import lower_lstm
from torch_lstm_quant.observed import ReferenceLSTM, check_float_lstm
from torch_lstm_quant.qparams import CellQParams


def from_float(lstm: nn.LSTM, qparams: Mapping[str, CellQParams | Mapping[str, Any]], backend: str = "fused") -> nn.Module:
    """Quantize an LSTM whose grids are known: the same bits as by calibrating and converting to the same grids.

    ::

        byte = {"scale": 0.02, "zero_point": 128, "dtype": torch.uint8}
        gates = {"scale": 12 / 2047, "zero_point": 0, "quant_min": -2048, "quant_max": 2047}
        cell = {"x": byte, "gates": gates, "ogate_cy": byte, "weight_ih": "per_channel", "weight_hh": "per_channel"}
        fused = from_float(lstm, {"": cell, "l0": {**cell, "x": None}})

    Args:
        lstm: a float LSTM on the CPU, of any number of layers and directions. It is left as it is and shares nothing with
            the result.
        qparams: the grids of each cell, by the name that ``nn.LSTM`` has for it at the end of its parameters' names: ``"l0"``,
            ``"l0_reverse"``, ``"l1"`` and so on; ``""`` is for all that have no entry of their own. A cell's grids are a
            ``CellQParams`` (``fused.cells()`` has them) or a dict:

            - ``x``, ``gates``, ... ``ogate_cy``, the parts of :data:`torch_lstm_quant.qparams.PARTS`: the grid of an
              activation. A part that is None or left out stays float32; but ``hx`` and ``cx``, left out or ``"shared"``, have
              the grids of ``ogate_cy`` and ``fgate_cx_igate_cgate``, which write what they read.
            - ``igates``, ``hgates`` and ``gates`` are for all four gates; ``"gates.forget_gate"`` is for one, and wins.
            - ``weight_ih`` and ``weight_hh`` must both be there: a grid, per tensor or per row; ``"per_channel"`` or
              ``"per_tensor"`` for symmetric int8 from the greatest magnitude, as the presets have it; or None for float32.

            A grid is a ``QParams`` (of a weight: ``WeightQParams``) or a dict of

            - ``scale``: positive; it is rounded to float32. For a weight one, or one for each of its ``4 * hidden_size`` rows:
              a list, tensor or array.
            - ``zero_point``: the integer that stands for 0.0; likewise.
            - ``quant_min`` and ``quant_max``, at most 16 bits apart (of a weight: within int8), or
            - ``dtype``: torch's or its name (``"uint8"``), whose limits are taken where none are given. ``qint32`` without
              limits has none, as in torch.ao.
        backend: ``"fused"`` for the kernel, ``"reference"`` for graphs of explicit quantize and dequantize ops.

    Returns:
        A :class:`torch_lstm_quant.LSTM`, or the reference LSTM; in eval mode, float32 in and out.

    Raises:
        TypeError: ``lstm`` is no ``nn.LSTM``, or a value of the wrong type in ``qparams``.
        ValueError: an LSTM that cannot be quantized, an unknown backend, a cell that is missing or that the LSTM does not
            have, or grids that are missing, unknown, contradictory or impossible: the message names layer, direction and part.
    """
    check_backend(backend)
    where = check_float_lstm(lstm)
    given = _by_cell(lstm, qparams, where)

    def cell(layer: int, direction: int) -> nn.Module:
        place, suffix = cell_name(where, layer, direction), _suffix(layer, direction)
        weights = {name: getattr(lstm, f"{name}_{suffix}").detach() for name in ("weight_ih", "weight_hh")}
        constructors = constructors_of(given[suffix], weights, place)
        split_gates = any(part_of(slot) != slot for slot in constructors)
        return convert_cell(observe_cell(float_cell(lstm, layer, direction, split_gates), constructors, place), place)

    reference: ReferenceLSTM = assemble(ReferenceLSTM, lstm, cell)
    return lower_lstm(reference, where) if backend == "fused" else reference.eval()


def _by_cell(lstm: nn.LSTM, qparams: object, where: str) -> dict[str, Any]:
    """What is given for each cell of the LSTM."""
    directions = range(2 if lstm.bidirectional else 1)
    cells = [_suffix(layer, direction) for layer in range(lstm.num_layers) for direction in directions]
    if not isinstance(qparams, Mapping):
        raise TypeError(f"{where}: qparams must be a dict from cells ({', '.join(cells)}) to their grids, got {qparams!r}")
    for name in qparams:
        if name != "" and name not in cells:
            raise ValueError(f"{where}: qparams must be for the cells {', '.join(cells)}, or '' for the rest, got {name!r}")
    for name in cells:
        if name not in qparams and "" not in qparams:
            got = ", ".join(map(repr, qparams)) or "none"
            raise ValueError(f"{where}: qparams must have every cell of {', '.join(cells)}, or '' for the rest, got {got}")
    return {name: qparams[name if name in qparams else ""] for name in cells}


def _suffix(layer: int, direction: int) -> str:
    """As ``nn.LSTM`` ends the names of a cell's parameters."""
    return f"l{layer}_reverse" if direction else f"l{layer}"

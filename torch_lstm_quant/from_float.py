"""From a float LSTM or LSTM cell and grids that are known, as a datasheet has them, to the fused one, without calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torch_lstm_quant.cell_graph import convert_cell, observe_cell, part_of
from torch_lstm_quant.cell_stack import assemble, cell_name, float_cell
from torch_lstm_quant.custom_config import check_backend
from torch_lstm_quant.float_lstms import FLOAT_LSTMS, FloatLSTM, check_float_lstm
from torch_lstm_quant.given_grids import constructors_of
from torch_lstm_quant.lowering import lower_module
from torch_lstm_quant.observed import ReferenceLSTM, ReferenceLSTMCell
from torch_lstm_quant.qparams import PARTS, WEIGHTS, CellQParams, own_parts


def from_float(lstm: FloatLSTM, qparams: Mapping[str, CellQParams | Mapping[str, Any]], backend: str = "fused") -> nn.Module:
    """Quantize an LSTM whose grids are known: the same bits as by calibrating and converting to the same grids.

    ::

        byte = {"scale": 0.02, "zero_point": 128, "dtype": torch.uint8}
        gates = {"scale": 12 / 2047, "zero_point": 0, "quant_min": -2048, "quant_max": 2047}
        cell = {"x": byte, "gates": gates, "ogate_cy": byte, "weight_ih": "per_channel", "weight_hh": "per_channel"}
        fused = from_float(lstm, {"": cell, "l0": {**cell, "x": None}})

    Args:
        lstm: a float ``nn.LSTM`` or ``nn.LSTMCell`` on the CPU. It is left as it is and shares nothing with the result.
        qparams: the grids of each cell, by the name that ``nn.LSTM`` has for it at the end of its parameters' names: ``"l0"``,
            ``"l0_reverse"``, ``"l1"`` and so on; ``""`` is for an ``nn.LSTMCell``, and for all that have no entry of their
            own. A cell's grids are a ``CellQParams`` (``fused.cells()`` has them) or a dict:

            - ``x``, ``gates``, ... ``hy``, the parts of :data:`torch_lstm_quant.qparams.PARTS`: the grid of an
              activation. A part that is None or left out stays float32; but ``hx`` and ``cx``, left out or ``"shared"``, have
              the grids of ``ogate_cy`` (``hy`` with ``proj_size``) and ``fgate_cx_igate_cgate``, which write what they read.
            - ``igates``, ``hgates`` and ``gates`` are for all four gates; ``"gates.forget_gate"`` is for one, and wins.
            - ``weight_ih`` and ``weight_hh``, and ``weight_hr`` with ``proj_size``, must be there: a grid, per tensor or per
              row; ``"per_channel"`` or ``"per_tensor"`` for symmetric int8 from the greatest magnitude, as the presets have
              it; or None for float32.

            A grid is a ``QParams`` (of a weight: ``WeightQParams``) or a dict of

            - ``scale``: positive; it is rounded to float32. For a weight one, or one for each of its rows: a list, tensor or
              array.
            - ``zero_point``: the integer that stands for 0.0; likewise.
            - ``quant_min`` and ``quant_max``, at most 16 bits apart (of a weight: within int8), or
            - ``dtype``: torch's or its name (``"uint8"``), whose limits are taken where none are given. ``qint32`` without
              limits has none, as in torch.ao.
        backend: ``"fused"`` for the kernel, ``"reference"`` for graphs of explicit quantize and dequantize ops.

    Returns:
        A :class:`torch_lstm_quant.LSTM` or :class:`torch_lstm_quant.LSTMCell`, or the reference form; in eval mode, float32 in
        and out.

    Raises:
        TypeError: ``lstm`` is neither, or a value of the wrong type in ``qparams``.
        ValueError: an LSTM that cannot be quantized, an unknown backend, a cell that is missing or that the LSTM does not
            have, or grids that are missing, unknown, contradictory or impossible: the message names layer, direction and part.
    """
    check_backend(backend)
    _check_is_lstm(lstm)
    where = check_float_lstm(lstm)
    given = _by_cell(_names(lstm), qparams, where)

    def convert(name: str, place: str, layer: int = 0, direction: int = 0) -> nn.Module:
        projects = isinstance(lstm, nn.LSTM) and lstm.proj_size > 0
        own = own_parts(WEIGHTS, projects=projects)
        weights = {weight: getattr(lstm, f"{weight}_{name}" if name else weight).detach() for weight in own}
        constructors = constructors_of(given[name], weights, place)
        split_gates = any(part_of(slot) != slot for slot in constructors)
        return convert_cell(observe_cell(float_cell(lstm, layer, direction, split_gates), constructors, place), place)

    reference: nn.Module
    if isinstance(lstm, nn.LSTMCell):
        reference = ReferenceLSTMCell(lstm, convert("", where))
    else:
        reference = assemble(
            ReferenceLSTM,
            lstm,
            lambda layer, direction: convert(_name(layer, direction), cell_name(where, layer, direction), layer, direction),
        )
    return lower_module(reference, where) if backend == "fused" else reference.eval()


def _names(lstm: FloatLSTM) -> list[str]:
    """The cells of a module, as the names of its parameters end."""
    if isinstance(lstm, nn.LSTMCell):
        return [""]
    return [_name(layer, direction) for layer in range(lstm.num_layers) for direction in range(1 + lstm.bidirectional)]


def _name(layer: int, direction: int) -> str:
    return f"l{layer}_reverse" if direction else f"l{layer}"


def _check_is_lstm(lstm: object) -> None:
    if isinstance(lstm, FLOAT_LSTMS):
        return
    advice = "other modules cannot be quantized so"
    if isinstance(lstm, nn.Module):
        found = [path for path, module in lstm.named_modules() if isinstance(module, FLOAT_LSTMS)]
        advice = f"pass one of its LSTMs, and put the result in its place: {', '.join(found)}" if found else advice
    raise TypeError(f"from_float takes one nn.LSTM or nn.LSTMCell, got {type(lstm).__name__}: {advice}")


def _by_cell(cells: list[str], qparams: object, where: str) -> dict[str, Any]:
    """What is given for each of the cells."""
    needed = "'' for the cell" if cells == [""] else f"{', '.join(cells)}, or '' for the rest"
    advice = 'put the grids of a cell under its name, {"": grids}'
    if isinstance(qparams, CellQParams):
        raise TypeError(f"{where}: qparams must be a dict from cells ({needed}) to their grids, got a CellQParams: {advice}")
    if not isinstance(qparams, Mapping):
        raise TypeError(f"{where}: qparams must be a dict from cells ({needed}) to their grids, got {qparams!r}")
    for name in qparams:
        if name != "" and name not in cells:
            is_part = isinstance(name, str) and name.partition(".")[0] in (*PARTS, *WEIGHTS)
            got = f"a part, {name!r}: {advice}" if is_part else repr(name)
            raise ValueError(f"{where}: qparams must be for {needed}, got {got}")
    for name in cells:
        if name not in qparams and "" not in qparams:
            got = ", ".join(map(repr, qparams)) or "none"
            raise ValueError(f"{where}: qparams must have all of {needed}, got {got}")
    return {name: qparams[name if name in qparams else ""] for name in cells}

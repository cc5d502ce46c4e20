"""``export_qparams``: the integers of a fused LSTM for targets that run no Python, as JSON and npz and as a C header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_lstm_quant.c_header import c_header, check_header_name
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.exported_cell import Function, Fused, Projection, check_folder, check_fused, functions, projections
from torch_lstm_quant.qparams import GATES, GRID_FIELDS, PER_GATE_PARTS, SECOND_GRIDS, QParams

FORMAT_VERSION = 2
FORMATS = ("json", "npz", "h")


def export_qparams(module: Fused, path: str | Path, *, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write everything that a fused LSTM computes with: weights, folded biases, scales, zero points, tables.

    - ``path.json``: sizes and the grid of every part, layer by layer and direction by direction, and the names of the arrays.
    - ``path.npz``: the arrays.
    - ``path.h``: all of it as C99, for ``examples/firmware``, which gives the module's bits.

    ``docs/export.md`` says what each entry means, ``docs/numerics.md`` what to compute with them.

    Args:
        module: a fused LSTM or LSTMCell (one layer, one direction), any mix of grids and float32 parts.
        path: where to write, without a suffix. Its last part names the variables of the C header.
        formats: which of "json", "npz" and "h" to write; the first two belong together.

    Returns:
        The files written.

    Raises:
        TypeError: ``module`` is no fused LSTM.
        ValueError: an unknown format, a path that ends in one, or for a C header, one whose last part is no C identifier.
        FileNotFoundError: the folder of ``path`` does not exist.
        ImportError: there is no NumPy, which writes npz files.
    """
    module = check_fused(module, "export_qparams")
    if isinstance(formats, str) or not formats or not set(formats) <= set(FORMATS):
        raise ValueError(f"formats must be some of {', '.join(FORMATS)}, got {formats!r}")
    path = Path(path)
    if path.suffix[1:] in FORMATS or not path.name:
        raise ValueError(f"path must be a name without {path.suffix or 'a suffix'}, which is added to it, got {str(path)!r}")
    if "h" in formats:
        check_header_name(path.name)
    check_folder(path)
    document, arrays = describe(module)
    written = []
    for suffix in dict.fromkeys(formats):
        file = path.with_name(f"{path.name}.{suffix}")
        if suffix == "json":
            file.write_text(json.dumps(document, indent=1) + "\n")
        elif suffix == "npz":
            _save_npz(file, arrays)
        else:
            file.write_text(c_header(path.name, document, arrays))
        written.append(file)
    return written


def describe(module: Fused) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the JSON holds, and the arrays that it names."""
    arrays = _Arrays()
    cells = []
    layers = module.cells()
    for layer, directions in enumerate(layers):
        for direction, cell in enumerate(directions):
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            cells.append({"layer": layer, "reverse": bool(direction), **_describe_cell(cell, suffix, arrays)})
    document = {
        "format": "torch_lstm_quant qparams",
        "format_version": FORMAT_VERSION,
        "input_size": module.input_size,
        "hidden_size": module.hidden_size,
        "proj_size": module.proj_size,
        "num_layers": len(layers),
        "bidirectional": len(layers[0]) == 2,
        "batch_first": getattr(module, "batch_first", False),
        "gates": list(GATES),
        "cells": cells,
    }
    return document, arrays.named


class _Arrays:
    """Arrays by name, equal tables under one."""

    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}
        self._tables: list[Tensor] = []

    def add(self, name: str, array: Tensor) -> str:
        self.named[name] = array
        return name

    def add_table(self, table: Tensor) -> str:
        for index, known in enumerate(self._tables):
            if known.dtype == table.dtype and torch.equal(known, table):
                return f"table_{index}"
        self._tables.append(table)
        return self.add(f"table_{len(self._tables) - 1}", table)


def _describe_cell(cell: Cell, suffix: str, arrays: _Arrays) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, grid in cell.qparams.rows():
        part, _, gate = name.partition(".")
        if part in (*PER_GATE_PARTS, *SECOND_GRIDS):
            parts.setdefault(part, {})[gate] = _describe_grid(grid)
        else:
            parts[part] = _describe_grid(grid)
    return {
        "parts": parts,
        "projections": {
            side: _describe_projection(projection, side, suffix, arrays) for side, projection in projections(cell).items()
        },
        "functions": {function.part: _describe_function(function, arrays) for function in functions(cell)},
    }


def _describe_grid(grid: QParams | None) -> dict[str, Any] | None:
    return {field: getattr(grid, field) for field in GRID_FIELDS} if grid else None


def _describe_projection(projection: Projection, side: str, suffix: str, arrays: _Arrays) -> dict[str, Any]:
    named = {"weight": projection.weight} | ({"bias": projection.bias} if side != "hr" else {})
    if projection.weight_grid is not None:
        named |= {"weight_scale": projection.weight_grid.scale, "weight_zero_point": projection.weight_grid.zero_point}
    if projection.is_integer:
        named |= {"offset": projection.offset(), "multiplier": projection.multiplier()}
    described: dict[str, Any] = {"reads": projection.part, "sums": "integer" if projection.is_integer else "float32"}
    if projection.is_integer:
        described["accumulator_bits"] = 32 if projection.largest_sum() < 2**31 else 64
    for name, array in named.items():
        kind, _, rest = name.partition("_")
        described[name] = arrays.add(f"{kind}_{side}{'_' + rest if rest else ''}_{suffix}", array)
    if projection.weight_grid is not None:
        described |= {f"weight_{limit}": getattr(projection.weight_grid, limit) for limit in ("quant_min", "quant_max")}
    return described


def _describe_function(function: Function, arrays: _Arrays) -> dict[str, Any]:
    table = function.table()
    described: dict[str, Any] = {"function": function.name, "table": None}
    if table is not None:
        output = function.output_grids[-1] if function.output_grids else None
        entries = table if output is None else output.quantize(table).to(torch.int32)
        if output is not None and entries.min() >= -(2**15) and entries.max() < 2**15:
            entries = entries.to(torch.int16)
        described["table"] = arrays.add_table(entries)
    grids = {"input": function.input_grids, "output": function.output_grids}
    return described | {key: [_describe_grid(grid) for grid in value] for key, value in grids.items()}


def _save_npz(file: Path, arrays: dict[str, Tensor]) -> None:
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError("export_qparams writes an npz file with NumPy, got none: pip install numpy") from error
    named: dict[str, Any] = {name: array.numpy() for name, array in arrays.items()}
    np.savez(file, **named)

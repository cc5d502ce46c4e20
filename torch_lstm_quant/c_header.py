"""A described LSTM as a C99 header: constants in structs that say what they are, and nothing that computes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torch_lstm_quant.qparams import GATES

_TYPES = """\
#ifndef LSTMQ_TYPES
#define LSTMQ_TYPES

#ifdef __GNUC__
#define LSTMQ_UNUSED __attribute__((unused)) /* no warning where a file includes a model and does not use it */
#else
#define LSTMQ_UNUSED
#endif

/* q = clamp(round to even(v * inv_scale) + zero_point, quant_min, quant_max); v = (q - zero_point) * scale.
   All zero: the part stays float32. */
typedef struct {
  float scale, inv_scale;
  int32_t zero_point, quant_min, quant_max;
} lstmq_grid;

/* Rows are those of the four gates (input, forget, cell, output), hidden_size each; of `hr`, proj_size.
   With `multiplier`: (float)(offset[row] + sum of q[k] * (weight[row][k] - weight_zero_point[row])) * multiplier[row].
   Without (NULL): a sum of float32s, k ascending, of v[k], on its grid if it has one, times the weight as a float32.
   Then + bias[row], or + 0.0f without (NULL). */
typedef struct {
  lstmq_grid grid;                  /* of what is multiplied with the weights */
  int32_t depth;                    /* columns */
  int32_t accumulator_bits;         /* 32: no sum and no part of one leaves int32; 64; 0: sums of float32s */
  const int8_t *weight;             /* [rows][depth], or NULL */
  const float *weight_float;        /* [rows][depth] in place of it, or NULL */
  const float *weight_scale;        /* [rows], NULL for float weights, as is weight_zero_point */
  const int32_t *weight_zero_point;
  const int64_t *offset;            /* [rows]: the zero point of the grid, folded into a bias; NULL as multiplier */
  const float *multiplier;
  const float *bias;
} lstmq_projection;

/* A table is indexed by q - quant_min of `input`. Its integers are on output_again, or on output where there is no such. */
typedef struct {
  int32_t is_tanh;                  /* or sigmoid */
  lstmq_grid input;                 /* all zero: any float32, and no table */
  lstmq_grid output, output_again;
  const int16_t *table16;           /* at most one of the three is there */
  const int32_t *table32;
  const float *table_float;         /* values, no integers: there is no output grid */
} lstmq_function;

/* docs/numerics.md of torch_lstm_quant says how the parts follow one another. */
typedef struct {
  int32_t input_size, hidden_size;
  int32_t proj_size;                /* 0: h is on ogate_cy's grid, hidden_size wide, and there is neither hr nor hy */
  lstmq_projection ih, hh, hr;
  lstmq_grid cx, igates[4], hgates[4], fgate_cx, igate_cgate, fgate_cx_igate_cgate, ogate_cy, hy;
  lstmq_function functions[5];      /* of the four gates, and of the cell state */
} lstmq_cell;

/* cells[layer * num_directions + direction]; direction 1 reads the sequence from its end. */
typedef struct {
  int32_t input_size, hidden_size, proj_size, num_layers, num_directions;
  const lstmq_cell *cells;
} lstmq_model;

#endif
"""

_C_TYPES = {
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.float32: "float",
}
_TABLES = {torch.int16: "table16", torch.int32: "table32", torch.float32: "table_float"}
_PER_LINE = 16


def check_header_name(name: str) -> None:
    """Refuse what is no C identifier, or one that the header's own types could have.

    Raises:
        ValueError: what it must be, and what it is.
    """
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or name.startswith("lstmq"):
        raise ValueError(
            "a C header is named as its variables are: it must be a C identifier that does not begin with lstmq, such as "
            f"my_model, got {name!r}"
        )


def c_header(name: str, document: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> str:
    """The text of a header that defines ``<name>_model``, from what :func:`torch_lstm_quant.firmware.describe` gave.

    Args:
        name: one that :func:`check_header_name` takes.
    """
    prefix, guard = name, f"LSTMQ_{name}_H"
    cells = ",\n".join(_cell(cell, prefix, arrays, document) for cell in document["cells"])
    sizes = {key: document[key] for key in ("input_size", "hidden_size", "proj_size", "num_layers")}
    model = _struct({**sizes, "num_directions": 1 + document["bidirectional"], "cells": f"{prefix}_cells"})
    lines = [
        f"/* A quantized LSTM, written by torch_lstm_quant.export_qparams (format version {document['format_version']}). */",
        f"#ifndef {guard}\n#define {guard}\n\n#include <stddef.h>\n#include <stdint.h>\n",
        _TYPES,
        *(_array(f"{prefix}_{key}", array) for key, array in arrays.items()),
        f"static const lstmq_cell {prefix}_cells[] = {{\n{cells}}};\n",
        f"LSTMQ_UNUSED static const lstmq_model {prefix}_model = {model};\n",
        f"#endif /* {guard} */\n",
    ]
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any], prefix: str, arrays: Mapping[str, Tensor], document: Mapping[str, Any]) -> str:
    parts = cell["parts"]

    def projection(side: str) -> str:
        described = cell["projections"].get(side)
        if described is None:
            return _struct({"grid": _grid(None)})
        weight = arrays[described["weight"]]
        names = {key: _reference(prefix, described.get(key)) for key in ("weight_scale", "weight_zero_point", "offset")}
        is_float = weight.dtype == torch.float32
        return _struct(
            {
                "grid": _grid(parts[described["reads"]]),
                "depth": weight.shape[1],
                "accumulator_bits": described.get("accumulator_bits", 0),
                "weight": "NULL" if is_float else _reference(prefix, described["weight"]),
                "weight_float": _reference(prefix, described["weight"]) if is_float else "NULL",
                **names,
                "multiplier": _reference(prefix, described.get("multiplier")),
                "bias": _reference(prefix, described.get("bias")),
            }
        )

    def function(described: Mapping[str, Any]) -> str:
        tables = dict.fromkeys(_TABLES.values(), "NULL")
        if described["table"] is not None:
            tables[_TABLES[arrays[described["table"]].dtype]] = _reference(prefix, described["table"])
        output, again = (*described["output"], None, None)[:2]
        grids = {"input": _grid((*described["input"], None)[0]), "output": _grid(output), "output_again": _grid(again)}
        return _struct({"is_tanh": int(described["function"] == "tanh"), **grids, **tables})

    depth = arrays[cell["projections"]["ih"]["weight"]].shape[1]
    fields = {"input_size": depth} | {key: document[key] for key in ("hidden_size", "proj_size")}
    fields |= {side: projection(side) for side in ("ih", "hh", "hr")}
    for part in ("cx", "fgate_cx", "igate_cgate", "fgate_cx_igate_cgate", "ogate_cy", "hy"):
        fields[part] = _grid(parts.get(part))
    for part in ("igates", "hgates"):
        fields[part] = _list(_grid(parts[part][gate]) for gate in GATES)
    fields["functions"] = _list(function(one) for one in cell["functions"].values())
    return _struct(fields)


def _reference(prefix: str, name: str | None) -> str:
    return "NULL" if name is None else f"{prefix}_{name}"


def _grid(grid: Mapping[str, Any] | None) -> str:
    if grid is None:
        return "{0, 0, 0, 0, 0}"
    floats = ", ".join(_number(float(grid[field])) for field in ("scale", "inv_scale"))
    return f"{{{floats}, {grid['zero_point']}, {grid['quant_min']}, {grid['quant_max']}}}"


def _struct(fields: Mapping[str, object]) -> str:
    return "{" + ",\n".join(f".{name} = {value}" for name, value in fields.items()) + "}"


def _list(values: Iterable[str]) -> str:
    return "{" + ",\n".join(values) + "}"


def _number(value: float) -> str:
    """The literal of a float32, or of an integer."""
    if isinstance(value, int):
        return str(value)
    mantissa, exponent = value.hex().split("p")  # hexadecimal, as only that is the same number to every compiler
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}f"


def _array(name: str, array: Tensor) -> str:
    numbers = [_number(value) for value in array.flatten().tolist()]
    if array.dtype == torch.int64:
        numbers = [f"INT64_C({number})" for number in numbers]
    lines = (", ".join(numbers[i : i + _PER_LINE]) for i in range(0, len(numbers), _PER_LINE))
    shape = " * ".join(map(str, array.shape))
    return f"static const {_C_TYPES[array.dtype]} {name}[{shape}] = {{\n" + ",\n".join(lines) + "};\n"

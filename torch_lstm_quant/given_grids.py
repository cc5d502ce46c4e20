"""Reads the grids of a cell as a user has written them down, or says what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

from torch_lstm_quant.cell_graph import GATE_NAMES, SHARED, SPLIT_WEIGHTS
from torch_lstm_quant.observed_grid import Constructor
from torch_lstm_quant.observers import GivenGridObserver
from torch_lstm_quant.qparams import (
    GATES,
    PARTS,
    PER_GATE_PARTS,
    PROJECTION,
    SECOND_GRIDS,
    UNBOUNDED,
    WEIGHTS,
    CellQParams,
    QParams,
    WeightQParams,
    own_parts,
)

_FIELDS = ("scale", "zero_point", "quant_min", "quant_max", "dtype")

_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "quint8", "qint8", "qint32")

_Number = TypeVar("_Number", int, float)
_ABSTRACT: dict[type, type] = {int: Integral, float: Real}

_SLOTS = {f"{part}.{gate}": f"{part}_{name}" for part in PER_GATE_PARTS for gate, name in zip(GATES, GATE_NAMES, strict=True)}
"""What a user calls one gate of a part, and what an observed cell does."""

_SYMMETRIC = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127}
_COMPUTED = {
    "per_channel": PerChannelMinMaxObserver.with_args(qscheme=torch.per_channel_symmetric, **_SYMMETRIC),
    "per_tensor": MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric, **_SYMMETRIC),
}


def constructors_of(given: object, weights: Mapping[str, Tensor], place: str) -> dict[str, Constructor | str | None]:
    """Constructors of observers that have the grids, by slot, as ``observe_cell`` takes them.

    Args:
        given: a ``CellQParams`` or a dict, as ``from_float`` describes it.
        weights: the cell's float weights by name; ``weight_hr`` among them where it has a projection.
        place: LSTM, layer and direction: every message begins with it.

    Raises:
        TypeError, ValueError: what is missing, unknown, contradictory or no grid.
    """
    with _named(place):
        if not isinstance(given, (CellQParams, Mapping)):
            raise TypeError(f"needs a dict from parts to grids, or a CellQParams, got {given!r}")
        grids: dict[str, Any] = dict(_entries(given) if isinstance(given, CellQParams) else given)
        _check_names(grids, weights)
    constructors: dict[str, Constructor | str | None] = dict.fromkeys(SHARED, "shared")
    for name, grid in grids.items():
        if name in WEIGHTS or (name in SHARED and isinstance(grid, str) and grid == "shared"):
            continue
        with _named(f"{place}, part {name}"):
            constructors[_SLOTS.get(name, name)] = _activation(grid)
    for name in weights:
        with _named(f"{place}, part {name}"):
            weight = _weight(grids[name], weights[name])
        if name in SPLIT_WEIGHTS and any(part in _SLOTS for part in grids):  # then the cell's gates are split
            units = len(weights[name]) // len(GATES)
            for index, gate in enumerate(GATE_NAMES):
                constructors[f"{name}_{gate}"] = _of_rows(weight, slice(index * units, (index + 1) * units))
        else:
            constructors[name] = _of_rows(weight, slice(None))
    return constructors


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Put the place in front of every message."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{place}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _entries(qparams: CellQParams) -> Iterator[tuple[str, Any]]:
    """The grids of a cell by name, the gates of a part apart where they differ."""
    for name in (field.name for field in fields(qparams)):
        grid = getattr(qparams, name)
        if name in SECOND_GRIDS:
            if any(grid):
                raise ValueError(f"second grids cannot be given, got {name}, which only torch.ao's own utilities make")
        elif name not in PER_GATE_PARTS:
            # of a cell without a projection they are None, which would be float32
            if name not in PROJECTION or qparams.hy or qparams.weight_hr:
                yield name, grid
        elif len(set(grid)) == 1:
            yield name, grid[0]
        else:
            yield from zip((f"{name}.{gate}" for gate in GATES), grid, strict=True)


def _check_names(grids: Mapping[Any, Any], weights: Mapping[str, Tensor]) -> None:
    known = own_parts((*PARTS, *WEIGHTS), projects="weight_hr" in weights)
    for name in grids:
        if name in PROJECTION and name not in known:
            raise ValueError(f"{name} is for an LSTM with proj_size, which this one has not, got {grids[name]!r}")
        if name not in known and name not in _SLOTS:
            raise ValueError(f"needs parts of {', '.join(known)}, or a gate's own, such as gates.{GATES[0]}, got {name!r}")
    for name in weights:
        if name not in grids:
            raise ValueError(
                f"needs {name}, got {', '.join(grids) or 'no part'}: give its grid, 'per_channel' or 'per_tensor' to have one "
                "computed, or None to keep it in float32"
            )


def _activation(given: object) -> Constructor | None:
    if given is None:
        return None
    if not isinstance(given, QParams):
        scale, zero_point, low, high = _checked_fields(given, "a QParams, or None for float32")
        given = QParams(_number("scale", scale, float), _number("zero_point", zero_point, int), low, high)
    if given != replace(given, inv_scale=0.0):
        raise ValueError(f"inv_scale must be 1 / scale rounded to float32, got {given.inv_scale!r} for {given.scale!r}")
    dtype = torch.qint32 if given.unbounded else given.dtype
    low, high = _limits_of(dtype) if given.unbounded else (given.quant_min, given.quant_max)
    return partial(GivenGridObserver, torch.tensor(given.scale), torch.tensor(given.zero_point), low, high, dtype)


def _weight(given: object, weight: Tensor) -> WeightQParams | None:
    rows = len(weight)
    if given is None:
        return None
    if isinstance(given, WeightQParams):
        if len(given.scale) != rows:
            raise ValueError(f"needs {rows} scales, one a row, got {len(given.scale)}")
        return given
    if isinstance(given, str) and given in _COMPUTED:
        observer = _COMPUTED[given]()
        observer(weight)
        scale, zero_point = observer.calculate_qparams()
        return WeightQParams(
            scale.expand(rows), zero_point.to(torch.int32).expand(rows), observer.quant_min, observer.quant_max
        )
    others = f"a WeightQParams, {' or '.join(map(repr, _COMPUTED))} (computed), or None for float32"
    given_scale, given_zero_point, low, high = _checked_fields(given, others)
    scales = _rows("scale", given_scale, float, rows)
    zero_points = _rows("zero_point", given_zero_point, int, rows)
    for row, zero_point in enumerate(zero_points):
        if not low <= zero_point <= high:
            raise ValueError(f"zero_point must lie in [quant_min, quant_max] = [{low}, {high}], got {zero_point} in row {row}")
    return WeightQParams(torch.tensor(scales, dtype=torch.float32), torch.tensor(zero_points, dtype=torch.int32), low, high)


def _of_rows(grid: WeightQParams | None, rows: slice) -> Constructor | None:
    """For some rows of a weight: of one grid where all have the same, since torch may round per tensor and per row apart."""
    if grid is None:
        return None
    scale, zero_point = grid.scale[rows], grid.zero_point[rows]
    if bool((scale == scale[0]).all() and (zero_point == zero_point[0]).all()):
        scale, zero_point = scale[0], zero_point[0]
    return partial(GivenGridObserver, scale, zero_point, grid.quant_min, grid.quant_max, torch.qint8)


def _checked_fields(given: object, others: str) -> tuple[object, object, int, int]:
    """Scale, zero point and limits of a dict; ``others``: what it could have been instead."""
    if not isinstance(given, Mapping):
        raise TypeError(f"needs a dict of {', '.join(_FIELDS)}, {others}, got {given!r}")
    for name in given:
        if name not in _FIELDS:
            raise ValueError(f"needs a dict of {', '.join(_FIELDS)}, got {name!r}")
    for name in ("scale", "zero_point"):
        if given.get(name) is None:
            raise ValueError(f"needs a {name}, got {', '.join(given) or 'nothing'}")
    return given["scale"], given["zero_point"], *_limits(given)


def _limits(given: Mapping[str, Any]) -> tuple[int, int]:
    """``quant_min`` and ``quant_max``, or those of the dtype."""
    limits = [_number(name, given[name], int) for name in ("quant_min", "quant_max") if given.get(name) is not None]
    dtype = given.get("dtype")
    if len(limits) == 1 or (not limits and dtype is None):
        raise ValueError(f"needs quant_min and quant_max, or a dtype, got {', '.join(given)}")
    if dtype is None:
        return limits[0], limits[1]
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    lowest, highest = _limits_of(getattr(torch, name))
    if not limits:
        # torch.ao's own LSTM has it for sums, and does not clamp there
        return (-UNBOUNDED, UNBOUNDED) if name == "qint32" else (lowest, highest)
    if limits[0] < lowest or limits[1] > highest:
        raise ValueError(
            f"quant_min and quant_max must lie within {name}'s [{lowest}, {highest}], got {limits[0]} and {limits[1]}"
        )
    return limits[0], limits[1]


def _limits_of(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return int(info.min), int(info.max)


def _number(name: str, value: Any, kind: type[_Number]) -> _Number:
    """``value`` as a Python number, whoever's number it is."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, _ABSTRACT[kind]):
        raise TypeError(f"{name} must be one {kind.__name__}, got {value!r}")
    try:
        return kind(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be a finite {kind.__name__}, got an integer of {len(str(value))} digits") from error


def _rows(name: str, values: Any, kind: type[_Number], rows: int) -> list[_Number]:
    """One number a row; a single one is for all of them."""
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, Sequence):
        values = [values]
    needed = f"needs one {name}, or {rows}, one a row"
    if values and isinstance(values[0], (list, tuple)):
        raise ValueError(f"{needed}, got the shape {_shape(values)}: flatten it to [{rows}]")
    if len(values) not in (1, rows):
        raise ValueError(f"{needed}, got {len(values)}")
    numbers = [_number(name, value, kind) for value in values]
    return numbers * rows if len(numbers) == 1 else numbers


def _shape(values: Any) -> list[int]:
    """Of lists or tuples in each other, as long as each first one."""
    return [len(values), *(_shape(values[0]) if values else [])] if isinstance(values, (list, tuple)) else []

"""What a configuration is refused for when it is made: all that can be known of its observers before they see data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.ao.quantization import FixedQParamsObserver, MinMaxObserver, PerChannelMinMaxObserver

from torch_lstm_quant.cell_graph import GATE_NAMES, SHARED
from torch_lstm_quant.observed_grid import Constructor, make_observer, observer_of, read_grid
from torch_lstm_quant.observers import CutMinMaxObserver, GivenGridObserver
from torch_lstm_quant.qparams import MAX_STEPS, UNBOUNDED, WEIGHTS, QParams
from torch_lstm_quant.tables import cut_unbounded

Known = QParams | Literal["from data"] | None
"""A part's grid as far as it is known before calibration; None for float32."""

_GIVEN = (FixedQParamsObserver.calculate_qparams, GivenGridObserver.calculate_qparams)
_OF_RANGES = (
    MinMaxObserver.calculate_qparams,
    PerChannelMinMaxObserver.calculate_qparams,
    CutMinMaxObserver.calculate_qparams,
)
_READ_BY_PROJECTIONS = ("x", "hx", "ogate_cy", "hy")
"""What projections read, where a cell has them: that of the step after, and that of ``proj_size``."""


def check_part(part: str, constructor: Constructor | str | None, place: str) -> Known:
    """The grid of a part, which needs to be one that the kernel can compute with.

    Args:
        part: one of ``PARTS`` or ``WEIGHTS``.
        constructor: of its observer or fake quantize; it is called.
        place: layer, direction and part, for messages.

    Raises:
        TypeError: it is not a constructor, fails, or does not make a module.
        ValueError: what it makes cannot be honoured, whatever it is going to see.
    """
    if constructor is None or (part in SHARED and isinstance(constructor, str) and constructor == "shared"):
        return None
    if isinstance(constructor, (str, nn.Module)) or not callable(constructor):
        raise TypeError(
            f"{place} must be a constructor such as MinMaxObserver.with_args(...), or None (float32), got {constructor!r}"
        )
    module = make_observer(constructor, place, weight=part in WEIGHTS)
    if module is None:
        return None
    grid = _grid_of(module, place)
    if part in _READ_BY_PROJECTIONS and isinstance(grid, QParams) and grid.unbounded:
        raise ValueError(
            f"{place} is what projections read, so it needs a grid of at most 16 bits, got qint32 without limits: give its "
            "observer quant_min and quant_max"
        )
    return grid


def check_cell(constructors: Mapping[str, Any], place: str) -> None:
    """Refuse grids without limits that a function's table, as far as its grids are known, cannot be cut from.

    Args:
        constructors: of one layer's one direction, by slot; each passed :func:`check_part`.
        place: layer and direction, for messages.
    """
    grids = {slot: check_part(slot, constructor, f"{place}, part {slot}") for slot, constructor in constructors.items()}
    for gate in GATE_NAMES:
        slot = f"gates_{gate}" if f"gates_{gate}" in grids else "gates"
        _check_function("tanh" if gate == "cell" else "sigmoid", grids[slot], grids[f"{gate}_gate"], f"{place}, part {slot}")
    state = "tanh_cy_input" if grids["tanh_cy_input"] is not None else "fgate_cx_igate_cgate"
    _check_function("tanh", grids[state], grids["tanh_cy"], f"{place}, part {state}")


def _check_function(function: str, read: Known, given: Known, place: str) -> None:
    """Refuse a grid without limits that a function's table cannot be cut from."""
    if not isinstance(read, QParams) or not read.unbounded or given == "from data":
        return
    try:
        cut_unbounded(function, (read,), () if given is None else (given,))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _grid_of(module: nn.Module, place: str) -> Known:
    """The grid of an observer that was just made."""
    observer: Any = observer_of(module)
    kind = type(observer).calculate_qparams
    if kind in _OF_RANGES:
        shape = (1,) if isinstance(observer, PerChannelMinMaxObserver) else ()
        observer.min_val, observer.max_val = torch.full(shape, -1.0), torch.full(shape, 1.0)
        try:
            read_grid(module, place)
        except AssertionError as error:  # torch's own checks
            raise ValueError(f"{place}: {type(observer).__name__} finds no grid for a range of -1 to 1: {error}") from error
        return "from data"
    if kind not in _GIVEN:
        return "from data"
    grid = read_grid(module, place)
    if grid.scale.dim():
        return "from data"  # a weight's rows, which no other part needs to know
    limits = grid.quant_min, grid.quant_max
    if grid.quant_max - grid.quant_min > MAX_STEPS:
        limits = -UNBOUNDED, UNBOUNDED
    try:
        return QParams(float(grid.scale), int(grid.zero_point), *limits)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error

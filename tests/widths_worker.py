"""Walks through the widths that an LSTMQConfig can ask for: each part, each kind of weight, on every ISA that it is given.

The ISA is chosen once a process, at the first call of the kernel, so each has a process of its own, which begins when
everything is quantized: ``python widths_worker.py ISA...`` prints one line of JSON for each of them.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FixedQParamsObserver, MinMaxObserver, PerChannelMinMaxObserver

import torch_lstm_quant as tlq
from torch_lstm_quant import ops, reference
from torch_lstm_quant.observed_grid import observer_of
from torch_lstm_quant.qparams import PARTS, PER_GATE_PARTS, PROJECTION, WEIGHTS, QParams, WeightQParams

I, H, STEPS, ROWS = 5, 18, 4, 3  # noqa: E741
PROJ = 7
"""``proj_size``, where there is one."""
OBSERVED = [part for part in PARTS if part not in ("hx", "cx")]
DTYPES = (torch.quint8, torch.int8, torch.int16, torch.qint32, torch.uint8, torch.int32, torch.qint8)
TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)


def signed(bits: int) -> tuple[int, int]:
    return -(1 << bits - 1), (1 << bits - 1) - 1


def unsigned(bits: int) -> tuple[int, int]:
    return 0, (1 << bits) - 1


def activation(limits: tuple[int, int], scheme: torch.qscheme, index: int = 0, *, fixed: bool = False) -> Any:
    """The constructor of a grid; ``index`` chooses among the dtypes that hold it."""
    low, high = limits
    holding = [dtype for dtype in DTYPES if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max]
    dtype = holding[index % len(holding)]
    common = {"dtype": dtype, "quant_min": low, "quant_max": high, "qscheme": scheme}
    # torch takes 0 and 255 for no limits where this observer has them
    if fixed and not (dtype == torch.qint32 and limits == (0, 255)):
        return FixedQParamsObserver.with_args(scale=6 / (high - low), zero_point=(low + high + 1) // 2, **common)
    return MinMaxObserver.with_args(**common)


def weight(limits: tuple[int, int], scheme: torch.qscheme, index: int = 0) -> Any:
    kind = PerChannelMinMaxObserver if scheme in CHANNEL else MinMaxObserver
    dtype = (torch.qint8, torch.int8)[index % 2]
    return kind.with_args(dtype=dtype, quant_min=limits[0], quant_max=limits[1], qscheme=scheme)


def all_parts(constructor: Any) -> dict[str, Any]:
    return dict.fromkeys(OBSERVED, constructor)


def walk() -> Iterator[tuple[str, tlq.LSTMQConfig]]:
    """A name and a configuration for each width, alone and in all parts."""
    int8 = tlq.LSTMQConfig.int8()
    for bits in range(1, 17):
        for index, (limits, scheme) in enumerate([(unsigned(bits), TENSOR[0]), (signed(bits), TENSOR[1])]):
            yield f"all {limits} {scheme}", int8.replace(**all_parts(activation(limits, scheme, bits + index)))
    for bits in (3, 8, 9, 16):
        yield f"all fixed {bits}", int8.replace(**all_parts(activation(unsigned(bits), TENSOR[0], bits, fixed=True)))
    for index, part in enumerate(PARTS):
        for bits in (3, 16):
            scheme = TENSOR[(index + bits // 8) % 2]
            yield f"{part} {bits} {scheme}", int8.replace(**{part: activation(signed(bits), scheme, index)})
        yield f"{part} float", tlq.LSTMQConfig.all_int8().replace(**{part: None})
    for bits in range(2, 9):
        for index, scheme in enumerate((*TENSOR, *CHANNEL)):
            symmetric = (1 - (1 << bits - 1), (1 << bits - 1) - 1)
            for limits in (signed(bits), symmetric if index % 2 else unsigned(min(bits, 7))):
                grid = weight(limits, scheme, bits + index)
                yield f"weights {limits} {scheme}", int8.replace(**dict.fromkeys(WEIGHTS, grid))
    operands = {"float": None} | {str(bits): activation(unsigned(bits), TENSOR[0]) for bits in (4, 8, 9, 12, 16)}
    weights = {"float": None, "tensor": weight((-127, 127), TENSOR[1]), "zero points": weight(signed(8), CHANNEL[0])}
    for operand, of_operand in operands.items():
        for kind, of_weight in weights.items():
            for v, side in (("x", "weight_ih"), ("ogate_cy", "weight_hh"), ("ogate_cy", "weight_hr"), ("hy", "weight_hh")):
                yield f"{v} {operand}, {side} {kind}", int8.replace(**{v: of_operand, side: of_weight})


@dataclass(frozen=True)
class Made:
    """The fused LSTM of a configuration, an input, what the integer reference gives of it, and what is wrong on every ISA."""

    fused: tlq.LSTM
    x: Tensor
    want: tuple[Tensor, ...]
    found: list[str]

    def complaints(self) -> list[str]:
        """What is wrong on the ISA of the process: also which of the fused results are not the reference's."""
        output, states = self.fused(self.x)
        results = zip(("output", "h_n", "c_n"), (output, *states), self.want, strict=True)
        return [*(f"{name} differs" for name, got, want in results if not torch.equal(got, want)), *self.found]


def complaints(config: tlq.LSTMQConfig, layers: int = 1, directions: int = 1, proj: int = 0) -> list[str]:
    """What is wrong with the fused LSTM that is made of a configuration: nothing, if it does what was asked for."""
    return made(config, layers, directions, proj).complaints()


def made(config: tlq.LSTMQConfig, layers: int = 1, directions: int = 1, proj: int = 0) -> Made:
    torch.manual_seed(0)
    lstm = nn.LSTM(I, H, num_layers=layers, bidirectional=directions == 2, proj_size=proj)
    x = 2 * torch.randn(STEPS, ROWS, I)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what narrow grids lose
        fused: Any = tlq.quantize(lstm, [x], config)
    found: list[str] = []
    cells = fused.cells()
    sums = iter(ops.sums(fused.packed()))
    for layer, row in enumerate(cells):
        for direction, cell in zip(("forward", "backward"), row, strict=False):
            asked = config.constructors(layer, direction)
            place = f"layer {layer}, {direction}"
            found += [f"{place}: {one}" for one in _wrong_grids(asked, cell)]
            suffix = f"_l{layer}{'_reverse' * (direction == 'backward')}"
            floats = {name: getattr(lstm, name + suffix) for name in WEIGHTS if proj or name not in PROJECTION}
            found += [f"{place}: {one}" for one in _wrong_weights(asked, cell, floats)]
            q = cell.qparams
            expected: tuple[str, ...] = expected_sums(q.x, q.weight_ih), expected_sums(q.hx, q.weight_hh)
            expected += (expected_sums(q.ogate_cy, q.weight_hr),) if proj else ()
            if (got := next(sums)) != expected:
                found.append(f"{place}: sums {got} for {expected}")
    return Made(fused, x, reference.lstm(cells, x), found)


def expected_sums(operand: QParams | None, weights: WeightQParams | None) -> str:
    """How a projection that is not deep is summed, as docs/widths.md says."""
    if operand is None or weights is None:
        return "float"
    return "int8" if operand.bits <= 8 and not weights.zero_point.any() else "wide"


def _wrong_grids(asked: dict[str, Any], cell: Any) -> Iterator[str]:
    """Parts whose grids are not what was asked for; one that is float32 in silence above all."""
    q = cell.qparams
    states = {"hx": "ogate_cy" if cell.weight_hr is None else "hy", "cx": "fgate_cx_igate_cgate"}
    grids = dict(q.rows()) | ({} if cell.weight_hr is None else {"hy": q.hy})
    for name, grid in grids.items():
        part, _, gate = name.partition(".")
        constructor = asked[part]
        if part in PER_GATE_PARTS:
            constructor = asked.get(f"{part}_{gate.removesuffix('_gate')}", constructor)
        if constructor == "shared":
            if grid != getattr(q, states[part]):
                yield f"{name} is {grid}, not the grid of {states[part]}"
        elif constructor is None:
            # tanh reads a cell state without limits on a grid that is cut where tanh no longer changes
            cut = part == "tanh_cy_input" and q.fgate_cx_igate_cgate is not None and q.fgate_cx_igate_cgate.unbounded
            if grid is not None and not cut:
                yield f"{name} is {grid}, asked for float32"
        elif grid is None:
            # a second grid that keeps every value of the first one is left out
            if part != "tanh_cy_input" or q.fgate_cx_igate_cgate is None:
                yield f"{name} is float32"
        else:
            observer = observer_of(constructor())
            limits = observer.quant_min, observer.quant_max
            unlimited = observer.dtype == torch.qint32 and limits == (0, 255)
            if (grid.quant_min, grid.quant_max) != limits and not unlimited:
                yield f"{name} is {grid}, asked for {limits}"


def _wrong_weights(asked: dict[str, Any], cell: Any, floats: dict[str, torch.Tensor]) -> Iterator[str]:
    for name, weights in floats.items():
        values, grid = getattr(cell, name), getattr(cell.qparams, name)
        if asked[name] is None:
            if grid is not None:
                yield f"{name} is {grid}, asked for float32"
            continue
        if grid is None:
            yield f"{name} is float32"
            continue
        observer = asked[name]()
        split = name not in PROJECTION and any(part.startswith(PER_GATE_PARTS) and part not in PARTS for part in asked)
        for own, rows in enumerate(weights.chunk(4 if split else 1)):
            observer = asked[name]()
            observer(rows.detach())
            scale, zero_point = observer.calculate_qparams()
            part = slice(own * len(rows), (own + 1) * len(rows))
            if not ((grid.scale[part] == scale).all() and (grid.zero_point[part] == zero_point).all()):
                yield f"{name} has another grid than its observer found"
        if not observer.quant_min <= values.min() <= values.max() <= observer.quant_max:
            yield f"{name} lies outside [{observer.quant_min}, {observer.quant_max}]"


def main(*isas: str) -> None:
    torch.set_num_threads(1)
    everything = []
    for walked, (name, config) in enumerate(walk(), start=1):
        projected = walked % 2 == 0 or "hy" in name or "weight_hr" in name
        everything.append((name, made(config, proj=PROJ if projected else 0)))
    for isa in isas:
        if os.fork():
            if os.wait()[1]:
                sys.exit(1)
            continue
        os.environ["TORCH_LSTM_QUANT_ISA"] = isa
        wrong = [(name, one.complaints()) for name, one in everything]
        failed = [(name, found) for name, found in wrong if found]
        print(json.dumps({"isa": ops.isa_active(), "walked": len(wrong), "failed": failed}))
        break


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Times the forms of an LSTM that the shapes of bench.py leave out, one thread, beside their accuracy.

python benchmarks/variants.py --variants proj,cell,widths,onnx
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import report
import torch
from peers import PEERS, OnnxRuntime
from shapes import Case, Shape
from systems import SYSTEMS, Call, dynamic, int8
from torch import nn
from torch.ao.quantization import MinMaxObserver
from turns import quartiles_over, take_turns

import torch_lstm_quant as tlq
from torch_lstm_quant.onnx_export import lstm_model

BLOCK_SECONDS = 1e-3
"""Calls are timed in blocks of at least about this long."""


def _proj(sizes: Sequence[int]) -> dict[str, tuple[Case, Call]]:
    """Projected to half as many values as there are hidden units."""
    case, whole = _case(sizes, proj=sizes[3] // 2), _case(sizes)
    return {
        "`int8()`, projected": (case, _made("int8", case)),
        "`int8()`, not projected": (whole, _made("int8", whole)),
        "float32, projected": (case, _made("float32", case)),
    }


def _cell(sizes: Sequence[int]) -> dict[str, tuple[Case, Call]]:
    """One step, whatever T is."""
    case = _case([1, *sizes[1:]])
    cell = nn.LSTMCell(case.shape.I, case.shape.H).eval().requires_grad_(False)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in case.lstm.state_dict().items()})
    steps, states = [], None
    for x in case.calibration:
        steps.append((x, states))
        states = cell(x, states)
    cells = {
        "`LSTMCell`, `int8()`": tlq.quantize(cell, steps, progress=False),
        "float32 `nn.LSTMCell`": cell,
        "`quantize_dynamic`": dynamic(cell),
    }
    x, (h, c) = case.x[0], (state[0] for state in case.states)

    def step(module: nn.Module) -> Call:
        return lambda: module(x, (h, c))

    return {name: (case, step(module)) for name, module in cells.items()}


_SIXTEEN = MinMaxObserver.with_args(dtype=torch.int16, quant_min=-32767, quant_max=32767, qscheme=torch.per_tensor_symmetric)
WIDTHS: dict[str, dict[str, Any]] = {
    "`int8()`": {},
    "x and h 16 bits": {"x": _SIXTEEN, "ogate_cy": _SIXTEEN},
    "x 16 bits": {"x": _SIXTEEN},
    "h 16 bits": {"ogate_cy": _SIXTEEN},
    "x float32": {"x": None},
    "x and h float32": {"x": None, "ogate_cy": None},
}


def _widths(sizes: Sequence[int]) -> dict[str, tuple[Case, Call]]:
    case = _case(sizes)

    def call(parts: dict[str, Any]) -> Call:
        fused = tlq.quantize(case.lstm, [case.calibration], tlq.LSTMQConfig.int8().replace(**parts), progress=False)
        return lambda: fused(case.x, case.states)

    ways = {name: call(parts) for name, parts in WIDTHS.items()} | {"float32 `nn.LSTM`": _made("float32", case)}
    return {name: (case, way) for name, way in ways.items()}


def _onnx(sizes: Sequence[int]) -> dict[str, tuple[Case, Call]]:
    case = _case(sizes)
    fused = int8(case)
    assert isinstance(fused, tlq.LSTM)
    inputs = dict(zip(("input", "h_0", "c_0"), (case.x, *case.states), strict=True))
    empty = (torch.empty_like(tensor) for tensor in (case.expected, *case.states))
    exported = OnnxRuntime(lstm_model(fused), inputs, dict(zip(("output", "h_n", "c_n"), empty, strict=True)), 1)
    ways: dict[str, Call] = {
        "`int8()`": lambda: fused(case.x, case.states),
        "`export_onnx`, in ONNX Runtime": exported,
        "ONNX Runtime's own int8": PEERS["ort_int8"].make(case, 1),
        "the same in 7 bits": PEERS["ort_int8_7bit"].make(case, 1),
        "float32 `nn.LSTM`": _made("float32", case),
    }
    return {name: (case, way) for name, way in ways.items()}


def _case(sizes: Sequence[int], proj: int = 0) -> Case:
    steps, batch, input_size, hidden_size = sizes
    return Case(Shape("variants", steps, batch, input_size, hidden_size, proj=proj))


def _made(system: str, case: Case) -> Call:
    return SYSTEMS[system].make(case, 1)


@dataclass(frozen=True)
class Variant:
    ways: Callable[[Sequence[int]], dict[str, tuple[Case, Call]]]
    """From sizes, what is timed, and the case by which its output is judged. The first is ours, by which times are divided."""
    shapes: str


VARIANTS = {
    "proj": Variant(_proj, "100,1,512,1024 50,16,256,512"),
    "cell": Variant(_cell, "1,1,128,128 1,16,128,128 1,1,512,512 1,16,512,512"),
    "widths": Variant(_widths, "100,1,256,256 50,16,256,256"),
    "onnx": Variant(_onnx, "20,1,128,128 50,1,256,256"),
}


def _calls_of_a_block(call: Call) -> int:
    call()
    started = time.perf_counter()
    call()
    return math.ceil(BLOCK_SECONDS / (time.perf_counter() - started))


def _block(call: Call, calls: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(calls):
            call()

    return run


def rows(variant: Variant, sizes: Sequence[int], seconds: float) -> list[list[str]]:
    """A row of the table for each way: its time, that over ours, its accuracy."""
    ways = variant.ways(sizes)
    with torch.inference_mode():
        accuracy = {name: case.sqnr(call()[0]) for name, (case, call) in ways.items()}
        counts = {name: _calls_of_a_block(call) for name, (_, call) in ways.items()}
        taken = take_turns({name: _block(call, counts[name]) for name, (_, call) in ways.items()}, seconds)
    times = {name: [block / counts[name] for block in blocks] for name, blocks in taken.items()}
    base, *_ = times.values()
    table = []
    for name, (case, _) in ways.items():
        lower, median, upper = quartiles_over(times[name], base)
        sqnr = accuracy[name]
        cells = [f"{1e3 * statistics.median(times[name]):.4g}", f"{median:.2f} ({lower:.2f} to {upper:.2f})"]
        table.append([str(case.shape), name, *cells, "-" if sqnr is None else f"{sqnr:.1f}"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    parser.add_argument("--shapes", help="T,B,input,hidden, separated by spaces; by default each variant's own")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each shape")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(report.ran_on(report.machine(), report.versions(["int8", "ort_int8"])) + "\n")
    print("median ms a call, one thread; over ours: median of the ratios (quartiles); dB beside float32\n")
    print("| shape | what | ms | over ours | dB |\n" + "| --- " * 5 + "|")
    for variant in (VARIANTS[name] for name in options.variants.split(",")):
        for shape in (options.shapes or variant.shapes).split():
            for row in rows(variant, [int(size) for size in shape.split(",")], options.seconds):
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

"""The systems that are timed: each makes, from a case, what is called with the case's inputs again and again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from shapes import Case, Shape
from torch import nn

import torch_lstm_quant as tlq

LSTM = Callable[..., Any]
"""Called as ``nn.LSTM`` is."""
Call = Callable[[], Sequence[Any]]
"""Runs a case's inputs through a system. What it gives begins with the output, which ``numpy.asarray`` takes."""


def _float32(case: Case) -> LSTM:
    return case.lstm


def dynamic(module: nn.Module) -> nn.Module:
    """An LSTM, or a cell of one, as ``quantize_dynamic`` makes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's own deprecations
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {type(module)}, dtype=torch.qint8)
    return quantized[0]  # type: ignore[no-any-return]


def _ours(preset: Callable[[], tlq.LSTMQConfig], backend: str = "fused") -> Callable[[Case], LSTM]:
    return lambda case: tlq.quantize(case.lstm, [case.calibration], preset(), backend, progress=False)


int8 = _ours(tlq.LSTMQConfig.int8)


def without_projection(shape: Shape) -> bool:
    """What others take: projected hidden states end in an error, or are not in their format."""
    return not shape.proj


@dataclass(frozen=True)
class System:
    make: Callable[[Case, int], Call]
    """From a case and the number of threads."""
    what: str
    takes: Callable[[Shape], bool] = lambda shape: True
    package: str | None = None
    """What it needs besides this package's own requirements, as pip names it."""


def _called(make: Callable[[Case], LSTM]) -> Callable[[Case, int], Call]:
    """With the case's input and states."""

    def make_call(case: Case, threads: int) -> Call:
        lstm, x, states = make(case), case.x, case.states
        return lambda: lstm(x, states)

    return make_call


SYSTEMS = {
    "int8": System(_called(int8), "torch_lstm_quant, preset int8, fused"),
    "int8_gates16": System(_called(_ours(tlq.LSTMQConfig.int8_gates16)), "torch_lstm_quant, preset int8_gates16, fused"),
    "float32": System(_called(_float32), "nn.LSTM"),
    "quantize_dynamic": System(
        _called(lambda case: dynamic(case.lstm)),
        "torch.ao.quantization.quantize_dynamic, qint8; gates and cell float32",
        takes=without_projection,
    ),
    "fx_reference": System(
        _called(_ours(tlq.LSTMQConfig.int8, "reference")),
        "the converted reference graph of preset int8, not lowered",
        takes=lambda shape: shape.reference,
    ),
}
OURS = "int8"
"""What the others' times are divided by."""

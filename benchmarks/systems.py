"""The systems that are timed: each makes, from a case, something that is called as ``nn.LSTM`` is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from shapes import Case
from torch import nn

import torch_lstm_quant as tlq

LSTM = Callable[..., Any]


def _float32(case: Case) -> LSTM:
    return case.lstm


def _quantize_dynamic(case: Case) -> LSTM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's own deprecations
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(case.lstm), {nn.LSTM}, dtype=torch.qint8)
    return quantized[0]  # type: ignore[no-any-return]


def _ours(preset: Callable[[], tlq.LSTMQConfig], backend: str = "fused") -> Callable[[Case], LSTM]:
    return lambda case: tlq.quantize(case.lstm, [case.calibration], preset(), backend, progress=False)


@dataclass(frozen=True)
class System:
    make: Callable[[Case], LSTM]
    what: str


SYSTEMS = {
    "int8": System(_ours(tlq.LSTMQConfig.int8), "torch_lstm_quant, preset int8, fused"),
    "int8_gates16": System(_ours(tlq.LSTMQConfig.int8_gates16), "torch_lstm_quant, preset int8_gates16, fused"),
    "float32": System(_float32, "nn.LSTM"),
    "quantize_dynamic": System(_quantize_dynamic, "torch.ao.quantization.quantize_dynamic, qint8; gates and cell float32"),
    "fx_reference": System(
        _ours(tlq.LSTMQConfig.int8, "reference"), "the converted reference graph of preset int8, not lowered"
    ),
}
OURS = "int8"
"""What the others' times are divided by."""

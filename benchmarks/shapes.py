"""The shapes that are timed, and the weights and inputs that every system gets for a shape."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """One call: ``T`` steps of ``B`` rows from ``I`` features to ``H`` hidden units."""

    name: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    directions: int = 1
    proj: int = 0
    """``proj_size``."""
    reference: bool = False
    """Whether the FX reference is timed too: it is too slow for all shapes."""

    @property
    def width(self) -> int:
        """Of a hidden state."""
        return self.proj or self.H

    def input_sizes(self) -> list[int]:
        """The features that each layer reads."""
        return [self.I if layer == 0 else self.directions * self.width for layer in range(self.layers)]

    def hidden_weights(self) -> int:
        """Of one layer and direction: what each step reads."""
        return 4 * self.H * self.width + self.H * self.proj

    def multiply_accumulates(self) -> int:
        weights = sum(4 * self.H * size + self.hidden_weights() for size in self.input_sizes())
        return self.T * self.B * self.directions * weights

    def __str__(self) -> str:
        stack = f" x{self.layers}" if self.layers > 1 else ""
        projected = f"->{self.proj}" if self.proj else ""
        return f"T{self.T} B{self.B} {self.I}->{self.H}{projected}{stack}{' bidirectional' if self.directions == 2 else ''}"


def _shapes() -> list[Shape]:
    plain = [
        Shape("step_128", 1, 1, 128, 128, reference=True),  # also Silero VAD
        Shape("step_512", 1, 1, 512, 512),
        Shape("step_1024", 1, 1, 1024, 1024),
        Shape("t100_40_256", 100, 1, 40, 256, reference=True),
        Shape("t100_512", 100, 1, 512, 512, reference=True),
        Shape("t100_1024", 100, 1, 1024, 1024),
        Shape("b16_256", 50, 16, 256, 256, reference=True),
        Shape("b64_512", 50, 64, 512, 512),
        Shape("b128_1024", 10, 128, 1024, 1024),
    ]
    models = [
        Shape("nemo_rnnt_predictor", 1, 1, 640, 640),
        Shape("dtln", 1, 1, 257, 128, layers=2),  # one step is 8 ms of sound
        Shape("keyword_spotting", 98, 1, 40, 128),
        Shape("crnn_ocr", 26, 1, 512, 256, layers=2, directions=2),
        Shape("pyannote", 293, 1, 60, 128, layers=4, directions=2),
        Shape("speaker_embedding", 160, 1, 40, 256, layers=3),
        Shape("mlperf_rnnt_lower", 100, 1, 240, 1024, layers=2),
        Shape("mlperf_rnnt_upper", 50, 1, 2048, 1024, layers=3),
        Shape("word_language_model", 35, 20, 200, 200, layers=2),
        Shape("icefall_transducer", 50, 1, 512, 1024, proj=512),
        Shape("projected_b16", 50, 16, 256, 512, proj=128),
    ]
    deepbench = [
        Shape(f"deepbench_{H}_b{B}", T, B, H, H) for T, H in ((150, 256), (25, 512), (25, 1024), (25, 1536)) for B in (1, 4)
    ]
    return plain + models + deepbench


SHAPES = {shape.name: shape for shape in _shapes()}
QUICK = [name for name in SHAPES if name.startswith(("step_", "t100_", "b16_", "b64_"))]
"""What ``--quick`` times."""

CALIBRATION_STEPS, CALIBRATION_ROWS = 64, 4


class Case:
    """The data of one shape, the same in every process: it depends on the shape's name alone.

    Weights are as ``nn.LSTM`` makes them, but larger and of unequal rows, as training leaves them, so that scales per channel
    and the ends of the gates' ranges matter. Inputs are noise that drifts from step to step, as features of sound do.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(zlib.crc32(shape.name.encode()))
        self.lstm = _lstm(shape, generator)
        rows = min(shape.B, CALIBRATION_ROWS)
        self.calibration = _drifting_noise((CALIBRATION_STEPS, rows, shape.I), generator)
        self.x = _drifting_noise((shape.T, shape.B, shape.I), generator)
        with torch.no_grad():
            # states from the middle of a stream
            self.states: tuple[Tensor, Tensor] = self.lstm(_drifting_noise((16, shape.B, shape.I), generator))[1]
            self.expected: Tensor = self.lstm(self.x, self.states)[0]

    def sqnr(self, output: Any) -> float | None:
        """The signal-to-noise ratio of a system's output to float32's, in dB; None: they are equal."""
        error = torch.from_numpy(np.asarray(output)).reshape(self.expected.shape) - self.expected
        noise = error.double().square().sum().item()
        return 10 * math.log10(self.expected.double().square().sum().item() / noise) if noise else None


def _lstm(shape: Shape, generator: torch.Generator) -> nn.LSTM:
    options = {"bidirectional": shape.directions == 2, "proj_size": shape.proj}
    lstm = nn.LSTM(shape.I, shape.H, shape.layers, **options).eval().requires_grad_(False)
    for name, parameter in lstm.named_parameters():
        torch.nn.init.uniform_(parameter, -(shape.H**-0.5), shape.H**-0.5, generator=generator)
        if name.startswith("weight"):
            rows = torch.randn(len(parameter), 1, generator=generator)
            parameter.mul_(1.5 * torch.exp(0.3 * rows))
        elif name.startswith("bias_ih"):
            parameter[shape.H : 2 * shape.H].add_(1.0)  # forget gates that remember
    return lstm


def _drifting_noise(size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    noise = torch.randn(size, generator=generator)
    for t in range(1, size[0]):
        noise[t] = 0.8 * noise[t - 1] + 0.6 * noise[t]
    return (0.7 * noise).clamp(-2.0, 2.0)

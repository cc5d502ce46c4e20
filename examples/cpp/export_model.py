"""Writes a quantized model as an AOTInductor package, which runs without Python: ``export_model.py MODEL.pt2``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import torch_lstm_quant as tlq

INPUT_SIZE, HIDDEN_SIZE, LAYERS = 40, 64, 2


class Model(nn.Module):
    """Normalizes its features, and gives its states back so that a call can go on where the last one ended."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(INPUT_SIZE))
        self.lstm = nn.LSTM(INPUT_SIZE, HIDDEN_SIZE, LAYERS)

    def forward(self, features: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (h, c) = self.lstm(features - self.mean, (h, c))
        return output, h, c


def example_inputs(steps: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[steps, batch, INPUT_SIZE]`` and zero states."""
    states = torch.zeros(LAYERS, batch, HIDDEN_SIZE)
    return torch.randn(steps, batch, INPUT_SIZE), states, states.clone()


def quantized_model() -> nn.Module:
    """A stand-in for a trained model and its calibration."""
    torch.manual_seed(0)
    return tlq.quantize(Model().eval(), [example_inputs(50, 8) for _ in range(4)])


def export(model: nn.Module, path: Path) -> None:
    """Any number of steps and rows. The sizes go along, for a program that does not know them."""
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    shapes = ({0: steps, 1: batch}, {1: batch}, {1: batch})
    program = torch.export.export(model, example_inputs(4, 3), dynamic_shapes=shapes)
    sizes = {"input_size": INPUT_SIZE, "hidden_size": HIDDEN_SIZE, "cells": LAYERS}
    metadata = {"aot_inductor.metadata": {name: str(size) for name, size in sizes.items()}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=metadata)


if __name__ == "__main__":
    export(quantized_model(), Path(sys.argv[1]))

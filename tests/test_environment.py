"""What environment variables and thread settings say wrong: an error that lists what is right, or no change at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_cells import Dice, random_layers

import torch_lstm_quant as tlq
from torch_lstm_quant import ops

WORKER = """
import os, sys
import torch, torch_lstm_quant as tlq
from random_cells import Dice, random_layers

for isa in sys.argv[1:] or [""]:
    if os.fork():  # each in a process of its own, none of which imports torch again
        if os.wait()[1]:
            sys.exit(1)
        continue
    if isa:
        os.environ["TORCH_LSTM_QUANT_ISA"] = isa
    module = tlq.LSTM(random_layers(Dice(0), 64, 256, 2, 1, "int8"))
    x = torch.linspace(-2, 2, 40 * 64).reshape(40, 1, 64)
    for call in (lambda: module(x)[0], lambda: tlq.Stream(module)(x)):
        try:
            print(call().double().sum().item())
        except RuntimeError as error:
            print(error)
    break
"""
NO_ISAS = ["mmx", "AVX2", *sorted(set(ops.isas_built()) - set(ops.isas_usable()))]


def module_and_stream(*isas: str, **environment: str) -> list[str]:
    """What each of them prints, for each ISA that is asked for: the sum of its output, or its error."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *isas],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_isa_that_is_unknown_or_lacking_is_refused_with_the_legal_ones() -> None:
    legal = ", ".join(ops.isas_usable())
    message = f"torch_lstm_quant: TORCH_LSTM_QUANT_ISA must be one of {legal} on this machine, got '{{}}'"
    assert module_and_stream(*NO_ISAS) == [message.format(isa) for isa in NO_ISAS for _ in range(2)]


@pytest.fixture(scope="module")
def plain() -> str:
    """What both print."""
    (line,) = set(module_and_stream(OMP_NUM_THREADS="1"))
    assert float(line)
    return line


@pytest.mark.parametrize("threads", ["0", "-3", "many"])
def test_thread_settings_without_meaning_change_nothing(threads: str, plain: str) -> None:
    assert module_and_stream(OMP_NUM_THREADS=threads) == [plain, plain]


@pytest.mark.parametrize("threads", [0, -1])
def test_thread_counts_that_torch_refuses_change_nothing(threads: int) -> None:
    module, x = tlq.LSTM(random_layers(Dice(0), 64, 256, 2, 1, "int8")), torch.randn(40, 1, 64)
    want = module(x)[0]
    with pytest.raises(RuntimeError, match="positive"):
        torch.set_num_threads(threads)
    assert torch.equal(module(x)[0], want)
    assert torch.equal(tlq.Stream(module)(x), want)

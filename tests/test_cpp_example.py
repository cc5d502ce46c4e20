"""The C++ example: a program without Python runs an AOTInductor package, and gives the fused module's bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cmake
import ninja
import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

from torch_lstm_quant import ops

EXAMPLE = Path(__file__).parents[1] / "examples/cpp"
sys.path.insert(0, str(EXAMPLE))

import export_model  # noqa: E402

OPERATORS = ops.library_path()

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the example links libraries by their names on Linux"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # torch's own exporter causes them
]


class Example(NamedTuple):
    model: nn.Module
    package: Path
    program: Path

    def run(self, features: Tensor, steps_a_call: int, **environment: str) -> Tensor:
        """All that the program writes for a sequence that begins with zero states."""
        arguments = [self.program, self.package, OPERATORS, str(features.shape[1]), str(steps_a_call)]
        done = subprocess.run(
            arguments, input=features.numpy().tobytes(), env=os.environ | environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy())


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    folder = tmp_path_factory.mktemp("cpp")
    model, package = export_model.quantized_model(), folder / "model.pt2"
    # faster to compile: no optimized wrapper, no headers compiled beforehand, which take longer than they spare one program
    with torch._inductor.config.patch(
        {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    ):
        export_model.export(model, package)
    program = Path(cmake.CMAKE_BIN_DIR, "cmake")
    options = [
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}",
        f"-DTORCH={torch.__path__[0]}",
        "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
    ]
    for command in (["-S", EXAMPLE, "-B", folder, "-G", "Ninja", *options], ["--build", folder]):
        done = subprocess.run([program, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return Example(model, package, folder / "lstm")


@pytest.mark.parametrize(("steps", "batch", "steps_a_call"), [(23, 3, 10), (5, 1, 1), (50, 2, 50)])
def test_the_program_gives_the_modules_bits(example: Example, steps: int, batch: int, steps_a_call: int) -> None:
    inputs = export_model.example_inputs(steps, batch)
    want = torch.cat([result.flatten() for result in example.model(*inputs)])
    assert torch.equal(example.run(inputs[0], steps_a_call), want)


def test_the_bits_are_those_of_every_isa(example: Example) -> None:
    features = export_model.example_inputs(7, 3)[0]
    want = example.run(features, 7)
    for isa in ops.isas_usable():
        assert torch.equal(example.run(features, 7, TORCH_LSTM_QUANT_ISA=isa), want)


def test_nothing_of_it_needs_python(example: Example) -> None:
    for binary in (example.program, OPERATORS):
        done = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True)
        assert "libtorch_cpu" in done.stdout
        assert "libpython" not in done.stdout


def test_without_the_operators_the_program_says_so(example: Example) -> None:
    arguments = [example.program, example.package, "/no/such/library.so", "1", "1"]
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "/no/such/library.so" in done.stderr


def test_input_that_ends_within_a_step_is_refused(example: Example) -> None:
    arguments = [example.program, example.package, OPERATORS, "1", "10"]
    done = subprocess.run(arguments, input=bytes(4 * (2 * export_model.INPUT_SIZE + 1)), capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.decode() == "the input ends within a step\n"

"""Exported integers: the C example gives the fused module's bits, JSON and npz hold all that a module is made of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deep_cells import DEEP
from kernel_worker import same
from random_cells import PRESETS, Dice, random_input, random_layers, random_proj_size, random_states
from torch import Tensor

import torch_lstm_quant as tlq
from torch_lstm_quant import tables
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qparams import GATES, PARTS, PER_GATE_PARTS, SECOND_GRIDS

EXAMPLE = Path(__file__).parents[1] / "examples/firmware"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-pedantic", "-Wno-unused-function")
COMPILER = shutil.which("cc") or shutil.which("gcc") or "gcc"


def compile_example(module: tlq.LSTM, folder: Path) -> Path:
    tlq.export_qparams(module, folder / "model", formats=["h"])
    program = folder / "program"
    sources = [f"-I{folder}", str(EXAMPLE / "main.c"), "-o", str(program), "-lm"]
    done = subprocess.run(
        [COMPILER, "-std=c99", "-O1", "-ffp-contract=off", *WARNINGS, *sources], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return program


def run_example(program: Path, x: Tensor, h: Tensor, c: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    steps, rows = x.shape[:2]
    numbers = torch.cat([values.transpose(0, 1).reshape(rows, -1) for values in (x, h, c)], dim=1)
    done = subprocess.run([program, str(steps)], input=numbers.numpy().tobytes(), capture_output=True, check=True)
    got = torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy()).reshape(rows, -1)
    output, h_n, c_n = got.split([steps * directions * h.shape[2], h[:, 0].numel(), c[:, 0].numel()], dim=1)
    return (
        output.reshape(rows, steps, -1).transpose(0, 1),
        h_n.reshape(rows, len(h), -1).transpose(0, 1),
        c_n.reshape(rows, len(h), -1).transpose(0, 1),
    )


def assert_same_bits(layers: list[list[Cell]], x: Tensor, h: Tensor, c: Tensor, folder: Path) -> None:
    module = tlq.LSTM(layers)
    output, (h_n, c_n) = module(x, (h, c))
    got = run_example(compile_example(module, folder), x, h, c, len(layers[0]))
    for name, one, other in zip(("output", "h_n", "c_n"), got, (output, h_n, c_n), strict=True):
        assert same(one.contiguous(), other.contiguous()).all(), name


def random_call(dice: Dice, preset: str | None) -> tuple[list[list[Cell]], Tensor, Tensor, Tensor]:
    num_layers, directions, rows = dice.integer(1, 2), dice.integer(1, 2), dice.integer(1, 3)
    input_size, hidden_size = dice.integer(1, 40), dice.integer(1, 24)
    proj_size = random_proj_size(dice, hidden_size)
    layers = random_layers(dice, input_size, hidden_size, num_layers, directions, preset, proj_size)
    return layers, random_input(dice, dice.integer(1, 20), rows, input_size), *random_states(dice, layers, rows)


def test_the_c_example_refuses_input_that_ends_within_a_row(tmp_path: Path) -> None:
    program = compile_example(tlq.LSTM(random_layers(Dice(0), 3, 5, 1, 1, "int8")), tmp_path)
    row = bytes(4 * (2 * 3 + 5 + 5))
    for given in (b"", row[4:], row + row[4:], row + row[: 4 * 2 * 3]):
        done = subprocess.run([program, "2"], input=given, capture_output=True, check=False)
        assert done.returncode == 1
        assert done.stderr.decode() == f"row {len(given) // len(row)}: needs 16 floats: x, then h and c\n"
    assert subprocess.run([program, "2"], input=row + row, check=False, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seed", range(2))
def test_the_c_example_gives_the_fused_bits_of_presets(preset: str, seed: int, tmp_path: Path) -> None:
    assert_same_bits(*random_call(Dice(seed), preset), tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_the_c_example_gives_the_fused_bits_of_any_mix_of_parts(seed: int, tmp_path: Path) -> None:
    assert_same_bits(*random_call(Dice(100 + seed), None), tmp_path)


@pytest.mark.parametrize("name", ["16-bit h", "16-bit h, affine"])
def test_the_c_example_gives_the_fused_bits_of_deep_sums(name: str, tmp_path: Path) -> None:
    deep = DEEP[name]
    assert_same_bits([[deep.cell()]], *deep.inputs(), tmp_path)


def test_a_cell_is_exported_as_one_layer(tmp_path: Path) -> None:
    layers = random_layers(Dice(5), 9, 7, 1, 1, "int8_gates16")
    tlq.export_qparams(tlq.LSTM(layers), tmp_path / "lstm")
    tlq.export_qparams(tlq.LSTMCell(layers[0][0]), tmp_path / "cell")
    assert (tmp_path / "cell.json").read_text() == (tmp_path / "lstm.json").read_text()
    assert "cell_model = " in (tmp_path / "cell.h").read_text()


def read_cells(path: Path) -> list[list[Cell]]:
    """The cells, from JSON and npz alone."""
    document, arrays = json.loads(path.with_suffix(".json").read_text()), np.load(path.with_suffix(".npz"))
    directions = 1 + document["bidirectional"]

    def grid(described: dict[str, Any] | None) -> tlq.QParams | None:
        return tlq.QParams(**described) if described else None

    def cell(described: dict[str, Any]) -> Cell:
        parts: dict[str, Any] = {}
        for part in (*PARTS, *SECOND_GRIDS):
            one = described["parts"].get(part)
            if part in PER_GATE_PARTS or (one and part in SECOND_GRIDS):
                parts[part] = tuple(grid(one[gate]) for gate in GATES)
            elif part not in SECOND_GRIDS:
                parts[part] = grid(one)
        tensors = {}
        for side, projection in described["projections"].items():
            named = {key: torch.from_numpy(arrays[name]) for key, name in projection.items() if name in arrays}
            tensors |= {f"{kind}_{side}": named[kind] for kind in ("weight", "bias") if kind in named}
            if "weight_scale" in named:
                limits = projection["weight_quant_min"], projection["weight_quant_max"]
                parts[f"weight_{side}"] = tlq.WeightQParams(named["weight_scale"], named["weight_zero_point"], *limits)
        return Cell(tlq.CellQParams(**parts), **tensors)

    cells = [cell(described) for described in document["cells"]]
    return [cells[i : i + directions] for i in range(0, len(cells), directions)]


@pytest.mark.parametrize("seed", range(20))
def test_json_and_npz_hold_all_that_a_module_is_made_of(seed: int, tmp_path: Path) -> None:
    layers, x, h, c = random_call(Dice(seed), ([None, *PRESETS])[seed % 5])
    module = tlq.LSTM(layers)
    tlq.export_qparams(module, tmp_path / "lstm", formats=["json", "npz"])
    again = tlq.LSTM(read_cells(tmp_path / "lstm"))
    assert torch.equal(again.packed(), module.packed())
    assert same(again(x, (h, c))[0], module(x, (h, c))[0]).all()


@pytest.mark.parametrize("seed", range(8))
def test_exported_tables_and_folded_biases_are_those_of_the_contract(seed: int, tmp_path: Path) -> None:
    layers, *_ = random_call(Dice(seed), ([None, *PRESETS])[seed % 5])
    tlq.export_qparams(tlq.LSTM(layers), tmp_path / "lstm")
    document, arrays = json.loads((tmp_path / "lstm.json").read_text()), np.load(tmp_path / "lstm.npz")
    for described, cell in zip(document["cells"], [cell for cells in layers for cell in cells], strict=True):
        for function, want in zip(described["functions"].values(), tables.function_tables(cell.qparams), strict=True):
            if function["table"] is None:
                assert want.numel() == 0
                continue
            values = torch.from_numpy(arrays[function["table"]])
            if function["output"]:
                assert values.dtype in (torch.int16, torch.int32)
                values = tlq.QParams(**function["output"][-1]).dequantize(values)
            assert torch.equal(values, want)
        for projection in described["projections"].values():
            grid = described["parts"][projection["reads"]]
            assert (projection["sums"] == "integer") == ("offset" in projection)
            if projection["sums"] == "integer":
                centred = arrays[projection["weight"]].astype(np.int64) - arrays[projection["weight_zero_point"]][:, None]
                assert (arrays[projection["offset"]] == -grid["zero_point"] * centred.sum(1)).all()
                multiplier = np.float32(grid["scale"]) * arrays[projection["weight_scale"]]
                assert (arrays[projection["multiplier"]] == multiplier).all()


@pytest.mark.parametrize("name", ["8 bits, last in int32", "8 bits, beyond", "16-bit h"])
def test_the_accumulator_is_said_to_need_64_bits_where_a_sum_leaves_32(name: str, tmp_path: Path) -> None:
    deep = DEEP[name]
    tlq.export_qparams(tlq.LSTM([[deep.cell()]]), tmp_path / "lstm", formats=["json"])
    projections = json.loads((tmp_path / "lstm.json").read_text())["cells"][0]["projections"]
    bits = {side: projection["accumulator_bits"] for side, projection in projections.items()}
    deep_side, other = ("hh", "ih") if deep.of_h else ("ih", "hh")
    assert bits[other] == 32
    assert bits[deep_side] == (32 if name == "8 bits, last in int32" else 64)


def test_headers_of_two_models_go_together(tmp_path: Path) -> None:
    names = ("float", "Wake", "wake", "k_1", "lstm")
    headers = []
    for seed, name in enumerate(names):
        module = tlq.LSTM(random_layers(Dice(seed), 3 + seed, 4, 1, 1, "all_int8"))
        headers += tlq.export_qparams(module, tmp_path / name, formats=["h"])
    assert headers == [tmp_path / f"{name}.h" for name in names]
    sizes = ", ".join(f"{name}_model.cells[0].input_size == {3 + seed}" for seed, name in enumerate(names))
    checks = sizes.replace(", ", " && ")
    program = "".join(f'#include "{header.name}"\n' for header in headers) + f"int main(void) {{ return !({checks}); }}\n"
    (tmp_path / "all.c").write_text(program)
    compiled = [COMPILER, "-std=c99", *WARNINGS, str(tmp_path / "all.c"), "-o", str(tmp_path / "all")]
    done = subprocess.run(compiled, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([str(tmp_path / "all")], check=False).returncode == 0


def test_a_header_that_is_not_used_gives_no_warning(tmp_path: Path) -> None:
    tlq.export_qparams(tlq.LSTM(random_layers(Dice(0), 3, 4, 1, 1, "int8")), tmp_path / "model", formats=["h"])
    (tmp_path / "main.c").write_text('#include "model.h"\nint main(void) { return 0; }\n')
    strict = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wunused-const-variable=2", "-Werror")
    compiled = [COMPILER, *strict, str(tmp_path / "main.c"), "-o", str(tmp_path / "main")]
    done = subprocess.run(compiled, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["7_segments", "my-model", "模型", "lstmq", "lstmq_model"])
def test_a_header_needs_the_name_of_a_variable(name: str, tmp_path: Path) -> None:
    module = tlq.LSTM(random_layers(Dice(5), 3, 4, 1, 1, "all_int8"))
    with pytest.raises(ValueError, match=f"must be a C identifier.*got '{name}'"):
        tlq.export_qparams(module, tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert len(tlq.export_qparams(module, tmp_path / name, formats=["json", "npz"])) == 2


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    module = tlq.LSTM(random_layers(Dice(2), 3, 4, 1, 1, "int8"))
    with pytest.raises(TypeError, match=r"takes a fused .*LSTM or LSTMCell, got Sequential: pass one of its fused LSTMs: 0"):
        tlq.export_qparams(torch.nn.Sequential(module), tmp_path / "lstm")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got torch\.nn\.LSTM: quantize"):
        tlq.export_qparams(torch.nn.LSTM(3, 4), tmp_path / "lstm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"some of json, npz, h, got \['c'\]"):
        tlq.export_qparams(module, tmp_path / "lstm", formats=["c"])
    with pytest.raises(ValueError, match=r"without \.json.*got"):
        tlq.export_qparams(module, tmp_path / "lstm.json")
    missing = re.escape(str(tmp_path / "build"))
    with pytest.raises(FileNotFoundError, match=f"got '{missing}/lstm': make the folder, pathlib.Path.'{missing}'.*mkdir"):
        tlq.export_qparams(module, tmp_path / "build/lstm")
    with pytest.raises(ValueError, match="on the meta device"):
        tlq.export_qparams(module.to("meta"), tmp_path / "lstm")
    assert not list(tmp_path.iterdir())


def test_without_numpy_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tlq.LSTM(random_layers(Dice(2), 3, 4, 1, 1, "int8"))
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match="pip install numpy"):
        tlq.export_qparams(module, tmp_path / "lstm", formats=["npz"])

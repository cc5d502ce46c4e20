"""The fused op gives the integer reference's bits: on every ISA of this machine, 1 and 2 threads, any shape and grids."""

from __future__ import annotations

import os

import pytest
from deep_cells import DEEP
from isa_runs import run_on

from torch_lstm_quant import ops, reference

# `make proof` sets it to 50 million and writes down what it saw
VALUES = int(os.environ.get("KERNEL_TEST_VALUES", 500_000))


@pytest.mark.parametrize("isa", ops.isas_built())
def test_every_isa_gives_the_reference_bits(isa: str) -> None:
    result = run_on(isa, "kernel_worker.py", 1, VALUES)
    assert set(result["differing"]) == {"1", "2"}
    for threads, differing in result["differing"].items():
        assert differing == 0, result
        print(f"{isa}, {threads} threads: {result['compared']:,} values equal")
    assert result["compared"] >= VALUES


@pytest.mark.parametrize("name", DEEP)
def test_deep_cells_reach_the_end_of_int32(name: str) -> None:
    deep = DEEP[name]
    cell, (x, h0, _) = deep.cell(), deep.inputs()
    v, grid, side = (h0[0], cell.qparams.hx, "hh") if deep.of_h else (x[0], cell.qparams.x, "ih")
    assert grid
    weight, weight_grid = getattr(cell, f"weight_{side}"), getattr(cell.qparams, f"weight_{side}")
    largest = int(reference._integer_sums(grid.quantize(v), grid, weight, weight_grid).long().abs().max())
    if "last in int32" in name:
        assert 2**31 - 255 * 128 <= largest < 2**31
    else:
        assert largest >= 2**31

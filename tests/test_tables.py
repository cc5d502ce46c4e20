"""The tables of sigmoid and tanh: rounded once from float64, the same on every machine, the oracle's values entry by entry."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_lstm_quant import float64_functions, reference
from torch_lstm_quant.qparams import UNBOUNDED, QParams
from torch_lstm_quant.tables import cut_unbounded, function_table

FUNCTIONS = ["sigmoid", "tanh"]
FIXED = {
    "int8 gates": QParams(12 / 2047, 0, -2048, 2047),
    "int8 tanh_cy_input": QParams(10 / 2047, 0, -2048, 2047),
    "int8_gates16 gates": QParams(12 / 32767, 0, -32768, 32767),
    "int8_gates16 tanh_cy_input": QParams(10 / 32767, 0, -32768, 32767),
    "fixed16 gates": QParams(2**-11, 0, -32768, 32767),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64_functions_are_within_four_ulp(function: str) -> None:
    magnitude = torch.logspace(-12, 2.8, 20001, dtype=torch.float64)
    x = torch.cat([magnitude, -magnitude, torch.zeros(1, dtype=torch.float64)])
    got, want = getattr(float64_functions, function)(x), getattr(torch, function)(x)
    assert ((got - want).abs() <= 4 * 2.0**-52 * want.abs()).all()


def exact(function: str, x: float) -> Fraction:
    """Rational enclosure's midpoint of the function, to 40 digits: exp by its series on a halved argument."""
    halvings = 20
    y = Fraction(x) * (-1 if function == "sigmoid" else -2) / 2**halvings
    term, total = Fraction(1), Fraction(1)
    for k in range(1, 12):
        term = term * y / k
        total += term
    for _ in range(halvings):
        total = Fraction(int(total * total * 10**60), 10**60)
    return 1 / (1 + total) if function == "sigmoid" else (1 - total) / (1 + total)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_entries_are_correctly_rounded(function: str) -> None:
    grid, output = FIXED["int8 gates"], QParams(2**-15, 0, -(1 << 15), 1 << 15)
    table = function_table(function, (grid,), (output,))
    for q in range(-2048, 2048, 37):
        value = exact(function, (q * torch.tensor(grid.scale)).item())
        assert table[q + 2048] == round(value * 2**15) / 2**15


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("output", [None, QParams(2**-15, 0, -(1 << 15), 1 << 15), QParams(1 / 255, 0, 0, 255)])
def test_the_presets_tables_are_the_oracles(function: str, name: str, output: QParams | None) -> None:
    check_against_the_oracle(function, FIXED[name], output)


def check_against_the_oracle(function: str, grid: QParams, output: QParams | None) -> None:
    v = grid.dequantize(torch.arange(grid.quant_min, grid.quant_max + 1, dtype=torch.int32))
    want = reference._function(function, v, grid, output)
    assert torch.equal(function_table(function, (grid,), (output,) if output else ()), want)


GRIDS = st.builds(
    lambda scale, low, width, zero: QParams(scale, low + zero % (width + 1), low, low + width),
    st.floats(2.0**-14, 0.125, width=32),
    st.integers(-(1 << 15), 100),
    st.integers(1, 1 << 12),
    st.integers(0, 1 << 12),
)


@settings(max_examples=50)
@given(st.sampled_from(FUNCTIONS), GRIDS, st.none() | GRIDS)
def test_any_grids_tables_are_the_oracles(function: str, grid: QParams, output: QParams | None) -> None:
    check_against_the_oracle(function, grid, output)


@settings(max_examples=30)
@given(st.sampled_from(FUNCTIONS), GRIDS, GRIDS, GRIDS, GRIDS)
def test_grids_before_and_after_a_function_act_in_turn(
    function: str, first: QParams, again: QParams, output: QParams, output_again: QParams
) -> None:
    v = first.dequantize(torch.arange(first.quant_min, first.quant_max + 1, dtype=torch.int32))
    value = reference._function(function, again.dequantize(again.quantize(v)), first, output)
    want = output_again.dequantize(output_again.quantize(value))
    assert torch.equal(function_table(function, (first, again), (output, output_again)), want)


FINE = QParams(2**-15, 0, -(1 << 15), 1 << 15)


@settings(max_examples=40)
@given(
    st.sampled_from(FUNCTIONS),
    st.floats(2.0**-10, 100, width=32),
    st.integers(-(1 << 16), 1 << 16),
    st.sampled_from([(), (FINE,), (QParams(1 / 255, 3, 0, 255),), (FINE, QParams(0.1, 0, -5, 5))]),
)
def test_a_grid_without_limits_is_cut_where_the_output_stays_the_same(
    function: str, scale: float, zero_point: int, outputs: tuple[QParams, ...]
) -> None:
    grid = QParams(scale, zero_point, -UNBOUNDED, UNBOUNDED)
    cut = cut_unbounded(function, (grid,), outputs) if scale > 2**-9 or outputs else grid
    q = torch.cat([torch.arange(-100_000, 100_000), torch.tensor([-UNBOUNDED, UNBOUNDED])])
    v = grid.dequantize(q)
    want = reference._function(function, v, grid, outputs[0] if outputs else None)
    got = reference._function(function, cut.dequantize(cut.quantize(v)), cut, outputs[0] if outputs else None)
    for again in outputs[1:]:
        want, got = again.dequantize(again.quantize(want)), again.dequantize(again.quantize(got))
    assert torch.equal(got, want)


def test_a_grid_too_fine_to_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sigmoid of a grid without limits, in steps of 0\.0001, changes over more than"):
        cut_unbounded("sigmoid", (QParams(1e-4, 0, -UNBOUNDED, UNBOUNDED),), (FINE,))

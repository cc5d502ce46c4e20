"""The integer reference against what it must equal by construction: nn.LSTM where no part has a grid, exact sums else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_lstm_quant import reference
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qparams import CellQParams, QParams, WeightQParams


def float_cells(lstm: nn.LSTM) -> list[list[Cell]]:
    """Cells in which every part stays float32."""
    suffixes = ("", "_reverse") if lstm.bidirectional else ("",)

    def cell(layer: int, suffix: str) -> Cell:
        names = (f"{name}_l{layer}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        return Cell(CellQParams(), *(getattr(lstm, name).detach() for name in names))

    return [[cell(layer, suffix) for suffix in suffixes] for layer in range(lstm.num_layers)]


@settings(max_examples=30)
@given(
    st.integers(1, 3), st.booleans(), st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.booleans()
)
def test_all_parts_float_is_nn_lstm(
    layers: int, bidirectional: bool, steps: int, rows: int, input_size: int, hidden_size: int, states: bool
) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(input_size, hidden_size, layers, bidirectional=bidirectional)
    x = torch.randn(steps, rows, input_size)
    shape = (layers * (1 + bidirectional), rows, hidden_size)
    h0, c0 = (torch.randn(shape), torch.randn(shape)) if states else (None, None)
    with torch.no_grad():
        output, (h_n, c_n) = lstm(x, (h0, c0) if states else None)
    got = reference.lstm(float_cells(lstm), x, h0, c0)
    for one, other in zip(got, (output, h_n, c_n), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_float_functions_are_within_one_ulp(function: str) -> None:
    magnitudes = torch.logspace(-30, 2, 20001)
    v = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, -0.0, 1e4, -1e4])])
    exact = getattr(torch, function)(v.double())
    got = reference._float_function(function, v)
    assert ((got.double() - exact).abs() <= exact.abs() * 2.0**-24 * 1.001 + 2.0**-149).all()


def test_float_functions_at_the_ends() -> None:
    v = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert reference._float_function("sigmoid", v)[:2].tolist() == [1.0, 0.0]
    assert reference._float_function("tanh", v)[:2].tolist() == [1.0, -1.0]
    assert reference._float_function("tanh", v)[2].isnan()


def integer_projection(q: Tensor, grid: QParams, weight: Tensor, weight_grid: WeightQParams) -> Tensor:
    """The sums in Python's integers."""
    rows = [
        [
            sum((int(a) - grid.zero_point) * (int(b) - int(z)) for a, b in zip(row, channel, strict=True))
            for channel, z in zip(weight, zeros, strict=True)
        ]
        for row, zeros in ((row, weight_grid.zero_point) for row in q)
    ]
    return torch.tensor(rows, dtype=torch.int64)


@settings(max_examples=20)
@given(st.integers(1, 40), st.sampled_from([(0, 255), (-128, 127), (-32768, 32767)]), st.booleans(), st.integers(0, 10**6))
def test_integer_sums_are_exact(depth: int, limits: tuple[int, int], extreme: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = QParams(0.1, limits[0], *limits)
    weight_grid = WeightQParams(torch.full((4,), 0.1), torch.full((4,), -128, dtype=torch.int32))
    q = torch.randint(limits[0], limits[1] + 1, (3, depth), generator=generator)
    weight = torch.randint(-128, 128, (4, depth), generator=generator).to(torch.int8)
    if extreme:
        q, weight = torch.full_like(q, limits[1]), torch.full_like(weight, 127)
    got = reference._integer_sums(q, grid, weight, weight_grid)
    assert torch.equal(got.long(), integer_projection(q, grid, weight, weight_grid))


def test_sums_beyond_int32_are_exact() -> None:
    grid, depth = QParams(1.0, -32768, -32768, 32767), 2000
    weight_grid = WeightQParams(torch.ones(4), torch.full((4,), -128, dtype=torch.int32))
    q, weight = torch.full((1, depth), 32767), torch.full((4, depth), 127, dtype=torch.int8)
    assert reference._integer_sums(q, grid, weight, weight_grid).flatten().tolist() == [depth * 65535 * 255] * 4

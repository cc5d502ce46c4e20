"""QParams and CellQParams: the formulas of docs/numerics.md, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines the ops
from hypothesis import given
from hypothesis import strategies as st

from torch_lstm_quant.qparams import (
    MAX_STEPS,
    PARTS,
    UNBOUNDED,
    CellQParams,
    QParams,
    WeightQParams,
    pack_grids,
    unpack_grids,
)

LIMITS = [(0, 255), (-128, 127), (-127, 127), (-2048, 2047), (-32768, 32767), (0, 1 << 15), (-(1 << 15), 1 << 15)]
# torch's own op forms 1 / scale in float64 and rounds: the same as float32 but for rare scales, which lowering looks after
SCALES = st.floats(2.0**-20, 2.0**10, width=32)


@st.composite
def grids(draw: st.DrawFn) -> QParams:
    quant_min, quant_max = draw(st.sampled_from(LIMITS))
    return QParams(draw(SCALES), draw(st.integers(quant_min, quant_max)), quant_min, quant_max)


@given(grids(), st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=20))
def test_quantize_is_the_written_formula(grid: QParams, values: list[float]) -> None:
    v = torch.tensor(values)
    rounded = torch.round(v * torch.tensor(grid.inv_scale)).double() + grid.zero_point
    assert torch.equal(grid.quantize(v).double(), rounded.clamp(grid.quant_min, grid.quant_max))


@given(grids())
def test_every_value_of_a_grid_comes_back(grid: QParams) -> None:
    q = torch.arange(grid.quant_min, grid.quant_max + 1, dtype=torch.int32)
    assert torch.equal(grid.quantize(grid.dequantize(q)).to(torch.int32), q)


@given(st.floats(2.0**-10, 8, width=32), st.integers(0, 255), st.lists(st.floats(-100, 100, width=32), min_size=1))
def test_torch_quantize_per_tensor_agrees(scale: float, zero_point: int, values: list[float]) -> None:
    v, grid = torch.tensor(values), QParams(scale, zero_point, 0, 255)
    got = torch.ops.quantized_decomposed.quantize_per_tensor(v, scale, zero_point, 0, 255, torch.uint8)
    difference = (grid.quantize(v).int() - got.int()).abs()
    # the two differ only where v lies half-way between two steps to within rounding
    halfway = (v.double() / scale - torch.floor(v.double() / scale) - 0.5).abs() < 1e-4
    assert torch.equal(difference[~halfway], torch.zeros_like(difference[~halfway]))


def test_nan_and_infinities_have_one_result() -> None:
    grid = QParams(0.1, 3, -8, 100)
    q = grid.quantize(torch.tensor([math.nan, -math.inf, math.inf]))
    assert q.tolist() == [-8, -8, 100]
    assert q.dtype == torch.int8


def test_rounds_half_to_even() -> None:
    assert QParams(1.0, 0, -8, 7).quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-40, 1e39, 5e38])
def test_impossible_scales(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive, finite"):
        QParams(scale, 0, 0, 255)


@pytest.mark.parametrize(
    ("zero_point", "quant_min", "quant_max", "message"),
    [
        (0, 5, 5, "quant_min must be less than quant_max"),
        (0, 5, 4, "quant_min must be less than quant_max"),
        (256, 0, 255, r"zero_point must lie in \[quant_min, quant_max\]"),
        (-1, 0, 255, r"zero_point must lie in \[quant_min, quant_max\]"),
        (0, 0, MAX_STEPS + 1, "at most 16 bits"),
        (0, -(2**31), 2**31 - 1, "at most 16 bits"),
        (1 << 24, 1 << 24, (1 << 24) + 5, r"within \+-2\*\*23"),
    ],
)
def test_impossible_limits(zero_point: int, quant_min: int, quant_max: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QParams(1.0, zero_point, quant_min, quant_max)


@pytest.mark.parametrize("value", [1.5, True, "3", None])
def test_limits_are_integers(value: object) -> None:
    with pytest.raises(TypeError, match="zero_point must be an int"):
        QParams(1.0, value, 0, 255)  # type: ignore[arg-type]


def test_an_inverse_must_be_one() -> None:
    with pytest.raises(ValueError, match="inv_scale must be 1 / scale"):
        QParams(0.5, 0, 0, 255, inv_scale=3.0)


@pytest.mark.parametrize(
    ("limits", "bits", "dtype"),
    [
        ((0, 255), 8, torch.uint8),
        ((-128, 127), 8, torch.int8),
        ((-2048, 2047), 12, torch.int16),
        ((-32768, 32767), 16, torch.int16),
        ((-32768, 32768), 16, torch.int32),
        ((0, 1), 1, torch.uint8),
    ],
)
def test_bits_and_dtype(limits: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    grid = QParams(1.0, 0, *limits)
    assert (grid.bits, grid.dtype) == (bits, dtype)


@pytest.mark.parametrize("part", ["x", "hx", "tanh_cy_input", "fgate_cx_igate_cgate"])
def test_what_a_projection_or_function_reads_is_bounded(part: str) -> None:
    unbounded = QParams(1.0, 0, -UNBOUNDED, UNBOUNDED)
    with pytest.raises(ValueError, match="needs a grid of at most 16 bits"):
        CellQParams(**{part: unbounded})
    if part == "fgate_cx_igate_cgate":
        CellQParams(fgate_cx_igate_cgate=unbounded, tanh_cy_input=QParams(1.0, 0, -128, 127))


@given(st.lists(st.none() | grids(), min_size=len(PARTS), max_size=len(PARTS)))
def test_packed_grids_come_back(parts: list[QParams | None]) -> None:
    fields = {
        part: (grid,) * 4 if part in ("igates", "hgates", "gates") else grid for part, grid in zip(PARTS, parts, strict=True)
    }
    qparams = CellQParams(**fields)  # type: ignore[arg-type]
    assert unpack_grids(pack_grids(qparams), None, None) == qparams


def test_packed_grids_that_are_none() -> None:
    packed = pack_grids(CellQParams(x=QParams(0.1, 0, 0, 255)))
    with pytest.raises(ValueError, match="grids must be"):
        unpack_grids(packed[:3], None, None)
    packed[0, 0] = -1.0
    with pytest.raises(ValueError, match="part x: scale must be positive"):
        unpack_grids(packed, None, None)
    packed[0, 0] = math.nan
    with pytest.raises(ValueError, match="part x: scale must be positive"):
        unpack_grids(packed, None, None)


@pytest.mark.parametrize("column", [2, 3, 4])
@pytest.mark.parametrize("value", [0.5, -0.25, math.nan, math.inf])
def test_packed_grids_with_fractions(column: int, value: float) -> None:
    packed = pack_grids(CellQParams(hx=QParams(0.1, 0, 0, 255)))
    packed[1, column] += value
    field = ("zero_point", "quant_min", "quant_max")[column - 2]
    with pytest.raises(ValueError, match=rf"part hx: {field} must be an integer, got"):
        unpack_grids(packed, None, None)


def test_weight_grids() -> None:
    scale, zero_point = torch.ones(8), torch.zeros(8, dtype=torch.int32)
    assert "per tensor" in str(WeightQParams(scale, zero_point))
    with pytest.raises(ValueError, match="weight scale must be float32"):
        WeightQParams(scale.double(), zero_point)
    with pytest.raises(ValueError, match="weight zero_point must be int32"):
        WeightQParams(scale, zero_point.long())
    with pytest.raises(ValueError, match="weight limits"):
        WeightQParams(scale, zero_point, -129, 127)
    with pytest.raises(ValueError, match="in row 3"):
        WeightQParams(scale.clone().index_fill_(0, torch.tensor([3]), 0.0), zero_point)
    with pytest.raises(ValueError, match=r"weight zero_point must lie in \[.*\], got -?\d+ in row \d+"):
        WeightQParams(scale, zero_point + 200)

"""audit() of fused modules: on which path their sums run and what slows them, which parts stayed float, and what runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deep_cells import DEEP
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cells import Dice, random_layers
from torch import nn

import torch_lstm_quant as tlq
from torch_lstm_quant import AuditedModule, ops


def only(model: nn.Module) -> AuditedModule:
    (module,) = tlq.audit(model)
    return module


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_sums_and_what_slows_them(seed: int) -> None:
    dice = Dice(seed)
    fused = tlq.LSTM(random_layers(dice, 5, 6, 2, dice.integer(1, 2)))
    module = only(fused)
    assert (module.stage, module.isa) == ("fused", ops.isa_active())
    for cell, audited in zip((cell for cells in fused.cells() for cell in cells), module.cells, strict=True):
        expected = []
        for grid, weight in ((cell.qparams.x, cell.qparams.weight_ih), (cell.qparams.hx, cell.qparams.weight_hh)):
            if grid is None or weight is None:
                expected.append("float")
            else:
                expected.append("int8" if grid.bits <= 8 and not weight.zero_point.any() else "wide")
        assert [audited.input_sums, audited.hidden_sums] == expected
        assert len(audited.slowed_by) == 2 - expected.count("int8")
        floats = [part for part in ("x", "hx", "weight_hh") if getattr(cell.qparams, part) is None]
        assert [part for part in audited.float_parts if part in ("x", "hx", "weight_hh")] == floats


@pytest.mark.parametrize(
    ("parts", "sums", "slowed_by"),
    [
        ({}, "int8", ()),
        ({"x": None}, "float", ("input projection in float32, as there is no grid for x",)),
        ({"x": None, "weight_ih": None}, "float", ("input projection in float32, as there is no grid for x and weight_ih",)),
        (
            {"x": {"scale": 1e-3, "zero_point": 0, "dtype": "int16"}},
            "wide",
            ("input projection in wide sums, as x has 16 bits",),
        ),
        (
            {"weight_ih": {"scale": 0.01, "zero_point": 3, "dtype": "int8"}},
            "wide",
            ("input projection in wide sums, as weight_ih has zero points",),
        ),
    ],
)
def test_what_slows_a_projection_is_said(parts: dict[str, Any], sums: str, slowed_by: tuple[str, ...]) -> None:
    byte = {"scale": 0.02, "zero_point": 128, "dtype": "uint8"}
    cell = {"x": byte, "ogate_cy": byte, "weight_ih": "per_channel", "weight_hh": "per_channel"}
    (audited,) = only(tlq.from_float(nn.LSTM(5, 8), {"": {**cell, **parts}})).cells
    assert (audited.input_sums, audited.hidden_sums, audited.slowed_by) == (sums, "int8", slowed_by)


def test_sums_too_deep_for_int32_are_said() -> None:
    (audited,) = only(tlq.LSTM([[DEEP["8 bits, first beyond"].cell()]])).cells
    assert audited.input_sums == "wide"
    assert audited.slowed_by == ("input projection in wide sums, as int32 could overflow over 65794 values",)


def test_parts_that_stay_float_are_named() -> None:
    state = {"scale": 2**-11, "zero_point": 0, "dtype": "int16"}
    cell = {"fgate_cx_igate_cgate": state, "gates.forget_gate": state, "weight_ih": None, "weight_hh": "per_tensor"}
    (audited,) = only(tlq.from_float(nn.LSTM(5, 8), {"": cell})).cells
    floats = "x hx igates hgates gates.input_gate gates.cell_gate gates.output_gate input_gate forget_gate cell_gate"
    assert audited.float_parts == (
        *floats.split(),
        "output_gate",
        "fgate_cx",
        "igate_cgate",
        "tanh_cy",
        "ogate_cy",
        "weight_ih",
    )


def test_a_fused_lstm_without_values_has_no_cells() -> None:
    module = only(tlq.LSTM(random_layers(Dice(5), 5, 8, 1, 1, "int8")).to("meta"))
    assert (module.stage, module.cells) == ("fused", ())


def test_packed_cells_that_are_none_are_refused() -> None:
    with pytest.raises(RuntimeError, match="truncated"):
        ops.sums(torch.zeros(8, dtype=torch.uint8))


def test_an_instruction_set_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = tlq.quantize(nn.LSTM(5, 8), [torch.randn(6, 3, 5)])

    def wrong() -> str:
        raise RuntimeError("TORCH_LSTM_QUANT_ISA must be one of avx2, scalar on this machine, got 'fast'")

    monkeypatch.setattr(ops, "isa_active", wrong)
    module = only(fused)
    assert (module.stage, module.isa, module.why) == (
        "fused",
        None,
        "TORCH_LSTM_QUANT_ISA must be one of avx2, scalar on this machine, got 'fast'",
    )
    assert module.to_fuse == "correct TORCH_LSTM_QUANT_ISA, or unset it, in the environment"
    assert "got 'fast'" in str(tlq.audit(fused))

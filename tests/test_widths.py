"""Every width that LSTMQConfig can ask for is refused when it is made, or runs fused with the integer reference's bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import widths
from hypothesis import given, settings
from hypothesis import strategies as st
from isa_runs import run_on_all
from torch.ao.quantization import FixedQParamsObserver
from widths_worker import CHANNEL, OBSERVED, PROJ, TENSOR, activation, complaints, expected_sums, signed, unsigned, weight

import torch_lstm_quant as tlq
from torch_lstm_quant import ops
from torch_lstm_quant.cell_graph import GATE_NAMES
from torch_lstm_quant.qparams import PARTS, PER_GATE_PARTS, WEIGHTS, CellQParams, QParams

DOCUMENT = Path(__file__).parents[1] / "docs/widths.md"


def test_every_width_runs_on_every_isa() -> None:
    for result in run_on_all("widths_worker.py"):
        assert result["failed"] == [], result["isa"]
        assert result["walked"] > 150


# Mixtures

LIMITS = st.builds(lambda bits, kind: kind(bits), st.integers(1, 16), st.sampled_from([signed, unsigned]))
GRIDS = st.builds(activation, LIMITS, st.sampled_from(TENSOR), st.integers(0, 6), fixed=st.booleans())
UNLIMITED = st.sampled_from([1e-2, 1e-3]).map(
    lambda scale: FixedQParamsObserver.with_args(scale=scale, zero_point=0, dtype=torch.qint32)
)
IMPOSSIBLE = st.sampled_from(
    [activation((0, 1 << 17), TENSOR[0]), FixedQParamsObserver.with_args(scale=0.0, zero_point=0, dtype=torch.quint8)]
)
OPERANDS = st.one_of(st.none(), GRIDS, GRIDS, GRIDS)
PROJECTED = ("x", "ogate_cy", "hy")
ACTIVATIONS = st.one_of(st.none(), GRIDS, GRIDS, GRIDS, GRIDS, GRIDS, UNLIMITED)
WEIGHT = st.builds(weight, st.integers(2, 8).map(signed), st.sampled_from((*TENSOR, *CHANNEL)), st.integers(0, 1))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Constructors of all parts, and overrides."""
    rare = st.integers(0, 9).map(lambda one: one == 0)
    parts: dict[str, Any] = {part: draw(OPERANDS if part in PROJECTED else ACTIVATIONS) for part in OBSERVED}
    parts |= {state: draw(st.one_of(st.just("shared"), ACTIVATIONS)) for state in ("hx", "cx")}
    parts |= {name: draw(st.one_of(st.none(), WEIGHT, WEIGHT, WEIGHT)) for name in WEIGHTS}
    if draw(rare):
        parts[draw(st.sampled_from(sorted(parts)))] = draw(IMPOSSIBLE)
    overrides: list[dict[str, Any]] = []
    if draw(rare):
        overrides.append({"layer": 0, draw(st.sampled_from(OBSERVED)): draw(ACTIVATIONS)})
    if draw(rare):
        overrides.append({"gate": draw(st.sampled_from(GATE_NAMES)), draw(st.sampled_from(PER_GATE_PARTS)): draw(ACTIVATIONS)})
    return parts, overrides


@settings(max_examples=60)
@given(mixtures(), st.integers(1, 2), st.integers(1, 2), st.sampled_from([0, PROJ]))
def test_mixtures_run_or_are_refused_when_they_are_made(
    mixture: tuple[dict[str, Any], list[dict[str, Any]]], layers: int, directions: int, proj: int
) -> None:
    parts, overrides = mixture
    try:
        config = tlq.LSTMQConfig(**parts)
        for override in overrides:
            config = config.override(**override)
    except (TypeError, ValueError) as error:
        refusal: str | None = str(error)
    else:
        refusal = None
    if refusal is None:
        assert complaints(config, layers, directions, proj) == []
    else:
        assert re.search(rf"part ({'|'.join((*PARTS, *WEIGHTS))})", refusal)


# The table


def test_the_document_has_the_table() -> None:
    first = widths.table().partition("\n")[0]
    text = DOCUMENT.read_text()
    begin = text.index(first)
    assert text[begin:].startswith(widths.table()), "python tests/widths.py prints what it should be"


def test_the_table_has_every_isa_that_is_built() -> None:
    assert set(ops.isas_built()) <= set(widths.ISAS)


@pytest.mark.parametrize("isa", widths.ISAS)
def test_an_isa_does_what_its_code_says(isa: str) -> None:
    for file, lines in widths.ISAS[isa].sources.items():
        text = " ".join((widths.CORE / file).read_text().split())
        for line in lines:
            assert line in text, f"{file} no longer has {line!r}: is the table still true?"


def test_the_depth_of_wide_sums_is_the_kernels() -> None:
    assert (
        f"kMaxWideDepth = (1 << {widths.MAX_WIDE_DEPTH.bit_length()}) - 1;" in (widths.CORE / "kernels/wide-inl.h").read_text()
    )


def test_projections_are_summed_as_their_rows_say() -> None:
    for row, (sums, *_) in widths.PROJECTIONS.items():
        assert widths.sums_of(row) == sums
    for bits in range(1, 17):
        for zero_point in (0, -128, 127):
            operand, weights = widths.grid(bits, 2.0), widths.weight_grid(zero_point)
            qparams = CellQParams(x=operand, hx=operand, weight_ih=weights, weight_hh=weights)
            ((of_input, of_hidden),) = ops.sums(widths.packed(qparams))
            expected = expected_sums(operand, weights)
            assert of_input == of_hidden == expected == ("int8" if bits <= 8 and not zero_point else "wide")


def test_deep_sums_are_wide_from_the_depth_of_their_row_on() -> None:
    for row, depth in ((widths.DEEP, "wide"), (widths.DEEP - 1, "int8")):
        qparams = CellQParams(x=QParams(0.01, 0, 0, 255), weight_ih=widths.weight_grid())
        assert ops.sums(widths.packed(qparams, row))[0][0] == depth


FIXED = {
    "12 bits, ±12, for tanh ±10 too | steps of 2^-15, as in `int8()`": (2047, QParams(2**-15, 0, -(1 << 15), 1 << 15)),
    "16 bits, ±12, for tanh ±10 too | steps of 1/32767, as in `int8_gates16()`": (32767, QParams(1 / 32767, 0, -32767, 32767)),
}


@pytest.mark.parametrize("row", FIXED)
def test_tanh_is_evaluated_as_sigmoid_is(row: str) -> None:
    high, given = FIXED[row]
    want = widths.evaluation_of(*widths.FUNCTIONS[row])
    for largest in (12, 10):
        found = widths.evaluation_of(QParams(largest / high, 0, -high - 1, high), given, tanh=True)
        assert found is not None
        assert want is not None
        assert (found.evaluator, found.segments) == (want.evaluator, want.segments)


@pytest.mark.parametrize("bits", range(1, 16))
@pytest.mark.parametrize("tanh", [False, True])
def test_functions_are_evaluated_as_their_rows_say(bits: int, tanh: bool) -> None:
    read, given = widths.grid(bits, 5.0), widths.grid(12, 1.0)
    entries = "float32" if bits <= 12 else "uint16"
    assert widths.evaluation_of(read, given, tanh=tanh) == widths.Evaluation(entries, evaluator=False, segments=True)
    assert widths.evaluation_of(read, None, tanh=tanh) == widths.Evaluation("float32", evaluator=False, segments=False)
    assert widths.evaluation_of(None, given, tanh=tanh) is None

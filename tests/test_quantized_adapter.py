"""The fused LSTM behind quantized tensors: every state and grid that torch.ao's flow can pass, and what comes back."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from converted_lstms import assert_near, converted_model, grid_of, ours, torchs, torchs_warnings
from torch import Tensor
from torch.ao.quantization import MinMaxObserver

import torch_lstm_quant as tlq
from torch_lstm_quant import reference
from torch_lstm_quant.quantized_adapter import QuantizedBoundaryLSTM

pytestmark = torchs_warnings

INPUT, HIDDEN, BATCH = 6, 7, 4
States = tuple[Tensor, Tensor] | None


def quantized(*shape: int, scale: float = 0.02, zero_point: int = 120, dtype: torch.dtype = torch.quint8) -> Tensor:
    return torch.quantize_per_tensor(torch.randn(shape) * 0.5, scale, zero_point, dtype)


@functools.cache
def reference_lstm(utilities: Any = ours, **arguments: Any) -> Any:
    """A converted LSTM that takes quantized tensors; tests share it, as ``lower`` leaves it as it is."""
    torch.manual_seed(0)
    return converted_model(utilities, {}, INPUT, HIDDEN, **arguments).my_lstm


def states_of(lstm: Any, kind: str) -> States:
    shape = (lstm.num_layers * (2 if lstm.bidirectional else 1), BATCH, lstm.hidden_size)
    if kind == "none":
        return None
    if kind == "zeros":
        zeros = torch.quantize_per_tensor(torch.zeros(shape), 0.3, 7, torch.quint8)
        return zeros, zeros
    if kind == "own grid":
        return lstm(quantized(2, BATCH, INPUT))[1]  # type: ignore[no-any-return]
    if kind == "float32":
        return 0.3 * torch.randn(shape), torch.randn(shape)
    if kind == "qint8":
        c_0 = quantized(*shape, scale=1e-3, zero_point=0, dtype=torch.qint32)
        return quantized(*shape, zero_point=-3, dtype=torch.qint8), c_0
    assert kind == "other grid"
    return quantized(*shape, scale=0.013, zero_point=77), quantized(*shape, scale=0.03, zero_point=99)


KINDS = ("none", "zeros", "own grid", "other grid", "float32", "qint8")


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [{}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True}])
def test_states_on_any_grid(arguments: dict[str, Any], kind: str, steps: int) -> None:
    lstm = reference_lstm(**arguments)
    fused = tlq.lower(lstm)
    assert isinstance(fused, QuantizedBoundaryLSTM)
    states = states_of(lstm, kind)
    x = quantized(steps, BATCH, INPUT)
    got, expected = fused(x, states), lstm(x, states)
    for mine, its in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert mine.is_quantized == its.is_quantized
        assert mine.shape == its.shape
        if its.is_quantized:
            assert (mine.dtype, mine.q_scale(), mine.q_zero_point()) == (its.dtype, its.q_scale(), its.q_zero_point())
        # at most a value or two, where a float32 sum of the graph rounds the other way
        assert ((mine.dequantize() - its.dequantize()).abs() > 1e-4).sum() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_reads_the_grid_that_comes_and_the_others_their_own(kind: str) -> None:
    lstm = reference_lstm(num_layers=2)
    fused: Any = tlq.lower(lstm)
    x, states = quantized(5, BATCH, INPUT), states_of(lstm, kind)
    h, c = (s.dequantize() for s in states) if states else (torch.zeros(2, BATCH, HIDDEN), torch.zeros(2, BATCH, HIDDEN))
    h_grid = grid_of(states[0]) if states else None
    outputs = []
    for index, value in enumerate(x):
        cells = [cell for layer in fused.cells() for cell in layer]
        cells[0] = replace(cells[0], qparams=replace(cells[0].qparams, x=grid_of(x)))
        if index == 0 and kind in ("other grid", "float32", "qint8"):
            cells = [replace(cell, qparams=replace(cell.qparams, hx=h_grid)) for cell in cells]
        output, h, c = reference.lstm([[cell] for cell in cells], value.dequantize()[None], h, c)
        outputs.append(output)
    got, (h_n, c_n) = fused(x, states)
    assert torch.equal(got.dequantize(), torch.cat(outputs))
    assert torch.equal(h_n.dequantize(), h)
    assert torch.equal(c_n.dequantize(), c)


@pytest.mark.parametrize("arguments", [{}, {"num_layers": 3}])
def test_chunks_of_a_sequence_give_what_the_whole_gives(arguments: dict[str, Any]) -> None:
    fused = tlq.lower(reference_lstm(**arguments))
    x = quantized(9, BATCH, INPUT)
    output, (h_n, c_n) = fused(x)
    states, parts = None, []
    for chunk in (x[:1], x[1:5], x[5:6], x[6:]):
        part, states = fused(chunk, states)
        parts.append(part)
    assert torch.equal(torch.cat(parts), output)
    assert torch.equal(states[0], h_n)
    assert torch.equal(states[1], c_n)


def test_states_of_torchs_own_forward_come_on_the_grids_of_layer_0() -> None:
    lstm = reference_lstm(torchs, num_layers=2)
    x = quantized(3, BATCH, INPUT)
    (_, (h_n, c_n)), (_, (its_h, its_c)) = tlq.lower(lstm)(x), lstm(x)
    assert torch.equal(h_n, its_h)
    assert torch.equal(c_n, its_c)
    grids = [cell.qparams.ogate_cy for (cell,) in tlq.lower(lstm).cells()]
    assert grid_of(h_n) == grids[0] != grids[1]


def test_float32_input_is_not_quantized() -> None:
    lstm = reference_lstm()
    fused = tlq.lower(lstm)
    x = torch.randn(20, BATCH, INPUT)
    (output, (h_n, c_n)), (its_output, (its_h, its_c)) = fused(x), lstm(x)
    for mine, its, part in ((output, its_output, "ogate_cy"), (h_n, its_h, "ogate_cy"), (c_n, its_c, "fgate_cx_igate_cgate")):
        assert_near(mine.dequantize(), its.dequantize(), getattr(fused.cells()[0][0].qparams, part), one_step=True)


def test_batch_first_and_unbatched() -> None:
    fused = tlq.lower(reference_lstm(batch_first=False))
    first: Any = copy.deepcopy(fused)
    first.fused.batch_first = True
    x = quantized(5, BATCH, INPUT)
    output, (h_n, _) = fused(x)
    swapped, (its_h, _) = first(x.transpose(0, 1))
    assert torch.equal(swapped.transpose(0, 1), output)
    assert torch.equal(its_h, h_n)
    single, (single_h, _) = fused(x[:, 0])
    assert torch.equal(single.dequantize(), output[:, 0].dequantize())
    assert single_h.shape == (1, HIDDEN)


def test_kernels_are_packed_once_for_each_grid_and_not_without_end() -> None:
    fused: Any = tlq.lower(reference_lstm())
    x = quantized(3, BATCH, INPUT)
    fused(x)
    kept = dict(fused._variants)
    fused(x)
    assert fused._variants == kept
    for step in range(40):
        fused(quantized(3, BATCH, INPUT, scale=0.01 + 0.001 * step))
    assert len(fused._variants) <= 16
    assert torch.equal(fused(x)[0], tlq.lower(reference_lstm())(x)[0])


def test_copies_files_and_state_dicts() -> None:
    fused = tlq.lower(reference_lstm())
    x = quantized(3, BATCH, INPUT)
    expected = fused(x)[0]
    assert torch.equal(copy.deepcopy(fused)(x)[0], expected)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x)[0], expected)
    other = tlq.lower(converted_model(ours, {}, INPUT, HIDDEN).my_lstm)
    assert not torch.equal(other(x)[0], expected)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x)[0], expected)


def test_float32_parts_come_back_as_float32() -> None:
    observer = MinMaxObserver.with_args(dtype=torch.int16, quant_min=-32768, quant_max=32767)
    lstm: Any = converted_model(ours, {"cell_state_obs_ctr": observer}, INPUT, HIDDEN).my_lstm
    x = quantized(3, BATCH, INPUT)
    (output, (_, c_n)), (its_output, (_, its_c)) = tlq.lower(lstm)(x), lstm(x)
    assert output.is_quantized
    assert c_n.dtype == its_c.dtype == torch.float32
    assert_near(output.dequantize(), its_output.dequantize(), grid_of(its_output))


def test_no_warning_reaches_the_user() -> None:
    lstm, x = reference_lstm(torchs, num_layers=2), quantized(3, BATCH, INPUT)
    states = states_of(lstm, "other grid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tlq.lower(lstm)(x, states)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(3, BATCH, INPUT).double(),), TypeError, "input must be torch.float32 or torch.quint8"),
        ((torch.randn(3, BATCH, INPUT + 1),), ValueError, "input_size=6"),
        ((torch.randn(3, BATCH, INPUT), (torch.zeros(1, BATCH, HIDDEN),)), TypeError, "hx must be None or a tuple"),
        ((torch.randn(3, BATCH, INPUT), (torch.zeros(2, BATCH, HIDDEN),) * 2), ValueError, "h_0 must be"),
    ],
)
def test_calls_that_the_reference_would_refuse_too(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tlq.lower(reference_lstm())(*arguments)

"""The fused LSTMCell: a step at a time with the bits of the integer reference, saved, compiled, exported, called wrongly.

``test_kernel.py`` runs it on every ISA and with two threads; ``test_lstm_cell_flows.py`` has the ways from nn.LSTMCell to it.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from random_cells import PRESETS, Dice, random_input, random_layers
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import torch_lstm_quant as tlq
from torch_lstm_quant import _direct, ops, reference
from torch_lstm_quant.cell import Cell

B, I, H = 3, 5, 8  # noqa: E741
X, GOOD = torch.zeros(B, I), torch.zeros(B, H)


def random_cell(preset: str | None = "int8", seed: int = 0, input_size: int = I, hidden_size: int = H) -> Cell:
    return random_layers(Dice(seed), input_size, hidden_size, 1, 1, preset)[0][0]


def fused(preset: str | None = "int8", seed: int = 0) -> tlq.LSTMCell:
    return tlq.LSTMCell(random_cell(preset, seed))


def inputs() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H))


def assert_equal(got: Any, want: Any) -> None:
    """The same bits, any NaN being like any other."""
    torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0, equal_nan=True)


class Watcher(TorchDispatchMode):
    """With it, calls go through torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def transposed(t: Tensor) -> Tensor:
    """The same values, columns contiguous."""
    return t.T.contiguous().T


CALLS: dict[str, Any] = {
    "plain": lambda cell, x, h, c: cell(x, (h, c)),
    "list": lambda cell, x, h, c: cell(x, [h, c]),
    "keywords": lambda cell, x, h, c: cell(input=x, hx=(h, c)),
    "columns contiguous": lambda cell, x, h, c: cell(transposed(x), (transposed(h), transposed(c))),
    "every second row": lambda cell, x, h, c: cell(x.repeat_interleave(2, 0)[::2], (h.repeat_interleave(2, 0)[::2], c)),
    "rows one by one": lambda cell, x, h, c: [
        torch.stack(states) for states in zip(*(cell(x[row], (h[row], c[row])) for row in range(len(x))), strict=True)
    ],
}


@hypothesis.given(
    seed=st.integers(0, 10_000),
    preset=st.sampled_from([None, *PRESETS]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rows=st.sampled_from([1, 2, 3, 9, 17]),
    call=st.sampled_from(list(CALLS)),
    watched=st.booleans(),
)
@hypothesis.settings(max_examples=60)
def test_a_step_is_the_integer_references_and_the_lstms(
    seed: int, preset: str | None, sizes: tuple[int, int], rows: int, call: str, watched: bool
) -> None:
    cell, dice = random_cell(preset, seed, *sizes), Dice(seed)
    x, h, c = (random_input(dice, rows, size) for size in (sizes[0], sizes[1], sizes[1]))
    _, h_n, c_n = reference.lstm([[cell]], x[None], h[None], c[None])
    _, (lstm_h, lstm_c) = tlq.LSTM([[cell]])(x[None], (h[None], c[None]))
    module = tlq.LSTMCell(cell)
    if watched:
        with Watcher():
            got = CALLS[call](module, x, h, c)
    else:
        got = CALLS[call](module, x, h, c)
    assert_equal(got, (h_n[0], c_n[0]))
    assert_equal(got, (lstm_h[0], lstm_c[0]))


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_steps_are_the_sequence(preset: str | None) -> None:
    module, x, hx = fused(preset), torch.randn(20, B, I), None
    output, (h_n, c_n) = tlq.LSTM(module.cells())(x)
    for step in range(20):
        hx = module(x[step], hx)
        assert torch.equal(hx[0], output[step])
    assert_equal(hx, (h_n[0], c_n[0]))


@pytest.mark.parametrize("shape", [(0, I), (1, I), (B, I), (I,)])
def test_no_states_are_zeros_of_the_inputs_shape(shape: tuple[int, ...]) -> None:
    module, x = fused(), torch.randn(shape)
    zeros = torch.zeros(*shape[:-1], H)
    assert module(x)[0].shape == module(x)[1].shape == zeros.shape
    for got in (module(x), module(x, None)):
        assert_equal(got, module(x, (zeros, zeros)))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_integers_in_and_out_are_the_floats_on_their_grids(preset: str, with_states: bool, batched: bool) -> None:
    module, (x, (h, c)) = fused(preset), inputs()
    x, h, c = (x, h, c) if batched else (x[0], h[0], c[0])
    grids = module.cells()[0][0].qparams
    assert grids.x
    assert grids.hx
    assert grids.ogate_cy
    integers = (grids.hx.quantize(h), grids.cx.quantize(c) if grids.cx else c) if with_states else None
    got_h, got_c = module.forward_integers(grids.x.quantize(x), integers)
    want_h, want_c = module(x, (h, c) if with_states else None)
    assert got_h.dtype == grids.ogate_cy.dtype
    assert torch.equal(grids.ogate_cy.dequantize(got_h), want_h)
    state = grids.fgate_cx_igate_cgate
    assert torch.equal(state.dequantize(got_c) if state else got_c, want_c)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_calls_around_the_dispatcher_are_those_through_it(with_states: bool, inference: bool) -> None:
    module, (x, states) = fused(), inputs()
    hx = states if with_states else None
    with torch.inference_mode(inference):
        around = module(x, hx)
        with Watcher() as watcher:
            through = module(x, hx)
    assert "torch_lstm_quant.lstm.default" in watcher.seen
    assert around[0].untyped_storage().data_ptr() != around[1].untyped_storage().data_ptr()
    for one, other in zip(around, through, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
        assert one.is_inference() == inference
        assert not one.requires_grad


def test_plain_calls_go_around_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "lstm", None)
    x, hx = inputs()
    fused()(x)
    with torch.inference_mode():
        fused()(x, hx)


def test_what_the_direct_call_does_not_take() -> None:
    module, stack = fused(), tlq.LSTM(random_layers(Dice(0), H, H, 2, 1, "int8"))
    layers, x = module._bound_layers(), torch.zeros(B, I)
    assert _direct.lstm_cell(layers, x, None, None) is not None
    for arguments in (
        (x[None], None, None),
        (x, GOOD[None], None),
        (x, GOOD[:1], GOOD),
        (x[:, :1], None, None),
        (x[:0], None, None),
    ):
        assert _direct.lstm_cell(layers, *arguments) is None
    assert _direct.lstm(layers, x, None, None) is None
    # it would write beyond the states of one cell
    assert _direct.lstm_cell(stack._bound_layers(), GOOD, None, None) is None
    with pytest.raises(TypeError, match="needs 4 arguments, got 2"):
        _direct.lstm_cell(layers, x)  # type: ignore[call-arg]


def test_a_stream_says_how_to_make_an_lstm_of_a_cell() -> None:
    module, (x, _) = fused(), inputs()
    with pytest.raises(TypeError, match=r"got LSTMCell: pass the LSTM of that cell, .*LSTM\(module.cells\(\)\)"):
        tlq.Stream(module)
    assert torch.equal(tlq.Stream(tlq.LSTM(module.cells()), len(x))(x), module(x)[0])


# Saved and loaded


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_copies_pickles_and_state_dicts_give_the_same_bits(preset: str | None) -> None:
    module, (x, hx) = fused(preset, seed=5), inputs()
    want = module(x, hx)  # before it is copied, so that it holds addresses
    assert_equal(copy.deepcopy(module)(x, hx), want)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert_equal(torch.load(buffer, weights_only=False)(x, hx), want)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    cell = module.cells()[0][0]
    other = tlq.LSTMCell(Cell(cell.qparams, cell.weight_ih, cell.weight_hh, -cell.bias_ih, -cell.bias_hh))
    assert not torch.equal(other(x, hx)[0], want[0])
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_equal(other(x, hx), want)


def test_state_dicts_have_the_names_of_nn_lstm_cell() -> None:
    names = set(fused().state_dict())
    assert names > set(nn.LSTMCell(I, H).state_dict())
    assert names == {
        *(f"{kind}_{side}" for kind in ("weight", "bias") for side in ("ih", "hh")),
        *(f"weight_{side}_{field}" for side in ("ih", "hh") for field in ("scale", "zero_point")),
        "grids",
        "_extra_state",  # the format version
    }


def test_state_dicts_that_do_not_fit() -> None:
    model, (x, hx) = nn.ModuleDict({"cell": fused()}), inputs()
    before = model["cell"](x, hx)
    good = {name: value.clone() for name, value in model.state_dict().items()}
    impossible = {**good, "cell.grids": good["cell.grids"].clone()}
    impossible["cell.grids"][0, 0] = -1.0
    for state, message in (
        (nn.ModuleDict({"cell": nn.LSTMCell(I, H)}).state_dict(), "cell.weight_ih must be torch.int8, got torch.float32"),
        ({f"cell.{name}": value for name, value in tlq.LSTM(model["cell"].cells()).state_dict().items()}, "Missing key"),
        (impossible, "cell: .*scale must be positive"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
        assert_equal(model["cell"](x, hx), before)


# Compiled and exported


class Loop(nn.Module):
    """A decoder's loop over two cells."""

    def __init__(self) -> None:
        super().__init__()
        cells = random_cell("int8", 0), random_cell("int8", 1, H, I)
        self.cells = nn.ModuleList(map(tlq.LSTMCell, cells))

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (h, c), None
        for _ in range(3):
            first = self.cells[0](x, first)
            second = self.cells[1](first[0], second)
            x = second[0]
        return x, first[1]


def test_compiled_without_a_break() -> None:
    torch.compiler.reset()
    model = Loop()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        arguments = torch.randn(rows, I), torch.randn(rows, H), torch.randn(rows, H)
        assert_equal(compiled(*arguments), model(*arguments))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_any_batch(strict: bool) -> None:
    model, batch = Loop(), torch.export.Dim("batch", min=1, max=64)
    arguments = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
    program = torch.export.export(model, arguments, dynamic_shapes=({0: batch},) * 3, strict=strict)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for rows in (1, B, 7):
        arguments = torch.randn(rows, I), torch.randn(rows, H), torch.randn(rows, H)
        assert_equal(loaded(*arguments), model(*arguments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_see_the_operator() -> None:
    module, (x, hx) = fused(), inputs()
    assert "torch_lstm_quant.lstm.default" in [str(node.target) for node in make_fx(module)(x, hx).graph.nodes]
    traced = torch.jit.trace(lambda x, h, c: module(x, (h, c)), (x, *hx), check_trace=False)
    assert "torch_lstm_quant::lstm" in str(traced.graph)
    other, states = inputs()
    assert_equal(traced(other, *states), module(other, states))


# What is refused


BAD_CALLS = {
    "width": ((torch.zeros(B, I + 1),), ValueError, r"must be input_size=5, got \[3, 6\]"),
    "rank 0": ((torch.zeros(()),), ValueError, r"must be 1-D \(unbatched\) or 2-D, one step, got 0-D"),
    "rank 3": ((X[None],), ValueError, r"one step, got 3-D \[1, 3, 5\]"),
    "double": ((X.double(),), TypeError, "input must be torch.float32, got torch.float64"),
    "half": ((X.half(),), TypeError, "got torch.float16"),
    "integers": ((X.long(),), TypeError, "got torch.int64"),
    "a list": (([[0.0]],), TypeError, "input must be a tensor, got list"),
    "one state": ((X, GOOD), TypeError, r"hx must be None or a tuple \(h_0, c_0\), got Tensor"),
    "one of two": ((X, (GOOD,)), TypeError, "got 1 values"),
    "None in states": ((X, (GOOD, None)), TypeError, "c_0 must be a tensor, got NoneType"),
    "half states": ((X, (GOOD.half(), GOOD.half())), TypeError, "h_0 must be torch.float32, got torch.float16"),
    "double cell state": ((X, (GOOD, GOOD.double())), TypeError, "c_0 must be torch.float32"),
    "batch of states": ((X, (GOOD, GOOD[:1])), ValueError, r"c_0 must be \[3, 8\] for input \[3, 5\], got \[1, 8\]"),
    "width of states": ((X, (GOOD[:, :2], GOOD)), ValueError, r"h_0 must be \[3, 8\]"),
    "an LSTM's states": ((X, (GOOD[None], GOOD[None])), ValueError, r"h_0 must be \[3, 8\] .*got \[1, 3, 8\]"),
    "unbatched input only": ((X[0], (GOOD, GOOD)), ValueError, r"h_0 must be \[8\] for input \[5\], got \[3, 8\]"),
    "unbatched states only": ((X, (GOOD[0], GOOD[0])), ValueError, r"h_0 must be \[3, 8\]"),
    "another device": ((X.to("meta"),), TypeError, "input must be on the cpu device"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_calls_that_are_refused(name: str) -> None:
    arguments, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        fused()(*arguments)


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.double])
def test_moves_that_are_refused(move: Any) -> None:
    module = fused()
    with pytest.raises(TypeError, match="a fused LSTMCell runs in integers and float32 on the CPU"):
        move(nn.Sequential(module))
    assert module(X)[0].dtype == torch.float32


def test_integers_need_grids() -> None:
    with pytest.raises(TypeError, match=r"input must be torch\.uint8 or torch.int8"):
        fused().forward_integers(X)
    bare = Cell(tlq.CellQParams(), torch.zeros(4 * H, I), torch.zeros(4 * H, H), torch.zeros(4 * H), torch.zeros(4 * H))
    with pytest.raises(ValueError, match="integer input needs one grid for part x"):
        tlq.LSTMCell(bare).forward_integers(X.to(torch.uint8))


def test_it_can_be_looked_into() -> None:
    text = repr(fused())
    for words in ("LSTMCell(5, 8, ", "x=8 bit", "gates=12 bit", "weights=int8", f"kernel={ops.isa_active()}"):
        assert words in text
    assert repr(fused().to("meta")) == "LSTMCell(5, 8)"

"""The fused module: integers in and out, saving and loading, looking inside, and what it refuses before anything runs."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from random_cells import PRESETS, Dice, random_layers
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import torch_lstm_quant as tlq
from torch_lstm_quant import ops, reference
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qparams import CellQParams, QParams, pack_grids

T, B, I, H = 5, 3, 7, 6  # noqa: E741


def fused(layers: int = 2, directions: int = 2, preset: str | None = "int8", seed: int = 0, **options: Any) -> tlq.LSTM:
    return tlq.LSTM(random_layers(Dice(seed), I, H, layers, directions, preset), **options)


def states(layers: int = 2, directions: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(layers * directions, B, H), torch.randn(layers * directions, B, H)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("with_states", [False, True])
def test_integers_in_and_out_are_the_floats_on_their_grids(preset: str, with_states: bool) -> None:
    module = fused(1, 1, preset)
    cell = module.cells()[0][0].qparams
    assert cell.x
    assert cell.hx
    assert cell.ogate_cy
    x, hx = torch.randn(T, B, I), states(1, 1) if with_states else None
    integers = None
    if hx:
        integers = cell.hx.quantize(hx[0]), (cell.cx.quantize(hx[1]) if cell.cx else hx[1])
    output, (h_n, c_n) = module(x, hx)
    got, (got_h, got_c) = module.forward_integers(cell.x.quantize(x), integers)
    assert got.dtype == cell.ogate_cy.dtype
    assert torch.equal(cell.ogate_cy.dequantize(got), output)
    assert torch.equal(cell.ogate_cy.dequantize(got_h), h_n)
    grid = cell.fgate_cx_igate_cgate
    assert torch.equal(grid.dequantize(got_c) if grid else got_c, c_n)


def test_chunks_with_states_carried_over_are_the_whole() -> None:
    module, x, hx = fused(directions=1), torch.randn(9, B, I), states(directions=1)
    whole, (h_n, c_n) = module(x, hx)
    parts = []
    for chunk in x.split([1, 5, 3]):
        part, hx = module(chunk, hx)
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(hx[0], h_n)
    assert torch.equal(hx[1], c_n)


def test_rows_alone_are_the_batch() -> None:
    module, x, (h, c) = fused(), torch.randn(T, B, I), states()
    whole, (h_n, c_n) = module(x, (h, c))
    for row in range(B):
        output, (h_row, c_row) = module(x[:, row], (h[:, row], c[:, row]))
        assert torch.equal(output, whole[:, row])
        assert torch.equal(h_row, h_n[:, row])
        assert torch.equal(c_row, c_n[:, row])


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_copies_pickles_and_state_dicts_give_the_same_bits(preset: str | None) -> None:
    module, x = fused(preset=preset), torch.randn(T, B, I)
    want = module(x)[0]
    assert torch.equal(copy.deepcopy(module)(x)[0], want)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x)[0], want)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = tlq.LSTM([[_zeroed(cell) for cell in layer] for layer in module.cells()])
    assert other(x)[0].shape == want.shape
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x)[0], want)


def _zeroed(cell: Cell) -> Cell:
    """The same grids, other weights."""
    inside = {side: 0 if grid is None else grid.quant_min for side, grid in _weight_grids(cell).items()}
    return Cell(
        cell.qparams,
        torch.full_like(cell.weight_ih, inside["ih"]),
        torch.full_like(cell.weight_hh, inside["hh"]),
        torch.zeros_like(cell.bias_ih),
        torch.zeros_like(cell.bias_hh),
    )


def _weight_grids(cell: Cell) -> dict[str, Any]:
    return {"ih": cell.qparams.weight_ih, "hh": cell.qparams.weight_hh}


def test_state_dicts_hold_canonical_tensors_only() -> None:
    names = set(fused(1, 1).state_dict())
    assert names == {
        *(f"{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")),
        *(f"weight_{side}_{field}_l0" for side in ("ih", "hh") for field in ("scale", "zero_point")),
        "grids_l0",
        "_extra_state",  # the format version
    }


def test_state_dicts_that_do_not_fit() -> None:
    module = fused(1, 1)
    with pytest.raises(RuntimeError, match="size mismatch for weight_ih_l0"):
        module.load_state_dict(tlq.LSTM(random_layers(Dice(1), I + 1, H, 1, 1, "int8")).state_dict())
    incomplete = module.state_dict()
    del incomplete["grids_l0"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"grids_l0"'):
        module.load_state_dict(incomplete)
    impossible = {name: value.clone() for name, value in module.state_dict().items()}
    impossible["grids_l0"][0, 0] = -1.0
    before = module(torch.ones(T, B, I))[0]
    with pytest.raises(RuntimeError, match="scale must be positive"):
        module.load_state_dict(impossible)
    impossible = {name: value.clone() for name, value in module.state_dict().items()}
    impossible["weight_hh_zero_point_l0"][3] = 1000
    with pytest.raises(RuntimeError, match=r"LSTM: weight_hh_l0: weight zero_point must lie in .*, got 1000 in row 3"):
        module.load_state_dict(impossible)
    assert torch.equal(module(torch.ones(T, B, I))[0], before)


def test_a_cell_without_grids_is_saved_and_loaded() -> None:
    cell = fused(1, 1).cells()[0][0]
    qparams = CellQParams(weight_ih=cell.qparams.weight_ih, weight_hh=cell.qparams.weight_hh)
    module = tlq.LSTM([[Cell(qparams, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]])
    assert not module.state_dict()["grids_l0"].any()
    module.load_state_dict(module.state_dict())
    assert module.cells()[0][0].qparams.x is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda grids: grids.to(torch.int64), "grids_l0 must be torch.float64, got torch.int64"),
        (lambda grids: grids.to_sparse(), "grids_l0 must be a dense tensor, got layout torch.sparse_coo"),
        (
            torch.zeros_like,
            "grids_l0 must have a grid for part x, got none: load it into a module that was quantized",
        ),
        (lambda grids: pack_grids(CellQParams(igates=(QParams(0.1, 0, 0, 1),) * 4)), "grids_l0 must have a grid for part x"),
        (
            lambda grids: grids.where(grids.any(1, True), grids[0]),
            "grids_l0 must have no grid for part cx, got one: load it",
        ),
        (lambda grids: grids.to("meta"), "grids_l0 must hold values, got a tensor on the meta device"),
    ],
)
def test_assigning_a_state_that_does_not_fit_changes_nothing(spoil: Any, message: str) -> None:
    module = fused(1, 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = module(torch.ones(T, B, I))[0]
    spoilt = {name: value + 1 if name.startswith("bias") else value for name, value in before.items()}
    spoilt["grids_l0"] = spoil(spoilt["grids_l0"])
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(spoilt, assign=True)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(module(torch.ones(T, B, I))[0], expected)
    module.load_state_dict(before, assign=True)


def test_it_can_be_looked_into() -> None:
    module = fused(batch_first=True)
    text = repr(module)
    for words in (
        "7, 6",
        "num_layers=2",
        "bidirectional=True",
        "batch_first=True",
        "x=8 bit",
        "gates=12 bit",
        ops.isa_active(),
    ):
        assert words in text
    cells = module.cells()
    assert [len(layer) for layer in cells] == [2, 2]
    assert "ogate_cy" in str(cells[0][0].qparams)
    output, h_n, c_n = reference.lstm(cells, torch.ones(T, B, I))
    got, (got_h, got_c) = module(torch.ones(B, T, I))
    assert torch.equal(got.transpose(0, 1), output)
    assert torch.equal(got_h, h_n)
    assert torch.equal(got_c, c_n)


X = torch.zeros(T, B, I)
GOOD = torch.zeros(4, B, H)
BAD_CALLS = {
    "features": ((torch.zeros(T, B, I + 1),), ValueError, r"must be input_size=7, got \[5, 3, 8\]"),
    "rank 1": ((torch.zeros(I),), ValueError, r"must be 2-D \(unbatched\) or 3-D, got 1-D"),
    "rank 4": ((X[None],), ValueError, "got 4-D"),
    "no steps": ((torch.zeros(0, B, I),), ValueError, "at least one step"),
    "double": ((X.double(),), TypeError, "input must be torch.float32, got torch.float64"),
    "half": ((X.half(),), TypeError, "got torch.float16"),
    "bfloat16": ((X.bfloat16(),), TypeError, "got torch.bfloat16"),
    "complex": ((torch.complex(X, X),), TypeError, "got torch.complex64"),
    "integers": ((X.long(),), TypeError, "got torch.int64"),
    "sparse": ((X.to_sparse(),), TypeError, "must be a dense tensor"),
    "a list": (([[[0.0]]],), TypeError, "input must be a tensor, got list"),
    "None": ((None,), TypeError, "input must be a tensor, got NoneType"),
    "one state": ((X, GOOD), TypeError, r"hx must be None or a tuple \(h_0, c_0\), got Tensor"),
    "one of two": ((X, (GOOD,)), TypeError, "got 1 values"),
    "three": ((X, (GOOD, GOOD, GOOD)), TypeError, "got 3 values"),
    "None in states": ((X, (GOOD, None)), TypeError, "c_0 must be a tensor, got NoneType"),
    "rows of states": ((X, (GOOD[:2], GOOD)), ValueError, r"h_0 must be \[4, 3, 6\] .*got \[2, 3, 6\]"),
    "batch of states": ((X, (GOOD, GOOD[:, :1])), ValueError, r"c_0 must be \[4, 3, 6\]"),
    "rank of states": ((X, (GOOD[:, 0], GOOD[:, 0])), ValueError, r"h_0 must be \[4, 3, 6\]"),
    "unbatched states": ((X[:, 0], (GOOD, GOOD)), ValueError, r"h_0 must be \[4, 6\]"),
    "dtype of states": ((X, (GOOD, GOOD.double())), TypeError, "c_0 must be torch.float32"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_calls_that_are_refused(name: str) -> None:
    arguments, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        fused()(*arguments)


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.double, nn.Module.bfloat16])
def test_moves_that_are_refused(move: Any) -> None:
    module = fused()
    model = nn.Sequential(module)
    with pytest.raises(TypeError, match="runs in integers and float32 on the CPU"):
        move(model)
    assert module(X)[0].dtype == torch.float32


def test_cells_that_do_not_fit_together() -> None:
    layers = random_layers(Dice(0), I, H, 2, 1, "int8")
    with pytest.raises(ValueError, match="at least one layer"):
        tlq.LSTM([])
    with pytest.raises(ValueError, match="the same 1 or 2 directions"):
        tlq.LSTM([layers[0], layers[1] * 2])
    with pytest.raises(ValueError, match="layer 1 direction 0 must have input_size=6"):
        tlq.LSTM([layers[0], layers[0]])


@pytest.mark.parametrize("damage", ["truncated", "empty", "version", "random", "dtype"])
def test_damaged_blobs_are_refused(damage: str) -> None:
    module = fused()
    blob = module._packed.clone()
    if damage == "truncated":
        blob = blob[:-64]
    elif damage == "empty":
        blob = blob[:0]
    elif damage == "version":
        blob[8:12] = 255
    elif damage == "random":
        blob[:256] = torch.randint(0, 256, (256,), dtype=torch.uint8)
    else:
        blob = blob.view(torch.int8)
    with pytest.raises(RuntimeError, match="torch_lstm_quant"):
        ops.lstm(X, None, None, blob, module._shape)


def test_integers_need_grids() -> None:
    layers = random_layers(Dice(3), I, H, 1, 1, "int8")
    cell = layers[0][0]
    without_x = Cell(
        tlq.CellQParams(gates=cell.qparams.gates), torch.zeros(4 * H, I), torch.zeros(4 * H, H), cell.bias_ih, cell.bias_hh
    )
    with pytest.raises(ValueError, match="integer input needs one grid for part x"):
        tlq.LSTM([[without_x]]).forward_integers(X.to(torch.uint8))
    with pytest.raises(TypeError, match=r"input must be torch\.uint8 or torch.int8"):
        tlq.LSTM(layers).forward_integers(X)


class Watcher(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def traced_nodes(module: tlq.LSTM, x: Tensor) -> list[str]:
    return [str(node.target) for node in make_fx(module, tracing_mode="real")(x).graph.nodes]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_whoever_watches_sees_the_operator() -> None:
    module, x = fused(), torch.randn(T, B, I)
    with Watcher() as watcher:
        watched = module(x)[0]
    assert "torch_lstm_quant.lstm.default" in watcher.seen
    assert torch.equal(watched, module(x)[0])
    assert "torch_lstm_quant.lstm.default" in traced_nodes(module, x)
    with torch.profiler.profile() as profile:
        module(x)
    assert any(event.key == "torch_lstm_quant::lstm" for event in profile.key_averages())
    traced = torch.jit.trace(lambda x: module(x)[0], (x,), check_trace=False)
    assert "torch_lstm_quant::lstm" in str(traced.graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripting_says_what_to_use_in_its_place() -> None:
    for module in (fused(), nn.Sequential(fused()), tlq.LSTMCell(random_layers(Dice(5), I, H, 1, 1, "int8")[0][0])):
        with pytest.raises(TypeError, match=r"got a fused LSTM(Cell)?: use torch\.jit\.trace or torch\.export\.export"):
            torch.jit.script(module)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_calls_around_the_dispatcher_are_those_through_it(batch_first: bool, with_states: bool, inference: bool) -> None:
    module, x = fused(batch_first=batch_first), torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    hx = states() if with_states else None
    with torch.inference_mode(inference):
        output, (h_n, c_n) = module(x, hx)
        with Watcher():
            other, (other_h, other_c) = module(x, hx)
    for one, two in ((output, other), (h_n, other_h), (c_n, other_c)):
        assert torch.equal(one, two)
        assert one.stride() == two.stride()
        assert one.is_inference() == inference
        assert not one.requires_grad
    assert h_n.untyped_storage().nbytes() == h_n.numel() * 4


def test_plain_calls_go_around_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "lstm", None)
    fused()(torch.randn(T, B, I))
    fused(batch_first=True)(torch.randn(B, T, I), states())
    with torch.inference_mode():
        fused()(torch.randn(T, B, I), states())


def test_functionalized_and_unwritten_tensors() -> None:
    module, x = fused(), torch.randn(T, B, I)
    assert torch.equal(torch.func.functionalize(lambda t: module(t)[0])(x), module(x)[0])
    assert torch.equal(module(torch._efficientzerotensor((T, B, I)))[0], module(torch.zeros(T, B, I))[0])


def test_a_called_module_can_be_copied_pickled_and_loaded() -> None:
    module, x = fused(), torch.randn(T, B, I)
    want = module(x)[0]
    clone = copy.deepcopy(module)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    other = fused(seed=1)
    other(x)
    other.load_state_dict(module.state_dict())
    del module
    for one in (clone, loaded, other):
        assert torch.equal(one(x)[0], want)


def test_a_length_beyond_memory_is_an_error() -> None:
    x = torch.zeros(1, 1, I).expand(1 << 55, 1, I)
    with pytest.raises((MemoryError, RuntimeError), match=r"^$|allocate|overflow|size"):
        fused(directions=1)(x)
    with pytest.raises((MemoryError, RuntimeError)):
        tlq.Stream(fused(directions=1))(x)

"""The operators as torch sees them: registration, strides, dtypes, and errors instead of crashes."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from random_cells import Dice, random_input, random_layers
from torch import Tensor

from torch_lstm_quant import ops, reference
from torch_lstm_quant.call_forms import Shape
from torch_lstm_quant.cell import Cell

INPUT, HIDDEN, LAYERS, DIRECTIONS = 5, 19, 2, 2
SHAPE = Shape(INPUT, HIDDEN, LAYERS, DIRECTIONS, batch_first=False)
Layers = list[list[Cell]]


@pytest.fixture
def layers() -> Layers:
    return random_layers(Dice(3), INPUT, HIDDEN, LAYERS, DIRECTIONS, "int8")


def call(x: Tensor, packed: Tensor, hx: Tensor | None = None, cx: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return ops.lstm(x, hx, cx, packed, SHAPE)


def states(rows: int) -> tuple[Tensor, Tensor]:
    shape = LAYERS * DIRECTIONS, rows, HIDDEN
    return random_input(Dice(1), *shape), random_input(Dice(2), *shape)


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_opcheck(layers: Layers) -> None:
    packed = ops.pack(layers)
    h0, c0 = states(3)
    x = random_input(Dice(4), 6, 3, INPUT)
    lstm = torch.ops.torch_lstm_quant.lstm.default
    sizes = HIDDEN, LAYERS, DIRECTIONS
    torch.library.opcheck(lstm, (x, None, None, packed, *sizes))
    torch.library.opcheck(lstm, (x.transpose(0, 1), None, None, packed, *sizes))
    torch.library.opcheck(lstm, (x, h0, c0, packed, *sizes, torch.int32, torch.float32))


@pytest.fixture
def pack_arguments(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the operator ``pack`` is called with."""
    arguments: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.torch_lstm_quant, "pack", type("Spy", (), {"default": lambda *given: arguments.extend(given)}))
        ops.pack(layers)
    return arguments


def test_opcheck_of_pack(pack_arguments: list[Any]) -> None:
    torch.library.opcheck(torch.ops.torch_lstm_quant.pack.default, tuple(pack_arguments))


BAD_DTYPES = {
    "weight": (0, torch.float64, "weight_ih must be float32 or int8, got float64"),
    "bias": (1, torch.bfloat16, "bias must be float32, got bfloat16"),
    "weight scale": (2, torch.float16, "weight scale must be float32, got float16"),
    "weight zero point": (3, torch.int64, "weight zero point must be int32, got int64"),
    "grids": (4, torch.float32, "grids must be float64, got float32"),
    "table": (5, torch.complex64, "table must be float32, got another dtype"),
}


@pytest.mark.parametrize("name", BAD_DTYPES)
def test_packing_other_dtypes(pack_arguments: list[Any], name: str) -> None:
    index, dtype, message = BAD_DTYPES[name]
    pack_arguments[index] = [tensor.to(dtype) for tensor in pack_arguments[index]]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torch_lstm_quant.pack.default(*pack_arguments)


def test_the_fake_kernel_tells_shapes_and_dtypes(layers: Layers) -> None:
    packed = ops.pack(layers)
    x = random_input(Dice(4), 6, 3, INPUT)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.lstm(mode.from_tensor(x), None, None, mode.from_tensor(packed), SHAPE, torch.int32, torch.float32)
    real = ops.lstm(x, None, None, packed, SHAPE, torch.int32, torch.float32)
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


@pytest.mark.parametrize("form", ["transposed", "strided last", "expanded", "sliced", "reversed twice"])
def test_any_strides(layers: Layers, form: str) -> None:
    x = random_input(Dice(4), 6, 3, INPUT)
    x = {
        "transposed": lambda: x.transpose(0, 1).contiguous().transpose(0, 1),
        "strided last": lambda: x.repeat_interleave(2, dim=2)[:, :, ::2],
        "expanded": lambda: x[:1, :1].expand(6, 3, INPUT),
        "sliced": lambda: x[1::2, 1:],
        "reversed twice": lambda: x.flip(0).flip(0),
    }[form]()
    h0, c0 = states(x.shape[1])
    states_in = h0.transpose(0, 1).contiguous().transpose(0, 1), c0.repeat_interleave(2, dim=2)[:, :, ::2]
    assert_equal(call(x, ops.pack(layers), *states_in), reference.lstm(layers, x, h0, c0))


def test_nothing_is_written_to_the_arguments(layers: Layers) -> None:
    arguments = (random_input(Dice(4), 6, 3, INPUT), *states(3), ops.pack(layers))
    copies = [argument.clone() for argument in arguments]
    x, h0, c0, packed = arguments
    call(x, packed, h0, c0)
    assert_equal(arguments, tuple(copies))


@pytest.mark.parametrize(("steps", "rows"), [(0, 3), (4, 0), (0, 0)])
def test_empty_sequences(layers: Layers, steps: int, rows: int) -> None:
    h0, c0 = states(rows)
    output, h_n, c_n = call(torch.zeros(steps, rows, INPUT), ops.pack(layers), h0, c0)
    assert output.shape == (steps, rows, DIRECTIONS * HIDDEN)
    assert_equal((h_n, c_n), (h0, c0))


def test_integers_in_and_out(layers: Layers) -> None:
    packed = ops.pack(layers)
    grid = layers[0][0].qparams.x
    assert grid is not None
    layers[0][1] = Cell(
        layers[0][0].qparams, *(getattr(layers[0][1], f"{n}_{s}") for n in ("weight", "bias") for s in ("ih", "hh"))
    )
    packed = ops.pack(layers)
    x = random_input(Dice(4), 6, 3, INPUT)
    want = reference.lstm(layers, x)
    cells = [cell.qparams for cells in layers for cell in cells]
    for dtype in (torch.int32, torch.int16, torch.uint8):
        q = grid.quantize(x).to(dtype)
        output, h_n, c_n = ops.lstm(q, None, None, packed, SHAPE, dtype, None)
        assert output.dtype == h_n.dtype == dtype
        assert torch.equal(c_n, want[2])
        for direction, part in enumerate(output.chunk(DIRECTIONS, dim=2)):
            last = cells[(LAYERS - 1) * DIRECTIONS + direction].ogate_cy
            assert last is not None
            assert torch.equal(last.dequantize(part), want[0].chunk(DIRECTIONS, dim=2)[direction])
        for state, expected, qparams in zip(h_n, want[1], cells, strict=True):
            assert qparams.ogate_cy is not None
            assert torch.equal(qparams.ogate_cy.dequantize(state), expected)


BAD_CALLS = {
    "rank of x": (lambda c: c | {"x": c["x"][0]}, "x must have three dimensions"),
    "size of x": (lambda c: c | {"x": c["x"][:, :, 1:]}, r"x must be \[6, 3, 5\], got \[6, 3, 4\]"),
    "dtype of x": (lambda c: c | {"x": c["x"].double()}, "x must be float32, uint8, int8, int16 or int32, got float64"),
    "shape of hx": (lambda c: c | {"hx": c["hx"][1:]}, r"hx must be \[4, 3, 19\], got \[3, 3, 19\]"),
    "dtype of cx": (lambda c: c | {"cx": c["cx"].half()}, "cx must be float32, .*got float16"),
    "integer cx without a grid": (lambda c: c | {"cx": c["cx"].int()}, "part cx, which has no grid"),
    "hidden size": (lambda c: c | {"hidden_size": 20}, "packed holds hidden_size=19"),
    "layers": (lambda c: c | {"num_layers": 1}, "packed holds hidden_size=19, num_layers=2"),
    "h_dtype": (lambda c: c | {"h_dtype": torch.float64}, "h_dtype and c_dtype must be None, .*got float64 and float32"),
    "narrow h_dtype": (lambda c: c | {"h_dtype": torch.int8}, "part ogate_cy has integers from 0 to 255"),
    "c_dtype": (lambda c: c | {"c_dtype": torch.int32}, "part fgate_cx_igate_cgate, which has no grid"),
    "packed truncated": (lambda c: c | {"packed": c["packed"][:-64]}, "packed LSTM: got"),
    "packed cut in the header": (lambda c: c | {"packed": c["packed"][:20]}, "truncated"),
    "packed of another version": (lambda c: c | {"packed": changed(c["packed"], 8)}, "need version"),
    "packed of something else": (lambda c: c | {"packed": changed(c["packed"], 0)}, "not a packed LSTM"),
    "packed with another size": (lambda c: c | {"packed": changed(c["packed"], 32)}, "checksum"),
    "dtype of packed": (lambda c: c | {"packed": c["packed"].float()}, "packed must be uint8, got float32"),
}


def changed(packed: Tensor, byte: int) -> Tensor:
    packed = packed.clone()
    packed[byte] += 1
    return packed


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_errors(layers: Layers, case: str) -> None:
    h0, c0 = states(3)
    arguments = {"x": random_input(Dice(4), 6, 3, INPUT), "hx": h0, "cx": c0, "packed": ops.pack(layers)}
    arguments |= {"hidden_size": HIDDEN, "num_layers": LAYERS, "num_directions": DIRECTIONS}
    change, message = BAD_CALLS[case]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torch_lstm_quant.lstm(**change(arguments))


def test_a_misaligned_blob_is_taken_all_the_same(layers: Layers) -> None:
    packed = ops.pack(layers)
    moved = torch.cat([torch.zeros(3, dtype=torch.uint8), packed])[3:]
    x = random_input(Dice(4), 6, 3, INPUT)
    assert_equal(call(x, moved), call(x, packed))


def test_packing_gives_the_same_bytes_again(layers: Layers) -> None:
    assert torch.equal(ops.pack(layers), ops.pack(layers))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 instructions")
def test_only_the_checked_evaluations_fuse_multiply_and_add() -> None:
    library = next(Path(ops.__file__).parent.glob("_C*.so"))
    listing = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", library], capture_output=True, text=True, check=True)
    fused: Counter[str] = Counter()
    function = ""
    for line in listing.stdout.splitlines():
        if line.endswith(">:"):
            function = line
        elif re.search(r"\tvfn?m(add|sub)", line):
            fused[function] += 1
    assert fused
    for function, count in fused.items():
        assert re.search(r"KernelsOf<.*>::(finish|evaluate)\b", function)
        # for a vector, a rational function of degree 3 over 3 takes six, a polynomial over pieces three, one in a loop
        assert count % 3 == 0, f"{count} in {function}"


@pytest.mark.parametrize("size", [(1, 2**58, INPUT), (2**40, 2**18, INPUT)])
def test_results_that_no_memory_holds_are_an_error(layers: Layers, size: tuple[int, int, int]) -> None:
    with pytest.raises(RuntimeError, match="cannot allocate a result of size"):
        call(torch.zeros(1, 1, INPUT).expand(size), ops.pack(layers))

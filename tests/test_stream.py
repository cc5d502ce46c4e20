"""Streams: the same bits as the whole sequence however it is cut, and what they refuse."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cells import PRESETS, Dice, random_input, random_layers
from streamed import equal, refusals_beside
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_lstm_quant as tlq
from torch_lstm_quant import reference

I, H, B = 7, 6, 2  # noqa: E741


def fused(layers: int = 1, directions: int = 1, preset: str | None = "int8", size: tuple[int, int] = (I, H)) -> tlq.LSTM:
    return tlq.LSTM(random_layers(Dice(5), *size, layers, directions, preset))


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    preset=st.sampled_from([None, *PRESETS]),
    threads=st.integers(1, 2),
    large=st.booleans(),
)
def test_any_division_into_calls_gives_the_integer_reference(seed: int, preset: str | None, threads: int, large: bool) -> None:
    dice = Dice(seed)
    input_size, hidden_size = (dice.integer(1, 200 if large else 40) for _ in range(2))
    layers = random_layers(dice, input_size, hidden_size, dice.integer(1, 3), 1, preset)
    steps, rows = dice.integer(1, 12), dice.integer(1, 5)
    x = random_input(dice, steps, rows, input_size)
    hx = tuple(random_input(dice, len(layers), rows, hidden_size) for _ in range(2)) if dice.chance(0.5) else None
    want, h_n, c_n = reference.lstm(layers, x, *(hx or (None, None)))
    torch.set_num_threads(threads)
    stream = tlq.Stream(tlq.LSTM(layers), rows)
    for _ in range(2):  # the second time over what the first one left
        stream.reset(hx)
        parts, step = [], 0
        while step < steps:
            chunk = dice.integer(0, min(steps - step, 5))
            parts.append(stream(x[step])[None] if chunk == 1 and dice.chance(0.7) else stream(x[step : step + chunk]))
            step += chunk
        got = torch.cat(parts)
        for one, other in zip((got, *stream.state()), (want, h_n, c_n), strict=True):
            assert torch.equal(one, other) or torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7))


@pytest.mark.parametrize("shape", [(1, 128, 128), (1, 512, 512), (40, 96, 256)])
@pytest.mark.parametrize("threads", [1, 2])
def test_sizes_at_which_threads_and_python_threads_come_in(shape: tuple[int, int, int], threads: int) -> None:
    rows, input_size, hidden_size = shape
    module = fused(2, size=(input_size, hidden_size))
    torch.set_num_threads(threads)
    x = torch.randn(9, rows, input_size)
    whole, (h_n, c_n) = module(x)
    stream = tlq.Stream(module, rows)
    assert equal(torch.cat([stream(x[:3]), stream(x[3])[None], stream(x[4:])]), whole)
    assert equal(stream.state()[0], h_n)
    assert equal(stream.state()[1], c_n)


@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_long_enough_to_project_ahead(threads: int) -> None:
    module = fused(2, size=(256, 256))
    torch.set_num_threads(threads)
    x = torch.randn(122, 1, 256)
    want = reference.lstm(module.cells(), x, None, None)[0]
    stream = tlq.Stream(module)
    assert equal(torch.cat([stream(chunk) for chunk in x.split([40, 1, 33, 48])]), want)
    assert equal(module(x)[0], want)


def test_plain_calls_are_not_unusual(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = tlq.Stream(fused(), B)
    monkeypatch.setattr(stream, "_run_unusual", None)
    stream(torch.randn(3, B, I))
    stream(torch.randn(B, I), torch.empty(B, H))
    stream(torch.randn(B, 3, I).transpose(0, 1))


def test_negated_views_and_unwritten_zeros() -> None:
    module = fused(size=(1, H))
    z = torch.randn(4, B, dtype=torch.complex64).conj()
    x = z.imag.unsqueeze(-1)
    assert x.is_neg()
    want = module(x.clone())[0]
    assert equal(tlq.Stream(module, B)(x), want)
    assert equal(module(x)[0], want)
    zeros = torch._efficientzerotensor((4, B, 1))
    assert equal(tlq.Stream(module, B)(zeros), module(torch.zeros(4, B, 1))[0])
    stream, hx = tlq.Stream(module, B), torch.randn(1, B, H)
    stream.reset((torch._neg_view(hx), hx))
    assert equal(stream.state()[0], -hx)
    with pytest.raises(ValueError, match="no negated view"):
        stream(torch.randn(B, 1), torch._neg_view(torch.empty(B, H)))


def test_wrapped_tensors_are_refused() -> None:
    stream = tlq.Stream(fused(), B)
    with FakeTensorMode():
        fake, fake_state = torch.zeros(B, I), torch.zeros(1, B, H)
    with pytest.raises(TypeError, match="memory of"):
        stream(fake)
    with pytest.raises(TypeError, match="memory of"):
        stream.reset((fake_state, fake_state))
    with pytest.raises(TypeError, match="memory of"):
        stream(torch.zeros(B, I), fake_state[0])
    with pytest.raises(TypeError, match="x must have memory of its own"):
        torch.vmap(stream)(torch.randn(3, B, I))


def test_state_does_not_depend_on_default_dtype_or_device() -> None:
    stream = tlq.Stream(fused(), B)
    stream(torch.randn(B, I))
    want = stream.state()[0]
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert equal(stream.state()[0], want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_moved_to_shared_memory() -> None:
    module, x = fused(), torch.randn(5, B, I)
    stream, want = tlq.Stream(module, B), module(x)[0]
    module.share_memory()
    heap = [torch.full_like(module.packed(), 255) for _ in range(50)]  # over what was freed
    assert equal(module(x)[0], want)
    assert equal(stream(x), want)
    assert heap


def test_a_state_moves_to_another_stream() -> None:
    module, x = fused(2), torch.randn(8, B, I)
    one, other = tlq.Stream(module, B), tlq.Stream(module, B)
    one(x[:5])
    other.reset(one.state())
    assert equal(one(x[5:]), other(x[5:]))
    other.reset()
    assert equal(other(x), module(x)[0])


def test_state_after_reset_is_what_was_given() -> None:
    stream = tlq.Stream(fused(2), B)
    assert all(not state.any() for state in stream.state())
    hx = torch.randn(2, B, H), torch.randn(2, B, H)
    stream.reset(hx)
    assert all(equal(state, given) for state, given in zip(stream.state(), hx, strict=True))
    stream.reset()
    assert all(not state.any() for state in stream.state())


def strided(x: Tensor) -> list[Tensor]:
    return [
        x,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.repeat(1, 1, 2)[..., :I],
        nn.Parameter(x),
        torch.stack([x, x], -1)[..., 0],
    ]


@pytest.mark.parametrize("form", range(6))
def test_inputs_need_not_be_contiguous(form: int) -> None:
    module, x = fused(), torch.randn(4, B, I)
    assert equal(tlq.Stream(module, B)(strided(x)[form]), module(x)[0])
    stream = tlq.Stream(module, B)
    assert equal(torch.stack([stream(strided(x)[form][t]) for t in range(4)]), module(x)[0])


def test_rows_may_be_one_row_expanded() -> None:
    module, x = fused(), torch.randn(4, 1, I)
    assert equal(tlq.Stream(module, 5)(x.expand(4, 5, I)), module(x)[0].expand(4, 5, H))


def test_out_is_written_and_returned() -> None:
    module, x = fused(), torch.randn(4, B, I)
    stream, out = tlq.Stream(module, B), torch.full((4, B, H), 9.0)
    assert stream(x, out) is out
    assert equal(out, module(x)[0])
    stream.reset()
    buffer = torch.full((3, B, H), 9.0)
    assert stream(x[0], out=buffer[1]).data_ptr() == buffer[1].data_ptr()
    assert equal(buffer[1], module(x)[0][0])
    assert (buffer[[0, 2]] == 9).all()


def test_every_call_gives_a_tensor_of_its_own() -> None:
    stream, x = tlq.Stream(fused(), B), torch.randn(6, B, I)
    outputs = [stream(step) for step in x]
    copies = [y.clone() for y in outputs]
    outputs[2].add_(1)
    assert len({y.data_ptr() for y in outputs}) == 6
    assert all(equal(y, kept) for i, (y, kept) in enumerate(zip(outputs, copies, strict=True)) if i != 2)
    assert outputs[0].untyped_storage().nbytes() == B * H * 4
    assert not outputs[0]._is_view()


def test_a_stream_is_of_one_lstm() -> None:
    with pytest.raises(RuntimeError, match=r"has no LSTM yet: call Stream.__init__"):
        tlq.Stream.__new__(tlq.Stream)(torch.zeros(1, I))
    stream = tlq.Stream(fused(), B)
    sizes = repr(stream)
    with pytest.raises(RuntimeError, match="has its LSTM already: make another Stream"):
        stream.__init__(fused(), 1)  # type: ignore[misc]
    assert repr(stream) == sizes  # of which state() makes tensors


def test_steps_come_first_whatever_the_module_takes() -> None:
    module, x = fused(), torch.randn(4, B, I)
    batch_first = tlq.LSTM(module.cells(), batch_first=True)
    assert equal(batch_first(x.transpose(0, 1))[0].transpose(0, 1), module(x)[0])
    assert equal(tlq.Stream(batch_first, B)(x), module(x)[0])
    with pytest.raises(ValueError, match=r"a chunk, steps first\), got \[2, 4, 7\]"):
        tlq.Stream(batch_first, B)(x.transpose(0, 1))


def test_a_chunk_without_steps_changes_nothing() -> None:
    stream = tlq.Stream(fused(), B)
    stream(torch.randn(3, B, I))
    before = stream.state()
    assert stream(torch.empty(0, B, I)).shape == (0, B, H)
    assert all(equal(now, then) for now, then in zip(stream.state(), before, strict=True))


def test_no_gradient_and_inference_tensors() -> None:
    stream = tlq.Stream(fused(), B)
    assert not stream(torch.randn(B, I, requires_grad=True)).requires_grad
    with torch.inference_mode():
        y = stream(torch.randn(B, I))
    assert y.is_inference()
    assert stream(y.new_zeros(B, I)).shape == (B, H)


def test_outlives_its_module() -> None:
    x = torch.randn(5, B, I)
    module = fused()
    want = module(x)[0]
    stream = tlq.Stream(module, B)
    other = fused(preset="all_int8")
    del module
    assert equal(stream(x), want)
    assert not equal(tlq.Stream(other, B)(x), want)


def overlapping() -> tuple[Tensor, Tensor]:
    memory = torch.zeros(B, 2 * I)
    return memory[:, :I], memory.view(-1)[3 : 3 + B * H].view(B, H)


X = torch.zeros(B, I)
BAD_CALLS = {
    "batch": (torch.zeros(B + 1, I), None, ValueError, r"x must be \[batch_size=2, 7\].*got \[3, 7\]"),
    "features": (torch.zeros(B, I - 1), None, ValueError, r"got \[2, 6\]"),
    "rank 1": (torch.zeros(I), None, ValueError, r"got \[7\]"),
    "rank 4": (torch.zeros(1, 1, B, I), None, ValueError, r"got \[1, 1, 2, 7\]"),
    "no tensor": ([[0.0] * I] * B, None, TypeError, "x must be a tensor, got list"),
    "array": (X.numpy(), None, TypeError, "x must be a tensor, got ndarray"),
    "double": (X.double(), None, TypeError, "x must be torch.float32, got torch.float64"),
    "half": (X.half(), None, TypeError, "got torch.float16"),
    "bytes": (X.byte(), None, TypeError, "got torch.uint8"),
    "complex": (torch.zeros(B, I, dtype=torch.complex64), None, TypeError, "got torch.complex64"),
    "meta": (X.to("meta"), None, TypeError, "x must be on the cpu device, got a tensor on meta"),
    "sparse": (X.to_sparse(), None, TypeError, "layout torch.sparse_coo"),
    "out too small": (X, torch.zeros(B, H - 1), ValueError, r"out must be \[2, 6\] for x \[2, 7\], got \[2, 5\]"),
    "out of a chunk": (X, torch.zeros(1, B, H), ValueError, r"got \[1, 2, 6\]"),
    "out too short": (torch.zeros(3, B, I), torch.zeros(2, B, H), ValueError, r"out must be \[3, 2, 6\]"),
    "out strided": (X, torch.zeros(H, B).T, ValueError, "out must be contiguous"),
    "out double": (X, torch.zeros(B, H).double(), TypeError, "out must be torch.float32"),
    "out no tensor": (X, "out", TypeError, "out must be a tensor, got str"),
    "out meta": (X, torch.zeros(B, H, device="meta"), TypeError, "out must be on the cpu"),
    "overlap": (*overlapping(), ValueError, "out must not overlap x"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_refused_and_changes_nothing(name: str) -> None:
    x, out, error, message = BAD_CALLS[name]
    stream = tlq.Stream(fused(), B)
    stream(torch.randn(3, B, I))
    before = stream.state()
    with pytest.raises(error, match=message):
        stream(x, out)
    assert all(equal(now, then) for now, then in zip(stream.state(), before, strict=True))


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
def test_a_quantized_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got torch.quint8"):
        tlq.Stream(fused(), B)(torch.quantize_per_tensor(X, 1.0, 0, torch.quint8))


ZEROS = torch.zeros(1, B, H)
BAD_STATES = {
    "no tuple": (ZEROS, TypeError, "hx must be None or a tuple"),
    "one": ((ZEROS,), TypeError, "got 1 values"),
    "None inside": ((ZEROS, None), TypeError, "c_0 must be a tensor, got NoneType"),
    "shape": ((ZEROS, torch.zeros(1, B + 1, H)), ValueError, r"c_0 must be \[1, 2, 6\].*got \[1, 3, 6\]"),
    "dtype": ((ZEROS.double(), ZEROS), TypeError, "h_0 must be torch.float32"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_states_are_refused_and_change_nothing(name: str) -> None:
    hx, error, message = BAD_STATES[name]
    stream = tlq.Stream(fused(), B)
    stream(torch.randn(3, B, I))
    before = stream.state()
    with pytest.raises(error, match=message):
        stream.reset(hx)  # type: ignore[arg-type]
    assert all(equal(now, then) for now, then in zip(stream.state(), before, strict=True))


BAD_STREAMS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "float LSTM": (lambda: tlq.Stream(nn.LSTM(I, H)), TypeError, "takes a fused LSTM.*got LSTM: pass the LSTM itself"),
    "model": (lambda: tlq.Stream(nn.Sequential(fused())), TypeError, "got Sequential"),
    "two directions": (lambda: tlq.Stream(fused(directions=2)), ValueError, "bidirectional"),
    "no rows": (lambda: tlq.Stream(fused(), 0), ValueError, "batch_size must be at least 1 .*got 0"),
    "negative rows": (lambda: tlq.Stream(fused(), -3), ValueError, "got -3"),
    "far too many rows": (lambda: tlq.Stream(fused(), 1 << 70), ValueError, "batch_size"),
    "float rows": (lambda: tlq.Stream(fused(), 2.0), TypeError, "batch_size must be an int, got float"),  # type: ignore[arg-type]
    "meta": (lambda: tlq.Stream(fused().to("meta")), ValueError, "on the CPU"),
    "copied": (lambda: copy.deepcopy(tlq.Stream(fused())), TypeError, "cannot be copied or pickled"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_what_cannot_be_streamed(name: str) -> None:
    make, error, message = BAD_STREAMS[name]
    with pytest.raises(error, match=message):
        make()


def test_two_threads_at_once_are_an_error() -> None:
    module = fused(2, size=(256, 256))
    stream, x = tlq.Stream(module), torch.randn(3000, 1, 256)
    got: list[Tensor] = []
    worker = threading.Thread(target=lambda: got.append(stream(x)))
    assert refusals_beside(worker, [stream.state]) > 0
    assert equal(got[0], module(x)[0])


def test_repr_names_sizes() -> None:
    assert repr(tlq.Stream(fused(2), 3)) == "Stream(7, 6, num_layers=2, batch_size=3)"

"""Rows that enter and leave a Stream: the same bits as alone whoever shares the batch, and what is refused."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from isa_runs import run_on
from streamed import B, H, I, equal, fused, refusals_beside, same_states, started
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_lstm_quant as tlq
from torch_lstm_quant import ops
from torch_lstm_quant.call_forms import INTEGER_DTYPES

# how many random schedules each ISA and thread count runs
SCHEDULES = int(os.environ.get("STREAM_TEST_SCHEDULES", 40))


@pytest.mark.parametrize("isa", ops.isas_built())
def test_callers_get_what_they_get_alone(isa: str) -> None:
    result = run_on(isa, "stream_rows_worker.py", 1, SCHEDULES)
    assert result["failed"] == []
    assert set(result["compared"]) == {"1", "2"}
    for threads, compared in result["compared"].items():
        assert compared > 800 * SCHEDULES
        print(f"{isa}, {threads} threads: {compared:,} values equal")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 7, 40, 130])
def test_sizes_at_which_threads_and_tiles_come_in(rows: int, threads: int) -> None:
    module, x = fused(2, size=(96, 256)), torch.randn(4, 150, 96)
    want = module(x)[0]
    torch.set_num_threads(threads)
    stream, chosen = tlq.Stream(module, 150), torch.randperm(150)[:rows]
    assert equal(stream(x[:2, chosen], rows=chosen), want[:2, chosen])
    assert equal(stream(x[2, chosen], rows=chosen), want[2, chosen])
    for row in range(3):
        assert equal(stream(x[3, chosen[row : row + 1]], rows=chosen[row : row + 1]), want[3, chosen[row : row + 1]])


def test_what_did_not_change_is_that_of_the_row_before() -> None:
    """Steps of one row after the other, by what changed from row to row: signals that stand still, and one that moves."""
    module = fused(size=(64, 128))
    levels, steps = torch.randn(4, 64), 60
    x = levels.repeat(steps, 1, 1)
    x[:, 3] = torch.randn(steps, 64)
    want, (h_n, c_n) = module(x)
    stream = tlq.Stream(module, 4)
    for t in range(steps):
        for row in torch.randperm(4).tolist():
            assert equal(stream(x[t, row : row + 1], rows=[row])[0], want[t, row]), (t, row)
    assert same_states(stream, (h_n, c_n))


def test_the_others_stay_as_they_are() -> None:
    stream = started(fused(2))
    before = stream.state()
    stream(torch.randn(3, 2, I), rows=[3, 1])
    stream.reset(rows=[4])
    for now, then in zip(stream.state(), before, strict=True):
        assert equal(now[:, [0, 2]], then[:, [0, 2]])
        assert not now[:, 4].any()
        assert not equal(now[:, [1, 3]], then[:, [1, 3]])


def test_states_of_rows() -> None:
    stream = started(fused(2))
    h_n, c_n = stream.state()
    for rows in ([3, 0], torch.tensor([3, 0]), (3, 0), torch.tensor([3, 9, 0])[::2], range(3, -1, -3)):
        assert all(equal(one, other[:, [3, 0]]) for one, other in zip(stream.state(rows), (h_n, c_n), strict=True))
    hx = torch.randn(2, 2, H), torch.randn(2, 2, H)
    stream.reset(hx, rows=[4, 2])
    assert all(equal(one, given) for one, given in zip(stream.state(rows=[4, 2]), hx, strict=True))
    assert equal(stream.state(rows=[0, 1, 3])[0], h_n[:, [0, 1, 3]])


def test_no_rows_at_all() -> None:
    stream = started(fused())
    before = stream.state()
    for rows in ([], torch.empty(0, dtype=torch.int64)):
        assert stream(torch.empty(0, I), rows=rows).shape == (0, H)
        assert stream(torch.empty(3, 0, I), rows=rows).shape == (3, 0, H)
        out = torch.empty(3, 0, H)
        assert stream(torch.empty(3, 0, I), out, rows=rows) is out
        assert stream(torch.empty(0, 0, I), rows=rows).shape == (0, 0, H)
        stream.reset(rows=rows)
        stream.reset(stream.state(rows), rows=rows)
        assert stream.state(rows)[0].shape == (1, 0, H)
        stream.restore(stream.save(rows), rows)
    assert same_states(stream, before)


def test_usual_forms_are_not_unusual(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = tlq.Stream(fused(), B)
    monkeypatch.setattr(stream, "_run_unusual", None)
    stream(torch.randn(2, I), rows=[4, 0])
    stream(torch.randn(3, 2, I), torch.empty(3, 2, H), rows=torch.tensor([4, 0]))
    stream(torch.randn(0, I), rows=[])


def test_numbers_of_other_kinds() -> None:
    module, x = fused(), torch.randn(2, I)
    want = module(x[None])[0][0]
    assert equal(tlq.Stream(module, B)(x, rows=[numpy.int32(4), torch.tensor(1)]), want)
    for dtype in INTEGER_DTYPES:  # those that lengths= takes
        assert equal(tlq.Stream(module, B)(x, rows=torch.tensor([4, 1]).to(dtype)), want)
    assert equal(tlq.Stream(module, B)(x, rows=torch._neg_view(torch.tensor([-4, -1]))), want)


X = torch.zeros(2, I)
BAD_ROWS: dict[str, tuple[Any, type[Exception], str]] = {
    "twice": ([3, 3], ValueError, "rows must each come once, got 3 twice"),
    "twice in a tensor": (torch.tensor([0, 0]), ValueError, "got 0 twice"),
    "too large": ([0, 5], ValueError, "rows must be from 0 to batch_size - 1 = 4, got 5"),
    "negative": ([-1, 0], ValueError, "got -1"),
    "far too large": ([0, 1 << 80], ValueError, f"got {1 << 80}"),
    "too large in a tensor": (torch.tensor([0, 1 << 40]), ValueError, f"got {1 << 40}"),
    "too many": ([0, 1, 2, 3, 4, 0], ValueError, "got 0 twice"),
    "floats": ([0.0, 1.0], TypeError, "rows must be ints, got 0.0"),
    "float tensors inside": ([torch.tensor(1.0), torch.tensor(0.0)], TypeError, r"rows must be ints, got tensor\(1\.\)"),
    "bools": ([True, False], TypeError, "rows must be ints, got True"),
    "bools of numpy": ([numpy.bool_(True), 0], TypeError, r"rows must be ints, got (np\.)?True"),
    "tensors of bools": ([torch.tensor(True), 0], TypeError, r"rows must be ints, got tensor\(True\)"),
    "tensors that are no scalars": ([torch.tensor([0]), 1], TypeError, r"rows must be ints, got tensor\(\[0\]\)"),
    "without a value": ([torch.tensor(1, device="meta"), 0], TypeError, "rows must be ints, got tensor"),
    "strings": (["a", "b"], TypeError, "rows must be ints, got 'a'"),
    "None inside": ([None, 0], TypeError, "rows must be ints, got None"),
    "a string": ("01", TypeError, "rows must be a list of ints or a tensor of integers, got str"),
    "one int": (3, TypeError, "got int"),
    "a set": ({0, 1}, TypeError, "got set"),
    "a mask": (torch.tensor([True, False]), TypeError, r"got a mask of torch.bool: pass mask.nonzero\(\)"),
    "float tensor": (torch.tensor([0.0, 1.0]), TypeError, "rows must be integers, got torch.float32"),
    "too large in uint64": (torch.tensor([1 << 63], dtype=torch.uint64), ValueError, f"got {1 << 63}"),
    "2-D": (torch.tensor([[0, 1]]), ValueError, r"rows must be one-dimensional, got \[1, 2\]"),
    "0-D": (torch.tensor(0), ValueError, r"got \[\]"),
    "meta": (torch.tensor([0, 1], device="meta"), TypeError, "rows must be on the cpu device, got a tensor on meta"),
    "sparse": (torch.tensor([0, 1]).to_sparse(), TypeError, "layout torch.sparse_coo"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_and_change_nothing(name: str) -> None:
    rows, error, message = BAD_ROWS[name]
    stream = started(fused())
    before, saved, states = stream.state(), stream.save(rows=[0, 1]), stream.state(rows=[0, 1])
    uses: list[Callable[[], object]] = [
        lambda: stream(X, rows=rows),
        lambda: stream(X, torch.empty(2, H), rows=rows),
        lambda: stream.reset(rows=rows),
        lambda: stream.reset(states, rows=rows),
        lambda: stream.state(rows=rows),
        lambda: stream.save(rows=rows),
        lambda: stream.restore(saved, rows=rows),
    ]
    for use in uses:
        with pytest.raises(error, match=message):
            use()
    assert same_states(stream, before)


def test_wrapped_rows_are_refused() -> None:
    stream = tlq.Stream(fused(), B)
    with FakeTensorMode():
        rows = torch.tensor([0, 1])
    with pytest.raises(TypeError, match="rows must have memory of its own"):
        stream(X, rows=rows)


BAD_CALLS: dict[str, tuple[Tensor, Tensor | None, str]] = {
    "all rows": (torch.zeros(B, I), None, r"x must be \[len\(rows\)=2, 7\] \(one step\) or \[T, 2, 7\].*got \[5, 7\]"),
    "chunk of all rows": (torch.zeros(3, B, I), None, r"got \[3, 5, 7\]"),
    "other width": (torch.zeros(2, I + 1), None, r"got \[2, 8\]"),
    "out of all rows": (X, torch.zeros(B, H), r"out must be \[2, 6\] for x \[2, 7\], got \[5, 6\]"),
    "overlap": (X, X.view(-1)[: 2 * H].view(2, H), "out must not overlap x"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_stream_fed_other_sizes_refuses_them(name: str) -> None:
    x, out, message = BAD_CALLS[name]
    stream = started(fused())
    before = stream.state()
    for rows in ([3, 1], torch.tensor([3, 1])):
        with pytest.raises(ValueError, match=message):
            stream(x, out, rows=rows)
    assert same_states(stream, before)
    with pytest.raises(ValueError, match=r"h_0 must be \[1, 2, 6\] \(num_layers, rows, hidden_size\), got \[1, 5, 6\]"):
        stream.reset(before, rows=[0, 1])
    with pytest.raises(TypeError, match="Stream"):
        stream(X, None, [3, 1])  # type: ignore[misc]


def test_two_threads_at_once_are_an_error_whatever_their_rows() -> None:
    module = fused(2, size=(256, 256))
    stream, x = tlq.Stream(module, 3), torch.randn(2000, 1, 256)
    saved = stream.save(rows=[2])
    got: list[Tensor] = []
    worker = threading.Thread(target=lambda: got.append(stream(x, rows=[0])))
    uses: list[Callable[[], object]] = [
        lambda: stream(x[:1], rows=[1]),
        lambda: stream.reset(rows=[1]),
        lambda: stream.state(rows=[1]),
        lambda: stream.save(rows=[1]),
        lambda: stream.restore(saved, rows=[1]),
    ]
    assert refusals_beside(worker, uses) > 0
    assert equal(got[0], module(x)[0])


def test_rows_given_as_a_tensor_may_change_while_the_stream_works() -> None:
    module = fused(2, size=(256, 256))
    stream, x, rows = tlq.Stream(module, 2), torch.randn(2000, 1, 256), torch.tensor([1])
    results: list[Tensor | ValueError] = []

    def work() -> None:
        try:
            results.append(stream(x, rows=rows))
        except ValueError as error:  # they changed before they were read
            results.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive() and not is_used(stream):
        pass
    time.sleep(0.002)  # of the tens of milliseconds that it works
    rows.fill_(1 << 40)
    worker.join()
    (result,) = results
    assert isinstance(result, ValueError) or equal(result, module(x)[0])


def is_used(stream: tlq.Stream) -> bool:
    try:
        stream.state(rows=[0])
    except RuntimeError:
        return True
    return False

"""A Stream as a Python object: forms of calls, references, and sizes that are set to others."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from random_cells import Dice, random_layers
from torch import Tensor, nn

import torch_lstm_quant as tlq

I, H, B = 7, 6, 2  # noqa: E741


def fused() -> tlq.LSTM:
    return tlq.LSTM(random_layers(Dice(5), I, H, 1, 1, "int8"))


def test_sizes_that_are_not_the_streams_do_not_reach_other_memory() -> None:
    stream = tlq.Stream(fused(), B)
    # more than there is, so that a failure of this test does no harm; type checkers refuse it
    stream.batch_size = 3 * B  # type: ignore[misc]
    states = torch.zeros(1, 3 * B, H), torch.zeros(1, 3 * B, H)
    for use in (stream.state, stream.reset, lambda: stream.reset(states)):
        with pytest.raises(RuntimeError, match="have 12 and 12 values, got 36 and 36"):
            use()


CALLS: dict[str, tuple[Callable[[tlq.Stream, Tensor], object], type[Exception] | None]] = {
    "x by name": (lambda stream, x: stream(x=x), None),
    "out None by name": (lambda stream, x: stream(x, out=None), None),
    "both by name": (lambda stream, x: stream(out=torch.empty(B, H), x=x), None),
    "no arguments": (lambda stream, _: stream(), TypeError),  # type: ignore[call-arg]
    "only out": (lambda stream, x: stream(out=x), TypeError),  # type: ignore[call-arg]
    "x twice": (lambda stream, x: stream(x, x=x), TypeError),  # type: ignore[misc]
    "three": (lambda stream, x: stream(x, None, None), TypeError),  # type: ignore[call-arg]
    "unknown name": (lambda stream, x: stream(x, hx=None), TypeError),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("name", CALLS)
def test_forms_of_a_call(name: str) -> None:
    call, error = CALLS[name]
    module, x = fused(), torch.randn(B, I)
    stream = tlq.Stream(module, B)
    if error is not None:
        with pytest.raises(error, match="Stream"):
            call(stream, x)
        assert not stream.state()[0].any()
        return
    got = call(stream, x)
    assert isinstance(got, Tensor)
    assert torch.equal(got, module(x[None])[0][0])


def test_a_cycle_of_a_subclass_is_collected() -> None:
    class Named(tlq.Stream):
        def __init__(self) -> None:
            super().__init__(fused(), B)
            self.me = self

        def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
            return super().__call__(x, out) + 1

    named, x = Named(), torch.randn(B, I)
    assert torch.equal(named(x), tlq.Stream(fused(), B)(x) + 1)
    alive = weakref.ref(named)
    del named
    gc.collect()
    assert alive() is None


def test_calls_keep_no_references() -> None:
    stream, x, out = tlq.Stream(fused(), B), torch.randn(B, I), torch.empty(B, H)
    kept = stream, x, out, tlq.Stream

    def calls() -> None:
        stream(x)
        stream(x, out=out)
        stream(x.T.contiguous().T, out)
        for bad in ((), (x, 1), (x, out, x), (out, x)):
            with pytest.raises((TypeError, ValueError)):
                stream(*bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            tlq.Stream(nn.LSTM(I, H))  # type: ignore[arg-type]
        tlq.Stream(fused(), B)(x)

    counts = []
    for _ in range(3):  # the first time Python keeps some for its caches
        for _ in range(20):
            calls()
        gc.collect()
        counts.append([sys.getrefcount(value) for value in kept])
    assert counts[1] == counts[2]

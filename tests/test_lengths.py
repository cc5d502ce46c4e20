"""``lengths`` in every stage: one model that is float, observed, trained, converted and fused, and its padding never seen."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_lstms import torchs_warnings
from test_call_forms import assert_same, assert_within_a_step, step_of
from test_packed import BAD_LENGTHS, LENGTHS, OPTIONS, PACKED, B, H, I, T, noise
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torch_lstm_quant as tlq
from torch_lstm_quant import reference
from torch_lstm_quant.call_forms import States


class Branches(nn.Module):
    """The branch of docs/export.md: nn.LSTM has no ``lengths``, every other stage has."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(I, H, **options)

    def forward(self, x: Tensor, lengths: Tensor, hx: States | None = None) -> Any:
        if not isinstance(self.lstm, nn.LSTM):
            return self.lstm(x, hx, lengths=lengths)
        packed = pack_padded_sequence(x, lengths, self.lstm.batch_first, enforce_sorted=False)
        output, hx = self.lstm(packed, hx)
        steps = x.shape[1 if self.lstm.batch_first else 0]
        return pad_packed_sequence(output, self.lstm.batch_first, total_length=steps)[0], hx


def test_the_page_shows_this_forward() -> None:
    page = (Path(__file__).parents[1] / "docs/export.md").read_text()
    shown = re.findall(r"```python\n(def forward.*?)```", page, flags=re.DOTALL)
    ran = textwrap.dedent(inspect.getsource(Branches.forward))
    assert [block.splitlines()[1:] for block in shown] == [ran.splitlines()[1:]]  # but for the types


def padded(seed: int, batch_first: bool = False, padding: float = torch.nan) -> Tensor:
    """A batch in which what lies beyond the lengths would be noticed."""
    x = noise(seed)
    x[torch.arange(T)[:, None] >= LENGTHS] = padding
    return x.transpose(0, 1) if batch_first else x


def by_rows(fused: tlq.LSTM, x: Tensor, hx: States | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The integer reference of each row alone, ``x`` and the output being ``[T, B, ...]``."""
    rows = []
    for row, length in enumerate(LENGTHS.tolist()):
        own = () if hx is None else (state[:, row : row + 1] for state in hx)
        output, h, c = reference.lstm(fused.cells(), x[:length, row : row + 1], *own)
        rows.append((torch.cat([output, torch.zeros(T - length, *output.shape[1:])]), h, c))
    output, h, c = (torch.cat(parts, 1) for parts in zip(*rows, strict=True))
    return output, (h, c)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("preset", ["int8", "int8_gates16"])
@pytest.mark.parametrize("name", [*OPTIONS, "projected"])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@torch.no_grad()
def test_every_stage_gives_each_row_what_it_gets_alone(name: str, preset: str, with_states: bool) -> None:
    options = {key: value for key, value in OPTIONS.get(name, {"proj_size": 3}).items() if key != "enforce_sorted"}
    model, first = Branches(**options).eval(), options.get("batch_first", False)
    cells = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    sizes = (options.get("proj_size", H), H)
    generator = torch.Generator().manual_seed(7)
    hx = tuple(torch.randn(cells, B, size, generator=generator).tanh() for size in sizes) if with_states else None
    batches = [(padded(seed, first), LENGTHS, hx) for seed in range(2)]
    prepared = tlq.prepare(model, getattr(tlq.LSTMQConfig, preset)())
    for batch in batches:
        torch.testing.assert_close(prepared(*batch), model(*batch))  # observers change nothing
    fused, ref = (tlq.convert(prepared, backend=backend) for backend in ("fused", "reference"))
    got = fused(*batches[1])
    assert_within_a_step(got, ref(*batches[1]), step_of(fused))
    output, states = by_rows(fused.lstm, padded(1), hx)
    assert_same(got, (output.transpose(0, 1) if first else output, states))


@torch.no_grad()
def test_calibration_sees_what_packing_shows_it() -> None:
    config = tlq.LSTMQConfig.int8_gates16()
    lstm = Branches(bidirectional=True).lstm.eval()
    with_lengths, packed = tlq.prepare(lstm, config), tlq.prepare(lstm, config)
    output, states = with_lengths(padded(0, padding=1e6), lengths=LENGTHS)
    want, want_states = packed(pack_padded_sequence(padded(0), LENGTHS, enforce_sorted=False))
    assert_same((output, states), (pad_packed_sequence(want)[0], want_states))
    assert int(with_lengths.calls) == 1
    ranges = packed.state_dict()
    assert all(torch.equal(value, ranges[name]) for name, value in with_lengths.state_dict().items())


@pytest.mark.parametrize("stage", ["observed", "reference"])
def test_lengths_that_leave_steps_out_or_no_rows(stage: str) -> None:
    lstm: Any = tlq.prepare(Branches().lstm.eval())
    lstm(noise())
    lstm = tlq.convert(lstm, "reference") if stage == "reference" else lstm
    output, (h, c) = lstm(noise(), lengths=[2] * B)  # no row is as long as the batch
    want, (want_h, want_c) = lstm(noise()[:2])
    assert_same((output[:2], h, c), (want, want_h, want_c))
    assert output.shape == (T, B, H)
    assert not output[2:].any()
    assert lstm(noise()[:, :0], lengths=[])[0].shape == (T, 0, H)


def test_training_goes_through_lengths_and_leaves_padding_alone() -> None:
    model = tlq.prepare_qat(Branches(num_layers=2, bidirectional=True, dropout=0.5))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = padded(0).requires_grad_()
    model(x, LENGTHS)[0].square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert x.grad is not None
    assert torch.equal(x.grad.abs().amax(2) > 0, torch.arange(T)[:, None] < LENGTHS)
    fused, ref = (tlq.convert(model.eval(), backend=backend) for backend in ("fused", "reference"))
    with torch.no_grad():
        assert_within_a_step(fused(padded(0), LENGTHS), ref(padded(0), LENGTHS), step_of(fused))


@pytest.fixture(scope="module", params=["observed", "reference"])
def stage(request: pytest.FixtureRequest) -> Any:
    observed = tlq.prepare(nn.LSTM(I, H).eval())
    observed(noise())
    return observed if request.param == "observed" else tlq.convert(observed, "reference")


@pytest.mark.parametrize("name", BAD_LENGTHS)
def test_lengths_are_refused_as_the_fused_lstm_refuses_them(stage: Any, name: str) -> None:
    lengths, error, message = BAD_LENGTHS[name]
    with pytest.raises(error, match=message):
        stage(noise(), lengths=lengths)


def test_inputs_and_states_that_do_not_go_with_lengths(stage: Any) -> None:
    with pytest.raises(ValueError, match="lengths must be None, got"):
        stage(PACKED, lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"input must be 3-D, got 2-D \[6, 5\]"):
        stage(noise()[:, 0], lengths=[6])
    state = torch.zeros(1, B, H)
    with pytest.raises(ValueError, match=r"h_0 must be \[1, 4, 8\] for input \[6, 4, 5\], got \[1, 3, 8\]"):
        stage(noise(), (state[:, 1:], state), LENGTHS)


class Outright(nn.Module):
    """For FX, which never runs the float LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = Branches().lstm

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.lstm(x, lengths=lengths)


@torchs_warnings
@torch.no_grad()
def test_fx_gives_what_quantize_gives() -> None:
    batch = padded(0), LENGTHS
    mapping = tlq.qconfig_mapping(tlq.LSTMQConfig.int8())
    prepared = prepare_fx(Outright().eval(), mapping, batch, tlq.prepare_custom_config())
    prepared(*batch)
    for backend in ("fused", "reference"):
        want = tlq.quantize(Outright(), [batch], backend=backend)(*batch)
        assert_same(convert_fx(prepared, tlq.convert_custom_config(backend))(*batch), want)


@torch.no_grad()
def test_the_model_is_compiled_and_exported() -> None:
    model = tlq.quantize(Branches(batch_first=True), [(padded(0, True), LENGTHS)])
    batch = padded(1, True), LENGTHS
    want = model(*batch)
    assert_same(torch.compile(model, fullgraph=True, backend="aot_eager")(*batch), want)
    rows, steps = torch.export.Dim("rows"), torch.export.Dim("steps")
    shapes = {"x": {0: rows, 1: steps}, "lengths": {0: rows}}
    for strict in (False, True):
        exported = torch.export.export(model, batch, dynamic_shapes=shapes, strict=strict).module()
        assert_same(exported(*batch), want)


def test_a_trace_that_would_keep_its_lengths_is_refused() -> None:
    prepared = tlq.prepare(nn.LSTM(3, 4).eval())
    prepared(torch.randn(5, 2, 3))
    reference = tlq.convert(prepared, backend="reference")
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 2])
    with pytest.raises(RuntimeError, match="a ReferenceLSTM must be traced without lengths, got some"):
        torch.jit.trace(lambda x, lengths: reference(x, None, lengths)[0], (x, lengths))

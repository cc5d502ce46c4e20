"""Every call form of nn.LSTM, by quantize() and by prepare_fx/convert_fx, fused and reference: all the same results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from converted_lstms import torchs_warnings
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping, get_default_qconfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import torch_lstm_quant as tlq
from torch_lstm_quant import reference

T, B, I, H = 6, 3, 5, 8  # noqa: E741


class Form:
    """A call form: how the LSTM is made and called, and with what."""

    def __init__(self, call: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> None:
        self.call, self.options = call, options
        self.shapes = shapes or ((T, B, I),)

    def inputs(self, seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        x, *states = (torch.randn(shape, generator=generator) for shape in self.shapes)
        return x, *(state.tanh() for state in states)  # as an LSTM would leave them


STATE = (1, B, H)
FORMS: dict[str, Form] = {
    "states omitted": Form(lambda lstm, x: lstm(x)),
    "states None": Form(lambda lstm, x: lstm(x, None)),
    "literal tuple": Form(lambda lstm, x, h, c: lstm(x, (h, c)), (T, B, I), STATE, STATE),
    "keyword": Form(lambda lstm, x, h, c: lstm(input=x, hx=(h, c)), (T, B, I), STATE, STATE),
    "batch_first": Form(lambda lstm, x: lstm(x), (B, T, I), batch_first=True),
    "batch_first with states": Form(lambda lstm, x, h, c: lstm(x, (h, c)), (B, T, I), STATE, STATE, batch_first=True),
    "unbatched": Form(lambda lstm, x: lstm(x), (T, I)),
    "unbatched with states": Form(lambda lstm, x, h, c: lstm(x, (h, c)), (T, I), (1, H), (1, H)),
    "unbatched batch_first bidirectional": Form(lambda lstm, x: lstm(x), (T, I), batch_first=True, bidirectional=True),
    "3 layers": Form(lambda lstm, x: lstm(x), num_layers=3),
    "bidirectional": Form(lambda lstm, x: lstm(x), bidirectional=True),
    "2 layers bidirectional with states": Form(
        lambda lstm, x, h, c: lstm(x, (h, c)), (T, B, I), (4, B, H), (4, B, H), num_layers=2, bidirectional=True
    ),
    "no bias": Form(lambda lstm, x: lstm(x), bias=False),
    "dropout": Form(lambda lstm, x: lstm(x), num_layers=2, dropout=0.5),
    "output only": Form(lambda lstm, x: lstm(x)[0]),
    "h_n only": Form(lambda lstm, x: lstm(x)[1][0]),
    "c_n only": Form(lambda lstm, x: lstm(x)[1][1]),
    "last step": Form(lambda lstm, x: lstm(x)[0][-1]),
    "states carried over": Form(lambda lstm, x: lstm(x, lstm(x)[1])),
    "called twice": Form(lambda lstm, x: (lstm(x), lstm(x * 0.5))),
    "one step": Form(lambda lstm, x: lstm(x), (1, B, I)),
    "one row": Form(lambda lstm, x: lstm(x), (T, 1, I)),
    "not contiguous": Form(lambda lstm, x: lstm(x.transpose(0, 1)), (B, T, I)),
    "features not contiguous": Form(lambda lstm, x: lstm(x.permute(1, 2, 0)), (I, T, B)),
}


class Model(nn.Module):
    """An LSTM that is called in some form; FX wants the inputs named."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.call = nn.LSTM(I, H, **form.options), form.call


class OneInput(Model):
    def forward(self, x: Tensor) -> Any:
        return self.call(self.lstm, x)


class ThreeInputs(Model):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.call(self.lstm, x, h, c)


def by_quantize(model: nn.Module, batches: list[Any], backend: str, preset: str = "int8") -> nn.Module:
    return tlq.quantize(model, batches, getattr(tlq.LSTMQConfig, preset)(), backend)


def by_fx(model: nn.Module, batches: list[tuple[Any, ...]], backend: str, **options: Any) -> nn.Module:
    mapping = tlq.qconfig_mapping(tlq.LSTMQConfig.int8(), **options)
    prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, batches[0], tlq.prepare_custom_config(**options))
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    return convert_fx(prepared, tlq.convert_custom_config(backend))


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in flat(item)]


def assert_same(got: Any, want: Any) -> None:
    got, want = flat(got), flat(want)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def assert_within_a_step(got: Any, want: Any, step: float) -> None:
    """At most one grid step apart, in at most 1 value of 1,000; a float32 cell state follows the hidden values."""
    for one, other in zip(flat(got), flat(want), strict=True):
        assert one.shape == other.shape
        difference = (one - other).abs()
        assert difference.max() <= step * 1.001
        assert (difference > 1e-5).sum() <= max(1, one.numel() // 1000)


def step_of(fused: nn.Module) -> float:
    """The coarsest step of an output's or cell state's grid."""
    cells = [cell.qparams for layer in fused.lstm.cells() for cell in layer]
    return max(grid.scale for cell in cells for grid in (cell.ogate_cy, cell.fgate_cx_igate_cgate) if grid)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


@pytest.mark.parametrize("preset", ["int8", "int8_gates16", "fixed16", "all_int8"])
@torch.no_grad()
def test_fused_is_the_reference(form: Form, preset: str) -> None:
    model = (OneInput if len(form.shapes) == 1 else ThreeInputs)(form).eval()
    batches = [form.inputs(seed) for seed in range(2)]
    fused, ref = (by_quantize(model, batches, backend, preset) for backend in ("fused", "reference"))
    assert_within_a_step(fused(*batches[1]), ref(*batches[1]), step_of(fused))
    for got, want in zip(flat(fused(*batches[1])), flat(model(*batches[1])), strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() < (0.2 if preset == "all_int8" else 0.05)


@torch.no_grad()
def test_fx_gives_what_quantize_gives(form: Form) -> None:
    model = (OneInput if len(form.shapes) == 1 else ThreeInputs)(form).eval()
    batches = [form.inputs(seed) for seed in range(2)]
    for backend in ("fused", "reference"):
        assert_same(by_fx(model, batches, backend)(*batches[1]), by_quantize(model, batches, backend)(*batches[1]))


class Subclass(nn.LSTM):
    pass


class TwoLSTMs(nn.Module):
    def __init__(self, lstm_class: type[nn.LSTM] = nn.LSTM) -> None:
        super().__init__()
        self.first = lstm_class(I, H)
        self.second = lstm_class(H, 4)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)[0])


class StatesInOneVariable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(I, H)

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> Any:
        return self.lstm(x, states)


@pytest.mark.parametrize(("lstm_class", "options"), [(nn.LSTM, {}), (Subclass, {"lstm_classes": (Subclass,)})])
def test_modules_in_series_and_subclasses(lstm_class: type[nn.LSTM], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = TwoLSTMs(lstm_class).eval(), torch.randn(T, B, I)
    fused = by_quantize(model, [(x,)], "fused")
    assert isinstance(fused.first, tlq.LSTM)
    assert isinstance(fused.second, tlq.LSTM)
    assert_same(fused(x), by_fx(model, [(x,)], "fused", **options)(x))
    assert_same(by_quantize(model, [(x,)], "reference")(x), by_fx(model, [(x,)], "reference", **options)(x))


def test_states_in_one_variable() -> None:
    torch.manual_seed(0)
    model = StatesInOneVariable().eval()
    inputs = (torch.randn(T, B, I), (torch.randn(STATE), torch.randn(STATE)))
    fused = by_quantize(model, [inputs], "fused")
    assert_same(fused(*inputs), by_fx(model, [inputs], "fused")(*inputs))
    assert_within_a_step(fused(*inputs), by_fx(model, [inputs], "reference")(*inputs), step_of(fused))


def test_inside_a_sequential() -> None:
    class First(nn.Module):
        def forward(self, outputs: Any) -> Tensor:
            return outputs[0]

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(I, I), nn.LSTM(I, H), First(), nn.Linear(H, 2)).eval(), torch.randn(T, B, I)
    fused = by_quantize(model, [x], "fused")
    assert isinstance(fused, nn.Sequential)
    assert isinstance(fused[1], tlq.LSTM)
    assert_same(fused(x), by_fx(model, [(x,)], "fused")(x))


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_the_root_itself(backend: str) -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(I, H), torch.randn(T, B, I)
    quantized, fused = tlq.quantize(lstm, [x], backend=backend), tlq.quantize(lstm, [x])
    output, h_n, c_n = reference.lstm(fused.cells(), x)
    assert_within_a_step(quantized(x), (output, (h_n, c_n)), fused.cells()[0][0].qparams.ogate_cy.scale)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_an_empty_batch(backend: str) -> None:
    quantized = tlq.quantize(nn.LSTM(I, H, 2), [torch.randn(T, B, I)], backend=backend)
    output, (h_n, c_n) = quantized(torch.randn(T, 0, I))
    assert (output.shape, h_n.shape, c_n.shape) == ((T, 0, H), (2, 0, H), (2, 0, H))


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(I, H, 2, dropout=0.5), torch.randn(T, B, I)
    prepared = tlq.prepare(lstm, tlq.LSTMQConfig.int8(qat=True))
    assert not torch.equal(prepared.train()(x)[0], prepared(x)[0])
    prepared.eval()(x)
    assert torch.equal(prepared(x)[0], prepared(x)[0])


def test_calibrating_with_dropout_is_warned_of_once() -> None:
    prepared, x = tlq.prepare(nn.LSTM(I, H, 2, dropout=0.5)), torch.randn(T, B, I)
    message = r"LSTM\(5, 8\): calibrating in training mode, with dropout of 0\.5 .*: call eval\(\) on the prepared model first"
    with pytest.warns(UserWarning, match=message) as caught:
        [prepared(x) for _ in range(2)]
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.filterwarnings("error", "ignore:torch.ao.quantization is deprecated")
def test_what_trains_or_drops_nothing_is_not_warned_of() -> None:
    x, dropping = torch.randn(T, B, I), nn.LSTM(I, H, 2, dropout=0.5)
    tlq.prepare(dropping).eval()(x)
    tlq.prepare_qat(dropping)(x)
    tlq.prepare(dropping, tlq.LSTMQConfig())(x)  # all float32
    tlq.prepare(nn.LSTM(I, H, 2))(x)


def test_a_module_that_is_used_in_two_places_stays_one() -> None:
    lstm = nn.LSTM(I, I)
    model = nn.ModuleDict({"a": lstm, "b": lstm})
    with pytest.raises(ValueError, match="never ran"):
        tlq.convert(tlq.prepare(model))
    prepared = tlq.prepare(model)
    assert prepared["a"] is prepared["b"]


@torchs_warnings
def test_a_model_that_is_quantized_as_a_whole() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.lstm, self.outer = nn.Linear(I, I), nn.LSTM(I, H), nn.Linear(H, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.lstm(self.inner(x))[0])

    torch.manual_seed(0)
    model, x = Whole().eval(), torch.randn(T, B, I)
    base = QConfigMapping().set_global(get_default_qconfig("x86"))
    mapping = tlq.qconfig_mapping(tlq.LSTMQConfig.int8(), base)
    prepared = prepare_fx(copy.deepcopy(model), mapping, (x,), tlq.prepare_custom_config())
    prepared(x)
    converted = convert_fx(prepared, tlq.convert_custom_config())
    assert isinstance(converted.lstm, tlq.LSTM)
    assert isinstance(converted.inner, torch.ao.nn.quantized.Linear)
    assert isinstance(converted.outer, torch.ao.nn.quantized.Linear)
    assert (converted(x) - model(x)).abs().max() < 0.05

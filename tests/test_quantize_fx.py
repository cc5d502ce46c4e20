"""quantize(), prepare() and convert(): what they take, what they leave alone, what they refuse."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import FixedQParamsObserver, MinMaxObserver

import torch_lstm_quant as tlq
from torch_lstm_quant import reference
from torch_lstm_quant.observed import ObservedLSTM, ReferenceLSTM

X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Two LSTMs, and control flow that FX cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.linear = nn.LSTM(5, 8), nn.LSTM(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.linear(self.second(self.first(x)[0])[0]) * (1 if scale is None else scale)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def test_the_given_model_is_left_as_it_was(model: Model) -> None:
    before, training = copy.deepcopy(model.state_dict()), model.training
    quantized = tlq.quantize(model, [X])
    assert model.training == training
    assert not quantized.training
    assert type(model.first) is nn.LSTM
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    quantized.linear.weight.data.zero_()
    assert model.linear.weight.abs().sum() > 0


def test_everything_but_the_lstms_stays(model: Model) -> None:
    quantized = tlq.quantize(model, [X])
    assert type(quantized) is Model
    assert type(quantized.linear) is nn.Linear
    assert isinstance(quantized.first, tlq.LSTM)
    assert (quantized(X) - model.eval()(X)).abs().max() < 0.05


@pytest.mark.parametrize("batch", [X, (X, torch.ones(1)), [X, torch.ones(1)], {"x": X, "scale": torch.ones(1)}])
def test_forms_of_batches(model: Model, batch: Any) -> None:
    assert torch.equal(tlq.quantize(model, [batch])(X), tlq.quantize(model, [X])(X))


def test_batches_may_come_from_a_generator(model: Model) -> None:
    assert torch.equal(tlq.quantize(model, (X for _ in range(2)))(X), tlq.quantize(model, [X])(X))


def test_configurations_by_path_class_and_default(model: Model) -> None:
    wide, narrow = tlq.LSTMQConfig.int8_gates16(), tlq.LSTMQConfig.all_int8()
    quantized = tlq.quantize(model, [X], {"first": wide, "": narrow})
    assert quantized.first.cells()[0][0].qparams.fgate_cx.bits == 16
    assert quantized.second.cells()[0][0].qparams.fgate_cx.bits == 8
    quantized = tlq.quantize(model, [X], {nn.LSTM: narrow, "first": None})
    assert type(quantized.first) is nn.LSTM
    assert quantized.second.cells()[0][0].qparams.fgate_cx.bits == 8
    assert type(tlq.quantize(model, [X], {"second": narrow}).first) is nn.LSTM


@pytest.mark.parametrize("preset", ["int8", "int8_gates16", "all_int8"])
@torch.no_grad()
def test_one_gate_can_have_a_grid_of_its_own(model: Model, preset: str) -> None:
    forget = FixedQParamsObserver.with_args(scale=2**-10, zero_point=0, dtype=torch.int16, quant_min=-16000, quant_max=16000)
    plain = getattr(tlq.LSTMQConfig, preset)()
    config = plain.override(layer=0, gate="forget", gates=forget)
    fused, reference_backend = (tlq.quantize(model.eval(), [X], config, backend) for backend in ("fused", "reference"))
    common = tlq.quantize(model, [X], plain).first.cells()[0][0].qparams.gates[0]
    assert fused.first.cells()[0][0].qparams.gates[1].scale == 2**-10
    if preset != "all_int8":  # whose other gates are calibrated one by one now
        assert [fused.first.cells()[0][0].qparams.gates[gate] for gate in (0, 2, 3)] == [common] * 3
    output, h_n, c_n = reference.lstm(fused.first.cells(), X)
    got, (got_h, got_c) = fused.first(X)
    assert torch.equal(got, output)
    assert torch.equal(got_h, h_n)
    assert torch.equal(got_c, c_n)
    step = fused.first.cells()[0][0].qparams.ogate_cy.scale
    assert (reference_backend.first(X)[0] - got).abs().max() <= 1.001 * step


@pytest.mark.parametrize("preset", ["int8", "int8_gates16", "fixed16", "all_int8"])
def test_qat_trains_and_converts(model: Model, preset: str) -> None:
    prepared = tlq.prepare(model.train(), getattr(tlq.LSTMQConfig, preset)(qat=True))
    before = copy.deepcopy(dict(prepared.named_parameters()))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(X).pow(2).mean().backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in prepared.named_parameters())
    prepared.eval()
    with torch.no_grad():
        want = prepared(X)
        assert (tlq.convert(prepared)(X) - want).abs().max() < 0.02
        assert (tlq.convert(prepared, "reference")(X) - want).abs().max() < 0.02


def test_training_goes_on_after_a_conversion_as_without_it(model: Model) -> None:
    prepared = tlq.prepare(model.train(), tlq.LSTMQConfig.int8_gates16(qat=True))
    prepared(X)
    other = copy.deepcopy(prepared)
    tlq.convert(prepared)
    for one in (prepared, other):
        one(200 * X)
        one(X)
    state, expected = prepared.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_backends(model: Model) -> None:
    assert isinstance(tlq.quantize(model, [X], backend="reference").first, ReferenceLSTM)
    assert isinstance(tlq.prepare(model).first, ObservedLSTM)
    assert torch.equal(tlq.lower(tlq.quantize(model, [X], backend="reference"))(X), tlq.quantize(model, [X])(X))


def test_no_warning_on_which_no_user_can_act(model: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for preset in ("int8", "int8_gates16", "fixed16"):
            for backend in ("fused", "reference"):
                tlq.quantize(model, [X], getattr(tlq.LSTMQConfig, preset)(), backend)(X)


def test_progress_needs_tqdm(model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tlq.quantize(model, [X], progress=True)
    assert "calibrating" in capsys.readouterr().err
    tlq.quantize(model, [X])
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    tlq.quantize(model, [X])
    with pytest.raises(ImportError, match="pip install tqdm"):
        tlq.quantize(model, [X], progress=True)


def nan_batch() -> Tensor:
    x = X.clone()
    x[0, 0, 0] = float("nan")
    return x


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        (iter(()), "at least one batch"),
        ([nan_batch()], "LSTM 'first': input must be finite"),
        ([X, X / 0.0], "LSTM 'first': input must be finite"),
    ],
)
def test_calibrations_that_tell_nothing(model: Model, batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tlq.quantize(model, batches)


def test_an_lstm_that_no_batch_reached() -> None:
    class Unused(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)[0]

    with pytest.raises(ValueError, match="LSTM 'second' never ran"):
        tlq.quantize(Unused(), [X])
    quantized = tlq.quantize(Unused(), [X], {"first": tlq.LSTMQConfig.int8()})
    assert type(quantized.second) is nn.LSTM


class Guarded(Model):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise TypeError("of the model's own")
        return super().forward(x)


def test_batches_with_labels_are_refused() -> None:
    labels, advice = torch.zeros(3), r"of a loader's \(input, label\) pairs pass the inputs alone"
    for batch in ((X, labels), [X, labels], ()):
        message = rf"a batch that is a tuple or list holds the model's arguments, \(x\), got {len(batch)}: {advice}"
        with pytest.raises(TypeError, match=message) as refused:
            tlq.quantize(Guarded(), [batch])
        assert isinstance(refused.value.__cause__, TypeError)
    with pytest.raises(TypeError, match=r"^of the model's own$"):
        tlq.quantize(Guarded(), [(X[0],)])
    tlq.quantize(Guarded(), (x for x, label in [(X, labels)]))


def test_models_without_lstms() -> None:
    with pytest.raises(ValueError, match="must contain a module of class LSTM or LSTMCell: found no LSTM, only Linear"):
        tlq.quantize(nn.Linear(5, 2), [X])
    wanted = r"a module of class ObservedLSTM or ObservedLSTMCell, or an observed .*LSTM: it is an LSTM, which is float"
    with pytest.raises(ValueError, match=wanted):
        tlq.convert(nn.LSTM(5, 8))
    with pytest.raises(ValueError, match=r"a module of class LSTM.*: it is a ReferenceLSTM, which is converted: use .*lower"):
        tlq.prepare(tlq.quantize(nn.LSTM(5, 8), [X], backend="reference"))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        tlq.quantize(lambda x: x, [X])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cuda", "", None, "FUSED"])
def test_unknown_backends(model: Model, backend: Any) -> None:
    for attempt in (
        lambda: tlq.quantize(model, [X], backend=backend),
        lambda: tlq.convert(model, backend),
        lambda: tlq.convert_custom_config(backend),
    ):
        with pytest.raises(ValueError, match="backend must be one of 'fused', 'reference'"):
            attempt()


def test_configurations_that_name_nothing(model: Model) -> None:
    config = tlq.LSTMQConfig.int8()
    shared = nn.ModuleDict({"first": nn.LSTM(5, 8)})
    shared["second"] = shared["first"]
    for qconfig in ({"first": config, "second": None}, {"second": config, "first": tlq.LSTMQConfig.all_int8()}):
        with pytest.raises(ValueError, match="one configuration for an LSTM, got two for that of 'first' and 'second'"):
            tlq.prepare(shared, qconfig)
    with pytest.raises(ValueError, match="qconfig names 'third', which is no LSTM of the model: it has 'first', 'second'"):
        tlq.quantize(model, [X], {"third": config})
    with pytest.raises(TypeError, match=r"qconfig\['first'\] must be an LSTMQConfig or None"):
        tlq.quantize(model, [X], {"first": "int8"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="qconfig must be an LSTMQConfig or a mapping"):
        tlq.quantize(model, [X], "int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lstm", "message"),
    [
        (nn.LSTM(5, 8).double(), "weight_ih_l0 must be torch.float32"),
        (nn.LSTM(5, 8).half(), "weight_ih_l0 must be torch.float32"),
    ],
)
def test_lstms_that_cannot_be_quantized(lstm: nn.LSTM, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tlq.quantize(nn.Sequential(lstm), [X.to(lstm.weight_ih_l0.dtype)])


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_weights_with_nan(name: str) -> None:
    lstm = nn.LSTM(5, 8)
    getattr(lstm, name).data.view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match=f"LSTM '0': {name} must be finite"):
        tlq.quantize(nn.Sequential(lstm), [X])


def fixed(scale: float, zero_point: int = 0, **limits: int) -> Any:
    limits = {"quant_min": -128, "quant_max": 127} | limits
    return FixedQParamsObserver.with_args(scale=scale, zero_point=zero_point, dtype=torch.int16, **limits)


@pytest.mark.parametrize(
    ("constructor", "message"),
    [
        (fixed(0.0), "its scale must be positive, finite.*got 0.0"),
        (fixed(-1.0), "its scale must be positive.*got -1.0"),
        (fixed(float("nan")), "its scale must be positive.*got nan"),
        (fixed(float("inf")), "its scale must be positive.*got inf"),
        (fixed(1e-40), "its scale must be positive.*normal float32"),
        (fixed(1.0, zero_point=200), r"its zero_point must lie in .*\[-128, 127\], got 200"),
        (fixed(1.0, quant_min=5, quant_max=5), "quant_min must be less than quant_max.*got 5 and 5"),
        (MinMaxObserver.with_args(dtype=torch.int32, quant_min=-(1 << 20), quant_max=1 << 20), "a grid has at most 16 bits"),
    ],
)
def test_impossible_grids_are_named(constructor: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^part fgate_cx: {message}"):
        tlq.LSTMQConfig.int8().replace(fgate_cx=constructor)
    with pytest.raises(ValueError, match=f"^layer 1, backward, part fgate_cx: {message}"):
        tlq.LSTMQConfig.int8().override(1, "backward", fgate_cx=constructor)

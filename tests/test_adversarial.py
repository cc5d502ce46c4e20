"""Calls, configurations and models that are wrong in ways a user would not expect: refused in words, and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from random_cells import Dice, random_layers
from torch import Tensor, nn
from torch.ao.quantization import FixedQParamsObserver, MinMaxObserver, PlaceholderObserver, RecordingObserver
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import torch_lstm_quant as tlq
from torch_lstm_quant import ops, reference
from torch_lstm_quant.call_forms import Shape
from torch_lstm_quant.cell import Cell

T, B, I, H = 5, 3, 7, 6  # noqa: E741
X = torch.linspace(-2, 2, T * B * I).reshape(T, B, I)
INT8 = tlq.LSTMQConfig.int8()


@pytest.fixture
def fused() -> tlq.LSTM:
    return tlq.LSTM(random_layers(Dice(1), I, H, 1, 1, "int8"))


def assert_exact(module: tlq.LSTM, x: Tensor, states: tuple[Tensor, Tensor] | None = None) -> None:
    """Equal to the integer reference, NaN included."""
    output, (h_n, c_n) = module(x, states)
    want = reference.lstm(module.cells(), x, *(states or (None, None)))
    torch.testing.assert_close((output, h_n, c_n), want, rtol=0, atol=0, equal_nan=True)


# Calls


@pytest.mark.parametrize("value", [3e38, 1e-45, -0.0, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("preset", ["int8", "int8_gates16", None])
def test_values_at_the_ends_of_float32(value: float, preset: str | None) -> None:
    module = tlq.LSTM(random_layers(Dice(1), I, H, 2, 2, preset))
    x, states = torch.randn(T, B, I), torch.randn(4, B, H)
    x[0], states[:, 0] = value, value
    assert_exact(module, x, (states, states))


@pytest.mark.parametrize("name", ["input", "h_0", "c_0", "module"])
def test_tensors_on_different_devices(fused: tlq.LSTM, name: str) -> None:
    tensors = {"input": X, "h_0": torch.zeros(1, B, H), "c_0": torch.zeros(1, B, H)}
    if name == "module":
        fused = fused.to("meta")
    else:
        tensors[name] = tensors[name].to("meta")
    with pytest.raises(TypeError, match=r"must be on the (cpu|meta) device"):
        fused(tensors["input"], (tensors["h_0"], tensors["c_0"]))


def test_the_operator_refuses_tensors_on_different_devices(fused: tlq.LSTM) -> None:
    shape = Shape.of(fused)
    with pytest.raises(RuntimeError, match="on one device"):
        ops.lstm(X, torch.zeros(1, B, H, device="meta"), None, fused._packed, shape)
    # torch hands such calls to the operator's fake, whose results hold no values
    call = (fused._packed, H, 1, 1, None, None)
    with pytest.raises(RuntimeError, match="on one device"):
        torch.ops.torch_lstm_quant.lstm(X, None, None, *call, None, torch.ones(B, dtype=torch.int64, device="meta"))
    states = torch.zeros(1, B, H)
    with pytest.raises(RuntimeError, match="on one device"):
        torch.ops.torch_lstm_quant.lstm(X[0], states, states, *call, torch.tensor([B], device="meta"), None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(fused: tlq.LSTM) -> None:
    with pytest.raises(TypeError, match="input must be a dense tensor"):
        fused(torch.nested.nested_tensor([X[:, 0], X[:2, 0]]))


@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_kept_whatever_the_caller_does_with_them(threads: int) -> None:
    cell = Cell(tlq.CellQParams(), torch.zeros(1024, 1), torch.zeros(1024, 256), torch.zeros(1024), torch.zeros(1024))
    module = tlq.LSTM([[cell]])
    x, states = torch.zeros(1, 64, 1), (torch.zeros(1, 64, 256), torch.full((1, 64, 256), 1e-38))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        c_n = module(x, states)[1][1]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(c_n, reference.lstm([[cell]], x, *states)[2])


def test_a_backward_pass_is_refused_for_integers_too(fused: tlq.LSTM) -> None:
    cell = fused.cells()[0][0].qparams
    assert cell.x
    assert cell.hx
    h0 = cell.hx.quantize(torch.zeros(1, B, H))
    _, (_, c_n) = fused.forward_integers(cell.x.quantize(X), (h0, torch.zeros(1, B, H, requires_grad=True)))
    with pytest.raises(RuntimeError, match="got a backward pass"):
        c_n.sum().backward()


# Modules


def test_moves_that_would_change_integers(fused: tlq.LSTM) -> None:
    with pytest.raises(TypeError, match="runs in integers and float32"):
        fused.type(torch.float32)
    assert_exact(fused, X)


def test_moves_while_another_dtype_is_the_default(fused: tlq.LSTM) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        fused.to("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_exact(fused, X)


def test_repr_without_data(fused: tlq.LSTM) -> None:
    assert "LSTM(7, 6" in repr(fused.to("meta"))


BAD_STATES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "of the float LSTM": lambda state: dict(nn.LSTM(I, H).state_dict()),
    "with float weights": lambda state: state | {"weight_ih_l0": nn.LSTM(I, H).weight_ih_l0.detach()},
    "with a NaN bias": lambda state: state | {"bias_ih_l0": torch.full((4 * H,), float("nan"))},
    "with NaN grids": lambda state: state | {"grids_l0": torch.full_like(state["grids_l0"], float("nan"))},
    "with a scale of zero": lambda state: state | {"weight_hh_scale_l0": torch.zeros(4 * H)},
    "of another size": lambda state: state | {"bias_ih_l0": torch.ones(4 * H), "bias_hh_l0": torch.zeros(4 * H + 4)},
}


@pytest.mark.parametrize("name", BAD_STATES)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_that_is_refused_changes_nothing(fused: tlq.LSTM, name: str, assign: bool) -> None:
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    output = fused(X)[0]
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for LSTM"):
        fused.load_state_dict(BAD_STATES[name](dict(before)), assign=assign)
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())
    assert torch.equal(fused(X)[0], output)
    assert_exact(fused, X)


def test_float_weights_are_not_truncated_in_silence(fused: tlq.LSTM) -> None:
    with pytest.raises(RuntimeError, match=r"weight_ih_l0 must be torch\.int8, got torch\.float32"):
        fused.load_state_dict(nn.LSTM(I, H).state_dict(), strict=False)


def test_qparams_missing_from_a_state_dict(fused: tlq.LSTM) -> None:
    state = {name: value for name, value in fused.state_dict().items() if "scale" not in name}
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_ih_scale_l0", "weight_hh_scale_l0"'):
        fused.load_state_dict(state)
    assert_exact(fused, X)


def test_buffers_that_were_one_tensor_are_loaded_apart() -> None:
    cell = random_layers(Dice(0), I, I, 1, 1, "int8")[0][0]
    shared = tlq.LSTM([[Cell(cell.qparams, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_ih)]])
    shared.load_state_dict({"bias_ih_l0": torch.zeros(4 * I), "bias_hh_l0": torch.ones(4 * I)}, strict=False)
    assert not shared.cells()[0][0].bias_ih.any()


def test_a_part_of_a_state_dict_can_be_loaded(fused: tlq.LSTM) -> None:
    fused.load_state_dict({"bias_ih_l0": torch.ones(4 * H)}, strict=False)
    assert torch.equal(fused.cells()[0][0].bias_ih, torch.ones(4 * H))
    assert_exact(fused, X)


def test_a_calibration_can_be_saved_and_loaded() -> None:
    lstm = nn.LSTM(I, H)
    prepared, other = tlq.prepare(lstm), tlq.prepare(lstm)
    prepared(X)
    other.load_state_dict(prepared.state_dict())
    assert torch.equal(tlq.convert(other)(X)[0], tlq.convert(prepared)(X)[0])


# Models


class Doubling(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return 2 * output, states


def monkey_patched() -> nn.LSTM:
    lstm = nn.LSTM(I, H)
    lstm.forward = partial(lstm.forward, hx=None)  # type: ignore[method-assign]
    return lstm


def with_hook(hook: str) -> nn.LSTM:
    lstm = nn.LSTM(I, H)
    getattr(lstm, hook)(lambda *_: None)
    return lstm


def pruned() -> nn.LSTM:
    lstm = nn.LSTM(I, H)
    prune.l1_unstructured(lstm, "weight_hh_l0", 0.5)
    return lstm


UNFAITHFUL: dict[str, tuple[Callable[[], nn.LSTM], str]] = {
    "overridden forward": (lambda: Doubling(I, H), "LSTM '0': Doubling overrides forward"),
    "patched forward": (monkey_patched, "LSTM '0': LSTM overrides forward"),
    "forward hook": (partial(with_hook, "register_forward_hook"), "LSTM '0': has forward hooks"),
    "forward pre-hook": (partial(with_hook, "register_forward_pre_hook"), "LSTM '0': has forward hooks"),
    "pruning": (pruned, r"has forward hooks.*prune\.remove"),
}


@pytest.mark.parametrize("name", UNFAITHFUL)
def test_what_an_lstm_does_beside_its_cells_is_not_dropped_in_silence(name: str) -> None:
    make, message = UNFAITHFUL[name]
    with pytest.raises(ValueError, match=message):
        tlq.quantize(nn.Sequential(make()), [X])


def test_parametrized_weights_are_taken_as_they_are_computed() -> None:
    lstm = weight_norm(nn.LSTM(I, H), "weight_hh_l0")
    with torch.no_grad():
        lstm.parametrizations.weight_hh_l0.original0.mul_(3)  # type: ignore[operator,union-attr]
    plain = nn.LSTM(I, H)
    plain.load_state_dict({name: getattr(lstm, name) for name in plain.state_dict()})
    assert torch.equal(tlq.quantize(lstm, [X])(X)[0], tlq.quantize(plain, [X])(X)[0])


def test_one_lstm_at_two_places_stays_one() -> None:
    lstm = nn.LSTM(I, H)
    quantized = tlq.quantize(_Twice(lstm), [X])
    assert quantized.a is quantized.b


class _Twice(nn.Module):
    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.a = self.b = lstm

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)[0] + self.b(x)[0]  # type: ignore[no-any-return]


EDITED_WEIGHTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "gone": (lambda linear: linear.register_parameter("weight", None), "found None as its weight"),
    "float64": (lambda linear: linear.double(), r"found torch\.float64 as its weight"),
    "zero point": (lambda linear: linear.weight_zero_point.fill_(300), "found a weight_zero_point of 300"),
}


@pytest.mark.parametrize("name", EDITED_WEIGHTS)
def test_weights_of_a_converted_lstm_edited_by_hand(name: str) -> None:
    edit, message = EDITED_WEIGHTS[name]
    converted: Any = tlq.quantize(nn.LSTM(I, H), [X], backend="reference")
    edit(converted.layers[0].layer_fw.cell.igates)
    with pytest.raises(ValueError, match=f"layer 0.* forward.*, node 'igates': {message}"):
        tlq.lower(converted)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_fx_is_told_not_to_trace_into_a_fused_lstm(fused: tlq.LSTM) -> None:
    with pytest.raises(TypeError, match=r"classes\(\[torch_lstm_quant\.LSTM, torch_lstm_quant\.LSTMCell\]\)"):
        prepare_fx(nn.Sequential(fused), {"": None}, (X,))  # type: ignore[arg-type]


# Configurations and calibrations


def fails() -> Any:
    raise RuntimeError("no observer today")


FAR = FixedQParamsObserver.with_args(
    scale=0.1, zero_point=1 << 30, dtype=torch.int32, quant_min=1 << 30, quant_max=(1 << 30) + 9
)
BAD_CONSTRUCTORS: dict[str, tuple[Any, type[Exception], str]] = {
    "placeholder": (PlaceholderObserver.with_args(dtype=torch.qint8), ValueError, "PlaceholderObserver finds no static grid"),
    "recording": (RecordingObserver, ValueError, "RecordingObserver finds no static grid"),
    "unknown dtype": (MinMaxObserver.with_args(dtype=torch.float16), TypeError, "constructor failed: .*Default Observer only"),
    "raises": (fails, TypeError, "constructor failed: no observer today"),
    "wants arguments": (nn.Linear, TypeError, "constructor failed: .*in_features"),
    "far from zero": (FAR, ValueError, r"within \+-2\*\*23"),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTORS)
def test_constructors_that_are_refused_by_part(name: str) -> None:
    constructor, error, message = BAD_CONSTRUCTORS[name]
    with pytest.raises(error, match=f"^part gates: .*{message}"):
        INT8.replace(gates=constructor)


@pytest.mark.parametrize("layer", ["0", 0.5, True])
def test_overrides_of_what_is_no_layer(layer: Any) -> None:
    with pytest.raises(TypeError, match="layer must be an int"):
        INT8.override(layer=layer, x=None)


@pytest.mark.parametrize("place", [{"layer": 2}, {"direction": "backward"}, {"layer": 2, "direction": "forward"}])
def test_overrides_that_no_cell_would_see(place: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'0': its configuration overrides layer .*, but it has 2 layers and 1 direction"):
        tlq.prepare(nn.Sequential(nn.LSTM(I, H, num_layers=2)), INT8.override(**place, x=None))


@pytest.mark.parametrize("classes", [(nn.Linear,), (nn.LSTM(2, 3),), nn.LSTM])
def test_lstm_classes_must_be_such(classes: Any) -> None:
    for function in (partial(tlq.qconfig_mapping, INT8), tlq.prepare_custom_config):
        with pytest.raises(TypeError, match=r"lstm_classes must be subclasses of nn\.LSTM"):
            function(lstm_classes=classes)


@pytest.mark.parametrize("batches", [X, {"x": X}, "abc", None, 3])
def test_calibrations_that_are_no_batches(batches: Any) -> None:
    with pytest.raises(TypeError, match=r"calibration_batches must be an iterable of batches, .*\[batch\]"):
        tlq.quantize(nn.LSTM(I, H), batches)


def test_calibration_without_data() -> None:
    with pytest.raises(TypeError, match="input must be on the cpu device, got"):
        tlq.quantize(nn.LSTM(I, H), [X.to("meta")])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: tlq.quantize(nn.LSTM(I, H), [X], {}), "qconfig must quantize at least one LSTM.*''"),
        (lambda: tlq.quantize(nn.Sequential(nn.LSTM(I, H)), [X], {"0": None}), "qconfig must quantize at least one LSTM.*'0'"),
        (lambda: tlq.quantize(tlq.quantize(nn.LSTM(I, H), [X]), [X]), "an LSTM, which is fused already"),
        (lambda: tlq.prepare(tlq.prepare(nn.LSTM(I, H))), "an ObservedLSTM, which is observed"),
        (lambda: tlq.convert(nn.LSTM(I, H)), "an LSTM, which is float"),
        (lambda: tlq.quantize(nn.GRU(I, H), [X]), "found no LSTM, only GRU"),
    ],
)
def test_models_with_nothing_to_do(function: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function()


def test_a_refused_call_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.LSTM(I, H)).train()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="must be finite during calibration"):
        tlq.quantize(model, [X, X * float("nan")])
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))

"""The ways from nn.LSTMCell to the fused one: quantize(), prepare and convert, QAT, prepare_fx and convert_fx, lower."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from converted_lstms import torchs_warnings
from random_cells import PRESETS
from torch import Tensor, nn
from torch.ao.quantization import (
    FixedQParamsObserver,
    QConfigMapping,
    default_dynamic_qconfig,
    get_default_qat_qconfig,
    get_default_qconfig,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx
from torch.nn.utils import prune

import torch_lstm_quant as tlq
from torch_lstm_quant import reference
from torch_lstm_quant.observed import ObservedLSTMCell, ReferenceLSTMCell

pytestmark = torchs_warnings
T, B, I, H = 6, 3, 5, 8  # noqa: E741
STEPS = 4
INT8 = tlq.LSTMQConfig.int8()


class Decoder(nn.Module):
    """A decoder's loop: two cells, each step's output the next one's input, the first states another module's."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.encoder = nn.LSTM(I, H)
        self.cells = nn.ModuleList([nn.LSTMCell(I, H, bias=bias), nn.LSTMCell(H, H, bias=bias)])
        self.head = nn.Linear(H, I)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, (h, c) = self.encoder(x)
        first, second, y, outputs = (h[0], c[0]), None, output[-1, :, :I], []
        for _ in range(STEPS):
            first = self.cells[0](y, first)
            second = self.cells[1](first[0], second)
            y = self.head(second[0])
            outputs.append(y)
        return torch.stack(outputs), first[1]


class Holder(nn.Module):
    """One cell over a sequence whose length is known only when it runs, which FX could not trace."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.decoder = nn.ModuleDict({"cell": cell})

    def forward(self, x: Tensor) -> Tensor:
        hx, outputs = None, []
        for step in x:
            hx = self.decoder["cell"](step, hx)
            outputs.append(hx[0])
        return torch.stack(outputs)


@pytest.fixture
def model() -> Decoder:
    return Decoder().eval()


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(T, B, I) for _ in range(2)]


def by_fx(model: nn.Module, batches: list[Tensor], backend: Any, base: QConfigMapping | None = None) -> nn.Module:
    prepared = prepare_fx(copy.deepcopy(model), tlq.qconfig_mapping(INT8, base), (batches[0],), tlq.prepare_custom_config())
    for batch in batches:
        prepared(batch)
    return convert_fx(prepared, tlq.convert_custom_config(backend))


def assert_equal(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def qparams(module: nn.Module) -> tlq.CellQParams:
    assert isinstance(module, tlq.LSTMCell)
    return module.cells()[0][0].qparams


def test_every_stage_is_its_own_class(model: Decoder, batches: list[Tensor]) -> None:
    prepared = tlq.prepare(model)
    prepared(batches[0])
    assert [type(cell) for cell in prepared.cells] == [ObservedLSTMCell] * 2
    assert [type(cell) for cell in tlq.convert(prepared, "reference").cells] == [ReferenceLSTMCell] * 2
    assert [type(cell) for cell in tlq.convert(prepared).cells] == [tlq.LSTMCell] * 2
    assert [type(cell) for cell in model.cells] == [nn.LSTMCell] * 2
    assert "ObservedLSTMCell(\n    (cell)" not in repr(prepared)
    assert "5, 8, bias=False" in repr(tlq.prepare(nn.LSTMCell(I, H, bias=False)))


@pytest.mark.filterwarnings("ignore::torch_lstm_quant.LossWarning")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_fused_model_is_the_reference_within_a_step(preset: str, bias: bool, batches: list[Tensor]) -> None:
    model, config = Decoder(bias).eval(), getattr(tlq.LSTMQConfig, preset)()
    fused, graph = (tlq.quantize(model, batches, config, backend) for backend in ("fused", "reference"))
    step = max(qparams(cell).ogate_cy.scale for cell in fused.cells)  # type: ignore[union-attr]
    for got, want, original in zip(fused(batches[1]), graph(batches[1]), model(batches[1]), strict=True):
        assert (got - want).abs().max() <= 2 * step
        assert (got - original).abs().max() < (0.2 if preset == "all_int8" else 0.05)
    assert_equal(tlq.lower(graph)(batches[1]), fused(batches[1]))


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_a_models_loop_is_the_integer_references(preset: str) -> None:
    x = torch.randn(T, B, I)
    fused = tlq.quantize(Holder(nn.LSTMCell(I, H)), [x], getattr(tlq.LSTMQConfig, preset)())
    cell = fused.decoder["cell"]
    assert torch.equal(fused(x), reference.lstm(cell.cells(), x)[0])
    assert torch.equal(fused(x), tlq.LSTM(cell.cells())(x)[0])


@torch.no_grad()
def test_a_cell_gets_the_grids_that_an_lstm_of_one_layer_gets() -> None:
    x, cell, lstm = torch.randn(T, B, I), nn.LSTMCell(I, H), nn.LSTM(I, H)
    lstm.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    quantized = tlq.quantize(lstm, [x])
    assert torch.equal(tlq.quantize(Holder(cell), [x])(x), quantized(x)[0])


@pytest.mark.parametrize("backend", ["fused", "reference"])
@torch.no_grad()
def test_the_root_itself_unbatched(backend: str) -> None:
    x, states = torch.randn(I), (torch.randn(H).tanh(), torch.randn(H))
    cell = nn.LSTMCell(I, H)
    quantized = tlq.quantize(cell, [(x, states)], backend=backend)
    for got, want in zip(quantized(x, states), cell(x, states), strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() < 0.05


def test_observers_see_every_step(model: Decoder, batches: list[Tensor]) -> None:
    seen: list[Tensor] = []
    handle = model.cells[0].register_forward_hook(lambda module, args, output: seen.extend((args[0], args[1][0], output[0])))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    prepared = tlq.prepare(model)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    cell = prepared.cells[0]
    assert cell.calls == STEPS * len(batches)
    for observer, values in (
        (cell.cell.activation_post_process_x, seen[0::3]),
        # one for the hidden states that are read, the encoder's too, and those that are written
        (cell.cell.activation_post_process_ogate_cy, seen[1::3] + seen[2::3]),
    ):
        torch.testing.assert_close(observer.max_val, torch.stack(values).max())
        torch.testing.assert_close(observer.min_val, torch.stack(values).min())


def test_configurations_by_path_class_and_default(model: Decoder, batches: list[Tensor]) -> None:
    wide = tlq.LSTMQConfig.int8_gates16()
    quantized = tlq.quantize(model, batches, {"cells.0": wide, nn.LSTMCell: INT8, "": None})
    assert qparams(quantized.cells[0]).fgate_cx is not None
    assert qparams(quantized.cells[1]).fgate_cx is None
    assert type(quantized.encoder) is nn.LSTM
    quantized = tlq.quantize(model, batches, {nn.LSTM: INT8})
    assert [type(cell) for cell in quantized.cells] == [nn.LSTMCell] * 2
    with pytest.raises(ValueError, match=r"qconfig names 'cells\.2', which is no LSTM of the model: it has .*'cells\.1'"):
        tlq.quantize(model, batches, {"cells.2": INT8})


def test_overrides_are_those_of_layer_0_forwards(model: Decoder, batches: list[Tensor]) -> None:
    forget = FixedQParamsObserver.with_args(scale=2**-10, zero_point=0, dtype=torch.int16, quant_min=-16000, quant_max=16000)
    config = INT8.override(layer=0, direction="forward", gate="forget", gates=forget).override(layer=0, x=None, weight_ih=None)
    grids = qparams(tlq.quantize(model, batches, config).cells[0])
    assert (grids.x, grids.gates[1].scale) == (None, 2**-10)  # type: ignore[union-attr]
    for other in ({"layer": 1}, {"direction": "backward"}):
        with pytest.raises(ValueError, match=r"LSTMCell 'cells\.0': its configuration .* 1 layers .* give this LSTMCell a"):
            tlq.quantize(model, batches, {"cells.0": INT8.override(**other, x=None)})


@pytest.mark.parametrize("preset", PRESETS)
def test_qat_trains_and_converts(preset: str, batches: list[Tensor]) -> None:
    prepared = tlq.prepare(Decoder(), getattr(tlq.LSTMQConfig, preset)(qat=True)).train()
    before = copy.deepcopy(dict(prepared.named_parameters()))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(batches[0])[0].pow(2).mean().backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in prepared.named_parameters() if "cells" in name)
    prepared.eval()
    with torch.no_grad():
        want = prepared(batches[0])[0]
        for backend in ("fused", "reference"):
            assert (tlq.convert(prepared, backend)(batches[0])[0] - want).abs().max() < 0.03


def test_prepared_models_survive_a_pickle(model: Decoder, batches: list[Tensor]) -> None:
    prepared = tlq.prepare(model)
    prepared(batches[0])
    buffer = io.BytesIO()
    torch.save(prepared, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        assert_equal(tlq.convert(loaded)(batches[1]), tlq.convert(prepared)(batches[1]))


# FX


@pytest.mark.parametrize("backend", ["fused", "reference"])
@torch.no_grad()
def test_fx_gives_what_quantize_gives(model: Decoder, batches: list[Tensor], backend: str) -> None:
    assert_equal(by_fx(model, batches, backend)(batches[1]), tlq.quantize(model, batches, backend=backend)(batches[1]))


@torch.no_grad()
def test_a_model_that_is_quantized_as_a_whole(model: Decoder, batches: list[Tensor]) -> None:
    converted = by_fx(model, batches, "fused", QConfigMapping().set_global(get_default_qconfig("x86")))
    assert isinstance(converted.head, torch.ao.nn.quantized.Linear)
    assert all(isinstance(cell, tlq.LSTMCell) for cell in converted.cells.children())
    assert (converted(batches[1])[0] - model(batches[1])[0]).abs().max() < 0.05


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_qat_by_fx(batches: list[Tensor], backend: Any) -> None:
    base = QConfigMapping().set_global(get_default_qat_qconfig("qnnpack"))
    mapping = tlq.qconfig_mapping(tlq.LSTMQConfig.int8(qat=True), base)
    prepared = prepare_qat_fx(Decoder().train(), mapping, (batches[0],), tlq.prepare_custom_config())
    before = getattr(prepared.cells, "0").cell.hgates.weight.detach().clone()
    prepared(batches[0])[0].pow(2).mean().backward()
    torch.optim.SGD(prepared.parameters(), lr=0.1).step()
    assert not torch.equal(getattr(prepared.cells, "0").cell.hgates.weight, before)
    with torch.no_grad():
        prepared(batches[0])
        prepared.eval().apply(torch.ao.quantization.disable_observer)
        converted = convert_fx(prepared, tlq.convert_custom_config(backend))
        assert (converted(batches[0])[0] - prepared(batches[0])[0]).abs().max() < 0.05


class Subclass(nn.LSTMCell):
    pass


@torch.no_grad()
def test_subclasses(model: Decoder, batches: list[Tensor]) -> None:
    model.cells[0].__class__ = Subclass
    classes = (nn.LSTM, nn.LSTMCell, Subclass)
    mapping = tlq.qconfig_mapping(INT8, lstm_classes=classes)
    prepared = prepare_fx(copy.deepcopy(model), mapping, (batches[0],), tlq.prepare_custom_config(lstm_classes=classes))
    for batch in batches:
        prepared(batch)
    converted = convert_fx(prepared, tlq.convert_custom_config())
    assert_equal(converted(batches[1]), tlq.quantize(model, batches)(batches[1]))
    with pytest.raises(TypeError, match=r"lstm_classes must be subclasses of nn\.LSTM or nn\.LSTMCell, .*GRUCell"):
        tlq.qconfig_mapping(INT8, lstm_classes=(nn.GRUCell,))  # type: ignore[arg-type]


def test_what_torchs_flow_does_without_our_configs(model: Decoder, batches: list[Tensor]) -> None:
    """It leaves the cell in float and says nothing: what ours would be missing is this."""
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (batches[0],))
    prepared(batches[0])
    assert type(getattr(convert_fx(prepared).cells, "0")) is nn.LSTMCell


def test_a_cell_with_an_ordinary_qconfig(model: Decoder, batches: list[Tensor]) -> None:
    mapping = QConfigMapping().set_object_type(nn.LSTMCell, get_default_qconfig("x86"))
    with pytest.raises(
        ValueError, match=r"(?s)^LSTMCell\(5, 8\): its qconfig must come .*use .*qconfig_mapping\(qconfig, base\)$"
    ):
        # a default would not help: the ordinary one's observer stands where the cell returns its states
        prepare_fx(copy.deepcopy(model), mapping, (batches[0],), tlq.prepare_custom_config(INT8))


def test_a_quantized_model_is_traced_with_the_class_named(model: Decoder, batches: list[Tensor]) -> None:
    quantized = tlq.quantize(model, batches)
    with pytest.raises(TypeError, match=r"got a Proxy: .*torch_lstm_quant\.LSTM, torch_lstm_quant\.LSTMCell\]"):
        torch.fx.symbolic_trace(Holder(quantized.cells[0]).decoder["cell"])


# What is refused, and said


def test_a_cell_that_no_batch_reached(model: Decoder, batches: list[Tensor]) -> None:
    model.spare = nn.LSTMCell(I, H)
    with pytest.raises(ValueError, match="LSTMCell 'spare' never ran"):
        tlq.quantize(model, batches)


def test_losses_name_the_cell() -> None:
    x = torch.cat([torch.full((9, B, I), 1e-4), torch.full((1, B, I), 30.0)])
    with pytest.warns(tlq.LossWarning, match=r"LSTMCell 'decoder\.cell', part x: \d+% of its values are rounded to zero"):
        tlq.quantize(Holder(nn.LSTMCell(I, H)), [x])


def test_no_warning_on_which_no_user_can_act(model: Decoder, batches: list[Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in ("fused", "reference"):
            tlq.quantize(model, batches, backend=backend)(batches[0])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_calls_that_every_stage_refuses(backend: str | None) -> None:
    x, prepared = torch.randn(B, I), tlq.prepare(nn.LSTMCell(I, H))
    prepared(x)
    module = tlq.convert(prepared, backend) if backend else prepared
    for arguments, error, message in (
        ((x[None],), ValueError, "input must be 1-D"),
        ((x.double(),), TypeError, "input must be torch.float32, got torch.float64"),
        ((x[:, 1:],), ValueError, "must be input_size=5"),
        ((x, (torch.zeros(B, H).half(),) * 2), TypeError, "h_0 must be torch.float32"),
        ((x, (torch.zeros(1, H),) * 2), ValueError, r"h_0 must be \[3, 8\]"),
    ):
        with pytest.raises(error, match=message):
            module(*arguments)


@pytest.mark.parametrize("which", ["input", "h_0", "c_0"])
def test_values_that_calibration_refuses(which: str) -> None:
    tensors = {"input": torch.zeros(B, I), "h_0": torch.zeros(B, H), "c_0": torch.zeros(B, H)}
    tensors[which][0, 0] = float("nan")
    prepared = tlq.prepare(nn.ModuleDict({"a": nn.LSTMCell(I, H)}))
    with pytest.raises(ValueError, match=f"LSTMCell 'a': {which} must be finite during calibration"):
        prepared["a"](tensors["input"], (tensors["h_0"], tensors["c_0"]))


class WithForward(nn.LSTMCell):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.LSTMCell(I, H), "weight_hh", 0.5)


def with_nan() -> nn.Module:
    cell = nn.LSTMCell(I, H)
    cell.bias_hh.data[0] = float("nan")
    return cell


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (WithForward(I, H), "WithForward overrides forward, .* let it contain an nn.LSTMCell instead"),
        (pruned(), "has forward hooks"),
        (with_nan(), "bias_hh must be finite"),
        (nn.LSTMCell(I, H).double(), "weight_ih must be torch.float32 on the CPU, got torch.float64"),
        (nn.LSTMCell(I, H, device="meta"), "weight_ih must be torch.float32 on the CPU, got torch.float32 on meta"),
    ],
)
def test_cells_that_cannot_be_quantized(cell: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"LSTMCell 'decoder.cell': {message}"):
        tlq.prepare(Holder(cell))


def test_only_cells_are_observed_as_such() -> None:
    with pytest.raises(TypeError, match=r"a must be an nn\.LSTMCell, got GRUCell"):
        ObservedLSTMCell.from_float(nn.GRUCell(I, H), INT8, "a")  # type: ignore[arg-type]


def dynamic(model: Decoder, batches: list[Tensor]) -> nn.Module:
    prepared = prepare_fx(copy.deepcopy(model), QConfigMapping().set_global(default_dynamic_qconfig), (batches[0],))
    return convert_to_reference_fx(prepared)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_what_lower_says_of_cells(model: Decoder, batches: list[Tensor]) -> None:
    graph = tlq.quantize(model, batches, {"cells.1": INT8}, backend="reference")
    assert type(tlq.lower(graph.cells[1])) is tlq.LSTMCell
    graph.cells[1].cell.forget_gate = nn.Hardsigmoid()
    for wrong, message in (
        (graph, r"^cells\.1, node 'forget_gate': found .*Hardsigmoid"),
        (model.cells, "nothing to lower: 0 is an LSTMCell, which is float: use"),
        (tlq.prepare(model.cells), "0 is an ObservedLSTMCell, which is observed: convert"),
        (tlq.quantize(model, batches).cells, "0 is an LSTMCell, which is fused already"),
        (dynamic(model, batches), "is an LSTM of torch.ao's dynamic quantization, which has no grids: quantize the float"),
        (dynamic(model, batches).cells, r"0 is an LSTMCell of torch.ao's dynamic quantization"),
    ):
        with pytest.raises(ValueError, match=message):
            tlq.lower(wrong)

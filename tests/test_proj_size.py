"""``nn.LSTM(proj_size=...)`` in every stage: ``weight_hr`` projects hidden states, and what comes out is part ``hy``."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_lstms import assert_near, converted_model, ours, read_layers, torchs_own_functions, torchs_warnings
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cells import Dice, random_cell, random_input, random_layers, random_states
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torch_lstm_quant as tlq
from torch_lstm_quant import LSTMQConfig, ops, reference
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.observed import ObservedLSTM, ReferenceLSTM
from torch_lstm_quant.qparams import CellQParams, QParams, WeightQParams, pack_grids, unpack_grids

I, H, P, B, T = 5, 20, 7, 3, 9  # noqa: E741
FLOAT = LSTMQConfig()
PRESETS = ("int8", "int8_gates16", "fixed16", "all_int8")

# torch says that oneDNN has no such LSTM
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
no_loss_warnings = pytest.mark.filterwarnings("ignore::torch_lstm_quant.LossWarning")
projected = st.tuples(st.integers(1, 3), st.booleans(), st.booleans(), st.booleans())


def float_lstm(layers: int = 1, bidirectional: bool = False, batch_first: bool = False, bias: bool = True) -> nn.LSTM:
    return nn.LSTM(I, H, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, proj_size=P).eval()


def states(lstm: Any, *rows: int) -> tuple[Tensor, Tensor]:
    cells = lstm.num_layers * (1 + lstm.bidirectional)
    return 0.3 * torch.randn(cells, *rows, P), 0.3 * torch.randn(cells, *rows, H)


def flat(result: tuple[Tensor, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    return result[0], *result[1]


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def quantized(lstm: nn.LSTM, qconfig: LSTMQConfig, backend: str = "fused") -> Any:
    batches = [torch.randn(T, T, I) for _ in range(3)]
    with torch.no_grad():
        return tlq.quantize(lstm, batches, qconfig, backend=backend)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), projected)
def test_without_grids_it_is_the_float_lstm(seed: int, options: tuple[int, bool, bool, bool]) -> None:
    torch.manual_seed(seed)
    lstm = float_lstm(*options)
    fused = quantized(lstm, FLOAT)
    x, unbatched = torch.randn(B, T, I), torch.randn(T, I)
    rows = x.shape[0 if lstm.batch_first else 1]
    calls: list[tuple[Any, ...]] = [(x,), (x, states(lstm, rows)), (unbatched,), (unbatched, states(lstm))]
    with torch.no_grad():
        for call in calls:
            for got, want in zip(flat(fused(*call)), flat(lstm(*call)), strict=True):
                torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


@no_loss_warnings
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), projected, st.sampled_from(PRESETS))
def test_fused_integer_reference_and_graph_agree(seed: int, options: tuple[int, bool, bool, bool], preset: str) -> None:
    torch.manual_seed(seed)
    lstm = float_lstm(*options)
    observed = ObservedLSTM.from_float(lstm, getattr(LSTMQConfig, preset)())
    for _ in range(3):
        observed(torch.randn(T, T, I))
    converted = ReferenceLSTM.from_observed(observed)
    fused = tlq.lower(converted)
    cells = [[read.cell for read in row] for row in read_layers(converted)]
    x = torch.randn(T, B, I)
    hx = states(lstm, B)
    call = (x.transpose(0, 1) if lstm.batch_first else x, hx)
    with torch.no_grad():
        output, h_n, c_n = flat(fused(*call))
        graph_output, graph_h, graph_c = flat(converted(*call))
    if lstm.batch_first:
        output, graph_output = output.transpose(0, 1), graph_output.transpose(0, 1)
    assert_equal((output, h_n, c_n), reference.lstm(fused.cells(), x, *hx))
    with torchs_own_functions():
        got = reference.lstm(cells, x, *hx)
    assert_near(got[0], graph_output, cells[-1][-1].qparams.hy, one_step=True)
    for index, cell in enumerate(cell for row in cells for cell in row):
        assert_near(got[1][index], graph_h[index], cell.qparams.hy, one_step=True)
        assert_near(got[2][index], graph_c[index], cell.qparams.fgate_cx_igate_cgate)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_quantize_the_weight_and_the_output(preset: str) -> None:
    torch.manual_seed(0)
    cell = quantized(float_lstm(), getattr(LSTMQConfig, preset)()).cells()[0][0]
    assert cell.weight_hr.dtype == torch.int8
    assert cell.qparams.weight_hr.scale.unique().numel() > 1
    assert cell.qparams.hy.bits == 8
    assert cell.qparams.hx == cell.qparams.hy
    assert cell.qparams.ogate_cy != cell.qparams.hy
    assert "\nhy " in str(cell.qparams)
    assert "hy" not in str(CellQParams())


PER_TENSOR = torch.ao.quantization.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)


@pytest.mark.parametrize("weight_hr", [None, PER_TENSOR])
@pytest.mark.parametrize("hy", [None, torch.uint8])
@pytest.mark.parametrize("ogate_cy", [None, torch.int16])
def test_each_part_can_be_float32_or_another_grid(weight_hr: Any, hy: Any, ogate_cy: Any) -> None:
    torch.manual_seed(1)
    grids = {
        name: dtype and torch.ao.quantization.MinMaxObserver.with_args(dtype=dtype, quant_min=0, quant_max=200)
        for name, dtype in (("hy", hy), ("ogate_cy", ogate_cy))
    }
    fused = quantized(float_lstm(2, True), LSTMQConfig.int8().replace(weight_hr=weight_hr, **grids))
    cell = fused.cells()[1][1]
    assert (cell.qparams.weight_hr is None, cell.qparams.hy is None) == (weight_hr is None, hy is None)
    x, hx = torch.randn(T, B, I), states(fused, B)
    assert_equal(flat(fused(x, hx)), reference.lstm(fused.cells(), x, *hx))


def test_rows_of_different_lengths() -> None:
    torch.manual_seed(2)
    fused = quantized(float_lstm(2, True), LSTMQConfig.int8())
    x, hx, lengths = torch.randn(T, B, I), states(fused, B), torch.tensor([4, T, 1])
    output, (h_n, c_n) = fused(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    padded = flat(fused(x, hx, lengths=lengths))
    assert_equal((pad_packed_sequence(output)[0], h_n, c_n), padded)
    for row, length in enumerate(lengths.tolist()):
        alone = fused(x[:length, row : row + 1], tuple(state[:, row : row + 1] for state in hx))
        assert torch.equal(padded[0][:length, row], alone[0][:, 0])
        assert torch.equal(padded[1][:, row], alone[1][0][:, 0])
        assert not padded[0][length:, row].any()
    reference_form = quantized(float_lstm(2, True), LSTMQConfig.int8(), "reference")
    packed, (h_n, _) = reference_form(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    assert packed.data.shape == (int(lengths.sum()), 2 * P)
    assert h_n.shape == (4, B, P)


def test_empty_batches_and_sequences() -> None:
    fused = quantized(float_lstm(2, True), LSTMQConfig.int8())
    output, (h_n, c_n) = fused(torch.randn(T, 0, I))
    assert (output.shape, h_n.shape, c_n.shape) == ((T, 0, 2 * P), (4, 0, P), (4, 0, H))
    with pytest.raises(ValueError, match="at least one step"):
        fused(torch.randn(0, B, I))
    hx = states(fused, B)
    output, h_n, c_n = ops.lstm(torch.randn(0, B, I), *hx, fused.packed(), fused._shape)
    assert output.shape == (0, B, 2 * P)
    assert_equal((h_n, c_n), hx)


@pytest.mark.parametrize("layers", [1, 2])
def test_stream(layers: int) -> None:
    torch.manual_seed(3)
    fused = quantized(float_lstm(layers), LSTMQConfig.int8())
    x, hx = torch.randn(T, B, I), states(fused, B)
    output, h_n, c_n = flat(fused(x, hx))
    stream = tlq.Stream(fused, B)
    assert "proj_size=7" in repr(stream)
    stream.reset(hx)
    out = torch.empty(B, P)
    parts = [stream(x[:4]), stream(x[4])[None], stream(x[5], out)[None], stream(x[6:])]
    assert_equal((torch.cat(parts), *stream.state()), (output, h_n, c_n))
    stream.reset()
    assert torch.equal(stream(x), fused(x)[0])
    with pytest.raises(ValueError, match=rf"h_0 must be \[{layers}, 3, 7\] \(num_layers, rows, proj_size\), got"):
        stream.reset((torch.zeros(layers, B, H), torch.zeros(layers, B, H)))
    with pytest.raises(ValueError, match=r"out must be \[3, 7\]"):
        stream(x[0], torch.empty(B, H))


def test_integers_in_and_out() -> None:
    torch.manual_seed(4)
    fused = quantized(float_lstm(2, True), LSTMQConfig.all_int8())
    (first, _), (fw, bw) = fused.cells()
    x, hx = torch.randn(T, B, I), states(fused, B)
    cells = [cell.qparams for row in fused.cells() for cell in row]
    h0 = torch.stack([grids.hx.quantize(h) for grids, h in zip(cells, hx[0], strict=True)])
    c0 = torch.stack([grids.cx.quantize(c) for grids, c in zip(cells, hx[1], strict=True)])
    got, (h_n, _) = fused.forward_integers(first.qparams.x.quantize(x), (h0, c0))
    want, (float_h, _) = fused(x, hx)
    assert got.dtype == torch.uint8
    assert torch.equal(torch.cat([fw.h_grid.dequantize(got[..., :P]), bw.h_grid.dequantize(got[..., P:])], -1), want)
    assert torch.equal(cells[0].hy.dequantize(h_n[0]), float_h[0])
    without = quantized(float_lstm(), LSTMQConfig.all_int8().replace(hy=None, hx=None))
    with pytest.raises(ValueError, match="part hy of every cell"):
        without.forward_integers(torch.zeros(T, B, I, dtype=torch.uint8))


def test_state_dicts_and_copies() -> None:
    torch.manual_seed(5)
    fused, other = (quantized(float_lstm(2), LSTMQConfig.int8()) for _ in range(2))
    assert {"weight_hr_l0", "weight_hr_scale_l1", "weight_hr_zero_point_l1"} <= set(fused.state_dict())
    assert "proj_size=7" in repr(fused)
    x = torch.randn(T, B, I)
    assert not torch.equal(fused(x)[0], other(x)[0])
    other.load_state_dict(copy.deepcopy(fused).state_dict())
    assert torch.equal(fused(x)[0], other(x)[0])


def test_training_goes_through_the_projection() -> None:
    torch.manual_seed(6)
    lstm = float_lstm(2, True).train()
    prepared: Any = tlq.prepare(lstm, LSTMQConfig.int8(qat=True))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.5)
    x, target = torch.randn(T, 8, I), torch.zeros(T, 8, 2 * P)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (prepared(x)[0] - target).pow(2).mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    named = {name: parameter for name, parameter in prepared.named_parameters() if ".hy." in name}
    assert len(named) == 4
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in named.values())
    assert losses[-1] < 0.8 * losses[0]
    prepared.eval()
    with torch.no_grad():
        trained = prepared(x)[0]
    fused = tlq.convert(prepared)
    assert (fused(x)[0] - trained).abs().mean() < 0.01 * trained.abs().mean() + 1e-3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(I, H, 2, bidirectional=True, proj_size=P), nn.Linear(2 * P, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0])  # type: ignore[no-any-return]


@torchs_warnings
@pytest.mark.parametrize("prepare", [prepare_fx, prepare_qat_fx])
def test_plain_fx_takes_it(prepare: Any) -> None:
    torch.manual_seed(7)
    x, qat = torch.randn(T, B, I), prepare is prepare_qat_fx
    model = Model().train(qat)
    mapping = tlq.qconfig_mapping(LSTMQConfig.int8(qat=qat))
    prepared = prepare(model, mapping, (x,), tlq.prepare_custom_config())
    prepared(x)
    converted = convert_fx(prepared.eval(), tlq.convert_custom_config())
    assert isinstance(converted.lstm, tlq.LSTM)
    assert converted.lstm.proj_size == P
    wanted = model.eval()(x)
    assert (converted(x) - wanted).pow(2).mean() < 0.01 * wanted.pow(2).mean()


@torchs_warnings
@pytest.mark.parametrize("split_gates", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_upstreams_convention_of_quantized_tensors(split_gates: bool, bidirectional: bool) -> None:
    torch.manual_seed(8)
    model = converted_model(ours, {}, I, H, 2, split_gates=split_gates, bidirectional=bidirectional, proj_size=P)
    lowered: Any = tlq.lower(model)
    x, hx = torch.randn(T, B, I), states(model.my_lstm, B)
    with torch.no_grad():
        want, got = flat(model(x, *hx)), flat(lowered(x, *hx))
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        difference = (one.dequantize() - other.dequantize()).abs()
        assert (difference > 1e-6).float().mean() < 0.01


@torchs_warnings
def test_the_utility_takes_constructors_for_the_new_parts() -> None:
    fixed = torch.ao.quantization.FixedQParamsObserver.with_args(scale=2**-6, zero_point=0, dtype=torch.qint8)
    model: Any = converted_model(ours, {"hy_obs_ctr": fixed, "weight_hr_obs_ctr": PER_TENSOR}, I, H, proj_size=P)
    qparams = tlq.lower(model).my_lstm.cells()[0][0].qparams
    assert (qparams.hy.scale, qparams.hy.quant_min) == (2**-6, -128)
    assert qparams.weight_hr.scale.unique().numel() == 1


def test_an_edited_graph_with_a_bias_in_the_projection_is_refused() -> None:
    converted = quantized(float_lstm(), LSTMQConfig.int8(), "reference")
    converted.layers[0].layer_fw.cell.hy.bias = nn.Parameter(torch.ones(P))
    with pytest.raises(ValueError, match="node 'hy': found a bias in the projection of the hidden state, expected none"):
        tlq.lower(converted)


def test_a_grid_that_loses_the_signal_is_warned_of() -> None:
    coarse = torch.ao.quantization.FixedQParamsObserver.with_args(
        scale=1.0, zero_point=0, quant_min=-128, quant_max=127, dtype=torch.int8
    )
    with pytest.warns(tlq.LossWarning, match=r"part hy: keeps .* dB of its signal.*hy=None \(float32\)"):
        quantized(float_lstm(), LSTMQConfig.int8().replace(hy=coarse))


GRID = {"scale": 0.02, "zero_point": 128, "dtype": torch.uint8}
GIVEN = {"x": GRID, "ogate_cy": GRID, "hy": GRID, "weight_ih": "per_channel", "weight_hh": None, "weight_hr": "per_tensor"}


def test_given_grids() -> None:
    torch.manual_seed(9)
    lstm = float_lstm(2, True)
    fused = tlq.from_float(lstm, {"": GIVEN, "l1": {**GIVEN, "gates.cell_gate": GRID, "hx": None}})
    for cell in (cell for row in fused.cells() for cell in row):
        assert cell.qparams.hy == QParams(0.02, 128, 0, 255)
    assert fused.cells()[0][0].qparams.hx == fused.cells()[0][0].qparams.hy
    assert fused.cells()[1][0].qparams.hx is None
    names = (f"l{layer}{direction}" for layer in (0, 1) for direction in ("", "_reverse"))
    cells = (cell.qparams for row in fused.cells() for cell in row)
    same = tlq.from_float(lstm, dict(zip(names, cells, strict=True)))
    x = torch.randn(T, B, I)
    assert torch.equal(fused(x)[0], same(x)[0])
    with pytest.raises(ValueError, match=r"needs weight_hr, got x, ogate_cy, hy"):
        tlq.from_float(lstm, {"": {name: grid for name, grid in GIVEN.items() if name != "weight_hr"}})
    with pytest.raises(ValueError, match="hy is for an LSTM with proj_size, which this one has not"):
        tlq.from_float(nn.LSTM(I, H), {"": GIVEN})


def test_exporters_and_compilers_take_it() -> None:
    torch.manual_seed(10)
    model: Any = quantized(Model().eval(), LSTMQConfig.int8())  # type: ignore[arg-type]
    x = torch.randn(T, B, I)
    want = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
    shapes = ({0: torch.export.Dim("time"), 1: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    assert torch.equal(exported(x[:4, :2]), model(x[:4, :2]))
    fused = model.lstm
    operator = torch.ops.torch_lstm_quant.lstm.default
    hx = states(fused, B)
    torch.library.opcheck(operator, (x, *hx, fused.packed(), H, 2, 2, None, None, None, None, P))
    with pytest.raises(RuntimeError, match="proj_size=7, got 20, 2, 2, 0"):
        operator(x, *hx, fused.packed(), H, 2, 2)


def test_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(11)
    model: Any = quantized(Model().eval(), LSTMQConfig.int8())  # type: ignore[arg-type]
    fused, x = model.lstm, torch.randn(T, B, I)
    hx = states(fused, B)
    tlq.export_onnx(fused, tmp_path / "lstm.onnx")
    session = runtime.InferenceSession(str(tmp_path / "lstm.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {"input": x.numpy(), "h_0": hx[0].numpy(), "c_0": hx[1].numpy()})
    assert_equal(tuple(map(torch.from_numpy, got)), flat(fused(x, hx)))


def test_what_does_not_fit_is_refused() -> None:
    fused = quantized(float_lstm(), LSTMQConfig.int8())
    with pytest.raises(ValueError, match=r"h_0 must be \[1, 3, 7\] for input \[9, 3, 5\], got \[1, 3, 20\]"):
        fused(torch.randn(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, H)))
    with pytest.raises(ValueError, match=r"c_0 must be \[1, 3, 20\] for input \[9, 3, 5\], got \[1, 3, 7\]"):
        fused(torch.randn(T, B, I), (torch.zeros(1, B, P), torch.zeros(1, B, P)))
    dice = Dice(0)
    cell = random_cell(dice, I, H, proj_size=P)
    with pytest.raises(ValueError, match="an LSTMCell has no projection, got a cell with proj_size=7"):
        tlq.LSTMCell(cell)
    with pytest.raises(ValueError, match="must have input_size=7, hidden_size=20, proj_size=7, got 7, 20, 6"):
        tlq.LSTM([[cell], [random_cell(dice, P, H, proj_size=6)]])
    grids = {"hy": QParams(0.1, 0, 0, 255), "weight_hr": WeightQParams(torch.ones(P), torch.zeros(P, dtype=torch.int32))}
    plain = random_cell(dice, I, H)
    for part, grid in grids.items():
        with pytest.raises(
            ValueError, match=f"part {part} is of a cell with proj_size, got a grid for it without a weight_hr"
        ):
            replace(plain, qparams=replace(plain.qparams, **{part: grid}))  # type: ignore[arg-type]
    unbounded = QParams(0.1, 0, -(1 << 23), 1 << 23)
    with pytest.raises(ValueError, match="part ogate_cy is read by a projection"):
        replace(cell, qparams=replace(cell.qparams, ogate_cy=unbounded))
    with pytest.raises(ValueError, match=r"weight_hr must be torch\..* \[7, 20\], got"):
        Cell(cell.qparams, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, cell.weight_hr.double())  # type: ignore[union-attr]


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("hy", [None, QParams(0.1, 3, 0, 255)])
def test_grids_are_packed_and_unpacked(second: bool, hy: QParams | None) -> None:
    one = QParams(0.5, 0, -8, 7)
    qparams = CellQParams(gates=(one,) * 4, gates_again=((one,) if second else (None,)) * 4, hy=hy)  # type: ignore[arg-type]
    packed = pack_grids(qparams)
    assert len(packed) == 25 + 8 * second + (hy is not None)
    assert unpack_grids(packed, None, None, None) == qparams


def test_a_random_stack_equals_its_reference_in_any_batch_split() -> None:
    dice = Dice(12)
    layers = random_layers(dice, 11, 33, 2, 2, "int8", 70)
    fused, x, hx = tlq.LSTM(layers), random_input(dice, 12, 10, 11), random_states(dice, layers, 10)
    whole = flat(fused(x, hx))
    assert_equal(whole, reference.lstm(layers, x, *hx))
    for first, last in ((0, 1), (1, 4), (4, 10)):
        part = flat(fused(x[:, first:last], tuple(state[:, first:last] for state in hx)))
        assert_equal(part, tuple(result[:, first:last] for result in whole))

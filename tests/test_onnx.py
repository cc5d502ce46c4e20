"""ONNX in onnxruntime on the CPU: the fused module's bits, from standard operators, at any number of steps and rows."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from converted_lstms import converted_model, ours, torchs_warnings
from deep_cells import DEEP
from kernel_worker import same
from random_cells import PRESETS, Dice, random_input, random_layers, random_proj_size, random_states
from torch import Tensor, nn

import torch_lstm_quant as tlq
from torch_lstm_quant.onnx_export import lstm_model

OPERATORS = {
    *("Abs", "Add", "Cast", "Clip", "Concat", "Constant", "Div", "Expand", "Gather", "Greater", "GreaterOrEqual", "Identity"),
    *("Less", "MatMul", "MatMulInteger", "Min", "Mul", "Neg", "Round", "Scan", "Shape", "Split", "Sub", "Transpose"),
    *("Unsqueeze", "Where"),
}
SHAPES = [(1, 1), (7, 3), (20, 2)]  # steps, rows
OPTIMIZATIONS = onnxruntime.GraphOptimizationLevel


def session(model: onnx.ModelProto | Path, level: Any = OPTIMIZATIONS.ORT_ENABLE_ALL) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def assert_same_bits(
    runner: Any, want: list[Tensor], *inputs: Tensor, names: tuple[str, ...] = ("input", "h_0", "c_0")
) -> None:
    got = runner.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        assert same(torch.from_numpy(one).contiguous(), other.contiguous()).all(), f"output {index}"


def random_module(dice: Dice, preset: str | None) -> tlq.LSTM:
    sizes = [dice.integer(1, most) for most in (40, 24, 3, 2)]
    layers = random_layers(dice, *sizes, preset, random_proj_size(dice, sizes[1]))
    return tlq.LSTM(layers, batch_first=dice.chance(0.5))


def random_call(dice: Dice, module: tlq.LSTM, steps: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    order = (rows, steps) if module.batch_first else (steps, rows)
    return random_input(dice, *order, module.input_size), *random_states(dice, module.cells(), rows)


def outputs_of(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    output, (h_n, c_n) = module(inputs[0], inputs[1:] or None)
    return [output, h_n, c_n]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seed", range(4))
def test_presets_give_the_fused_bits(preset: str, seed: int) -> None:
    dice = Dice(seed)
    module = random_module(dice, preset)
    runner = session(lstm_model(module))
    for shape in SHAPES:
        call = random_call(dice, module, *shape)
        assert_same_bits(runner, outputs_of(module, *call), *call)


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_parts_gives_the_fused_bits(seed: int) -> None:
    dice = Dice(100 + seed)
    module = random_module(dice, None)
    runner = session(lstm_model(module))
    for shape in SHAPES:
        call = random_call(dice, module, *shape)
        assert_same_bits(runner, outputs_of(module, *call), *call)


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_cell_gives_the_fused_bits(preset: str | None, tmp_path: Path) -> None:
    for seed in range(4):
        dice = Dice(seed)
        ((cell,),) = random_layers(dice, dice.integer(1, 40), dice.integer(1, 24), 1, 1, preset)
        module = tlq.LSTMCell(cell)
        tlq.export_onnx(module, tmp_path / "cell.onnx")
        runner = session(tmp_path / "cell.onnx")
        for rows in (1, 3):
            x, h, c = (random_input(dice, rows, size) for size in (cell.input_size, cell.hidden_size, cell.hidden_size))
            assert_same_bits(runner, list(module(x, (h, c))), x, h, c)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_nn_lstm_gives_the_fused_bits(preset: str, bias: bool, tmp_path: Path) -> None:
    qconfig = getattr(tlq.LSTMQConfig, preset)()
    lstm = nn.LSTM(9, 16, num_layers=2, bidirectional=True, bias=bias, batch_first=True)
    module = tlq.quantize(nn.Sequential(lstm).eval(), [torch.randn(4, 30, 9)], qconfig)[0]
    tlq.export_onnx(module, tmp_path / "lstm.onnx")
    x, h, c = torch.randn(3, 40, 9), torch.randn(4, 3, 16) / 2, torch.randn(4, 3, 16)
    runner = session(tmp_path / "lstm.onnx")
    assert_same_bits(runner, outputs_of(module, x, h, c), x, h, c)
    zeros = torch.zeros_like(h)
    assert_same_bits(runner, outputs_of(module, x), x, zeros, zeros)


@pytest.mark.parametrize("name", DEEP)
def test_deep_sums_give_the_fused_bits(name: str) -> None:
    deep = DEEP[name]
    module = tlq.LSTM([[deep.cell()]])
    call = deep.inputs()
    assert_same_bits(session(lstm_model(module)), outputs_of(module, *call), *call)


@pytest.mark.parametrize("level", [OPTIMIZATIONS.ORT_DISABLE_ALL, OPTIMIZATIONS.ORT_ENABLE_BASIC])
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_what_the_optimizer_does_changes_no_bit(preset: str | None, level: Any) -> None:
    dice = Dice(7)
    module = random_module(dice, preset)
    call = random_call(dice, module, 9, 3)
    assert_same_bits(session(lstm_model(module), level), outputs_of(module, *call), *call)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_the_reference_runtime_of_onnx_gives_the_same_bits(preset: str | None) -> None:
    dice = Dice(11)
    module = tlq.LSTM(random_layers(dice, 5, 6, 1, 1, preset))
    x, h, c = torch.randn(4, 2, 5), torch.randn(1, 2, 6) / 2, torch.randn(1, 2, 6)
    assert_same_bits(onnx.reference.ReferenceEvaluator(lstm_model(module)), outputs_of(module, x, h, c), x, h, c)


def graphs_of(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """The graph and those within it."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.name == "body"]
    return [graph, *(one for body in inner for one in graphs_of(body))]


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_only_standard_operators_that_are_exact_are_used(preset: str | None) -> None:
    model = lstm_model(random_module(Dice(3), preset))
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    for graph in graphs_of(model.graph):
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        assert {(node.domain, node.op_type) for node in graph.node} <= {("", name) for name in OPERATORS}
        for node in graph.node:
            if node.op_type == "MatMulInteger":  # uint8 and int8 saturate on CPUs without VNNI
                assert types[node.input[1]] == onnx.TensorProto.UINT8


class Two(nn.Module):
    """One LSTM called without states, one with, one with lengths, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(5, 4)
        self.first = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.second = nn.LSTM(16, 5)

    def forward(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        padded, (last_h, last_c) = self.first(x) if lengths is None else self.first(x, None, lengths)
        y, (first_h, first_c) = self.first(x)
        y, (h_n, c_n) = self.second(y.transpose(0, 1).relu(), (h, c))
        return y, first_h, first_c, h_n, c_n, *self.cell(h_n[0]), padded, last_h, last_c


@pytest.fixture(scope="module")
def two() -> nn.Module:
    torch.manual_seed(0)
    zeros = torch.zeros(1, 4, 5)
    return tlq.quantize(Two().eval(), [(torch.randn(4, 20, 6), zeros, zeros)])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("optimize", [True, False])
def test_a_model_gives_its_own_bits(two: nn.Module, optimize: bool, tmp_path: Path) -> None:
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    example = torch.randn(2, 7, 6), torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), torch.tensor([7, 3])
    file = tmp_path / "two.onnx"
    dynamic_shapes = {0: batch, 1: steps}, {1: batch}, {1: batch}, {0: batch}
    tlq.export_onnx(two, file, example, dynamic_shapes=dynamic_shapes, optimize=optimize)
    assert {node.domain for node in onnx.load(file).graph.node} == {""}
    runner = session(file)
    for rows, length in ((1, 1), (3, 30)):
        lengths = torch.randint(1, length + 1, (rows,))
        call = torch.randn(rows, length, 6), torch.randn(1, rows, 5) / 2, torch.randn(1, rows, 5), lengths
        assert_same_bits(runner, two(*call), *call, names=("x", "h", "c", "lengths"))


class SameInput(nn.Module):
    """Two LSTMs of the same input, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(6, 4), nn.LSTM(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        output, states = self.first(x)
        return output, self.first(x, states)[0], self.first(x)[1][0], self.second(x)[0]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("optimize", [True, False])
def test_several_calls_on_one_input(optimize: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, file = torch.randn(7, 2, 6), tmp_path / "model.onnx"
    model = tlq.quantize(SameInput().eval(), [x])
    tlq.export_onnx(model, file, (x,), optimize=optimize)
    assert_same_bits(session(file), model(x), x, names=("x",))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_neither_training_mode_nor_gradients_change_what_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, file = torch.randn(7, 2, 6), tmp_path / "model.onnx"
    model = tlq.quantize(SameInput().eval(), [x]).train()
    tlq.export_onnx(model, file, (x.clone().requires_grad_(),))
    assert_same_bits(session(file), model(x), x, names=("x",))


@torchs_warnings
def test_what_cannot_be_written_is_refused(two: nn.Module, tmp_path: Path) -> None:
    file, x = tmp_path / "model.onnx", torch.randn(3, 2, 6)
    with pytest.raises(TypeError, match="example inputs for it, got None"):
        tlq.export_onnx(two, file)
    with pytest.raises(TypeError, match=r"without example inputs and options, .*got args, optimize"):
        tlq.export_onnx(two.first, file, (x,), optimize=True)
    with pytest.raises(ValueError, match="nothing to translate: it is an LSTM, which is float"):
        tlq.export_onnx(nn.LSTM(6, 3), file, (x,))
    with pytest.raises(TypeError, match="needed a fused LSTM or a model that contains one, got int"):
        tlq.onnx_translation_table(1)  # type: ignore[arg-type]
    quantized_boundary = tlq.lower(converted_model(ours, {}, 6, 7))
    with pytest.raises(ValueError, match="my_lstm takes and gives quantized tensors, which cannot be written to ONNX"):
        tlq.export_onnx(quantized_boundary, file, (x,))
    twins = nn.ModuleDict({"a_b": two.second, "a": nn.ModuleDict({"b": copy.deepcopy(two.second)})})
    with pytest.raises(ValueError, match=r"a_b and a\.b become the same name .*rename one"):
        tlq.onnx_translation_table(twins)
    with pytest.raises(ValueError, match="on the meta device"):
        tlq.export_onnx(copy.deepcopy(two.first).to("meta"), file)
    assert not file.exists()


def test_integers_and_packed_sequences_cannot_be_written(two: nn.Module) -> None:
    (translate,) = tlq.onnx_translation_table(two).values()
    with pytest.raises(ValueError, match="forward_integers cannot be written"):
        translate(None, None, None, None, 8, 2, 2, 2, None)
    with pytest.raises(ValueError, match="a PackedSequence cannot be written"):
        translate(None, None, None, None, 8, 2, 2, None, None, "sizes", None)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_what_is_missing_is_said(missing: str, two: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"needs (the )?{missing}.*pip install 'torch-lstm-quant\[onnx\]'"):
        tlq.export_onnx(two, tmp_path / "model.onnx", (torch.randn(1, 1, 6),))
    if missing == "onnx":
        with pytest.raises(ImportError, match=r"pip install 'torch-lstm-quant\[onnx\]'"):
            tlq.export_onnx(two.first, tmp_path / "model.onnx")


def test_a_path_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (None, 3, b"lstm.onnx"):
        with pytest.raises(TypeError, match=r"path must be a str or Path, got"):
            tlq.export_onnx(random_module(Dice(0), "int8"), path)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"got 'build/lstm.onnx': make the folder, pathlib.Path\('build'\).mkdir"):
        tlq.export_onnx(random_module(Dice(0), "int8"), "build/lstm.onnx")
    assert not list(tmp_path.iterdir())


def test_a_subclass_with_a_forward_of_its_own_is_refused(tmp_path: Path) -> None:
    class Doubled(tlq.LSTM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, states = super().forward(*args, **kwargs)
            return 2 * output, states

    class Renamed(tlq.LSTM):
        pass

    layers = random_module(Dice(0), "int8").cells()
    with pytest.raises(ValueError, match=r"expected the forward of LSTM, .*, got Doubled with its own: let a module contain"):
        tlq.export_onnx(Doubled(layers), tmp_path / "lstm.onnx")
    assert not list(tmp_path.iterdir())
    tlq.export_onnx(Renamed(layers), tmp_path / "lstm.onnx")

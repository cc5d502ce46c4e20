"""What is saved: format versions, newer and older ones, safetensors, and files that are loaded on another instruction set."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from random_cells import Dice, random_layers
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import torch_lstm_quant as tlq
from torch_lstm_quant import ops
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.format_version import FORMAT_VERSION
from torch_lstm_quant.packed_cells import PackedCells

T, B, I, H = 5, 3, 7, 6  # noqa: E741
VERSION = re.escape(version("torch_lstm_quant"))
NEWER = (
    rf"the format version must be at most {FORMAT_VERSION} for this torch_lstm_quant \({VERSION}\), got {FORMAT_VERSION + 1}: "
    "it was saved by a newer one, so update the package"
)


def lstm(seed: int = 2) -> tlq.LSTM:
    return tlq.LSTM(random_layers(Dice(seed), I, H, 2, 2, "int8"))


def cell(seed: int = 5) -> tlq.LSTMCell:
    return tlq.LSTMCell(random_layers(Dice(seed), I, H, 1, 1, "int8")[0][0])


@pytest.fixture(params=[lstm, cell])
def make(request: pytest.FixtureRequest) -> Callable[[int], PackedCells]:
    return request.param


def outputs(module: PackedCells) -> list[Tensor]:
    x = torch.linspace(-2, 2, T * B * module.input_size).reshape(T, B, -1)
    if isinstance(module, tlq.LSTMCell):
        return list(module(x[0]))
    output, states = module(x)
    return [output, *states]


def assert_same(module: PackedCells, want: list[Tensor]) -> None:
    for one, other in zip(outputs(module), want, strict=True):
        assert torch.equal(one, other)


# Format versions


def test_a_newer_state_dict_is_refused_and_changes_nothing(make: Callable[[int], PackedCells]) -> None:
    model, other = nn.ModuleDict({"rnn": make(5)}), nn.ModuleDict({"rnn": make(6)})
    want, state = outputs(model["rnn"]), other.state_dict()
    state["rnn._extra_state"] = torch.tensor(FORMAT_VERSION + 1)
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=f"rnn: {NEWER}"):
            model.load_state_dict(state, assign=assign)
        # a newer format may have other tensors: that must not hide what the matter is
        with pytest.raises(RuntimeError, match=f"rnn: {NEWER}"):
            model.load_state_dict({"rnn.codes": torch.zeros(1), "rnn._extra_state": state["rnn._extra_state"]}, assign=assign)
    assert_same(model["rnn"], want)


def test_a_newer_pickle_is_refused(make: Callable[[int], PackedCells], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_lstm_quant.packed_cells.FORMAT_VERSION", FORMAT_VERSION + 1)
    plain, saved = pickle.dumps(make(5)), io.BytesIO()
    torch.save(nn.Sequential(make(5)), saved)
    saved.seek(0)
    with pytest.raises(RuntimeError, match=f"this {type(make(5)).__name__} cannot be loaded: {NEWER}"):
        pickle.loads(plain)
    with pytest.raises(RuntimeError, match=NEWER):
        torch.load(saved, weights_only=False)


def test_what_was_saved_before_there_were_versions_loads(make: Callable[[int], PackedCells]) -> None:
    module, other = make(5), make(6)
    state = module.state_dict()
    assert int(state.pop("_extra_state")) == FORMAT_VERSION
    other.load_state_dict(state)
    assert_same(other, outputs(module))
    assert int(other.state_dict()["_extra_state"]) == FORMAT_VERSION
    older = {name: value for name, value in module.__getstate__().items() if name != "_format_version"}
    unpickled = type(module).__new__(type(module))
    unpickled.__setstate__(older)
    assert_same(unpickled, outputs(module))


def test_a_pickle_with_another_versions_packed_weights_loads(make: Callable[[int], PackedCells]) -> None:
    module = make(5)
    want = outputs(module)
    module.packed()[8] += 1  # the version of its header
    with pytest.raises(RuntimeError, match=r"got version \d+, need version \d+"):
        ops.sums(module.packed())
    assert_same(pickle.loads(pickle.dumps(module)), want)


@pytest.mark.parametrize("found", [torch.tensor(-1), torch.tensor(1.0), torch.tensor([1, 1]), "1", None, True])
def test_versions_that_are_none(found: Any) -> None:
    module = lstm()
    with pytest.raises(RuntimeError, match="LSTM: the format version must be an integer from 0 to 1, got"):
        module.load_state_dict({**module.state_dict(), "_extra_state": found})


@pytest.mark.parametrize("on_meta", [False, True])
def test_a_version_without_a_value_is_refused(on_meta: bool) -> None:
    module = lstm().to("meta") if on_meta else lstm()
    state = {**lstm(3).state_dict(), "_extra_state": torch.tensor(FORMAT_VERSION, device="meta")}
    with pytest.raises(RuntimeError, match=r"LSTM: the format version must be .*, got a tensor on the meta device"):
        module.load_state_dict(state, assign=on_meta)
    assert module.packed().is_meta == on_meta
    if not on_meta:
        assert_same(module, outputs(lstm()))


def test_states_without_values_have_no_version() -> None:
    skeleton = copy.deepcopy(lstm()).to("meta")
    skeleton.load_state_dict(copy.deepcopy(skeleton).state_dict())
    skeleton.load_state_dict({name: value.to("meta") for name, value in lstm().state_dict().items()})
    skeleton.load_state_dict(lstm(3).state_dict(), assign=True)
    assert_same(skeleton, outputs(lstm(3)))


def test_a_state_brings_its_biases(make: Callable[[int], PackedCells]) -> None:
    """What ``bias`` says is that of the cells, as they are after loading."""
    with_bias, without = make(5), make(6)
    without.load_state_dict(
        {name: torch.zeros_like(value) if name.startswith("bias") else value for name, value in without.state_dict().items()}
    )
    assert (with_bias.bias, without.bias) == (True, False)
    state = copy.deepcopy(without.state_dict())
    without.load_state_dict(with_bias.state_dict())
    assert without.bias
    assert_same(without, outputs(with_bias))
    without.load_state_dict(state)
    assert not without.bias


# States that are another module's, or not whole


def other_lstm() -> tlq.LSTM:
    return tlq.LSTM(random_layers(Dice(9), I, H, 2, 2, "int8"))


FOREIGN: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "of nn.LSTM": (
        lambda: nn.LSTM(I, H, 2, bidirectional=True).state_dict(),
        r"rnn.weight_ih_l0 must be torch.int8, got torch.float32: the state is of another kind of LSTM",
    ),
    "of a cell": (lambda: cell().state_dict(), r'Missing key.*"rnn.weight_ih_l0"'),
    "of another width": (
        lambda: tlq.LSTM(random_layers(Dice(0), I + 1, H, 2, 2, "int8")).state_dict(),
        r"size mismatch for rnn.weight_ih_l0",
    ),
    "of fewer layers": (
        lambda: tlq.LSTM(random_layers(Dice(0), I, H, 1, 2, "int8")).state_dict(),
        r'Missing key.*"rnn.weight_ih_l1"',
    ),
    "of more layers": (
        lambda: tlq.LSTM(random_layers(Dice(0), I, H, 3, 2, "int8")).state_dict(),
        r'Unexpected key.*"rnn.weight_ih_l2"',
    ),
    "with a key too many": (
        lambda: {**other_lstm().state_dict(), "weight_hr_l0": torch.zeros(1)},
        r'Unexpected key.*"rnn.weight_hr_l0"',
    ),
    "truncated": (
        lambda: dict(list(other_lstm().state_dict().items())[:20]),
        r'Missing key.*"rnn.bias_hh_l1_reverse"',
    ),
    "empty": (dict, r'Missing key.*"rnn.grids_l0"'),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_states_of_other_modules_are_refused(name: str) -> None:
    state, message = FOREIGN[name]
    model = nn.ModuleDict({"rnn": lstm()})
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"rnn.{key}": value for key, value in state().items()})


@pytest.mark.parametrize("preset", ["int8", "int8_gates16", "fixed16", "all_int8"])
def test_a_state_brings_its_grids(preset: str) -> None:
    source, target = (tlq.LSTM(random_layers(Dice(seed), I, H, 2, 2, preset)) for seed in (3, 4))
    assert source.cells()[0][0].qparams != target.cells()[0][0].qparams
    target.load_state_dict(source.state_dict())
    assert_same(target, outputs(source))
    assert str(target) == str(source)
    assert target.fingerprint() == source.fingerprint()


@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        ("int8", "int8_gates16", "must have a grid for part cx, got none"),
        ("int8_gates16", "int8", "must have no grid for part cx, got one"),
    ],
)
def test_a_state_of_another_configuration_is_refused(saved: str, other: str, message: str) -> None:
    source, target = (tlq.LSTM(random_layers(Dice(seed), I, H, 2, 2, name)) for seed, name in ((3, saved), (4, other)))
    before, want = target.fingerprint(), outputs(target)
    with pytest.raises(RuntimeError, match=f"grids_l0 {message}: load it .* with the same configuration"):
        target.load_state_dict(source.state_dict())
    assert target.fingerprint() == before
    assert_same(target, want)


def test_float_weights_are_not_taken_for_integers() -> None:
    config = tlq.LSTMQConfig.int8()
    x = torch.randn(T, B, I)
    integers, floats = (tlq.quantize(nn.LSTM(I, H), [x], c) for c in (config, config.replace(x=None, weight_ih=None)))
    for target, source, dtypes in (
        (integers, floats, "int8, got torch.float32"),
        (floats, integers, "float32, got torch.int8"),
    ):
        before = target.fingerprint()
        with pytest.raises(RuntimeError, match=rf"weight_ih_l0 must be torch.{dtypes}: the state is of another kind of LSTM"):
            target.load_state_dict(source.state_dict())
        assert target.fingerprint() == before


# Safetensors


def tied_and_strided() -> tlq.LSTM:
    """Two layers of the same tensors, weights transposed in memory, scales repeated without memory of their own."""
    ((one,),) = random_layers(Dice(0), H, H, 1, 1, "int8")
    grid = replace(one.qparams.weight_ih, scale=torch.full((1,), 0.01).expand(4 * H))
    qparams = replace(one.qparams, weight_ih=grid, weight_hh=grid)
    weight, bias = one.weight_hh.t().contiguous().t(), torch.randn(8 * H)[::2]
    return tlq.LSTM([[Cell(qparams, weight, weight, bias, bias)]] * 2)


@pytest.mark.parametrize("module", [lstm(), cell(), tied_and_strided()], ids=["LSTM", "LSTMCell", "tied"])
def test_safetensors_hold_a_state_dict(module: PackedCells, tmp_path: Path) -> None:
    save_file(module.state_dict(), tmp_path / "state.safetensors")
    other = copy.deepcopy(module)
    other.load_state_dict({name: value * 0 if "bias" in name else value for name, value in other.state_dict().items()})
    assert not torch.equal(outputs(other)[0], outputs(module)[0])
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert_same(other, outputs(module))
    newer = {**module.state_dict(), "_extra_state": torch.tensor(FORMAT_VERSION + 1)}
    save_file(newer, tmp_path / "newer.safetensors")
    with pytest.raises(RuntimeError, match=NEWER):
        other.load_state_dict(load_file(tmp_path / "newer.safetensors"))


def test_a_module_made_of_anothers_cells_shares_no_memory_with_it(tmp_path: Path) -> None:
    one = cell()
    model = nn.ModuleDict({"cell": one, "lstm": tlq.LSTM(one.cells())})
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    assert load_file(tmp_path / "state.safetensors").keys() == model.state_dict().keys()


def test_one_lstm_at_two_places_is_saved_as_safetensors_saves_such(tmp_path: Path) -> None:
    module = lstm()
    model, path = nn.ModuleDict({"a": module, "b": module}), tmp_path / "state.safetensors"
    with pytest.raises(RuntimeError, match="share memory"):  # as of any module at two places
        save_file(model.state_dict(), path)
    save_model(model, str(path))
    other = lstm(3)
    load_model(nn.ModuleDict({"a": other, "b": other}), str(path))
    assert_same(other, outputs(module))


# Another instruction set

WORKER = """
import sys, torch, torch_lstm_quant as tlq
from safetensors.torch import load_file
folder, isa = sys.argv[1:]
assert tlq.ops.isa_active() == isa
x, *want = torch.load(f"{folder}/values.pt")
pickled = torch.load(f"{folder}/module.pt", weights_only=False)
by_state = tlq.LSTM(torch.load(f"{folder}/other.pt", weights_only=False).cells())
by_state.load_state_dict(torch.load(f"{folder}/state.pt", weights_only=True))
by_safetensors = torch.load(f"{folder}/other.pt", weights_only=False)
by_safetensors.load_state_dict(load_file(f"{folder}/state.safetensors"))
exported = torch.export.load(f"{folder}/exported.pt2").module()
traced = torch.jit.load(f"{folder}/traced.pt")
for module in (pickled, by_state, by_safetensors, exported, traced):
    output, (h, c) = module(x)
    for one, other in zip((output, h, c), want, strict=True):
        assert torch.equal(one, other)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, module, x = tmp_path_factory.mktemp("saved"), lstm(), torch.randn(T, B, I)
    torch.save(module, folder / "module.pt")
    torch.save(module.state_dict(), folder / "state.pt")
    torch.save(lstm(3), folder / "other.pt")
    save_file(module.state_dict(), folder / "state.safetensors")
    torch.export.save(torch.export.export(module, (x,)), folder / "exported.pt2")
    torch.jit.trace(module, x, check_trace=False).save(folder / "traced.pt")
    output, states = module(x)
    torch.save([x, output, *states], folder / "values.pt")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("isa", ops.isas_usable())
def test_files_give_the_same_bits_on_every_isa(saved: Path, isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(saved), isa],
        env=os.environ | {"TORCH_LSTM_QUANT_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

"""The pieces of the demo, on small models and little text."""

from __future__ import annotations

import math
import random
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torch_lstm_quant as tlq

EXAMPLE = Path(__file__).parents[1] / "examples" / "char_lm"
sys.path.insert(0, str(EXAMPLE))

import data  # noqa: E402
import train  # noqa: E402
from measure import Difference, characters_per_second, exactness, size_on_disk, states_before_each_step  # noqa: E402
from model import CHECKPOINT, CharLM, State, bits_per_character, load, sample, save  # noqa: E402
from parts import PARTS, signal_to_noise, values_of_parts  # noqa: E402

PRESETS = ["int8", "int8_gates16", "fixed16", "all_int8"]


@pytest.fixture
def model() -> CharLM:
    torch.manual_seed(0)
    return CharLM(hidden_size=16, embedding_size=8).eval()


@pytest.fixture
def text() -> Tensor:
    return torch.randint(len(data.ALPHABET), (20, 4), generator=torch.Generator().manual_seed(1))


def quantized(model: CharLM, text: Tensor, preset: str, backend: str) -> nn.Module:
    return tlq.quantize(model, [text], qconfig=getattr(tlq.LSTMQConfig, preset)(), backend=backend)


def test_text_survives_encoding() -> None:
    assert data.decode(data.encode(data.ALPHABET)) == data.ALPHABET
    assert data.decode(data.encode("a\x0c\u00e9b")) == "a??b"


def test_held_out_files_are_others_than_the_ones_trained_on() -> None:
    held_out, trained_on = set(data.source_files(held_out=True)), set(data.source_files(held_out=False))
    assert not held_out & trained_on
    assert 0.05 < len(held_out) / len(held_out | trained_on) < 0.2
    assert any(path.name == "tarfile.py" for path in held_out), "which file is held out depends on its name alone"


def test_streams_are_pieces_of_the_text_beside_each_other() -> None:
    streams = data.streams(torch.arange(11), 3)
    assert streams.T.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_training_pieces_follow_one_another() -> None:
    length = 2 * train.STEPS + 1
    pieces = train.pieces(torch.arange(length)[:, None])
    assert torch.equal(torch.cat([characters for characters, _ in pieces]), torch.arange(length - 1)[:, None])
    assert all(torch.equal(characters + 1, following) for characters, following in pieces)


def test_training_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "source_files", lambda held_out: [Path(textwrap.__file__)])

    def trained() -> CharLM:
        torch.manual_seed(0)
        random.seed(0)
        model = CharLM(hidden_size=8, embedding_size=4)
        list(train.train(model, 2, time.time()))
        return model

    first, second = (trained().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpoint_is_small_and_predicts_held_out_text() -> None:
    assert CHECKPOINT.stat().st_size < 2_500_000
    assert bits_per_character(load(), data.held_out(16, 257)) < 2.0


def test_checkpoint_round_trip(model: CharLM, tmp_path: Path) -> None:
    save(model, tmp_path / "saved.pt")
    loaded = load(tmp_path / "saved.pt").state_dict()
    assert all(torch.equal(loaded[name], weight.half().float()) for name, weight in model.state_dict().items())


def test_bits_of_a_model_that_knows_nothing(model: CharLM, text: Tensor) -> None:
    for parameter in model.linear.parameters():
        nn.init.zeros_(parameter)
    assert bits_per_character(model, text) == pytest.approx(math.log2(len(data.ALPHABET)))


def test_sample_is_the_same_each_time_and_fits_the_alphabet(model: CharLM) -> None:
    written = sample(model, "def ", length=30)
    assert written == sample(model, "def ", length=30)
    assert len(written) == 30
    assert set(written) <= set(data.ALPHABET)


def test_size_and_speed(model: CharLM, text: Tensor) -> None:
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert parameters < size_on_disk(model) < parameters + 4096
    speeds = characters_per_second({"short": (model, text[:2, :1]), "long": (model, text[:, :1])}, rounds=3)
    assert list(speeds) == ["short", "long"]
    assert all(speed > 0 for speed in speeds.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_fused_is_exact(model: CharLM, text: Tensor, preset: str) -> None:
    fused, graph = (quantized(model, text, preset, backend) for backend in ("fused", "reference"))
    found = exactness(fused.lstm, graph.lstm, model.embedding(text))
    assert found.integers == Difference(compared=text.numel() * 16 + 2 * 4 * 16, unequal=0, steps=0)
    assert found.graph_each_step.compared == found.graph_running.compared == text.numel() * 16
    assert found.graph_each_step.unequal <= found.graph_each_step.compared / 1000
    assert found.graph_each_step.steps <= 1


def test_exactness_counts_what_differs(model: CharLM, text: Tensor) -> None:
    fused, graph = (quantized(model, text, "int8", backend) for backend in ("fused", "reference"))
    step = fused.lstm.cells()[0][0].qparams.ogate_cy.scale

    class Wrong(nn.Module):
        """Two values of a whole sequence's output are off, one by one step and one by three."""

        cells = staticmethod(fused.lstm.cells)
        hidden_size = fused.lstm.hidden_size

        def forward(self, x: Tensor, states: State | None = None) -> tuple[Tensor, State]:
            output, states = fused.lstm(x, states)
            if len(x) > 1:
                output[0, 0, 0] += step
                output[3, 1, 2] -= 3 * step
            return output, states

    right, wrong = (exactness(lstm, graph.lstm, model.embedding(text)) for lstm in (fused.lstm, Wrong()))
    assert (wrong.integers.unequal, wrong.integers.steps) == (2, 3)
    assert (wrong.graph_running.unequal, wrong.graph_running.steps) == (right.graph_running.unequal + 2, 3)
    assert wrong.graph_each_step == right.graph_each_step


def test_states_before_each_step_are_those_of_the_run(model: CharLM, text: Tensor) -> None:
    x = model.embedding(text)
    h, c = states_before_each_step(model.lstm, x)
    output, (_, _) = model.lstm(x)
    torch.testing.assert_close(h, torch.cat([torch.zeros(1, 4, 16), output[:-1]]))
    torch.testing.assert_close(model.lstm(x[5:6], (h[5:6], c[5:6]))[0], output[5:6])


@pytest.mark.parametrize("preset", PRESETS)
def test_parts_are_those_of_the_run(model: CharLM, text: Tensor, preset: str) -> None:
    graph, fused = quantized(model, text, preset, "reference"), quantized(model, text, preset, "fused")
    values = values_of_parts(graph.lstm, model.embedding(text))
    assert set(values) == set(PARTS)
    output, (_, c_n) = graph.lstm(model.embedding(text))
    assert torch.equal(values["ogate_cy"], output)
    assert torch.equal(values["fgate_cx_igate_cgate"][-1], c_n[0])
    qparams = fused.lstm.cells()[0][0].qparams
    for part in PARTS:
        grid = getattr(qparams, part)
        grid = grid[0] if isinstance(grid, tuple) else grid
        if grid:
            assert torch.equal(grid.dequantize(grid.quantize(values[part])), values[part]), f"{part} is not on its grid"


def test_parts_without_grids_are_those_of_the_float_lstm(model: CharLM, text: Tensor) -> None:
    unquantized = tlq.quantize(model, [text], qconfig=tlq.LSTMQConfig(hx=None, cx=None), backend="reference")
    x = model.embedding(text)
    values = values_of_parts(unquantized.lstm, x)
    torch.testing.assert_close(values["ogate_cy"], model.lstm(x)[0])
    torch.testing.assert_close(values["igates"], x @ model.lstm.weight_ih_l0.T + model.lstm.bias_ih_l0)


def test_signal_to_noise() -> None:
    wanted = {"x": torch.tensor([3.0, 4.0]), "igates": torch.tensor([1.0]), "gates": torch.tensor([1.0, 500.0])}
    values = {"x": torch.tensor([3.0, 4.5]), "igates": torch.tensor([1.0]), "gates": torch.tensor([1.0, 12.0])}
    ratios = signal_to_noise(values, wanted)
    assert ratios == {"x": pytest.approx(20.0), "igates": math.inf, "gates": math.inf}


def test_picture(model: CharLM, text: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="only the demo needs matplotlib")
    from picture import draw

    qparams = quantized(model, text, "int8", "fused").lstm.cells()[0][0].qparams
    ratios = dict.fromkeys(PARTS, 30.0)
    draw({"int8": (ratios, qparams), "other": (ratios, qparams)}, tmp_path / "parts.png")
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")

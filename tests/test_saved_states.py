"""States that a Stream saves: exact for any grids, of one module only, and refused where they are not whole."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_cells import PRESETS, Dice, random_input, random_layers
from streamed import B, H, I, equal, fused, same_states, started

import torch_lstm_quant as tlq
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qparams import QParams


@given(seed=st.integers(0, 10**6), preset=st.sampled_from([None, *PRESETS]))
def test_saved_states_are_exact_for_any_grids(seed: int, preset: str | None) -> None:
    dice = Dice(seed)
    layers = random_layers(dice, I, dice.integer(1, 40), dice.integer(1, 3), 1, preset)
    module, rows = tlq.LSTM(layers), dice.integer(1, 4)
    stream, other = tlq.Stream(module, rows), tlq.Stream(tlq.LSTM(layers), rows + 2)
    shape = len(layers), rows, module.hidden_size
    if dice.chance(0.5):
        stream.reset((random_input(dice, *shape), random_input(dice, *shape)))
    if dice.chance(0.7):  # otherwise states that no step gave
        stream(random_input(dice, dice.integer(1, 5), rows, I))
    other(random_input(dice, 2, rows + 2, I))
    places = torch.randperm(rows + 2, generator=dice.generator)[:rows]
    other.restore(stream.save(), places)
    x = random_input(dice, 4, rows, I)
    pairs = [*zip(other.state(places), stream.state(), strict=True), (other(x, rows=places), stream(x))]
    for one, want in [*pairs, *zip(other.state(places), stream.state(), strict=True)]:
        assert equal(one.nan_to_num(7e7), want.nan_to_num(7e7))


def test_saved_by_torch_and_by_pickle() -> None:
    module = fused(2, "int8_gates16")
    stream, x = started(module), torch.randn(4, 2, I)
    saved = stream.save(rows=[3, 1])
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    want = stream(x, rows=[3, 1])
    other = tlq.LSTM(module.cells())
    for read in (saved, torch.load(file, weights_only=True), pickle.loads(pickle.dumps(saved))):
        fresh = tlq.Stream(other, 2)
        fresh.restore(read)
        assert equal(fresh(x), want)
        stream.restore(read, rows=[0, 2])
        assert equal(stream(x, rows=[0, 2]), want)
    loaded = fused(2, "int8_gates16", seed=1)
    loaded.load_state_dict(module.state_dict())
    tlq.Stream(loaded, 2).restore(saved)


def test_rows_that_were_saved_need_to_be_told_where_to_go() -> None:
    stream = started(fused())
    before = stream.state()
    with pytest.raises(ValueError, match=r"saved h must be \[1, 5, 6\].*got \[1, 2, 6\]: say with rows=.* which rows take"):
        stream.restore(stream.save(rows=[3, 1]))
    assert same_states(stream, before)
    stream.restore(stream.save(rows=[3, 1]), rows=[3, 1])
    assert same_states(stream, before)


def test_what_is_saved_does_not_change() -> None:
    stream = started(fused())
    saved, before = stream.save(), stream.state()
    stream(torch.randn(3, B, I))
    stream.restore(saved)
    assert same_states(stream, before)


def test_a_stream_keeps_the_fingerprint_of_what_it_runs() -> None:
    module, other = fused(), fused(seed=1)
    stream = started(module)
    first = module.fingerprint()
    module.load_state_dict(other.state_dict())
    assert module.fingerprint() == other.fingerprint() != first
    assert stream.save()["module"] == first
    with pytest.raises(ValueError, match="got the state of another"):
        tlq.Stream(module, B).restore(stream.save())


@pytest.mark.parametrize("change", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l0", "weight_ih_scale_l1"])
def test_a_weight_tells_modules_apart(change: str) -> None:
    one, other = fused(2), fused(2)
    assert one.fingerprint() == other.fingerprint()
    state = other.state_dict()
    value = state[change].flatten()
    value[0] = value[0] + 1 if value[0] <= 0 else value[0] / 2
    other.load_state_dict(state)
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("part", ["x", "tanh_cy_input", "ogate_cy"])
def test_a_grid_tells_modules_apart(part: str) -> None:
    module = fused()
    cell = module.cells()[0][0]
    for grid in (None, QParams(0.01, 3, 0, 255)):
        other = Cell(replace(cell.qparams, **{part: grid}), cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        assert tlq.LSTM([[other]]).fingerprint() != module.fingerprint()


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda saved: {name: value for name, value in saved.items() if name != key}


BAD_SAVED: dict[str, tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = {
    "states": (lambda saved: (saved["h"], saved["c"]), TypeError, "saved must be a dict that save.. made, got tuple"),
    "nothing": (lambda _: {}, ValueError, "saved must have all .*, format, module, h, c, got no format, module, h, c"),
    "more": (
        lambda saved: saved | {"x": 1, 2: 3},
        ValueError,
        r"saved must have only what save\(\) puts there, format, module, h, c, got 'x', 2 too",
    ),
    "many more": (
        lambda saved: saved | {f"layer{i}": i for i in range(1000)},
        ValueError,
        r"c, got 'layer0', 'layer1', 'layer2', 'layer3', 'layer4' and 995 more too$",
    ),
    "newer, and more": (lambda saved: saved | {"format": 2, "x": 1}, ValueError, "saved must have format 1, got 2"),
    "no c": (without("c"), ValueError, "got no c"),
    "no module": (without("module"), ValueError, "got no module"),
    "newer": (lambda saved: saved | {"format": 2}, ValueError, "saved must have format 1, got 2: restore it with the version"),
    "no format": (lambda saved: saved | {"format": torch.ones(2)}, ValueError, "saved must have format 1, got tensor"),
    "other": (lambda saved: saved | {"module": "0" * 64}, ValueError, "got the state of another, 000000000000"),
    "no name": (lambda saved: saved | {"module": None}, ValueError, "got the state of another, None"),
    "fewer rows": (
        lambda saved: saved | {"h": saved["h"][:, :1]},
        ValueError,
        r"h must be \[2, 2, 6\].*got \[2, 1, 6\]",
    ),
    "more rows": (
        lambda saved: {name: value.repeat(1, 2, 1) if name in "hc" else value for name, value in saved.items()},
        ValueError,
        r"got \[2, 4, 6\]: say with rows=\[...\] which rows take what was saved, as many as save\(rows=\[...\]\) was given$",
    ),
    "fewer layers": (lambda saved: saved | {"c": saved["c"][:1]}, ValueError, r"saved c must be \[2, 2, 6\].*got \[1, 2, 6\]"),
    "fewer units": (lambda saved: saved | {"c": saved["c"][..., :3]}, ValueError, r"got \[2, 2, 3\]"),
    "double": (lambda saved: saved | {"c": saved["c"].double()}, TypeError, "saved c must be torch.float32"),
    "None": (lambda saved: saved | {"h": None}, TypeError, "saved h must be a tensor, got NoneType"),
    "meta": (lambda saved: saved | {"h": saved["h"].to("meta")}, TypeError, "saved h must be on the cpu"),
}


@pytest.mark.parametrize("name", BAD_SAVED)
def test_what_was_not_saved_whole_is_refused_and_changes_nothing(name: str) -> None:
    change, error, message = BAD_SAVED[name]
    stream = started(fused(2))
    before, saved = stream.state(), stream.save(rows=[3, 1])
    with pytest.raises(error, match=message):
        stream.restore(change(saved), rows=[0, 1])  # type: ignore[arg-type]
    assert same_states(stream, before)


OTHERS = {
    "weights": fused(2, seed=1),
    "grids": fused(2, "all_int8"),
    "layers": fused(1),
    "input": fused(2, size=(I + 1, H)),
    "hidden": fused(2, size=(I, H + 1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_module_is_refused(name: str) -> None:
    stream = started(fused(2))
    before = stream.state()
    with pytest.raises(ValueError, match=r"saved must be of a module with the same grids, .*got the state of another"):
        stream.restore(started(OTHERS[name]).save())
    assert same_states(stream, before)


def test_a_truncated_file_is_refused_by_torch() -> None:
    file = io.BytesIO()
    torch.save(started(fused()).save(), file)
    data = file.getvalue()
    for end in (10, len(data) // 2, len(data) - 30):
        with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):
            torch.load(io.BytesIO(data[:end]), weights_only=True)

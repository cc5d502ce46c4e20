"""LSTMQConfig: presets, copies with changes, overrides, printing, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantizeBase, HistogramObserver, MinMaxObserver, QConfigMapping, get_default_qconfig

import torch_lstm_quant as tlq
from torch_lstm_quant.observed import ObservedLSTM, ObservedLSTMCell
from torch_lstm_quant.qconfig import LSTMQConfig, Override
from torch_lstm_quant.qparams import PARTS, WEIGHTS

PRESETS = ("int8", "int8_gates16", "fixed16", "all_int8")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("qat", [False, True])
def test_presets_make_what_they_say(preset: str, qat: bool) -> None:
    config = getattr(LSTMQConfig, preset)(qat=qat)
    for _, constructor in config.parts():
        if constructor is not None and constructor != "shared":
            assert isinstance(constructor(), FakeQuantizeBase) is qat
    assert [part for part, _ in config.parts()] == [*PARTS, *WEIGHTS]


def test_a_fixed_grid_holds_zero_and_one() -> None:
    config = LSTMQConfig.int8()
    for part, low in (("forget_gate", 0.0), ("tanh_cy", -1.0)):
        observer = getattr(config, part)()
        scale, zero_point = float(observer.scale), int(observer.zero_point)
        assert (observer.quant_min - zero_point) * scale == low
        assert (observer.quant_max - zero_point) * scale == 1.0


def test_replace_and_override() -> None:
    config = (
        LSTMQConfig.int8().replace(cx=None).override(layer=1, x=None, weight_ih=None).override(direction="backward", x=None)
    )
    assert config.cx is None
    assert config.constructors(0, "forward")["x"] is not None
    assert config.constructors(1, "forward")["x"] is None
    assert config.constructors(0, "backward")["x"] is None
    assert config.constructors(1, "forward")["weight_ih"] is None
    assert config.constructors(0, "backward")["weight_ih"] is not None
    later = config.override(x=MinMaxObserver)
    assert later.constructors(1, "backward")["x"] is MinMaxObserver


def test_one_gate_of_a_part_has_its_own() -> None:
    config = LSTMQConfig.int8().override(gate="forget", gates=HistogramObserver).override(layer=1, gates=MinMaxObserver)
    assert config.constructors(0, "forward")["gates_forget"] is HistogramObserver
    assert "gates_forget" not in config.constructors(1, "forward")
    assert "layer any, both directions, forget gate: gates" in str(config)
    with pytest.raises(TypeError, match="gate='cell' is for the parts igates, hgates, gates, got x"):
        config.override(gate="cell", x=None)
    with pytest.raises(ValueError, match="gate must be one of input, forget, cell, output"):
        config.override(gate="forget_gate", gates=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [*PARTS, *WEIGHTS])
def test_an_override_leaves_all_other_parts_as_they_are(part: str) -> None:
    config = LSTMQConfig.int8().override(gate="forget", gates=HistogramObserver)
    before, after = config.constructors(0, "forward"), config.override(0, **{part: None}).constructors(0, "forward")
    own = {part, f"{part}_forget"}
    assert {name: value for name, value in after.items() if name not in own} == {
        name: value for name, value in before.items() if name not in own
    }
    assert after[part] is None


def test_it_is_frozen() -> None:
    with pytest.raises(AttributeError):
        LSTMQConfig().x = MinMaxObserver  # type: ignore[misc]


def test_it_prints_as_a_table() -> None:
    lines = str(LSTMQConfig.int8().override(layer=2, x=None)).splitlines()
    assert lines[0].split() == ["x", "MinMaxObserver", "uint8", "[0,", "255]"]
    assert any(line.startswith("fgate_cx ") and line.endswith("float32") for line in lines)
    assert lines[-1].startswith("layer 2, both directions: x")


@pytest.mark.parametrize("value", [3, "int8", MinMaxObserver(), torch.quint8])
def test_values_that_are_no_constructors(value: object) -> None:
    with pytest.raises(TypeError, match="part x must be a constructor"):
        LSTMQConfig(x=value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="part x must be a constructor"):
        LSTMQConfig().override(layer=0, x=value)  # type: ignore[arg-type]


def test_unknown_parts_layers_and_directions() -> None:
    with pytest.raises(TypeError, match="unknown part 'gate'; the parts are x, hx"):
        LSTMQConfig().replace(gate=None)
    with pytest.raises(TypeError, match="unknown part"):
        LSTMQConfig().override(layer=0, weight=None)
    with pytest.raises(ValueError, match="direction must be"):
        LSTMQConfig().override(direction="reverse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer must be 0 or more"):
        LSTMQConfig().override(layer=-1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (5, "overrides must be a tuple of what .*override.* adds, got 5"),
        ((3,), r"overrides must be a tuple of what .*override.* adds, got \(3,\)"),
        ((("x", None),), "overrides must be a tuple"),
        ((Override(0, None, None, "x"),), "an override's parts must be a dict of constructors, got 'x'"),
        ((Override(0, None, None, {"gate": None}),), "unknown part 'gate'"),
        ((Override(True, None, None, {"x": None}),), "layer must be an int, or None for all layers, got True"),
        ((Override(0, None, "input", {"x": None}),), "gate='input' is for the parts igates, hgates, gates, got x"),
    ],
)
def test_overrides_made_by_hand_are_checked_as_well(overrides: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LSTMQConfig(overrides=overrides)


def test_shared_is_for_the_states() -> None:
    assert LSTMQConfig(hx="shared", cx="shared").hx == "shared"
    with pytest.raises(TypeError, match="part x must be a constructor"):
        LSTMQConfig(x="shared")  # type: ignore[arg-type]
    assert LSTMQConfig(x=HistogramObserver).x is HistogramObserver


def _by_name(value: Any) -> object:
    return tlq.prepare(nn.ModuleDict({"lstm": nn.LSTM(3, 4)}), {"lstm": value})


def _for_torchao(value: Any) -> object:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torch_lstm_quant.torchao import LSTMConfig

    return LSTMConfig(value)


ENTRIES: dict[str, Callable[[Any], object]] = {
    "quantize": lambda value: tlq.quantize(nn.LSTM(3, 4), [], value),
    "prepare": lambda value: tlq.prepare(nn.LSTM(3, 4), value),
    "prepare by name": _by_name,
    "prepare_qat": lambda value: tlq.prepare_qat(nn.LSTM(3, 4), value),
    "qconfig_mapping": tlq.qconfig_mapping,
    "prepare_custom_config": tlq.prepare_custom_config,
    "an LSTM": lambda value: ObservedLSTM.from_float(nn.LSTM(3, 4), value),
    "a cell": lambda value: ObservedLSTMCell.from_float(nn.LSTMCell(3, 4), value),
    "torchao": _for_torchao,
}
NO_CONFIGS = {
    "a preset that is not called": (LSTMQConfig.int8, "got a function: call it, LSTMQConfig.int8()"),
    "another": (LSTMQConfig.all_int8, "got a function: call it, LSTMQConfig.all_int8()"),
    "the class": (LSTMQConfig, "got the class: call one of its presets, LSTMQConfig.int8()"),
    "torch.ao's": (get_default_qconfig("x86"), "got QConfig, which is for torch.ao's QConfigMapping: pass LSTMQConfig.int8()"),
    "ours as torch.ao's": (LSTMQConfig.int8().as_qconfig(), "or the LSTMQConfig whose as_qconfig() it is"),
    "a mapping": (
        QConfigMapping(),
        "got QConfigMapping, which is for prepare_fx: pass LSTMQConfig.int8(), and to prepare_fx "
        "torch_lstm_quant.qconfig_mapping(LSTMQConfig.int8(), mapping)",
    ),
    "a method": (LSTMQConfig.replace, "got function"),
    "another function": (len, "got builtin_function_or_method"),
    "a name": ("int8", "got str"),
}


@pytest.mark.parametrize("value", NO_CONFIGS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_configuration_is_refused_with_what_to_pass(entry: str, value: str) -> None:
    got, message = NO_CONFIGS[value]
    with pytest.raises(TypeError, match=rf"qconfig(\['lstm'\])? must be an LSTMQConfig.*{re.escape(message)}"):
        ENTRIES[entry](got)

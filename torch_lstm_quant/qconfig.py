"""``LSTMQConfig``: an observer or fake-quantize constructor for every part of an LSTM, and presets that are known to work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch.ao.quantization import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FixedQParamsObserver,
    MinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
)

from torch_lstm_quant.cell_graph import GATE_NAMES, SPLIT_PARTS
from torch_lstm_quant.observed_grid import Constructor, observer_of
from torch_lstm_quant.observers import BoundaryObserver, CutMinMaxObserver
from torch_lstm_quant.qconfig_checks import check_cell, check_part
from torch_lstm_quant.qparams import GATES, PARTS, WEIGHTS, QParams

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")

Gate = Literal["input", "forget", "cell", "output"]


class Override(NamedTuple):
    """Other constructors for some parts of some cells: None is any layer, both directions, all four gates together."""

    layer: int | None
    direction: Direction | None
    gate: Gate | None
    parts: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Layer, direction and gate in words."""
        gate = f", {self.gate} gate" if self.gate else ""
        return f"layer {'any' if self.layer is None else self.layer}, {self.direction or 'both directions'}{gate}"

    def __str__(self) -> str:
        return "\n".join(f"{self.place}: {part:<22}{_describe(constructor)}" for part, constructor in self.parts.items())


@dataclass(frozen=True)
class LSTMQConfig:
    """How to quantize an LSTM: for each part a constructor of an observer or fake quantize, or None: it stays float32.

    ``docs/numerics.md`` says where each part stands in the cell. Start from a preset and ``replace`` what differs::

        LSTMQConfig.int8().replace(cx=None).override(layer=0, x=None, weight_ih=None)

    Args:
        x, igates, ..., ogate_cy: the activation parts of :data:`torch_lstm_quant.qparams.PARTS`.
        hx, cx: the states as they are read. ``"shared"``: one observer for reading and writing, so one grid: that of
            ``ogate_cy`` (of ``hy`` in an LSTM with ``proj_size``) for ``hx``, that of ``fgate_cx_igate_cgate`` for ``cx``.
        hy, weight_hr: for LSTMs with ``proj_size``, in which ``hy`` is the hidden state; others have no such parts.
        weight_ih, weight_hh, weight_hr: per-tensor or per-channel (axis 0) constructors of int8 grids.
        overrides: later ones win; see :meth:`override`.

    Every combination of float32 and of grids up to 16 bits, and of weights up to 8, runs fused (``docs/widths.md`` says how);
    a constructor is called when the configuration is made, and refused then where what it makes cannot be honoured.

    Raises:
        TypeError: a value that is neither a constructor nor None, or a constructor that fails.
        ValueError: an observer whose dtype, scheme, limits or given grid cannot be honoured. Messages name the part.
    """

    x: Constructor | None = None
    hx: Constructor | Literal["shared"] | None = "shared"
    cx: Constructor | Literal["shared"] | None = "shared"
    igates: Constructor | None = None
    hgates: Constructor | None = None
    gates: Constructor | None = None
    input_gate: Constructor | None = None
    forget_gate: Constructor | None = None
    cell_gate: Constructor | None = None
    output_gate: Constructor | None = None
    fgate_cx: Constructor | None = None
    igate_cgate: Constructor | None = None
    fgate_cx_igate_cgate: Constructor | None = None
    tanh_cy_input: Constructor | None = None
    tanh_cy: Constructor | None = None
    ogate_cy: Constructor | None = None
    hy: Constructor | None = None
    weight_ih: Constructor | None = None
    weight_hh: Constructor | None = None
    weight_hr: Constructor | None = None
    overrides: tuple[Override, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.overrides, tuple) or not all(isinstance(override, Override) for override in self.overrides):
            raise TypeError(f"overrides must be a tuple of what LSTMQConfig.override() adds, got {self.overrides!r}")
        for override in self.overrides:
            _check_override(override)
        grids = [check_part(part, constructor, f"part {part}") for part, constructor in self.parts()]
        for override in self.overrides:
            for part, constructor in override.parts.items():
                grids.append(check_part(part, constructor, f"{override.place}, part {part}"))
        if any(isinstance(grid, QParams) and grid.unbounded for grid in grids):
            named = {override.layer for override in self.overrides if override.layer is not None}
            for layer in sorted({0, max(named, default=0) + 1} | named):  # the last stands for all that are not named
                for direction in DIRECTIONS:
                    check_cell(self.constructors(layer, direction), f"layer {layer}, {direction} direction")

    def parts(self) -> Iterator[tuple[str, Constructor | Literal["shared"] | None]]:
        """(part, constructor) in order of computation, the weights last; without the overrides."""
        return ((part, getattr(self, part)) for part in (*PARTS, *WEIGHTS))

    def replace(self, **parts: Constructor | Literal["shared"] | None) -> LSTMQConfig:
        """A copy with other constructors for some parts, in every layer and direction."""
        _check_parts(parts)
        return dataclasses.replace(self, **parts)  # type: ignore[arg-type]

    def override(
        self,
        layer: int | None = None,
        direction: Direction | None = None,
        gate: Gate | None = None,
        **parts: Constructor | Literal["shared"] | None,
    ) -> LSTMQConfig:
        """A copy with other constructors for some parts of one layer (None: all) and one direction (None: both).

        Args:
            layer: counted from 0.
            direction: ``"forward"`` or ``"backward"``.
            gate: ``"input"``, ``"forget"``, ``"cell"`` or ``"output"``: for that gate alone, of the parts ``igates``,
                ``hgates`` and ``gates``. (What a gate's function gives is a part of its own: ``forget_gate``.)
            parts: constructors, or None for float32.

        Raises:
            ValueError: an unknown direction or gate, a negative layer, or an observer that cannot be honoured.
            TypeError: a layer that is no int, an unknown part, one that has no gates, or a value that is no constructor.
        """
        return dataclasses.replace(self, overrides=(*self.overrides, Override(layer, direction, gate, parts)))

    def constructors(self, layer: int, direction: Direction) -> dict[str, Constructor | Literal["shared"] | None]:
        """The constructor of each part of one layer's one direction, the overrides applied.

        A part of which one gate has its own has it under ``gates_forget`` beside ``gates``.
        """
        constructors = dict(self.parts())
        for override in self.overrides:
            if override.layer not in (None, layer) or override.direction not in (None, direction):
                continue
            for part, constructor in override.parts.items():
                if override.gate:
                    constructors[f"{part}_{override.gate}"] = constructor
                    continue
                constructors[part] = constructor
                if part in SPLIT_PARTS:  # tanh_cy_input is no gate of tanh_cy
                    for gate in GATE_NAMES:
                        constructors.pop(f"{part}_{gate}", None)
        return constructors

    def as_qconfig(self) -> QConfig:
        """This configuration as a ``QConfig``, for ``QConfigMapping.set_module_name`` and ``set_object_type``."""
        return QConfig(
            activation=BoundaryObserver.with_args(lstm_qconfig=self),
            weight=MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
        )

    def __str__(self) -> str:
        lines = [f"{part:<22}{_describe(constructor)}" for part, constructor in self.parts()]
        return "\n".join([*lines, *map(str, self.overrides)])

    @staticmethod
    def int8(*, qat: bool = False) -> LSTMQConfig:
        """The recommended preset: 8-bit x, h and weights; functions on fixed 12-bit grids; products and cell state float32.

        As accurate as 16 bits everywhere on real models, and the fastest: the gates' sum is cut at +-12 and tanh's input at
        +-10, where both functions are flat, on grids that are the same for every model. The functions' outputs have steps
        of 2**-15 and hold 0, 1 and -1, so that a forget gate can keep a memory for ever.
        """
        return LSTMQConfig(
            x=_min_max(torch.uint8, qat),
            gates=_fixed(12 / 2047, -2048, 2047, torch.int16, qat),
            **_functions(_fixed(2**-15, 0, 1 << 15, torch.int32, qat), _fixed(2**-15, -(1 << 15), 1 << 15, torch.int32, qat)),
            tanh_cy_input=_fixed(10 / 2047, -2048, 2047, torch.int16, qat),
            ogate_cy=_min_max(torch.uint8, qat),
            hy=_min_max(torch.uint8, qat),
            **_weights(qat),
        )

    @staticmethod
    def int8_gates16(*, qat: bool = False) -> LSTMQConfig:
        """Integers throughout, for targets without float: 8-bit x, h and weights, everything else on 16-bit grids.

        Ranges are cut where sigmoid and tanh are flat; the cell state's has room for twice what calibration saw.
        """
        unit = _fixed(1 / 32767, -32767, 32767, torch.int16, qat)
        projection = _cut_min_max(qat)
        state = _cut_min_max(qat, headroom=2.0)
        return LSTMQConfig(
            x=_min_max(torch.uint8, qat),
            igates=projection,
            hgates=projection,
            gates=_fixed(12 / 32767, -32768, 32767, torch.int16, qat),
            **_functions(unit, unit),
            fgate_cx=state,
            igate_cgate=unit,
            fgate_cx_igate_cgate=state,
            tanh_cy_input=_fixed(10 / 32767, -32768, 32767, torch.int16, qat),
            ogate_cy=_min_max(torch.uint8, qat),
            hy=_min_max(torch.uint8, qat),
            **_weights(qat),
        )

    @staticmethod
    def fixed16(*, qat: bool = False) -> LSTMQConfig:
        """Fixed Q-formats, for fixed-point targets: Q4.11 gates and cell state, Q0.15 functions, Q0.7 h; 8-bit x and weights.

        A hidden state that is projected has 8 bits from its least to its greatest value, as x has.

        Q0.15 ends below 1, so a memory leaks away over thousands of steps, and Q4.11 clips beyond 16: use it where the
        target dictates it.
        """
        q4_11 = _fixed(2**-11, -32768, 32767, torch.int16, qat)
        q0_15 = _fixed(2**-15, -32768, 32767, torch.int16, qat)
        return LSTMQConfig(
            x=_min_max(torch.uint8, qat),
            igates=q4_11,
            hgates=q4_11,
            gates=q4_11,
            **_functions(q0_15, q0_15),
            fgate_cx=q4_11,
            igate_cgate=q4_11,
            fgate_cx_igate_cgate=q4_11,
            ogate_cy=_fixed(2**-7, -128, 127, torch.int8, qat),
            hy=_min_max(torch.uint8, qat),
            **_weights(qat),
        )

    @staticmethod
    def all_int8(*, qat: bool = False) -> LSTMQConfig:
        """Every part on 8 bits from its least to its greatest value, which is what torch.ao's defaults amount to.

        For comparison only: eight bits destroy a cell state that integrates small increments. On four pretrained models
        the speaker cosine fell to 0.41, a voice-activity detector kept 83 % of its decisions, and a character model
        predicted the same next character in 24 % of places (``int8``: 0.997 with a float32 input projection, 99.9 %, 95.5 %).
        """
        eight = _min_max(torch.uint8, qat)
        parts: dict[str, Any] = {part: eight for part in PARTS if part not in ("hx", "cx", "tanh_cy_input")}
        return LSTMQConfig(**parts, **_weights(qat))


def check_qconfig(value: object, name: str, wanted: str = "an LSTMQConfig") -> LSTMQConfig:
    """``value``, the argument called ``name``, if it is a configuration; else a TypeError with what to pass instead."""
    if isinstance(value, LSTMQConfig):
        return value
    got = type(value).__name__
    presets = {name: method for name, method in vars(LSTMQConfig).items() if isinstance(method, staticmethod)}
    preset = next((name for name, method in presets.items() if method.__func__ is value), None)
    if value is LSTMQConfig:
        got = "the class: call one of its presets, LSTMQConfig.int8()"
    elif preset is not None:
        got = f"a function: call it, LSTMQConfig.{preset}()"
    elif isinstance(value, QConfig):
        got += ", which is for torch.ao's QConfigMapping: pass LSTMQConfig.int8(), or the LSTMQConfig whose as_qconfig() it is"
    elif isinstance(value, QConfigMapping):
        got += (
            ", which is for prepare_fx: pass LSTMQConfig.int8(), and to prepare_fx "
            "torch_lstm_quant.qconfig_mapping(LSTMQConfig.int8(), mapping)"
        )
    raise TypeError(f"{name} must be {wanted}, got {got}")


def _functions(sigmoid: Constructor, tanh: Constructor) -> dict[str, Any]:
    """The output parts of the five functions."""
    return {gate: tanh if gate == "cell_gate" else sigmoid for gate in GATES} | {"tanh_cy": tanh}


def _weights(qat: bool) -> dict[str, Any]:
    """Per-channel symmetric int8 weights. -128 is left out: products with it do not fit the fastest integer instructions."""
    grid = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
    if qat:
        # no average: the range is that of the weights as they are now, as it is after training
        constructor = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, **grid)
    else:
        constructor = PerChannelMinMaxObserver.with_args(**grid)
    return dict.fromkeys(WEIGHTS, constructor)


def _fixed(scale: float, quant_min: int, quant_max: int, dtype: torch.dtype, qat: bool) -> Constructor:
    observer = FixedQParamsObserver.with_args(
        scale=scale, zero_point=0, quant_min=quant_min, quant_max=quant_max, dtype=dtype, qscheme=torch.per_tensor_symmetric
    )
    return FixedQParamsFakeQuantize.with_args(observer=observer) if qat else observer  # type: ignore[no-any-return]


def _min_max(dtype: torch.dtype, qat: bool) -> Constructor:
    """8 bits, affine, from the least to the greatest value seen.

    In training too: a cell calls its observers at every step, so a moving average would follow the sequence, not the data.
    """
    grid = {"dtype": dtype, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
    if qat:
        return FakeQuantize.with_args(observer=MinMaxObserver, **grid)  # type: ignore[no-any-return]
    return MinMaxObserver.with_args(**grid)  # type: ignore[no-any-return]


def _cut_min_max(qat: bool, headroom: float = 1.0) -> Constructor:
    """16 bits, symmetric."""
    grid = {"dtype": torch.int16, "quant_min": -32767, "quant_max": 32767, "qscheme": torch.per_tensor_symmetric}
    if qat:
        return FakeQuantize.with_args(observer=CutMinMaxObserver, headroom=headroom, **grid)  # type: ignore[no-any-return]
    return CutMinMaxObserver.with_args(headroom=headroom, **grid)  # type: ignore[no-any-return]


def _check_parts(parts: Mapping[str, Any]) -> None:
    unknown = [part for part in parts if part not in (*PARTS, *WEIGHTS)]
    if unknown:
        raise TypeError(f"unknown part {unknown[0]!r}; the parts are {', '.join((*PARTS, *WEIGHTS))}")


def _check_override(override: Override) -> None:
    layer, direction, gate, parts = override
    if direction not in (None, *DIRECTIONS):
        raise ValueError(f'direction must be "forward", "backward" or None, got {direction!r}')
    if gate not in (None, *GATE_NAMES):
        raise ValueError(f"gate must be one of {', '.join(GATE_NAMES)}, or None for all four, got {gate!r}")
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int)):
        raise TypeError(f"layer must be an int, or None for all layers, got {layer!r}")
    if layer is not None and layer < 0:
        raise ValueError(f"layer must be 0 or more, or None for all layers, got {layer}")
    if not isinstance(parts, Mapping):
        raise TypeError(f"an override's parts must be a dict of constructors, got {parts!r}")
    _check_parts(parts)
    for part in parts:
        if gate is not None and part not in SPLIT_PARTS:
            raise TypeError(f"gate={gate!r} is for the parts {', '.join(SPLIT_PARTS)}, got {part}")


def _describe(constructor: Constructor | Literal["shared"] | None) -> str:
    """A constructor in one line: class, dtype, and what is known of the grid before calibration."""
    if constructor is None:
        return "float32"
    if constructor == "shared":
        return "shared with the state that is fed back"
    made = constructor()
    observer = observer_of(made)
    words = [type(observer).__name__, str(getattr(observer, "dtype", "?")).removeprefix("torch.")]
    if hasattr(observer, "quant_min"):
        words.append(f"[{observer.quant_min}, {observer.quant_max}]")
    if type(observer) is FixedQParamsObserver:
        words.append(f"scale={observer.scale.item():.6g} zero_point={int(observer.zero_point)}")
    return " ".join(words) + (" fake quantize" if made is not observer else "")

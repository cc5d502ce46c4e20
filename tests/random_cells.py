"""Random quantized cells and inputs, with a taste for the ends of every range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qparams import GATES, UNBOUNDED, CellQParams, QParams, WeightQParams

LIMITS = [
    (0, 255),
    (-128, 127),
    (0, 127),
    (-127, 127),
    (3, 9),
    (-2048, 2047),
    (-32768, 32767),
    (0, 1 << 15),
    (-(1 << 15), 1 << 15),
]
EIGHT_BITS = LIMITS[:5]


class Dice:
    """A seeded source of choices."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, options: Sequence[object]) -> object:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, probability: float) -> bool:
        return bool(torch.rand((), generator=self.generator) < probability)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def random_grid(dice: Dice, largest: float, limits: Sequence[tuple[int, int]] = LIMITS) -> QParams:
    """A grid that reaches about ``+-largest``, seldom much less or more."""
    quant_min, quant_max = dice.one_of(limits)  # type: ignore[misc]
    zero_points = [quant_min, quant_max, (quant_min + quant_max + 1) // 2, dice.integer(quant_min, quant_max)]
    zero_point = dice.one_of([max(quant_min, min(0, quant_max)), *zero_points])
    steps = max(quant_max - zero_point, zero_point - quant_min)  # type: ignore[operator]
    scale = largest / steps * float(torch.exp(0.3 * dice.normal(1)))
    if dice.chance(0.05):
        scale *= float(dice.one_of([1e-3, 1e3]))  # type: ignore[arg-type]
    return QParams(scale, zero_point, quant_min, quant_max)  # type: ignore[arg-type]


def maybe_grid(dice: Dice, largest: float, *, may_be_unbounded: bool = False) -> QParams | None:
    """A grid, or None: the part stays float32."""
    if dice.chance(0.3):
        return None
    if may_be_unbounded and dice.chance(0.1):
        return QParams(largest / 2**11, 0, -UNBOUNDED, UNBOUNDED)
    return random_grid(dice, largest)


def random_qparams(dice: Dice, hidden_size: int, proj_size: int = 0) -> CellQParams:
    """Any mix of grids and float32 parts."""
    x = random_grid(dice, 2.0, EIGHT_BITS) if dice.chance(0.6) else maybe_grid(dice, 2.0)
    ogate_cy = random_grid(dice, 1.0, EIGHT_BITS) if dice.chance(0.6) else maybe_grid(dice, 1.0)
    hy = weight_hr = None
    if proj_size:
        hy = random_grid(dice, 1.0, EIGHT_BITS) if dice.chance(0.6) else maybe_grid(dice, 1.0, may_be_unbounded=True)
        weight_hr = random_weight_grid(dice, proj_size)
    written = hy if proj_size else ogate_cy
    hx = written if dice.chance(0.6) and not (hy and hy.unbounded) else maybe_grid(dice, 1.0)
    cell = maybe_grid(dice, 3.0, may_be_unbounded=True)
    cx = cell if dice.chance(0.6) else maybe_grid(dice, 3.0, may_be_unbounded=True)
    tanh_cy_input = maybe_grid(dice, 4.0)
    if cell is not None and cell.unbounded:
        tanh_cy_input = random_grid(dice, 4.0)

    def per_gate(largest: float, **options: bool) -> tuple[QParams | None, ...]:
        one = maybe_grid(dice, largest, **options)
        return (one,) * 4 if dice.chance(0.7) else tuple(maybe_grid(dice, largest, **options) for _ in range(4))

    gates = per_gate(6.0)
    has_second = dice.chance(0.2)
    return CellQParams(
        x=x,
        hx=hx,
        cx=cx,
        igates=per_gate(4.0, may_be_unbounded=True),  # type: ignore[arg-type]
        hgates=per_gate(4.0, may_be_unbounded=True),  # type: ignore[arg-type]
        gates=gates,  # type: ignore[arg-type]
        input_gate=maybe_grid(dice, 1.0),
        forget_gate=maybe_grid(dice, 1.0),
        cell_gate=maybe_grid(dice, 1.0),
        output_gate=maybe_grid(dice, 1.0),
        fgate_cx=maybe_grid(dice, 3.0, may_be_unbounded=True),
        igate_cgate=maybe_grid(dice, 1.0, may_be_unbounded=True),
        fgate_cx_igate_cgate=cell,
        tanh_cy_input=tanh_cy_input,
        tanh_cy=maybe_grid(dice, 1.0),
        ogate_cy=ogate_cy,
        hy=hy,
        weight_ih=random_weight_grid(dice, 4 * hidden_size),
        weight_hh=random_weight_grid(dice, 4 * hidden_size),
        weight_hr=weight_hr,
        gates_again=tuple(maybe_grid(dice, 4.0) if grid and has_second else None for grid in gates),  # type: ignore[arg-type]
        outputs_again=tuple(maybe_grid(dice, 1.0) if has_second else None for _ in GATES),  # type: ignore[arg-type]
    )


def random_weight_grid(dice: Dice, rows: int) -> WeightQParams | None:
    """Per tensor or per channel, symmetric or affine, or None: float32 weights."""
    if dice.chance(0.15):
        return None
    scale = torch.exp(0.5 * dice.normal(rows)) * 0.01 if dice.chance(0.7) else torch.full((rows,), 0.01)
    zero_point = torch.zeros(rows, dtype=torch.int32)
    if dice.chance(0.2):
        zero_point = torch.randint(-128, 128, (rows,), generator=dice.generator, dtype=torch.int32)
    return WeightQParams(scale, zero_point)


def random_weight(dice: Dice, grid: WeightQParams | None, rows: int, depth: int) -> Tensor:
    """Weights within the grid: spread, all the same, or at the ends."""
    if grid is None:
        return dice.normal(rows, depth) / max(1, depth) ** 0.5
    low, high = grid.quant_min, grid.quant_max
    if dice.chance(0.2):
        return torch.full((rows, depth), int(dice.one_of([low, -127, high])), dtype=torch.int8)  # type: ignore[call-overload]
    if dice.chance(0.2):
        return torch.where(dice.normal(rows, depth) > 0, high, low).to(torch.int8)
    return torch.randint(low, high + 1, (rows, depth), generator=dice.generator).to(torch.int8)


def random_cell(dice: Dice, input_size: int, hidden_size: int, qparams: CellQParams | None = None, proj_size: int = 0) -> Cell:
    """A cell of ``qparams``, or of any."""
    qparams = qparams or random_qparams(dice, hidden_size, proj_size)
    rows = 4 * hidden_size
    return Cell(
        qparams,
        random_weight(dice, qparams.weight_ih, rows, input_size),
        random_weight(dice, qparams.weight_hh, rows, proj_size or hidden_size),
        dice.normal(rows) if dice.chance(0.8) else torch.zeros(rows),
        dice.normal(rows) * (100 if dice.chance(0.1) else 1),
        random_weight(dice, qparams.weight_hr, proj_size, hidden_size) if proj_size else None,
    )


def projected_qparams(dice: Dice, preset: str, hidden_size: int, proj_size: int) -> CellQParams:
    """As :func:`preset_qparams`, of a cell with ``proj_size``."""
    weights = WeightQParams(
        torch.exp(0.5 * dice.normal(proj_size)) * 0.01, torch.zeros(proj_size, dtype=torch.int32), -127, 127
    )
    hy = random_grid(dice, 1.0, [(0, 255)])
    return replace(preset_qparams(dice, preset, hidden_size), hy=hy, hx=hy, weight_hr=weights)


def preset_qparams(dice: Dice, preset: str, hidden_size: int) -> CellQParams:
    """The grids of a preset of LSTMQConfig, with random ones where calibration would find them."""
    rows = 4 * hidden_size
    weights = WeightQParams(torch.exp(0.5 * dice.normal(rows)) * 0.01, torch.zeros(rows, dtype=torch.int32), -127, 127)
    x, h = (random_grid(dice, largest, [(0, 255)]) for largest in (2.0, 1.0))
    common = {"x": x, "hx": h, "ogate_cy": h, "weight_ih": weights, "weight_hh": weights}
    if preset == "int8":
        sigmoid, tanh = QParams(2**-15, 0, 0, 1 << 15), QParams(2**-15, 0, -(1 << 15), 1 << 15)
        return CellQParams(
            **common,  # type: ignore[arg-type]
            gates=(QParams(12 / 2047, 0, -2048, 2047),) * 4,
            **_functions(sigmoid, tanh),  # type: ignore[arg-type]
            tanh_cy_input=QParams(10 / 2047, 0, -2048, 2047),
        )
    if preset == "int8_gates16":
        unit = QParams(1 / 32767, 0, -32767, 32767)
        projection, state = (QParams(largest / 32767, 0, -32767, 32767) for largest in (15.0, 4.0))
        return CellQParams(
            **common,  # type: ignore[arg-type]
            **_integer_parts(projection, QParams(12 / 32767, 0, -32768, 32767), state, unit),  # type: ignore[arg-type]
            **_functions(unit, unit),  # type: ignore[arg-type]
            tanh_cy_input=QParams(10 / 32767, 0, -32768, 32767),
        )
    if preset == "fixed16":
        q4_11, q0_15 = QParams(2**-11, 0, -32768, 32767), QParams(2**-15, 0, -32768, 32767)
        h = QParams(2**-7, 0, -128, 127)
        common |= {"hx": h, "ogate_cy": h}
        parts = _integer_parts(q4_11, q4_11, q4_11, q4_11)
        return CellQParams(**common, **parts, **_functions(q0_15, q0_15))  # type: ignore[arg-type]
    assert preset == "all_int8"
    gates, state, unit = (random_grid(dice, largest, [(0, 255)]) for largest in (6.0, 3.0, 1.0))
    parts = _integer_parts(gates, gates, state, unit)
    return CellQParams(**common, **parts, **_functions(unit, unit))  # type: ignore[arg-type]


def _functions(sigmoid: QParams, tanh: QParams) -> dict[str, QParams]:
    sigmoids = dict.fromkeys(("input_gate", "forget_gate", "output_gate"), sigmoid)
    return sigmoids | {"cell_gate": tanh, "tanh_cy": tanh}


def _integer_parts(projection: QParams, gates: QParams, state: QParams, product: QParams) -> dict[str, object]:
    return {
        "igates": (projection,) * 4,
        "hgates": (projection,) * 4,
        "gates": (gates,) * 4,
        "fgate_cx": state,
        "igate_cgate": product,
        "fgate_cx_igate_cgate": state,
        "cx": state,
    }


PRESETS = ("int8", "int8_gates16", "fixed16", "all_int8")


def random_layers(
    dice: Dice,
    input_size: int,
    hidden_size: int,
    layers: int,
    directions: int,
    preset: str | None = None,
    proj_size: int = 0,
) -> list[list[Cell]]:
    """A stack of random cells, all of one preset if it is given."""

    def cell(layer: int) -> Cell:
        width = input_size if layer == 0 else directions * (proj_size or hidden_size)
        qparams = None
        if preset and proj_size:
            qparams = projected_qparams(dice, preset, hidden_size, proj_size)
        elif preset:
            qparams = preset_qparams(dice, preset, hidden_size)
        return random_cell(dice, width, hidden_size, qparams, proj_size)

    return [[cell(layer) for _ in range(directions)] for layer in range(layers)]


def random_proj_size(dice: Dice, hidden_size: int) -> int:
    """Often none, seldom more than there are hidden units, of which the kernels know nothing."""
    if dice.chance(0.6):
        return 0
    return dice.integer(1, 150 if dice.chance(0.2) else hidden_size)


def random_states(dice: Dice, layers: Sequence[Sequence[Cell]], rows: int) -> tuple[Tensor, Tensor]:
    """``h_0`` and ``c_0`` for these cells."""
    cell, count = layers[0][0], len(layers) * len(layers[0])
    return random_input(dice, count, rows, cell.h_size), random_input(dice, count, rows, cell.hidden_size)


def random_input(dice: Dice, *shape: int) -> Tensor:
    """Mostly ordinary values, some large, some NaN or infinite."""
    x = dice.normal(*shape)
    if dice.chance(0.2):
        x *= 100
    if dice.chance(0.1) and x.numel():
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
        mask = torch.rand(shape, generator=dice.generator) < 0.1
        x[mask] = special[torch.randint(0, 5, (int(mask.sum()),), generator=dice.generator)]
    return x


SIGNALS = ("silence", "slow sensor", "one by one")


def make_signal(x: Tensor, signal: str, period: int) -> Tensor:
    """Makes of ``x`` ``[T, B, I]``: bursts of ``period`` steps, then zeros for three times as long; values that change every
    ``period`` steps; or one feature of ``I`` that changes at a step. Any other ``signal`` leaves it as it is.
    """
    step = torch.arange(len(x))
    if signal == "silence":
        return torch.where((step % (4 * period) < period)[:, None, None], x, 0.0)
    if signal == "slow sensor":
        return x[step - step % period]
    if signal == "one by one":
        feature = torch.arange(x.shape[2])
        last = step[:, None] - (step[:, None] - feature) % x.shape[2]  # when each feature changed last
        return x.gather(0, last.clamp(min=0)[:, None].expand(x.shape))
    return x

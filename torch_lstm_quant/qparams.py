"""Quantization parameters of the parts of an LSTM cell: frozen, validated, printable.

The parts carry torch.ao's names, in order of computation; ``docs/numerics.md`` says how each is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GATES = ("input_gate", "forget_gate", "cell_gate", "output_gate")
"""The four gates in the order of the rows of ``nn.LSTM``'s weights."""

PER_GATE_PARTS = ("igates", "hgates", "gates")
"""Parts that have a grid for each gate (four equal ones unless the cell was built with ``split_gates``)."""

PARTS = (
    "x",
    "hx",
    "cx",
    *PER_GATE_PARTS,
    *GATES,
    "fgate_cx",
    "igate_cgate",
    "fgate_cx_igate_cgate",
    "tanh_cy_input",
    "tanh_cy",
    "ogate_cy",
    "hy",
)
"""Every activation part, in order of computation."""

SECOND_GRIDS = ("gates_again", "outputs_again")
"""Second grids of what a gate's function reads and of what it gives, gate by gate: only torch.ao's own utilities make them."""

WEIGHTS = ("weight_ih", "weight_hh", "weight_hr")

PROJECTION = ("hy", "weight_hr")
"""The parts that only cells of an LSTM with ``proj_size`` have."""


def own_parts(parts: Iterable[str], *, projects: bool) -> list[str]:
    """Those of ``parts`` that a cell has: :data:`PROJECTION` only where its hidden state is projected."""
    return [part for part in parts if projects or part not in PROJECTION]


MAX_STEPS = 1 << 16
"""``quant_max - quant_min`` of the widest grid: 16 bits, and one more value so that -1, 0 and 1 fit in steps of 2**-15."""

UNBOUNDED = 1 << 23
"""A grid of ``+-UNBOUNDED`` has no limits of its own (``qint32`` as torch.ao quantizes it): float32 counts no further in ones.

Only parts that are added and multiplied can have it: projections, products and the cell state. What a projection or a
function reads is at most ``MAX_STEPS`` wide.
"""

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float32).max


def _float32(value: float) -> float:
    """``value`` rounded to float32."""
    return torch.tensor(value, dtype=torch.float64).to(torch.float32).item()


def smallest_dtype(low: int, high: int) -> torch.dtype:
    """The smallest plain dtype of uint8, int8, int16 and int32 that holds the integers from ``low`` to ``high``."""
    for dtype in (torch.uint8, torch.int8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return dtype
    return torch.int32


@dataclass(frozen=True)
class QParams:
    """The grid of one part.

    To integers: ``q = clamp(rne(v * inv_scale) + zero_point, quant_min, quant_max)``; back: ``v = (q - zero_point) * scale``.

    Args:
        scale: step of the grid; rounded to float32. Positive, finite, normal, and so is its inverse.
        zero_point: the integer that stands for 0.0, in ``[quant_min, quant_max]``.
        quant_min, quant_max: smallest and largest integer; at most ``MAX_STEPS`` apart, within int32.
        inv_scale: the float32 factor that quantizing multiplies with; ``1 / scale`` in float32 unless given. (torch's
            decomposed ops form it from a float64 scale, which can differ in the last bit.)

    Raises:
        ValueError: a value outside these limits.
        TypeError: a zero point or limit that is not an integer.
    """

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    inv_scale: float = 0.0

    def __post_init__(self) -> None:
        for name in ("zero_point", "quant_min", "quant_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        _check_scale(self.scale)
        object.__setattr__(self, "scale", _float32(self.scale))
        object.__setattr__(self, "inv_scale", _float32(self.inv_scale or 1.0 / self.scale))
        if not math.isclose(self.inv_scale * self.scale, 1.0, rel_tol=1e-6):
            raise ValueError(f"inv_scale must be 1 / scale = {1 / self.scale!r} to within rounding, got {self.inv_scale!r}")
        if self.quant_min >= self.quant_max:
            raise ValueError(f"quant_min must be less than quant_max, got {self.quant_min} and {self.quant_max}")
        if self.quant_max - self.quant_min > MAX_STEPS and not self.unbounded:
            raise ValueError(
                f"a grid has at most 16 bits ({MAX_STEPS} steps), got quant_min={self.quant_min}, quant_max={self.quant_max}: "
                "give nearer ones"
            )
        if not self.quant_min <= self.zero_point <= self.quant_max:
            raise ValueError(
                f"zero_point must lie in [quant_min, quant_max] = [{self.quant_min}, {self.quant_max}], got {self.zero_point}"
            )
        if max(abs(self.quant_min), abs(self.quant_max)) > UNBOUNDED:
            raise ValueError(f"quant_min and quant_max must lie within +-2**23, got {self.quant_min} and {self.quant_max}")

    @property
    def unbounded(self) -> bool:
        """Whether the grid has no limits of its own: see :data:`UNBOUNDED`."""
        return (self.quant_min, self.quant_max) == (-UNBOUNDED, UNBOUNDED)

    @property
    def bits(self) -> int:
        """Bits that the grid's integers take: 8 for 0..255; 16 for -32768..32768 too, whose extra value only holds 1.0."""
        return max(1, (self.quant_max - self.quant_min).bit_length() - (self.quant_max - self.quant_min == MAX_STEPS))

    @property
    def dtype(self) -> torch.dtype:
        """The smallest plain dtype of uint8, int8, int16 and int32 that holds every value of the grid."""
        return smallest_dtype(self.quant_min, self.quant_max)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and largest float32 value of the grid."""
        return (self.quant_min - self.zero_point) * self.scale, (self.quant_max - self.zero_point) * self.scale

    def quantize(self, v: Tensor) -> Tensor:
        """float32 to the grid's integers (``dtype``). NaN and -inf give ``quant_min``, inf gives ``quant_max``."""
        low, high = self.quant_min - self.zero_point, self.quant_max - self.zero_point
        steps = torch.round(v.to(torch.float32) * self.inv_scale).nan_to_num(nan=low, posinf=high, neginf=low)
        return (steps.clamp(low, high).to(torch.int32) + self.zero_point).to(self.dtype)

    def dequantize(self, q: Tensor) -> Tensor:
        """The grid's integers to float32."""
        return (q.to(torch.int32) - self.zero_point).to(torch.float32) * self.scale

    def __str__(self) -> str:
        low, high = self.range
        return (
            f"{self.bits} bit [{self.quant_min}, {self.quant_max}] scale={self.scale:.6g} zero_point={self.zero_point} "
            f"({low:.4g} .. {high:.4g})"
        )


def _check_scale(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float, got {scale!r}")
    # both the scale and its inverse must be normal float32 numbers, or quantizing loses bits or divides by zero
    if not _SMALLEST_NORMAL <= scale <= _LARGEST or not _SMALLEST_NORMAL <= 1.0 / scale <= _LARGEST:
        raise ValueError(f"scale must be positive, finite, and a normal float32 as its inverse must be, got {scale!r}")


@dataclass(frozen=True, eq=False)
class WeightQParams:
    """The grid of a weight matrix ``[rows, K]``, one row a channel.

    Args:
        scale: float32 ``[rows]``, ``4 * hidden_size`` but for ``weight_hr`` (a per-tensor scale is repeated).
        zero_point: int32 ``[rows]``.
        quant_min, quant_max: limits of the int8 values.

    Raises:
        ValueError: tensors of other shapes or dtypes, or values outside the limits of :class:`QParams`.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int = -128
    quant_max: int = 127

    def __post_init__(self) -> None:
        if self.scale.dtype != torch.float32 or self.scale.dim() != 1:
            raise ValueError(f"weight scale must be float32 [rows], got {self.scale.dtype} {list(self.scale.shape)}")
        if self.zero_point.dtype != torch.int32 or self.zero_point.shape != self.scale.shape:
            got = f"{self.zero_point.dtype} {list(self.zero_point.shape)}"
            raise ValueError(f"weight zero_point must be int32 {list(self.scale.shape)}, got {got}")
        if not -128 <= self.quant_min < self.quant_max <= 127:
            raise ValueError(
                f"weight limits must lie in [-128, 127], got quant_min={self.quant_min}, quant_max={self.quant_max}"
            )
        inside = (self.scale >= _SMALLEST_NORMAL) & (self.scale <= _LARGEST)
        if not inside.all():
            row = int((~inside).nonzero()[0])
            raise ValueError(f"weight scale must be positive, finite and normal, got {self.scale[row].item()!r} in row {row}")
        outside = (self.zero_point < self.quant_min) | (self.zero_point > self.quant_max)
        if outside.any():
            row = int(outside.nonzero()[0])
            got = f"{self.zero_point[row].item()} in row {row}"
            raise ValueError(f"weight zero_point must lie in [{self.quant_min}, {self.quant_max}], got {got}")

    def __str__(self) -> str:
        rows = "per tensor" if bool((self.scale == self.scale[0]).all()) else "per channel"
        low, high = self.scale.min().item(), self.scale.max().item()
        return f"[{self.quant_min}, {self.quant_max}] {rows} scale={low:.4g} .. {high:.4g}"


PerGate = tuple[QParams | None, QParams | None, QParams | None, QParams | None]
_FLOAT_GATES: PerGate = (None, None, None, None)
Grids = tuple[QParams, ...]


def _present(*grids: QParams | None) -> Grids:
    return tuple(grid for grid in grids if grid is not None)


@dataclass(frozen=True)
class CellQParams:
    """The grids of one layer's one direction; ``None`` is a part that stays float32.

    Fields are the parts of :data:`PARTS`, and :data:`SECOND_GRIDS` for cells that quantize a gate's input or output twice.
    """

    x: QParams | None = None
    hx: QParams | None = None
    cx: QParams | None = None
    igates: PerGate = _FLOAT_GATES
    hgates: PerGate = _FLOAT_GATES
    gates: PerGate = _FLOAT_GATES
    input_gate: QParams | None = None
    forget_gate: QParams | None = None
    cell_gate: QParams | None = None
    output_gate: QParams | None = None
    fgate_cx: QParams | None = None
    igate_cgate: QParams | None = None
    fgate_cx_igate_cgate: QParams | None = None
    tanh_cy_input: QParams | None = None
    tanh_cy: QParams | None = None
    ogate_cy: QParams | None = None
    hy: QParams | None = None
    weight_ih: WeightQParams | None = None
    weight_hh: WeightQParams | None = None
    weight_hr: WeightQParams | None = None
    gates_again: PerGate = _FLOAT_GATES
    outputs_again: PerGate = _FLOAT_GATES

    def __post_init__(self) -> None:
        read = {"x": self.x, "hx": self.hx, "tanh_cy_input": self.tanh_input}
        read |= {f"gates.{gate}": grid for gate, grid in zip(GATES, self.gates, strict=True)}
        for part, grid in read.items():
            if grid is not None and grid.unbounded:
                raise ValueError(
                    f"part {part} is read by a projection or a function: it needs a grid of at most 16 bits, got {grid}: "
                    "give its observer quant_min and quant_max"
                )
        for gate, grid, again in zip(GATES, self.gates, self.gates_again, strict=True):
            if again is not None and grid is None:
                raise ValueError(f"gates_again.{gate} is a second grid, so gates.{gate} must have one, got float32")

    @property
    def tanh_input(self) -> QParams | None:
        """The grid that tanh of the cell state reads: ``tanh_cy_input``, or the cell state's own."""
        return self.tanh_cy_input or self.fgate_cx_igate_cgate

    def function_grids(self) -> Iterator[tuple[str, str, Grids, Grids]]:
        """(part, "sigmoid" or "tanh", grids of the input, grids of the output) of the cell's five functions.

        Grids are in the order in which they quantize: none for float32, seldom two.
        """
        for gate, grid, again, output_again in zip(GATES, self.gates, self.gates_again, self.outputs_again, strict=True):
            function = "tanh" if gate == "cell_gate" else "sigmoid"
            yield gate, function, _present(grid, again), _present(getattr(self, gate), output_again)
        yield "tanh_cy", "tanh", _present(self.tanh_input), _present(self.tanh_cy)

    def rows(self) -> Iterator[tuple[str, QParams | None]]:
        """(name, grid) of every activation grid: the rows of the packed form, ``igates.input_gate`` for a gate of a part.

        First the parts that every cell has; then, only in a cell that has any, the second grids; then, only where it has a
        grid, ``hy``.
        """
        has_second = any(grid for part in SECOND_GRIDS for grid in getattr(self, part))
        for part in (*own_parts(PARTS, projects=False), *(SECOND_GRIDS if has_second else ()), *(["hy"] if self.hy else [])):
            if part in (*PER_GATE_PARTS, *SECOND_GRIDS):
                yield from ((f"{part}.{gate}", grid) for gate, grid in zip(GATES, getattr(self, part), strict=True))
            else:
                yield part, getattr(self, part)

    def __str__(self) -> str:
        lines = []
        projects = any(getattr(self, part) for part in PROJECTION)
        for part in own_parts(PARTS, projects=projects):
            grid = getattr(self, part)
            if part not in PER_GATE_PARTS:
                lines.append(f"{part:<22}{grid or 'float32'}")
            elif len(set(grid)) == 1:
                lines.append(f"{part:<22}{grid[0] or 'float32'}")
            else:
                lines.extend(f"{part + '.' + gate:<22}{one or 'float32'}" for gate, one in zip(GATES, grid, strict=True))
        lines.extend(f"{name + ' ':<22}{grid}" for name, grid in self.rows() if grid and name.startswith(SECOND_GRIDS))
        weights = own_parts(WEIGHTS, projects=projects)
        lines.extend(f"{name:<22}{getattr(self, name) or 'float32'}" for name in weights)
        return "\n".join(lines)


GRID_FIELDS = ("scale", "inv_scale", "zero_point", "quant_min", "quant_max")


def pack_grids(qparams: CellQParams) -> Tensor:
    """float64 ``[25, 5]``: a row of :data:`GRID_FIELDS` for each of :meth:`CellQParams.rows`, zeros for float32.

    A cell with second grids has 33 rows, the first 25 for the parts as in any other. A grid for ``hy`` is one more, the last.
    """
    rows = [[getattr(grid, field) if grid else 0.0 for field in GRID_FIELDS] for _, grid in qparams.rows()]
    return torch.tensor(rows, dtype=torch.float64)


def grid_names(rows: int) -> list[str]:
    """What the rows of :func:`pack_grids` are for where there are so many."""
    names = [name for name, _ in CellQParams().rows()]
    second_names = [f"{part}.{gate}" for part in SECOND_GRIDS for gate in GATES]
    if rows >= len(names) + len(second_names):
        names += second_names
    return [*names, "hy"] if rows == len(names) + 1 else names


def unpack_grids(grids: Tensor, *weights: WeightQParams | None) -> CellQParams:
    """The inverse of :func:`pack_grids`; ``weights`` are the grids of :data:`WEIGHTS`, in that order.

    Raises:
        ValueError: a tensor of another shape, or a row that is no valid grid (the message names the part).
    """
    names = grid_names(len(grids) if grids.dim() == 2 else 0)
    if grids.shape != (len(names), len(GRID_FIELDS)):
        raise ValueError(f"grids must be [{len(names)}, {len(GRID_FIELDS)}], got {list(grids.shape)}")
    read: dict[str, QParams | None] = {}
    for name, row in zip(names, grids.tolist(), strict=True):
        scale, inv_scale, *integers = row
        if not any(row):
            read[name] = None
            continue
        try:
            zero_point, quant_min, quant_max = map(_integer, GRID_FIELDS[2:], integers)
            read[name] = QParams(scale, zero_point, quant_min, quant_max, inv_scale)
        except ValueError as error:
            raise ValueError(f"part {name}: {error}") from error
    fields: dict[str, object] = {part: read.get(part) for part in PARTS if part not in PER_GATE_PARTS}
    per_gate = (*PER_GATE_PARTS, *SECOND_GRIDS)
    fields |= {part: tuple(read.get(f"{part}.{gate}") for gate in GATES) for part in per_gate}
    fields |= dict(zip(WEIGHTS, weights, strict=False))
    return CellQParams(**fields)  # type: ignore[arg-type]


def _integer(field: str, value: float) -> int:
    if not value.is_integer():
        raise ValueError(f"{field} must be an integer, got {value!r}")
    return int(value)

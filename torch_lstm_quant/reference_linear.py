"""Reads the weight that a converted cell's linear multiplies by: int8 values and their grid, or float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.reference import Linear as ReferenceLinear

from torch_lstm_quant.observed_grid import without_warning
from torch_lstm_quant.qparams import WeightQParams

_SHIFTS = {torch.qint8: 0, torch.quint8: 128}
"""What is taken off the integers of a weight's dtype to bring them, and the zero points, into int8."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a linear.

    Args:
        weight: ``[rows, K]``: int8, or float32 where it has no grid.
        bias: float32 ``[rows]``.
        scale, zero_point: float32 and int32 ``[rows]``, or None.
        limits: smallest and largest int8 value.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    limits: tuple[int, int] = (-128, 127)

    def quarter(self, index: int) -> Rows:
        """Quarter ``index`` of the rows: those of one gate."""

        def own(rows: Tensor) -> Tensor:
            return rows.chunk(4)[index]

        scale = None if self.scale is None else own(self.scale)
        zero_point = None if self.zero_point is None else own(self.zero_point)
        return Rows(own(self.weight), own(self.bias), scale, zero_point, self.limits)


def join(gates: Sequence[Rows]) -> tuple[Tensor, Tensor, WeightQParams | None]:
    """Weight, bias and grid of four gates' rows together.

    Raises:
        ValueError: some are int8 and others float32, or a grid is none.
    """
    weight, bias = torch.cat([rows.weight for rows in gates]), torch.cat([rows.bias for rows in gates])
    scales = [rows.scale for rows in gates if rows.scale is not None]
    zero_points = [rows.zero_point for rows in gates if rows.zero_point is not None]
    if not scales:
        return weight, bias, None
    if len(scales) != len(gates):
        raise ValueError("found int8 weights for some gates and float32 for others, expected one kind: convert all four alike")
    low, high = min(rows.limits[0] for rows in gates), max(rows.limits[1] for rows in gates)
    return weight, bias, WeightQParams(torch.cat(scales), torch.cat(zero_points), low, high)


def read_linear(linear: nn.Module) -> Rows:
    """All rows of ``nn.Linear``, or of torch's reference ``Linear``, which holds a float weight and its qparams.

    Raises:
        ValueError: a weight that is not finite, that has no usable qparams, or that int8 values cannot hold.
    """
    found = linear.weight
    if not isinstance(found, Tensor) or found.dtype != torch.float32:
        what = found.dtype if isinstance(found, Tensor) else found
        raise ValueError(f"found {what} as its weight, expected a torch.float32 tensor: convert the observed LSTM again")
    weight = found.detach()
    if not torch.isfinite(weight).all():
        raise ValueError(
            "found NaN or infinities in its weight, expected finite values: repair the model and convert it again"
        )
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()  # type: ignore[operator]
    if not isinstance(linear, ReferenceLinear):
        return Rows(weight, bias)
    scale, zero_point = _qparams(linear)
    with without_warning("torch.quantize_per_tensor, torch.quantize_per_channel"):
        dequantized = linear.get_weight().detach()
    steps = torch.round(dequantized / scale[:, None])
    if not torch.equal(steps * scale[:, None], dequantized):
        raise ValueError("found a weight that is not (q - zero_point) * scale, expected one on its own grid: convert it again")
    shift = _SHIFTS[linear.weight_dtype]
    q = (steps + zero_point[:, None]).to(torch.int32)
    low, high = _limits(linear, q, zero_point)
    return Rows((q - shift).to(torch.int8), bias, scale, zero_point - shift, (low - shift, high - shift))


def _qparams(linear: ReferenceLinear) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row."""
    scale, zero_point = getattr(linear, "weight_scale", None), getattr(linear, "weight_zero_point", None)
    if not isinstance(scale, Tensor) or not isinstance(zero_point, Tensor):
        raise ValueError("found no weight_scale or weight_zero_point, expected tensors: convert the observed LSTM again")
    rows, scheme = len(linear.weight), linear.weight_qscheme
    per_tensor = scheme == torch.per_tensor_affine and scale.numel() == zero_point.numel() == 1
    per_row = scheme == torch.per_channel_affine and linear.weight_axis_int == 0 and scale.shape == zero_point.shape == (rows,)
    if linear.weight_dtype not in _SHIFTS or not (per_tensor or per_row):
        raise ValueError(
            f"found a weight of {linear.weight_dtype}, {scheme}, axis {linear.weight_axis_int}, {scale.numel()} scales, "
            f"expected qint8 or quint8 with one scale, or one for each of {rows} rows: convert it with such an observer"
        )
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("found a weight_scale that is zero, negative or not finite, expected a step: convert it again")
    info = torch.iinfo(linear.weight_dtype)
    outside = zero_point[(zero_point < info.min) | (zero_point > info.max)]
    if outside.numel():
        raise ValueError(
            f"found a weight_zero_point of {outside.flatten()[0].item()}, expected one within {linear.weight_dtype}'s "
            f"[{info.min}, {info.max}]: convert it again"
        )
    return (
        scale.detach().to(torch.float32).reshape(-1).expand(rows).contiguous(),
        zero_point.detach().to(torch.int32).reshape(-1).expand(rows).contiguous(),
    )


def _limits(linear: ReferenceLinear, q: Tensor, zero_point: Tensor) -> tuple[int, int]:
    """The limits of the weight's grid: the module's own, or its dtype's where it has none or its integers pass them.

    Only the decomposed form clamps to its own; what ``prepare`` observed was brought within them before.
    """
    low, high = linear.weight_quant_min, linear.weight_quant_max
    info = torch.iinfo(linear.weight_dtype)
    if low is None or high is None:
        return info.min, info.max
    kept = all(bool(((low <= values) & (values <= high)).all()) for values in (q, zero_point))
    return (low, high) if linear.is_decomposed or kept else (info.min, info.max)

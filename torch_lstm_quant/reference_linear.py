"""Reads the weight that a converted cell's linear multiplies by: int8 values and their grid, or float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.reference import Linear as ReferenceLinear

from torch_lstm_quant.observed_grid import without_warning
from torch_lstm_quant.qparams import WeightQParams

_SHIFTS = {torch.qint8: 0, torch.quint8: 128}
"""What is taken off the integers of a weight's dtype to bring them, and the zero points, into int8."""


def read_linear(linear: nn.Module) -> tuple[Tensor, Tensor, WeightQParams | None]:
    """Weight ``[rows, K]``, int8, or float32 where it has no grid; bias float32 ``[rows]``; and the grid.

    Args:
        linear: ``nn.Linear``, or torch's reference ``Linear``, which holds a float weight and its qparams.

    Raises:
        ValueError: a weight that is not finite, that has no qparams, or whose grid int8 rows cannot hold.
    """
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]
    if not torch.isfinite(weight).all():
        raise ValueError(
            "found NaN or infinities in its weight, expected finite values: repair the model and convert it again"
        )
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()  # type: ignore[operator]
    if not isinstance(linear, ReferenceLinear):
        return weight, bias, None
    grid = _weight_grid(linear)
    with without_warning("torch.quantize_per_tensor, torch.quantize_per_channel"):
        dequantized = linear.get_weight().detach()
    steps = torch.round(dequantized / grid.scale[:, None])
    if not torch.equal(steps * grid.scale[:, None], dequantized):
        raise ValueError(
            "found a weight that its own qparams do not give, expected (q - zero_point) * scale: convert it again"
        )
    return (steps + grid.zero_point[:, None]).to(torch.int8), bias, grid


def _weight_grid(linear: ReferenceLinear) -> WeightQParams:
    scale, zero_point = getattr(linear, "weight_scale", None), getattr(linear, "weight_zero_point", None)
    if not isinstance(scale, Tensor) or not isinstance(zero_point, Tensor):
        raise ValueError("found no weight_scale or weight_zero_point, expected tensors: convert the observed LSTM again")
    dtype, scheme, rows = linear.weight_dtype, linear.weight_qscheme, len(linear.weight)
    per_channel = (
        scheme == torch.per_channel_affine and linear.weight_axis_int == 0 and scale.shape == zero_point.shape == (rows,)
    )
    per_tensor = scheme == torch.per_tensor_affine and scale.numel() == zero_point.numel() == 1
    if dtype not in _SHIFTS or not (per_channel or per_tensor):
        raise ValueError(
            f"found a weight of {dtype}, {scheme}, axis {linear.weight_axis_int}, with {scale.numel()} scales, expected qint8 "
            f"or quint8 with one scale or one for each of {rows} rows: convert it with such an observer"
        )
    shift, info = _SHIFTS[dtype], torch.iinfo(dtype)
    limits = [info.min, info.max]
    if linear.is_decomposed and linear.weight_quant_min is not None and linear.weight_quant_max is not None:
        limits = [linear.weight_quant_min, linear.weight_quant_max]
    return WeightQParams(
        scale.detach().to(torch.float32).reshape(-1).expand(rows).contiguous(),
        (zero_point.detach().to(torch.int32) - shift).reshape(-1).expand(rows).contiguous(),
        limits[0] - shift,
        limits[1] - shift,
    )

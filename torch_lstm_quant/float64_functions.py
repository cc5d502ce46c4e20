"""Sigmoid and tanh in float64 by additions, multiplications and divisions alone, so that every machine gives the same bits.

A math library's ``exp`` may differ in the last bit from one CPU to another; IEEE 754 fixes these operations to the bit. The
results are within 4 ulp of the exact functions (``tests/test_tables.py``), where a table needs 2**16 times less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# ln(2) in two parts, the first with so few bits that its product with any exponent is exact
_LN_2_HIGH = float.fromhex("0x1.62e42feep-1")
_LN_2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_DEGREE = 14
_SMALLEST = -708.0
"""The smallest argument whose exponential is a normal float64."""


def _exponential(y: Tensor) -> tuple[Tensor, Tensor]:
    """``2**n`` and ``p`` with ``exp(y) = 2**n * (1 + p)`` for float64 ``y <= 0``: a Taylor series on ``+-ln(2) / 2``."""
    y = y.clamp(min=_SMALLEST)
    n = torch.round(y / math.log(2))
    r = (y - n * _LN_2_HIGH) - n * _LN_2_LOW
    p = torch.zeros_like(r)
    for k in range(_DEGREE, 0, -1):
        p = (p + 1.0) * r / k
    return ((n.to(torch.int64) + 1023) << 52).view(torch.float64), p


def sigmoid(x: Tensor) -> Tensor:
    """Sigmoid of a finite float64 tensor."""
    power, p = _exponential(-x.abs())
    e = power * (p + 1.0)
    return torch.where(x >= 0, 1.0, e) / (1.0 + e)


def tanh(x: Tensor) -> Tensor:
    """Tanh of a finite float64 tensor."""
    power, p = _exponential(-2.0 * x.abs())
    m = power * p + (power - 1.0)  # exp(-2 |x|) - 1, without loss near zero
    return torch.copysign(-m / (2.0 + m), x)

"""Observers that torch.ao lacks: a range that is cut or widened, a grid that is given, and what stands around a whole LSTM."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization import MinMaxObserver
from torch.ao.quantization.observer import ObserverBase

from torch_lstm_quant.observed_grid import observer_of

FLAT = 12.0
"""Beyond +-12 sigmoid and tanh change by less than 2**-17: a range that ends there loses nothing on grids up to 16 bits."""


class CutMinMaxObserver(MinMaxObserver):
    """The range from the least to the greatest value seen, widened by ``headroom`` or cut at ``+-cut``.

    ``cut`` is for values that end in a sigmoid or tanh. The two projections are cut together, once both ranges are known
    (:func:`cut_projections`), as one may be large only to cancel the other.
    """

    def __init__(self, *args: Any, headroom: float = 1.0, cut: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.headroom = headroom
        self.cut = cut

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        low, high = self.min_val * self.headroom, self.max_val * self.headroom
        if self.cut is not None:
            low, high = low.clamp(-self.cut, self.cut), high.clamp(-self.cut, self.cut)
        return self._calculate_qparams(low, high)


def cut_projections(igates: torch.nn.Module | None, hgates: torch.nn.Module | None) -> None:
    """Cut each projection, of all gates or of one, at +-(12 + the greatest magnitude of the other).

    Beyond that its range can no longer matter to the sum.
    """
    observers = [observer_of(module) for module in (igates, hgates)]
    cuttable = [observer for observer in observers if isinstance(observer, CutMinMaxObserver)]
    if len(cuttable) == 2:
        largest = [max(-float(observer.min_val), float(observer.max_val)) for observer in cuttable]
        for observer, other in zip(cuttable, reversed(largest), strict=True):
            observer.cut = FLAT + other if math.isfinite(other) else None  # nothing was seen


class GivenGridObserver(ObserverBase):
    """A grid that is known beforehand, of an activation or of a weight, per tensor or per row.

    Args:
        scale: float32, ``[]`` or ``[rows]``.
        zero_point: an integer tensor of the same shape.
        quant_min, quant_max, dtype: as in any observer.
    """

    ch_axis = 0

    def __init__(self, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> None:
        super().__init__(dtype=dtype)
        self.qscheme = torch.per_channel_affine if scale.dim() else torch.per_tensor_affine
        self.scale, self.zero_point = scale, zero_point
        self.quant_min, self.quant_max = quant_min, quant_max

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point


_STATIC = torch.float8_e5m2
"""A dtype that torch.ao calls static and that no other layer has: one that reads the LSTM's output observes it for itself."""


class BoundaryObserver(ObserverBase):
    """Stands where ``prepare_fx`` puts observers around an LSTM, lets any object through, and carries its configuration.

    torch.ao swaps a custom module only where its qconfig promises static activations, and puts that qconfig's observer on
    every argument, tuples of states and None included. So this one names a static dtype until it has run, and ``float32``
    from then on, so that ``convert_fx`` takes it out again: quantization happens inside the LSTM.
    """

    def __init__(self, lstm_qconfig: Any = None, **_: Any) -> None:
        super().__init__(dtype=_STATIC)
        self.lstm_qconfig = lstm_qconfig

    def forward(self, x: Any) -> Any:
        self.dtype = torch.float32
        return x

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("the boundary of an LSTM has no qparams: run the prepared model on calibration data first")

"""From an observer's constructor to the grid that it found, with every grid that cannot be quantized to refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, FixedQParamsObserver, FusedMovingAvgObsFakeQuantize

from torch_lstm_quant.qparams import MAX_STEPS, UNBOUNDED

QUANTIZED_DTYPES = (torch.quint8, torch.qint8, torch.qint32)
"""Quantized with ``torch.quantize_per_tensor``, which saturates at the dtype's own limits."""

PLAIN_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32)
"""Quantized with ``torch.ops.quantized_decomposed.quantize_per_tensor``, which clamps to the grid's limits."""

WEIGHT_DTYPES = (torch.qint8, torch.int8)

Constructor = Callable[[], Any]
"""What ``SomeObserver.with_args(...)`` gives: called without arguments, it makes an observer or a fake quantize."""


@dataclass(frozen=True, eq=False)
class Grid:
    """What an observer found: scalars for an activation or a weight per tensor, one entry a row for a weight per channel.

    Args:
        scale: float32, ``[]`` or ``[rows]``.
        zero_point: int64, of the same shape.
        quant_min, quant_max: smallest and largest integer; the dtype's own where it is ``qint32`` without limits.
        dtype: of :data:`QUANTIZED_DTYPES` or :data:`PLAIN_DTYPES`.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    @property
    def narrow(self) -> bool:
        """Whether the limits are nearer than the dtype's own."""
        return (self.quant_min, self.quant_max) != _dtype_limits(self.dtype)

    def float_limits(self) -> tuple[Tensor, Tensor]:
        """The float32 values of ``quant_min`` and ``quant_max``."""
        return (self.quant_min - self.zero_point) * self.scale, (self.quant_max - self.zero_point) * self.scale


def observer_of(module: Any) -> Any:
    """The observer inside a fake quantize, or the observer itself."""
    return getattr(module, "activation_post_process", module)


def make_observer(constructor: Constructor | None, place: str, *, weight: bool = False) -> nn.Module | None:
    """The observer or fake quantize of a part, or None where it stays float32.

    Args:
        constructor: called without arguments; None, or one whose observer has dtype float32, leaves the part in float32.
        place: layer, direction and part, for messages.
        weight: whether the part is a weight, which may have a grid a row.

    Raises:
        TypeError: it is not a constructor, fails, or does not make a module.
        ValueError: what it makes cannot be honoured: its dtype, its scheme or its limits.
    """
    if constructor is None:
        return None
    if isinstance(constructor, nn.Module) or not callable(constructor):
        raise TypeError(f"{place}: needs a constructor such as MinMaxObserver.with_args(...), got {constructor!r}")
    try:
        module = constructor()
    except Exception as error:  # whatever it raises, the user needs to know where
        raise TypeError(f"{place}: its constructor failed: {error}") from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"{place}: its constructor must make an observer or fake quantize, got {module!r}")
    observer = observer_of(module)
    dtype = getattr(observer, "dtype", None)
    if dtype == torch.float32:
        return None
    allowed = WEIGHT_DTYPES if weight else QUANTIZED_DTYPES + PLAIN_DTYPES
    if dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in (*allowed, torch.float32))
        raise ValueError(
            f"{place}: {type(observer).__name__} has dtype {dtype}, needed one of {names} (uint16 is int32 with limits)"
        )
    has_limits = all(getattr(observer, limit, None) is not None for limit in ("quant_min", "quant_max"))
    if getattr(observer, "is_dynamic", False) or not hasattr(observer, "calculate_qparams") or not has_limits:
        raise ValueError(f"{place}: {type(observer).__name__} finds no static grid; use one such as MinMaxObserver")
    scheme = getattr(observer, "qscheme", torch.per_tensor_affine)
    if scheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric) and not (
        weight and scheme in (torch.per_channel_affine, torch.per_channel_symmetric) and observer.ch_axis == 0
    ):
        needed = "a per-tensor scheme, or a per-channel one with ch_axis=0" if weight else "a per-tensor scheme"
        raise ValueError(f"{place}: {type(observer).__name__} has {scheme}, needed {needed}")
    _limits(module, place)
    return module


def read_grid(module: Any, place: str) -> Grid:
    """The grid of a part that was observed.

    Raises:
        ValueError: the observer never ran, saw NaN or infinities, or gives an impossible grid.
    """
    _check_range(observer_of(module), place)
    quant_min, quant_max = _limits(module, place)
    scale, zero_point = (values.detach() for values in _qparams(module))
    scale, zero_point = scale.to(torch.float32), zero_point.to(torch.int64)
    if scale.numel() == 1:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    info = torch.finfo(torch.float32)
    # both the scale and its inverse must be normal float32 numbers, or quantizing loses bits or divides by zero
    usable = (scale >= info.tiny) & (scale <= 1 / info.tiny)
    if not usable.all():
        got = scale[~usable].flatten()[0].item()
        raise ValueError(
            f"{place}: its scale must be positive, finite, and a normal float32 as its inverse must be, got {got}"
        )
    if ((zero_point < quant_min) | (zero_point > quant_max)).any():
        got = zero_point[(zero_point < quant_min) | (zero_point > quant_max)].flatten()[0].item()
        raise ValueError(f"{place}: its zero_point must lie in [quant_min, quant_max] = [{quant_min}, {quant_max}], got {got}")
    return Grid(scale, zero_point, quant_min, quant_max, observer_of(module).dtype)


def _qparams(module: Any) -> tuple[Tensor, Tensor]:
    """Scale and zero point: of a fake quantize those with which it would quantize the next values."""
    # torch's fused one computes them otherwise than its observer
    if isinstance(module, FakeQuantize) and (isinstance(module, FusedMovingAvgObsFakeQuantize) or not module.observer_enabled):
        return module.scale, module.zero_point
    scale, zero_point = module.calculate_qparams()
    return scale, zero_point


def _dtype_limits(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return int(info.min), int(info.max)


def _limits(module: Any, place: str) -> tuple[int, int]:
    """``quant_min`` and ``quant_max`` of a grid of at most 16 bits, or of ``qint32`` without limits."""
    observer = observer_of(module)
    full = _dtype_limits(observer.dtype)
    limits = (int(observer.quant_min), int(observer.quant_max))
    # FixedQParamsObserver says 0..255 of every dtype where no limits are given, and quantize_per_tensor takes the dtype's
    if type(module) is FixedQParamsObserver and observer.dtype in QUANTIZED_DTYPES and limits == (0, 255):
        limits = full
    quant_min, quant_max = limits
    if not full[0] <= quant_min < quant_max <= full[1]:
        raise ValueError(
            f"{place}: quant_min must be less than quant_max, both within {observer.dtype}'s [{full[0]}, {full[1]}], "
            f"got {quant_min} and {quant_max}: give {type(observer).__name__} others"
        )
    # a scale that is given has a use for qint32 without limits; one that is derived from them has 32-bit steps
    unlimited = observer.dtype == torch.qint32 and limits == full and not hasattr(observer, "min_val")
    if quant_max - quant_min > MAX_STEPS and not unlimited:
        raise ValueError(
            f"{place}: a grid has at most 16 bits, got quant_min={quant_min}, quant_max={quant_max}: "
            f"give {type(observer).__name__} nearer ones"
        )
    if max(-quant_min, quant_max) > UNBOUNDED and not unlimited:
        raise ValueError(
            f"{place}: quant_min and quant_max must lie within +-2**23, got {quant_min} and {quant_max}: "
            f"give {type(observer).__name__} others"
        )
    return limits


def _check_range(observer: Any, place: str) -> None:
    """Refuse an observer that saw nothing, or NaN or infinities; one without a range has nothing to see."""
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if low is None or high is None:
        return
    if low.numel() == 0 or bool((low > high).any()):
        raise ValueError(
            f"{place}: its observer never ran, or its statistics were reset: run the prepared model on calibration data first"
        )
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError(f"{place}: its observer saw NaN or infinities: calibrate with finite data and weights")


@contextmanager
def without_warning(message: str) -> Iterator[None]:
    """Hide one warning of torch's, by the beginning of its message, that no user of ours can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield

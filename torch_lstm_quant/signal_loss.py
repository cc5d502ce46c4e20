"""What a part's grid would lose of the signal that calibration saw, said in words a user can act on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase

from torch_lstm_quant.cell_graph import OBSERVER, part_of
from torch_lstm_quant.observed_grid import read_grid
from torch_lstm_quant.observers import FLAT
from torch_lstm_quant.qparams import MAX_STEPS, QParams

LEAST_SQNR = 20.0
"""dB: a part that keeps less than this of its signal is warned of (8 bits over a normal signal's range keep about 40)."""

_RARE = 0.005
_OCTAVES = 96
_LOWEST = -64


class LossWarning(UserWarning):
    """A part's grid loses the signal that calibration saw, or calibration saw none that could give it a range."""


def watch(cell: nn.Module) -> nn.Module:
    """Count what each observer of a cell is shown, to tell afterwards what its grid loses."""
    for name, observer in cell.named_children():
        if name.startswith(OBSERVER) and not isinstance(observer, FakeQuantizeBase):
            observer.register_forward_pre_hook(SignalHistogram())
    return cell


def losses(cell: nn.Module, place: str) -> Iterator[str]:
    """What the grids of an observed cell lose, in words.

    Args:
        cell: from :func:`watch`, calibrated.
        place: LSTM, layer and direction, for the words.

    Raises:
        ValueError: an observer that gives an impossible grid.
    """
    for name, observer in cell.named_children():
        part = name.removeprefix(OBSERVER)
        for histogram in observer._forward_pre_hooks.values():
            if not isinstance(histogram, SignalHistogram):
                continue
            found = read_grid(observer, f"{place}, part {part}")
            if found.quant_max - found.quant_min > MAX_STEPS:
                continue  # a grid without limits
            grid = QParams(float(found.scale), int(found.zero_point), found.quant_min, found.quant_max)
            loss = _describe_single_value(part, observer, grid) or describe_loss(
                part, histogram, grid, _flat_beyond(part, observer)
            )
            if loss:
                yield f"{place}, {loss}"


def _flat_beyond(part: str, observer: nn.Module) -> float:
    """The magnitude beyond which a part's values make no difference to what reads them."""
    cut = getattr(observer, "cut", None)
    if cut is not None:
        return float(cut)
    return FLAT if part_of(part) in ("gates", "tanh_cy_input") else math.inf


def _describe_single_value(part: str, observer: nn.Module, grid: QParams) -> str | None:
    """What is wrong with a range that was found from one value; None where there were more, or the range was given.

    Inside a cell only zeros count: a small cell may well have shown a part one value, but on a range around 0 everything else
    is lost. (Before the first step all states are 0, so that without states one step shows nothing else.)
    """
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if low is None or high is None or low.numel() != 1 or not torch.equal(low, high):
        return None
    if part == "x":
        advice = "Calibrate with typical input"
    elif not low:
        advice = f"Calibrate with typical input, of more than one step or with states, or set {part}=None (float32)"
    else:
        return None
    return f"part {part}: calibration saw no value but {float(low):g}, and all others are cut off on {grid}. {advice}"


class SignalHistogram:
    """Counts and energies of a part's nonzero values by octave of magnitude: a forward pre-hook of its observer."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_OCTAVES, dtype=torch.float64)
        self.energies = torch.zeros(_OCTAVES, dtype=torch.float64)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        values = args[0].detach().flatten()
        values = values[values != 0].double()
        octaves = (torch.frexp(values).exponent - _LOWEST).clamp(0, _OCTAVES - 1)
        self.counts += torch.bincount(octaves, minlength=_OCTAVES)
        self.energies += torch.bincount(octaves, weights=values * values, minlength=_OCTAVES)

    def sqnr(self, grid: QParams, flat: float = math.inf) -> float:
        """Estimated signal to noise ratio in dB on ``grid``: rounding noise of ``scale**2 / 12``, small values lost whole.

        Values beyond ``+-flat`` count as ``flat``: what reads them makes no difference between the two.
        """
        magnitudes = torch.sqrt(self.energies / self.counts.clamp(min=1)).clamp(max=flat)
        energies = self.counts * magnitudes**2
        signal = float(energies.sum())
        if not signal:
            return math.inf
        largest = max(abs(limit) for limit in grid.range)
        noise = self.counts * (grid.scale**2 / 12 + (magnitudes - largest).clamp(min=0) ** 2)
        return 10 * math.log10(signal / float(torch.where(self._rounded_to_zero(grid.scale), energies, noise).sum()))

    def without_rare(self) -> SignalHistogram:
        """Without the octaves of the greatest values that together hold ``_RARE`` of all values, or fewer."""
        usual = self.counts.cumsum(0) <= self.counts.sum() * (1 - _RARE)
        if not self.counts[usual].sum():
            return self
        histogram = SignalHistogram()
        histogram.counts, histogram.energies = self.counts * usual, self.energies * usual
        return histogram

    def fraction_rounded_to_zero(self, grid: QParams) -> float:
        """How many of the nonzero values are less than half a step of ``grid``, from 0 to 1."""
        total = float(self.counts.sum())
        return float(self.counts[self._rounded_to_zero(grid.scale)].sum()) / total if total else 0.0

    def median(self) -> float:
        """A power of two within a factor of 2 of the median magnitude of the nonzero values."""
        index = int(torch.searchsorted(self.counts.cumsum(0), self.counts.sum() / 2))
        return 2.0 ** (index + _LOWEST)

    @staticmethod
    def _rounded_to_zero(scale: float) -> Tensor:
        # an octave's values lie in [2**(e - 1), 2**e)
        return torch.ldexp(torch.ones(_OCTAVES, dtype=torch.float64), torch.arange(_OCTAVES) + _LOWEST) <= scale / 2


def describe_loss(part: str, histogram: SignalHistogram, grid: QParams, flat: float = math.inf) -> str | None:
    """What ``grid`` loses of the part's signal and what to set instead, or None where it keeps enough.

    ``flat`` is the magnitude beyond which the part's values make no difference.
    """
    if part == "x":
        fraction = histogram.fraction_rounded_to_zero(grid)
        if fraction > 0.5:
            below = 20 * math.log10(grid.scale / 2 / histogram.median())
            return (
                f"part x: {fraction:.0%} of its values are rounded to zero on {grid}; its median magnitude of about "
                f"{histogram.median():.2g} lies {below:.0f} dB below half a step. Keep this layer's input projection in "
                "float32: x=None, weight_ih=None"
            )
    # a few great inputs must not outweigh all others; of what is computed inside, they may be all that matters
    sqnr = (histogram.without_rare() if part == "x" else histogram).sqnr(grid, flat)
    if sqnr >= LEAST_SQNR:
        return None
    remedy = (
        "x=None, weight_ih=None (float32)"
        if part == "x"
        else f"a grid of more bits or a nearer range, or {part}=None (float32)"
    )
    return f"part {part}: keeps {sqnr:.1f} dB of its signal on {grid}, less than {LEAST_SQNR:.0f}. Set {remedy}"

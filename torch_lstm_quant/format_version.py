"""The version of what fused modules save, in state dicts and in pickles."""

from __future__ import annotations

from importlib.metadata import version

from torch import Tensor

FORMAT_VERSION = 1
"""Raised when an older package could not read what is saved. What was saved before there were numbers counts as 0."""


def format_problem(found: object) -> str | None:
    """What is wrong with the format version of something that was saved, and what to do; None if it can be loaded."""
    if isinstance(found, Tensor):
        if found.is_meta:
            return f"the format version must be an integer from 0 to {FORMAT_VERSION}, got a tensor on the meta device"
        found = found.item() if found.numel() == 1 else found.tolist()
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        return f"the format version must be an integer from 0 to {FORMAT_VERSION}, got {found!r}"
    if found > FORMAT_VERSION:
        return (
            f"the format version must be at most {FORMAT_VERSION} for this torch_lstm_quant ({version('torch_lstm_quant')}), "
            f"got {found}: it was saved by a newer one, so update the package where it is loaded"
        )
    return None

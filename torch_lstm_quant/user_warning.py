"""Warnings that name the user's line, however many calls of this package and of torch lie in between."""

from __future__ import annotations

import sys
import warnings

_PACKAGES = ("torch_lstm_quant", "torch", "torchao", "typing_extensions", "warnings", "_py_warnings")
"""The last three have the wrapper around what torch has marked as deprecated, each in some versions of Python."""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the nearest caller that is in none of ``_PACKAGES``, nor without a name, as the code that torch.fx writes."""
    # from Python 3.12 on, skip_file_prefixes would do
    frame, level = sys._getframe(1), 2
    while frame.f_back and str(frame.f_globals.get("__name__") or "torch").partition(".")[0] in _PACKAGES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)

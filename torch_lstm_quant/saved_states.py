"""States of a stream as plain data, which ``torch.save`` and ``pickle`` take, with what they belong to."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_lstm_quant.call_forms import States
from torch_lstm_quant.cell import Cell

FORMAT = 1
_KEYS = ("format", "module", "h", "c")
_MOST_NAMED = 5  # of the keys that should not be there


def fingerprint(layers: Sequence[Sequence[Cell]]) -> str:
    """What tells cells from others that compute something else: the SHA-256 of their grids, weights and biases, in hex."""
    digest = hashlib.sha256()
    _add("cells", layers, digest)
    return digest.hexdigest()


def save(module: str, states: States) -> dict[str, Any]:
    """``states`` of the module with that fingerprint: what :func:`load` reads."""
    return dict(zip(_KEYS, (FORMAT, module, *states), strict=True))


def load(saved: object, module: str) -> tuple[object, object]:
    """``h`` and ``c`` of what :func:`save` made for the module with that fingerprint; they are yet to be checked.

    Raises:
        TypeError: no dict.
        ValueError: a part is missing or is more than there should be, a newer format, or another module's.
    """
    if not isinstance(saved, dict):
        raise TypeError(f"saved must be a dict that save() made, got {type(saved).__name__}")
    missing = [key for key in _KEYS if key not in saved]
    if missing:
        raise ValueError(f"saved must have all that save() puts there, {', '.join(_KEYS)}, got no {', '.join(missing)}")
    if type(saved["format"]) is not int or saved["format"] != FORMAT:
        advice = "restore it with the version of torch_lstm_quant that saved it, or a newer one"
        raise ValueError(f"saved must have format {FORMAT}, got {saved['format']!r}: {advice}")
    more = [key for key in saved if key not in _KEYS]
    if more:
        rest = len(more) - _MOST_NAMED
        got = ", ".join(map(repr, more[:_MOST_NAMED])) + (f" and {rest} more" if rest > 0 else "")
        raise ValueError(f"saved must have only what save() puts there, {', '.join(_KEYS)}, got {got} too")
    if saved["module"] != module:
        raise ValueError(
            f"saved must be of a module with the same grids, weights and biases as the stream's, of SHA-256 {module[:12]}, "
            f"got the state of another, {str(saved['module'])[:12]}: restore it in a stream of that one"
        )
    return saved["h"], saved["c"]


def _add(name: str, value: object, digest: Any) -> None:
    """Feeds what ``value`` is made of, by name. What is None leaves no trace, so that a later version can have more parts."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        if plain.numel():
            digest.update((ctypes.c_char * plain.nbytes).from_address(plain.data_ptr()))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _add(f"{name}.{field.name}", getattr(value, field.name), digest)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _add(f"{name}.{i}", item, digest)
    elif value is not None:
        digest.update(f"{name} {value!r}\n".encode())

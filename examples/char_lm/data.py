"""Text that every machine with Python has: the sources of its standard library, as indices of a fixed alphabet."""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

ALPHABET = "\n\t" + "".join(chr(code) for code in range(32, 127))
"""The characters that the model knows, in the order of their indices; every other character reads as "?"."""

_LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data")
"""Folders without program text of the standard library's own: tests, installed packages, generated tables."""

_INDICES = torch.full((256,), ALPHABET.index("?"))
_INDICES[torch.tensor([ord(character) for character in ALPHABET])] = torch.arange(len(ALPHABET))


def encode(text: str) -> Tensor:
    """Indices ``[len(text)]`` of the text's characters."""
    return _INDICES[torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()]


def decode(indices: Tensor) -> str:
    return "".join(ALPHABET[index] for index in indices.tolist())


def source_files(held_out: bool) -> list[Path]:
    """The library's source files: the tenth that is held out from training, or the rest.

    Which file is which depends on its name alone, so that a file is held out in every version of Python or in none.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if set(name.parts).isdisjoint(_LEFT_OUT) and not name.name.startswith("_sysconfigdata"):
            order = zlib.crc32(name.as_posix().encode())
            if (order % 10 == 0) == held_out:
                files.append((order, path))
    return [path for _, path in sorted(files)]


def read(files: list[Path]) -> Tensor:
    """All files, one after the other, as indices."""
    return encode("".join(path.read_text("utf-8", "replace") for path in files))


def streams(text: Tensor, count: int) -> Tensor:
    """``count`` equal pieces of a text beside each other, ``[len(text) // count, count]``; the odd rest is dropped."""
    length = len(text) // count
    return text[: length * count].reshape(count, length).T


def held_out(count: int, length: int) -> Tensor:
    """``[length, count]``: streams of text that the model was not trained on."""
    return streams(read(source_files(held_out=True)), count)[:length]


def calibration_batches() -> list[Tensor]:
    """Four batches of 64 streams of 64 characters of the text that the model was trained on."""
    text = streams(read(source_files(held_out=False)), 4 * 64)[:64]
    return list(text.split(64, dim=1))

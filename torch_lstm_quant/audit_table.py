"""An audit as text: a table, and the reasons below it or in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_lstm_quant.audit import AuditedCell, AuditedModule

_NOTHING = "no LSTM, GRU or RNN"
_COLUMNS = ("module", "class", "stage", "kernel", "input sums", "hidden sums")


def as_text(modules: Sequence[AuditedModule]) -> str:
    """A table, and below it what is to be said of each module."""
    if not modules:
        return _NOTHING
    rows = [_COLUMNS, *map(_row, modules)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for module in modules:
        notes = list(_notes(module))
        if notes:
            lines += ["", f"{_name(module)}:", *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def as_markdown(modules: Sequence[AuditedModule]) -> str:
    """A table with the notes in its last column."""
    if not modules:
        return _NOTHING
    columns = (*_COLUMNS, "notes")
    rows = [columns, ("---",) * len(columns), *((*_row(module), "<br>".join(_notes(module))) for module in modules)]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)


def _row(module: AuditedModule) -> tuple[str, ...]:
    sums = [(cell.input_sums, cell.hidden_sums) for cell in module.cells]
    return (
        _name(module),
        module.kind.rpartition(".")[2],
        module.stage,
        module.isa or "-",
        _distinct(one for one, _ in sums),
        _distinct(one for _, one in sums),
    )


def _name(module: AuditedModule) -> str:
    return " = ".join(path or "(the model)" for path in (module.path, *module.also_at))


def _distinct(words: Iterable[str | None]) -> str:
    """Words in the order of the cells, each once."""
    return "/".join(dict.fromkeys(word for word in words if word)) or "-"


def _notes(module: AuditedModule) -> Iterator[str]:
    if module.why:
        yield f"not fused: {module.why}"
        yield f"to fuse it: {module.to_fuse}"
    float_parts = {cell: ", ".join(cell.float_parts) for cell in module.cells}
    slowed_by = {cell: "; ".join(cell.slowed_by) for cell in module.cells}
    yield from _by_cell(float_parts, "no grid, so float32: ")
    yield from _by_cell(slowed_by, "")


def _by_cell(words: dict[AuditedCell, str], prefix: str) -> Iterator[str]:
    """What is said of each cell, once where it is the same of all."""
    if len(set(words.values())) == 1:
        words = {cell: said for cell, said in list(words.items())[:1] if said}
        yield from (f"{prefix}{said}" for said in words.values())
    else:
        yield from (f"layer {cell.layer}, {cell.direction}: {prefix}{said}" for cell, said in words.items() if said)

"""The picture of the error of each part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from torch_lstm_quant.qparams import CellQParams

LABELS = {
    "x": "x",
    "igates": "igates:  W x + b",
    "hgates": "hgates:  W h + b",
    "gates": "gates:  their sum",
    "input_gate": "input_gate",
    "forget_gate": "forget_gate",
    "cell_gate": "cell_gate",
    "output_gate": "output_gate",
    "fgate_cx": "fgate_cx:  f c",
    "igate_cgate": "igate_cgate:  i g",
    "fgate_cx_igate_cgate": "cell state",
    "tanh_cy_input": "tanh_cy_input",
    "tanh_cy": "tanh_cy",
    "ogate_cy": "hidden state",
}
"""The parts in order of computation, as the picture names them."""

AXIS = """signal to noise against float32, dB (6 dB: half the error)
gates and tanh_cy_input are cut where sigmoid and tanh are flat, at ±12 and ±10"""

COLORS = ("#1f6f8b", "#e07a3f")
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def draw(results: Mapping[str, tuple[Mapping[str, float], CellQParams]], path: Path) -> None:
    """A picture of the signal-to-noise ratio of each part under two configurations, and how many bits each part has.

    Args:
        results: for the name of each configuration its ratios in dB and its grids.
        path: a PNG file, in a folder that exists.
    """
    with mpl.rc_context({"font.size": 10, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(9, 7.2), dpi=150, layout="constrained")
        height = 0.8 / len(results)
        for index, ((name, (ratios, qparams)), color) in enumerate(zip(results.items(), COLORS, strict=True)):
            for row, part in enumerate(LABELS):
                y = row + (index - 0.5) * height
                axes.barh(y, ratios[part], height * 0.92, color=color, label=name if row == 0 else None)
                axes.text(ratios[part] + 0.6, y, f"{ratios[part]:.1f}", va="center", fontsize=8.5, color=color, bbox=ON_WHITE)
                axes.text(0.8, y, _width(qparams, part), va="center", fontsize=7.5, color="white")
        axes.set_yticks(range(len(LABELS)), LABELS.values())
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.margins(x=0.08, y=0.01)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(AXIS, linespacing=1.5)
        axes.set_title("How exact each part of the quantized cell is, in order of computation", loc="left", pad=26)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=2, frameon=False, borderaxespad=0.2)
        figure.savefig(path)
        plt.close(figure)


def _width(qparams: CellQParams, part: str) -> str:
    """The bits of a part, in words."""
    grid = qparams.tanh_input if part == "tanh_cy_input" else getattr(qparams, part)
    grid = grid[0] if isinstance(grid, tuple) else grid
    return f"{grid.bits} bit" if grid else "float32"

"""The table of widths: which code computes a projection, a function or another part, by its grids and the instruction set.

What the packer chose is read from packed cells; what an instruction set does with it is written down once, in :data:`ISAS`,
beside the lines of C++ that say so, which the tests look up.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_lstm_quant import ops
from torch_lstm_quant.cell import Cell
from torch_lstm_quant.qparams import GATES, PARTS, WEIGHTS, CellQParams, QParams, WeightQParams

CORE = Path(__file__).parents[1] / "csrc"


@dataclass(frozen=True)
class Isa:
    """What the kernels of an instruction set do.

    Args:
        title: for the table.
        int8, wide, float: how they sum the three kinds of projections of ``ops.sums``.
        parts: how they compute everything else.
        evaluators, segments: whether they take these in place of tables.
        lookup: how they read a table.
        sources: lines of C++ that say so, by file.
    """

    title: str
    int8: str
    wide: str
    float: str
    parts: str
    evaluators: bool
    segments: bool
    lookup: str
    sources: dict[str, tuple[str, ...]]


_AVX2 = {
    "kernels/simd_avx2.h": ("kLanes = 8;", "kHasSegments = false;", "_mm256_madd_epi16(a, b)", "_mm256_i32gather_epi32"),
}
_AVX512 = {
    "kernels/simd_avx512.h": (
        "kLanes = 16;",
        "kHasSegments = true;",
        "_mm512_dpwssd_epi32(sum, a, b)",
        "_mm512_i32gather_epi32",
    ),
}
_VECTORS = {
    "kernels/wide-inl.h": (
        "V::add_pairs(sum.recent, operand.even, weights.even)",
        "V::join_parts(sum.high, sum.low)",
        "if (projection.depth > kMaxWideDepth) return;",
    ),
    "kernels/steps-inl.h": (
        "return {name, rates, quantize, project, step, scratch_bytes, list_changes, evaluate, kProjectsAhead};",
    ),
}


def _vector(title: str, int8: str, wide: str, sources: dict[str, tuple[str, ...]], *, lanes: int, segments: bool) -> Isa:
    """An instruction set with vectors of ``lanes`` floats."""
    floats, parts = f"float32, {lanes} outputs at a time", f"float32, {lanes} units at a time"
    return Isa(title, int8, wide, floats, parts, True, segments, "gathers", _VECTORS | sources)


ISAS = {
    "scalar": Isa(
        "scalar",
        "int32",
        "int64",
        "float32",
        "float32",
        False,
        False,
        "look-ups",
        {
            "kernels/scalar_sums.cpp": (
                "int32_t dot = 0;",
                "int64_t totals[kBlock] = {};",
                "sums[i] + operand[k] * weights[i]",
            ),
            "kernels/scalar.cpp": ("kHasSegments = false;", "list_changes, nullptr"),
        },
    ),
    "avx2": _vector(
        "AVX2",
        "`vpmaddubsw`, `vpmaddwd`, 256 bits (1)",
        "`vpmaddwd`, 256 bits (2)",
        _AVX2
        | {
            "kernels/masked_avx2.h": ("_mm256_maddubs_epi16(operand.magnitude",),
            "kernels/signed_avx2.h": ("_mm256_maddubs_epi16(weights.first, operand.first)",),
            "kernels/avx2.cpp": ("write<SignedPairs>", "write<MaskedPairs>", "Wide = WideSums<WideDot<Avx2", '"avx2"'),
        },
        lanes=8,
        segments=False,
    ),
    "avx_vnni": _vector(
        "AVX-VNNI",
        "`vpdpbusd`, 256 bits",
        "`vpmaddwd`, 256 bits (2)",
        _AVX2 | {"kernels/avx_vnni.cpp": ("_mm256_dpbusd_avx_epi32(sum", "Wide = WideSums<WideDot<Avx2", '"avx_vnni"')},
        lanes=8,
        segments=False,
    ),
    "avx512_vnni": _vector(
        "AVX-512 VNNI",
        "`vpdpbusd`, 512 bits",
        "`vpdpwssd`, 512 bits (2)",
        _AVX512 | {"kernels/avx512_vnni.cpp": ("_mm512_dpbusd_epi32(sum", "Wide = WideSums<WideDot<Avx512", '"avx512_vnni"')},
        lanes=16,
        segments=True,
    ),
}


def grid(bits: int, largest: float, zero_point: int = 0) -> QParams:
    """A signed grid that reaches about ``+-largest``."""
    half = 1 << bits - 1
    return QParams(largest / (half - 0.5), zero_point, -half, half - 1)


def weight_grid(zero_point: int = 0, rows: int = 64) -> WeightQParams:
    return WeightQParams(torch.full((rows,), 0.01), torch.full((rows,), zero_point, dtype=torch.int32))


DEEP = (1 << 31) // (255 * 128) + 1
"""The depth from which an int32 sum of 8-bit products could overflow."""

MAX_WIDE_DEPTH = (1 << 15) - 1
"""The depth up to which vectors take wide sums: kMaxWideDepth."""

PROJECTIONS: dict[str, tuple[str, QParams | None, WeightQParams | None, int]] = {
    "up to 8 bits | 2 to 8 bits, zero points 0": ("int8", grid(8, 2.0, 3), weight_grid(), 40),
    "up to 8 bits | 2 to 8 bits, other zero points": ("wide", grid(8, 2.0), weight_grid(5), 40),
    f"up to 8 bits, K of {DEEP} or more | 2 to 8 bits": ("wide", QParams(0.01, 0, 0, 255), weight_grid(), DEEP),
    "9 to 16 bits | 2 to 8 bits, any zero points": ("wide", grid(9, 2.0), weight_grid(), 40),
    "float32 | 2 to 8 bits (dequantized when packed)": ("float", None, weight_grid(5), 40),
    "any grid | float32": ("float", grid(16, 2.0), None, 40),
    "float32 | float32": ("float", None, None, 40),
}
"""Operand and weights of a projection: the sums that they get, an example, and its depth."""

_FINE = QParams(2**-15, 0, 0, 1 << 15)
_UNIT = QParams(1 / 32767, 0, -32767, 32767)
FUNCTIONS: dict[str, tuple[QParams | None, QParams | None]] = {
    "12 bits, ±12, for tanh ±10 too | steps of 2^-15, as in `int8()`": (QParams(12 / 2047, 0, -2048, 2047), _FINE),
    "16 bits, ±12, for tanh ±10 too | steps of 1/32767, as in `int8_gates16()`": (
        QParams(12 / 32767, 0, -32768, 32767),
        _UNIT,
    ),
    "up to 12 bits, any other | any grid": (grid(8, 5.0, 3), grid(8, 1.0)),
    "13 to 16 bits, any other | any grid": (grid(14, 5.0, 3), grid(8, 1.0)),
    "any grid | float32": (grid(8, 5.0), None),
    "float32 | any grid, or float32": (None, grid(8, 1.0)),
}
"""Grids of what a function reads and of what it gives, and an example of each kind, as the input gate's sigmoid has it."""

READ_BY_FUNCTIONS = ("gates", "tanh_cy_input")
GIVEN_BY_FUNCTIONS = (*GATES, "tanh_cy")
ELSEWHERE = [part for part in PARTS if part not in ("x", "hx", *READ_BY_FUNCTIONS, *GIVEN_BY_FUNCTIONS)]
"""Parts that are added and multiplied."""


def packed(qparams: CellQParams, depth: int = 4) -> torch.Tensor:
    """A packed cell of 16 hidden units."""
    dtypes = [torch.float32 if one is None else torch.int8 for one in (qparams.weight_ih, qparams.weight_hh)]
    weights = [torch.zeros(64, columns, dtype=dtype) for columns, dtype in zip((depth, 16), dtypes, strict=True)]
    return ops.pack([[Cell(qparams, *weights, torch.zeros(64), torch.zeros(64))]])


def sums_of(row: str) -> str:
    """How the packer sums an example of :data:`PROJECTIONS`."""
    _, operand, weights, depth = PROJECTIONS[row]
    return ops.sums(packed(CellQParams(x=operand, weight_ih=weights), depth))[0][0]


@dataclass(frozen=True)
class Evaluation:
    """What the packer found for a function: its table's entries, and what gives the same values without it."""

    entries: str
    evaluator: bool
    segments: bool


def evaluation_of(read: QParams | None, given: QParams | None, *, tanh: bool = False) -> Evaluation | None:
    """What the packer finds for the input gate's sigmoid, or the cell gate's tanh, of these grids; None without a table."""
    blob = bytes(packed(CellQParams(gates=(read,) * 4, input_gate=given, cell_gate=given)).numpy())
    header = (CORE / "blob.h").read_text()
    (sizes,) = re.findall(r"struct Sizes \{(.*?)\n\n", header, re.DOTALL)
    functions = re.search(r"FunctionRecord functions\[kGates \+ 1\];\n\};", header)
    assert functions, "the functions are the last in a CellRecord"
    begin = 32 + 8 * sizes.count("int64_t") + struct.unpack_from("<I", blob, 12)[0]
    form, evaluator, _, segments = struct.unpack_from("<IIQQ", blob, begin - (3 if tanh else 5) * 24)
    return Evaluation(["", "float32", "uint16"][form], evaluator != 0, segments != 0) if form else None


def evaluated(isa: Isa, found: Evaluation | None) -> str:
    """How an instruction set evaluates a function."""
    if found is None:
        return "float64, one value at a time"
    if isa.segments and found.segments:
        return "polynomials over 32 pieces (3)"
    if isa.evaluators and found.evaluator:
        return "evaluated without a table (3)"
    return f"{isa.lookup} in a {found.entries} table"


def summed(isa: Isa, row: str) -> str:
    """How an instruction set sums a projection."""
    text: str = getattr(isa, sums_of(row))
    too_deep = sums_of(row) == "wide" and PROJECTIONS[row][3] > MAX_WIDE_DEPTH
    return f"{ISAS['scalar'].wide}, scalar code" if too_deep and isa is not ISAS["scalar"] else text


def table() -> str:
    """The table as the docs show it."""
    titles = [isa.title for isa in ISAS.values()]
    parts, weights = (", ".join(f"`{name}`" for name in names) for names in (ELSEWHERE, WEIGHTS))
    lines = [f"| operand (`x`, `hx`, with `proj_size` `ogate_cy`) | weights ({weights}) | {' | '.join(titles)} |"]
    lines += ["| --- " * (2 + len(titles)) + "|"]
    lines += [f"| {row} | {' | '.join(summed(isa, row) for isa in ISAS.values())} |" for row in PROJECTIONS]
    lines += ["", f"| sigmoid, tanh: input | output | {' | '.join(titles)} |", "| --- " * (2 + len(titles)) + "|"]
    for row in FUNCTIONS:
        found = evaluation_of(*FUNCTIONS[row])
        lines.append(f"| {row} | {' | '.join(evaluated(isa, found) for isa in ISAS.values())} |")
    lines += ["", f"| all other parts | grid | {' | '.join(titles)} |", "| --- " * (2 + len(titles)) + "|"]
    lines += [f"| {parts} | float32, or any grid | {' | '.join(isa.parts for isa in ISAS.values())} |", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

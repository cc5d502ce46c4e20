"""The least time that a call could take on this machine, from what ``calibrate.cpp`` measures: a bound, not a goal.

It is the larger of two times: that of reading the int8 weights, and that of the multiply-accumulates at the integer peak.
Functions and calls are free. Hidden weights are read again at each step, at the rate of the cache that holds them, input
weights once a call; rows share them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from shapes import Shape

SOURCE = Path(__file__).with_name("calibrate.cpp")
PROGRAM = SOURCE.parent.parent / "build" / "calibrate"


class Floor:
    """What the CPU can do at most: ``macs`` multiply-accumulates/s by thread count, ``reads`` bytes/s by that and size."""

    def __init__(self, measured: dict[str, Any]) -> None:
        self.measured = measured

    @staticmethod
    def measure(threads: Sequence[int]) -> Floor | None:
        """Builds and runs ``calibrate.cpp``; None, with the reason printed, where that is not possible."""
        try:
            PROGRAM.parent.mkdir(exist_ok=True)
            compiler = os.environ.get("CXX", "g++")
            subprocess.run([compiler, "-O2", "-std=c++17", "-pthread", str(SOURCE), "-o", str(PROGRAM)], check=True)
            output = subprocess.run([PROGRAM, *map(str, threads)], check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no floor is reported, as calibrate.cpp does not build or run here: {error}")
            return None
        return Floor(json.loads(output))

    def seconds(self, shape: Shape, threads: int) -> float:
        hidden = shape.hidden_weights() * shape.directions
        inputs = [4 * shape.H * size * shape.directions for size in shape.input_sizes()]
        everything = shape.layers * hidden + sum(inputs)
        # in a sequence the hidden weights of one layer stay near; one step goes through all weights before it meets any again
        again = hidden / max(threads, shape.directions) if shape.T > 1 else everything / threads
        reading = shape.T * shape.layers * hidden / self._read_rate(threads, again)
        reading += sum(inputs) / self._read_rate(threads, everything / threads)
        return max(reading, shape.multiply_accumulates() / float(self.measured["macs"][str(threads)]))

    def _read_rate(self, threads: int, size: float) -> float:
        """Bytes/s of all threads where each reads ``size`` bytes again and again, between the two sizes measured around it."""
        points = sorted((int(size), float(rate)) for size, rate in self.measured["reads"][str(threads)].items())
        for (small, fast), (large, slow) in pairwise(points):
            if size <= large:
                share = math.log(max(size, small) / small) / math.log(large / small)
                return fast + share * (slow - fast)
        return points[-1][1]

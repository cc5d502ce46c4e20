"""A process that times one system at one thread count; ``bench.py`` starts it and talks to it.

It reads commands from standard input and answers on standard output, one JSON object a line: ``{"load": shape name}`` gives
the system's accuracy on a shape, ``{"time": true}`` a sample of its time there.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers import ALL_SYSTEMS
from shapes import SHAPES, Case

BLOCK_SECONDS = 2e-3
"""A sample is the mean of a block of calls of at least about this long."""


class Row:
    """One system on one shape: what is called, and how often a sample calls it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.calls = 1
        with _undisturbed():
            seconds = self._block(1)
            while seconds < BLOCK_SECONDS:
                self.calls = max(self.calls + 1, math.ceil(self.calls * BLOCK_SECONDS / max(seconds, 1e-6)))
                seconds = min(self._block(self.calls), self._block(self.calls))

    def sample(self) -> dict[str, float]:
        """Seconds a call, and the share of the time in which other programs had the CPU."""
        with _undisturbed():
            if self.calls > 1:
                self._block(self.calls // 2)  # wakes the threads, fills the caches
            waited = _waited_for_cpu()
            seconds = self._block(self.calls)
            waited = _waited_for_cpu() - waited
        return {"seconds": seconds / self.calls, "waited": waited / seconds}

    def _block(self, calls: int) -> float:
        with torch.inference_mode():
            started = time.perf_counter()
            for _ in range(calls):
                self.call()
            return time.perf_counter() - started


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Real-time scheduling, which only root may ask for: other programs do not get the CPU meanwhile."""
    _schedule(os.SCHED_RR, 1)
    yield
    _schedule(os.SCHED_OTHER, 0)


def _schedule(policy: int, priority: int) -> None:
    """Of all threads of this process."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(PermissionError, ProcessLookupError):  # a runtime that was just left may be ending threads
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


def _waited_for_cpu() -> float:
    """The seconds for which this process's threads were ready to run but others were running."""
    tasks = Path("/proc/self/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[1]) for task in tasks) / 1e9


def load(system: str, name: str, threads: int) -> tuple[Row, float | None]:
    """A system on a shape, and the signal-to-noise ratio of its output to float32's, in dB; None: they are equal."""
    torch.set_num_threads(1)  # calibration consists of small ops: threads would only wait for one another
    case = Case(SHAPES[name])
    call = ALL_SYSTEMS[system].make(case, threads)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        sqnr = case.sqnr(call()[0])
    return Row(call), sqnr


def answers(system: str, threads: int, commands: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    row = None
    for command in commands:
        try:
            if "load" in command:
                row = None
                gc.collect()
                row, sqnr = load(system, command["load"], threads)
                yield {"sqnr_db": sqnr}
            elif row:
                yield row.sample()
        except Exception as error:  # the report says what failed, and the other systems go on
            yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    system, threads = sys.argv[1], int(sys.argv[2])
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    gc.disable()
    for answer in answers(system, threads, map(json.loads, sys.stdin)):
        channel.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

"""Times LSTM systems side by side in one interleaved run: see README.md beside this file.

python benchmarks/bench.py --cases step_512,t100_512 --threads 1 --json result.json
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from floor import Floor
from peers import ALL_SYSTEMS, COMPARED
from shapes import QUICK, SHAPES
from systems import SYSTEMS

ROUNDS, QUICK_ROUNDS = 30, 8
MIN_SAMPLES = 3
SECONDS = 1.5
"""Of samples, after which a slow system has enough of them on a shape."""
MAX_WAITED = 0.02
"""The share of a sample's time in which other programs may have had the CPU; beyond it the sample is thrown away."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


class Worker:
    """A process that runs one system on as many CPUs as it has threads.

    It is stopped while it is not asked: some runtimes' threads spin for 0.1 s after a call, on the next system's CPUs.
    """

    def __init__(self, system: str, threads: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        libc = ctypes.CDLL(None)

        def prepare() -> None:
            os.sched_setaffinity(0, cpus)  # before it loads any library, so that none can use more
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped, it would not see that this process has ended

        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), system, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            preexec_fn=prepare,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]
        except (BrokenPipeError, json.JSONDecodeError):
            return {"error": f"the process died with exit status {self.process.wait()}"}
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.communicate()


class Samples:
    """Those of one system on one shape."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.disturbed: list[float] = []
        self.spent = 0.0

    def add(self, seconds: float, waited: float, spent: float) -> None:
        (self.disturbed if waited > MAX_WAITED else self.seconds).append(seconds)
        self.spent += spent

    def enough(self, rounds: int) -> bool:
        count = len(self.seconds) + len(self.disturbed)
        return len(self.seconds) >= rounds or count >= 3 * rounds or (self.spent > SECONDS and count >= MIN_SAMPLES)

    def figures(self) -> dict[str, Any]:
        # where hardly any sample was left in peace, all of them say more
        contended = len(self.seconds) < MIN_SAMPLES
        used = self.seconds + self.disturbed if contended else self.seconds
        counts = {"samples": len(used), "disturbed": len(self.disturbed), "contended": contended}
        return report.summary(used) | counts


def measure(case: str, workers: dict[str, Worker], rounds: int) -> dict[str, dict[str, Any]]:
    """The figures of each system on a shape: rounds in random order, each system once a round."""
    figures = {system: worker.ask(load=case) for system, worker in workers.items()}
    samples = {system: Samples() for system, loaded in figures.items() if "error" not in loaded}
    while todo := [system for system, taken in samples.items() if not taken.enough(rounds)]:
        for system in random.sample(todo, len(todo)):
            started = time.perf_counter()
            answer = workers[system].ask(time=True)
            if "error" in answer:
                figures[system] = answer
                del samples[system]
            else:
                samples[system].add(answer["seconds"], answer["waited"], time.perf_counter() - started)
    for system, taken in samples.items():
        figures[system] |= taken.figures()
    report.add_ratios(figures)
    return figures


def run(cases: Sequence[str], systems: Sequence[str], thread_counts: Sequence[int], rounds: int) -> dict[str, Any]:
    floor = Floor.measure(thread_counts)
    rows = []
    for threads in thread_counts:
        workers = {system: Worker(system, threads) for system in systems}
        for case in cases:
            chosen = {system: worker for system, worker in workers.items() if ALL_SYSTEMS[system].takes(SHAPES[case])}
            floor_ms = floor.seconds(SHAPES[case], threads) * 1e3 if floor else None
            load = os.getloadavg()[0]
            figures = measure(case, chosen, rounds)
            rows.append({"case": case, "threads": threads, "floor_ms": floor_ms, "load": load, "systems": figures})
            print(f"{case}, {threads} threads: measured", file=sys.stderr, flush=True)
        for worker in workers.values():
            worker.close()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": report.machine(),
        "versions": report.versions(systems),
        "systems": {system: ALL_SYSTEMS[system].what for system in systems},
        "shapes": {case: vars(SHAPES[case]) for case in cases},
        "floor": floor and floor.measured,
        "rows": rows,
    }


def _names(known: Sequence[str]) -> Any:
    """A parser of comma-separated names."""

    def parse(value: str) -> list[str]:
        names = value.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return parse


def _thread_counts(value: str) -> list[int]:
    counts = [int(count) for count in value.split(",")]
    available = len(os.sched_getaffinity(0))
    if not all(1 <= count <= available for count in counts):
        raise argparse.ArgumentTypeError(f"thread counts must be between 1 and {available}, the CPUs here, got {value}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=_names(list(SHAPES)), help="comma-separated; all of them by default")
    parser.add_argument("--systems", type=_names(list(ALL_SYSTEMS)), help=f"comma-separated; {','.join(SYSTEMS)} by default")
    parser.add_argument("--peers", action="store_true", help=f"short for --systems {','.join(COMPARED)}")
    parser.add_argument("--threads", type=_thread_counts, help="comma-separated counts; 1,2 by default")
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    arguments = parser.parse_args()

    cases = arguments.cases or (QUICK if arguments.quick else list(SHAPES))
    threads = arguments.threads or list(range(1, 1 + min(2, len(os.sched_getaffinity(0)))))
    systems = arguments.systems or (COMPARED if arguments.peers else list(SYSTEMS))
    result = run(cases, systems, threads, QUICK_ROUNDS if arguments.quick else ROUNDS)
    print(report.text(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

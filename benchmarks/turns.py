"""Ways to compute the same take turns, so that a slow second of the machine meets all of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

LEAST_ROUNDS = 5


def take_turns(calls: Mapping[str, Callable[[], object]], seconds: float, *, warm_up: bool = False) -> dict[str, list[float]]:
    """The seconds that each call took in each round; a round has every call once, in random order.

    Args:
        calls: by name.
        seconds: rounds begin until then, but at least five of them.
        warm_up: whether a call is made once, not timed, before it is timed: what the call before left in the caches is gone.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for name in random.sample(list(calls), len(calls)):
            if warm_up:
                calls[name]()
            started = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - started)
        rounds += 1
    return taken


def undisturbed(times: Sequence[float]) -> float:
    """The 10th percentile."""
    return sorted(times)[len(times) // 10]


def quartiles_over(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios of each round."""
    lower, median, upper = statistics.quantiles((a / b for a, b in zip(times, base, strict=True)), n=4)
    return lower, median, upper

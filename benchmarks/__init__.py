"""Benchmarks: ratios, each pair interleaved in one run, since machines differ and waver."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median


def ratios(
    one: Callable[[], object],
    two: Callable[[], object],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, list[float]]:
    """Median of time(one) / time(two) over interleaved pairs, and all of them sorted; one warm-up each."""
    one(), two()
    found = []
    for i in range(repeats):
        times = {}
        for name, run in ((1, one), (2, two)) if i % 2 else ((2, two), (1, one)):
            start = clock()
            run()
            times[name] = clock() - start
        found.append(times[1] / times[2])
    return median(found), sorted(found)

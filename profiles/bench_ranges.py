"""What the ranges of one decoding step cost where nobody listens.

    python profiles/bench_ranges.py [--quick]

Times the ranges that `decode.loop` and a retrieval head enter in a step, less an empty function's
time, as the least of many repetitions: anything else on the machine can only add. Prints
microseconds a step. With NVTX_INJECTION64_PATH set, or under nsys, it times a tool that listens.
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable

from flashhead_profiles.ranges import (
    BODY,
    CANDIDATES,
    CENTROIDS,
    CHECK,
    EXCHANGE,
    HEAD,
    RESULT,
    STEP,
    annotate,
    attach_nvtx,
    in_parts,
)

_NUMBER = 5_000
_REPEATS, _QUICK_REPEATS = 100, 1


def step() -> None:
    """A decoding step without its work: payloads are what the real ones carry."""
    with annotate(STEP, 1):
        with annotate(BODY, 1):
            pass
        with annotate(HEAD, 1, "flashhead"):
            with annotate(CHECK):
                pass
            with in_parts(CENTROIDS, CANDIDATES) as next_part:
                if next_part is not None:
                    next_part()
            with annotate(EXCHANGE, 8):
                pass
            with annotate(RESULT):
                pass


def _nothing() -> None:
    pass


def _least_us(work: Callable[[], None], repeats: int) -> float:
    return min(timeit.repeat(work, number=_NUMBER, repeat=repeats)) / _NUMBER * 1e6


def main() -> None:
    """Print the cost of a step's ranges."""
    repeats = _QUICK_REPEATS if "--quick" in sys.argv[1:] else _REPEATS
    who = "an NVTX tool listens" if attach_nvtx() else "nobody listens"
    cost_us = _least_us(step, repeats) - _least_us(_nothing, repeats)
    print(f"ranges of one step, {who}: {cost_us:.2f} us")


if __name__ == "__main__":
    main()

"""launch/scale.py with one rank slowed down, for tests of what a run says about that.

    SLOW_RANK=1 SLOW_US=20000 torchrun --nproc-per-node 3 tests/launch/slow_rank.py ARGUMENTS

The rank sleeps before each step of every head, as a throttled or shared one would take longer; the
arguments are those of launch/scale.py.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from flashhead_dist.heads.base import Head

SCRIPT = Path(__file__).parents[2] / "launch" / "scale.py"


def slow_down(seconds: float) -> None:
    """Make every step of every head in this process take `seconds` longer, replayed or not."""
    quick = Head.check

    def check(self: Head, *given: Any) -> None:
        time.sleep(seconds)
        quick(self, *given)

    Head.check = check  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ["SLOW_RANK"]:
        slow_down(float(os.environ["SLOW_US"]) / 1e6)
    sys.argv[0] = str(SCRIPT)
    sys.path.insert(0, str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")

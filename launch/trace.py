"""Runs a script of this folder under torch.profiler: a Chrome trace a rank and capture.

    torchrun --nproc-per-node 2 launch/trace.py --traces DIR launch/scale.py --synthetic 32000,1024
    python launch/trace.py --traces DIR launch/generate.py --head flashhead --max-new-tokens 8

What a script measures lies in `capture` ranges, so that loading and warming up are left out: with
launch/scale.py the timed rounds of each cell, with launch/generate.py each decoding. The first
--captures of them on each rank are traced, into DIR/tp<tp_size>_<number>_rank<rank>.json, which
flashhead_profiles.readers reads and chrome://tracing or https://ui.perfetto.dev show.
launch/profile.sh calls this where Nsight Systems is missing. Figures that the script prints of a
traced run are disturbed by the tracing.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from flashhead_profiles.ranges import CAPTURE, listening


class CaptureTracer:
    """A listener of ranges that profiles captures and writes their traces."""

    def __init__(self, folder: Path, rank: int, most: int) -> None:
        self._folder, self._rank, self._most = folder, rank, most
        self._seen: Counter[int] = Counter()
        self._open: list[bool] = []
        self._profile: profile | None = None
        self._name = ""
        self.written: list[Path] = []

    def begin(self, message: str, payload: int | None) -> None:
        """Start the profiler at the beginning of a capture."""
        starts = message == CAPTURE and self._profile is None and self._is_wanted(payload or 1)
        self._open.append(starts)
        if not starts:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def end(self) -> None:
        """Stop it where that capture ends, and write what it saw."""
        if not self._open.pop() or self._profile is None:
            return
        self._profile.stop()
        path = self._folder / self._name
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        self.written.append(path)

    def _is_wanted(self, tp_size: int) -> bool:
        self._seen[tp_size] += 1
        self._name = f"tp{tp_size}_{self._seen[tp_size]}_rank{self._rank}.json"
        return len(self.written) < self._most


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script given on this rank; ends as it ends."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    script: Path = arguments.script
    try:
        arguments.traces.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _refuse(f"cannot write {arguments.traces} ({error.strerror}): name another --traces")
    if not script.is_file():
        _refuse(f"there is no script {script}: give launch/scale.py or launch/generate.py")
    tracer = CaptureTracer(arguments.traces, int(os.environ.get("RANK", "0")), arguments.captures)
    sys.argv = [str(script), *arguments.rest]
    # As Python does for a script: those of this folder import each other by name.
    sys.path.insert(0, str(script.resolve().parent))
    with listening(tracer):
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            for path in tracer.written:
                print(f"trace: {path}", file=sys.stderr, flush=True)
    if not tracer.written:
        print(f"{script.name} captured nothing on this rank.", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "launch/trace.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR")
    parser.add_argument("--captures", type=int, default=4, metavar="N", help="on each rank")
    parser.add_argument("script", type=Path)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="the script's own arguments")
    return parser.parse_args(argv)


def _refuse(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    main()

"""All that only a GPU can show of the head kernels, in five minutes.

    python3 kernels/check_gpu.py                             every stage, on the first GPU
    python3 kernels/check_gpu.py --stages compile,correct    some of them
    python3 kernels/check_gpu.py --budget-s 120              what fits in two minutes
    python3 kernels/check_gpu.py --simulate                  no GPU: the same code, tiny and slow

Needs torch, Triton, numpy and this repository; the project need not be installed. The stages:

    compile    all kernels for the card, in parallel processes, into one cache          about 60 s
    correct    real shapes of four models, batch 1 and 8, tp 1 and 8, one launch and
               two, against the torch reference; 1,000 repeats with equal bits          about 60 s
    bench      what bench.py measures: two models, tp 1 and 8, batch 1 and 8            about 100 s
    parts      each kernel of a step timed alone: where the time goes                   about 30 s
    exchange   stress_exchange.py: 2 and 4 ranks on one GPU, 300 rounds; where there
               are more GPUs, on those too                                              about 30 s
    graph      steps captured in a CUDA graph and replayed; compute-sanitizer where
               it is installed and time is left                                         about 20 s

Each stage is a process of its own: one that fails, hangs or crashes does not stop the others. It
writes DIR/<stage>.json when it ends, and what it has so far as it goes. DIR/summary.json lists the
stages that passed, failed and were not reached; a second run with the same DIR compiles nothing
anew. A stage of which only some cases fit in the time passes if those are right, and names the
others. Weights are made up. A figure at tp 8 is one rank's work on one GPU.

With --simulate, kernels run in Triton's interpreter on tensors that only say that they are on CUDA
(the compile stage compiles one small model for sm_90). It shows that the script works, and its
times mean nothing.

Exit codes: 0 no stage failed; 1 one did; 2 a mistake in what was given, or no CUDA; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_USUAL_S = {
    "compile": 60.0, "correct": 60.0, "bench": 100.0, "parts": 30.0, "exchange": 30.0, "graph": 20.0
}  # fmt: skip
_LONGEST_FACTOR = 2.0
"""A stage may take this much of its usual time, where the budget allows it."""
_LEAST_S = 15.0
"""A stage that has less than this left is not started: torch and the GPU take a third of it."""
_GRACE_S = 10.0
"""After its time a stage has this much to write what it found."""
_SIMULATED_BUDGET_S = 900.0
PASSED, FAILED, NOT_REACHED = "passed", "failed", "not reached"
_INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """What became of a stage; `detail`: failures, or why it was not reached."""

    stage: str
    status: str
    seconds: float
    detail: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def mistake(options: argparse.Namespace) -> str | None:
    """What the user can mend, in one sentence; None for nothing."""
    unknown = [name for name in options.stages if name not in _USUAL_S]
    if unknown:
        return f"--stages holds {unknown[0]!r}: give some of {','.join(_USUAL_S)}"
    if not options.budget_s > 0:
        return f"--budget-s is {options.budget_s:g}: give more than 0"
    for package in ("torch", "triton", "numpy"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install {package}"
    if not options.simulate:
        import torch

        if not torch.cuda.is_available():
            return (
                "torch finds no CUDA device: run this on a machine with an NVIDIA GPU and a CUDA "
                "build of torch, or give --simulate to see that the script works"
            )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{options.out} cannot be made ({error.strerror}): give another --out"
    return None


def run_stage(name: str, limit_s: float, options: argparse.Namespace) -> Outcome:
    """Run one stage in a process group of its own, and end it where it does not end itself."""
    result_path = options.out / f"{name}.json"
    result_path.unlink(missing_ok=True)
    # The exchange of keys is in flashhead_dist, which need not be installed.
    paths = [str(_HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": str(options.out.resolve() / "triton_cache"),
        "TRITON_DEFAULT_FP_FUSION": os.environ.get("TRITON_DEFAULT_FP_FUSION", "1"),
        "TRITON_INTERPRET": "1" if options.simulate and name != "compile" else "0",
    }
    command = [sys.executable, str(_HERE / "check_stages.py"), name, "--out", str(options.out)]
    command += ["--limit-s", str(limit_s), *(["--simulate"] if options.simulate else [])]
    start_s, why = time.monotonic(), ""
    # Its output goes to stderr: stdout is for the summary.
    process = subprocess.Popen(command, env=environment, stdout=2, start_new_session=True)
    try:
        process.wait(limit_s + _GRACE_S)
    except subprocess.TimeoutExpired:
        why = f"it had not ended after {limit_s + _GRACE_S:.0f} s"
    finally:
        _end(process)
    seconds = time.monotonic() - start_s
    found = _read(result_path)
    if not why and "status" not in found:
        why = f"it ended with exit code {process.returncode} and no result"
    failures = [*found.get("failures", []), *([why] if why else [])]
    if why:
        found |= {"stage": name, "status": FAILED, "failures": failures}
        found["simulated"] = options.simulate
        result_path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    left_out = tuple(found.get("left_out", []))
    return Outcome(name, FAILED if failures else PASSED, seconds, tuple(failures), left_out)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a stage: its own processes, too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path) -> dict[str, Any]:
    """What a stage wrote; nothing where it wrote nothing."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_stages(options: argparse.Namespace, outcomes: list[Outcome]) -> None:
    """Run the stages in their order into `outcomes`, as far as the budget goes."""
    end_s = time.monotonic() + options.budget_s
    for name in (stage for stage in _USUAL_S if stage in options.stages):
        left_s = end_s - time.monotonic()
        if left_s < _LEAST_S:
            outcomes.append(Outcome(name, NOT_REACHED, 0.0, (f"{max(0, left_s):.0f} s were left",)))
            continue
        usual_s = options.budget_s if options.simulate else _LONGEST_FACTOR * _USUAL_S[name]
        limit_s = min(left_s, usual_s)
        print(f"{name}: begins, with up to {limit_s:.0f} s", file=sys.stderr, flush=True)
        outcomes.append(run_stage(name, limit_s, options))
        print(f"{name}: {outcomes[-1].status}", file=sys.stderr, flush=True)


def summarise(
    options: argparse.Namespace, outcomes: Sequence[Outcome], *, interrupted: bool
) -> dict[str, Any]:
    """The JSON form of a run."""
    by_name = {outcome.stage: outcome for outcome in outcomes}
    stages = [
        by_name.get(name, Outcome(name, NOT_REACHED, 0.0, ("the run was interrupted",)))
        for name in _USUAL_S
        if name in options.stages
    ]
    return {
        "simulated": options.simulate,
        "device": _device(options.simulate),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "interrupted": interrupted,
        **{
            status.replace(" ", "_"): [one.stage for one in stages if one.status == status]
            for status in (PASSED, FAILED, NOT_REACHED)
        },
        "stages": [
            {
                "stage": one.stage,
                "status": one.status,
                "seconds": round(one.seconds, 1),
                "detail": list(one.detail),
                "left_out": list(one.left_out),
            }
            for one in stages
        ],
    }


def _device(simulate: bool) -> dict[str, Any]:
    import torch
    import triton

    found: dict[str, Any] = {
        "python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__
    }  # fmt: skip
    if simulate:
        return found | {"name": "SIMULATED"}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found | {"name": names[0], "all": names, "cuda": torch.version.cuda}


def describe(summary: dict[str, Any]) -> str:
    """The summary in lines."""
    lines = [f"{summary['device']['name']}, torch {summary['device']['torch']}, triton "
             f"{summary['device']['triton']}"]  # fmt: skip
    if summary["simulated"]:
        lines.append(
            "SIMULATED: no GPU was used. It shows that the script works; times mean nothing."
        )
    for stage in summary["stages"]:
        lines.append(f"{stage['stage']:<9} {stage['status']:<12} {stage['seconds']:5.0f} s")
        lines += [f"    {text}" for text in stage["detail"]]
        if stage["left_out"]:
            lines.append(f"    no time was left for {len(stage['left_out'])} of its cases")
    for status in ("passed", "failed", "not_reached"):
        lines.append(f"{status.replace('_', ' ')}: {', '.join(summary[status]) or 'none'}")
    return "\n".join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", type=lambda text: text.split(","), default=list(_USUAL_S), metavar="A,B",
        help=f"some of {','.join(_USUAL_S)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--budget-s", type=float, metavar="N",
        help="seconds for all of it; stages that do not fit are not reached (default: 300)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("runs", "check_gpu"), metavar="DIR",
        help="folder for results and compiled kernels (default: runs/check_gpu)",
    )  # fmt: skip
    parser.add_argument("--simulate", action="store_true", help="without a GPU: see above")
    parser.add_argument("--json", action="store_true", help="the summary as JSON on stdout")
    options = parser.parse_args(argv)
    if options.budget_s is None:
        options.budget_s = _SIMULATED_BUDGET_S if options.simulate else 300.0
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; returns an exit code."""
    options = _parse(argv)
    wrong = mistake(options)
    if wrong is not None:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    interrupted = False
    # A stage is in a group of its own, which a signal to this process does not reach.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_stages(options, outcomes)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
    summary = summarise(options, outcomes, interrupted=interrupted)
    text = json.dumps(summary, indent=1)
    (options.out / "summary.json").write_text(text, encoding="utf-8")
    print(json.dumps(summary) if options.json else describe(summary))
    if interrupted:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

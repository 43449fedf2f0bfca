"""The stages of `check_gpu.py`, each run in a process of its own.

A stage is given a `Context` and returns what it found, as JSON values. It saves partial results as
it goes, so that a stage that is ended leaves them, and stops by itself where its time is over.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import triton
from torch import Tensor

import stress_exchange
from bench_cell import Bench, measure_shard
from bench_shapes import MODELS, Shape, Shard, empty_shard, make_shard, rotation_count
from bench_ways import Checked
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.timing import StreamClock
from head_calls import Call, checked_calls
from simulated_cuda import simulated_cuda

PASSED, FAILED = "passed", "failed"
_DEVICE = torch.device("cuda", 0)
_TINY = {"tiny": Shape("tiny", 4096, 64)}
_TINY_TP_SIZES = (128,)
"""One group a rank: the interpreter runs one program after another."""
_TP_SIZES = (1, 8)
_TIMED_MODELS = ("gemma-3-270m", "llama-3.1-8b")
_BATCHES, _TINY_BATCHES = (1, 8), (2,)
_REPEATS, _TINY_REPEATS = 1000, 2
_ROUNDS, _TINY_ROUNDS = 30, 1
_TINY_CALLS = 3
_SANITIZER = "compute-sanitizer"
_SANITIZER_S = 30.0
T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What a stage may use. end_s: when it must have ended, by `time.monotonic`."""

    simulate: bool
    out: Path
    name: str
    end_s: float

    @property
    def models(self) -> dict[str, Shape]:
        return _TINY if self.simulate else MODELS

    @property
    def timed_models(self) -> list[Shape]:
        return list(_TINY.values()) if self.simulate else [MODELS[name] for name in _TIMED_MODELS]

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        return _TINY_TP_SIZES if self.simulate else _TP_SIZES

    @property
    def left_s(self) -> float:
        return self.end_s - time.monotonic()

    @property
    def batches(self) -> tuple[int, ...]:
        return _TINY_BATCHES if self.simulate else _BATCHES

    def within(self, items: Iterable[T], left_out: list[str]) -> Iterator[T]:
        """Items while there is time; the rest are told in `left_out`."""
        for item in items:
            if self.left_s > 0:
                yield item
            else:
                left_out.append(str(item))

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def save(self, found: dict[str, Any]) -> None:
        """Write what was found, in place of what was written before."""
        path = self.out / f"{self.name}.json"
        path.with_suffix(".tmp").write_text(json.dumps(found, indent=1), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)


def cells(context: Context) -> list[tuple[Shape, int]]:
    """Every model and tp size, the smallest shards first."""
    pairs = itertools.product(context.models.values(), sorted(context.tp_sizes, reverse=True))
    return sorted(pairs, key=lambda pair: -pair[1])


def compile_stage(context: Context) -> dict[str, Any]:
    """Compile what the other stages launch, by as many processes as there are cores."""
    calls = checked_calls(context.batches)
    if context.simulate:
        capability, processors = 90, None
        shapes, calls = [(Shape("tiny", 8192, 128), 8)], calls[:_TINY_CALLS]
    else:
        capability = int("".join(map(str, torch.cuda.get_device_capability(_DEVICE))))
        processors = torch.cuda.get_device_properties(_DEVICE).multi_processor_count
        shapes = cells(context)
    tasks = [
        (shape, tp_size, call, capability, processors)
        for shape, tp_size in shapes
        for call in calls
    ]
    jobs = min(len(tasks), os.cpu_count() or 1)
    kernels: dict[str, dict[str, Any]] = {}
    failures, left_out = [], []
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    futures = {pool.submit(_compile, *task): task for task in tasks}
    try:
        for future in as_completed(futures, timeout=max(0.0, context.left_s)):
            shape, tp_size, call, *_ = futures[future]
            try:
                kernels |= {kernel["hash"]: kernel for kernel in future.result()}
            except Exception as error:
                failures.append(f"{shape.name}, tp {tp_size}, {call.name}: {first_line(error)}")
    except TimeoutError:
        late = (task for future, task in futures.items() if not future.done())
        left_out = [f"{shape.name}, tp {tp_size}, {call.name}" for shape, tp_size, call, *_ in late]
    finally:
        # Workers that compile still are killed with this process's group.
        pool.shutdown(wait=not left_out, cancel_futures=True)
    spilled = [one for one in kernels.values() if one["stack_bytes"]]
    context.say(f"{len(kernels)} kernels for sm_{capability}, {len(spilled)} of them spill")
    return {
        "capability": capability,
        "processes": jobs,
        "kernels": sorted(kernels.values(), key=lambda one: str(one["case"])),
        "notes": [
            f"{one['kernel']} spills {one['stack_bytes']} B: {one['case']}" for one in spilled
        ],
        "failures": failures,
        "left_out": left_out,
    }


def _compile(
    shape: Shape, tp_size: int, call: Call, capability: int, processors: int | None
) -> list[dict[str, Any]]:
    """In a process of its own: compile a call into Triton's cache."""
    import compile_ahead

    with simulated_cuda(1, interpret=False):
        shard = empty_shard(shape, tp_size, _DEVICE)
        cases = compile_ahead.call_cases(f"{shape.name}, tp {tp_size}", shard, [call])
    return [
        {
            "kernel": launch.kernel,
            "case": case.name,
            "hash": launch.compiled.hash,
            "registers": usage["REG"],
            "stack_bytes": usage["STACK"],
            "shared_bytes": int(launch.compiled.metadata.shared),
        }
        for case in cases
        for launch in compile_ahead.launches_of(case, capability, processors)
        for usage in (compile_ahead.usage_of(launch),)
    ]


def correct_stage(context: Context) -> dict[str, Any]:
    """Every call against the reference, and the same step over and over with equal bits."""
    ops, left_out = ops_for("cuda"), list[str]()
    found: dict[str, Any] = {"cells": [], "failures": [], "left_out": left_out}
    checked = Checked(0, 0)
    for shape, tp_size in context.within(cells(context), left_out):
        shard = make_shard(shape, tp_size, _DEVICE, seed=0)
        failures: list[str] = []
        for call in checked_calls(context.batches):
            where = f"{shape.name}, tp {tp_size}, {call.name}"
            if not call.serves(shard):
                continue
            with _told(where, failures):
                states = call.states(shard, seed=1)
                one = call.check(shard, states, call.run(ops, shard, states))
                checked = Checked(checked.tokens + one.tokens, checked.ties + one.ties)
        for call in (
            Call(batch, dense=dense) for batch in context.batches for dense in (False, True)
        ):
            with _told(f"{shape.name}, tp {tp_size}, {call.name}, repeated", failures):
                _repeat(context, call, shard)
        found["cells"].append({"model": shape.name, "tp_size": tp_size, "failures": failures})
        found["failures"] += failures
        found |= {"tokens": checked.tokens, "ties": checked.ties}
        context.say(f"{shape.name}, tp {tp_size}: {len(failures)} failures")
        context.save(found)
    return found


def _repeat(context: Context, call: Call, shard: Shard) -> None:
    """Run the call again and again; ValueError where a key differs from the first run's."""
    ops, states = ops_for("cuda"), call.states(shard, seed=2)
    first = call.run(ops, shard, states).keys.clone()
    differing = torch.zeros((), dtype=torch.int64, device=first.device)
    repeats = _TINY_REPEATS if context.simulate else _REPEATS
    for _ in range(repeats):
        differing += (call.run(ops, shard, states).keys != first).sum()
    if int(differing):
        raise ValueError(f"{int(differing)} keys of {repeats} runs are not the first run's")


def bench_stage(context: Context) -> dict[str, Any]:
    """What `bench.py` measures, for two models and batches, in few rounds."""
    bench = Bench(
        torch.cuda.get_device_name(_DEVICE),
        StreamClock(_DEVICE, simulated=context.simulate),
        ops_for("cuda"),
        _TINY_ROUNDS if context.simulate else _ROUNDS,
        seed=0,
        least_steps=1 if context.simulate else 8,
        warm_up_rounds=0 if context.simulate else 3,
    )
    left_out: list[str] = []
    found: dict[str, Any] = {
        "measurements": [], "notes": bench.notes, "failures": bench.failures, "left_out": left_out,
    }  # fmt: skip
    for shape, tp_size, batch in context.within(_timed_cells(context), left_out):
        rows = [
            one.as_dict() for one in measure_shard(bench, shape, tp_size, [batch], lambda: None)
        ]
        found["measurements"] += rows
        times = ", ".join(f"{row['way']} {row['median_us']:.1f} us" for row in rows)
        context.say(f"{shape.name}, tp {tp_size}, batch {batch}: {times}")
        context.save(found)
    return found


def parts_stage(context: Context) -> dict[str, Any]:
    """Each kernel of a step alone, over weights rotated past the cache: where the time goes."""
    clock, ops = StreamClock(_DEVICE, simulated=context.simulate), ops_for("cuda")
    left_out: list[str] = []
    found: dict[str, Any] = {"parts": [], "failures": [], "left_out": left_out}
    for shape, tp_size, batch in context.within(_timed_cells(context), left_out):
        where = f"{shape.name}, tp {tp_size}, batch {batch}"
        with _told(where, found["failures"]):
            shard = make_shard(shape, tp_size, _DEVICE, seed=0)
            probed = shard.spread.shape[0] * shard.probes_per_group
            count = rotation_count(shard.flashhead_bytes(probed, 1), clock.cache_bytes)
            shards = [shard, *(shard.clone() for _ in range(count - 1))]
            for call in (Call(batch, launches=1), Call(batch, launches=2), Call(batch, dense=True)):
                if call.serves(shard):
                    parts = _parts(context, clock, call, ops, shards)
                    found["parts"].append({"cell": where, "call": call.name, **parts})
                    context.say(f"{where}, {call.name}: {parts['kernels_us']}")
            context.save(found)
    return found


def _parts(
    context: Context, clock: StreamClock, call: Call, ops: Any, shards: list[Shard]
) -> dict[str, Any]:
    """Medians of the step and of each of its kernels, in microseconds."""
    launches = []
    for shard in shards:
        states = call.states(shard, seed=3)
        call.run(ops, shard, states)  # whatever is measured or kept at first is so now
        with _launches_kept() as kept:
            call.run(ops, shard, states)
        launches.append(kept)
    names = [name for name, _ in launches[0]]
    runs = {
        f"{place}: {name}": [steps[place][1] for steps in launches]
        for place, name in enumerate(names)
    }
    whole = [step for steps in launches for _, step in steps]
    rounds = _TINY_ROUNDS if context.simulate else _ROUNDS
    times = {name: _median_us(clock, steps, rounds) / len(shards) for name, steps in runs.items()}
    return {"step_us": _median_us(clock, whole, rounds) / len(shards), "kernels_us": times}


def _median_us(clock: StreamClock, steps: list[Callable[[], Tensor]], rounds: int) -> float:
    replay, _ = clock.capture(steps)
    times = sorted(clock.time_us(replay) for _ in range(rounds))
    return times[len(times) // 2]


@contextlib.contextmanager
def _launches_kept() -> Iterator[list[tuple[str, Callable[[], Tensor]]]]:
    """Triton launches within, carried out and kept: the kernel's name, and what launches it again.

    A kernel leaves its counters as it found them, so that it may run again by itself.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    function = InterpretedFunction if triton.knobs.runtime.interpret else JITFunction
    launch, kept, nothing = function.run, [], torch.empty(0, device=_DEVICE)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        def again() -> Tensor:
            launch(self, *args, grid=grid, warmup=warmup, **options)
            return nothing

        kept.append((self.fn.__name__, again))
        return launch(self, *args, grid=grid, warmup=warmup, **options)

    with mock.patch.object(function, "run", run):
        yield kept


def exchange_stage(context: Context) -> dict[str, Any]:
    """`stress_exchange.py`, ranks on one GPU, and on several where there are."""
    runs = [["--ranks", "2", "4", "--rounds", "300"]]
    if context.simulate:
        runs = [["--ranks", "2", "--rounds", "30", "--capacity", "8", "--simulate"]]
    elif torch.cuda.device_count() > 1:
        ranks = {2, 1 << (min(torch.cuda.device_count(), 8).bit_length() - 1)}
        runs.append(["--spread", "--ranks", *map(str, sorted(ranks)), "--rounds", "300"])
    found: dict[str, Any] = {"runs": [], "failures": [], "left_out": []}
    for arguments in context.within(runs, found["left_out"]):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = stress_exchange.main([*arguments, "--timeout", "60"])
        found["runs"].append({"arguments": arguments, "code": code, "said": said.getvalue()})
        context.say(said.getvalue().strip())
        if code:
            found["failures"].append(f"stress_exchange.py {' '.join(arguments)}: exit code {code}")
        context.save(found)
    return found


def graph_stage(context: Context) -> dict[str, Any]:
    """Steps captured and replayed with other hidden states, and compute-sanitizer where it is."""
    clock = StreamClock(_DEVICE, simulated=context.simulate)
    found: dict[str, Any] = {"replayed": [], "failures": [], "left_out": []}
    shape, tp_size = cells(context)[0]
    shard = make_shard(shape, tp_size, _DEVICE, seed=0)
    calls = [Call(batch, launches=n) for batch in context.batches for n in (1, 2)]
    calls += [Call(batch, dense=True) for batch in context.batches]
    for call in context.within(calls, found["left_out"]):
        if not call.serves(shard):
            continue
        with _told(call.name, found["failures"]):
            states = call.states(shard, seed=4)
            replay, (keys,) = clock.capture([partial(_keys, call, shard, states)])
            for seed in (5, 6):
                states.copy_(call.states(shard, seed=seed))
                torch.cuda.synchronize(_DEVICE)
                replay()
                torch.cuda.synchronize(_DEVICE)
                if not torch.equal(keys, _keys(call, shard, states)):
                    raise ValueError("a replay gave other keys than the same step in eager mode")
            found["replayed"].append(call.name)
    context.say(f"{len(found['replayed'])} steps captured and replayed")
    context.save(found)
    found["sanitizer"] = _sanitize(context, found)
    context.say(f"compute-sanitizer: {found['sanitizer']}")
    return found


def _keys(call: Call, shard: Shard, states: Tensor) -> Tensor:
    return call.run(ops_for("cuda"), shard, states).keys


def _sanitize(context: Context, found: dict[str, Any]) -> str:
    """Run small steps under compute-sanitizer; what came of it."""
    if context.simulate or shutil.which(_SANITIZER) is None:
        return "not run: it is not installed" if not context.simulate else "not run: no GPU"
    if context.left_s < _SANITIZER_S:
        found["left_out"].append(_SANITIZER)
        return "not run: no time left"
    command = [_SANITIZER, "--error-exitcode", "3", sys.executable, __file__, "small"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=context.left_s)
    except subprocess.TimeoutExpired:
        found["left_out"].append(_SANITIZER)
        return "not ended in time"
    if done.returncode:
        found["failures"].append(f"{_SANITIZER}: exit code {done.returncode}")
    return done.stdout[-4000:]


def _small_steps() -> None:
    """What runs under compute-sanitizer: every call at a shape of two groups."""
    shard = make_shard(_TINY["tiny"], 64, _DEVICE, seed=0)
    for call in checked_calls(_BATCHES):
        if call.serves(shard):
            states = call.states(shard, seed=1)
            call.check(shard, states, call.run(ops_for("cuda"), shard, states))


def _timed_cells(context: Context) -> list[tuple[Shape, int, int]]:
    """Model, tp size and batch."""
    return list(itertools.product(context.timed_models, context.tp_sizes, context.batches))


@contextlib.contextmanager
def _told(where: str, failures: list[str]) -> Iterator[None]:
    """An error within is told in `failures` and on stderr, and ends nothing else."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        failures.append(f"{where}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """Its type and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


STAGES: dict[str, Callable[[Context], dict[str, Any]]] = {
    "compile": compile_stage,
    "correct": correct_stage,
    "bench": bench_stage,
    "parts": parts_stage,
    "exchange": exchange_stage,
    "graph": graph_stage,
}


def run(name: str, out: Path, limit_s: float, *, simulate: bool) -> dict[str, Any]:
    """Run one stage and save its result, whatever becomes of it."""
    start_s = time.monotonic()
    context = Context(simulate, out, name, start_s + limit_s)
    stage = partial(STAGES[name], context)
    found: dict[str, Any] = {"failures": [], "left_out": []}
    with contextlib.ExitStack() as stack:
        # The compiling processes simulate for themselves, and exchanging ranks need no tensors.
        if simulate and name not in ("compile", "exchange"):
            stack.enter_context(simulated_cuda(1))
        with _told(name, found["failures"]):
            found = stage()
    result = {
        "stage": name,
        "status": FAILED if found["failures"] else PASSED,
        "simulated": simulate,
        "seconds": round(time.monotonic() - start_s, 1),
        **found,
    }
    context.save(result)
    return result


def main() -> int:
    """One stage, for `check_gpu.py`; or, with `small`, what runs under compute-sanitizer."""
    if sys.argv[1:] == ["small"]:
        _small_steps()
        return 0
    parser = argparse.ArgumentParser(description="one stage of check_gpu.py, which calls this")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("--simulate", action="store_true")
    options = parser.parse_args()
    result = run(options.stage, options.out, options.limit_s, simulate=options.simulate)
    return 1 if result["status"] == FAILED else 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # sys.exit would wait for processes that compile still, for which no time was left.
    os._exit(code)

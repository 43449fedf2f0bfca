"""A MODEL of a greedy step's time at batch 1. Nothing here was measured on a GPU.

    python kernels/step_model.py                     four models, tp 1, 2, 4 and 8, on an H200
    python kernels/step_model.py --device l40 --models gemma-3-270m --tp-sizes 8 --explain

The launches are those that the launchers make (`compile_ahead.py`): grid, warps, registers, shared
memory, barriers and loads are read off the machine code compiled for the device. Of each kernel:

    stream     the longer of bytes / rate and rounds x latency, and one latency more. rate: HBM's,
               or of the SMs in use what each can take in. A round: loads that a program has in
               flight together, as no load crosses a barrier, nor the end of a loop's iteration
               before they are used; other programs of the SM have theirs in flight meanwhile
    barriers   those outside of the main loop, one after another. Those within it add to the stream,
               unless other programs of the SM stream meanwhile
    arrival    where programs meet by an atomic: fence, atomic, and the last one's reading and
               reducing of all parts
    start      from the end of the kernel before, as a node of a CUDA graph

Left out: instruction issue, the tail of the last wave, L2 hits, clocks below the boost clock.
`check_gpu.py --stages bench,parts` measures what this predicts, kernel by kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from multiprocessing import get_context

from bench_shapes import MODELS, empty_shard
from compile_ahead import (
    DEVICE,
    Launch,
    call_cases,
    has_atomics,
    instructions,
    launches_of,
    load_rounds,
    main_loop,
    sass_of,
    simulated_cuda,
    usage_of,
)
from head_calls import Call
from resources import aligned

_LABEL = "MODEL, not a measurement"


@dataclass(frozen=True)
class Gpu:
    """Vendor's figures: SMs, boost clock, memory bandwidth; limits of an SM of its architecture."""

    name: str
    capability: int
    processors: int
    clock_ghz: float
    bandwidth_gb_per_s: float
    threads: int
    shared_bytes: int
    max_programs: int


# NVIDIA H100 whitepaper (SXM5), H200 and L40 data sheets; limits: CUDA programming guide, table of
# technical specifications by compute capability.
GPUS = {
    "h100": Gpu("H100 SXM", 90, 132, 1.98, 3350, 2048, 228 << 10, 32),
    "h200": Gpu("H200 SXM", 90, 132, 1.98, 4800, 2048, 228 << 10, 32),
    "l40": Gpu("L40", 89, 142, 2.49, 864, 1536, 100 << 10, 24),
}
_REGISTERS = 65536
"""Of an SM, 32 bits each."""
_BANDWIDTH_SHARE = 0.92
"""Of the data sheet's, that a kernel which only reads has been seen to reach: assumed."""
_LATENCY_NS = 600
"""A read from HBM under load. Pointer chases on an idle Hopper take about half (microbenchmarks:
arXiv 2402.13499, 2501.12084); doubled for queues: assumed."""
_SM_BYTES_A_CYCLE = 64
"""What L2 can give one SM (NVIDIA A100 whitepaper: 64 bytes a clock and SM)."""
_BARRIER_CYCLES, _BARRIER_CYCLES_A_WARP = 40, 4
"""A barrier with the round trip through shared memory (some 30 cycles: arXiv 2402.13499) that it
is there for; more warps arrive later: assumed."""
_ARRIVAL_US = 1.2
"""Fence and atomic at L2, a read of all parts from L2, a reduction, a store: four trips of some
0.25 us, and barriers: assumed."""
_START_US = 1.0
"""Between dependent kernels of a CUDA graph, without programmatic launch: assumed."""


@dataclass(frozen=True)
class Kernel:
    """One launch of a step; times in microseconds. waves: of programs, one after another."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    resident_programs: int
    waves: int
    read_bytes: float
    rate_gb_per_s: float
    rounds: float
    in_flight_bytes_an_sm: float
    barriers: float
    stream_us: float
    barriers_us: float
    arrival_us: float
    start_us: float

    @property
    def total_us(self) -> float:
        return self.stream_us + self.barriers_us + self.arrival_us + self.start_us


@dataclass(frozen=True)
class Step:
    """What is predicted for one rank.

    kernels: by way, `one_launch` (empty where it does not fit), `two_launches` and `dense`.
    """

    model: str
    tp_size: int
    kernels: dict[str, list[Kernel]]

    def us(self, way: str) -> float | None:
        """Microseconds of a way, None where it does not serve the shape."""
        return sum(one.total_us for one in self.kernels[way]) if self.kernels.get(way) else None

    @property
    def head_us(self) -> float:
        """The faster of one launch and two: the launcher times both and takes it."""
        ways = (self.us("one_launch"), self.us("two_launches"))
        return min(us for us in ways if us is not None)

    def row(self) -> dict[str, object]:
        """A line of the table; None for what there is not."""
        two, dense = self.kernels["two_launches"], self.us("dense")
        assert dense is not None
        return {
            "model": self.model,
            "tp": self.tp_size,
            "MB": sum(one.read_bytes for one in two) / 1e6,
            "dots us": sum(one.total_us for one in two[:-1]),
            "candidates us": two[-1].total_us,
            "two launches us": self.us("two_launches"),
            "one launch us": self.us("one_launch"),
            "total us": self.head_us,
            "dense us": dense,
            "dense / total": dense / self.head_us,
        }


def predict(gpu: Gpu, model: str, tp_size: int) -> Step:
    """Compile the launches of a rank's step at batch 1, and model each."""
    with simulated_cuda(1, interpret=False):
        shard = empty_shard(MODELS[model], tp_size, DEVICE)
        calls = {
            "one_launch": Call(1, launches=1),
            "two_launches": Call(1, launches=2),
            "dense": Call(1, dense=True),
        }
        cases = {way: call_cases(model, shard, [call]) for way, call in calls.items()}
        probed = shard.spread.shape[0] * shard.probes_per_group
        centroids = shard.centroids.nbytes
        every = shard.flashhead_bytes(probed, 1)
        scores = 4 * shard.spread.numel()
        read = {
            "prepare_kernel": shard.storage[0].nbytes,
            "dots_kernel": centroids,
            "candidates_kernel": every - centroids + scores,
            "one_launch_kernel": every,
            "dense_kernel": shard.dense_bytes(1),
        }
    found: dict[str, list[Kernel]] = {}
    for way, served in cases.items():
        launches = [
            launch
            for case in served
            for launch in launches_of(case, gpu.capability, gpu.processors)
        ]
        found[way] = [_kernel(gpu, launch, read[launch.kernel]) for launch in launches]
    return Step(model, tp_size, found)


def _kernel(gpu: Gpu, launch: Launch, read_bytes: float) -> Kernel:
    sass, registers = sass_of(launch), usage_of(launch)["REG"]
    names, loop = instructions(sass), main_loop(sass)
    threads, programs = 32 * launch.warps, prod(launch.grid)
    # Registers are given in eights a thread; a program's shared memory takes 1 KB for the system.
    resident = min(
        gpu.max_programs,
        gpu.threads // threads,
        _REGISTERS // (-(-registers // 8) * 8 * threads),
        gpu.shared_bytes // (int(launch.compiled.metadata.shared) + 1024),
    )
    waves = -(-programs // (gpu.processors * resident))
    here = min(resident, -(-programs // gpu.processors))
    into_sms = min(programs, gpu.processors) * _SM_BYTES_A_CYCLE * gpu.clock_ghz
    rate = min(gpu.bandwidth_gb_per_s * _BANDWIDTH_SHARE, into_sms)
    of_program = read_bytes / programs
    # A loop without a round is another than that over the weights, which was unrolled.
    turns = max(1.0, of_program / (threads * loop.loaded_bytes)) if loop.rounds else 1.0
    rounds = load_rounds(names) + (turns - 1) * loop.rounds
    loop_barriers = turns * loop.barriers
    barriers = sum(name.startswith("BAR") for name in names) - loop.barriers
    cycles = _BARRIER_CYCLES + _BARRIER_CYCLES_A_WARP * launch.warps
    barrier_us, latency_us = cycles / gpu.clock_ghz / 1e3, _LATENCY_NS / 1e3
    chain_us = waves * rounds * latency_us
    bytes_us = read_bytes / rate / 1e3
    if here > 1:  # the others stream while one stands at a barrier
        stream_us = max(bytes_us, chain_us + waves * loop_barriers * barrier_us)
    else:
        stream_us = max(bytes_us, chain_us) + waves * loop_barriers * barrier_us
    return Kernel(
        kernel=launch.kernel,
        grid=launch.grid,
        warps=launch.warps,
        registers=registers,
        resident_programs=resident,
        waves=waves,
        read_bytes=read_bytes,
        rate_gb_per_s=rate,
        rounds=rounds,
        in_flight_bytes_an_sm=here * of_program / max(rounds, 1.0),
        barriers=barriers + loop_barriers,
        stream_us=stream_us + latency_us,
        barriers_us=waves * barriers * barrier_us,
        arrival_us=_ARRIVAL_US if has_atomics(sass) else 0.0,
        start_us=_START_US,
    )


def _table(rows: Sequence[dict[str, object]]) -> str:
    def cell(value: object) -> str:
        if isinstance(value, tuple):
            return "x".join(map(str, value))
        return f"{value:,.1f}" if isinstance(value, float) else "" if value is None else str(value)

    return aligned([list(rows[0]), *([cell(value) for value in row.values()] for row in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the model's table; returns an exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=GPUS, default="h200", help="default: h200")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tp-sizes", nargs="+", type=int, default=[1, 2, 4, 8], metavar="P")
    parser.add_argument("--explain", action="store_true", help="a line for each kernel, too")
    parser.add_argument("--json", action="store_true", help="everything as JSON on stdout")
    options = parser.parse_args(argv)
    if not 1 <= min(options.tp_sizes) <= max(options.tp_sizes) <= 128:
        print("error: --tp-sizes must lie between 1 and 128", file=sys.stderr)
        return 2
    gpu = GPUS[options.device]
    pairs = [(model, tp_size) for model in options.models for tp_size in options.tp_sizes]
    with ProcessPoolExecutor(
        min(len(pairs), os.cpu_count() or 1), mp_context=get_context("spawn")
    ) as pool:
        models, tp_sizes = zip(*pairs, strict=True)
        steps = list(pool.map(predict, [gpu] * len(pairs), models, tp_sizes))
    if options.json:
        document = [
            step.row()
            | {
                "kernels": {
                    way: [asdict(one) for one in all_] for way, all_ in step.kernels.items()
                }
            }
            for step in steps
        ]
        print(json.dumps({"label": _LABEL, "gpu": asdict(gpu), "steps": document}))
        return 0
    print(f"{_LABEL}: {gpu.name}, batch 1, one rank of tp, no exchange\n")
    print(_table([step.row() for step in steps]))
    if options.explain:
        print()
        kernels = [
            {"model": step.model, "tp": step.tp_size} | asdict(one) | {"total_us": one.total_us}
            for step in steps
            for launches in step.kernels.values()
            for one in launches
        ]
        print(_table(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())

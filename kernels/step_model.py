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

import compile_ahead as ahead
from bench_shapes import MODELS, empty_shard
from head_calls import Call
from resources import aligned
from simulated_cuda import simulated_cuda

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


# NVIDIA's data sheets; limits: CUDA programming guide, specifications by compute capability.
GPUS = {
    "h100": Gpu("H100 SXM", 90, 132, 1.98, 3350, 2048, 228 << 10, 32),
    "h200": Gpu("H200 SXM", 90, 132, 1.98, 4800, 2048, 228 << 10, 32),
    "l40": Gpu("L40", 89, 142, 2.49, 864, 1536, 100 << 10, 24),
}
_REGISTERS = 65536  # 32 bits each, of an SM; from here on ASSUMED, none read from a run or a paper.
# Papers with measured latencies to compare with: arXiv 2402.13499 and 2501.12084 (Hopper).
_BANDWIDTH_SHARE = 0.92  # of the data sheet's, for a kernel that only reads
_LATENCY_NS = 600  # of a read from memory under load, some twice that of an idle GPU
_SM_BYTES_A_CYCLE = 64  # that one SM can take in from L2
_BARRIER_CYCLES, _BARRIER_CYCLES_A_WARP = 40, 4  # with the round trip through shared memory
_ARRIVAL_US = 1.2  # fence, atomic at L2, reading of all parts, their reduction, a store
_START_US = 1.0  # between dependent kernels of a CUDA graph, without programmatic launch


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

    def row(self) -> dict[str, object]:
        """A line of the table; None for what there is not."""
        one, two, dense = (self.us(way) for way in ("one_launch", "two_launches", "dense"))
        assert two is not None and dense is not None  # noqa: PT018
        head = two if one is None else min(one, two)  # the launcher times both
        *before, candidates = self.kernels["two_launches"]
        return {
            "model": self.model,
            "tp": self.tp_size,
            "MB": sum(kernel.read_bytes for kernel in (*before, candidates)) / 1e6,
            "dots us": sum(kernel.total_us for kernel in before),
            "candidates us": candidates.total_us,
            "two launches us": two,
            "one launch us": one,
            "total us": head,
            "dense us": dense,
            "dense / total": dense / head,
        }


def predict(gpu: Gpu, model: str, tp_size: int) -> Step:
    """Compile the launches of a rank's step at batch 1, and model each."""
    with simulated_cuda(1, interpret=False):
        shard = empty_shard(MODELS[model], tp_size, ahead.DEVICE)
        calls = {"one_launch": Call(1, launches=1), "two_launches": Call(1, launches=2),
                 "dense": Call(1, dense=True)}  # fmt: skip
        cases = {way: ahead.call_cases(model, shard, [call]) for way, call in calls.items()}
        every = shard.flashhead_bytes(shard.spread.shape[0] * shard.probes_per_group, 1)
        centroids, scores = shard.centroids.nbytes, 4 * shard.spread.numel()
        read = {
            "prepare_kernel": shard.storage[0].nbytes,
            "dots_kernel": centroids,
            "candidates_kernel": every - centroids + scores,
            "one_launch_kernel": every,
            "dense_kernel": shard.dense_bytes(1),
        }
    found = {
        way: [
            _kernel(gpu, launch, read[launch.kernel])
            for case in served
            for launch in ahead.launches_of(case, gpu.capability, gpu.processors)
        ]
        for way, served in cases.items()
    }
    return Step(model, tp_size, found)


def _kernel(gpu: Gpu, launch: ahead.Launch, read_bytes: float) -> Kernel:
    sass, registers = ahead.sass_of(launch), ahead.usage_of(launch)["REG"]
    names, loop = ahead.instructions(sass), ahead.main_loop(sass)
    threads, programs = 32 * launch.warps, prod(launch.grid)
    # Registers are given in eights a thread; a program's shared memory takes 1 KB for the system.
    resident = min(
        gpu.max_programs, gpu.threads // threads, _REGISTERS // (-(-registers // 8) * 8 * threads),
        gpu.shared_bytes // (int(launch.compiled.metadata.shared) + 1024),
    )  # fmt: skip
    waves = -(-programs // (gpu.processors * resident))
    here = min(resident, -(-programs // gpu.processors))
    into_sms = min(programs, gpu.processors) * _SM_BYTES_A_CYCLE * gpu.clock_ghz
    rate = min(gpu.bandwidth_gb_per_s * _BANDWIDTH_SHARE, into_sms)
    of_program = read_bytes / programs
    # A loop without a round is another than that over the weights, which was unrolled.
    turns = max(1.0, of_program / (threads * loop.loaded_bytes)) if loop.rounds else 1.0
    rounds = ahead.load_rounds(names) + (turns - 1) * loop.rounds
    loop_barriers = turns * loop.barriers
    barriers = sum(name.startswith("BAR") for name in names) - loop.barriers
    cycles = _BARRIER_CYCLES + _BARRIER_CYCLES_A_WARP * launch.warps
    barrier_us, latency_us = cycles / gpu.clock_ghz / 1e3, _LATENCY_NS / 1e3
    bytes_us, chain_us = read_bytes / rate / 1e3, waves * rounds * latency_us
    halts_us = waves * loop_barriers * barrier_us
    # Where an SM has several programs, the others stream while one stands at a barrier.
    alone = max(bytes_us, chain_us) + halts_us
    stream_us = alone if here == 1 else max(bytes_us, chain_us + halts_us)
    return Kernel(
        launch.kernel, launch.grid, launch.warps, registers, resident, waves, read_bytes, rate,
        rounds, here * of_program / max(rounds, 1.0), barriers + loop_barriers,
        stream_us=stream_us + latency_us,
        barriers_us=waves * barriers * barrier_us,
        arrival_us=_ARRIVAL_US if ahead.has_atomics(sass) else 0.0,
        start_us=_START_US,
    )  # fmt: skip


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
    jobs = min(len(pairs), os.cpu_count() or 1)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        steps = list(pool.map(predict, [gpu] * len(pairs), *zip(*pairs, strict=True)))
    if options.json:
        document = [step.row() | {"kernels": asdict(step)["kernels"]} for step in steps]
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

"""Compile kernels as a launch on a GPU would, where no GPU is needed, and read their machine code.

The operations are called with empty tensors of real shapes on simulated CUDA. A stand-in for
Triton's driver names the target, and Triton's own JIT derives signature, constants and alignment
from the call: whatever a launcher launches is what is compiled, and no list has to follow the
kernels. Nothing is launched.

Import this before Triton: it turns the interpreter off.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

# Set before Triton is imported: what is interpreted cannot be compiled.
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench_shapes import ALPHA, Shape, Shard, empty_shard
from flashhead_kernels import cuda_sampling, triton_exchange
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.noise import FinalLogits, GumbelNoise
from flashhead_kernels.sampling import Weighed
from flashhead_kernels.shard import Query
from head_calls import Call, table_calls
from simulated_cuda import simulated_cuda

PROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 188}
"""SMs of A100, L40S, H100 and H200, B200, RTX PRO 6000: a launcher sizes its grid by them."""
SHARED_LIMIT_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may have (CUDA programming guide, technical specifications)."""
DEVICE = torch.device("cuda", 0)
EXCHANGE_RANKS = (2, 4, 8)
_SHARE_OF_COLUMNS = 0.6
_EXCHANGE_KEYS = 256
_WORD_BYTES = 4
_LEAST_ROUND_BYTES = 16
_LOADS_OF_16 = re.compile(
    r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global [^;]*0x10"
)
_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Launch:
    """One launch as the launcher asked for it, and what Triton compiled for it."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    compiled: Any


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel, in its machine code: see `main_loop`. All zero where none is.

    barriers: BAR instructions an iteration; loaded_bytes: bytes that a thread loads from global
    memory an iteration; rounds: see `load_rounds`.
    """

    barriers: int = 0
    loaded_bytes: int = 0
    rounds: int = 0


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel; bytes but for registers and counts.

    loop_barriers, loop_bytes: see `Loop`. dp4a, loads_of_16_bytes, fma: instructions in the PTX.
    row_layout: see `row_layout`.
    """

    kernel: str
    case: str
    capability: int
    grid: tuple[int, ...]
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    barriers: int
    loop_barriers: int
    loop_bytes: int
    loads_of_16_bytes: int
    dp4a: int
    fma: int
    row_layout: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def exceeds_shared(self) -> bool:
        """Whether a program asks for more shared memory than the GPU lets one have."""
        return self.shared_bytes > SHARED_LIMIT_BYTES[self.capability]


@dataclass(frozen=True)
class Case:
    """Something that launches kernels, at a shape."""

    name: str
    launch: Callable[[], object]


class _Driver:
    """What Triton's JIT asks of a driver before a launch; a device's number is its capability."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return DEVICE


@contextlib.contextmanager
def recorded(capability: int, processors: int | None = None) -> Iterator[list[Launch]]:
    """Launches within are compiled for `sm_<capability>` and recorded; none is carried out.

    Tensors on `DEVICE` are simulated. processors: of the GPU; None for the usual number.
    """
    launches: list[Launch] = []
    launch = JITFunction.run

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(function, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(function.__name__, tuple(grid), options["num_warps"], compiled))
        return compiled

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module="triton.*")
        stack.enter_context(simulated_cuda(1, interpret=False))
        properties = torch.cuda.get_device_properties(DEVICE)
        properties.multi_processor_count = processors or PROCESSORS[capability]
        for owner, name, value in (
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10)),
            (JITFunction, "run", record),
            (triton.runtime.driver, "_active", _Driver(capability)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield launches


def table_cases(shape: Shape, tp_size: int) -> list[Case]:
    """What decoding with such a model launches on one of `tp_size` ranks; see `table_calls`."""
    name = f"{shape.name}, tp {tp_size}"
    with simulated_cuda(1, interpret=False):
        shard = empty_shard(shape, tp_size, DEVICE)
        cases = call_cases(name, shard, table_calls())
        narrow = empty_shard(shape, tp_size, DEVICE, share_of_columns=_SHARE_OF_COLUMNS)
        calls = [Call(batch, launches=2) for batch in (1, 8)]
        cases += call_cases(f"{name}, fewer columns", narrow, calls)
    for dtype in (torch.bfloat16, torch.float32):
        named = f"{name}, draw, {str(dtype).removeprefix('torch.')} states"
        cases.append(Case(named, partial(_draw, shard, dtype)))
    return cases


def _draw(shard: Shard, dtype: torch.dtype) -> None:
    """What a draw of a token launches, log-probabilities and rows of logits included."""
    states = torch.empty((2, shard.hidden_size), dtype=dtype, device=DEVICE)
    query = Query(3 * shard.probes_per_group // 2, ALPHA)
    scores = cuda_sampling.local_scores(states, shard.index, query)
    draws = torch.arange(2, dtype=torch.int64, device=DEVICE)
    groups = len(shard.token_ids)
    noise = GumbelNoise(5, draws, draws)
    for softcap in (0.0, 30.0):
        final = FinalLogits(softcap, 0.7, noise)
        logits = cuda_sampling.final_logits(scores.logits, final)
        mass = cuda_sampling.cluster_log_mass(
            states, shard.index, scores.means,
            cuda_sampling.group_log_mass(logits.view(2, groups, -1)), 0.5, final,
        )  # fmt: skip
        weighed = Weighed(logits, scores.token_ids, mass, cuda_sampling.group_log_mass(mass))
        cuda_sampling.draw_groups(states, shard.index, weighed, draws, final)
    cuda_sampling.draw_candidates(scores.logits, scores.token_ids, draws, noise)
    cuda_sampling.gumbel(noise, scores.token_ids)
    cuda_sampling.every_logit(states, shard.rows)
    ops = ops_for("cuda")
    ops.score_centroids(states, shard.index, ALPHA)
    ops.score_rows(states, shard.rows.flatten(0, 1), scores.token_ids[:, :1])


def call_cases(name: str, shard: Shard, calls: Sequence[Call]) -> list[Case]:
    """A case for each call that the shard can serve."""

    def case(call: Call) -> Case:
        return Case(
            f"{name}, {call.name}",
            lambda: call.run(ops_for("cuda"), shard, call.states(shard)),
        )

    return [case(call) for call in calls if call.serves(shard)]


def exchange_cases() -> list[Case]:
    """The exchange of keys, which knows no model."""

    def exchange(ranks: int) -> None:
        keys = torch.zeros(_EXCHANGE_KEYS, dtype=torch.int64, device=DEVICE)
        addresses = torch.zeros(ranks, dtype=torch.int64, device=DEVICE)
        triton_exchange.exchange_keys(keys, keys, addresses, addresses[:1], 0, _EXCHANGE_KEYS)

    return [Case(f"{ranks} ranks", partial(exchange, ranks)) for ranks in EXCHANGE_RANKS]


def compile_case(case: Case, capability: int, processors: int | None = None) -> list[Resources]:
    """Compile what the case launches, and read what each kernel takes."""
    launches = launches_of(case, capability, processors)
    return [_resources(launch, case.name, capability) for launch in launches]


def launches_of(case: Case, capability: int, processors: int | None = None) -> list[Launch]:
    """Compile what the case launches."""
    with recorded(capability, processors) as launches:
        case.launch()
    return launches


def usage_of(launch: Launch) -> dict[str, int]:
    """Registers (REG) and stack (STACK) of a thread, and the rest that cuobjdump prints of it."""
    printed = _tool("--dump-resource-usage", launch.compiled.asm["cubin"])
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", printed)}


def main_loop(sass: str) -> Loop:
    """The innermost loop that does the work: most integer dot products, then most bytes loaded.

    A loop is what lies between the target of a branch backwards and that branch; an innermost one
    holds no other. What the compiler unrolled counts as one iteration.
    """
    code = [(int(at, 16), name, rest) for at, name, rest in _SASS_LINE.findall(sass)]
    loops = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is not None and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    inner = [
        (first, last) for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]  # fmt: skip
    best, found = (0, 0), Loop()
    for first, last in inner:
        body = [name for at, name, _ in code if first <= at <= last]
        dots = sum(name.startswith("IDP") for name in body)
        loaded = sum(_loaded_bytes(name) for name in body)
        if (dots, loaded) > best:
            barriers = sum(name.startswith("BAR") for name in body)
            best, found = (dots, loaded), Loop(barriers, loaded, load_rounds(body))
    return found


def load_rounds(names: Sequence[str]) -> int:
    """Runs of instructions without a barrier in which a thread loads 16 bytes or more.

    Each costs the latency of memory: no load crosses a barrier. Smaller ones are of hidden states
    and scales, which caches hold.
    """
    rounds = loaded = 0
    for name in (*names, "BAR"):
        if name.startswith("BAR"):
            rounds += loaded >= _LEAST_ROUND_BYTES
            loaded = 0
        else:
            loaded += _loaded_bytes(name)
    return rounds


def instructions(sass: str) -> list[str]:
    """Names of all instructions, in the order of the code."""
    return [name for _, name, _ in _SASS_LINE.findall(sass)]


def has_atomics(sass: str) -> bool:
    """Whether programs meet by an atomic in global memory."""
    return any(name.startswith(("ATOMG", "ATOM.")) for name in instructions(sass))


def sass_of(launch: Launch) -> str:
    """The machine code that Triton compiled."""
    return _tool("-sass", launch.compiled.asm["cubin"])


def _loaded_bytes(name: str) -> int:
    """Bytes that an instruction loads from global memory for a thread."""
    if not name.startswith(("LDG", "LDGSTS")):
        return 0
    width = re.search(r"\.(?:U8|S8|U16|S16|64|128)(?:\.|$)", name)
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return sizes[width[0].strip(".")] if width else _WORD_BYTES


def _resources(launch: Launch, case: str, capability: int) -> Resources:
    ptx = launch.compiled.asm["ptx"]
    counts = usage_of(launch)
    sass = sass_of(launch)
    loop = main_loop(sass)
    return Resources(
        kernel=launch.kernel,
        case=case,
        capability=capability,
        grid=launch.grid,
        warps=launch.warps,
        registers=counts["REG"],
        stack_bytes=counts["STACK"],
        shared_bytes=int(launch.compiled.metadata.shared),
        barriers=sum(name.startswith("BAR") for name in instructions(sass)),
        loop_barriers=loop.barriers,
        loop_bytes=loop.loaded_bytes,
        loads_of_16_bytes=len(_LOADS_OF_16.findall(ptx)),
        dp4a=len(re.findall(r"\bdp4a\.", ptx)),
        fma=len(re.findall(r"\bfma\.rn", ptx)),
        row_layout=row_layout(launch.compiled.asm["ttgir"]),
    )


def row_layout(ttgir: str) -> str:
    """How a warp reads rows: `columns of a thread, rows x threads along a row`; empty for none.

    The order in which a row's products are summed follows from it.
    """
    loads = re.findall(r"tt\.load [^\n]*tensor<\d+x(\d+)x!tt\.ptr<\w+>, (#\w+)>", ttgir)
    if not loads:
        return ""
    _, name = max(loads, key=lambda load: int(load[0]))
    layout = re.search(
        rf"{name} = #ttg\.blocked<{{sizePerThread = \[1, (\d+)\], "
        r"threadsPerWarp = \[(\d+), (\d+)\], warpsPerCTA = \[\d+, 1\]",
        ttgir,
    )
    return f"{layout[1]}, {layout[2]}x{layout[3]}" if layout else ""


def _tool(option: str, cubin: bytes) -> str:
    """What cuobjdump, which comes with Triton, prints of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout

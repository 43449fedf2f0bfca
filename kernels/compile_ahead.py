"""Compile kernels as a launch on a GPU would, where no GPU is needed, and read their machine code.

The operations are called with empty tensors of real shapes. A stand-in for Triton's driver names
the target, and Triton's own JIT derives signature, constants and alignment from the call: whatever
a launcher launches is what is compiled, and no list has to follow the kernels. Nothing is launched.

Import this before Triton: it turns the interpreter off.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Set before Triton is imported: what is interpreted cannot be compiled.
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench_shapes import ALPHA, Shape, Shard, empty_shard
from flashhead_kernels import triton_dense_launch, triton_exchange
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.logits import FinalLogits, GumbelNoise
from flashhead_kernels.triton_shapes import CentroidShape, HeadShape, fits_one_launch

PROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 188}
"""SMs of the A100, L40S, H100 and H200, B200, and RTX PRO 6000: a launcher sizes its grid by them."""
SHARED_LIMIT_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may have (CUDA programming guide, technical specifications)."""
EXCHANGE_RANKS = (2, 4, 8)
_EXCHANGE_KEYS = 256
_WORD_BYTES = 4
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
    memory an iteration.
    """

    barriers: int = 0
    loaded_bytes: int = 0


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel; bytes but for registers and counts.

    loop_barriers, loop_bytes: see `Loop`. dp4a, loads_of_16_bytes, fma: instructions in the PTX.
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def exceeds_shared(self) -> bool:
        """Whether a program asks for more shared memory than the GPU lets one have."""
        return self.shared_bytes > SHARED_LIMIT_BYTES[self.capability]


@dataclass(frozen=True)
class Case:
    """A call of an operation at a shape; `call` takes the CPU tensors' device."""

    name: str
    call: Callable[[], object]


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
        return torch.device("cpu")


@contextlib.contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Launches within are compiled for `sm_<capability>` and recorded, none is carried out."""
    launches: list[Launch] = []
    launch = JITFunction.run

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(function, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(function.__name__, tuple(grid), options["num_warps"], compiled))
        return compiled

    programs = triton_dense_launch._programs
    triton_dense_launch._programs = lambda device: 4 * PROCESSORS[capability]
    JITFunction.run = record
    triton.runtime.driver.set_active(_Driver(capability))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="triton.*")
            yield launches
    finally:
        JITFunction.run = launch
        triton_dense_launch._programs = programs


def model_cases(shape: Shape, tp_size: int) -> list[Case]:
    """What decoding with such a model launches on one of `tp_size` ranks."""
    shard = empty_shard(shape, tp_size)
    name = f"{shape.name}, tp {tp_size}"
    cases = []
    for batch in (1, 8, 64):
        for launches in (1, 2):
            head = _head(shard, batch, launches=launches)
            if head is not None:
                cases.append(Case(f"{name}, batch {batch}", head))
        cases.append(Case(f"{name}, batch {batch}", _dense(shard, batch)))
        wide = _dense(shard, batch, dtype=torch.float32)
        cases.append(Case(f"{name}, batch {batch}, float32 states", wide))
    whole = {"k": 4, "need_logsumexp": True, "need_unprobed": True}
    for launches in (1, 2):
        unprobed = _head(shard, 1, launches=launches, need_unprobed=True)
        every = _head(shard, 1, launches=launches, **whole)
        if unprobed is not None and every is not None:
            cases.append(Case(f"{name}, batch 1, unprobed", unprobed))
            cases.append(Case(f"{name}, batch 1, 4 best of all", every))
    noise = FinalLogits(0.0, 0.7, GumbelNoise(5, torch.zeros(1, dtype=torch.int64)))
    cases.append(Case(f"{name}, batch 1, sampled", _dense(shard, 1, final=noise)))
    narrow = empty_shard(shape, tp_size, share_of_columns=0.6)
    for batch in (1, 8):
        head = _head(narrow, batch, launches=2)
        assert head is not None
        cases.append(Case(f"{name}, batch {batch}, fewer columns", head))
    return cases


def exchange_cases() -> list[Case]:
    """The exchange of keys, which knows no model."""

    def exchange(ranks: int) -> None:
        keys = torch.zeros(_EXCHANGE_KEYS, dtype=torch.int64)
        addresses = torch.zeros(ranks, dtype=torch.int64)
        triton_exchange.exchange_keys(keys, keys, addresses, addresses[:1], 0, _EXCHANGE_KEYS)

    return [Case(f"{ranks} ranks", lambda r=ranks: exchange(r)) for ranks in EXCHANGE_RANKS]


def compile_case(case: Case, capability: int) -> list[Resources]:
    """Compile what the case launches, and read what each kernel takes."""
    with recorded(capability) as launches:
        case.call()
    return [_resources(launch, case.name, capability) for launch in launches]


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
            best, found = (dots, loaded), Loop(barriers, loaded)
    return found


def _loaded_bytes(name: str) -> int:
    """Bytes that an instruction loads from global memory for a thread."""
    if not name.startswith(("LDG", "LDGSTS")):
        return 0
    width = re.search(r"\.(?:U8|S8|U16|S16|64|128)(?:\.|$)", name)
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return sizes[width[0].strip(".")] if width else _WORD_BYTES


def _head(shard: Shard, batch: int, **options: Any) -> Callable[[], object] | None:
    """A call of `flashhead_candidates`; None where one launch cannot serve the shape."""
    ops = ops_for("cuda")
    _, clusters, tokens, size = shard.rows.shape
    head = HeadShape.of(clusters, tokens, size, shard.probes_per_group, 1, options.get("k", 1))
    one = fits_one_launch(head, CentroidShape.of(shard.centroids), batch)
    if options["launches"] == 1 and not one:
        return None
    states = torch.empty(batch, shard.hidden_size, dtype=torch.bfloat16)

    def call() -> object:
        return ops.flashhead_candidates(
            states, shard.rows, shard.token_ids, shard.centroids, shard.spread, ALPHA,
            shard.probes_per_group, shard.pinned_rows, shard.pinned_token_ids, **options,
        )  # fmt: skip

    return call


def _dense(
    shard: Shard, batch: int, *, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Callable[[], object]:
    states = torch.empty(batch, shard.hidden_size, dtype=dtype)
    return lambda: ops_for("cuda").dense_candidates(states, shard.dense_rows, 0, **options)


def _resources(launch: Launch, case: str, capability: int) -> Resources:
    ptx, cubin = launch.compiled.asm["ptx"], launch.compiled.asm["cubin"]
    usage = _tool("--dump-resource-usage", cubin)
    counts = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", usage)}
    sass = _tool("-sass", cubin)
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
        barriers=sum(name.startswith("BAR") for _, name, _ in _SASS_LINE.findall(sass)),
        loop_barriers=loop.barriers,
        loop_bytes=loop.loaded_bytes,
        loads_of_16_bytes=len(_LOADS_OF_16.findall(ptx)),
        dp4a=len(re.findall(r"\bdp4a\.", ptx)),
        fma=len(re.findall(r"\bfma\.rn", ptx)),
    )


def _tool(option: str, cubin: bytes) -> str:
    """What cuobjdump, which comes with Triton, prints of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout

"""What a machine is, and two decisions about it: where the ranks run, and whether they fit.

Everything here is a pure function of values, so it is tested with machines that do not exist; only
`probe` looks at the real one.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

DeviceType = Literal["cpu", "cuda"]
Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver describes it."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """The machine as one process sees it.

    `num_cores` counts the logical CPUs that the process may use (affinity and control-group quota
    included), so two hyperthreads of one core count as two.
    """

    cpu_model: str
    num_cores: int
    memory_bytes: int
    os: str
    gpus: tuple[Gpu, ...] = ()

    def __post_init__(self) -> None:
        if self.num_cores < 1:
            raise ValueError(f"num_cores is {self.num_cores}: a machine has at least one core")

    @property
    def host_class(self) -> str:
        """Short name for run folders and tables: `cpu-2c`, `1xh200`, `4xa100+4xh100`."""
        if not self.gpus:
            return f"cpu-{self.num_cores}c"
        counts = Counter(short_gpu_name(gpu.name) for gpu in self.gpus)
        return "+".join(f"{count}x{name}" for name, count in sorted(counts.items()))

    def as_dict(self) -> dict[str, Any]:
        """JSON form, with the host class."""
        return {"host_class": self.host_class, **asdict(self)}


def short_gpu_name(name: str) -> str:
    """Return the model of a GPU name: `NVIDIA H200 NVL` -> `h200`, `Tesla T4` -> `t4`.

    The first word with a digit in it names the model in every name that NVIDIA's driver gives
    (`NVIDIA A100-SXM4-80GB`, `NVIDIA GeForce RTX 4090`, `GRID V100D-8Q`).
    """
    for word in re.split(r"[\s-]+", name):
        if re.search(r"\d", word):
            return re.sub(r"[^a-z0-9]", "", word.lower())
    return re.sub(r"[^a-z0-9]+", "", name.lower()) or "gpu"


@dataclass(frozen=True)
class Placement:
    """Where the ranks of one host run and what carries their collectives, and why."""

    backend: Backend
    device_type: DeviceType
    reason: str


def choose_placement(num_local_ranks: int, num_gpus: int) -> Placement:
    """Decide backend and device for `num_local_ranks` ranks on a host with `num_gpus` CUDA GPUs.

    NCCL refuses two ranks on one GPU, so CUDA needs a GPU for each local rank; otherwise every rank
    runs on the CPU with gloo. The reason says so in words.
    """
    ranks = counted(num_local_ranks, "rank")
    if num_gpus == 0:
        return Placement("gloo", "cpu", f"no CUDA GPU is visible: {ranks} on the CPU with gloo")
    gpus = counted(num_gpus, "GPU")
    if num_local_ranks <= num_gpus:
        return Placement("nccl", "cuda", f"{ranks} and {gpus}: one GPU a rank, with NCCL")
    return Placement(
        "gloo",
        "cpu",
        f"{ranks} but only {gpus}, and NCCL needs one GPU a rank: all ranks run on the CPU with "
        f"gloo (start {num_gpus} or fewer ranks to use CUDA)",
    )


@dataclass(frozen=True)
class Oversubscription:
    """Whether ranks must take turns on the hardware, and why."""

    oversubscribed: bool
    reason: str


def oversubscription(
    num_ranks: int, num_cores: int, num_gpus: int = 0, *, threads_per_rank: int = 1
) -> Oversubscription:
    """Decide whether `num_ranks` ranks on one host have the hardware to run at the same time.

    `num_gpus` counts the GPUs the ranks really run on: 0 when they run on the CPU. On the CPU a
    rank needs `threads_per_rank` cores.
    """
    ranks = counted(num_ranks, "rank")
    if num_gpus:
        gpus = counted(num_gpus, "GPU")
        if num_ranks > num_gpus:
            return Oversubscription(True, f"{ranks} on {gpus}")
        return Oversubscription(False, f"{ranks} on {gpus}: a GPU each")
    threads = num_ranks * threads_per_rank
    each = f" of {counted(threads_per_rank, 'thread')} each" if threads_per_rank > 1 else ""
    cores = counted(num_cores, "core")
    if threads > num_cores:
        return Oversubscription(True, f"{ranks}{each} on {cores}")
    return Oversubscription(False, f"{ranks}{each} on {cores}: a core for every thread")


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""Look at the real machine, once: the only file of this package that reads live state."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from flashhead_topology.machine import Gpu, Machine


def probe_machine() -> Machine:
    """Describe the machine this process runs on."""
    return Machine(
        cpu_model=cpu_model_name(_read(Path("/proc/cpuinfo"))) or platform.processor() or "unknown",
        num_cores=usable_cores(len(os.sched_getaffinity(0)), _read(Path("/sys/fs/cgroup/cpu.max"))),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        os=f"{platform.system()} {platform.release()}",
        gpus=_visible_gpus(),
    )


def cpu_model_name(cpuinfo: str) -> str | None:
    """Return the `model name` of the first processor in the text of /proc/cpuinfo, or None."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return None


def usable_cores(num_affine_cpus: int, cpu_max: str) -> int:
    """Return how many CPUs a process may keep busy.

    Args:
        num_affine_cpus: CPUs in the process's affinity mask.
        cpu_max: text of the control group's `cpu.max` (`quota period` in microseconds, or
            `max period`); empty where there is none.
    """
    fields = cpu_max.split()
    if len(fields) != 2 or fields[0] == "max":
        return max(1, num_affine_cpus)
    return max(1, min(num_affine_cpus, int(fields[0]) // int(fields[1])))


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _visible_gpus() -> tuple[Gpu, ...]:
    # torch is imported here because `machine` and everything that plans with it must work without.
    import torch

    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(name=p.name, memory_bytes=int(p.total_memory)) for p in properties)

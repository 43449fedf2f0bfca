"""Look at the real machine, once: the only file of this package that reads live state.

What it reads is told apart and parsed elsewhere: `sysfs`, `nvml_paths`.
"""

from __future__ import annotations

import os
import platform
from importlib import import_module
from pathlib import Path

from flashhead_topology.machine import DeviceType, Gpu, Machine
from flashhead_topology.nvml_paths import GpuLinks, read_gpu_links
from flashhead_topology.place import Place
from flashhead_topology.sysfs import SYS, numa_node_of_pci, numa_nodes_of, read_interfaces


def probe_machine() -> Machine:
    """Describe the machine this process runs on."""
    return Machine(
        cpu_model=cpu_model_name(_read(Path("/proc/cpuinfo"))) or platform.processor() or "unknown",
        num_cores=usable_cores(len(os.sched_getaffinity(0)), _read(Path("/sys/fs/cgroup/cpu.max"))),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        os=f"{platform.system()} {platform.release()}",
        gpus=_visible_gpus(),
    )


def probe_place(
    rank: int, host: str, device_type: DeviceType, device_index: int = 0, *, root: Path = SYS
) -> Place:
    """Say what this rank stands on: device, NUMA node, cores, paths to other GPUs, ways out.

    host: see `Place`. device_index: of the CUDA device as torch numbers it.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    interfaces = read_interfaces(root)
    missing: dict[str, str] = {}
    if not interfaces:
        missing["interfaces"] = "the kernel lists no network interface that is up but loopback"
    elif all(item.bits_per_s is None for item in interfaces):
        missing["speed"] = "no network interface tells its speed, as virtual ones do not"
    if device_type == "cpu":
        nodes = numa_nodes_of(cores, root)
        if not nodes:
            missing["numa_nodes"] = "the kernel lists no NUMA node for the cores of this process"
        name = cpu_model_name(_read(Path("/proc/cpuinfo"))) or platform.processor() or "CPU"
        return Place(rank, host, "cpu", name, "", nodes, cores, (), interfaces, None, missing)
    name, uuid = _cuda_device(device_index)
    links = _gpu_links(uuid, missing)
    node = numa_node_of_pci(links.bus_id, root) if links else None
    if node is None:
        missing["numa_nodes"] = "the kernel gives this GPU no NUMA node, as on machines with one"
    return Place(
        rank,
        host,
        "cuda",
        name,
        uuid,
        () if node is None else (node,),
        cores,
        links.paths if links else (),
        interfaces,
        links.pcie if links else None,
        missing,
    )


def _cuda_device(index: int) -> tuple[str, str]:
    """Name of a CUDA device and its uuid as NVML writes it."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    uuid = str(properties.uuid)
    return properties.name, uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _gpu_links(uuid: str, missing: dict[str, str]) -> GpuLinks | None:
    """What NVML says; None, and a reason in `missing`, where it says nothing."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        missing["paths"] = "nvidia-ml-py is not installed: pip install 'flashhead-dist[gpu]'"
        return None
    try:
        links = read_gpu_links(nvml, uuid)
    except nvml.NVMLError as error:
        missing["paths"] = f"NVML gives nothing ({error})"
        return None
    missing.update(links.missing)
    return links


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

"""What a real machine is, read once: /proc, /sys, torch and NVML.

NVML: https://docs.nvidia.com/deploy/nvml-api/, through nvidia-ml-py. Functions that
read files take the root of /sys, and those that ask NVML take the module: tests give their own.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from flashhead_topology.hardware import Interface, PathKind, PeerPath, RankHardware
from flashhead_topology.machine import DeviceType, Gpu, Machine

SYS = Path("/sys")
_ETHERNET, _INFINIBAND = "1", "32"
"""ARPHRD_ETHER and ARPHRD_INFINIBAND of linux/if_arp.h."""
_UP = ("up", "unknown")
"""An interface whose driver does not report its state says `unknown` while it works."""


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """CPUs of a list as the kernel writes it: `0-3,8` is 0, 1, 2, 3, 8; empty text is none.

    Raises:
        ValueError: the text is no such list.
    """
    cpus: list[int] = []
    for piece in filter(None, text.strip().split(",")):
        first, dash, last = piece.partition("-")
        cpus.extend(range(int(first), int(last if dash else first) + 1))
    return tuple(cpus)


def numa_nodes_of(cores: Iterable[int], root: Path = SYS) -> tuple[int, ...]:
    """NUMA nodes that hold any of `cores`, ascending; none where the kernel knows no nodes."""
    wanted = set(cores)
    nodes = []
    for folder in sorted((root / "devices/system/node").glob("node[0-9]*")):
        if wanted & set(parse_cpu_list(_read(folder / "cpulist") or "")):
            nodes.append(int(folder.name.removeprefix("node")))
    return tuple(sorted(nodes))


def numa_node_of_pci(bus_id: str, root: Path = SYS) -> int | None:
    """NUMA node of the PCI device at `0000:1b:00.0` (NVML's longer domain too), where it has one.

    A machine with one node, and most virtual ones, say -1: None here.
    """
    domain, _, rest = bus_id.lower().partition(":")
    return _node(root / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "numa_node")


def read_interfaces(root: Path = SYS) -> tuple[Interface, ...]:
    """Adapters that are up, fastest first; loopback, tunnels, bridges and their ports left out.

    An Ethernet or IPoIB interface of an adapter that is listed by InfiniBand's drivers is left out
    too: the adapter stands for it.
    """
    adapters, theirs = _infiniband(root)
    found = list(adapters)
    for folder in sorted((root / "class/net").glob("*")):
        if folder.name in theirs or _read(folder / "type") not in (_ETHERNET, _INFINIBAND):
            continue
        if (folder / "bridge").exists() or (folder / "master").exists():
            continue
        if _read(folder / "operstate") not in _UP:
            continue
        found.append(
            Interface(
                folder.name,
                "ethernet",
                _speed(folder),
                numa_node=_node(folder / "device/numa_node"),
                network_names=(folder.name,),
            )
        )
    return tuple(sorted(found, key=lambda item: (-(item.bits_per_s or 0.0), item.name)))


def _infiniband(root: Path) -> tuple[list[Interface], set[str]]:
    """Active ports of InfiniBand adapters, and the network interfaces that belong to them."""
    adapters: list[Interface] = []
    theirs: set[str] = set()
    for folder in sorted((root / "class/infiniband").glob("*")):
        for port in sorted((folder / "ports").glob("[0-9]*")):
            if "ACTIVE" not in (_read(port / "state") or ""):
                continue
            rate = re.match(r"([\d.]+) Gb/sec", _read(port / "rate") or "")
            names = tuple(sorted(path.name for path in (folder / "device/net").glob("*")))
            theirs.update(names)
            adapters.append(
                Interface(
                    folder.name,
                    "infiniband",
                    float(rate[1]) * 1e9 if rate else None,
                    _read(port / "link_layer") or "InfiniBand",
                    _node(folder / "device/numa_node"),
                    names,
                )
            )
    return adapters, theirs


def _speed(folder: Path) -> float | None:
    """Bits a second of a network interface, where a device is behind it, or behind its parts.

    Without one the driver makes it up: a veth says 10 Gbit/s whatever carries it.
    """
    parts = re.search(r"^DEVTYPE=(bond|vlan)$", _read(folder / "uevent") or "", re.MULTILINE)
    if not (folder / "device").exists() and not parts:
        return None
    megabits = _number(_read(folder / "speed"))
    return None if megabits is None or megabits <= 0 else megabits * 1e6


def _node(path: Path) -> int | None:
    node = _number(_read(path))
    return None if node is None or node < 0 else node


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _read(path: Path) -> str | None:
    """The file's text without blanks around it; None where it cannot be read.

    The speed of an interface that is down is there and refuses to be read.
    """
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


_COMMON: dict[int, PathKind] = {
    10: "switch",
    20: "switches",
    30: "host_bridge",
    40: "node",
    50: "system",
}
"""NVML_TOPOLOGY_SINGLE, _MULTIPLE, _HOSTBRIDGE, _NODE, _SYSTEM of nvml.h."""


@dataclass(frozen=True)
class GpuLinks:
    """One GPU as NVML sees it. `missing`: reasons by the name of what it does not tell."""

    bus_id: str
    paths: tuple[PeerPath, ...]
    pcie: tuple[int, int] | None
    missing: dict[str, str]


def read_gpu_links(nvml: Any, uuid: str) -> GpuLinks:
    """Paths from the GPU `uuid` to every other one of the host.

    nvml: the module `pynvml`, not yet initialised.

    Raises:
        nvml.NVMLError: no driver, or no such GPU; what single questions come to is in `missing`.
    """
    with _open(nvml):
        own = nvml.nvmlDeviceGetHandleByUUID(uuid)
        missing: dict[str, str] = {}
        paths = []
        for peer in _others(nvml, own, uuid):
            try:
                paths.append(_path(nvml, own, peer))
            except nvml.NVMLError as error:
                missing["paths"] = f"NVML does not report some paths to other GPUs ({error})"
        try:
            pcie = (
                int(nvml.nvmlDeviceGetCurrPcieLinkGeneration(own)),
                int(nvml.nvmlDeviceGetCurrPcieLinkWidth(own)),
            )
        except nvml.NVMLError as error:
            pcie, missing["pcie"] = None, f"NVML does not report the PCIe link ({error})"
        return GpuLinks(_text(nvml.nvmlDeviceGetPciInfo(own).busId), tuple(paths), pcie, missing)


@contextmanager
def _open(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _others(nvml: Any, own: Any, uuid: str) -> Iterator[Any]:
    for number in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        if _text(nvml.nvmlDeviceGetUUID(handle)) != uuid:
            yield handle


def _path(nvml: Any, own: Any, peer: Any) -> PeerPath:
    uuid = _text(nvml.nvmlDeviceGetUUID(peer))
    atomics = _p2p(nvml, own, peer, nvml.NVML_P2P_CAPS_INDEX_ATOMICS)
    if _p2p(nvml, own, peer, nvml.NVML_P2P_CAPS_INDEX_NVLINK):
        return PeerPath(uuid, "nvlink", _num_links(nvml, own, peer), atomics)
    common = nvml.nvmlDeviceGetTopologyCommonAncestor(own, peer)
    # Two GPUs of one board share what is inside it: nearer than any switch of the machine.
    return PeerPath(uuid, _COMMON.get(common, "switch"), 0, atomics)


def _p2p(nvml: Any, own: Any, peer: Any, capability: int) -> bool | None:
    """Whether the driver grants a capability between two GPUs; None where it does not say."""
    try:
        status = nvml.nvmlDeviceGetP2PStatus(own, peer, capability)
    except nvml.NVMLError:
        return None
    return bool(status == nvml.NVML_P2P_STATUS_OK)


def _num_links(nvml: Any, own: Any, peer: Any) -> int:
    """NVLinks that serve this pair: those that end at the peer, or at a switch that all share."""
    bus_id = _text(nvml.nvmlDeviceGetPciInfo(peer).busId)
    direct = switched = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(own, link):
                continue
            remote = _text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(own, link).busId)
            kind = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(own, link)
        except nvml.NVMLError:
            continue
        direct += remote == bus_id
        switched += kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
    return direct or switched


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def probe_machine() -> Machine:
    """Describe the machine this process runs on."""
    return Machine(
        cpu_model=_cpu_name(),
        num_cores=usable_cores(
            len(os.sched_getaffinity(0)), _read(Path("/sys/fs/cgroup/cpu.max")) or ""
        ),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        os=f"{platform.system()} {platform.release()}",
        gpus=_visible_gpus(),
    )


def probe_rank(
    rank: int, host: str, device_type: DeviceType, device_index: int = 0, *, root: Path = SYS
) -> RankHardware:
    """The hardware of this rank: device, NUMA nodes, cores, paths to other GPUs, interfaces.

    host: see `RankHardware`. device_index: of the CUDA device as torch numbers it.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    interfaces = read_interfaces(root)
    missing: dict[str, str] = {}
    if not interfaces:
        missing["interfaces"] = "no network interface but loopback is up"
    elif all(item.bits_per_s is None for item in interfaces):
        missing["speed"] = "no network interface reports its speed; virtual ones do not"
    if device_type == "cpu":
        nodes = numa_nodes_of(cores, root)
        if not nodes:
            missing["numa_nodes"] = "the kernel lists no NUMA node for the cores of this process"
        name = _cpu_name()
        return RankHardware(
            rank, host, "cpu", name, "", nodes, cores, (), interfaces, None, missing
        )
    name, uuid = _cuda_device(device_index)
    links = _gpu_links(uuid, missing)
    node = numa_node_of_pci(links.bus_id, root) if links else None
    if node is None:
        missing["numa_nodes"] = (
            "the kernel reports no NUMA node of this GPU; machines with one node do not"
        )
    return RankHardware(
        rank, host, "cuda", name, uuid, () if node is None else (node,), cores,
        links.paths if links else (), interfaces, links.pcie if links else None, missing,
    )  # fmt: skip


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
        missing["paths"] = "nvidia-ml-py is not installed: pip install nvidia-ml-py"
        return None
    try:
        links = read_gpu_links(nvml, uuid)
    except nvml.NVMLError as error:
        missing["paths"] = f"NVML is unavailable ({error})"
        return None
    missing.update(links.missing)
    return links


def _cpu_name() -> str:
    return cpu_model_name(_read(Path("/proc/cpuinfo")) or "") or platform.processor() or "CPU"


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


def _visible_gpus() -> tuple[Gpu, ...]:
    # torch is imported here because `machine` and everything that plans with it must work without.
    import torch

    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(name=p.name, memory_bytes=int(p.total_memory)) for p in properties)

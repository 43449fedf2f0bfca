"""Paths between the GPUs of a host, by NVML.

NVML: https://docs.nvidia.com/deploy/nvml-api/, through the package nvidia-ml-py. The module is
given, so that tests bring one of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flashhead_topology.place import PathKind, PeerPath

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
                missing["paths"] = f"NVML does not tell some paths to other GPUs ({error})"
        try:
            pcie = (
                int(nvml.nvmlDeviceGetCurrPcieLinkGeneration(own)),
                int(nvml.nvmlDeviceGetCurrPcieLinkWidth(own)),
            )
        except nvml.NVMLError as error:
            pcie, missing["pcie"] = None, f"NVML does not tell the PCIe link ({error})"
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

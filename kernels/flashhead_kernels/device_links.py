"""Whether this rank's GPU and its peers' can work on one word atomically, which PCIe mostly cannot.

The exchange kernel signals by atomic operations on a peer's memory while the peer polls it by its
own. Without native atomics between the two a signal could be lost. torch has no
call for it, so the driver is asked. Not run: no machine with a GPU was at hand.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping

import torch

_NATIVE_ATOMIC_SUPPORTED = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of cuda.h."""


def link_obstacle(device: torch.device, peer_uuids: Iterable[str]) -> str | None:
    """Why atomics between a CUDA device and its peers' are not sure to hold; None if they are.

    peer_uuids: of the peers' devices; the device's own may be among them, and needs no link.
    """
    ordinals = visible_ordinals()
    own = torch.cuda.current_device() if device.index is None else device.index
    for uuid in dict.fromkeys(peer_uuids):
        peer = ordinals.get(uuid)
        if peer is None:
            return "a peer's GPU is hidden from it, so that atomics between the two are not known"
        if peer != own and not has_native_atomics(own, peer):
            return f"its GPU {own} and GPU {peer} have no native atomics between them"
    return None


def visible_ordinals() -> Mapping[str, int]:
    """Number of each visible CUDA device by its uuid."""
    return {
        str(torch.cuda.get_device_properties(ordinal).uuid): ordinal
        for ordinal in range(torch.cuda.device_count())
    }


def has_native_atomics(own: int, peer: int) -> bool:
    """Whether the driver says so, of two visible devices; False where it cannot be asked."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    value, handles = ctypes.c_int(0), []
    for ordinal in (own, peer):
        handle = ctypes.c_int(0)
        if driver.cuDeviceGet(ctypes.byref(handle), ordinal) != 0:
            return False
        handles.append(handle)
    status = driver.cuDeviceGetP2PAttribute(ctypes.byref(value), _NATIVE_ATOMIC_SUPPORTED, *handles)
    return status == 0 and value.value == 1

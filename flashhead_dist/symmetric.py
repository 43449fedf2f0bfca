"""Key exchange through torch symmetric memory: the words, the addresses, and the launch.

Written against torch 2.11 to 2.13, whose symmetric memory is declared alpha. What needs CUDA
here (`allocate_words`, `map_words`, `link_obstacle`) has not been run; `SymmetricExchange` runs
interpreted on a CPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashhead_kernels.keys import merged_keys, num_words

SHARED_DEVICE_VARIABLE = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
_MIN_CAPABILITY = (7, 0)
_TRIAL_LIMIT_S = 60.0
_FAILED = -1
_NATIVE_ATOMIC_SUPPORTED = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of cuda.h."""


@dataclass
class _Mappings:
    """What this process has mapped, kept to its end.

    Words that were freed would be handed out again, mapped already, on one rank sooner than on
    another, and then not all ranks would come to the rendezvous.
    """

    count: int = 0
    kept: list[Any] = field(default_factory=list)


_mappings = _Mappings()


@dataclass(frozen=True)
class Place:
    """Where a rank runs: a machine, and a device of it; and how often it has mapped memory."""

    host: str
    device_uuid: str
    may_share_device: bool
    num_mappings: int = 0


class SymmetricExchange:
    """One rank's end of an exchange; see `triton_exchange` for the protocol.

    words: int64 `[num_words(P, capacity)]`, zero, which every peer can write.
    addresses: int64 `[P]` on the same device, where this rank finds each rank's words.
    memory: whatever must live as long as the mappings behind the addresses.

    One exchange serves one stream, or graphs replayed in one stream: two rounds at once would share
    their slots.
    """

    def __init__(
        self, words: Tensor, addresses: Tensor, rank: int, capacity: int, memory: Any = None
    ) -> None:
        self.rank, self.tp_size, self.capacity = rank, addresses.numel(), capacity
        if words.numel() != num_words(self.tp_size, capacity) or words.dtype != torch.int64:
            raise ValueError(f"{words.numel()} words do not fit {self.tp_size} x {capacity} keys")
        self._words, self._addresses, self._memory = words, addresses, memory
        self._epoch = torch.zeros(1, dtype=torch.int64, device=words.device)

    def accepts(self, tensor: Tensor) -> bool:
        """Whether `all_reduce_max` can take it; the same on every rank for equal shapes."""
        return (
            tensor.dtype == torch.int64
            and 1 <= tensor.numel() <= self.capacity
            and tensor.device == self._words.device
        )

    def all_reduce_max(self, keys: Tensor, unpacked: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Elementwise maximum over the ranks, in place; every rank gives `keys` of one shape.

        unpacked: int64 token ids and float32 logits of that shape, into which the maximum's go.

        One launch on the current stream, without allocation or host synchronisation, so it can be
        captured in a CUDA graph.

        Raises:
            ValueError: keys that `accepts` refuses, or that are not contiguous.
        """
        from flashhead_kernels.triton_exchange import exchange_keys

        # Triton launches on the current device, whatever its tensors are on.
        with torch.cuda.device_of(self._words):  # type: ignore[no-untyped-call]
            exchange_keys(
                keys, keys, self._addresses, self._epoch, self.rank, self.capacity, unpacked
            )
        return keys

    def compile(self) -> None:
        """Compile the kernel without a launch, so that a failure leaves no peer waiting."""
        from flashhead_kernels.triton_exchange import compile_exchange

        keys = torch.zeros(self.capacity, dtype=torch.int64, device=self._words.device)
        with torch.cuda.device_of(self._words):  # type: ignore[no-untyped-call]
            compile_exchange(keys, self._addresses, self._epoch, self.rank, self.capacity)

    def trial_problem(self) -> str | None:
        """Run a round through each buffer, all ranks together; what went wrong, or None.

        Raises:
            TimeoutError: a round has not ended; the stream waits still.
        """
        lanes = torch.arange(self.capacity).unsqueeze(0)
        ranks = torch.arange(self.tp_size).unsqueeze(1)
        for sign in (1, -1):
            # Every rank holds the greatest key of some lanes.
            rank_keys = sign * ((lanes * 7 + ranks * 5) % (3 * self.tp_size) + 2**40 * lanes)
            keys = rank_keys[self.rank].to(self._words.device)
            self.all_reduce_max(keys)
            if not _ended(keys.device, _TRIAL_LIMIT_S):
                raise TimeoutError(f"a first round had not ended after {_TRIAL_LIMIT_S:.0f} s")
            if not torch.equal(keys.cpu(), merged_keys(rank_keys)):
                return "a first round of keys came out wrong"
        return None


def local_obstacle(device: torch.device) -> str | None:
    """Why this rank cannot use symmetric memory, as far as it can see alone; None if it can."""
    if device.type != "cuda":
        return f"its tensors are on {device.type}, not on CUDA"
    if not torch.cuda.is_available():
        return "it has no CUDA device"
    if torch.version.hip is not None:
        return "its torch is for ROCm, on which the exchange kernel was never tried"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"its device of capability {capability[0]}.{capability[1]} is older than 7.0"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed there: pip install 'triton>=3.6'"
    try:
        import torch.distributed._symmetric_memory as symm_mem
    except ImportError as error:
        return f"its torch has no symmetric memory: {error}"
    if not (hasattr(symm_mem, "empty") and hasattr(symm_mem, "rendezvous")):
        return f"torch {torch.__version__} has another interface to symmetric memory"
    return None


def local_place(device: torch.device) -> Place:
    """Where this rank runs; of a device that is not CUDA's, its name stands for the uuid."""
    cuda = device.type == "cuda" and torch.cuda.is_available()
    uuid = str(torch.cuda.get_device_properties(device).uuid) if cuda else str(device)
    # Containers on one machine may share a host name, machines a container's name: boot ids differ.
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else ""
    shared = os.environ.get(SHARED_DEVICE_VARIABLE, "") == "1"
    return Place(boot or socket.gethostname(), uuid, shared, _mappings.count)


def group_obstacle(places: list[Place]) -> str | None:
    """Why ranks at these places, in rank order, cannot share memory; None if they may try."""
    hosts = len({place.host for place in places})
    if hosts > 1:
        return f"the ranks are on {hosts} machines, and the kernel writes within one"
    devices = len({place.device_uuid for place in places})
    if devices < len(places) and not all(place.may_share_device for place in places):
        return (
            f"{len(places)} ranks share {devices} device(s), which torch allows where "
            f"{SHARED_DEVICE_VARIABLE}=1 is set for every rank"
        )
    mappings = {place.num_mappings for place in places}
    if _FAILED in mappings:
        return "an earlier mapping failed on some rank"
    if len(mappings) > 1:
        # The ranks of torch's rendezvous number their messages by what each has done before,
        # in 2.11 to 2.13 whichever the group: pytorch issue 196082.
        return "the ranks have mapped memory in different numbers of groups: open larger ones first"
    return None


def link_obstacle(device: torch.device, peer_uuids: Iterable[str]) -> str | None:
    """Why atomics between a CUDA device and its peers' are not sure to hold; None if they are.

    The exchange kernel signals by atomic operations on a peer's memory while the peer polls it by
    its own; without native atomics, which PCIe mostly lacks, a signal could be lost. torch has no
    call for it, so the driver is asked.

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


@dataclass(frozen=True)
class MappedWords:
    """A rank's words, and where it sees the allocations of all ranks, its own among them.

    offset: bytes from the start of this rank's allocation to its words. A tensor may begin inside a
    pooled allocation, on each rank at another place, so the ranks tell each other theirs.
    """

    words: Tensor
    allocations: list[int]
    offset: int
    handle: Any

    def exchange(self, rank: int, offsets: list[int], capacity: int) -> SymmetricExchange:
        """This rank's end, from the `offset` of every rank, in rank order."""
        pointers = [base + offset for base, offset in zip(self.allocations, offsets, strict=True)]
        addresses = torch.tensor(pointers, dtype=torch.int64, device=self.words.device)
        return SymmetricExchange(self.words, addresses, rank, capacity, memory=self.handle)


def allocate_words(tp_size: int, device: torch.device, capacity: int) -> Tensor:
    """Zero words in memory that peers can map.

    Raises:
        RuntimeError: torch or the driver could not allocate it.
    """
    import torch.distributed._symmetric_memory as symm_mem

    with torch.cuda.device(device):
        # torch keeps a pool for each device, and takes one without an index for another.
        device = torch.device("cuda", torch.cuda.current_device())
        words: Tensor = symm_mem.empty(
            num_words(tp_size, capacity), dtype=torch.int64, device=device
        )
        words.zero_()
        torch.cuda.synchronize(device)
    return words


def map_words(group: dist.ProcessGroup, words: Tensor) -> MappedWords:
    """Map the peers' words; every rank of the group calls it, once all have allocated theirs.

    Raises:
        RuntimeError: torch or the driver could not map the memory.
    """
    import torch.distributed._symmetric_memory as symm_mem

    number, _mappings.count = _mappings.count + 1, _FAILED
    with torch.cuda.device(words.device):
        handle = symm_mem.rendezvous(words, group.group_name)
        if handle is None or not all(handle.buffer_ptrs):
            raise RuntimeError("torch mapped no address of a peer's memory")
        allocations = list(handle.buffer_ptrs)
    _mappings.count = number
    _mappings.kept.append((words, handle))
    offset = words.data_ptr() - allocations[dist.get_rank(group)]
    return MappedWords(words, allocations, offset, handle)


def _ended(device: torch.device, limit_s: float) -> bool:
    """Wait for the current stream of a CUDA device, no longer than the limit."""
    if device.type != "cuda":
        return True
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    deadline_s = time.monotonic() + limit_s
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline_s:
            return False
        time.sleep(1e-3)
    return True

"""The one timer: clocks of a CPU and a GPU, rounds of interleaved steps, and CUDA graphs.

The ranks' meeting is passed in, so that this module needs no process group.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
Run = Callable[[], object]

_READS = 16
_WARM_UPS = 3
_SMALLEST_SCRATCH_BYTES = 64 << 20
_SIMULATED_BYTES = 1 << 16


class Clock(Protocol):
    """Times work on `device`, from the moment at which all ranks of a group begin.

    cache_bytes: of the last-level cache that the clock empties; 0 where it does not.
    graphs: whether `capture` makes CUDA graphs. simulated: the device is a stand-in.
    """

    device: torch.device
    cache_bytes: int
    graphs: bool
    simulated: bool
    label: str

    def ready(self) -> None:
        """Meet the other ranks, with a cold cache where the clock empties it."""

    def time_us(self, work: Run, *, launches: bool = False) -> float:
        """Be ready, run `work`, and return the microseconds that it took.

        launches: whether the host's launches are part of the time on a GPU; a CPU has none.
        """

    def capture(self, steps: Sequence[Callable[[], T]]) -> tuple[Run, list[T]]:
        """See the function of that name."""


class HostClock:
    """The host's clock, for a CPU, whose work has ended when a call returns.

    meet: waits for the other ranks. Caches are as the work before left them: interleaved heads
    exceed any cache together.
    """

    cache_bytes = 0
    graphs = False
    simulated = False
    label = "wall clock"

    def __init__(self, meet: Run = lambda: None) -> None:
        self.device = torch.device("cpu")
        self._meet = meet

    def ready(self) -> None:
        self._meet()

    def time_us(self, work: Run, *, launches: bool = False) -> float:
        self.ready()
        start_s = time.perf_counter()
        work()
        return (time.perf_counter() - start_s) * 1e6

    def capture(self, steps: Sequence[Callable[[], T]]) -> tuple[Run, list[T]]:
        raise NotImplementedError("a CPU has no graphs")


class StreamClock:
    """Two events on a GPU's current stream, around work that the host queued ahead of the GPU.

    The host queues reads, the meeting, the start event, the work and the stop event, and waits for
    nothing until then. Each part has its reason:

    1. The GPU reads a buffer of twice its L2 or more, over and over. A shard may be smaller than L2
       and would be read from it at every step, which no decoder sees: the model's body runs between
       two steps of a head. The buffer is read and not written, since L2 would write a dirty line
       back to memory within the work that evicts it.
    2. All reads together keep the GPU busy for some hundreds of microseconds (by their bytes 330 on
       an H200), in which the host queues the rest. An event recorded on an idle GPU has its time
       before the host has launched anything, and the launches are then part of the figure; this is
       what `launches` asks for.
    3. The ranks meet on the stream before the start event. Ranks that leave a host's barrier still
       have to launch their work, and differ by as much as their hosts do. Without NCCL only the
       host can meet, and does so before the reads.

    The launches of a step from Python (no graph) are hidden too, while the host keeps ahead of the
    GPU. Where the host takes longer to launch the step than the GPU takes for reads and step, or
    waits for the GPU in the middle of the step, the GPU is idle between kernels. These gaps are
    part of the time: an eager decoder has them too.
    """

    graphs = True
    label = "CUDA events"

    def __init__(
        self,
        device: torch.device,
        *,
        meet_on_host: Run | None = None,
        meet_on_stream: Run | None = None,
        simulated: bool = False,
    ) -> None:
        """simulated: the device is a stand-in without a cache, whose buffers need no size."""
        self.device, self.simulated = device, simulated
        self._meet_on_host, self._meet_on_stream = meet_on_host, meet_on_stream
        l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self.cache_bytes = 0 if simulated else l2_bytes
        scratch_bytes = max(2 * l2_bytes, _SMALLEST_SCRATCH_BYTES)
        scratch_bytes = _SIMULATED_BYTES if simulated else scratch_bytes
        self._scratch = torch.zeros(scratch_bytes // 4, dtype=torch.float32, device=device)
        self._sink = torch.zeros((), dtype=torch.float32, device=device)

    def ready(self) -> None:
        """Queue the reads and the meeting."""
        if self._meet_on_host is not None:
            self._meet_on_host()
        for _ in range(_READS):
            torch.sum(self._scratch, dim=0, out=self._sink)
        if self._meet_on_stream is not None:
            self._meet_on_stream()

    def time_us(self, work: Run, *, launches: bool = False) -> float:
        stream = torch.cuda.current_stream(self.device)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.ready()
        if launches:
            stream.synchronize()
        start.record(stream)
        work()
        stop.record(stream)
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3

    def capture(self, steps: Sequence[Callable[[], T]]) -> tuple[Run, list[T]]:
        return capture(steps, self.device)


def clock_of(device: torch.device) -> Clock:
    """The clock of a device, for one process by itself."""
    return StreamClock(device) if device.type == "cuda" else HostClock()


def time_steps(
    steps: Mapping[str, Callable[[int], T]], rounds: int, *, first: int = 0
) -> dict[str, list[T]]:
    """Results of `steps[name](round)` of rounds `first`, `first + 1`, ... by name.

    In every round each step runs once, in an order that rotates: a drift of the machine falls on
    all alike, and no step always follows the same one.
    """
    names = list(steps)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(first, first + rounds):
        start = number % max(1, len(names))
        for name in (*names[start:], *names[:start]):
            results[name].append(steps[name](number))
    return results


def capture(steps: Sequence[Callable[[], T]], device: torch.device) -> tuple[Run, list[T]]:
    """Steps as one CUDA graph: what replays it on the current stream, and the steps' results.

    The steps first run on the stream of the capture: kernels keep a workspace for each stream, and
    one that is made while capturing would never be filled. The graph holds addresses: the caller
    keeps alive what the steps read.

    Raises:
        RuntimeError: the steps cannot be captured.
    """
    current = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            for step in steps:
                step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [step() for step in steps]
    current.wait_stream(stream)
    return graph.replay, results


@functools.cache
def kernels_hash() -> str:
    """Sixteen hex digits of the sha256 of this package's sources.

    What was measured with other sources says nothing of these.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]

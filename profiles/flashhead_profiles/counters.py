"""Bytes counted by the kernel on network interfaces, and by an NVIDIA GPU through NVML.

**Network.** Every byte *sent* on an interface inside this network namespace: payload, protocol of
the collective library, TCP and IP headers, acknowledgements, and other traffic. So a figure comes
from several bursts of equal steps, each paired with a quiet window of the same length and the same
handshakes: the least disturbed burst less the least disturbed quiet window. Other traffic can only
add, and it must fall on every burst or on every quiet window to show.

**GPU.** Cumulative counters of NVLink and PCIe, read before and after a region, and rates between
two samples of the GPU performance monitor (GPM; Hopper or later). As nvidia-ml-py 13 numbers them
(https://docs.nvidia.com/deploy/nvml-api/):

    138, 139  NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, _RX   KiB over all links (scope UINT_MAX)
    197, 198  NVML_FI_DEV_PCIE_COUNT_TX_BYTES, _RX_BYTES   bytes; the hardware's counter may wrap
    GPM 10    NVML_GPM_METRIC_DRAM_BW_UTIL                 % of the peak bandwidth
    GPM 60    NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC      MiB a second over all links
    GPM 61    NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC      MiB a second over all links

A count that is unavailable is None with the reason, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PROC_NET_DEV = Path("/proc/self/net/dev")
"""The counters of the namespace that this process is in."""

_SENT_BYTES_FIELD = 8


@dataclass(frozen=True)
class Reading:
    """Bytes sent so far on some interfaces, or the reason why that is not known."""

    sent_bytes: int | None
    reason: str | None = None


@dataclass(frozen=True)
class Burst:
    """One burst of equal steps and its quiet twin; seconds are the lengths of the two windows."""

    num_steps: int
    sent_bytes: int
    seconds: float
    quiet_sent_bytes: int
    quiet_seconds: float

    @property
    def bytes_per_step(self) -> float:
        """Bytes a step sent in this burst, less its own quiet window's at the same rate."""
        background = self.quiet_sent_bytes * self.seconds / self.quiet_seconds
        return (self.sent_bytes - background) / self.num_steps


@dataclass(frozen=True)
class CountedBytes:
    """Bytes sent in one step; `least` and `greatest` are those of single bursts."""

    per_step: float | None
    least: float | None = None
    greatest: float | None = None
    num_bursts: int = 0
    reason: str | None = None


def parse_proc_net_dev(text: str) -> dict[str, int]:
    """Return bytes sent by interface name from the text of /proc/net/dev.

    Raises:
        ValueError: the text is not in the kernel's format.
    """
    sent: dict[str, int] = {}
    for line in text.splitlines()[2:]:
        name, separator, rest = line.partition(":")
        fields = rest.split()
        if not separator or len(fields) <= _SENT_BYTES_FIELD:
            raise ValueError(f"not a line of /proc/net/dev: {line!r}")
        sent[name.strip()] = int(fields[_SENT_BYTES_FIELD])
    return sent


def read_sent_bytes(interfaces: Iterable[str], path: Path = PROC_NET_DEV) -> Reading:
    """Return the sum of bytes sent on `interfaces`; None with a reason where one is missing."""
    try:
        counters = parse_proc_net_dev(path.read_text())
    except (OSError, ValueError) as error:
        return Reading(None, f"{path} is not readable: {error}")
    names = list(interfaces)
    missing = [name for name in names if name not in counters]
    if missing:
        return Reading(None, f"no interface {', '.join(missing)} in {path}")
    return Reading(sum(counters[name] for name in names))


def network_namespace() -> str | None:
    """Return an identifier of this process's network namespace, or None where there is none."""
    link = Path("/proc/self/ns/net")
    return str(link.readlink()) if link.exists() else None


def interfaces_to_count(num_namespaces: int, path: Path = PROC_NET_DEV) -> tuple[str, ...]:
    """Choose the interfaces that carry the ranks' traffic in this namespace.

    Ranks in one namespace talk over `lo`, whatever address they use: the kernel routes a packet for
    its own address there. With several namespaces (or hosts) the traffic also leaves by the others;
    bridges and their member interfaces would count it twice, which a private namespace does not
    have.
    """
    if num_namespaces == 1:
        return ("lo",)
    try:
        return tuple(sorted(parse_proc_net_dev(path.read_text())))
    except (OSError, ValueError):
        return ("lo",)


def least_disturbed(bursts: Sequence[Burst]) -> CountedBytes:
    """Return the bytes of a step from `bursts` of equal numbers of steps.

    The burst with the fewest bytes, less those of the quiet window with the lowest rate over that
    burst's length. A difference below zero within the bursts' own scatter is no traffic at all.
    """
    if not bursts:
        return CountedBytes(None, reason="no burst was counted")
    calm = min(bursts, key=lambda burst: burst.sent_bytes)
    quiet_rate = min(burst.quiet_sent_bytes / burst.quiet_seconds for burst in bursts)
    per_step = (calm.sent_bytes - quiet_rate * calm.seconds) / calm.num_steps
    single = [burst.bytes_per_step for burst in bursts]
    if per_step < 0 and max(single) < 0:
        return CountedBytes(
            None,
            num_bursts=len(bursts),
            reason="other traffic on the interface exceeded this run's own",
        )
    return CountedBytes(max(0.0, per_step), min(single), max(single), len(bursts))


NVLINK_SENT, NVLINK_RECEIVED = "nvlink_sent", "nvlink_received"
PCIE_SENT, PCIE_RECEIVED = "pcie_sent", "pcie_received"
MEMORY = "memory_read_and_written"
NVLINK_SENT_GPM, NVLINK_RECEIVED_GPM = "nvlink_sent_gpm", "nvlink_received_gpm"
COUNTERS = (
    NVLINK_SENT,
    NVLINK_RECEIVED,
    PCIE_SENT,
    PCIE_RECEIVED,
    NVLINK_SENT_GPM,
    NVLINK_RECEIVED_GPM,
    MEMORY,
)

_ALL_LINKS = 0xFFFFFFFF
_KIB, _MIB = 1 << 10, 1 << 20
# Of nvmlValue_t, by nvmlValueType_t: which one a field has differs between drivers.
_MEMBERS = {1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}
# Field, scope and bytes a unit.
_FIELDS = {
    NVLINK_SENT: ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", _ALL_LINKS, _KIB),
    NVLINK_RECEIVED: ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", _ALL_LINKS, _KIB),
    PCIE_SENT: ("NVML_FI_DEV_PCIE_COUNT_TX_BYTES", 0, 1),
    PCIE_RECEIVED: ("NVML_FI_DEV_PCIE_COUNT_RX_BYTES", 0, 1),
}

_METRICS = {
    NVLINK_SENT_GPM: "NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC",
    NVLINK_RECEIVED_GPM: "NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC",
    MEMORY: "NVML_GPM_METRIC_DRAM_BW_UTIL",
}


@dataclass(frozen=True)
class Counted:
    """Bytes in a region, or the reason why they are not known."""

    num_bytes: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.num_bytes is None) != (self.reason is not None):
            raise ValueError("a count is known or has a reason, not both")


@dataclass(frozen=True)
class _Sample:
    """Readings at one moment: bytes so far by name, and a GPM sample where the GPU gives one."""

    fields: Mapping[str, Counted]
    gpm: Any


class DeviceCounters:
    """The counters of one GPU; `start`, the work, then `stop`.

    The work must have ended, and not only been launched, when `stop` is called. Others that use the
    GPU or its links are counted too. A region of some 100 ms or more: GPM's samples are that far
    apart.
    """

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        """uuid: the GPU's, as `torch.cuda.get_device_properties(device).uuid` gives it.

        nvml: the pynvml module, or what stands in for it in a test.
        """
        self._reason: str | None = None
        self._start: _Sample | None = None
        try:
            self._nvml = nvml or import_module("pynvml")
        except ImportError:
            self._reason = "pynvml is not installed: pip install -e '.[gpu]'"
            return
        try:
            self._nvml.nvmlInit()
            name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            self._device = self._nvml.nvmlDeviceGetHandleByUUID(name.encode())
        except self._nvml.NVMLError as error:
            self._reason = f"NVML: {error}"

    def start(self) -> None:
        """The region begins."""
        if self._reason is None:
            self._start = self._sample()

    def stop(self, seconds: float) -> dict[str, Counted]:
        """Bytes by the names in `COUNTERS` since `start`, which was `seconds` ago."""
        if self._reason is not None:
            return dict.fromkeys(COUNTERS, Counted(None, self._reason))
        if self._start is None:
            raise RuntimeError("stop without start")
        before, after = self._start, self._sample()
        counted = {name: _grown(before.fields[name], after.fields[name]) for name in _FIELDS}
        counted |= self._gpm_counts(before.gpm, after.gpm, seconds)
        self._start = None
        return counted

    def _sample(self) -> _Sample:
        fields = {name: self._field(*_FIELDS[name]) for name in _FIELDS}
        return _Sample(fields, self._gpm_sample())

    def _field(self, name: str, scope: int, unit_bytes: int) -> Counted:
        number = getattr(self._nvml, name, None)
        if number is None:
            return Counted(None, f"this pynvml does not know {name}")
        try:
            (value,) = self._nvml.nvmlDeviceGetFieldValues(self._device, [(number, scope)])
        except self._nvml.NVMLError as error:
            return Counted(None, f"{name}: {error}")
        if value.nvmlReturn != self._nvml.NVML_SUCCESS:
            return Counted(None, f"{name}: {self._nvml.NVMLError(value.nvmlReturn)}")
        member = _MEMBERS.get(value.valueType)
        if member is None:
            return Counted(None, f"{name}: a value of the unknown type {value.valueType}")
        return Counted(float(getattr(value.value, member) * unit_bytes))

    def _gpm_sample(self) -> Any:
        try:
            support = self._nvml.nvmlGpmQueryDeviceSupport(self._device)
            if not support.isSupportedDevice:
                return "GPM metrics need a GPU of the Hopper generation or later"
            return self._nvml.nvmlGpmSampleGet(self._device, self._nvml.nvmlGpmSampleAlloc())
        except (self._nvml.NVMLError, AttributeError) as error:
            return f"GPM: {error}"

    def _gpm_counts(self, before: Any, after: Any, seconds: float) -> dict[str, Counted]:
        """From two samples, or reasons why there are none, to bytes; frees the samples."""
        samples = [sample for sample in (before, after) if not isinstance(sample, str)]
        try:
            if len(samples) < 2:
                reason = before if isinstance(before, str) else after
                return dict.fromkeys(_METRICS, Counted(None, reason))
            return {name: self._gpm_count(name, before, after, seconds) for name in _METRICS}
        finally:
            for sample in samples:
                self._nvml.nvmlGpmSampleFree(sample)

    def _gpm_count(self, name: str, before: Any, after: Any, seconds: float) -> Counted:
        nvml, constant = self._nvml, _METRICS[name]
        number = getattr(nvml, constant, None)
        if number is None:
            return Counted(None, f"this pynvml does not know {constant}")
        try:
            asked = nvml.c_nvmlGpmMetricsGet_t()
            asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
            asked.numMetrics = 1
            asked.sample1, asked.sample2 = before, after
            asked.metrics[0].metricId = number
            metric = nvml.nvmlGpmMetricsGet(asked).metrics[0]
            if metric.nvmlReturn != nvml.NVML_SUCCESS:
                return Counted(None, f"{constant}: {nvml.NVMLError(metric.nvmlReturn)}")
            if not math.isfinite(metric.value):
                return Counted(None, f"{constant}: GPM has no value between its two samples")
            unit_bytes = self._peak_bytes_per_s() / 100 if name == MEMORY else _MIB
            return Counted(metric.value * unit_bytes * seconds)
        except nvml.NVMLError as error:
            return Counted(None, f"{constant}: {error}")

    def _peak_bytes_per_s(self) -> float:
        # Twice the clock: memory of a GPU moves data on both edges.
        nvml = self._nvml
        clock_hz = nvml.nvmlDeviceGetMaxClockInfo(self._device, nvml.NVML_CLOCK_MEM) * 1e6
        return float(2 * clock_hz * nvml.nvmlDeviceGetMemoryBusWidth(self._device) / 8)


def _grown(before: Counted, after: Counted) -> Counted:
    if before.num_bytes is None:
        return before
    if after.num_bytes is None:
        return after
    difference = after.num_bytes - before.num_bytes
    if difference < 0:
        return Counted(None, "the counter was reset or wrapped within the region")
    return Counted(difference)

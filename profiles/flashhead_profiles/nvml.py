"""What an NVIDIA GPU counts of its links and its memory, through NVML.

Cumulative counters of NVLink and PCIe, read before and after a region, and the share of the
memory's bandwidth in use between two samples. Fields, as nvidia-ml-py 13 numbers them:

    138, 139  NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, _RX   KiB over all links (scope UINT_MAX)
    197, 198  NVML_FI_DEV_PCIE_COUNT_TX_BYTES, _RX_BYTES   bytes; the hardware's counter may wrap
    GPM 10    NVML_GPM_METRIC_DRAM_BW_UTIL                 % of the peak bandwidth, Hopper and later

(https://docs.nvidia.com/deploy/nvml-api/). A counter that this GPU, its driver or this machine does
not have is None with the reason, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

NVLINK_SENT, NVLINK_RECEIVED = "nvlink_sent", "nvlink_received"
PCIE_SENT, PCIE_RECEIVED = "pcie_sent", "pcie_received"
MEMORY = "memory_read_and_written"
COUNTERS = (NVLINK_SENT, NVLINK_RECEIVED, PCIE_SENT, PCIE_RECEIVED, MEMORY)

_ALL_LINKS = 0xFFFFFFFF
_KIB = 1024
# Of nvmlValue_t, by nvmlValueType_t: which one a field has differs between drivers.
_MEMBERS = {1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}
# Field, scope and bytes a unit.
_FIELDS = {
    NVLINK_SENT: ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", _ALL_LINKS, _KIB),
    NVLINK_RECEIVED: ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", _ALL_LINKS, _KIB),
    PCIE_SENT: ("NVML_FI_DEV_PCIE_COUNT_TX_BYTES", 0, 1),
    PCIE_RECEIVED: ("NVML_FI_DEV_PCIE_COUNT_RX_BYTES", 0, 1),
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
            self._reason = "pynvml is not installed: pip install 'flashhead-dist[gpu]'"
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
        counted[MEMORY] = self._memory(before, after, seconds)
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

    def _memory(self, before: _Sample, after: _Sample, seconds: float) -> Counted:
        """From the share of the peak bandwidth in use to bytes; frees the samples."""
        for sample in (before.gpm, after.gpm):
            if isinstance(sample, str):
                return Counted(None, sample)
        nvml = self._nvml
        try:
            asked = nvml.c_nvmlGpmMetricsGet_t()
            asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
            asked.numMetrics = 1
            asked.sample1, asked.sample2 = before.gpm, after.gpm
            asked.metrics[0].metricId = nvml.NVML_GPM_METRIC_DRAM_BW_UTIL
            metric = nvml.nvmlGpmMetricsGet(asked).metrics[0]
            if metric.nvmlReturn != nvml.NVML_SUCCESS:
                return Counted(None, f"GPM: {nvml.NVMLError(metric.nvmlReturn)}")
            # Twice the clock: memory of a GPU moves data on both edges.
            clock_hz = nvml.nvmlDeviceGetMaxClockInfo(self._device, nvml.NVML_CLOCK_MEM) * 1e6
            peak = 2 * clock_hz * nvml.nvmlDeviceGetMemoryBusWidth(self._device) / 8
            return Counted(metric.value / 100 * peak * seconds)
        except nvml.NVMLError as error:
            return Counted(None, f"GPM: {error}")
        finally:
            for sample in (before.gpm, after.gpm):
                nvml.nvmlGpmSampleFree(sample)


def _grown(before: Counted, after: Counted) -> Counted:
    if before.num_bytes is None:
        return before
    if after.num_bytes is None:
        return after
    difference = after.num_bytes - before.num_bytes
    if difference < 0:
        return Counted(None, "the counter was reset or wrapped within the region")
    return Counted(difference)

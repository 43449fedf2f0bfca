"""NVML's counters from a stand-in for pynvml with its real structures, and where there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from flashhead_profiles.counters import (
    COUNTERS,
    MEMORY,
    NVLINK_RECEIVED,
    NVLINK_RECEIVED_GPM,
    NVLINK_SENT,
    NVLINK_SENT_GPM,
    PCIE_RECEIVED,
    PCIE_SENT,
    Counted,
    DeviceCounters,
)

ALL_LINKS = 0xFFFFFFFF


class Gpu:
    """Answers as NVML does: `fields` by (field, scope), `metrics` by number, others unsupported."""

    def __init__(
        self,
        fields: dict[tuple[int, int], list[Any]],
        *,
        hopper: bool = True,
        metrics: dict[int, float] | None = None,
    ) -> None:
        self.fields, self.hopper, self.freed = fields, hopper, 0
        self.metrics = {10: 50.0, 60: 3.0, 61: 2.0} if metrics is None else metrics

    def __getattr__(self, name: str) -> Any:
        # Constants and structures are the real ones.
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:  # noqa: N802
        """There is a driver."""

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:  # noqa: N802
        assert uuid == b"GPU-1234"
        return "handle"

    def nvmlDeviceGetFieldValues(self, handle: str, asked: list[tuple[int, int]]) -> Any:  # noqa: N802
        assert handle == "handle"
        (key,) = asked
        value = pynvml.c_nvmlFieldValue_t()
        if key not in self.fields:
            value.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED
            return [value]
        number, value.valueType = self.fields[key].pop(0)
        member = {1: "uiVal", 3: "ullVal"}[value.valueType]
        setattr(value.value, member, number)
        return [value]

    def nvmlGpmQueryDeviceSupport(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(isSupportedDevice=int(self.hopper))

    def nvmlGpmSampleAlloc(self) -> Any:  # noqa: N802
        return pynvml.c_nvmlGpmSample_t()

    def nvmlGpmSampleGet(self, handle: str, sample: Any) -> Any:  # noqa: N802
        return sample

    def nvmlGpmSampleFree(self, sample: Any) -> None:  # noqa: N802
        self.freed += 1

    def nvmlGpmMetricsGet(self, asked: Any) -> Any:  # noqa: N802
        assert asked.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        for metric in asked.metrics[: asked.numMetrics]:
            if metric.metricId in self.metrics:
                metric.value = self.metrics[metric.metricId]
            else:
                metric.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED
        return asked

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        assert kind == pynvml.NVML_CLOCK_MEM
        return 2619

    def nvmlDeviceGetMemoryBusWidth(self, handle: str) -> int:  # noqa: N802
        return 5120


def fields() -> dict[tuple[int, int], list[Any]]:
    """NVLink's are 64 bits wide and in KiB; PCIe's are 32 bits wide on this driver, in bytes."""
    sent = [(10_000_000_000, 3), (10_000_000_004, 3)]
    return {
        (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, ALL_LINKS): sent,
        (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, ALL_LINKS): [(7, 3), (9, 3)],
        (pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, 0): [(100, 1), (1100, 1)],
        (pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, 0): [(4_000_000_000, 1), (5, 1)],
    }  # fmt: skip


def test_counters_are_bytes_in_the_region() -> None:
    gpu = Gpu(fields())
    counters = DeviceCounters("1234", gpu)
    counters.start()
    counted = counters.stop(0.5)
    assert set(counted) == set(COUNTERS)
    assert counted[NVLINK_SENT] == Counted(4096.0)
    assert counted[NVLINK_RECEIVED] == Counted(2048.0)
    assert counted[PCIE_SENT] == Counted(1000.0)
    # 5120 bits at twice 2619 MHz are 3.35 TB/s: an H100 SXM5's data sheet says so too.
    assert counted[MEMORY].num_bytes == pytest.approx(0.5 * 3.35e12 * 0.5, rel=0.01)
    # GPM gives MiB a second: 2 sent and 3 received, for half a second.
    assert counted[NVLINK_SENT_GPM] == Counted(float(1 << 20))
    assert counted[NVLINK_RECEIVED_GPM] == Counted(1.5 * (1 << 20))
    assert gpu.freed == 2


def test_a_gpm_metric_that_the_gpu_lacks_has_a_reason_and_leaves_the_others() -> None:
    """A Hopper card without NVLink, and one whose two samples give no number."""
    counters = DeviceCounters("1234", Gpu(fields(), metrics={10: 50.0, 60: float("nan")}))
    counters.start()
    counted = counters.stop(0.5)
    assert counted[MEMORY].num_bytes is not None
    assert counted[NVLINK_SENT_GPM].num_bytes is None
    assert "Not Supported" in str(counted[NVLINK_SENT_GPM].reason)
    assert counted[NVLINK_RECEIVED_GPM].num_bytes is None
    assert "NVLINK_TOTAL_RX" in str(counted[NVLINK_RECEIVED_GPM].reason)


def test_one_sample_of_two_is_none_and_is_freed() -> None:
    class Interrupted(Gpu):
        taken = 0

        def nvmlGpmSampleGet(self, handle: str, sample: Any) -> Any:  # noqa: N802
            self.taken += 1
            if self.taken == 2:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
            return sample

    gpu = Interrupted(fields())
    counters = DeviceCounters("1234", gpu)
    counters.start()
    counted = counters.stop(0.5)
    for name in (MEMORY, NVLINK_SENT_GPM, NVLINK_RECEIVED_GPM):
        assert "Unknown" in str(counted[name].reason)
    assert gpu.freed == 1


def test_a_counter_that_wrapped_is_missing_and_not_negative() -> None:
    counters = DeviceCounters("GPU-1234", Gpu(fields()))
    counters.start()
    received = counters.stop(0.5)[PCIE_RECEIVED]
    assert received.num_bytes is None
    assert "wrapped" in str(received.reason)


def test_what_the_gpu_lacks_is_missing_with_a_reason_and_never_zero() -> None:
    counters = DeviceCounters("GPU-1234", Gpu({}, hopper=False))
    counters.start()
    counted = counters.stop(0.5)
    assert all(count.num_bytes is None for count in counted.values())
    assert "Not Supported" in str(counted[NVLINK_SENT].reason)
    assert "Hopper" in str(counted[MEMORY].reason)
    assert "Hopper" in str(counted[NVLINK_SENT_GPM].reason)


def test_a_pynvml_without_a_field_says_so() -> None:
    class Old(Gpu):
        def __getattr__(self, name: str) -> Any:
            if name in (
                "NVML_FI_DEV_PCIE_COUNT_TX_BYTES",
                "NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC",
            ):
                raise AttributeError(name)
            return getattr(pynvml, name)

    counters = DeviceCounters("GPU-1234", Old(fields()))
    counters.start()
    counted = counters.stop(0.5)
    for name in (PCIE_SENT, NVLINK_SENT_GPM):
        assert "does not know" in str(counted[name].reason)


def test_without_a_driver_every_counter_says_why() -> None:
    """The real pynvml, on a machine without a GPU; else a GPU that is not there."""
    counters = DeviceCounters("GPU-00000000-0000-0000-0000-000000000000")
    counters.start()
    counted = counters.stop(0.1)
    assert set(counted) == set(COUNTERS)
    assert all(count.num_bytes is None and count.reason for count in counted.values())


def test_a_count_is_known_or_has_a_reason() -> None:
    with pytest.raises(ValueError, match="not both"):
        Counted(None)
    with pytest.raises(ValueError, match="not both"):
        Counted(1.0, "why")

"""Where the CUDA kernels keep what they measured of one launch and two: the cache folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashhead_dist.models import cache_root
from flashhead_dist.models.kept import KeptMeasurements
from flashhead_kernels import launch_choice


class KeptLaunches:
    """A `launch_choice.LaunchStore` in the cache. not_kept: why the last one was not, or None."""

    def __init__(self, *, remeasure: bool) -> None:
        self.not_kept: str | None = None
        self._remeasure = remeasure
        self._kept = KeptMeasurements(cache_root() / "measurements" / "launches.json")

    def find(self, case: Mapping[str, Any]) -> dict[str, Any] | None:
        """See `KeptMeasurements.find`; nothing where all is to be measured anew."""
        return None if self._remeasure else self._kept.find(case)

    def keep(self, case: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """See `KeptMeasurements.keep`."""
        self.not_kept = self._kept.keep(case, found)


def keep_launches(*, remeasure: bool = False) -> None:
    """Let this process's kernels find and keep their choices; the first call decides."""
    if launch_choice.table.store is None:
        launch_choice.table.store = KeptLaunches(remeasure=remeasure)


def describe_launches() -> dict[str, Any]:
    """This process's choices so far, with their times, as JSON values; none without CUDA."""
    store = launch_choice.table.store
    return {
        "choices": launch_choice.table.choices(),
        "not_kept": store.not_kept if isinstance(store, KeptLaunches) else None,
    }

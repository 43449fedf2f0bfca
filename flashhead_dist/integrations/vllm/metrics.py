"""Counters of the head, on vLLM's own /metrics and in `LLM.get_metrics()`.

The head runs in worker processes, and Prometheus reads the API server; vLLM forwards no counters of
others between them. So workers count in files of prometheus_client's multiprocess mode
(https://prometheus.github.io/client_python/multiprocess/), and a collector in vLLM's registry reads
them on request. With several API servers vLLM itself runs in that mode: the files are then in its
folder, and its own collector reads them.

vllm:flashhead_steps_total{head}, vllm:flashhead_rows_total{head}: forward passes of the head that
chose tokens, and their rows. vllm:flashhead_fallbacks_total{reason}: steps that took the dense
path, by why. vllm:flashhead_candidates_total: tokens scored exactly, on all ranks.
vllm:flashhead_exchange_bytes_total: what ranks gave to the head's own collectives.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "FLASHHEAD_METRICS_DIR"
"""Names the folder of the counters' files; set by the first process, inherited by workers."""

_VLLM_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
STEPS, ROWS = "vllm:flashhead_steps", "vllm:flashhead_rows"
FALLBACKS = "vllm:flashhead_fallbacks"
CANDIDATES, EXCHANGE_BYTES = "vllm:flashhead_candidates", "vllm:flashhead_exchange_bytes"
_HELP = {
    STEPS: "Steps of the output head, by the head that took them.",
    ROWS: "Rows of those steps.",
    FALLBACKS: "Steps that took the dense path although FlashHead is on, by reason.",
    CANDIDATES: "Tokens scored exactly by FlashHead, on all ranks.",
    EXCHANGE_BYTES: "Bytes that ranks gave to FlashHead's own collectives.",
}


def export_counters() -> None:
    """Make this process's Prometheus registry show what workers count; called in every process.

    Nothing is shown, and no folder made, before a head counts. Calling it again changes nothing.
    """
    if _VLLM_FOLDER_VARIABLE in os.environ or _registered:
        return
    from prometheus_client import REGISTRY

    if FOLDER_VARIABLE not in os.environ:
        folder = Path(tempfile.gettempdir()) / f"flashhead-metrics-{uuid.uuid4().hex}"
        os.environ[FOLDER_VARIABLE] = str(folder)
        atexit.register(_remove, folder, os.getpid())
    collector: Any = _Collector(Path(os.environ[FOLDER_VARIABLE]))
    REGISTRY.register(collector)
    _registered.append(collector)


class HeadCounters:
    """Counts the steps of one rank's head; only tp rank 0 counts what all ranks do alike.

    Raises OSError from the constructor where the folder of the files cannot be written.
    """

    def __init__(self, tp_rank: int) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        folder = os.environ.get(_VLLM_FOLDER_VARIABLE) or os.environ.get(FOLDER_VARIABLE)
        if folder is None:
            raise RuntimeError("export_counters() runs first: the plugin calls it")
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        # A number of its own: a process may hold two engines, one after the other.
        name = f"counter_flashhead{os.getpid()}x{uuid.uuid4().hex[:8]}.db"
        self._first = tp_rank == 0
        self._values = MmapedDict(str(Path(folder) / name))
        self._keys: dict[tuple[str, str], str] = {}
        self._totals: dict[str, float] = {}

    def step(self, head: str, rows: int) -> None:
        """One step of `head` ("flashhead" or "dense") over `rows` rows."""
        if self._first:
            self._add(STEPS, 1, "head", head)
            self._add(ROWS, rows, "head", head)

    def fallback(self, reason: str) -> None:
        """A step took the dense path because of `reason`, one word."""
        if self._first:
            self._add(FALLBACKS, 1, "reason", reason)

    def candidates(self, number: int) -> None:
        """This rank scored `number` tokens exactly."""
        self._add(CANDIDATES, number)

    def exchange(self, num_bytes: int) -> None:
        """This rank gave `num_bytes` to a collective of the head."""
        self._add(EXCHANGE_BYTES, num_bytes)

    def _add(self, name: str, amount: int, label: str = "", value: str = "") -> None:
        key = self._keys.get((name, value))
        if key is None:
            key = self._keys[name, value] = _file_key(name, label, value)
            self._totals[key] = 0.0
        total = self._totals[key] = self._totals[key] + amount
        self._values.write_value(key, total, 0.0)


class _Collector:
    """Sums the files of all workers whenever the registry is read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self) -> Iterable[Any]:
        """Nothing: names are known only once a head counts."""
        return ()

    def collect(self) -> Iterable[Any]:
        """Prometheus metrics, none where no head has counted."""
        from prometheus_client.multiprocess import MultiProcessCollector

        if not self._folder.is_dir():
            return ()
        found: Iterable[Any] = MultiProcessCollector(None, path=str(self._folder)).collect()
        return found


_registered: list[_Collector] = []


def _file_key(name: str, label: str, value: str) -> str:
    from prometheus_client.mmap_dict import mmap_key

    labels = [label] if label else []
    values = [value] if label else []
    key: str = mmap_key(name, f"{name}_total", labels, values, _HELP[name])
    return key


def _remove(folder: Path, owner: int) -> None:
    # A forked child inherits the exit handler.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)

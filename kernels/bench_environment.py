"""What a run of `bench.py` stood on: device, driver, software, commit."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from bench_cell import Bench
from flashhead_dist.measure.environment import software_versions, source_commit
from flashhead_kernels import launch_choice
from flashhead_topology.probe import probe_machine


def device_name(device: str) -> str:
    """Name of the GPU, or of the CPU and its threads, by which every figure is labelled."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{probe_machine().cpu_model} (CPU, {torch.get_num_threads()} threads)"


def device_slug(name: str) -> str:
    """A name for a folder: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def make_environment(
    bench: Bench, arguments: Mapping[str, Any], *, complete: bool
) -> dict[str, Any]:
    """JSON form of what the figures depend on; `complete`: all cells asked for were measured."""
    on_gpu = bench.clock.device.type == "cuda"
    cache = f"{bench.clock.cache_bytes / 1e6:.0f} MB of last-level cache"
    timing = (
        f"CUDA events around graph replays; weights rotated past {cache}; ways interleaved."
        if on_gpu
        else "CPU: wall clock, no graphs, caches not emptied; this shows that the code runs, "
        "not how fast a GPU is."
    )
    versions, commit, driver = software_versions(), source_commit(), _driver() if on_gpu else "none"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "device": bench.device_name,
        "driver": driver,
        "cache_bytes": bench.clock.cache_bytes,
        "operations": bench.ops.__name__,
        "launches": launch_choice.table.choices(),
        "timing": timing,
        "versions": versions,
        "commit": commit,
        "time_utc": now,
        "complete": complete,
        "arguments": {key: str(value) for key, value in arguments.items()},
        "summary": f"{timing} {bench.device_name}, driver {driver}, torch "
        f"{versions.get('torch')}, triton {versions.get('triton', 'none')}, "
        f"{bench.ops.__name__}; commit {commit}, {now[:10]}.",
    }


def _driver() -> str:
    """The driver's version, as nvidia-smi says it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()

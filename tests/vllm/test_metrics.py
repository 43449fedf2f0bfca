"""Counters: from a worker's process to the registry of the API server's, and none where off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from flashhead_dist.integrations.vllm import metrics
from tests.vllm.servers import NEEDS_VLLM

pytestmark = NEEDS_VLLM

_SERVER = """
import json, os, subprocess, sys
from flashhead_dist.integrations.vllm.metrics import FOLDER_VARIABLE, export_counters
from prometheus_client import REGISTRY, generate_latest

def names():
    return sorted(line.split()[0] for line in generate_latest(REGISTRY).decode().splitlines())

before = names()
export_counters()
export_counters()
unchanged = names() == before
folder = os.environ.get(FOLDER_VARIABLE)
made = folder is not None and os.path.exists(folder)
for rank in (0, 1):
    subprocess.run([sys.executable, "-c", sys.argv[1], str(rank)], check=True)
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.v1.metrics.reader import get_metrics_snapshot
text = generate_latest(get_prometheus_registry()).decode()
lines = sorted(line for line in text.splitlines() if line.startswith("vllm:flashhead"))
seen = sorted({found.name for found in get_metrics_snapshot()})
print(json.dumps([unchanged, made, folder, lines, seen]))
"""
_WORKER = """
import sys
from flashhead_dist.integrations.vllm.metrics import HeadCounters, export_counters

rank = int(sys.argv[1])
export_counters()
# Two engines in one process, one after the other.
for counters in (HeadCounters(rank), HeadCounters(rank)):
    counters.step("flashhead", 3)
    counters.candidates(100)
    counters.exchange(8)
    counters.step("dense", 2)
    counters.fallback("logit_bias")
"""
# Of two engines on two ranks: steps, rows and fallbacks are counted by the first rank alone.
EXPECTED = [
    "vllm:flashhead_candidates_total 400.0",
    "vllm:flashhead_exchange_bytes_total 32.0",
    'vllm:flashhead_fallbacks_total{reason="logit_bias"} 2.0',
    'vllm:flashhead_rows_total{head="dense"} 4.0',
    'vllm:flashhead_rows_total{head="flashhead"} 6.0',
    'vllm:flashhead_steps_total{head="dense"} 2.0',
    'vllm:flashhead_steps_total{head="flashhead"} 2.0',
]


def run(variables: dict[str, str]) -> list[object]:
    names = (metrics.FOLDER_VARIABLE, "PROMETHEUS_MULTIPROC_DIR")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", _SERVER, _WORKER],
        env=clean | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_workers_count_is_in_vllms_registry_and_goes_with_the_server() -> None:
    unchanged, made, folder, lines, names = run({})
    assert unchanged
    assert made is False
    assert lines == EXPECTED
    assert isinstance(names, list)
    assert "vllm:flashhead_steps" in names
    assert not Path(str(folder)).exists()


def test_several_api_servers_read_one_folder(tmp_path: Path) -> None:
    """vLLM's multiprocess mode: its own collector reads the files, ours would count them twice."""
    unchanged, _, folder, lines, _ = run({"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})
    assert unchanged
    assert folder is None
    assert lines == EXPECTED

"""launch/scale.py under torchrun: what it prints and writes, and how a run ends before its time."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flashhead_dist.bench.records import read_records

SCRIPT = Path(__file__).parents[2] / "launch" / "scale.py"
SYNTHETIC = ("--synthetic", "3000,64")
REQUIRED = (
    *("head", "tp_size", "batch_size", "median_us", "compute_us", "communication_us"),
    *("payload_bytes_per_row", "counted_bytes_per_row", "weight_bytes_per_rank"),
    *("top1_agreement", "speedup_over_dense_local_max", "measured"),
)


@dataclass
class Job:
    """A run of scale.py whose output goes to files, so that no pipe fills up."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path
    runs: Path

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    def finish(self, timeout_s: float = 150) -> int:
        return self.process.wait(timeout=timeout_s)

    def wait_for_record(self, timeout_s: float = 100) -> Path:
        """Return the records file once it holds a line."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.stderr
            for path in self.runs.glob("*/records.jsonl"):
                if b"\n" in path.read_bytes():
                    return path
            time.sleep(0.05)
        raise TimeoutError(self.stderr)

    def rank_process(self, rank: int) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.environ().get("RANK") == str(rank):
                return child
        raise LookupError(f"no process of rank {rank}")


class Starter:
    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.jobs: list[Job] = []

    def __call__(self, num_ranks: int, *arguments: str) -> Job:
        number = len(self.jobs)
        out, err = self.folder / f"out{number}", self.folder / f"err{number}"
        runs = self.folder / f"runs{number}"
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
        command = [sys.executable, *(launcher if num_ranks > 1 else [])]
        command += [str(SCRIPT), "--runs-dir", str(runs), *arguments]
        environment = os.environ | {
            "FLASHHEAD_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
        }
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
            )
        self.jobs.append(Job(process, out, err, runs))
        return self.jobs[-1]


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("scale"), tmp_path_factory.mktemp("cache"))
    yield starter
    for job in starter.jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


@pytest.fixture(scope="module")
def finished(torchrun: Starter) -> Job:
    """Three ranks, which two cores or fewer cannot serve at once."""
    job = torchrun(
        3,
        *SYNTHETIC,
        *("--heads", "dense_gather,dense_local_max,flashhead,flashhead_auto", "--tp-sizes", "1,3"),
        *("--batch-sizes", "1,2", "--iters", "3", "--cell-seconds", "1", "--max-states", "64"),
        "--json",
    )
    assert job.finish() == 0, job.stderr
    return job


@pytest.fixture(scope="module")
def document(finished: Job) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(finished.out.read_text().splitlines()[-1])
    return loaded


def test_last_line_is_one_document_with_every_cell(document: dict[str, Any]) -> None:
    records = document["records"]
    assert len(records) == 4 * 2 * 2
    for record in records:
        assert set(REQUIRED) <= record.keys()
        assert record["synthetic"] is True
        assert record["num_agreement_states"] == 64
    gather = [r for r in records if r["head"] == "dense_gather" and r["tp_size"] == 3]
    assert {record["payload_bytes_per_row"] for record in gather} == {6000.0}
    cells = {(r["head"], r["tp_size"], r["batch_size"]) for r in records}
    assert len(cells) == 16


def test_run_folder_is_complete_and_agrees_with_the_document(
    finished: Job, document: dict[str, Any]
) -> None:
    (folder,) = finished.runs.iterdir()
    assert document["run_dir"] == str(folder)
    assert {path.name for path in folder.iterdir()} == {
        *("records.jsonl", "summary.csv", "environment.json", "latency.png", "bytes.png"),
        *("topology.txt", "topology.png", "report"),
    }
    assert [json.loads(record.as_json_line()) for record in read_records(folder)] == document[
        "records"
    ]
    with (folder / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 16
    environment = json.loads((folder / "environment.json").read_text())
    assert environment == document["environment"]
    exchange = {size: how["method"] for size, how in environment["key_exchange"].items()}
    assert exchange["1"] == "none"
    assert exchange["3"] == "gloo"
    assert all(how["reason"] for how in environment["key_exchange"].values())
    assert set(environment["crossovers"]) == {"1", "3"}
    shape = environment["head_shape"]
    assert (shape["vocab_size"], shape["hidden_size"], shape["row_bits"]) == (3000, 64, 16)
    assert shape["num_clusters"] * shape["cluster_size"] >= 3000
    assert "data-marks" in (folder / "report" / "report.html").read_text()
    standing = environment["topology"]
    assert [place["rank"] for place in standing["places"]] == [0, 1, 2]
    assert standing["drawing"] in (folder / "topology.txt").read_text()
    assert any(standing["drawing"] in note for note in document["notes"])
    assert all("1" in found["times_us"] for found in environment["crossovers"].values())
    assert {found["origin"] for found in environment["crossovers"].values()} == {"measured now"}
    assert environment["launches"] == {"choices": [], "not_kept": None}, "none without CUDA"
    assert sum(note.startswith("flashhead_auto") for note in document["notes"]) in (2, 3)
    assert folder.name.endswith(f"_{environment['machine']['host_class']}_{environment['commit']}")


def test_oversubscribed_sizes_are_projected_and_said_to_be(
    finished: Job, document: dict[str, Any]
) -> None:
    num_cores = document["environment"]["machine"]["num_cores"]
    printed = finished.out.read_text()
    for record in document["records"]:
        assert record["oversubscribed"] == (record["tp_size"] > num_cores)
        assert record["measured"] == (not record["oversubscribed"])
    assert ("OVERSUBSCRIBED" in printed) == (num_cores < 3)
    assert "SYNTHETIC" in printed


def test_one_rank_prints_and_progress_stays_off_stdout(finished: Job) -> None:
    printed = finished.out.read_text()
    assert printed.count("Microseconds a step") == 1
    assert "[1/" not in printed
    assert "tp 3: batch 2" in finished.stderr


def test_the_summary_is_short_and_names_projections(finished: Job) -> None:
    """A document of JSON follows as the last line."""
    lines = finished.out.read_text().splitlines()[:-1]
    assert len(lines) <= 40
    assert sum("flashhead_auto" in line for line in lines) >= 3
    assert any("report.html" in line for line in lines)


def test_memory_of_the_compiler_is_no_head_s(document: dict[str, Any]) -> None:
    for record in document["records"]:
        assert record["peak_bytes_per_rank"] < 40e6, record["head"]


def test_interrupt_ends_the_job_with_records_readable(torchrun: Starter, finished: Job) -> None:
    assert finished.process.returncode == 0
    job = torchrun(
        2,
        *SYNTHETIC,
        *("--heads", "flashhead", "--cell-seconds", "4", "--skip-plots", "--max-states", "0"),
        *("--batch-sizes", "1,2,3,4,5,6,7,8,9", "--iters", "1000000"),
    )
    path = job.wait_for_record()
    start_s = time.monotonic()
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.finish(30) != 0
    assert time.monotonic() - start_s < 30
    assert job.stderr.count("error: interrupted.") == 1
    assert str(path) in job.stderr
    assert "launch/scale.py" not in "".join(
        line for line in job.stderr.splitlines() if line.lstrip().startswith("File ")
    )
    assert len(read_records(path)) >= 1

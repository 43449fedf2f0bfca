"""The machine's name, placement and oversubscription, on machines that do not exist."""

from __future__ import annotations

import pytest

from flashhead_topology.machine import Gpu, Machine, choose_placement, oversubscription
from flashhead_topology.probe import cpu_model_name, probe_machine, usable_cores

H200 = Gpu("NVIDIA H200", 150_000_000_000)


def machine(num_cores: int = 2, gpus: tuple[Gpu, ...] = ()) -> Machine:
    return Machine("A CPU", num_cores, 8_000_000_000, "Linux 6.1", gpus)


@pytest.mark.parametrize(
    ("name", "host_class"),
    [
        ("NVIDIA H200", "1xh200"),
        ("NVIDIA H100 80GB HBM3", "1xh100"),
        ("NVIDIA A100-SXM4-80GB", "1xa100"),
        ("NVIDIA GeForce RTX 4090", "1x4090"),
        ("Tesla T4", "1xt4"),
        ("Radeon", "1xradeon"),
    ],
)
def test_host_class_names_the_gpu_model(name: str, host_class: str) -> None:
    assert machine(gpus=(Gpu(name, 1),)).host_class == host_class


def test_host_class_counts_cores_or_gpus() -> None:
    assert machine(64).host_class == "cpu-64c"
    assert machine(64, (H200,) * 8).host_class == "8xh200"
    assert machine(64, (H200, Gpu("Tesla T4", 1))).host_class == "1xh200+1xt4"


def test_machine_without_cores_is_refused() -> None:
    with pytest.raises(ValueError, match="num_cores is 0"):
        machine(0)


def test_machine_as_dict_is_complete() -> None:
    described = machine(4, (H200,)).as_dict()
    assert described["host_class"] == "1xh200"
    assert described["num_cores"] == 4
    assert described["gpus"] == ({"name": "NVIDIA H200", "memory_bytes": 150_000_000_000},)


@pytest.mark.parametrize(
    ("ranks", "gpus", "backend", "device"),
    [
        (8, 0, "gloo", "cpu"),
        (1, 1, "nccl", "cuda"),
        (8, 8, "nccl", "cuda"),
        (4, 8, "nccl", "cuda"),
        (2, 1, "gloo", "cpu"),
    ],
)
def test_placement(ranks: int, gpus: int, backend: str, device: str) -> None:
    placement = choose_placement(ranks, gpus)
    assert (placement.backend, placement.device_type) == (backend, device)


def test_placement_says_that_gpus_are_too_few_and_what_to_do() -> None:
    reason = choose_placement(8, 1).reason
    assert "8 ranks but only 1 GPU" in reason
    assert "start 1 or fewer ranks" in reason


@pytest.mark.parametrize(
    ("ranks", "cores", "gpus", "threads", "expected"),
    [
        (2, 2, 0, 1, False),
        (3, 2, 0, 1, True),
        (8, 2, 0, 1, True),
        (2, 2, 0, 2, True),
        (1, 2, 0, 2, False),
        (8, 2, 8, 1, False),
        (9, 64, 8, 1, True),
        (8, 64, 8, 16, False),
    ],
)
def test_oversubscription(ranks: int, cores: int, gpus: int, threads: int, expected: bool) -> None:
    decision = oversubscription(ranks, cores, gpus, threads_per_rank=threads)
    assert decision.oversubscribed is expected
    assert f"{ranks} rank" in decision.reason


def test_oversubscription_reason_counts_threads() -> None:
    assert (
        oversubscription(2, 2, threads_per_rank=2).reason == "2 ranks of 2 threads each on 2 cores"
    )


@pytest.mark.parametrize(
    ("affine", "cpu_max", "expected"),
    [
        (8, "", 8),
        (8, "max 100000", 8),
        (8, "200000 100000", 2),
        (8, "250000 100000", 2),
        (2, "800000 100000", 2),
        (4, "50000 100000", 1),
    ],
)
def test_usable_cores_obey_affinity_and_quota(affine: int, cpu_max: str, expected: int) -> None:
    assert usable_cores(affine, cpu_max) == expected


def test_cpu_model_name() -> None:
    text = "processor\t: 0\nmodel name\t: An  EPYC   9654\n\nprocessor\t: 1\n"
    assert cpu_model_name(text) == "An EPYC 9654"
    assert cpu_model_name("Features : fp asimd\n") is None


def test_probe_describes_this_machine() -> None:
    here = probe_machine()
    assert here.num_cores >= 1
    assert here.memory_bytes > 100_000_000
    assert here.os.startswith("Linux")

"""How a run uses a machine, on machines that do not exist."""

from __future__ import annotations

import pytest

from flashhead_dist.bench.environment import Setup, decide_setup
from flashhead_dist.errors import UserError
from flashhead_topology.machine import Gpu, Machine

H200 = Gpu("NVIDIA H200", 150_000_000_000)


def setup(
    num_cores: int = 2,
    num_gpus: int = 0,
    ranks: int = 8,
    threads: int = 1,
    device: str | None = None,
) -> Setup:
    return decide_setup(
        Machine("An EPYC", num_cores, 8_000_000_000, "Linux", (H200,) * num_gpus),
        local_rank=1,
        local_world_size=ranks,
        threads_per_rank=threads,
        device=device,
        heads=("flashhead",),
    )


def test_eight_ranks_on_two_cores() -> None:
    found = setup()
    assert found.placement.backend == "gloo"
    assert [found.fit(size).oversubscribed for size in (1, 2, 4, 8)] == [False, False, True, True]
    assert found.device_name == "An EPYC"


def test_exchanges_are_timed_at_the_largest_size_that_fits() -> None:
    assert setup().group_sizes([1, 8], 8) == [1, 2, 8]
    assert setup(num_cores=6).group_sizes([1, 8], 8) == [1, 6, 8]
    assert setup(num_cores=1).group_sizes([1, 8], 8) == [1, 8]
    assert setup(num_cores=64).group_sizes([1, 8], 8) == [1, 8]


def test_threads_count_against_cores() -> None:
    assert setup(threads=2).fit(2).oversubscribed
    assert not setup(threads=2).fit(1).oversubscribed


def test_a_gpu_for_each_rank_means_cuda() -> None:
    found = setup(num_gpus=8)
    assert (found.placement.backend, str(found.device)) == ("nccl", "cuda:1")
    assert not found.fit(8).oversubscribed
    assert found.device_name == "NVIDIA H200"


def test_gpus_that_go_unused_are_told() -> None:
    found = setup(num_gpus=1)
    assert found.placement.backend == "gloo"
    assert any("NOT USED" in note for note in found.notes)
    assert found.fit(4).oversubscribed


def test_cpu_can_be_insisted_on_and_cuda_only_where_it_works() -> None:
    assert setup(num_gpus=8, device="cpu").placement.backend == "gloo"
    with pytest.raises(UserError, match="8 ranks but only 1 GPU"):
        setup(num_gpus=1, device="cuda")


def test_several_hosts_are_judged_by_their_own_ranks() -> None:
    """16 ranks of which 2 are on this host of two cores."""
    assert not setup(ranks=2).fit(16).oversubscribed

"""What a step is said to take: by hand on a small system, and as ranks, batch and links change.

Mutated to see each fail: `memory_share` left out, exchanges counted at tp_size 1, a gathered buffer
taken for one operand, `gather_share` used for centroids, launches of the other device.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.registry import HEADS, head_cost
from flashhead_topology.cost import StepCost
from flashhead_topology.links import collective_time_s
from flashhead_topology.systems import Level, System, list_systems, load_system

GEMMA = HeadShape.with_default_index(262_144, 640)
NODE = Level("node", 8, alpha_s=1e-6, beta_s_per_byte=1e-11, base_s=4e-6, one_shot_alpha_s=3e-6)
NETWORK = Level("network", 64, alpha_s=1e-5, beta_s_per_byte=1e-10, base_s=4e-6)
SYSTEM = System(
    name="round-figures",
    device="a device",
    memory_bandwidth_bytes_per_s=1e12,
    memory_share=0.5,
    gather_share=0.25,
    launch_s=1e-6,
    levels=(NODE, NETWORK),
    memory_bytes=1e9,
)


def cost(name: str, tp_size: int = 1, batch: int = 1, system: System = SYSTEM) -> StepCost:
    return head_cost(name, GEMMA, system, tp_size=tp_size, batch_size=batch)


def test_the_default_index_is_that_of_the_docs() -> None:
    """docs/decisions: C 65,536, p 2,048; 22.3 MB of centroids, 0.3 of spread, 10.7 of rows."""
    assert (GEMMA.num_clusters, GEMMA.num_probes, GEMMA.cluster_size) == (65_536, 2_048, 4)
    read = cost("flashhead").read_bytes
    assert read == pytest.approx(22.3e6 + 0.3e6 + 10.7e6, rel=0.01)
    assert read / (262_144 * 640 * 2) == pytest.approx(0.099, abs=0.001)


def test_a_dense_step_on_one_rank_by_hand() -> None:
    found = cost("dense_local_max")
    rows_s = 262_144 * 640 * 2 / (1e12 * 0.5)
    assert found.parts["head/candidates"] == pytest.approx(rows_s)
    assert found.parts["launches"] == pytest.approx(11e-6)
    assert found.total_s == pytest.approx(rows_s + 11e-6)
    assert (found.exchange_s, found.sent_bytes, found.payload_bytes, found.how) == (0, 0, 0, "none")


def test_a_retrieval_step_by_hand() -> None:
    found = cost("flashhead", tp_size=4)
    clusters = 65_536 // 4
    assert found.parts["head/centroids"] == pytest.approx(clusters * (320 + 20 + 4) / 5e11)
    rows = 2_048 * 4 / 4 + 128 / 4
    assert found.parts["head/candidates"] == pytest.approx(rows * 1284 / 2.5e11)
    assert found.parts["head/exchange"] == pytest.approx(3e-6 + 3 * 8 * 1e-11)
    assert found.how == "one_shot"
    assert found.total_s == pytest.approx(sum(found.parts.values()))
    assert found.total_s == pytest.approx(found.compute_s + found.exchange_s)


@pytest.mark.parametrize("name", HEADS)
def test_parts_sum_to_the_total_everywhere(name: str) -> None:
    for tp_size in (1, 2, 8, 64):
        found = cost(name, tp_size, batch=4)
        assert found.total_s == pytest.approx(sum(found.parts.values()))
        assert (found.exchange_s > 0) == (tp_size > 1 and name != "flashhead_replicated")


def test_keys_leave_the_node_through_the_library() -> None:
    """Ranks of two nodes cannot map each other's memory."""
    found = cost("flashhead", tp_size=16)
    assert found.how == "collectives"
    expected = collective_time_s("all_reduce", 8, tp_size=16, levels=SYSTEM.levels)
    assert found.exchange_s == pytest.approx(expected)


def test_more_keys_than_the_shared_buffer_holds_go_through_the_library() -> None:
    assert cost("flashhead", 8, batch=256).how == "one_shot"
    assert cost("flashhead", 8, batch=257).how == "collectives"


def test_gathered_logits_are_the_whole_buffer() -> None:
    found = cost("dense_gather", tp_size=8, batch=2)
    assert found.payload_bytes == 2 * 262_144 * 2
    assert found.sent_bytes == 2 * 262_144 * 2 * 7 / 8
    expected = collective_time_s("all_gather", 2 * 262_144 * 2, tp_size=8, levels=SYSTEM.levels)
    assert found.exchange_s == pytest.approx(expected)


def test_a_tree_of_a_system_does_not_gather() -> None:
    tree = replace(SYSTEM, algorithm="tree")
    assert cost("dense_gather", 4, system=tree).exchange_s == cost("dense_gather", 4).exchange_s


def test_ranks_divide_the_work_and_not_the_launches() -> None:
    one, eight = cost("dense_local_max"), cost("dense_local_max", 8)
    assert one.read_bytes == 8 * eight.read_bytes
    assert one.weight_bytes == 8 * eight.weight_bytes
    assert one.parts["launches"] == eight.parts["launches"]


def test_a_batch_reads_dense_weights_once_and_more_clusters() -> None:
    assert cost("dense_local_max", batch=16).read_bytes == cost("dense_local_max").read_bytes
    one, many = cost("flashhead"), cost("flashhead", batch=8)
    assert many.read_bytes > 2 * one.read_bytes
    whole = cost("flashhead", batch=10_000)
    assert whole.read_bytes < 1.2 * cost("dense_local_max").read_bytes


def test_arithmetic_limits_a_large_batch_where_the_peak_is_known() -> None:
    limited = replace(SYSTEM, peak_flop_per_s=1e14)
    assert cost("dense_local_max", system=limited) == cost("dense_local_max")
    found = cost("dense_local_max", batch=1024, system=limited)
    operations = 2 * 1024 * 262_144 * 640
    assert found.parts["head/candidates"] == pytest.approx(operations / 1e14)


def test_auto_scans_where_that_is_cheaper() -> None:
    assert not cost("flashhead_auto").scans
    assert cost("flashhead_auto").total_s == cost("flashhead").total_s
    large = cost("flashhead_auto", batch=64)
    assert large.scans
    assert large.total_s < cost("flashhead", batch=64).total_s


def test_a_cpu_has_its_own_count_of_launches() -> None:
    on_cpu = replace(SYSTEM, device_type="cpu")
    assert cost("flashhead", system=on_cpu).parts["launches"] == pytest.approx(2e-6)
    assert cost("flashhead").parts["launches"] == pytest.approx(11e-6)


def test_a_pipeline_sends_the_tokens_back_over_the_links_between_its_stages() -> None:
    one = head_cost("flashhead", GEMMA, SYSTEM, tp_size=8)
    two = head_cost("flashhead", GEMMA, SYSTEM, tp_size=8, pp_size=2, batch_size=1)
    assert two.parts["pipeline/send"] == pytest.approx(4e-6 + 1e-5 + 8e-10)
    assert two.total_s == pytest.approx(one.total_s + two.parts["pipeline/send"])
    inside = head_cost("flashhead", GEMMA, SYSTEM, tp_size=4, pp_size=2)
    assert inside.parts["pipeline/send"] < two.parts["pipeline/send"]


def test_what_does_not_fit_says_so() -> None:
    assert cost("dense_local_max").fits
    assert cost("dense_local_max", system=replace(SYSTEM, memory_bytes=3e8)).fits is False
    assert cost("dense_local_max", 2, system=replace(SYSTEM, memory_bytes=3e8)).fits
    assert cost("dense_local_max", system=replace(SYSTEM, memory_bytes=None)).fits is None


def test_more_ranks_help_until_the_exchange_leaves_the_node() -> None:
    costs = {size: cost("flashhead", size).total_s for size in (1, 2, 4, 8, 16, 64)}
    assert min(costs, key=lambda size: costs[size]) == 8


@pytest.mark.parametrize("name", list_systems())
def test_shipped_systems_cost_something_at_every_size(name: str) -> None:
    system = load_system(name)
    for head in HEADS:
        for tp_size in (1, 2, 8, 16, 128):
            assert 1e-6 < head_cost(head, GEMMA, system, tp_size=tp_size).total_s < 1
    dense = head_cost("dense_local_max", GEMMA, system, tp_size=1024)
    assert dense.exchange_s > dense.parts["head/candidates"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"name": "flashheed"}, "no head named 'flashheed'"),
        ({"tp_size": 0}, "tp_size is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"pp_size": 0}, "pp_size is 0"),
        ({"tp_size": 65}, "65 ranks are more than the 64"),
        ({"tp_size": 33, "pp_size": 2}, "66 ranks are more than the 64"),
        ({"shape": HeadShape(vocab_size=1000, hidden_size=64)}, "flashhead needs an index"),
        ({"shape": replace(GEMMA, num_groups=32), "tp_size": 64}, "splits 32 probing groups"),
        (
            {
                "shape": replace(GEMMA, hidden_size=32),
                "name": "dense_allreduce",
                "tp_size": 33,
            },
            "splits 32 columns",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], complaint: str) -> None:
    given: dict[str, object] = {
        "name": "flashhead",
        "shape": GEMMA,
        "system": SYSTEM,
        "tp_size": 1,
    } | arguments
    with pytest.raises(ValueError, match=complaint):
        head_cost(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"centroid_bits": 3}, "centroid_bits is 3"),
        ({"num_probes": 0}, "num_probes is 0"),
        ({"num_probes": 70_000}, "num_probes is 70000"),
    ],
)
def test_an_impossible_shape_is_refused(edit: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(GEMMA, **edit)

"""scale.py and calibrate.py over several hosts, and how a run ends that loses one of them.

Every host has processes of its own that the others cannot see; so a lost one is known only by its
silence or by what is left of its connections.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from flashhead_dist.bench.records import read_records
from flashhead_topology.systems import load_system
from tests.topology.shaped.agents import Agents, succeeded
from tests.topology.shaped.network import HERE, Link, ShapedNetwork, wait_for

Make = Callable[..., ShapedNetwork]
LAUNCH = HERE.parents[2] / "launch"
LOST_AFTER_S = 6.0
SCALE = [
    str(LAUNCH / "scale.py"), "--synthetic", "1024,64", "--skip-plots",
    "--max-states", "64", "--heads", "dense_gather,dense_local_max,flashhead",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))


def test_two_hosts_of_two_ranks_agree_with_one_rank(network: Make, tmp_path: Path) -> None:
    """Sharding is exact across hosts, and bytes are counted on every host's interfaces."""
    runs = tmp_path / "runs"
    with network(2, delay_us=100, rate_mbit=1000) as net:
        command = [*SCALE, "--tp-sizes", "1,4", "--batch-sizes", "4", "--iters", "3"]
        agents = Agents(
            net, tmp_path, [*command, "--runs-dir", str(runs), "--json"], ranks_per_host=2
        )
        ended = succeeded(agents.wait(240))
    (run,) = runs.iterdir()
    records = read_records(run)
    assert len(records) == 6
    by_head = {(r.head, r.tp_size): r for r in records}
    for head in ("dense_gather", "dense_local_max", "flashhead"):
        alone, spread = by_head[head, 1], by_head[head, 4]
        assert spread.top1_agreement == alone.top1_agreement
        assert spread.world_size == 4
        # 3 of 4 links of the ring stay on a host: all bytes are counted, loopback's too.
        assert spread.counted_bytes_per_row is not None, spread.counted_reason
        assert spread.counted_bytes_per_row > 0.9 * spread.sent_bytes_per_row
    assert by_head["flashhead", 4].payload_bytes_per_row == 8
    # The first rank alone speaks, and only on its host.
    assert json.loads(ended[0].stdout.splitlines()[-1])["run_dir"] == str(run)
    assert ended[1].stdout == ""


def endless(net: ShapedNetwork, folder: Path, ranks_per_host: int = 1) -> Agents:
    """A run that would measure for an hour, once its ranks are in the midst of collectives."""
    runs = folder / "runs"
    command = [*SCALE, "--tp-sizes", str(net.num_hosts * ranks_per_host)]
    command += ["--batch-sizes", "1,2", "--iters", "1000000", "--cell-seconds", "3600"]
    agents = Agents(
        net,
        folder,
        [*command, "--runs-dir", str(runs)],
        ranks_per_host=ranks_per_host,
        environment={"FLASHHEAD_LOST_AFTER_S": str(LOST_AFTER_S)},
    )
    # Traffic is the sign of steps: 200 KB beyond what loading and agreement send.
    wait_for(lambda: any(runs.glob("*/records.jsonl")) or _ended(agents), 180, "the run folder")
    before = net.stats()["bytes"]
    wait_for(lambda: net.stats()["bytes"] > before + 500_000 or _ended(agents), 120, "steps")
    assert not _ended(agents), [agents.stderr(host) for host in range(net.num_hosts)]
    return agents


def _ended(agents: Agents) -> bool:
    return any(process.poll() is not None for process in agents.processes)


def _rank_pids(net: ShapedNetwork, host: int) -> list[int]:
    """Processes of a host that run the script itself: its agent runs it only by name."""
    found = []
    for pid in net.pids(host):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"torch.distributed.run" not in words and SCALE[0].encode() in words:
            found.append(pid)
    return found


def test_a_rank_killed_on_another_host_is_named_on_all(network: Make, tmp_path: Path) -> None:
    """torchrun names it on its own host; the other host misses the heartbeats of both ranks."""
    with network(2, delay_us=100, rate_mbit=1000) as net:
        agents = endless(net, tmp_path, ranks_per_host=2)
        victim = max(_rank_pids(net, 1))
        os.kill(victim, signal.SIGKILL)
        ended = agents.wait(60)
    assert all(end.code == 1 and len(end.errors) == 1 for end in ended), ended
    assert "3 on host1 sent no heartbeat" in ended[0].errors[0]
    assert "Nothing was measured yet." in ended[0].errors[0]
    assert "Traceback" not in ended[0].stderr.partition("error: ")[0]
    assert "(SIGKILL) received by PID" in ended[1].stderr


def test_the_only_rank_of_a_host_is_missed_by_the_others(network: Make, tmp_path: Path) -> None:
    """The broken connections of the others name no rank: its missing heartbeat does."""
    with network(3, delay_us=100, rate_mbit=1000) as net:
        agents = endless(net, tmp_path)
        (victim,) = _rank_pids(net, 2)
        os.kill(victim, signal.SIGKILL)
        ended = agents.wait(60)
    for end in ended[:2]:
        assert end.code == 1
        (sentence,) = end.errors
        assert sentence.startswith("error: rank 2 on host2 sent no heartbeat for "), end.stderr


@pytest.mark.parametrize("host", [0, 1])
def test_a_stopped_host_ends_the_run(network: Make, tmp_path: Path, host: int) -> None:
    """SIGSTOP for all of it, agent and store included where it is the first host.

    Without the watch the others wait in the collective until its timeout of 30 minutes.
    """
    with network(2, delay_us=100, rate_mbit=1000) as net:
        agents = endless(net, tmp_path)
        with net.stopped(host):
            (end,) = agents.wait(LOST_AFTER_S + 30, hosts=[1 - host])
        (other,) = agents.wait(60, hosts=[host])
    assert end.code == 1
    (sentence,) = end.errors
    expected = (
        "the run's store gave no answer" if host == 0 else "rank 1 on host1 sent no heartbeat"
    )
    assert expected in sentence
    # Once it goes on it finds the run over, and ends too.
    assert other.code == 1


def test_an_interrupt_on_one_host_is_shown_on_the_others(network: Make, tmp_path: Path) -> None:
    with network(2, delay_us=100, rate_mbit=1000) as net:
        agents = endless(net, tmp_path)
        (rank,) = _rank_pids(net, 0)
        os.kill(rank, signal.SIGINT)
        ended = agents.wait(60)
    assert [end.errors[0].partition(".")[0] for end in ended] == [
        "error: interrupted",
        "error: the run was interrupted on host0",
    ], [end.stderr for end in ended]
    assert all(end.code == 1 and len(end.errors) == 1 for end in ended)


def test_a_link_that_is_cut_ends_the_run_on_both_sides(network: Make, tmp_path: Path) -> None:
    with network(2, delay_us=100, rate_mbit=1000) as net:
        agents = endless(net, tmp_path)
        net.shape(1, Link(delay_us=600e6, rate_mbit=1000))
        ended = agents.wait(LOST_AFTER_S + 60)
    (first,), (second,) = (end.errors for end in ended)
    assert [end.code for end in ended] == [1, 1]
    assert first.startswith("error: rank 1 on host1 sent no heartbeat for ")
    assert second.startswith("error: the run's store gave no answer for ")


def test_a_slow_link_ends_no_run_and_is_named(network: Make, tmp_path: Path) -> None:
    """A run over it goes on, slowly; calibrate.py says which host's link it is."""
    out = tmp_path / "link.yaml"
    with network(3, delay_us=100, rate_mbit=1000) as net:
        net.shape(1, Link(delay_us=5000, rate_mbit=100))
        command = [str(LAUNCH / "calibrate.py"), "--largest-bytes", "4096", "--skip-plots"]
        command += ["--point-seconds", "0.1", "--out", str(out), "--json"]
        ended = succeeded(Agents(net, tmp_path, command).wait(240))
    document = json.loads(ended[0].stdout.splitlines()[-1])
    (note,) = document["notes"]
    assert note.startswith("The link of host1 (rank 1) is SLOW: a round trip takes ")
    # Pairs and all three hosts were measured; a message over the slow link takes 5 ms one way.
    (level,) = load_system(out).levels
    assert {point["tp_size"] for point in document["points"]} == {2, 3}
    assert level.name == "network"
    assert level.alpha_s > 1e-3

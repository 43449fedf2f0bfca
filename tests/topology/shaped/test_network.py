"""The network that the other tests stand on: what is set is what is there, and nothing is left.

Bounds are those that hold on a loaded machine too: a link is never quicker than it was set to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.topology.shaped.network import HERE, Link, ShapedNetwork, wait_for

Make = Callable[..., ShapedNetwork]


def measure(net: ShapedNetwork, folder: Path, num_bytes: int, port: int) -> dict[str, float]:
    files = {"stdout": folder / f"out_{port}", "stderr": folder / f"err_{port}"}
    script = [sys.executable, str(HERE / "echo.py")]
    serve = {"stdout": folder / f"serve_{port}", "stderr": folder / f"serve_err_{port}"}
    net.start(0, [*script, "serve", str(port)], **serve)
    client = [*script, "measure", net.address(0), str(port), str(num_bytes)]
    code = net.start(1, client, **files).wait(timeout=60)
    assert code == 0, files["stderr"].read_text()
    found: dict[str, float] = json.loads(files["stdout"].read_text())
    return found


def test_a_link_has_the_delay_and_rate_that_were_set(network: Make, tmp_path: Path) -> None:
    """Without the relay's delay a round trip takes some 60 us; without its rate 1 MB some 1 ms."""
    num_bytes = 1_000_000
    with network(2, delay_us=1000, rate_mbit=100) as net:
        found = measure(net, tmp_path, num_bytes, 2000)
        assert found["round_trip_s"] >= 2e-3
        assert found["bulk_s"] >= num_bytes * 8 / 100e6
        # One host's link is enough to slow both ways down, and can change at any time.
        net.shape(1, Link(delay_us=20_000, rate_mbit=10))
        slower = measure(net, tmp_path, num_bytes // 10, 2001)
        assert slower["round_trip_s"] >= 40e-3
        assert slower["bulk_s"] >= num_bytes / 10 * 8 / 10e6
        net.shape(1, Link(delay_us=1000, rate_mbit=100))
        assert measure(net, tmp_path, 10, 2002)["round_trip_s"] < slower["round_trip_s"]
        stats = net.stats()
        assert stats["dropped"] == 0
        assert stats["bytes"] > 1.1 * num_bytes


def test_hosts_see_only_themselves(network: Make, tmp_path: Path) -> None:
    with network(2, delay_us=0, rate_mbit=0) as net:
        said = []
        for host in range(2):
            script = "import os, socket; print(socket.gethostname(), *os.listdir('/proc'))"
            out, err = tmp_path / f"out_{host}", tmp_path / f"err_{host}"
            code = net.start(host, [sys.executable, "-c", script], stdout=out, stderr=err).wait(30)
            assert code == 0, err.read_text()
            said.append(out.read_text())
        assert [text.split()[0] for text in said] == ["host0", "host1"]
        # Only the host's first process and the script itself have a number.
        assert all(sum(word.isdigit() for word in s.split()) == 2 for s in said)


def test_a_stopped_host_goes_on_where_it_was(network: Make, tmp_path: Path) -> None:
    with network(2, delay_us=0, rate_mbit=0) as net:
        ticks = tmp_path / "ticks"
        script = "import time\nwhile True: print('.', flush=True); time.sleep(0.01)"
        net.start(1, [sys.executable, "-c", script], stdout=ticks, stderr=tmp_path / "err")
        wait_for(lambda: ticks.stat().st_size > 0, 20, "the first tick")
        with net.stopped(1):
            (pid,) = net.pids(1)
            wait_for(lambda: _state(pid) == "T", 5, "the stop")
            assert net.pids(0) == []
        wait_for(lambda: _state(pid) != "T", 5, "going on")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


_BUILD_AND_WAIT = """
import sys, time
from pathlib import Path
from tests.topology.shaped.network import Link, ShapedNetwork
with ShapedNetwork(Path(sys.argv[1]), 2, Link(0, 0)) as net:
    folder = Path(sys.argv[2])
    net.start(0, ["sleep", "600"], stdout=folder / "out", stderr=folder / "err")
    pids = [host.pid for host in net._hosts] + [net._relay.pid]
    while not net.pids(0):
        time.sleep(0.01)
    print(*pids, *net.pids(0), flush=True)
    sys.stdin.read() if sys.argv[3] == "wait" else sys.exit(3)
"""


@pytest.mark.parametrize("end", ["raise", "wait"])
def test_nothing_is_left_of_a_network(relay: Path, tmp_path: Path, end: str) -> None:
    """Neither where the test fails within it, nor where the test is killed."""
    builder = subprocess.Popen(
        [sys.executable, "-c", _BUILD_AND_WAIT, str(relay), str(tmp_path), end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[2])},
    )
    assert builder.stdout is not None
    assert builder.stdin is not None
    with builder.stdin, builder.stdout:
        pids = [int(word) for word in builder.stdout.readline().split()]
        assert len(pids) == 4
        if end == "wait":
            builder.send_signal(signal.SIGKILL)
        assert builder.wait(timeout=30) == (-signal.SIGKILL if end == "wait" else 3)
    wait_for(lambda: not any(_runs(pid) for pid in pids), 10, "the end of all its processes")


def _runs(pid: int) -> bool:
    try:
        return _state(pid) not in "ZX"
    except OSError:
        return False

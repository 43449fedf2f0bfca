"""Interface counters: parsing, choosing interfaces, and a figure that survives other traffic."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from flashhead_profiles.counters import (
    Burst,
    interfaces_to_count,
    least_disturbed,
    network_namespace,
    parse_proc_net_dev,
    read_sent_bytes,
)

PROC_NET_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop
    lo: 7529236    3557    0    0    0     0          0         0  7529111    3557    0    0    0
  eth0:    1000      10    0    0    0     0          0         0     2500      20    0    0    0
"""


@pytest.fixture
def counters_file(tmp_path: Path) -> Path:
    path = tmp_path / "dev"
    path.write_text(PROC_NET_DEV)
    return path


def test_parse_takes_the_sent_bytes() -> None:
    assert parse_proc_net_dev(PROC_NET_DEV) == {"lo": 7529111, "eth0": 2500}


def test_parse_refuses_other_text() -> None:
    with pytest.raises(ValueError, match="not a line"):
        parse_proc_net_dev("a\nb\nnonsense\n")


def test_reading_sums_interfaces(counters_file: Path) -> None:
    assert read_sent_bytes(["lo", "eth0"], counters_file).sent_bytes == 7531611


def test_missing_interface_is_unknown_not_zero(counters_file: Path) -> None:
    reading = read_sent_bytes(["lo", "ib0"], counters_file)
    assert reading.sent_bytes is None
    assert reading.reason is not None
    assert "ib0" in reading.reason


def test_missing_file_is_unknown_not_zero(tmp_path: Path) -> None:
    reading = read_sent_bytes(["lo"], tmp_path / "nowhere")
    assert reading.sent_bytes is None
    assert reading.reason is not None


def test_one_namespace_counts_loopback_and_several_count_all(counters_file: Path) -> None:
    assert interfaces_to_count(1, counters_file) == ("lo",)
    assert interfaces_to_count(2, counters_file) == ("eth0", "lo")


def test_burst_subtracts_background_at_its_rate() -> None:
    # 1 MB/s of background: 2 s of burst carry 2 MB of it, the quiet second 1 MB.
    burst = Burst(10, 2_000_000 + 10 * 500, 2.0, 1_000_000, 1.0)
    assert burst.bytes_per_step == pytest.approx(500)


def test_bursts_and_quiet_windows_that_others_disturbed_do_not_count() -> None:
    """Two of three bursts and two of three quiet windows carry a foreign megabyte."""
    counted = least_disturbed(
        [
            Burst(10, 1_005_000, 1.0, 0, 1.0),
            Burst(10, 1_005_000, 1.0, 1_000_000, 1.0),
            Burst(10, 5_200, 1.0, 1_000_000, 1.0),
        ]
    )
    assert counted.per_step == pytest.approx(520)
    assert counted.greatest == pytest.approx(100_500)
    assert counted.num_bursts == 3


def test_steady_background_is_subtracted() -> None:
    counted = least_disturbed([Burst(10, 3_005_000, 3.0, 1_000_000, 1.0)] * 3)
    assert counted.per_step == pytest.approx(500)


def test_less_than_nothing_is_unknown_beyond_the_scatter_and_zero_within() -> None:
    counted = least_disturbed([Burst(10, 1_000, 1.0, 50_000, 1.0)])
    assert counted.per_step is None
    assert counted.reason is not None
    scattered = [Burst(10, 400, 1.0, 410, 1.0), Burst(10, 430, 1.0, 415, 1.0)]
    assert least_disturbed(scattered).per_step == 0.0


def test_no_bursts_is_unknown() -> None:
    assert least_disturbed([]).per_step is None


def test_real_loopback_counts_what_is_sent() -> None:
    """Ten megabytes through a real socket show up on `lo`, with headers of a few percent on top."""
    payload = b"x" * 10_000_000
    server = socket.create_server(("127.0.0.1", 0))

    def drain() -> None:
        connection, _ = server.accept()
        with connection:
            while connection.recv(1 << 20):
                continue

    reader = threading.Thread(target=drain)
    reader.start()
    before = read_sent_bytes(["lo"]).sent_bytes
    with socket.create_connection(server.getsockname()) as client:
        client.sendall(payload)
    reader.join(timeout=30)
    after = read_sent_bytes(["lo"]).sent_bytes
    server.close()
    assert before is not None
    assert after is not None
    assert after - before >= len(payload)


def test_network_namespace_is_named() -> None:
    namespace = network_namespace()
    assert namespace is None or namespace.startswith("net:")

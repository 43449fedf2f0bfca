"""What real ranks say of themselves, gathered; and the drawings in a run's folder."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.environment import decide_setup
from flashhead_dist.bench.topology import describe_topology, gather_topology, write_topology
from flashhead_dist.errors import UserError
from flashhead_topology.hardware import Topology
from flashhead_topology.machine import Machine
from tests.topology.invented import FOUR_L40, LAPTOP, TWO_NODES


class Store:
    """A key-value store for ranks that are threads."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: set(keys) <= self.values.keys(), timeout=20)


def test_every_rank_gathers_the_same_description() -> None:
    store, found = Store(), dict[int, Topology]()
    machine = Machine("A CPU", 2, 8_000_000_000, "Linux")
    setup = decide_setup(machine, local_rank=0, local_world_size=3, threads_per_rank=1)

    def rank(number: int) -> None:
        found[number] = gather_topology(Control(store, number, range(3)), setup)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert [place.rank for place in found[0].ranks] == [0, 1, 2]
    assert len(found[0].hosts) == 1
    assert found[0].ranks[0].cores


@pytest.mark.parametrize("topology", [FOUR_L40, TWO_NODES, LAPTOP])
def test_the_environment_names_no_host(topology: Topology) -> None:
    described = json.loads(json.dumps(describe_topology(topology)))
    assert {place["host"] for place in described["places"]} <= {0, 1}
    assert len(described["drawing"]) > 20


def test_drawings_lie_in_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text, picture = write_topology(TWO_NODES, tmp_path, picture=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = text.read_text()
    assert "NV18" in content
    assert write_topology(LAPTOP, tmp_path, picture=False) == [text]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*topology\.txt"):
        write_topology(LAPTOP, tmp_path / "file", picture=False)

"""The cost model against scale.py over shaped networks: `make bench-network`.

    python -m tests.topology.shaped.validate --turns 3 --out DIR [--ship]

For each link, launch/calibrate.py is run on two hosts and on four, and what it wrote predicts the
communication of scale.py's heads on as many; the constants from two hosts predict four as well,
which is told apart. Measured is the exchange of a step without waiting, its p10
over the iterations of a run, and of several runs (turns) the least: other load on the machine can
only add. Constants are fitted to p10s too, and of several calibrations the one is taken that fits
its own points best. Needs root; ranks of four hosts share this machine's cores, which delays of
100 us and more leave idle most of the time.

Writes DIR/cells.csv and DIR/tables.md; with --ship also the mean errors to
topology/flashhead_topology/validation.yaml, from which reports take the band of projections.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import yaml

from flashhead_dist.bench.records import Record, read_records
from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.registry import head_cost
from flashhead_topology.systems import System, load_system
from tests.topology.shaped.agents import Agents, succeeded
from tests.topology.shaped.comparison import GATHER, Cell, by_kind, calibrated_on, mean_error
from tests.topology.shaped.network import HERE, Link, ShapedNetwork, compile_relay, obstacle
from tests.topology.shaped.tables import tables

ROOT = HERE.parents[2]
LINKS = [Link(delay, rate) for rate in (1000, 100) for delay in (100, 1000)]
HOSTS = (2, 4)
HEADS = ("dense_gather", "dense_local_max", "flashhead")
BATCH_SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
EFFORT = ("--iters", "20", "--cell-seconds", "1.5")
SYNTHETIC = "1024,64"
_RUN_S = 900


def calibrate(
    relay: Path, link: Link, num_hosts: int, folder: Path, largest_bytes: int = 2 << 20
) -> System:
    """The system that launch/calibrate.py makes of `num_hosts` hosts on `link`."""
    out = folder / "link.yaml"
    with ShapedNetwork(relay, num_hosts, link) as network:
        command = [str(ROOT / "launch" / "calibrate.py"), "--out", str(out), "--fit", "p10"]
        command += ["--largest-bytes", str(largest_bytes), "--ranks", "1024", "--skip-plots"]
        command += ["--point-seconds", "0.6", "--overwrite"]
        succeeded(Agents(network, folder, command).wait(_RUN_S))
    return load_system(out)


def run_scale(
    relay: Path, link: Link, num_hosts: int, folder: Path, *more: str
) -> tuple[list[Record], HeadShape]:
    """Records of scale.py with one rank on each of `num_hosts` hosts, and the heads' shape."""
    runs = folder / "runs"
    with ShapedNetwork(relay, num_hosts, link) as network:
        command = [str(ROOT / "launch" / "scale.py"), "--synthetic", SYNTHETIC]
        command += ["--heads", ",".join(HEADS), "--tp-sizes", str(num_hosts)]
        command += ["--runs-dir", str(runs), "--max-states", "0", "--skip-plots", *more]
        succeeded(Agents(network, folder, command).wait(_RUN_S))
        assert network.stats()["dropped"] == 0
    (run,) = runs.iterdir()
    shape = json.loads((run / "environment.json").read_text())["head_shape"]
    return read_records(run), HeadShape(**shape)


def cells_of(
    records: Sequence[Record],
    shape: HeadShape,
    system: System,
    link: Link,
    num_hosts: int,
    calibrated_hosts: int,
) -> list[Cell]:
    """Each record's exchange beside what the cost model says of it, by `system`'s constants."""
    found: list[Cell] = []
    for record in records:
        cost = head_cost(
            record.head, shape, system, tp_size=num_hosts, batch_size=record.batch_size
        )
        found.append(
            Cell(
                network=name_of(link),
                num_hosts=num_hosts,
                calibrated_hosts=calibrated_hosts,
                head=record.head,
                batch_size=record.batch_size,
                payload_bytes=round(record.payload_bytes_per_row * record.batch_size),
                measured_s=_communication_us(record) * 1e-6,
                predicted_s=cost.exchange_s,
            )
        )
    return found


def _communication_us(record: Record) -> float:
    """The exchange alone, p10; of a single key what a step takes beyond its longest compute.

    One key travels the ring rank by rank, so each rank is in the collective for a part of its way
    only, and the shortest such time, which counts as the exchange, leaves most of it out.
    """
    exchange = record.split.step_us["exchange"]
    assert exchange is not None, "hosts of one rank each are not oversubscribed"
    assert record.communication_us is not None
    one_key = record.batch_size == 1 and record.head != GATHER
    return record.communication_us if one_key else exchange.p10


def name_of(link: Link) -> str:
    """`1000 Mbit/s, 100 us`."""
    return f"{link.rate_mbit:g} Mbit/s, {link.delay_us:g} us"


@dataclass
class Found:
    """What all turns found of one link: calibrations and runs by their number of hosts."""

    systems: dict[int, list[System]]
    runs: list[tuple[int, list[Record], HeadShape]]

    def system(self, num_hosts: int) -> System:
        """The calibration that says its own points again best: the least disturbed one."""
        return min(
            self.systems[num_hosts],
            key=lambda s: s.levels[-1].sources["alpha_s"].relative_error or 0,
        )

    def calibrations(self, num_hosts: int) -> list[int]:
        """On how many hosts the constants were measured that predict a run on `num_hosts`."""
        return [hosts for hosts in self.systems if hosts in (min(self.systems), num_hosts)]


def measure(relay: Path, turns: int, scratch: Path) -> Iterator[dict[Link, Found]]:
    """Calibrate and measure every link, all of them once a turn; all there is after each turn."""
    found = {link: Found({hosts: [] for hosts in HOSTS}, []) for link in LINKS}
    for turn in range(turns):
        for link, mine in found.items():
            folder = scratch / f"{turn}-{link.rate_mbit:g}-{link.delay_us:g}"
            print(f"turn {turn + 1} of {turns}: {name_of(link)}", file=sys.stderr, flush=True)
            for num_hosts in HOSTS:
                place = folder / f"calibrate-{num_hosts}"
                mine.systems[num_hosts].append(calibrate(relay, link, num_hosts, place))
                sizes = ["--batch-sizes", ",".join(map(str, BATCH_SIZES))]
                records, shape = run_scale(
                    relay, link, num_hosts, folder / f"scale-{num_hosts}", *sizes, *EFFORT
                )
                mine.runs.append((num_hosts, records, shape))
        yield found


def least_cells(found: Mapping[Link, Found]) -> list[Cell]:
    """Every cell with the least that any turn measured of it."""
    least: dict[tuple[str, int, int, str, int], Cell] = {}
    for link, mine in found.items():
        for num_hosts, records, shape in mine.runs:
            for calibrated in mine.calibrations(num_hosts):
                system = mine.system(calibrated)
                for cell in cells_of(records, shape, system, link, num_hosts, calibrated):
                    key = (cell.network, num_hosts, calibrated, cell.head, cell.batch_size)
                    least[key] = min(cell, least.get(key, cell), key=lambda c: c.measured_s)
    return list(least.values())


def shipped(cells: Sequence[Cell], date: str) -> dict[str, object]:
    """What `validation.yaml` holds: mean errors by operation, and where they are from.

    From two hosts' constants, as a projection to more ranks than were measured is made.
    """
    operations: dict[str, dict[str, float]] = {}
    for kind, mine in by_kind(calibrated_on(cells, min(HOSTS))).items():
        bound = {"to_bytes" if kind == "small" else "from_bytes": 4096}
        error = {"mean_relative_error": round(mean_error(mine), 3), "points": len(mine)}
        operations[kind] = {**error, **bound}
    source = (
        f"make bench-network, {date}, gloo between 2 and 4 hosts by constants from 2, over links "
        "of 100 Mbit/s and 1 Gbit/s with delays of 100 us and 1 ms, on two cores of a virtual "
        "machine"
    )
    return {"source": source, "operations": operations}


def write(found: Mapping[Link, Found], folder: Path) -> list[Cell]:
    """Write what was found so far into `folder`; returns its cells."""
    cells = least_cells(found)
    systems = {
        (name_of(link), hosts): mine.system(hosts)
        for link, mine in found.items()
        for hosts in mine.systems
    }
    pd.DataFrame([asdict(cell) for cell in cells]).to_csv(folder / "cells.csv", index=False)
    (folder / "tables.md").write_text(tables(cells, systems))
    return cells


def main() -> int:
    """Validate and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("build/network"), metavar="DIR")
    parser.add_argument("--ship", action="store_true", help="write validation.yaml")
    arguments = parser.parse_args()
    if arguments.turns < 1:
        print(f"error: --turns is {arguments.turns}: give 1 or more", file=sys.stderr)
        return 2
    reason = obstacle()
    if reason is not None:
        print(f"error: no network can be made: {reason}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells: list[Cell] = []
    with TemporaryDirectory() as scratch:
        relay = compile_relay(Path(scratch))
        for found in measure(relay, arguments.turns, Path(scratch)):
            cells = write(found, arguments.out)
    print((arguments.out / "tables.md").read_text())
    if arguments.ship:
        document = shipped(cells, f"{datetime.now(UTC):%Y-%m-%d}")
        path = ROOT / "topology" / "flashhead_topology" / "validation.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False, width=100))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The measurements of a tuning run, one after another, each kept as soon as it is done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flashhead_dist.index.options import IndexOptions
from flashhead_dist.models import ModelSource
from flashhead_dist.tune.front import Record
from flashhead_dist.tune.journal import Journal
from flashhead_dist.tune.measure import Choices, measure_family
from flashhead_dist.tune.points import Family, Shape
from flashhead_dist.tune.row_rounding import int8_logits
from flashhead_dist.tune.scene import Scene
from flashhead_dist.tune.simulate import Simulator
from flashhead_dist.tune.timing import layout_of, time_points
from flashhead_kernels.cpu_threads import compute_threads

_SKIPPED = "skipped"
_TIMES = "times "


def simulate_all(
    scene: Scene,
    families: Sequence[Family],
    choices: Choices,
    frequent: Sequence[int],
    journal: Journal,
    threads: int,
    on_family: Callable[[str], None] = lambda name: None,
) -> list[Record]:
    """Records of every family, from `journal` where they are there.

    frequent: token ids of the tokenizer, most frequent first. A family whose clusters do not divide
    evenly is left out.
    """
    simulator = Simulator(scene)
    rounded: Tensor | None = None
    records: list[Record] = []
    with compute_threads(threads):
        for place, family in enumerate(families):
            on_family(family.key)
            if family.key not in journal:
                if rounded is None:
                    rounded = int8_logits(scene)
                journal.add(
                    family.key, _simulate(simulator, scene, family, choices, frequent, rounded)
                )
                _forget(simulator, family, families[place + 1 :])
            entry = journal[family.key]
            if _SKIPPED not in entry:
                records += entry["points"]
    return records


def _simulate(
    simulator: Simulator,
    scene: Scene,
    family: Family,
    choices: Choices,
    frequent: Sequence[int],
    rounded: Tensor,
) -> dict[str, Any]:
    try:
        ranks = simulator.ranks(family, choices.alphas)
    except ValueError as error:
        return {_SKIPPED: str(error)}
    points = measure_family(simulator, scene, family, choices, frequent, rounded, ranks)
    return {"points": points}


def _forget(simulator: Simulator, family: Family, later: Sequence[Family]) -> None:
    needed = {size for f in later for size in (f.cluster_size, f.coarse_size)}
    for size in {family.cluster_size, family.coarse_size} - needed:
        simulator.forget(size)


def runnable(records: Sequence[Record], shape: Shape) -> list[Record]:
    """The records that a real head can run."""
    return [record for record in records if layout_of(record, shape) is not None]


def time_front(
    front: Sequence[Record],
    scene: Scene,
    model: ModelSource,
    journal: Journal,
    *,
    batch_sizes: Sequence[int],
    iterations: int,
    threads: int,
    device: str,
    on_layout: Callable[[str], None] = lambda name: None,
) -> list[Record]:
    """`front` once a batch size, with latencies where a real head runs the point.

    Others have `measured` false and no time.
    """
    by_layout: dict[IndexOptions, list[Record]] = defaultdict(list)
    timed: list[Record] = []
    for record in front:
        layout = layout_of(record, scene.shape)
        if layout is None:
            timed += [record | {"batch_size": b, "measured": False} for b in batch_sizes]
        else:
            by_layout[layout].append(record)
    for layout, records in by_layout.items():
        on_layout(records[0]["family"])
        name = _TIMES + name_of(layout, records, batch_sizes, iterations, threads, device)
        if name not in journal:
            times = time_points(
                records, layout, scene, model, batch_sizes=batch_sizes, iterations=iterations,
                threads=threads, device=device,
            )  # fmt: skip
            journal.add(name, times)
        repeated = [record for _ in batch_sizes for record in records]
        timed += [
            record | time | {"measured": True}
            for record, time in zip(repeated, journal[name], strict=True)
        ]
    return sorted(timed, key=lambda r: (r["batch_size"], r["bytes_share"]))


def name_of(layout: IndexOptions, records: Sequence[Record], *settings: object) -> str:
    """A name of a timing that no other has."""
    probed = [(record["probes_per_group"], record["alpha"]) for record in records]
    return f"{layout.fingerprint()} {probed} {settings}"

"""What more ranks gain a head and what the exchange takes back of it.

Along the sizes of a run, from P to the next P' > P, compute falls by what is *saved* and everything
else of the step grows by what is *taken*: the exchange, and waiting where that is known. The gain
is eaten where taken >= saved, so that more ranks make the step longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from flashhead_dist.bench.records import Record
from flashhead_dist.report.runs import Run


@dataclass(frozen=True)
class Gain:
    """From one size to the next, of one head and batch size; microseconds.

    projected: one of the two sizes is. within_noise: the difference of the two latencies is less
    than what iterations at these sizes scatter by (p10 to p90); None where not measured.
    """

    head: str
    batch_size: int
    before: int
    after: int
    saved_us: float
    taken_us: float
    projected: bool
    within_noise: bool | None

    @property
    def eaten(self) -> bool:
        """Whether more ranks gain nothing."""
        return self.taken_us >= self.saved_us

    @property
    def eaten_share(self) -> float | None:
        """What is taken over what is saved; None where nothing is saved."""
        return self.taken_us / self.saved_us if self.saved_us > 0 else None


def gains(run: Run, head: str, batch_size: int) -> list[Gain]:
    """From each size of the run to the next, where latencies are known, ascending."""
    records = _known(run, head, batch_size)
    return [_gain(before, after) for before, after in pairwise(records)]


def turning_point(run: Run, head: str, batch_size: int) -> Gain | None:
    """From the size with the shortest step to the next larger one; None where that is the largest.

    The smallest of sizes with equally short steps.
    """
    records = _known(run, head, batch_size)
    if not records:
        return None
    place = min(range(len(records)), key=lambda i: records[i].median_us or 0.0)
    return None if place + 1 == len(records) else _gain(records[place], records[place + 1])


def _known(run: Run, head: str, batch_size: int) -> list[Record]:
    """Records whose latency is known, by `tp_size`."""
    mine = (r for r in run.records if (r.head, r.batch_size) == (head, batch_size))
    return sorted((r for r in mine if r.median_us is not None), key=lambda r: r.tp_size)


def _gain(before: Record, after: Record) -> Gain:
    assert before.median_us is not None
    assert after.median_us is not None
    saved_us = before.compute_us - after.compute_us
    both_measured = before.measured and after.measured
    return Gain(
        head=after.head,
        batch_size=after.batch_size,
        before=before.tp_size,
        after=after.tp_size,
        saved_us=saved_us,
        taken_us=saved_us - (before.median_us - after.median_us),
        projected=not both_measured,
        within_noise=_overlap(before, after) if both_measured else None,
    )


def _overlap(one: Record, other: Record) -> bool:
    assert one.p10_us is not None
    assert one.p90_us is not None
    assert other.p10_us is not None
    assert other.p90_us is not None
    return one.p10_us <= other.p90_us and other.p10_us <= one.p90_us

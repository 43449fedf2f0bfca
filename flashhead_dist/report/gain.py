"""What more ranks gain a head and what the exchange takes back of it.

Along the sizes of a run, from P to the next P' > P, compute falls by what is *saved* and everything
else of the step grows by what is *taken*: the exchange, and waiting where that is known. The gain
is eaten where taken >= saved, so that more ranks make the step longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from flashhead_dist.measure.records import Record
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
    records = sorted(
        (
            record
            for record in run.records
            if (record.head, record.batch_size) == (head, batch_size)
            and record.median_us is not None
        ),
        key=lambda record: record.tp_size,
    )
    return [_gain(before, after) for before, after in pairwise(records)]


def eaten_from(found: Sequence[Gain]) -> Gain | None:
    """The first of `gains` that is eaten beyond the noise, and after which none is gained again."""
    last: Gain | None = None
    for gain in reversed(found):
        if not gain.eaten or gain.within_noise:
            break
        last = gain
    return last


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

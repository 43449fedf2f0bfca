"""The Pareto front of measured settings, and the choice of one that reaches a target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flashhead_dist.errors import UserError

Record = dict[str, Any]
_AGREEMENTS = ("top1_worst", "top1")
HALF = "top1_half_probes"
"""Key of the share of selection states that half of a record's probes or its pins find."""
_NORMAL_95 = 1.96


def undominated(
    records: Iterable[Record],
    cost: str = "bytes_share",
    agreements: Sequence[str] = _AGREEMENTS,
) -> list[Record]:
    """Records that no other matches in cost and all agreements and betters in one; by cost.

    Of equal ones the first stays.
    """
    front: list[Record] = []
    ordered = sorted(records, key=lambda r: (r[cost], *(-r[name] for name in agreements)))
    for record in ordered:
        if not any(all(other[n] >= record[n] for n in agreements) for other in front):
            front.append(record)
    return front


def curve(records: Iterable[Record], agreement: str, cost: str = "bytes_share") -> list[Record]:
    """The records that raise the best `agreement` so far, by rising cost."""
    best, steps = -1.0, []
    for record in sorted(records, key=lambda r: (r[cost], -r[agreement])):
        if record[agreement] > best:
            best = record[agreement]
            steps.append(record)
    return steps


@dataclass(frozen=True)
class Target:
    """What a default must reach; None asks for nothing.

    overall, worst: least top-1 agreement on the selection states, over all and in the worst source.
    most_bytes_share: of the dense head's bytes.
    fastest_within: of the points that read at most this share more bytes than the cheapest that
        reaches the rest, the one with the least measured time.
    """

    overall: float | None = None
    worst: float | None = None
    most_bytes_share: float | None = None
    fastest_within: float | None = None

    def __str__(self) -> str:
        words = []
        if self.overall is not None:
            words.append(f"at least {100 * self.overall:g} % overall")
        if self.worst is not None:
            words.append(f"at least {100 * self.worst:g} % in the worst source")
        if self.most_bytes_share is not None:
            words.append(f"at most {100 * self.most_bytes_share:g} % of the dense bytes")
        if self.fastest_within is not None:
            words.append(f"fastest within {100 * self.fastest_within:g} % of the bytes")
        return ", ".join(words) or "nothing"

    def reached_by(self, record: Record) -> bool:
        return bool(
            record["top1"] >= (self.overall or 0)
            and record["top1_worst"] >= (self.worst or 0)
            and record["bytes_share"] <= (self.most_bytes_share or float("inf"))
        )


def parse_target(text: str, most_bytes_share: float | None) -> Target:
    """Read `worst=0.999,overall=0.9995,fastest-within=0.01`.

    Raises:
        UserError: an unknown name, or a share that is none.
    """
    values: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = item.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in ("worst", "overall", "fastest-within") or not 0 <= value <= 1:
            raise UserError(
                f"target {item!r} is not understood: give worst=0.999, overall=0.999 or "
                "fastest-within=0.01, separated by commas"
            )
        values[name.replace("-", "_")] = value
    return Target(
        overall=values.get("overall"),
        worst=values.get("worst"),
        most_bytes_share=most_bytes_share,
        fastest_within=values.get("fastest_within"),
    )


def choose(records: Sequence[Record], target: Target) -> Record:
    """The record that serves `target`.

    Where it asks for agreement: the fewest bytes that reach it. Where it only limits bytes:
    `_surest`.

    Raises:
        UserError: no record reaches it; says which comes closest.
    """
    fitting = [record for record in records if target.reached_by(record)]
    if not fitting:
        closest = max(records, key=lambda r: (r["top1_worst"], r["top1"]), default=None)
        best = "none was measured"
        if closest is not None:
            best = (
                f"the best has {100 * closest['top1']:.2f} % overall and "
                f"{100 * closest['top1_worst']:.2f} % in the worst source at "
                f"{100 * closest['bytes_share']:.2f} % of the bytes"
            )
        raise UserError(f"no setting reaches {target} ({best}): ask for less")
    if target.overall is None and target.worst is None:
        chosen = _surest(fitting)
    else:
        chosen = min(fitting, key=lambda r: (r["bytes_share"], -r["top1_worst"], -r["top1"]))
    if target.fastest_within is None:
        return chosen
    limit = chosen["bytes_share"] * (1 + target.fastest_within)
    timed = [r for r in fitting if r.get("median_us") and r["bytes_share"] <= limit]
    return min(timed, key=lambda r: (r["median_us"], r["bytes_share"])) if timed else chosen


def _surest(records: Sequence[Record]) -> Record:
    """Of the records that miss fewest selection states with half of their probes, the least fitted.

    Records that are worth having miss too few states to be told apart by them: one state of one
    source decides. With half of the probes they miss ten times as many. Where the difference of two
    counts lies within its 95 % interval, as if they were independent, they are tied. Then what is
    least fitted to these texts is surest on others: the alpha nearest to 1, one standard deviation
    of a cluster's logits, as a greater one is a bet on how far states stray; then most centroid
    columns, as fewer are those that calibration states need; fewest misses; fewest bytes.
    """
    missed = {id(record): round((1 - record[HALF]) * record["states"]) for record in records}
    fewest = min(missed.values())

    def key(record: Record) -> tuple[float, ...]:
        count = missed[id(record)]
        tied = count - fewest <= _NORMAL_95 * math.sqrt(count + fewest)
        fitted = abs(record["alpha"] - 1), -record["centroid_columns"]
        return not tied, *fitted, count, record["bytes_share"]

    return min(records, key=key)

"""What limits a head on this machine, and from how many ranks on the exchange eats the gain."""

from __future__ import annotations

from flashhead_dist.bench.records import Record
from flashhead_dist.bench.split import COMPUTE_PARTS
from flashhead_dist.heads.registry import BASELINE, DEFAULT_HEAD
from flashhead_dist.report.gain import Gain, gains, turning_point
from flashhead_dist.report.runs import Run

PRODUCT = DEFAULT_HEAD
BOUND_BY_MEMORY = 0.75
"""From this share of a plain read's bandwidth on, memory is said to limit a head."""
_SMALL_BYTES = 1024
_PART_WORDS = {
    "centroids": "centroid scores",
    "candidates": "exact scores of rows",
    "other": "everything else that it computes",
    "exchange": "the exchange",
}


def verdict(run: Run) -> list[str]:
    """A paragraph a batch size about the product, the smallest batch first, then about the dense.

    Empty where neither head was measured on one rank.
    """
    wanted = [(PRODUCT, batch_size) for batch_size in run.batch_sizes]
    wanted.append((BASELINE, run.batch_sizes[0]))
    paragraphs = [_paragraph(run, head, batch_size) for head, batch_size in wanted]
    return [" ".join(sentences) for sentences in paragraphs if sentences]


def _paragraph(run: Run, head: str, batch_size: int) -> list[str]:
    records = sorted(
        (r for r in run.records if (r.head, r.batch_size) == (head, batch_size)),
        key=lambda record: record.tp_size,
    )
    if not records or records[0].tp_size != 1 or records[0].median_us is None:
        return []
    alone = records[0]
    sentences = [
        f"{head} at batch {batch_size}: on one rank a step takes {alone.median_us:,.0f} µs, "
        f"{_limit(alone)}."
    ]
    found = gains(run, head, batch_size)
    if not found:
        return [*sentences, "No other rank count was measured."]
    sentences += [_step(gain) for gain in found]
    largest = [record for record in records if record.measured and record.tp_size > 1]
    if largest:
        sentences.append(_largest_part(largest[-1]))
    return [*sentences, _from_where(run, head, batch_size)]


def _limit(alone: Record) -> str:
    """What one rank's compute is bound by, from the share of its memory's bandwidth."""
    share = alone.roofline_share
    rate = alone.read_bytes_by_rank[0] / alone.compute_us
    reads = (
        f"in which it reads {alone.read_bytes_by_rank[0] / 1e6:,.1f} MB at {rate / 1e3:,.1f} GB/s, "
        f"{100 * share:.0f} % of what a plain read reaches here"
    )
    if share >= BOUND_BY_MEMORY:
        return f"{reads}: the memory's bandwidth limits it"
    return f"{reads}: bandwidth alone does not limit it"


def _step(gain: Gain) -> str:
    """What the next size gains, and what the exchange takes back of it."""
    start = f"{'PROJECTED from' if gain.projected else 'From'} {gain.before} to {gain.after} ranks"
    if gain.eaten_share is None:
        return f"{start} compute does not fall."
    noise = ", within the noise" if gain.within_noise else ""
    if gain.taken_us <= 0:
        return f"{start} compute falls by {gain.saved_us:,.0f} µs and nothing is taken back{noise}."
    return (
        f"{start} compute falls by {gain.saved_us:,.0f} µs and exchange and waiting take "
        f"{gain.taken_us:,.0f} µs back ({100 * gain.eaten_share:.0f} %){noise}."
    )


def _largest_part(record: Record) -> str:
    parts = {name: record.split.step_us[name] for name in (*COMPUTE_PARTS, "exchange")}
    medians = {name: part.median for name, part in parts.items() if part is not None}
    whole = sum(medians.values())
    name = max(medians, key=lambda part: medians[part])
    return (
        f"The largest part of a step at {record.tp_size} ranks is {_PART_WORDS[name]}, "
        f"{100 * medians[name] / whole:.0f} %."
    )


def _from_where(run: Run, head: str, batch_size: int) -> str:
    records = [r for r in run.records if (r.head, r.batch_size) == (head, batch_size)]
    turn = turning_point(run, head, batch_size)
    if turn is None:
        most = max(record.tp_size for record in records if record.median_us is not None)
        return f"A step is shortest on {most} ranks, the most here: the gain is not eaten yet."
    kind = "PROJECTED, " if turn.projected else ""
    start = (
        f"{kind}a step is shortest on {turn.before} rank{'' if turn.before == 1 else 's'}"
        f"{', within the noise of the next size' if turn.within_noise else ''}; "
        f"from {turn.after} ranks on"
    )
    start = start[0].upper() + start[1:]
    if turn.saved_us <= 0:
        return f"{start}, more ranks gain nothing, as compute does not fall."
    payload = max(record.payload_bytes_per_row for record in records)
    cost = (
        f"the fixed cost of an exchange that carries {payload:,.0f} bytes a row"
        if payload <= _SMALL_BYTES
        else "the exchange"
    )
    return f"{start}, {cost} eats the gain."

"""What limits a head on this machine, and from how many ranks on the exchange eats the gain."""

from __future__ import annotations

from flashhead_dist.measure.assemble import BASELINE
from flashhead_dist.report.gain import Gain, eaten_from, gains
from flashhead_dist.report.runs import Run

PRODUCT = "flashhead"


def verdict(run: Run) -> list[str]:
    """A paragraph a batch size about the product, the smallest batch first, then about the dense.

    Empty where neither head was measured.
    """
    paragraphs = []
    for batch_size in run.batch_sizes:
        sentences = _paragraph(run, PRODUCT, batch_size)
        if sentences:
            paragraphs.append(" ".join(sentences))
    dense = _paragraph(run, BASELINE, run.batch_sizes[0])
    if dense:
        paragraphs.append(" ".join(dense))
    return paragraphs


def _paragraph(run: Run, head: str, batch_size: int) -> list[str]:
    records = [r for r in run.records if (r.head, r.batch_size) == (head, batch_size)]
    alone = next((r for r in records if r.tp_size == 1 and r.median_us is not None), None)
    if alone is None or alone.median_us is None:
        return []
    sentences = [
        f"{head} at batch {batch_size}: on one rank a step takes {alone.median_us:,.0f} µs, all of "
        f"it compute."
    ]
    found = gains(run, head, batch_size)
    if not found:
        return [*sentences, "No other rank count was measured."]
    sentences += [_step(gain) for gain in found]
    eaten = eaten_from(found)
    payload = next((r.payload_bytes_per_row for r in records if r.tp_size > 1), 0.0)
    if eaten is None:
        sentences.append(f"Up to {found[-1].after} ranks the exchange does not eat the gain.")
    else:
        kind = " (PROJECTED)" if eaten.projected else ""
        cost = (
            f"the fixed cost of the exchange, which carries only {payload:,.0f} bytes a row,"
            if payload <= 1024
            else "the exchange"
        )
        sentences.append(f"From {eaten.after} ranks on {cost} eats the gain{kind}.")
    return sentences


def _step(gain: Gain) -> str:
    kind = "PROJECTED from" if gain.projected else "From"
    saved = f"{kind} {gain.before} to {gain.after} ranks compute falls by {gain.saved_us:,.0f} µs"
    share = gain.eaten_share
    if share is None:
        return f"{kind} {gain.before} to {gain.after} ranks compute does not fall."
    taken = f"exchange and waiting take {gain.taken_us:,.0f} µs back ({100 * share:.0f} %)"
    noise = ", within the noise" if gain.within_noise else ""
    return f"{saved} and {taken}{noise}."

"""Share of identical texts and the median first difference of one head, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flashhead_dist.decode.texts.first_difference import TextRecord
from flashhead_dist.evaluate.intervals import Interval, bootstrap_median, wilson


@dataclass(frozen=True)
class TextSummary:
    """One head over all prompts; intervals are at 95 %.

    identical: share of texts equal to the dense head's in every token (Wilson's interval: prompts
    are independent). identical_to_end: the same up to the dense text's first stop token.
    median_first_difference: over all texts, one that never differs counting as infinite (bootstrap
    of texts). median_of_differing: over those that differ; None where none does.
    token_agreement: share of the dense texts' states from which the head chooses the dense token.
    """

    head: str
    num_texts: int
    num_tokens: int
    identical: Interval
    identical_to_end: Interval
    median_first_difference: Interval
    median_of_differing: Interval | None
    token_agreement: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict of every field; null for infinity."""
        document = asdict(self)
        for value in document.values():
            if isinstance(value, dict):
                value.update({k: None if v == math.inf else v for k, v in value.items()})
        return document


def summarize(records: Sequence[TextRecord]) -> TextSummary:
    """Summarize the records of one head, at least one."""
    places = [r.first_difference for r in records]
    differing = [place for place in places if place is not None]
    to_end = [
        r.first_difference is None or (r.ends_at is not None and r.first_difference > r.ends_at)
        for r in records
    ]
    tokens = sum(r.num_tokens for r in records)
    return TextSummary(
        head=records[0].head,
        num_texts=len(records),
        num_tokens=tokens,
        identical=wilson(len(records) - len(differing), len(records)),
        identical_to_end=wilson(sum(to_end), len(records)),
        median_first_difference=bootstrap_median(
            np.array([math.inf if place is None else place for place in places], dtype=float)
        ),
        median_of_differing=bootstrap_median(np.array(differing)) if differing else None,
        token_agreement=sum(r.agreeing for r in records) / tokens,
    )

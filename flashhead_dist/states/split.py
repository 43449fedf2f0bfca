"""Which documents calibrate and which test, and how many tokens each gives."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from flashhead_dist.states.texts import Document

Part = Literal["calibration", "test"]
PARTS: tuple[Part, Part] = ("calibration", "test")

# Sources with more to say than one language has: they get this many shares of the states.
_SHARES = {"mathematics": 5, "code": 5, "en": 5}
LARGE_SOURCES = tuple(_SHARES)
"""English and what is no language: see `hold_out`."""
_MIN_CONTEXT = 160
# Testing needs more states than calibrating: a language's share must resolve misses of 1 %.
_PART_SHARES: dict[Part, float] = {"calibration": 0.42, "test": 0.58}
PLAN_SETTINGS = (1, _SHARES, _MIN_CONTEXT, _PART_SHARES)
"""A version and every constant of the plan, for the cache key of what it leads to."""


@dataclass(frozen=True)
class Passage:
    """Tokens to run the body over, and the positions whose states are kept."""

    source: str
    part: Part
    document: int
    token_ids: list[int]
    positions: list[int]


def split_by_document(documents: list[Document]) -> list[Part]:
    """The part of each document, alternating within a source in an order that only the text fixes.

    A source with two documents or more is in both parts; one with a single document calibrates.
    """
    by_source: dict[str, list[int]] = defaultdict(list)
    for index, document in enumerate(documents):
        by_source[document.source].append(index)
    parts: list[Part] = ["calibration"] * len(documents)
    for indices in by_source.values():
        ordered = sorted(indices, key=lambda i: _order(documents[i]))
        for i in ordered[1::2]:
            parts[i] = "test"
    return parts


def plan_passages(
    documents: list[Document],
    token_ids: list[list[int]],
    *,
    max_tokens: int,
    max_context: int,
    oversampling: float,
) -> list[Passage]:
    """Choose tokens so that about `max_tokens` states come out, evenly over sources and parts.

    Of each chosen text up to `max_context` tokens are run, and an even subset of 1/`oversampling`
    of the positions kept where the source has that many: neighbours are alike, and more documents
    are worth more than more of one. The first position (BOS or an attention sink) is never kept.
    """
    parts = split_by_document(documents)
    groups: dict[tuple[str, Part], list[int]] = defaultdict(list)
    for index, document in enumerate(documents):
        if len(token_ids[index]) > 1:
            groups[document.source, parts[index]].append(index)
    sources = {source for source, _ in groups}
    share = max_tokens / sum(_SHARES.get(source, 1) for source in sources)
    passages: list[Passage] = []
    for (source, part), indices in sorted(groups.items()):
        quota = max(1, round(share * _SHARES.get(source, 1) * _PART_SHARES[part]))
        indices.sort(key=lambda i: _order(documents[i]))
        budget = round(oversampling * quota)
        context = min(max_context, max(_MIN_CONTEXT, -(-budget // len(indices))))
        chosen = _take(indices, token_ids, context, budget)
        kept = _spread(sum(len(t) - 1 for _, t in chosen), quota)
        offset = 0
        for index, tokens in chosen:
            positions = [1 + k - offset for k in kept if offset <= k < offset + len(tokens) - 1]
            offset += len(tokens) - 1
            passages.append(Passage(source, part, index, tokens, positions))
    return passages


def _take(
    indices: list[int], token_ids: list[list[int]], context: int, budget: int
) -> list[tuple[int, list[int]]]:
    chosen: list[tuple[int, list[int]]] = []
    for index in indices:
        if budget <= 0:
            break
        tokens = token_ids[index][:context]
        chosen.append((index, tokens))
        budget -= len(tokens) - 1
    return chosen


def _spread(available: int, wanted: int) -> list[int]:
    """`wanted` numbers, or all, evenly over range(available)."""
    wanted = min(wanted, available)
    return [i * available // wanted for i in range(wanted)]


def _order(document: Document) -> str:
    return hashlib.sha256(
        f"{document.source}\n{document.name}\n{document.text}".encode()
    ).hexdigest()

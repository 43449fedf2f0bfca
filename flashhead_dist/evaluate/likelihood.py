"""Perplexity of texts under a head's closed form, beside the dense head's.

Every token of a text but the first of a window is predicted from those before it, once by the
head's closed form (`heads.closed_form`) and once by the softmax over all logits, from the same
hidden states.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.divergence import evaluate_divergence
from flashhead_dist.heads.base import Head
from flashhead_dist.models import ModelSource
from flashhead_dist.states import HiddenStates, require_finite
from flashhead_dist.states.body import body_dtype, run_body
from flashhead_dist.states.split import Passage
from flashhead_dist.states.texts import Document

CONTEXT = 512
_LEAST_CONTEXT = 64


@dataclass(frozen=True)
class PredictedTokens:
    """N hidden states by source and document, and the token int64 `[N]` that follows each."""

    hidden_states: HiddenStates
    token_ids: Tensor


@dataclass(frozen=True)
class Likelihood:
    """Perplexities of N tokens, and their ratio; by source too."""

    num_tokens: int
    perplexity: float
    dense_perplexity: float
    ratio: float
    ratio_by_source: dict[str, float]
    worst_ratio: float
    """Of the source whose ratio is farthest from 1."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict of every field."""
        return asdict(self)


def predict_tokens(
    model: ModelSource,
    documents: list[Document],
    *,
    max_tokens: int,
    evenly: bool = False,
    origin: str = "texts",
    progress: bool = True,
) -> PredictedTokens:
    """Run the body over windows of up to CONTEXT tokens, taken from all sources in turn.

    evenly: a source's documents take turns as well, so that few tokens are still of many documents.
    origin: what the texts are called.

    Raises:
        UserError: texts with no token to predict, or a model without a body.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    body, tokenizer = model.load_body(body_dtype(device))
    passages = _windows(tokenizer, documents, max_tokens, evenly=evenly)
    if not passages:
        raise UserError("the texts hold no token that follows another: give longer texts")
    states = run_body(body, passages, device=device, progress=progress)
    sources = tuple(sorted({passage.source for passage in passages}))
    hidden = HiddenStates(
        states=torch.cat(states),
        source_ids=torch.tensor([sources.index(p.source) for p in passages for _ in p.positions]),
        sources=sources,
        origin=f"{model.name} ({str(body.dtype).removeprefix('torch.')}) over {origin}",
        documents=torch.tensor([p.document for p in passages for _ in p.positions]),
    )
    require_finite(hidden.states, hidden.origin)
    following = torch.tensor([token for p in passages for token in p.token_ids[1:]])
    return PredictedTokens(hidden, following)


def evaluate_likelihood(
    head: Head, model: ModelSource, predicted: PredictedTokens, *, progress: bool = True
) -> Likelihood:
    """Compare `head` with the dense head of `model`."""
    hidden = predicted.hidden_states
    both = evaluate_divergence(head, model, hidden.states, predicted.token_ids, progress=progress)
    assert both.dense_log_probs is not None
    assert both.head_log_probs is not None
    dense, found = both.dense_log_probs, both.head_log_probs
    ratios = {}
    for number, source in enumerate(hidden.sources):
        own = hidden.source_ids == number
        ratios[source] = math.exp(float(dense[own].mean() - found[own].mean()))
    return Likelihood(
        num_tokens=len(found),
        perplexity=math.exp(-float(found.mean())),
        dense_perplexity=math.exp(-float(dense.mean())),
        ratio=math.exp(float(dense.mean() - found.mean())),
        ratio_by_source=ratios,
        worst_ratio=max(ratios.values(), key=lambda ratio: abs(math.log(ratio))),
    )


def _windows(
    tokenizer: Any, documents: list[Document], max_tokens: int, *, evenly: bool
) -> list[Passage]:
    """Windows from all sources in turn, until they predict `max_tokens` tokens."""
    context = CONTEXT
    if evenly:
        context = min(CONTEXT, max(_LEAST_CONTEXT, max_tokens // len(documents)))
    placed: dict[str, list[tuple[int, Passage]]] = defaultdict(list)
    for number, document in enumerate(documents):
        for place, tokens in enumerate(_cut(tokenizer, document.text, context)):
            positions = list(range(len(tokens) - 1))
            passage = Passage(document.source, "test", number, tokens, positions)
            placed[document.source].append((place if evenly else 0, passage))
    by_source = {
        source: [passage for _, passage in sorted(windows, key=lambda item: item[0])]
        for source, windows in placed.items()
    }
    chosen: list[Passage] = []
    left = max_tokens
    while left > 0 and any(by_source.values()):
        for source in sorted(by_source):
            if by_source[source] and left > 0:
                window = by_source[source].pop(0)
                kept = min(left, len(window.positions))
                chosen.append(
                    Passage(
                        source,
                        "test",
                        window.document,
                        window.token_ids[: kept + 1],
                        window.positions[:kept],
                    )
                )
                left -= kept
    return chosen


def _cut(tokenizer: Any, text: str, context: int) -> Iterator[list[int]]:
    tokens = list(tokenizer(text).input_ids)
    first = [tokens.pop(0)] if tokens and tokens[0] == tokenizer.bos_token_id else []
    room = context - len(first)
    for start in range(0, len(tokens), room):
        window = first + tokens[start : start + room]
        if len(window) > 1:
            yield window

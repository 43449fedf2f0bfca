"""A head's closed form against the dense softmax, exactly, over the whole vocabulary.

A token scored exactly has its own logit in both distributions, and one in an unprobed cluster c
shares the cluster's estimated mass m_c by the softmax over c. With L_c the log-sum-exp of c's
logits, Z and Z' the normalisers of the dense softmax P and of the closed form Q (all tokens; scored
tokens and every m_c),

    KL(P || Q) = log Z' - log Z + sum over unprobed c of P(c) (L_c - m_c),  P(c) = exp(L_c) / Z

so that one pass over the output embedding, summed by cluster, gives it without a logit vector of
the vocabulary's length. `heads.distribution` says what Q is.

`predict_tokens` runs a model over texts, and `evaluate_likelihood` compares the perplexities of the
tokens that follow under both distributions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.distribution import ClosedForm, closed_form
from flashhead_dist.heads.registry import EmulatedHead
from flashhead_dist.models import ModelSource, OutputContract
from flashhead_dist.states import HiddenStates, require_finite
from flashhead_dist.states.collect import body_dtype, run_body
from flashhead_dist.states.split import Document, Passage

_STATES = 512
_ROWS = 8192
_FORM_STATES = 64
_HEADROOM = 40.0
"""Nats above the reference at which sums of exponentials are rescaled."""
_CONTEXT, _LEAST_CONTEXT = 512, 64


@dataclass(frozen=True)
class Divergence:
    """What N states give, float64 `[N]` each; nats.

    kl: of the closed form from the dense softmax, dense first; off by the rounding of float32
        logits, some 1e-5, so that a perfect head's may be below 0 by that much.
    scored_mass: dense probability of the tokens that the closed form scores exactly.
    dense_log_probs, head_log_probs: of the tokens asked for; None where none were.
    """

    kl: Tensor
    scored_mass: Tensor
    dense_log_probs: Tensor | None = None
    head_log_probs: Tensor | None = None


@dataclass(frozen=True)
class _Forms:
    """Closed forms of n states: log Z' float64 `[n]`; log_mass m_c float32 `[C, n]`, -inf where
    scored; best scored logit float32 `[n]`; log(Q(t) Z') float64 `[n]` of the tokens asked for.
    """

    log_normalizer: Tensor
    log_mass: Tensor
    best: Tensor
    token_log_mass: Tensor | None


def evaluate_divergence(
    head: Head | EmulatedHead,
    model: ModelSource,
    states: Tensor,
    token_ids: Tensor | None = None,
    *,
    progress: bool = True,
) -> Divergence:
    """Hold the closed form of `head` for `states [N, D]` against the softmax of `model`'s logits.

    head: all its ranks in this process. token_ids: int64 `[N]`, tokens whose log probabilities are
    wanted. Soft-capping is the model's; the temperature is 1.

    Raises:
        UserError: a head that has no closed form, states that do not fit.
    """
    ranks = head.ranks if isinstance(head, EmulatedHead) else [head]
    if not isinstance(head, EmulatedHead) and head.tp.tp_size > 1:
        raise ValueError("the closed form needs all ranks of a head in one process")
    parts = []
    clusters: Tensor | None = None
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task(f"distribution of {head.name}", total=len(states))
        for first in range(0, len(states), _STATES):
            part = slice(first, first + _STATES)
            tokens = None if token_ids is None else token_ids[part]
            forms, shards = _forms(ranks, states[part], tokens, model.contract)
            if clusters is None:
                clusters = _cluster_of_token(shards, model.vocab_size)
            parts.append(_compare(forms, model, clusters, states[part], tokens))
            bar.advance(task, len(states[part]))
    return Divergence(
        torch.cat([part.kl for part in parts]),
        torch.cat([part.scored_mass for part in parts]),
        None if token_ids is None else _joined([part.dense_log_probs for part in parts]),
        None if token_ids is None else _joined([part.head_log_probs for part in parts]),
    )


def _forms(
    ranks: Sequence[Head], states: Tensor, token_ids: Tensor | None, contract: OutputContract
) -> tuple[_Forms, list[ClosedForm]]:
    """What all ranks together say of `states`, and the last batch's forms, for their shards."""
    parts = []
    forms: list[ClosedForm] = []
    for first in range(0, len(states), _FORM_STATES):
        part = slice(first, first + _FORM_STATES)
        forms = [closed_form(rank, states[part], contract=contract) for rank in ranks]
        normalizer = torch.stack([form.log_normalizer() for form in forms]).logsumexp(0)
        mass = torch.cat([form.log_mass.flatten(1) for form in forms if form.index is not None]
                         or [torch.empty(len(normalizer), 0)], dim=1)  # fmt: skip
        best = torch.stack([form.logits.amax(1) for form in forms]).amax(0)
        tokens = None
        if token_ids is not None:
            asked = token_ids[part].to(states.device)
            own = [form.token_log_mass(asked) for form in forms]
            tokens = torch.stack(own).logsumexp(0).cpu()
        parts.append(_Forms(normalizer.cpu(), mass.T.cpu(), best.cpu(), tokens))
    joined = _Forms(
        torch.cat([part.log_normalizer for part in parts]),
        torch.cat([part.log_mass for part in parts], dim=1),
        torch.cat([part.best for part in parts]),
        None if token_ids is None else _joined([part.token_log_mass for part in parts]),
    )
    return joined, forms


def _cluster_of_token(forms: Sequence[ClosedForm], vocab_size: int) -> Tensor:
    """The cluster int64 `[V]` of every token, counted over all ranks; C for one in no cluster."""
    shards = [form.index.shard for form in forms if form.index is not None]
    ids = [shard.cluster_token_ids.cpu().long() for shard in shards]
    total = sum(map(len, ids))
    found = torch.full((vocab_size,), total, dtype=torch.int64)
    first = 0
    for own in ids:
        places = torch.arange(first, first + len(own)).unsqueeze(1).expand(own.shape)
        found[own[own >= 0]] = places[own >= 0]
        first += len(own)
    return found


def _compare(
    forms: _Forms,
    model: ModelSource,
    cluster_of_token: Tensor,
    states: Tensor,
    token_ids: Tensor | None,
) -> Divergence:
    """One pass over the output embedding: sums of exponentials by cluster, then the formula."""
    num_clusters, count = forms.log_mass.shape
    hidden = states.float().cpu().T.contiguous()
    final = model.contract.final_logits()
    reference = forms.best.clone()
    sums = torch.zeros(num_clusters + 1, count)
    of_token = torch.empty(count, dtype=torch.float64)
    for start in range(0, model.vocab_size, _ROWS):
        stop = min(start + _ROWS, model.vocab_size)
        logits = model.read_rows(start, stop).float() @ hidden  # [rows, n]
        if not final.is_plain:
            logits = final.without_noise(logits)
        if token_ids is not None:
            own = ((token_ids >= start) & (token_ids < stop)).nonzero()[:, 0]
            of_token[own] = logits[token_ids[own] - start, own].double()
        higher = torch.maximum(reference, logits.amax(0))
        if bool((higher > reference + _HEADROOM).any()):
            sums *= (reference - higher).exp()
            reference = higher
        sums.index_add_(0, cluster_of_token[start:stop], logits.sub_(reference).exp_())
    total = sums.sum(0, dtype=torch.float64)
    dense_normalizer = total.log() + reference.double()
    excess = torch.zeros(count, dtype=torch.float64)
    unscored = torch.zeros(count, dtype=torch.float64)
    for part in torch.split(torch.arange(num_clusters), _ROWS):
        mass, own = forms.log_mass[part], sums[part]
        share = (own / total).masked_fill(mass == float("-inf"), 0)
        # A cluster too unlikely for float32 weighs nothing, and its logarithm would be -inf.
        difference = (own.log() + reference - mass).masked_fill(share == 0, 0)
        excess += (share * difference).sum(0, dtype=torch.float64)
        unscored += share.sum(0, dtype=torch.float64)
    return Divergence(
        kl=forms.log_normalizer.double() - dense_normalizer + excess,
        scored_mass=1 - unscored,
        dense_log_probs=None if token_ids is None else of_token - dense_normalizer,
        head_log_probs=None
        if forms.token_log_mass is None
        else forms.token_log_mass - forms.log_normalizer.double(),
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


@dataclass(frozen=True)
class PredictedTokens:
    """N hidden states by source and document, and the token int64 `[N]` that follows each."""

    hidden_states: HiddenStates
    token_ids: Tensor


def predict_tokens(
    model: ModelSource,
    documents: list[Document],
    *,
    max_tokens: int,
    evenly: bool = False,
    origin: str = "texts",
    progress: bool = True,
) -> PredictedTokens:
    """Run the body over windows of up to 512 tokens, taken from all sources in turn.

    evenly: a source's documents take turns too, so that few tokens still come from many documents.
    origin: name of the texts.

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
) -> dict[str, Any]:
    """Perplexities under the closed form of `head` and the dense head of `model`, and their ratio.

    `worst_ratio` is that of the source whose ratio is farthest from 1.
    """
    hidden = predicted.hidden_states
    both = evaluate_divergence(head, model, hidden.states, predicted.token_ids, progress=progress)
    dense, own = both.dense_log_probs, both.head_log_probs
    assert dense is not None
    assert own is not None
    ratios = {}
    for number, source in enumerate(hidden.sources):
        rows = hidden.source_ids == number
        ratios[source] = math.exp(float(dense[rows].mean() - own[rows].mean()))
    return {
        "num_tokens": len(own),
        "perplexity": math.exp(-float(own.mean())),
        "dense_perplexity": math.exp(-float(dense.mean())),
        "ratio": math.exp(float(dense.mean() - own.mean())),
        "ratio_by_source": ratios,
        "worst_ratio": max(ratios.values(), key=lambda ratio: abs(math.log(ratio))),
    }


def _windows(
    tokenizer: Any, documents: list[Document], max_tokens: int, *, evenly: bool
) -> list[Passage]:
    """Windows from all sources in turn, until they predict `max_tokens` tokens."""
    context = _CONTEXT
    if evenly:
        context = min(_CONTEXT, max(_LEAST_CONTEXT, max_tokens // len(documents)))
    windows: dict[str, list[tuple[int, int, list[int]]]] = defaultdict(list)
    for number, document in enumerate(documents):
        for place, tokens in enumerate(_cut(tokenizer, document.text, context)):
            windows[document.source].append((place if evenly else 0, number, tokens))
    for own in windows.values():
        own.sort(key=lambda window: window[0])
    chosen: list[Passage] = []
    left = max_tokens
    while left > 0 and any(windows.values()):
        for source in sorted(windows):
            if windows[source] and left > 0:
                _, number, tokens = windows[source].pop(0)
                count = min(left, len(tokens) - 1)
                chosen.append(
                    Passage(source, "test", number, tokens[: count + 1], list(range(count)))
                )
                left -= count
    return chosen


def _cut(tokenizer: Any, text: str, context: int) -> Iterator[list[int]]:
    tokens = list(tokenizer(text).input_ids)
    first = [tokens.pop(0)] if tokens and tokens[0] == tokenizer.bos_token_id else []
    room = context - len(first)
    for start in range(0, len(tokens), room):
        window = first + tokens[start : start + room]
        if len(window) > 1:
            yield window

"""How faithful a head is to the dense head, on given hidden states, by source.

Fidelity is no part of sharding exactness: it says how often retrieval finds the dense head's token,
not whether ranks agree.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.divergence import Divergence
from flashhead_dist.evaluate.intervals import (
    DENSE_LOG_PROB,
    HEAD_LOG_PROB,
    clusters_of,
    figures_by_source,
)
from flashhead_dist.evaluate.truth import DenseTruth
from flashhead_dist.heads.base import Head, HeadOutput, Want
from flashhead_dist.heads.registry import EmulatedHead
from flashhead_dist.states import HiddenStates, require_hidden_size

BATCH_SIZE = 64
DENSE_BYTES_PER_WEIGHT = 2
"""The dense head that `bytes_share` is a share of is in bf16."""


@dataclass(frozen=True)
class Agreement:
    """Shares of states whose first token is the dense head's, 0 to 1."""

    top1_agreement: float
    top1_agreement_by_source: dict[str, float]
    num_states_by_source: dict[str, int]
    worst_source: str
    top1_agreement_worst_source: float


@dataclass(frozen=True)
class Fidelity(Agreement):
    """A head against the dense head.

    top10_containment: share of the dense head's ten best tokens that are among the head's.
    candidate_mass: mean share of the dense softmax on the tokens that the head scored; 1 if dense.
    logz_error: mean of (head's log-sum-exp - dense), nats; None for a head that gives none.
    logz_error_p99: 99th percentile of its magnitude.
    kl_nats: mean divergence of the closed form from the dense softmax; None where not asked for.
    perplexity, dense_perplexity: of the tokens that follow; None where they are unknown.
    bytes_share: weight bytes that all ranks read for one row, over the dense head's in bf16.
    by_source: rows of `intervals.figures_by_source`; NaN is None.
    """

    head: str
    tp_size: int
    emulated: bool
    num_states: int
    top10_containment: float
    candidate_mass: float
    logz_error: float | None
    logz_error_p99: float | None
    kl_nats: float | None
    dense_perplexity: float | None
    perplexity: float | None
    bytes_share: float
    payload_bytes_per_row: int
    interval_clusters: str
    by_source: list[dict[str, Any]]


def evaluate_agreement(
    token_ids: Tensor, hidden_states: HiddenStates, truth: DenseTruth
) -> Agreement:
    """Compare first tokens `[N]` or `[N, k]` with the truth, per source."""
    first = token_ids.reshape(len(token_ids), -1)[:, 0].cpu()
    agrees = (first == truth.token_ids[:, 0]).double()
    by_source: dict[str, float] = {}
    counts: dict[str, int] = {}
    for number, source in enumerate(hidden_states.sources):
        mask = hidden_states.source_ids == number
        if bool(mask.any()):
            by_source[source] = float(agrees[mask].mean())
            counts[source] = int(mask.sum())
    worst = min(by_source, key=lambda source: by_source[source])
    return Agreement(float(agrees.mean()), by_source, counts, worst, by_source[worst])


def evaluate_fidelity(
    head: Head | EmulatedHead,
    hidden_states: HiddenStates,
    truth: DenseTruth,
    *,
    divergence: Divergence | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Fidelity:
    """Run `head` over every state and compare; on real ranks every rank gives the same answer.

    divergence: of the head's closed form for the same states, where it has one.

    Raises:
        UserError: no states, a hidden size that does not fit, or NaN or inf (named by source).
    """
    _check(hidden_states, head.hidden_size, head.name)
    output = run_head(head, hidden_states, device=device, progress=progress)
    contained = (
        truth.token_ids[:, :, None] == output.token_ids[:, None, : truth.token_ids.shape[1]]
    ).any(-1)
    mass = torch.ones(len(hidden_states), dtype=torch.float64)
    if output.candidate_logsumexp is not None:
        mass = (output.candidate_logsumexp.double() - truth.logsumexp.double()).exp().clamp(max=1)
    errors = None
    if output.logsumexp is not None:
        errors = output.logsumexp.double() - truth.logsumexp.double()
    figures = {
        "top1_agreement": (output.token_ids[:, 0] == truth.token_ids[:, 0]).double(),
        "top10_containment": contained.double().mean(1),
        "candidate_mass": mass,
    }
    if divergence is not None:
        figures["kl_nats"] = divergence.kl
        if divergence.dense_log_probs is not None and divergence.head_log_probs is not None:
            figures[DENSE_LOG_PROB] = divergence.dense_log_probs
            figures[HEAD_LOG_PROB] = divergence.head_log_probs
    by_source = [
        {str(name): None if value != value else value for name, value in row.items()}
        for row in figures_by_source(figures, hidden_states).to_dict("records")
    ]
    overall = by_source[-1]
    read_bytes = head.read_bytes_per_row
    if isinstance(head, Head):
        read_bytes = sum(head.tp.gather_objects(read_bytes))
    return Fidelity(
        **asdict(evaluate_agreement(output.token_ids, hidden_states, truth)),
        head=head.name,
        tp_size=head.tp.tp_size if isinstance(head, Head) else head.tp_size,
        emulated=isinstance(head, EmulatedHead),
        num_states=len(hidden_states),
        top10_containment=float(contained.double().mean()),
        candidate_mass=float(mass.mean()),
        logz_error=None if errors is None else float(errors.mean()),
        logz_error_p99=None if errors is None else float(errors.abs().quantile(0.99)),
        kl_nats=overall.get("kl_nats"),
        dense_perplexity=overall.get("dense_perplexity"),
        perplexity=overall.get("perplexity"),
        bytes_share=read_bytes / (head.vocab_size * head.hidden_size * DENSE_BYTES_PER_WEIGHT),
        payload_bytes_per_row=head.payload_bytes_per_row,
        interval_clusters=clusters_of(hidden_states)[1],
        by_source=by_source,
    )


def run_head(
    head: Head | EmulatedHead,
    hidden_states: HiddenStates,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> HeadOutput:
    """The head's answers for every state on the CPU: ten tokens, and both log-sum-exps."""
    want = Want(
        k=min(10, head.vocab_size),
        logsumexp=head.has_logsumexp,
        candidate_mass=not head.scores_everything,
    )
    states = hidden_states.states
    outputs: list[HeadOutput] = []
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task(f"head {head.name}", total=len(states))
        for first in range(0, len(states), BATCH_SIZE):
            batch = states[first : first + BATCH_SIZE].to(device)
            outputs.append(head.serve(batch, want))
            bar.advance(task, len(batch))
    return HeadOutput(
        torch.cat([output.token_ids for output in outputs]).cpu(),
        torch.cat([output.logits for output in outputs]).cpu(),
        _joined([output.logsumexp for output in outputs]),
        _joined([output.candidate_logsumexp for output in outputs]),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given).cpu() if given else None


def _check(hidden_states: HiddenStates, hidden_size: int, head: str) -> None:
    if not len(hidden_states):
        raise UserError(f"{hidden_states.origin} holds no hidden states: give at least one")
    require_hidden_size(hidden_states, hidden_size, f"head {head}")
    for number, source in enumerate(hidden_states.sources):
        rows = (hidden_states.source_ids == number).nonzero()[:, 0]
        finite = torch.isfinite(hidden_states.states[rows]).all(dim=1)
        if not bool(finite.all()):
            raise UserError(
                f"{hidden_states.origin} holds NaN or infinity in row {int(rows[~finite][0])}, of "
                f"source {source}: recompute the hidden states or leave that row out"
            )

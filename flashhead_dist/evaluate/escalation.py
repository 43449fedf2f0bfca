"""What a second look costs and what it gains, by the margin below which rows take it.

Every state is judged once with each number of probes, and answered once by each second round; any
threshold is then a matter of counting. Thresholds come from the margins of calibration states, so
the share of test states that escalates is a test of it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.fidelity import DENSE_BYTES_PER_WEIGHT, evaluate_agreement
from flashhead_dist.evaluate.truth import DenseTruth
from flashhead_dist.heads.flashhead_escalate import Escalation, FlashHeadEscalate
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.index.calibrate import spread_over_sources
from flashhead_dist.states import HiddenStates
from flashhead_kernels.dispatch import ops_for

_BATCH = 64


_NUM_CALIBRATION = 4096
"""States that thresholds are quantiles of."""


@dataclass(frozen=True)
class EscalationPoint:
    """One threshold of one pair of rounds, on the test states.

    num_probes: of the first round; second_probes: of the second, None where it scores every token.
    asked_share: of calibration states, drawn evenly from all sources, that lie below `margin`; 0
    never looks again. escalated_share: of the test states. caught: share of the first round's
    misses that took the second; None where it missed nothing. bytes_share: mean over states of the
    bytes read for one row, over the dense head's in bf16.
    """

    num_probes: int
    second_probes: int | None
    asked_share: float
    margin: float
    escalated_share: float
    caught: float | None
    bytes_share: float
    top1_agreement: float
    worst_source: str
    top1_agreement_worst_source: float


def escalation_points(
    builder: HeadBuilder,
    calibration: HiddenStates,
    test: HiddenStates,
    truth: DenseTruth,
    *,
    num_probes: Sequence[int],
    second_probes: Sequence[int | None],
    shares: Sequence[float],
    progress: bool = True,
) -> list[EscalationPoint]:
    """A point for each number of probes, each larger second round and each share.

    Raises:
        UserError: a share outside 0..1, probes that do not fit the index, no states.
    """
    _check(calibration, test, shares)
    chosen = spread_over_sources(calibration, _NUM_CALIBRATION)
    answers: dict[int, tuple[Tensor, Tensor]] = {}
    wanted = sorted({*num_probes, *(probes for probes in second_probes if probes is not None)})
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        count = len(test) * len(wanted) + len(chosen) * len(num_probes)
        task = bar.add_task("flashhead_escalate", total=count)

        def ask(states: Tensor, probes: int) -> tuple[Tensor, Tensor]:
            return _tokens_and_margins(
                builder, states, probes, lambda number: bar.advance(task, number)
            )

        for probes in wanted:
            answers[probes] = ask(test.states, probes)
        margins = {p: ask(calibration.states[chosen], p)[1] for p in num_probes}
    points = []
    for probes in num_probes:
        for second in second_probes:
            if second is not None and second <= probes:
                continue
            then = truth.token_ids[:, 0] if second is None else answers[second][0]
            for share in shares:
                margin = _threshold(margins[probes], share)
                points.append(
                    _point(builder, test, truth, (probes, second), (share, margin),
                           answers[probes], then)
                )  # fmt: skip
    return points


def _point(
    builder: HeadBuilder,
    test: HiddenStates,
    truth: DenseTruth,
    num_probes: tuple[int, int | None],
    threshold: tuple[float, float],
    first: tuple[Tensor, Tensor],
    then: Tensor,
) -> EscalationPoint:
    """num_probes: of both rounds. threshold: the share of states below it, and its margin."""
    (probes, second), (share, margin) = num_probes, threshold
    tokens, margins = first
    again = margins < margin
    agreement = evaluate_agreement(torch.where(again, then, tokens), test, truth)
    missed = tokens != truth.token_ids[:, 0]
    escalated = float(again.double().mean())
    escalation = Escalation(margin=margin, num_probes=second, expected_share=escalated)
    dense = builder.model.vocab_size * builder.model.hidden_size * DENSE_BYTES_PER_WEIGHT
    return EscalationPoint(
        num_probes=probes,
        second_probes=second,
        asked_share=share,
        margin=margin,
        escalated_share=escalated,
        caught=float(again[missed].double().mean()) if bool(missed.any()) else None,
        bytes_share=_head(builder, probes, escalation).read_bytes_per_row / dense,
        top1_agreement=agreement.top1_agreement,
        worst_source=agreement.worst_source,
        top1_agreement_worst_source=agreement.top1_agreement_worst_source,
    )


def _head(builder: HeadBuilder, probes: int, escalation: Escalation) -> FlashHeadEscalate:
    # The rank's share of the index is kept by the builder: a head is a few fields around it.
    kept, builder.escalation = builder.escalation, escalation
    try:
        head = builder.build(FlashHeadEscalate.name, num_probes=probes)
    finally:
        builder.escalation = kept
    assert isinstance(head, FlashHeadEscalate)
    return head


def _tokens_and_margins(
    builder: HeadBuilder, states: Tensor, probes: int, advance: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    """Token int64 `[N]` and margin float32 `[N]` of the first round for `states [N, D]`."""
    head = _head(builder, probes, Escalation(margin=-inf))
    tokens, margins = [], []
    ops = ops_for(builder.device)
    for part in torch.split(states, _BATCH):
        found, _ = head.first_round(part.to(builder.device))
        assert found.unprobed is not None
        logits, ids = ops.unpack_keys(torch.stack([found.keys[:, 0], found.unprobed], dim=1))
        tokens.append(ids[:, 0].cpu())
        margins.append((logits[:, 0] - logits[:, 1]).cpu())
        advance(len(part))
    return torch.cat(tokens), torch.cat(margins)


def _threshold(margins: Tensor, share: float) -> float:
    """The margin that `share` of `margins` lie below; -inf for none of them."""
    finite = margins[torch.isfinite(margins)]
    if share == 0 or not len(finite):
        return -inf
    return float(torch.quantile(finite.double(), share))


def _check(calibration: HiddenStates, test: HiddenStates, shares: Sequence[float]) -> None:
    for share in shares:
        if not 0 <= share <= 1:
            raise UserError(f"a share of {share} rows cannot escalate: give it between 0 and 1")
    for states in (calibration, test):
        if not len(states):
            raise UserError(f"{states.origin} holds no hidden states: give at least one")

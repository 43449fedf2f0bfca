"""What hidden states decide about clusters that are there: alpha, pinned tokens, and fidelity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flashhead_dist.index.calibrate import (
    Found,
    choose_alpha,
    dense_argmax,
    found_within,
    missed_tokens,
    probe_ranks,
)
from flashhead_dist.index.options import ALPHAS, IndexOptions
from flashhead_dist.index.progress import Counter, Report
from flashhead_dist.states import HiddenStates
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_kernels.shard import IndexShard


@dataclass(frozen=True)
class Choice:
    """What the calibration states chose, and the evidence that goes into the manifest."""

    alpha: float
    pinned_token_ids: tuple[int, ...]
    evidence: dict[str, Any] = field(default_factory=dict)


def choose(
    weights: Tensor,
    tensors: IndexShard,
    options: IndexOptions,
    calibration: HiddenStates | None,
    special_token_ids: Sequence[int],
    threads: int,
    report: Report,
) -> Choice:
    """Choose alpha, then the tokens to pin beside those of `options` and the special ones.

    weights: `[V, D]`. threads: for the dense head. Without calibration states alpha is 0, or what
    the options say, and no further token is pinned.
    """
    given = dict.fromkeys((*options.pinned_token_ids, *special_token_ids))
    if calibration is None or not len(calibration):
        return Choice(options.alpha or 0.0, tuple(given))
    alphas = ALPHAS if options.alpha is None else (options.alpha,)
    tokens, ranks = _ranks(weights, tensors, calibration, alphas, threads, report, "Calibrating")
    probes = _probes_per_group(options, weights)
    found = {
        alpha: found_within(row, probes, calibration)
        for alpha, row in zip(alphas, ranks, strict=True)
    }
    alpha = choose_alpha(found)
    room = max(0, options.max_learned_pins(len(weights)) - len(special_token_ids))
    ranked = ranks[alphas.index(alpha)]
    learned = missed_tokens(ranked, tokens, probes, room)
    evidence = {
        "num_states": len(calibration),
        "origin": calibration.origin,
        "special_token_ids": list(special_token_ids),
        "learned_pinned_token_ids": learned,
        "top1_agreement_by_alpha": [
            {"alpha": alpha, **_summary(result)} for alpha, result in found.items()
        ],
    }
    return Choice(alpha, tuple(sorted({*given, *learned})), evidence)


def measure_fidelity(
    weights: Tensor,
    tensors: IndexShard,
    options: IndexOptions,
    alpha: float,
    test: HiddenStates | None,
    threads: int,
    report: Report,
) -> dict[str, Any]:
    """Fidelity on the test states, for the manifest; empty without any."""
    if test is None or not len(test):
        return {}
    _, ranks = _ranks(weights, tensors, test, (alpha,), threads, report, "Testing")
    found = found_within(ranks[0], _probes_per_group(options, weights), test)
    return {
        "num_states": len(test),
        "origin": test.origin,
        **_summary(found),
        "top1_agreement_by_source": found.by_source,
    }


def _ranks(
    weights: Tensor,
    tensors: IndexShard,
    states: HiddenStates,
    alphas: tuple[float, ...],
    threads: int,
    report: Report,
    stage: str,
) -> tuple[Tensor, Tensor]:
    """Dense argmax `[N]` of the states and its `probe_ranks [alphas, N]`."""
    with compute_threads(threads):
        tokens = dense_argmax(weights, states.states, Counter(report, f"{stage}: dense head"))
    ranks = probe_ranks(tensors, states.states, tokens, alphas, Counter(report, f"{stage}: index"))
    return tokens, ranks


def _summary(found: Found) -> dict[str, Any]:
    return {
        "top1_agreement": found.overall,
        "top1_agreement_worst_source": found.worst,
        "worst_source": found.worst_source,
    }


def _probes_per_group(options: IndexOptions, weights: Tensor) -> int:
    return -(-options.probes(len(weights)) // options.num_groups)

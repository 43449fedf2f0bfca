"""Load the heads of one group and learn what does not depend on the batch size."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flashhead_dist.bench.agreement import Agreement, best_tokens, top1_agreement
from flashhead_dist.bench.assemble import HeadFacts
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.memory import Peak, PeakMemory
from flashhead_dist.bench.plan import Inputs, Plan
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import build_head, needs_index
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_kernels.dispatch import ops_for


def load_heads(
    plan: Plan, inputs: Inputs, place: TensorParallel, control: Control, one_state: Tensor
) -> tuple[dict[str, Head], dict[str, Peak]]:
    """Build the plan's heads on this rank, and measure what each needs to load and to run once.

    Each head gets weights of its own, although some could share: else the first of them would show
    the peak of all, and heads that share weights would find them in the cache.

    Raises:
        UserError: on every rank of the group, if a head cannot be built on one.
    """
    _start_kernels(plan, one_state)
    heads: dict[str, Head] = {}
    peaks: dict[str, Peak] = {}
    for name in plan.heads:
        with control.phase():
            memory = PeakMemory(place.device)
            # faiss trains while it is built, and only once for a shard: no part of any timing.
            with compute_threads(plan.num_cores // place.tp_size):
                heads[name] = build_head(
                    name,
                    tp=place,
                    model=inputs.model,
                    index_dir=inputs.index_dir,
                    dtype=plan.dtype,
                    # For faiss_ivf the word means lists; its default reads as many bytes.
                    num_probes=plan.num_probes if needs_index(name) else None,
                    alpha=plan.alpha,
                    device=place.device,
                    escalation=plan.escalation,
                )
        with control.phase():
            heads[name].forward(one_state)
            peaks[name] = memory.read()
    return heads, peaks


def _start_kernels(plan: Plan, one_state: Tensor) -> None:
    """Let this process load what compiled code needs, some 100 MB that are no head's own."""
    rows = one_state.new_zeros((64, one_state.shape[1]), dtype=plan.dtype)
    ops_for(one_state.device).dense_candidates(one_state, rows, 0)


def gather_facts(
    heads: Mapping[str, Head],
    peaks: Mapping[str, Peak],
    inputs: Inputs,
    control: Control,
    states: Tensor,
) -> dict[str, HeadFacts]:
    """Weights and peaks of every rank, and the agreement of each head on `states [N, D]`."""
    weights = control.gather({name: head.weight_bytes for name, head in heads.items()})
    all_peaks = control.gather({n: [peak.peak_bytes, peak.reason] for n, peak in peaks.items()})
    facts: dict[str, HeadFacts] = {}
    for name, head in heads.items():
        agreement: Agreement | None = None
        if inputs.dense_ids is not None:
            agreement = top1_agreement(
                best_tokens(head, states), inputs.dense_ids, inputs.source_ids, inputs.sources
            )
        reasons = [rank[name][1] for rank in all_peaks if rank[name][0] is None]
        facts[name] = HeadFacts(
            name=name,
            tp_size=head.tp.tp_size,
            weight_bytes_by_rank=tuple(rank[name] for rank in weights),
            peak_bytes_by_rank=tuple(rank[name][0] for rank in all_peaks),
            peak_reason=reasons[0] if reasons else None,
            agreement=agreement,
        )
    return facts

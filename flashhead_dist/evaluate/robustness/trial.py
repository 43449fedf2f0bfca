"""Build the index of a made-up head, and say how faithful, how balanced and how equal it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from flashhead_dist.evaluate.fidelity import evaluate_fidelity
from flashhead_dist.evaluate.robustness.made_heads import HeadSpec, make_head
from flashhead_dist.evaluate.robustness.made_states import made_states
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.base import Want
from flashhead_dist.heads.emulated import EmulatedHead
from flashhead_dist.heads.registry import emulate_head
from flashhead_dist.index import IndexOptions, ensure_index, load_manifest, load_shard

_COMPARED_STATES = 256
_ROWS = 64


@dataclass(frozen=True)
class Trial:
    """What one made-up head gave.

    top1_logit: share of states whose best logit is the dense head's, so that a token with an equal
    row will do; top1_token: the same token as well (ties go to the smallest id). By source, and
    `worst_*`. tokens_a_cluster: fewest and most in a cluster that holds any, pads left out.
    bytes_share: of the dense head's in bf16. work_max_over_mean: by tp_size, bytes that the busiest
    rank reads over the mean. equal_tp_sizes: those whose ids and logits are tp 1's, bit for bit.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_states: int
    top1_logit: float
    top1_token: float
    worst_source: str
    worst_top1_logit: float
    top1_logit_by_source: dict[str, float]
    top1_token_by_source: dict[str, float]
    bytes_share: float
    num_clusters: int
    num_groups: int
    tokens_a_cluster: tuple[int, int]
    num_pads: int
    work_max_over_mean: dict[int, float]
    equal_tp_sizes: list[int]
    build_seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict of every field."""
        return asdict(self)


def try_head(
    spec: HeadSpec,
    *,
    options: IndexOptions | None = None,
    num_states: int = 500,
    tp_sizes: range = range(1, 9),
    progress: bool = True,
) -> Trial:
    """Make the head, build its index (kept in the cache) and evaluate it.

    num_states: test states a source.

    Raises:
        UserError: options that do not fit, or a cache that cannot be written.
    """
    head = make_head(spec)
    model = head.model
    calibration, test = made_states(head, count=num_states)
    index = ensure_index(
        model, options, device="cpu", states=lambda: (calibration, test), progress=progress
    )
    one = emulate_head("flashhead", tp_size=1, model=model, index_dir=index)
    truth = dense_truth(model, test.states, progress=progress)
    fidelity = evaluate_fidelity(one, test, truth, progress=progress)
    answers = torch.cat([
        one.serve(part, Want()).logits[:, 0] for part in torch.split(test.states, _ROWS)
    ])  # fmt: skip
    same = (answers == truth.logits[:, 0]).double()
    by_source = {
        source: float(same[test.source_ids == number].mean())
        for number, source in enumerate(test.sources)
        if bool((test.source_ids == number).any())
    }
    worst = min(by_source, key=lambda source: by_source[source])
    manifest = load_manifest(index)
    shard = load_shard(index)
    held = shard.num_tokens[shard.num_tokens > 0]
    some = test.states[:: max(1, len(test) // _COMPARED_STATES)]
    expected = _serve(one, some)
    work, equal = {}, []
    for tp_size in tp_sizes:
        ranks = emulate_head("flashhead", tp_size=tp_size, model=model, index_dir=index)
        read = [rank.read_bytes_per_row for rank in ranks.ranks]
        work[tp_size] = max(read) * len(read) / sum(read)
        if all(map(torch.equal, _serve(ranks, some), expected)):
            equal.append(tp_size)
    return Trial(
        name=spec.name,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        num_states=len(test),
        top1_logit=float(same.mean()),
        top1_token=fidelity.top1_agreement,
        worst_source=worst,
        worst_top1_logit=by_source[worst],
        top1_logit_by_source=by_source,
        top1_token_by_source=fidelity.top1_agreement_by_source,
        bytes_share=fidelity.bytes_share,
        num_clusters=manifest.num_clusters,
        num_groups=manifest.num_groups,
        tokens_a_cluster=(int(held.min()), int(held.max())),
        num_pads=int((shard.token_ids < 0).sum()),
        work_max_over_mean=work,
        equal_tp_sizes=equal,
        build_seconds=manifest.build_seconds,
    )


def _serve(head: EmulatedHead, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and logits float32 `[N, 10]`."""
    parts = [head.serve(part, Want(k=10)) for part in torch.split(states, _ROWS)]
    return torch.cat([p.token_ids for p in parts]), torch.cat([p.logits for p in parts])

"""From which margin on a retrieval step is to be believed: calibrated on hidden states.

A row's margin is the logit of its best candidate less the greatest probing score of a cluster that
was not probed (`heads.flashhead_escalate`). The threshold is chosen by how many rows a second round
may be paid for, as a quantile of the margins of calibration states drawn evenly from all sources:
it needs no state whose token was missed. Such states are few, and those of the calibration part
are fewer than a text's, since their tokens were pinned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.index.calibrate import Advance
from flashhead_dist.index.manifest import IndexManifest, change_manifest, load_manifest
from flashhead_dist.index.shrinkage import spread_over_sources
from flashhead_dist.states import HiddenStates
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.shard import IndexShard, Query

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of rows that escalate, for which a margin is kept."""
USUAL_SHARE = 0.02
_NUM_STATES = 4096
_BATCH = 64


def margins(
    tensors: IndexShard,
    hidden_states: Tensor,
    alpha: float,
    probes_per_group: int,
    advance: Advance = lambda share: None,
) -> Tensor:
    """Margins float32 `[N]` of `hidden_states [N, D]`, in logits; inf where nothing is unprobed."""
    device = tensors.rows.device
    query = Query(probes_per_group, alpha, need_unprobed=True)
    ops, found = ops_for(device), []
    for part in torch.split(hidden_states, _BATCH):
        candidates = ops.candidates(part.to(device), tensors, query)
        both = torch.stack([candidates.keys[:, 0], candidates.unprobed], dim=1)
        logits = ops.unpack_keys(both)[0]
        found.append((logits[:, 0] - logits[:, 1]).cpu())
        advance(len(part) / len(hidden_states))
    return torch.cat(found) if found else torch.empty(0)


def write_escalation(
    path: Path, *, margin: float, second_probes: int | None, share: float
) -> IndexManifest:
    """Make a threshold the one that flashhead_escalate takes from the index in folder `path`.

    second_probes: clusters of the second round, None for every token. share: of rows that are
    expected to take it. Returns the manifest as it is then.

    Raises:
        HeadIndexError: no index there, or a manifest that cannot be written.
    """
    manifest = load_manifest(path)
    chosen = {"margin": margin, "second_probes": second_probes, "share": share}
    kept = {**manifest.calibration.get("escalation", {}), "chosen": chosen}
    return change_manifest(path, calibration={**manifest.calibration, "escalation": kept})


def calibrate_escalation(
    tensors: IndexShard,
    states: HiddenStates,
    alpha: float,
    probes_per_group: int,
    advance: Advance = lambda share: None,
) -> dict[str, Any]:
    """Evidence for the manifest: the margin below which each of SHARES of the states lies."""
    chosen = spread_over_sources(states, _NUM_STATES)
    found = margins(tensors, states.states[chosen], alpha, probes_per_group, advance)
    finite = found[torch.isfinite(found)].double()
    by_share = []
    if len(finite):
        quantiles = torch.quantile(finite, torch.tensor(SHARES, dtype=torch.float64)).tolist()
        by_share = [
            {"share": share, "margin": round(margin, 4)}
            for share, margin in zip(SHARES, quantiles, strict=True)
        ]
    return {
        "num_states": len(found),
        "num_probes": probes_per_group * len(tensors.token_ids),
        "margin_by_share": by_share,
    }

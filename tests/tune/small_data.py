"""Small data for tuning, whose states are calibration and selection at once."""

from __future__ import annotations

import torch
from torch import Tensor

from flashhead_dist.index import IndexOptions
from flashhead_dist.index.cluster import cluster_space, cluster_tokens, second_moment
from flashhead_dist.tune.simulate import StateRange, TuningData


def make_data(weights: Tensor, states: Tensor, options: IndexOptions) -> TuningData:
    """The data of `weights [V, D]` and `states [N, D]`, clustered as `options` say."""
    moment = second_moment(states)
    part = StateRange(slice(0, len(states)), torch.zeros(len(states), dtype=torch.int64), ("all",))
    return TuningData(
        weights=weights,
        slots=cluster_tokens(weights, options, moment=moment)[0],
        vectors=cluster_space(weights, moment, options.metric_exponent),
        moment=moment,
        num_groups=options.num_groups,
        states=states,
        top_tokens=(states.float() @ weights.float().T).topk(10, dim=1).indices,
        calibration=part,
        selection=part,
        held_out=None,
    )

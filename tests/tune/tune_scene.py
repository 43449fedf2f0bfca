"""A small scene of tuning, whose states are calibration and selection at once."""

from __future__ import annotations

import torch
from torch import Tensor

from flashhead_dist.index import IndexOptions
from flashhead_dist.index.cluster import cluster_tokens
from flashhead_dist.index.metric import cluster_space, second_moment
from flashhead_dist.tune.scene import Part, Scene


def make_scene(weights: Tensor, states: Tensor, options: IndexOptions) -> Scene:
    """The scene of `weights [V, D]` and `states [N, D]`, clustered as `options` say."""
    moment = second_moment(states)
    part = Part(slice(0, len(states)), torch.zeros(len(states), dtype=torch.int64), ("all",))
    return Scene(
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

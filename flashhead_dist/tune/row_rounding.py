"""Whether candidate rows in int8 still lead to the dense argmax.

Each group scores its two best candidates by int8 rows again by their own rows. A token is lost
where two others of its group look better in int8. Only the dense head's best tokens can: the others
are further away than rounding reaches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashhead_dist.tune.points import RESCORED, ROW_GROUP
from flashhead_dist.tune.scene import Scene
from flashhead_kernels.quantize import quantize_centroids, quantize_hidden_states

_CHUNK_STATES = 4096


def int8_logits(scene: Scene) -> Tensor:
    """Logits float32 `[N, t]` of the dense head's best tokens with rows rounded to int8.

    A scale for each ROW_GROUP columns, states rounded alike: as centroids of 8 bits are scored.
    """
    hidden_size = scene.weights.shape[1]
    group_size = ROW_GROUP if hidden_size % ROW_GROUP == 0 else hidden_size
    logits = torch.empty(scene.top_tokens.shape)
    for part in torch.split(torch.arange(len(logits)), _CHUNK_STATES):
        rows = scene.weights[scene.top_tokens[part]]
        rounded = quantize_centroids(rows, 8, group_size).dequantize()
        integers, scales = quantize_hidden_states(scene.states[part], group_size)
        hidden = integers * scales.repeat_interleave(group_size, dim=1)
        logits[part] = (rounded @ hidden.unsqueeze(2)).squeeze(2)
    return logits


def survives(logits: Tensor, groups: Tensor) -> Tensor:
    """Whether the first token is among the RESCORED best of its group: bool `[N]`.

    logits: `[N, t]`. groups: int64 `[N, t]`, -1 for a pinned token, which is scored by its own row.
    """
    rivals = (groups == groups[:, :1]) & (logits > logits[:, :1])
    return (groups[:, 0] < 0) | (rivals.sum(1) < RESCORED)

"""The head's operations on CUDA: Triton kernels, and torch for what no step of decoding needs.

Functions have the names and signatures of `reference`. Under TRITON_INTERPRET=1 they run on CPU
tensors. A kernel that does not compile raises Triton's error: nothing falls back in silence.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flashhead_kernels import reference, triton_rows
from flashhead_kernels.candidates import Candidates, check_candidate_arguments
from flashhead_kernels.logits import PLAIN, FinalLogits, OutputBias
from flashhead_kernels.quantize import QuantizedCentroids
from flashhead_kernels.triton_dense_launch import launch_dense
from flashhead_kernels.triton_launch import HeadInputs, launch_head
from flashhead_kernels.triton_shapes import MAX_BEST

all_finite = reference.all_finite
centroid_dots = triton_rows.centroid_dots
score_centroids = triton_rows.score_centroids
select_probes = reference.select_probes
score_rows = triton_rows.score_rows
probed_candidates = triton_rows.probed_candidates
best_keys = reference.best_keys
unpack_keys = reference.unpack_keys


def flashhead_candidates(
    hidden_states: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    centroids: QuantizedCentroids,
    spread: Tensor,
    alpha: float,
    num_probes_per_group: int,
    pinned_rows: Tensor,
    pinned_token_ids: Tensor,
    *,
    k: int = 1,
    need_logsumexp: bool = False,
    need_unprobed: bool = False,
    bias: OutputBias | None = None,
    final: FinalLogits = PLAIN,
    launches: int | None = None,
    between: Callable[[], object] | None = None,
) -> Candidates:
    """See `reference.flashhead_candidates`.

    launches: 1 or 2; where None, whichever was measured to be faster (`launch_choice`), or 2 where
    something is to be called between them.

    Raises:
        ValueError: as the reference does; one launch for a shape that it cannot serve.
    """
    groups, clusters, _, size = rows.shape
    check_candidate_arguments(hidden_states, size, num_probes_per_group, clusters, k)
    batch = hidden_states.shape[0]
    if k > MAX_BEST or batch == 0 or groups == 0:
        return reference.flashhead_candidates(
            hidden_states, rows, token_ids, centroids, spread, alpha, num_probes_per_group,
            pinned_rows, pinned_token_ids, k=k, need_logsumexp=need_logsumexp,
            need_unprobed=need_unprobed, bias=bias, final=final, between=between,
        )  # fmt: skip
    inputs = HeadInputs(
        hidden_states.contiguous(), rows, token_ids, centroids, spread, pinned_rows,
        pinned_token_ids, alpha, num_probes_per_group, bias, final,
    )  # fmt: skip
    return launch_head(inputs, k, need_logsumexp, need_unprobed, launches, between)


def dense_candidates(
    hidden_states: Tensor,
    rows: Tensor,
    first_token_id: int,
    *,
    k: int = 1,
    need_logsumexp: bool = False,
    token_ids: Tensor | None = None,
    bias: Tensor | None = None,
    final: FinalLogits = PLAIN,
) -> Candidates:
    """See `reference.dense_candidates`."""
    check_candidate_arguments(hidden_states, rows.shape[1], 1, 1, k)
    if k > MAX_BEST or hidden_states.shape[0] == 0 or rows.shape[0] == 0:
        return reference.dense_candidates(
            hidden_states, rows, first_token_id, k=k, need_logsumexp=need_logsumexp,
            token_ids=token_ids, bias=bias, final=final,
        )  # fmt: skip
    return launch_dense(
        hidden_states.contiguous(), rows, first_token_id, k, need_logsumexp, token_ids, bias, final
    )

"""Compiles the kernels of sampling ahead of time, and prints what each takes as JSON.

For compute capability 9.0, at the shapes of the default index of two models.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.append(str(Path(__file__).parents[2] / "kernels"))

import torch

import resources
from flashhead_kernels import triton_rows, triton_sampling
from flashhead_kernels.cuda_sampling import scores_shape
from flashhead_kernels.triton_shapes import power_of_two

CAPABILITY = 90
_POINTERS = {
    "cluster_ids_ptr": "*i32", "logits_ptr": "*fp32", "scores_ptr": "*fp32", "out_ids_ptr": "*i32",
    "means_ptr": "*fp32", "num_tokens_ptr": "*i64", "scored_ptr": "*fp32", "mass_ptr": "*fp32",
    "values_ptr": "*fp32", "sums_ptr": "*fp32", "numbers_ptr": "*i64", "positions_ptr": "*i64",
    "sequences_ptr": "*i64", "noise_ptr": "*fp32", "row_of_draw_ptr": "*i64", "keys_ptr": "*i64",
    "candidate_ids_ptr": "*i32", "log_mass_ptr": "*fp32", "group_log_mass_ptr": "*fp32",
    "group_ids_ptr": "*i64",
}  # fmt: skip


def every_kernel(
    model: str, hidden: torch.dtype
) -> Iterator[tuple[Any, dict[str, Any], dict[str, str]]]:
    """Each kernel with its constants and the types of its pointers."""
    vocab_size, size = resources.MODELS[model]
    greedy, _ = resources.head_shapes(vocab_size, size)
    head = scores_shape(greedy.clusters, greedy.tokens, size, greedy.probes * 3 // 2, 1)
    clusters = {"M": head.clusters, "M_PAD": head.clusters_pad}
    states = {"D": size, "D_PAD": head.hidden_pad}
    columns = {"D": size, "BLOCK_D": head.block_columns}
    tokens = {"S": head.tokens, "S_PAD": head.tokens_pad}
    width = head.probes * head.tokens + head.pinned
    types = _POINTERS | {"hidden_ptr": "*fp32" if hidden == torch.float32 else "*bf16"}
    for block in (1, triton_rows.ROWS_A_BLOCK // head.tokens_pad):
        yield triton_rows.score_rows_kernel, tokens | columns | {"BLOCK": block}, types
    blocks = triton_rows.logits_blocks(hidden, torch.bfloat16, size)
    yield triton_rows.logits_kernel, blocks, types
    yield triton_rows.scores_of_centroids_kernel, clusters | states, types
    yield triton_sampling.scores_kernel, {"HEAD": head, "BLOCK_PINNED": 1}, types
    for softcap in (False, True):
        cap = {"SOFTCAP": softcap}
        yield triton_sampling.log_mass_kernel, clusters | states | cap, types
        block = {"WIDTH": width, "BLOCK": power_of_two(width)}
        drawn = clusters | tokens | columns | block | cap | {"SEQUENCES": True}
        yield triton_sampling.draw_groups_kernel, drawn, types
    for values in (width, head.clusters):
        block = {"WIDTH": values, "BLOCK": power_of_two(values)}
        yield triton_sampling.log_sum_kernel, block, types
    noise = {"SEQUENCES": True, "BLOCK": 1024}
    yield triton_sampling.noise_kernel, noise | {"DOMAIN": 2}, types
    yield triton_sampling.draw_candidates_kernel, noise, types


def main() -> None:
    """Print a list of `resources.Resources`."""
    warnings.filterwarnings("ignore", module="triton.*")
    found = []
    for model in ("Gemma-3-270M", "Llama-3.1-8B"):
        for hidden in (torch.bfloat16, torch.float32):
            for kernel, constants, types in every_kernel(model, hidden):
                resources._POINTERS.update(types)
                resources._FLOATS = (*resources._FLOATS, "shrinkage")
                what = f"{model}, states {hidden}"
                made = resources.compile_kernel(
                    kernel, constants, what, triton_rows.WARPS, CAPABILITY
                )
                found.append(asdict(made))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

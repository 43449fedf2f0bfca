"""What the dense head says of hidden states: the truth that every head is measured against.

Logits are those of `flashhead_kernels` (float32 accumulation over rows in the model's dtype), so a
head that scores the same row has the same logit to the last bit, and ties go to the smaller id.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.models.cache import cached_tensors
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.keys import EMPTY_KEY, unpack_keys

TOP = 10
_MARGIN = 6
"""Tokens kept beyond TOP before exact scoring: a GEMM may order near-ties otherwise."""
_ROWS = 8192
_STATES = 1024


@dataclass(frozen=True)
class DenseTruth:
    """token_ids int64 `[N, t]` and logits float32 `[N, t]`, the t = min(10, V) best tokens, best
    first; logsumexp float32 `[N]` over the vocabulary.
    """

    token_ids: Tensor
    logits: Tensor
    logsumexp: Tensor

    def subset(self, selection: Tensor) -> DenseTruth:
        """The truth of the states that `selection` (mask or indices) picks."""
        return DenseTruth(
            self.token_ids[selection], self.logits[selection], self.logsumexp[selection]
        )


def dense_truth(
    model: ModelSource, states: Tensor, *, cache_dir: Path | None = None, progress: bool = True
) -> DenseTruth:
    """The truth for `states [N, D]`, kept on disk by weights, dtype and states."""
    content = states.detach().cpu().contiguous()
    digest = hashlib.sha256(str((content.dtype, tuple(content.shape))).encode())
    digest.update(content.view(torch.uint8).numpy().data)
    dtype = str(model.dtype).removeprefix("torch.")
    name = f"{model.weight_hash[:16]}_{dtype}_{digest.hexdigest()[:16]}.safetensors"
    path = cache_root(cache_dir) / "truth" / name
    return DenseTruth(**cached_tensors(path, lambda: vars(_compute(model, content, progress))))


def _compute(model: ModelSource, states: Tensor, progress: bool) -> DenseTruth:
    """A pass over the vocabulary in chunks: GEMM, then exact scores of each chunk's best."""
    count, vocab_size = states.shape[0], model.vocab_size
    hidden = states.float()
    kept = min(TOP, vocab_size)
    keys = torch.full((count, kept), EMPTY_KEY)
    logsumexp = torch.full((count,), float("-inf"), dtype=torch.float64)
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task("dense head", total=vocab_size * count)
        for start in range(0, vocab_size, _ROWS):
            stop = min(start + _ROWS, vocab_size)
            rows = model.read_rows(start, stop)
            for first in range(0, count, _STATES):
                part = slice(first, first + _STATES)
                logits = hidden[part] @ rows.float().T
                logsumexp[part] = torch.logaddexp(logsumexp[part], logits.logsumexp(1).double())
                best = logits.topk(min(kept + _MARGIN, stop - start), dim=1).indices
                found = ops_for("cpu").probed_candidates(
                    hidden[part],
                    rows.unsqueeze(1),
                    torch.arange(start, stop, dtype=torch.int32).unsqueeze(1),
                    best.to(torch.int32),
                    k=kept,
                )
                keys[part] = torch.cat([keys[part], found], dim=1).topk(kept, dim=1).values
                bar.advance(task, logits.numel())
    logits, token_ids = unpack_keys(keys)
    return DenseTruth(token_ids, logits, logsumexp.float())

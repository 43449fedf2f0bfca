"""A tied input embedding without a second copy of it: tokens are looked up in the head's rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flashhead_dist.heads.base import Head
from flashhead_dist.parallel import TensorParallel


class HeadEmbedding(nn.Module):
    """Vocabulary-parallel input embedding over a head's rows (Megatron-LM, arXiv 1909.08053,
    section 3: each rank looks up the tokens it holds, and the ranks' rows are summed).
    """

    def __init__(self, head: Head, tp: TensorParallel, scale: float | Tensor | None) -> None:
        """tp: the head's ranks; what the lookups send is accounted here and not with the head.

        scale: what Gemma multiplies its input embedding by.
        """
        super().__init__()
        self._head = head
        self._tp = tp
        self._scale = scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """Rows `[..., D]` of `token_ids` int64 `[...]`, in the dtype of the head's rows."""
        rows = self._tp.run(self._head.embedding_steps(token_ids))
        if self._scale is None:
            return rows
        scale = self._scale.to(rows) if isinstance(self._scale, Tensor) else self._scale
        return rows * scale


def share_embedding(model: Any, head: Head, tp: TensorParallel) -> bool:
    """Let a transformers model look tokens up in `head`, where its embeddings are tied.

    The model's own embedding is let go of. Returns whether this was done: not for an untied model,
    nor for a head that holds no rows.
    """
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    tied = output is not None and getattr(output, "weight", None) is embedding.weight
    if not tied or not head.holds_rows:
        return False
    scale = getattr(embedding, "embed_scale", None)
    model.set_input_embeddings(HeadEmbedding(head, tp, scale))
    return True

"""One copy of the weights where a model's input and output embeddings are tied."""

from __future__ import annotations

from torch import Tensor, nn


class SharedEmbedding(nn.Module):
    """A model's own input embedding, reading the rows of an index through a map of token ids.

    The wrapped module does what it always did with a row (Gemma scales it); its weight is in the
    order of the index and therefore not to be found on this module.
    """

    def __init__(self, embedding: nn.Embedding, rows: Tensor, row_of_token: Tensor) -> None:
        """rows: `[r, D]`, not copied; row_of_token: int32 `[V]`."""
        super().__init__()
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedding.num_embeddings = len(rows)
        # It only stops gradients, and its row is no longer where it was.
        self.padding_idx = embedding.padding_idx
        embedding.padding_idx = None
        self.embedding = embedding
        self.embedding_dim = embedding.embedding_dim
        self.num_embeddings = len(row_of_token)
        self.register_buffer("row_of_token", row_of_token, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[..., D]` of int64 `[...]`; IndexError for an id outside the vocabulary."""
        table: Tensor = self.row_of_token  # type: ignore[assignment]
        rows = table.index_select(0, input_ids.reshape(-1).to(table.device))
        found: Tensor = self.embedding(rows.view(input_ids.shape))
        return found

    def unwrap(self, weight: Tensor) -> nn.Embedding:
        """The wrapped module with `weight [V, D]` in token order."""
        embedding = self.embedding
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        embedding.num_embeddings = len(weight)
        embedding.padding_idx = self.padding_idx
        return embedding

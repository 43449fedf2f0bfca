"""The output embedding in the order of an index: one table for the head and the tied input.

Both layers are vLLM's own with another method for their weights, so that a rank holds the rows of
its probing groups, and no others. The checkpoint's rows are compared with the index's as they are
loaded: an index of other weights is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.vllm.engine import Engine, engine_of

if TYPE_CHECKING:
    from flashhead_dist.index import LoadedShard

_ROWS_AT_ONCE = 1 << 14


class IndexOrder(UnquantizedEmbeddingMethod):
    """Weights `[R, D]` that are the rows of an index shard, pinned ones last; pads are zero."""

    supports_pre_processed_weights = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.checked = False

    def take_over(self, layer: nn.Module) -> None:
        """Put the index's rows in the place of the layer's own weight.

        Raises:
            UserError: a layer of another kind.
        """
        method: Any = layer.quant_method
        if not isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
            raise UserError(
                f"the output head of {self.engine.model_name} is quantized "
                f"({type(method).__name__}): FlashHead replaces one in bfloat16, float16 or "
                "float32; start without the flashhead option"
            )
        if getattr(layer, "bias", None) is not None:
            raise UserError(
                f"the output head of {self.engine.model_name} has a bias, which an index does not "
                "hold: start without the flashhead option"
            )
        weight: Any = layer.weight
        shard = self.engine.load(weight.device, weight.dtype).shard
        assert shard.table is not None
        rows, token_ids = shard.table
        table: Any = nn.Parameter(rows, requires_grad=False)
        table.input_dim, table.output_dim = 1, 0
        table.weight_loader = self.load
        layer.quant_method = self
        layer.weight = table
        self.token_ids = token_ids

    def load(self, param: Tensor, loaded_weight: Tensor) -> None:
        """Compare the checkpoint's `loaded_weight [V, D]` with the index's rows `param [R, D]`.

        Raises:
            UserError: they differ.
        """
        manifest = self.engine.manifest
        same = loaded_weight.shape == (manifest.vocab_size, manifest.hidden_size)
        for first in range(0, len(param), _ROWS_AT_ONCE):
            ids = self.token_ids[first : first + _ROWS_AT_ONCE].long()
            real = ids >= 0
            rows = param[first : first + _ROWS_AT_ONCE][real]
            same = same and torch.equal(
                loaded_weight[ids[real].to(loaded_weight.device)].to(rows), rows
            )
        if not same:
            raise UserError(
                f"{self.engine.options.index} was built for other weights "
                f"({manifest.model_name}) than those of {self.engine.model_name}: build an index "
                "for this model with launch/build_index.py"
            )
        self.checked = True

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raises UserError unless weights were loaded, and found to be the index's."""
        if not self.checked:
            raise UserError(
                f"the weights of {self.engine.model_name} were not loaded from a checkpoint by "
                "name, so that the index could not be checked against them: use vLLM's usual "
                "--load-format, or start without the flashhead option"
            )


class IndexOrderEmbedding(VocabParallelEmbedding):
    """The input embedding of a model that ties it to its output head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine = _engine(self)
        if engine is None or not engine.tied:
            self.__class__ = VocabParallelEmbedding  # vLLM's own, as if nothing were installed
            return
        IndexOrder(engine).take_over(self)
        row_of_token = _rows_of_tokens(engine.index)
        self.register_buffer("row_of_token", row_of_token, persistent=False)

    def forward(self, input_: Tensor) -> Tensor:
        """`[..., D]` of token ids `[...]`."""
        table: Tensor = self.row_of_token
        rows = table[input_.long()].long()
        found: Tensor = torch.nn.functional.embedding(rows.clamp(min=0), self.weight)
        if self.tp_size == 1:
            return found
        found = found.masked_fill((rows < 0).unsqueeze(-1), 0)
        return tensor_model_parallel_all_reduce(found) if self.reduce_results else found


class IndexOrderLMHead(ParallelLMHead):
    """The output head of a model that has one of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine = _engine(self)
        if engine is None:
            self.__class__ = ParallelLMHead
        elif not engine.tied:
            IndexOrder(engine).take_over(self)

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> ParallelLMHead:
        """Share the input embedding's table, and its method: vLLM's own would pack a copy of it."""
        head: ParallelLMHead = super().tie_weights(embed_tokens)
        if isinstance(embed_tokens.quant_method, IndexOrder):
            head.quant_method = embed_tokens.quant_method
        return head


def _engine(layer: VocabParallelEmbedding) -> Engine | None:
    """The engine whose index is of this layer's shape, where FlashHead is on."""
    engine = engine_of(get_current_vllm_config())
    if engine is None:
        return None
    manifest = engine.manifest
    shape = (layer.num_embeddings, layer.org_vocab_size, layer.embedding_dim)
    fits = shape == (manifest.vocab_size, manifest.vocab_size, manifest.hidden_size)
    return engine if fits else None


def _rows_of_tokens(index: LoadedShard | None) -> Tensor:
    """int32 `[V]`: the row of each token in this rank's table, -1 where another rank has it."""
    assert index is not None
    packed = index.token_map.packed
    own = packed % index.tp_size == index.tp_rank
    return torch.where(own, packed // index.tp_size, -1)

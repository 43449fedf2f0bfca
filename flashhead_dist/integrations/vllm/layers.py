"""vLLM's layers over an index: the output embedding in the index's order, and the logits.

The embedding layers are vLLM's own with another method for their weights, so that a rank holds the
rows of its probing groups, and no others: one table for the head and the tied input. The
checkpoint's rows are compared with the index's as they are loaded; an index of other weights is
refused.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.vllm.engine import Engine, engine_of
from flashhead_dist.integrations.vllm.metrics import HeadCounters

if TYPE_CHECKING:
    from flashhead_dist.integrations.vllm.head import RowsHead

_ROWS_AT_ONCE = 1 << 14
_OFF = "start without the flashhead option"


class IndexOrder(UnquantizedEmbeddingMethod):
    """Weights `[R, D]` that are the rows of an index shard, pinned ones last; pads are zero."""

    supports_pre_processed_weights = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.checked = False

    def take_over(self, layer: nn.Module) -> None:
        """Replace the layer's own weight by the index's rows.

        Raises:
            UserError: a layer of another kind.
        """
        method: Any = layer.quant_method
        if not isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
            raise UserError(
                f"the output head of {self.engine.model_name} is quantized "
                f"({type(method).__name__}): FlashHead replaces one in bfloat16, float16 or "
                f"float32; {_OFF}"
            )
        if getattr(layer, "bias", None) is not None:
            raise UserError(
                f"the output head of {self.engine.model_name} has a bias, which an index does not "
                f"hold: {_OFF}"
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
        """Raises UserError unless weights were loaded and compared with the index's."""
        if not self.checked:
            raise UserError(
                f"the weights of {self.engine.model_name} were not loaded from a checkpoint by "
                "name, so that the index could not be checked against them: use vLLM's usual "
                f"--load-format, or {_OFF}"
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
        assert engine.index is not None
        # int32 [V]: the row of each token in this rank's table, -1 where another rank has it.
        packed, tp_size = engine.index.token_map.packed, engine.index.tp_size
        rows = torch.where(packed % tp_size == engine.index.tp_rank, packed // tp_size, -1)
        self.register_buffer("row_of_token", rows, persistent=False)

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
    """The engine with FlashHead whose index has this layer's shape."""
    engine = engine_of(get_current_vllm_config())
    if engine is None:
        return None
    manifest = engine.manifest
    shape = (layer.num_embeddings, layer.org_vocab_size, layer.embedding_dim)
    fits = shape == (manifest.vocab_size, manifest.vocab_size, manifest.hidden_size)
    return engine if fits else None


class _AfterLoading(QuantizeMethodBase):
    """vLLM calls this for every layer that has a method, once all weights are loaded."""

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        """There are none."""

    def apply(self, layer: nn.Module, *_: Any, **__: Any) -> Tensor:
        """Never called: the layer has no weights to apply."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make the head ready, so that no request waits for it."""
        _ = layer.rows_head


class IndexLogits(LogitsProcessor):
    """Rows of logits from the index, or of every token where a request needs them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine = None if self.logits_as_input else engine_of(get_current_vllm_config())
        if engine is None:
            self.__class__ = LogitsProcessor  # vLLM's own, as if nothing were installed
            return
        if engine.index is None:
            raise UserError(
                f"FlashHead did not find the output head of {engine.model_name}, or it is of "
                f"another shape than the index's: {_OFF}"
            )
        if self.org_vocab_size != self.vocab_size or self.scale <= 0:
            raise UserError(
                f"FlashHead does not serve the output head of {engine.model_name} "
                f"({self.extra_repr()}): {_OFF}"
            )
        self.engine: Engine = engine
        self.counters = HeadCounters(tp_rank=engine.index.tp_rank)
        self.quant_method = _AfterLoading()

    @cached_property
    def rows_head(self) -> RowsHead:
        """The head over this rank's part of the index."""
        return self.engine.rows_head(self.head_dtype, self.soft_cap, self.scale)

    def forward(
        self,
        lm_head: nn.Module,
        hidden_states: Tensor,
        embedding_bias: Tensor | None = None,
        skip_gather: bool = False,
    ) -> Tensor | None:
        """Rows `[B, V]` of `hidden_states [B, D]`, the same on every rank."""
        self._check(lm_head, embedding_bias, skip_gather)
        head, batch, counters = self.rows_head, self.engine.batch, self.counters
        num_rows = len(hidden_states)
        tp = head.head.tp
        tp.reset()  # on CUDA it holds two events for every exchange until then
        reason = batch.dense(num_rows)
        if reason is None and not head.serves(batch.rows()):
            reason = "crossover"
        if reason is None:
            logits = head.rows(hidden_states, batch.rows())
            counters.candidates(head.num_scored(batch.rows()))
        else:
            logits = head.dense(hidden_states)
        if batch.size:
            counters.step("flashhead" if reason is None else "dense", num_rows)
            if reason is not None:
                counters.fallback(reason)
            # All exchanges are gathers, whose payload is every rank's part.
            counters.exchange(tp.payload_bytes // tp.tp_size)
        return logits

    def get_top_tokens(self, *_: Any, **__: Any) -> Tensor:
        """Raises UserError: only drafts of speculative decoding ask for it."""
        raise UserError(f"FlashHead does not serve drafts in vLLM: {_OFF}")

    get_top_k_tokens = get_top_tokens

    def _check(self, lm_head: Any, bias: Tensor | None, skip_gather: bool) -> None:
        assert self.engine.index is not None
        table = self.engine.index.shard.table
        assert table is not None
        same = lm_head.weight.data_ptr() == table[0].data_ptr()
        if bias is not None or skip_gather or not same:
            raise UserError(
                f"{self.engine.model_name} calls its output head in a way that FlashHead does not "
                f"serve: {_OFF}"
            )

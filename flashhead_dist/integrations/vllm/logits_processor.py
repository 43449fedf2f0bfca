"""The layer that makes rows of logits from hidden states, in the place of vLLM's own."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.vllm.engine import Engine, engine_of
from flashhead_dist.integrations.vllm.metrics import HeadCounters

if TYPE_CHECKING:
    from flashhead_dist.integrations.vllm.head import RowsHead


class _AfterLoading(QuantizeMethodBase):
    """vLLM calls this for every layer with a method, once all weights are there."""

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        """There are none."""

    def apply(self, layer: nn.Module, *_: Any, **__: Any) -> Tensor:
        """Never called: the layer has no weights to apply."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make the head ready, so that no request waits for it."""
        _ = layer.rows_head


class IndexLogits(LogitsProcessor):
    """Asks the index for what the batch needs, or scores every token where a request needs that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine = None if self.logits_as_input else engine_of(get_current_vllm_config())
        if engine is None:
            self.__class__ = LogitsProcessor  # vLLM's own, as if nothing were installed
            return
        if engine.index is None:
            raise UserError(
                f"FlashHead did not find the output head of {engine.model_name}, or it is of "
                f"another shape than the index's: start without the flashhead option"
            )
        if self.org_vocab_size != self.vocab_size or self.scale <= 0:
            raise UserError(
                f"FlashHead does not serve the output head of {engine.model_name} "
                f"({self.extra_repr()}): start without the flashhead option"
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
        tp.reset()  # on CUDA it keeps two events for every exchange, until it is asked or reset
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
        raise UserError("FlashHead does not serve drafts in vLLM: start without the option")

    get_top_k_tokens = get_top_tokens

    def _check(self, lm_head: Any, bias: Tensor | None, skip_gather: bool) -> None:
        assert self.engine.index is not None
        table = self.engine.index.shard.table
        assert table is not None
        same = lm_head.weight.data_ptr() == table[0].data_ptr()
        if bias is not None or skip_gather or not same:
            raise UserError(
                f"{self.engine.model_name} calls its output head in a way that FlashHead does not "
                "serve: start without the flashhead option"
            )

"""Tells the head, before each step, what every request of the batch asks of its logits.

vLLM makes one of these for each engine, of the entry point `vllm.logits_processors`, whether
FlashHead is on or not. It never touches a logit. The class has the interfaces of both of vLLM's
model runners, since each refuses to start beside an installed processor of the other's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as V2LogitsProcessor,
)

from flashhead_dist.integrations.vllm.engine import engine_of
from flashhead_dist.integrations.vllm.needs import RequestNeed, request_need


class RequestProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Keeps `Engine.batch` as vLLM's batch changes."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.engine = engine_of(vllm_config)

    def is_argmax_invariant(self) -> bool:
        """It changes no logit."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow requests that came, went, or changed rows (V1 model runner, before each step)."""
        if self.engine is None or batch_update is None:
            return
        batch = self.engine.batch
        process_dict_updates(batch.needs, batch_update, self._need)
        batch.size = batch_update.batch_size

    def _need(self, parameters: Any, _: Any, output_token_ids: list[int]) -> RequestNeed:
        assert self.engine is not None
        return request_need(parameters, output_token_ids, self.engine.num_candidates)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """It modifies no request's logits (V2 model runner)."""
        return False

    def apply(self, logits: Tensor, *_: Any) -> Tensor:
        """The logits, as they are."""
        return logits

"""The entry point `vllm.general_plugins`: vLLM calls `register` once in each of its processes.

It registers layers in the place of vLLM's own, by vLLM's out-of-tree registration. Where FlashHead
is not asked for, each turns into vLLM's own as it is made, so that nothing of this is left.
"""

from __future__ import annotations

import logging

from flashhead_dist.integrations.vllm.versions import unsupported

logger = logging.getLogger("vllm.flashhead")


def register() -> None:
    """Make FlashHead known to vLLM; calling it again changes nothing."""
    import vllm

    sentence = unsupported(vllm.__version__)
    if sentence is not None:
        _register_refusal(sentence)
        return
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    from flashhead_dist.integrations.vllm.embedding import IndexOrderEmbedding, IndexOrderLMHead
    from flashhead_dist.integrations.vllm.logits_processor import IndexLogits
    from flashhead_dist.integrations.vllm.metrics import export_counters

    export_counters()
    for layer, ours in (
        (LogitsProcessor, IndexLogits),
        (ParallelLMHead, IndexOrderLMHead),
        (VocabParallelEmbedding, IndexOrderEmbedding),
    ):
        there = op_registry_oot.get(layer.__name__)
        if there is None:
            layer.register_oot(ours)
        elif there is not ours:
            logger.warning(
                "another plugin replaces vLLM's %s (%s): FlashHead is not available",
                layer.__name__,
                there.__name__,
            )
            return


def _register_refusal(sentence: str) -> None:
    logger.warning("%s", sentence)
    try:
        from flashhead_dist.integrations.vllm.unsupported import refuse_when_asked

        refuse_when_asked(sentence)
    except Exception as error:  # whatever another version is like, it must start
        logger.warning("FlashHead cannot be refused where it is asked for: %s", error)

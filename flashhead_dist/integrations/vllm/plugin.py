"""The entry point `vllm.general_plugins`: vLLM calls `register` once in each of its processes.

It registers layers in the place of vLLM's own, by vLLM's out-of-tree registration. Where FlashHead
is off, each turns into vLLM's own layer as it is made.
"""

from __future__ import annotations

import logging
from typing import Any

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.vllm.options import options_of, unsupported_version

logger = logging.getLogger("vllm.flashhead")


def register() -> None:
    """Make FlashHead known to vLLM; calling it again changes nothing."""
    import vllm

    reason = unsupported_version(vllm.__version__)
    if reason is not None:
        logger.warning("%s", reason)
        try:
            _refuse_when_configured(reason)
        except Exception as error:  # vLLM must start, whatever its version
            logger.warning("FlashHead cannot be refused where it is configured: %s", error)
        return
    from vllm.model_executor.custom_op import op_registry_oot

    from flashhead_dist.integrations.vllm import layers
    from flashhead_dist.integrations.vllm.metrics import export_counters

    export_counters()
    for layer in (layers.IndexLogits, layers.IndexOrderLMHead, layers.IndexOrderEmbedding):
        base = layer.__base__
        registered = op_registry_oot.get(base.__name__)
        if registered is None:
            base.register_oot(layer)
        elif registered is not layer:
            logger.warning(
                "another plugin replaces vLLM's %s (%s): FlashHead is not available",
                base.__name__,
                registered.__name__,
            )
            return


def _refuse_when_configured(reason: str) -> None:
    """Register vLLM's own layer, but with a UserError where FlashHead is configured.

    Uses as little of vLLM as possible, since its version is another one.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    class Refusing(LogitsProcessor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if options_of(get_current_vllm_config()) is not None:
                raise UserError(reason)
            self.__class__ = LogitsProcessor

    LogitsProcessor.register_oot(Refusing)

"""For versions of vLLM that the plugin is not written for: refuse where FlashHead is asked for.

Rests on as little of vLLM as can be: where not even that is there, the warning of `plugin` remains.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.vllm.options import options_of


class Refusing(LogitsProcessor):
    """vLLM's own layer, unless FlashHead is asked for: then a UserError with `sentence`."""

    sentence = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if options_of(get_current_vllm_config()) is not None:
            raise UserError(self.sentence)
        self.__class__ = LogitsProcessor


def refuse_when_asked(sentence: str) -> None:
    """Register `Refusing` with this reason."""
    Refusing.sentence = sentence
    LogitsProcessor.register_oot(Refusing)

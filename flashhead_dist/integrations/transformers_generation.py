"""What `model.generate` does differently once its output head retrieves.

transformers looks its decoding loops up on the class of the model, so a subclass made for the
purpose wraps them: it opens a session for the head and appends one logits processor. Nothing of
transformers itself is changed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn, Self

from torch import Tensor
from transformers import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationMixin,
    LogitNormalization,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.transformers_head import (
    RetrievalHead,
    RowKind,
    Session,
    open_session,
    refuse_to_move,
)
from flashhead_dist.integrations.transformers_settle import SettleTokens

WORK_ON_ESTIMATES = frozenset(
    {
        ExponentialDecayLengthPenalty,
        ForcedBOSTokenLogitsProcessor,
        ForcedEOSTokenLogitsProcessor,
        LogitNormalization,
        MinLengthLogitsProcessor,
        MinNewTokensLengthLogitsProcessor,
        MinPLogitsWarper,
        NoBadWordsLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        PrefixConstrainedLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
        SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    }
)
"""Processors that forbid tokens, shift them, or cut those below a threshold: what they do to an
estimate they do again to the exact logit. Any other may read a value, and sees the closed form."""


def plan_session(
    head: RetrievalHead, processors: Sequence[Any], config: Any, *, drafts_are_weighed: bool
) -> Session:
    """Choose the rows of one decoding loop.

    processors: the loop's logits processors. config: its GenerationConfig. drafts_are_weighed:
    drafted tokens are accepted by the ratio of two probabilities, so rows are read whole.
    """
    greedy = not config.do_sample
    scores = config.return_dict_in_generate and config.output_scores
    logits = config.return_dict_in_generate and config.output_logits
    weighed = getattr(config, "assistant_ensemble_weight", None) is not None
    known = all(type(item) in WORK_ON_ESTIMATES for item in processors)
    settles = known and not drafts_are_weighed
    chooses = greedy and not processors
    if config.is_assistant:
        # A draft is verified: estimates only have to be the distribution that it drew from.
        kind = RowKind.ESTIMATED
    elif scores or weighed or not (settles or (chooses and not logits)):
        kind = RowKind.CLOSED_FORM
    elif logits:
        kind = RowKind.CLOSED_FORM_BESIDE
    else:
        kind = RowKind.CHOICE if chooses else RowKind.ESTIMATED
    temperature = 1.0
    # Where logits are kept and tokens taken from the same rows, these are before any temperature.
    if not (greedy or (logits and kind is RowKind.CLOSED_FORM)):
        warpers = [item for item in processors if isinstance(item, TemperatureLogitsWarper)]
        temperature = math.prod(warper.temperature for warper in warpers)
    return Session(head, kind, temperature, greedy)


class RetrievalGeneration:
    """Mixed into a model's class by `replace_head`."""

    original_class: ClassVar[type]

    @property
    def retrieval_head(self) -> RetrievalHead:
        head: RetrievalHead = self.get_output_embeddings()  # type: ignore[attr-defined]
        return head

    @functools.wraps(GenerationMixin._sample)
    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        session = plan_session(
            self.retrieval_head, logits_processor, generation_config, drafts_are_weighed=False
        )
        if session.settles and not generation_config.is_assistant:
            settle = SettleTokens(session, logits_processor, one_by_one=False)
            logits_processor = LogitsProcessorList([*logits_processor, settle])
        with open_session(session):
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
            )

    @functools.wraps(GenerationMixin._assisted_decoding)
    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        drafted = generation_config.prompt_lookup_num_tokens is None
        # Without logits_to_keep a pass gives rows that no one asks for, in unknown number.
        whole_passes = not self._supports_logits_to_keep()  # type: ignore[attr-defined]
        session = plan_session(
            self.retrieval_head,
            logits_processor,
            generation_config,
            drafts_are_weighed=(drafted and generation_config.do_sample) or whole_passes,
        )
        if session.settles:
            settle = SettleTokens(session, logits_processor, one_by_one=True)
            logits_processor = LogitsProcessorList([*logits_processor, settle])
        with open_session(session):
            return super()._assisted_decoding(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
            )

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: an index is stored by itself, and a tied embedding is in cluster order now."""
        raise UserError(
            "a model with a retrieval head cannot be saved: put its own head back with "
            "restore_head(model) first"
        )

    def resize_token_embeddings(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: an index is made for one vocabulary."""
        raise UserError(
            "the vocabulary of a model with a retrieval head cannot be resized: put its own head "
            "back with restore_head(model), resize, and build another index"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        refuse_to_move(self.retrieval_head, fn)
        return super()._apply(fn, recurse)  # type: ignore[misc, no-any-return]


@functools.cache
def retrieval_class(model_class: type) -> type:
    """`model_class` with `RetrievalGeneration` mixed in, under its own name."""
    members = {
        "__module__": model_class.__module__,
        "__doc__": model_class.__doc__,
        "original_class": model_class,
    }
    return type(model_class.__name__, (RetrievalGeneration, model_class), members)

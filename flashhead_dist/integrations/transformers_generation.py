"""What `model.generate` does differently once its output head retrieves.

transformers looks its decoding loops up on the class of the model, so a subclass made for the
purpose wraps them: it opens a session for the head and appends one logits processor. Nothing of
transformers itself is changed.

The processor, `SettleTokens`, comes last. Where the others would take a token whose logit is only
its cluster's estimate, the cluster is opened, its rows are scored exactly, and the other processors
run again on the better row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
)
from transformers.generation import logits_process

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.transformers_head import (
    RetrievalHead,
    RowKind,
    Session,
    held_rows,
    open_session,
    refuse_to_move,
)
from flashhead_dist.integrations.transformers_rows import RowParts

_NEVER = float("-inf")

WORK_ON_ESTIMATES = frozenset(
    getattr(logits_process, name)
    for name in (
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
    )
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

    def __call__(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own forward pass, with the head's rows as its logits."""
        head = self.retrieval_head
        if head.contract.after_head.is_plain:
            if labels is not None:
                kwargs["labels"] = labels
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with held_rows() as held:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        (rows,) = held
        loss = None
        if labels is not None:
            loss = self.loss_function(  # type: ignore[attr-defined]
                logits=rows, labels=labels, vocab_size=head.out_features
            )
        if isinstance(output, tuple):
            return (*(() if loss is None else (loss,)), rows, *output[1:])
        output.logits, output.loss = rows, loss
        return output

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


class SettleTokens(LogitsProcessor):
    """Leaves scores whose argmax, or whose draw, is a token that was scored exactly.

    Greedy: the clusters of estimates that lead are opened until a scored token leads.
    Sampling: one draw decides between the scored tokens together and each unprobed cluster; only
    the winner's tokens are left to the draw that follows. A cluster thus wins with its estimated
    mass, and a token within it by its exact logit.
    Either way, where the processors leave few tokens (no more than were scored), all of these are
    scored first.
    """

    def __init__(self, session: Session, processors: Sequence[Any], *, one_by_one: bool) -> None:
        """one_by_one: the rows of a forward pass come singly and in order, as in assisted decoding;
        otherwise one call takes the last position of every sequence."""
        self._session = session
        self._processors: Any = LogitsProcessorList(processors)
        self._one_by_one = one_by_one

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: float32 `[B, V]`, processed; without rows waiting for them, given back."""
        found = self._session.found
        if found is None:
            return scores
        work = _Settling(self._session, found, self._take(len(scores), found), scores)
        if self._session.kind is RowKind.CLOSED_FORM_BESIDE:
            scores = self._again(work, input_ids)
        scores = self._score_few(work, input_ids, scores)
        if self._session.greedy:
            return self._settle_greedy(work, input_ids, scores)
        return self._settle_drawn(work, input_ids, scores)

    def _take(self, count: int, found: RowParts) -> Tensor:
        """Numbers int64 `[B]` of the rows that are settled now."""
        session, total = self._session, len(found.hidden_states)
        if self._one_by_one:
            rows = torch.tensor([session.next_row])
            session.next_row += 1
            if session.next_row == total:
                session.found = None
            return rows
        session.found = None
        length = total // count
        return torch.arange(length - 1, total, length)

    def _again(self, work: _Settling, input_ids: Tensor) -> Tensor:
        scores: Tensor = self._processors(input_ids, work.raw.clone())
        return scores

    def _score_few(self, work: _Settling, input_ids: Tensor, scores: Tensor) -> Tensor:
        left = torch.isfinite(scores) & ~work.scored
        counts = left.sum(1)
        few = (counts > 0) & (counts <= work.found.token_ids.shape[1])
        if not bool(few.any()):
            return scores
        rows, token_ids = (left & few.unsqueeze(1)).nonzero().unbind(1)
        work.open(rows, token_ids)
        return self._again(work, input_ids)

    def _settle_greedy(self, work: _Settling, input_ids: Tensor, scores: Tensor) -> Tensor:
        while True:
            best = scores.argmax(1, keepdim=True)
            missed = ~work.scored.gather(1, best) & torch.isfinite(scores.gather(1, best))
            if not bool(missed.any()):
                return scores
            rows = missed[:, 0].nonzero()[:, 0]
            work.open(rows, best[rows, 0])
            scores = self._again(work, input_ids)

    def _settle_drawn(self, work: _Settling, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = torch.multinomial(scores.softmax(-1), 1)
        missed = ~work.scored.gather(1, drawn)[:, 0]
        settled = scores.masked_fill(~work.scored, _NEVER)
        if not bool(missed.any()):
            return settled
        rows = missed.nonzero()[:, 0]
        token_ids = work.open(rows, drawn[rows, 0])  # [q, S]
        again = self._again(work, input_ids)
        inside = torch.zeros_like(work.scored[rows]).scatter_(1, token_ids, True)
        values = again[rows].masked_fill(~inside, _NEVER)
        # A threshold may pass the estimate and cut every exact logit: it had its say.
        cut = ~torch.isfinite(values).any(1, keepdim=True)
        kept = inside & torch.isfinite(scores[rows])
        plain = work.raw[rows] / self._session.temperature
        settled[rows] = torch.where(cut & kept, plain, values)
        return settled


class _Settling:
    """Rows `[B, V]` on their way: values before the processors, and which of them are exact."""

    def __init__(self, session: Session, found: RowParts, rows: Tensor, scores: Tensor) -> None:
        assert session.rows is not None
        self.found = found
        self._session = session
        self._rows = rows
        self.raw = session.rows[rows].to(scores.device)
        token_ids = found.token_ids[rows]
        scored = token_ids.new_zeros((len(rows), self.raw.shape[1] + 1), dtype=torch.bool)
        self.scored = scored.scatter_(1, token_ids, True)[:, :-1].to(scores.device)

    def open(self, rows: Tensor, token_ids: Tensor) -> Tensor:
        """Score the cluster of `token_ids [q]` in `rows [q]`; returns its tokens int64 `[q, S]`.

        A cluster's pads stand as its own best token.
        """
        head = self._session.head.logit_rows
        clusters = head.cluster_of_token[token_ids.to(head.cluster_of_token.device)]
        places = self._rows[rows.cpu()].to(clusters.device)
        tokens, logits = head.open_clusters(
            self.found, places, clusters, exact=self._session.greedy
        )
        pads, best = tokens == head.vocab_size, logits.argmax(1, keepdim=True)
        tokens = torch.where(pads, tokens.gather(1, best), tokens).to(self.raw.device)
        logits = torch.where(pads, logits.gather(1, best), logits).to(self.raw.device)
        self.raw[rows.unsqueeze(1), tokens] = logits
        self.scored[rows.unsqueeze(1), tokens] = True
        return tokens

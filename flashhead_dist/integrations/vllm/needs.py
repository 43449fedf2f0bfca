"""What a request needs of its row of logits, from its sampling parameters."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

GREEDY_BELOW = 1e-5
"""vLLM's `_SAMPLING_EPS`: a lower temperature takes the best token."""

REASONS = (
    "prompt_logprobs",
    "allowed_token_ids",
    "structured_outputs",
    "logit_bias",
    "logprobs",
    "top_k",
    "raised_penalties",
    "thinking_budget",
    "crossover",
    "unknown_rows",
)
"""Why a batch took the dense path; the first of a batch's reasons, in the order of its rows."""


class Rest(Enum):
    """What stands in a row for the tokens that were not scored."""

    NOTHING = "nothing"
    """-inf: only the best of the candidates are asked for."""
    EVEN = "even"
    """Their mass, the same for each of them: the least that any may have, for a greedy row whose
    log probabilities are asked for."""
    CLUSTERS = "clusters"
    """Each cluster's mass, the same for each of its tokens: for draws."""


@dataclass(frozen=True)
class RowNeed:
    """best_only: nothing but the greatest logit is read. temperature: at which the mass of tokens
    that were not scored is to be right. dense: the reason why every logit is needed, or None.
    """

    rest: Rest
    best_only: bool = False
    temperature: float = 1.0
    dense: str | None = None


@dataclass(frozen=True)
class RequestNeed:
    """A request's row, and the list of its output tokens, which vLLM lets grow."""

    row: RowNeed
    prompt_logprobs: bool
    output_token_ids: list[int]

    @property
    def dense(self) -> str | None:
        """Why this step needs every logit; prompt tokens are all scored before the first output."""
        if self.prompt_logprobs and not self.output_token_ids:
            return "prompt_logprobs"
        return self.row.dense


def request_need(parameters: Any, output_token_ids: list[int], num_candidates: int) -> RequestNeed:
    """What a request with these `SamplingParams` of vLLM needs.

    num_candidates: how many tokens of a row are scored exactly.
    """
    return RequestNeed(
        _row_need(parameters, num_candidates),
        parameters.prompt_logprobs is not None,
        output_token_ids,
    )


def _row_need(parameters: Any, num_candidates: int) -> RowNeed:
    reason = _needs_all(parameters, num_candidates)
    logprobs = parameters.logprobs is not None
    if parameters.temperature >= GREEDY_BELOW:
        return RowNeed(Rest.CLUSTERS, temperature=float(parameters.temperature), dense=reason)
    if logprobs:
        return RowNeed(Rest.EVEN, dense=reason)
    return RowNeed(Rest.NOTHING, best_only=not _changes_order(parameters), dense=reason)


def _needs_all(parameters: Any, num_candidates: int) -> str | None:
    """The first reason for which a token that was not scored could matter by its exact logit."""
    if parameters.allowed_token_ids:
        return "allowed_token_ids"
    if parameters.structured_outputs is not None:
        return "structured_outputs"
    if any(bias > 0 for bias in (parameters.logit_bias or {}).values()):
        return "logit_bias"
    asked = parameters.logprobs
    if parameters.logprob_token_ids or (asked is not None and not 0 <= asked <= num_candidates):
        return "logprobs"
    if parameters.top_k > num_candidates and parameters.temperature >= GREEDY_BELOW:
        return "top_k"
    if (
        parameters.presence_penalty < 0
        or parameters.frequency_penalty < 0
        or parameters.repetition_penalty < 1
    ):
        return "raised_penalties"
    if parameters.thinking_token_budget is not None:
        return "thinking_budget"
    return None


def _changes_order(parameters: Any) -> bool:
    """Whether something lowers logits before the greatest is taken."""
    return bool(
        parameters.presence_penalty
        or parameters.frequency_penalty
        or parameters.repetition_penalty != 1
        or parameters.logit_bias
        or parameters.bad_words
        or parameters.min_tokens
    )

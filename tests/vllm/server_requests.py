"""Requests that each need one sampling parameter to be heard, and what they are without it.

Every case is asked of a dense server and of one with FlashHead, under the same seed. The second
request of a case, without the parameter, must have another answer: else nobody would notice that
the parameter was ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PROMPT = "The most important thing about tides is"
COUNTING = "One, two, three, four, five, one, two, three, four, five, one, two,"
GREEDY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0}
DRAWN: dict[str, Any] = GREEDY | {"temperature": 0.7, "seed": 11}
LONGER: dict[str, Any] = GREEDY | {"max_tokens": 48}
COUNTED: dict[str, Any] = GREEDY | {"prompt": COUNTING}


@dataclass(frozen=True)
class Case:
    """A request, and the same without the parameter.

    reason: why it needs the dense path, or None.
    """

    request: dict[str, Any]
    without: dict[str, Any]
    reason: str | None = None


CASES = {
    "temperature": Case(DRAWN, GREEDY | {"seed": 11}),
    "seed": Case(DRAWN | {"seed": 12}, DRAWN),
    "top_k": Case(DRAWN | {"temperature": 1.5, "top_k": 3}, DRAWN | {"temperature": 1.5}),
    "top_p": Case(DRAWN | {"temperature": 1.2, "top_p": 0.3}, DRAWN | {"temperature": 1.2}),
    "min_p": Case(DRAWN | {"temperature": 1.2, "min_p": 0.3}, DRAWN | {"temperature": 1.2}),
    "presence_penalty": Case(LONGER | {"presence_penalty": 2.0}, LONGER),
    "frequency_penalty": Case(COUNTED | {"frequency_penalty": 2.0}, COUNTED),
    "repetition_penalty": Case(COUNTED | {"repetition_penalty": 2.0}, COUNTED),
    "stop": Case(COUNTED | {"stop": ["five"]}, COUNTED),
    "n": Case(DRAWN | {"n": 2}, DRAWN),
    "min_tokens": Case(COUNTED | {"min_tokens": 8, "stop": ["five"]}, COUNTED | {"stop": ["five"]}),
    "bad_words": Case(COUNTED | {"bad_words": ["three", " three"]}, COUNTED),
    "allowed_token_ids": Case(
        GREEDY | {"allowed_token_ids": [506, 529, 1437]}, GREEDY, "allowed_token_ids"
    ),
    "structured_outputs": Case(
        GREEDY | {"structured_outputs": {"choice": ["salt", "sand"]}}, GREEDY, "structured_outputs"
    ),
    "positive logit_bias": Case(GREEDY | {"logit_bias": {"1437": 50.0}}, GREEDY, "logit_bias"),
    "presence_penalty below 0": Case(
        COUNTED | {"presence_penalty": -2.0, "temperature": 1.5, "seed": 3},
        COUNTED | {"temperature": 1.5, "seed": 3},
        "raised_penalties",
    ),
}


def texts(answer: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Text and end of every choice."""
    return [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]

"""Prompts decoded by several variants in turn, and the texts of such a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from flashhead_dist.decode.engine import DENSE, Engine, Variant
from flashhead_dist.decode.loop import DecodeTimes
from flashhead_dist.decode.prompts import check_lengths
from flashhead_dist.decode.sequences import CheckCounts, DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.integrations.pipeline_bubble import StageTimes
from flashhead_profiles.ranges import CAPTURE, annotate

INTERRUPTED_NAME = Path("generate-interrupted.jsonl")
"""The file for texts of an interrupted run if none was named."""
_WARMUP_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to decode. prompts: token ids; batch_size: prompts in one batch or micro-batch;
    in_flight: micro-batches at once, with pipeline stages."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    batch_size: int = 1
    in_flight: int = 1
    stop_token_ids: frozenset[int] = frozenset()
    pad_token_id: int = 0

    def check(self, vocab_size: int, context_length: int | None) -> None:
        """Raise UserError for a prompt that is empty, or that does not fit the model."""
        check_lengths(self.prompts, self.max_new_tokens, context_length)
        for number, prompt in enumerate(self.prompts, start=1):
            if max(prompt) >= vocab_size:
                raise UserError(
                    f"prompt {number} holds token {max(prompt)}, beyond the head's {vocab_size}"
                )


@dataclass
class Measured:
    """The texts and times of one variant so far.

    tokens: of each prompt, in order. ttft_s, tpot_s: of each batch; a batch of one token has no
    TPOT. run_s: all runs, one after another; head_s, check_s: parts of them. stages: of every
    run, by pipeline stage.
    """

    variant: Variant
    tokens: list[list[int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    run_s: float = 0.0
    head_s: float = 0.0
    check_s: float = 0.0
    counts: CheckCounts = field(default_factory=CheckCounts)
    stages: list[list[StageTimes]] = field(default_factory=list)

    def add(self, state: DecodeState, times: DecodeTimes) -> None:
        """Add the texts, times and counts of a decoded state."""
        for row in range(state.batch_size):
            self.tokens.append(state.tokens(row))
            self.reasons.append(str(state.finish_reason(row)))
        self.ttft_s.append(times.first_token_s)
        if state.num_steps > 1:
            self.tpot_s.append(times.per_output_token_s(state.num_steps))
        self.head_s += times.head_s
        self.check_s += times.check_s
        for name, count in vars(state.counts).items():
            setattr(self.counts, name, getattr(self.counts, name) + count)

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts so far."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.num_tokens / self.run_s


def middle(values: Sequence[float]) -> float:
    """The median; NaN of an empty sequence."""
    return median(values) if values else float("nan")


def p90(values: Sequence[float]) -> float:
    """The 90th percentile, interpolated; NaN of an empty sequence."""
    if len(values) < 2:
        return middle(values)
    return quantiles(values, n=10, method="inclusive")[-1]


def identical_share(tokens: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]) -> float:
    """Share of the truth's tokens that `tokens` has at the same place of the same text."""
    total = sum(map(len, truth))
    pairs = zip(tokens, truth, strict=True)
    same = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
    return same / total if total else float("nan")


def warm_up(engine: Engine, variants: Sequence[Variant], request: Request) -> None:
    """Decode a few tokens with each variant, unmeasured, so that kernels are compiled."""
    first = list(request.prompts[: request.batch_size])
    count = min(_WARMUP_TOKENS, request.max_new_tokens)
    for variant in variants:
        states = [
            DecodeState(first, max_new_tokens=count, check_every=min(variant.check_every, 2))
            for _ in range(min(2, request.in_flight))
        ]
        engine.decode(variant, states)


def compare(
    engine: Engine,
    measured: Sequence[Measured],
    request: Request,
    *,
    on_states: Callable[[Variant, list[DecodeState], int], Callable[[int], None] | None],
) -> Iterator[None]:
    """Decode all prompts with every variant, pausing after each batch; their order rotates.

    measured: one for each variant, filled in. on_states: called with the states about to be decoded
        and the number of their first prompt; its result is called with the number of a state that
        may have released tokens.
    """
    span = request.batch_size * request.in_flight
    for turn, start in enumerate(range(0, len(request.prompts), span)):
        stop = min(start + span, len(request.prompts))
        for place in range(len(measured)):
            entry = measured[(place + turn) % len(measured)]
            states = [
                DecodeState(
                    request.prompts[first : min(first + request.batch_size, stop)],
                    max_new_tokens=request.max_new_tokens,
                    stop_token_ids=request.stop_token_ids,
                    pad_token_id=request.pad_token_id,
                    first_sequence=first,
                    check_every=entry.variant.check_every,
                )
                for first in range(start, stop, request.batch_size)
            ]
            on_step = on_states(entry.variant, states, start)
            with annotate(CAPTURE, engine.layout.tp_size):
                times, stages = engine.decode(entry.variant, states, on_step)
            for state, of_state in zip(states, times, strict=True):
                entry.add(state, of_state)
            totals = [of_state.total_s for of_state in times]
            # Stages have all micro-batches in flight at once; their totals have a common start.
            entry.run_s += max(totals) if stages else sum(totals)
            if stages:
                entry.stages.append(stages)
            yield


def against_dense(measured: Sequence[Measured]) -> Measured | None:
    """The unchecked dense variant, where it is among them."""
    return next((item for item in measured if item.variant == Variant(DENSE)), None)


class TextLog:
    """Finished texts and states in progress, on every rank, so that any survivor can save them."""

    def __init__(self, tokenizer: Any, path: Path | None) -> None:
        """path: a .jsonl file for finished texts, if any.

        Raises:
            UserError: the file cannot be written.
        """
        self._tokenizer, self._path = tokenizer, path
        self._finished: list[dict[str, Any]] = []
        self._label = ""
        self._first = 0
        self._states: Sequence[DecodeState] = ()
        if path is not None:
            try:
                path.write_text("", encoding="utf-8")
            except OSError as error:
                raise UserError(f"{path} cannot be written ({error.strerror}): name another") from (
                    error
                )

    def begin(self, variant: Variant, states: Sequence[DecodeState], first_prompt: int) -> None:
        """These states are about to be decoded."""
        self.end()
        self._label, self._states, self._first = variant.label, states, first_prompt

    def end(self) -> None:
        """Add the texts of the states in progress; writes them where a file is named."""
        lines = self._in_progress()
        self._states = ()
        self._finished += lines
        if self._path is not None and lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_json_lines(lines))

    def _in_progress(self) -> list[dict[str, Any]]:
        rows = [(state, row) for state in self._states for row in range(state.batch_size)]
        return [
            {
                "head": self._label,
                "prompt": number,
                "text": self._tokenizer.decode(state.tokens(row), skip_special_tokens=True),
                "finish_reason": None if (end := state.finish_reason(row)) is None else end.value,
            }
            for number, (state, row) in enumerate(rows, start=self._first)
        ]

    def save_interrupted(self) -> str:
        """Save everything so far; returns a sentence that says where."""
        lines = [line for line in [*self._finished, *self._in_progress()] if line["text"]]
        if not lines:
            return " No text was produced yet."
        path = self._path or INTERRUPTED_NAME
        try:
            path.write_text(_json_lines(lines), encoding="utf-8")
        except OSError as error:
            return f" The text so far could not be saved in {path} ({error.strerror})."
        return f" The text so far is in {path}."


def _json_lines(lines: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

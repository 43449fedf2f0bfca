"""Text on standard output while it is decoded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashhead_dist.decode.sequences import DecodeState


def stream_text(
    tokenizer: Any, prompts: Sequence[str], states: Sequence[DecodeState], first_prompt: int
) -> Callable[[int], None]:
    """What to call with the number of a state that may have released tokens.

    A single sequence is written as it comes, with transformers' streamer, which holds back what may
    still change (half a word, half a character). Of several each is written when it has ended.
    """
    number_of_prompts = len(prompts)
    first_of = [first_prompt]
    for state in states:
        first_of.append(first_of[-1] + state.batch_size)
    alone = len(states) == 1 and states[0].batch_size == 1
    ended: set[int] = set()

    def heading(number: int) -> None:
        if number_of_prompts > 1:
            start = " ".join(prompts[number].split())[:60]
            sys.stdout.write(f"\n=== prompt {number + 1}: {start}\n")

    if alone:
        from transformers import TextStreamer

        heading(first_prompt)
        streamer: Any = TextStreamer(tokenizer, skip_special_tokens=True)

        def write(number: int) -> None:
            state = states[number]
            for token in state.released(0):
                streamer.put(torch.tensor([token]))
            if state.done:
                streamer.end()

        return write

    def write_ended(number: int) -> None:
        state = states[number]
        for row in range(state.batch_size):
            prompt = first_of[number] + row
            if prompt in ended or (state.finish_reason(row) is None and not state.done):
                continue
            if state.unconfirmed and not state.done:
                continue
            ended.add(prompt)
            heading(prompt)
            sys.stdout.write(tokenizer.decode(state.tokens(row), skip_special_tokens=True) + "\n")
            sys.stdout.flush()

    return write_ended

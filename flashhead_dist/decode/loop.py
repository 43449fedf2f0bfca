"""The token loop: a body, a head that chooses, and in lossless mode a dense head that confirms."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashhead_dist.decode.body import Body
from flashhead_dist.decode.sequences import DecodeState
from flashhead_profiles.ranges import BODY, CONFIRM, STEP, annotate

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(hidden_states [B, D], positions int64 [B], sequences int64 [B]) -> token ids int64 [B]`."""


@dataclass
class DecodeTimes:
    """Seconds of one decoded batch, by this rank's clock.

    first_token_s: from the start to the first chosen token (TTFT). step_s: from one chosen token to
    the next, checks and rollbacks left out. head_s: inside the head, part of the others. check_s:
    in dense passes of lossless mode. total_s: all of it.
    """

    first_token_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    head_s: float = 0.0
    check_s: float = 0.0
    total_s: float = 0.0

    def per_output_token_s(self, num_tokens: int) -> float:
        """TPOT of a sequence of `num_tokens`: the time after its first token, a token.

        NaN for a single token. Checks and tokens taken back are part of it.
        """
        if num_tokens < 2:
            return float("nan")
        return (self.total_s - self.first_token_s) / (num_tokens - 1)


@torch.inference_mode()
def decode(
    body: Body,
    state: DecodeState,
    choose: Choose,
    *,
    confirm: Choose | None = None,
    on_step: Callable[[], None] | None = None,
) -> DecodeTimes:
    """Decode until `state.done`; all ranks of a group call it alike.

    confirm: chooses as `choose` should have; needed where `state.check_every` is set.
    on_step: called when tokens may have been released.
    """
    times = DecodeTimes()
    start_s = time.perf_counter()
    pending: list[Tensor] = []
    token_ids, mask = state.prompt_ids()
    with annotate(BODY, token_ids.numel()):
        hidden = body.prefill(token_ids, mask if state.is_padded else None)
    last_s = start_s
    while True:
        with annotate(STEP, state.num_steps):
            head_start_s = time.perf_counter()
            chosen = choose(hidden, state.positions, state.sequences).cpu()
            now_s = time.perf_counter()
            times.head_s += now_s - head_start_s
            if state.num_steps == 0:
                times.first_token_s = now_s - start_s
            else:
                times.step_s.append(now_s - last_s)
            state.advance(chosen)
            if state.check_every:
                pending.append(hidden)
                if state.check_due:
                    body.rollback(state.settle(confirm_unsettled(state, pending, confirm)))
                    pending = []
                    times.check_s += time.perf_counter() - now_s
            if on_step is not None:
                on_step()
            if state.done:
                break
            last_s = time.perf_counter()
            with annotate(BODY, state.batch_size):
                seen = state.attention_mask() if state.is_padded else None
                hidden = body.step(state.next_tokens(), seen)
    times.total_s = time.perf_counter() - start_s
    return times


def confirm_unsettled(
    state: DecodeState, hidden: Sequence[Tensor], confirm: Choose | None
) -> Tensor:
    """What `confirm` chooses from the n unconfirmed steps' states `[B, D]`: int64 `[n, B]`."""
    if confirm is None:
        raise ValueError("lossless mode needs a head that confirms")
    count = len(hidden)
    with annotate(CONFIRM, count):
        dense = confirm(
            torch.cat(list(hidden)),
            state.unsettled_positions.flatten(),
            state.sequences.repeat(count),
        )
        return dense.cpu().view(count, state.batch_size)

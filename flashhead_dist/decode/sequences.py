"""The bookkeeping of a batch of sequences while they are decoded: no model, no tensors on a device.

Every rank keeps the same `DecodeState` by giving it the same chosen tokens, so that all of them
feed the same tokens, stop at the same step and take back the same number of tokens.

Lossless mode (`check_every` above 0): tokens are *unconfirmed* until a dense pass has chosen them
too, and only confirmed tokens are released. Where a row's dense token differs, every row is taken
back to that step: their later tokens come again from the same states, so nothing is lost but time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from flashhead_dist.errors import UserError


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass
class CheckCounts:
    """Lossless mode's account, in tokens of sequences that were still running.

    confirmed: tokens of the cheap head that the dense head chose too; corrected: tokens put in
    their place; discarded: tokens drawn after a difference and taken back.
    """

    checks: int = 0
    rollbacks: int = 0
    confirmed: int = 0
    corrected: int = 0
    discarded: int = 0


class DecodeState:
    """B sequences decoded in lock step, left-padded to one length."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
        pad_token_id: int = 0,
        first_sequence: int = 0,
        check_every: int = 0,
    ) -> None:
        """prompts: token ids, at least one each; first_sequence: number of the first prompt, which
        keys the noise of sampling; check_every: N of lossless mode, 0 for none.

        Raises:
            UserError: no prompt, an empty one, max_new_tokens below 1, check_every below 0.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt is empty: give each at least one token, such as <bos>")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if check_every < 0:
            raise UserError(f"the check interval must be 0 (none) or more, got {check_every}")
        self.prompts = [list(prompt) for prompt in prompts]
        self.max_new_tokens = max_new_tokens
        self.stop_token_ids = stop_token_ids
        self.pad_token_id = pad_token_id
        self.check_every = check_every
        self.counts = CheckCounts()
        numbers = range(first_sequence, first_sequence + len(prompts))
        self.sequences = torch.tensor(list(numbers), dtype=torch.int64)
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
        self._steps: list[list[int]] = []
        self._num_confirmed = 0
        self._running_before: list[list[bool]] = [[True] * len(prompts)]
        """Which sequences ran before each step, and before the step to come."""
        self._num_released = [0] * len(prompts)

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.prompts)

    @property
    def num_steps(self) -> int:
        """Steps decoded so far, unconfirmed ones included."""
        return len(self._steps)

    @property
    def is_padded(self) -> bool:
        """Whether prompts differ in length, so that attention needs a mask."""
        return bool((self._lengths != self._lengths[0]).any())

    @property
    def width(self) -> int:
        """L, the longest prompt's length."""
        return int(self._lengths.max())

    def prompt_ids(self) -> tuple[Tensor, Tensor]:
        """Prompts int64 `[B, L]`, padded on the left, and their attention mask int64 `[B, L]`."""
        ids = torch.full((self.batch_size, self.width), self.pad_token_id, dtype=torch.int64)
        for row, prompt in enumerate(self.prompts):
            ids[row, self.width - len(prompt) :] = torch.tensor(prompt)
        return ids, self._mask(self.width)

    def attention_mask(self) -> Tensor:
        """Mask int64 `[B, L + num_steps]` for feeding `next_tokens`: 0 at padding alone."""
        return self._mask(self.width + self.num_steps)

    def _mask(self, width: int) -> Tensor:
        padding = (self.width - self._lengths).unsqueeze(1)
        return (torch.arange(width) >= padding).to(torch.int64)

    def next_tokens(self) -> Tensor:
        """The tokens int64 `[B]` to feed next; padding for sequences that have ended."""
        return torch.tensor(self._steps[-1], dtype=torch.int64)

    @property
    def positions(self) -> Tensor:
        """For the token to be drawn, int64 `[B]`: how many precede it in its own text."""
        return self._lengths + self.num_steps

    @property
    def unsettled_positions(self) -> Tensor:
        """The same for each unconfirmed token, int64 `[n, B]`."""
        steps = torch.arange(self._num_confirmed, self.num_steps)
        return self._lengths + steps.unsqueeze(1)

    @property
    def unconfirmed(self) -> int:
        """n, the steps since the last that was confirmed; 0 outside lossless mode."""
        return self.num_steps - self._num_confirmed if self.check_every else 0

    @property
    def _all_drawn(self) -> bool:
        return self.num_steps == self.max_new_tokens or not any(self._running_before[-1])

    @property
    def check_due(self) -> bool:
        """Whether `settle` must be called before the next `advance`."""
        return self.unconfirmed > 0 and (self.unconfirmed >= self.check_every or self._all_drawn)

    @property
    def done(self) -> bool:
        """Whether every sequence has ended, and all of it is confirmed."""
        return self._all_drawn and self.unconfirmed == 0

    def advance(self, chosen: Tensor) -> None:
        """Take the tokens int64 `[B]` of one step; those of ended sequences are ignored."""
        if self._all_drawn or self.check_due:
            raise RuntimeError(
                "advance was called where a check is due or every sequence has ended"
            )
        self._append(chosen.tolist())

    def _append(self, chosen: list[int]) -> None:
        running = self._running_before[-1]
        step = [
            token if runs else self.pad_token_id
            for token, runs in zip(chosen, running, strict=True)
        ]
        self._steps.append(step)
        self._running_before.append(
            [r and token not in self.stop_token_ids for token, r in zip(step, running, strict=True)]
        )

    def stop(self, row: int) -> None:
        """End sequence `row` here, as a stop token would; its tokens stay as they are.

        Does nothing while tokens are unconfirmed, since they may yet be taken back.
        """
        if not self.unconfirmed:
            self._running_before[-1][row] = False

    def settle(self, dense: Tensor) -> int:
        """Compare the unconfirmed steps with what the dense head chose, int64 `[n, B]`.

        Up to the first step at which a running sequence's token differs, all are confirmed; that
        step takes the dense tokens and what came after it is taken back.

        Returns:
            How many of the tokens last fed must be cropped from the KV cache.
        """
        first, count = self._num_confirmed, self.unconfirmed
        if dense.shape != (count, self.batch_size):
            raise ValueError(f"dense tokens {tuple(dense.shape)} are not {count, self.batch_size}")
        self.counts.checks += 1
        for i, chosen in enumerate(dense.tolist()):
            running, step = self._running_before[first + i], self._steps[first + i]
            differ = [r and a != b for r, a, b in zip(running, step, chosen, strict=True)]
            self.counts.confirmed += sum(running) - sum(differ)
            if any(differ):
                self.counts.rollbacks += 1
                self.counts.corrected += sum(differ)
                self.counts.discarded += sum(map(sum, self._running_before[first + i + 1 : -1]))
                del self._steps[first + i :], self._running_before[first + i + 1 :]
                self._append(chosen)
                self._num_confirmed = self.num_steps
                return count - 1 - i
        self._num_confirmed = self.num_steps
        return 0

    def tokens(self, row: int) -> list[int]:
        """What sequence `row` has produced and may be shown, its stop token included."""
        stop = self._num_confirmed if self.check_every else self.num_steps
        return [self._steps[i][row] for i in range(stop) if self._running_before[i][row]]

    def released(self, row: int) -> list[int]:
        """The tokens of `tokens(row)` that no earlier call has returned."""
        tokens = self.tokens(row)[self._num_released[row] :]
        self._num_released[row] += len(tokens)
        return tokens

    def finish_reason(self, row: int) -> FinishReason | None:
        """Why sequence `row` has ended; None where it has not."""
        if not self._running_before[-1][row]:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_steps == self.max_new_tokens else None

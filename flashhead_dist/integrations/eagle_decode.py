"""Speculative decoding of one sequence with an EAGLE draft; the text is the target's own.

A round: the draft proposes a chain of tokens, one forward pass of the target reads all of them, and
the target's head chooses at each place. Up to the first place where it chooses another token the
proposals stand; its own choice comes after them. So every token is the target head's choice from
the target's state after the tokens before it, and the draft decides about time alone (Leviathan et
al., arXiv 2211.17192, for an argmax). The same holds for sampled text where the noise of a token is
keyed by its position: see `heads.sampling`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.decode.loop import Choose
from flashhead_dist.decode.recording import new_cache, record_past
from flashhead_dist.errors import UserError
from flashhead_dist.integrations.eagle import EagleDraft


@dataclass
class DraftCounts:
    """What became of proposals, and where the time went.

    accepted_at[i]: rounds in which at least i + 1 proposals stood; proposed_at[i]: rounds that had
    so many. draft_s: in the draft, of which draft_head_s in its head; target_s: in the target's
    body; verify_s: in the target's head. passes: forward passes of the target, the prompt's one
    included.
    """

    proposed_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    passes: int = 0
    draft_s: float = 0.0
    draft_head_s: float = 0.0
    target_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of the proposals that stood; NaN without any."""
        proposed = sum(self.proposed_at)
        return sum(self.accepted_at) / proposed if proposed else float("nan")

    def count(self, proposed: int, accepted: int) -> None:
        """Add a round."""
        for counts, number in ((self.proposed_at, proposed), (self.accepted_at, accepted)):
            counts.extend([0] * (number - len(counts)))
            for i in range(number):
                counts[i] += 1

    def add(self, other: DraftCounts) -> None:
        """Add those of another text."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            if isinstance(value, list):
                longest = max(len(own), len(value))
                padded = [[*some, *[0] * (longest - len(some))] for some in (own, value)]
                setattr(self, name, [a + b for a, b in zip(*padded, strict=True)])
            else:
                setattr(self, name, own + value)


class _Target:
    """The target's decoder with a KV cache that can be taken back."""

    def __init__(self, model: Any) -> None:
        self._decoder = model.get_decoder()
        self._cache = new_cache(self._decoder.config, recording=True)
        self._records = False

    def read(self, token_ids: Sequence[int]) -> Tensor:
        """States `[L, D]` of L further tokens."""
        found = self._decoder(
            input_ids=torch.tensor([list(token_ids)]), past_key_values=self._cache, use_cache=True
        )
        if not self._records:
            record_past(self._cache)
            self._records = True
        states: Tensor = found.last_hidden_state[0]
        return states

    def forget(self, count: int) -> None:
        """Take the last `count` tokens back; to be called after every read but the first."""
        self._cache.crop(-count)


class _Chain:
    """Proposes tokens one after another, with a cache of what it has been told is true."""

    def __init__(
        self, draft: EagleDraft, embed: Any, choose: Choose, sequence: Tensor, counts: DraftCounts
    ) -> None:
        self._draft, self._embed, self._choose = draft, embed, choose
        self._sequence, self._counts = sequence, counts
        self._cache = draft.new_cache()
        self._guessed = 0

    def propose(
        self, states: Tensor, token_ids: Sequence[int], position: int, count: int
    ) -> list[int]:
        """`count` tokens to follow `token_ids [n]`, chosen from the target's `states [n, D]`.

        position: of the first proposed token.
        """
        start_s = time.perf_counter()
        if self._guessed:
            self._cache.crop(-self._guessed)
        tokens = torch.tensor([list(token_ids)])
        states = states.unsqueeze(0)
        proposed: list[int] = []
        for i in range(count):
            states = self._draft(states, self._embed(tokens).to(states), self._cache)[:, -1:]
            head_s = time.perf_counter()
            tokens = (
                self._choose(states[0], torch.tensor([position + i]), self._sequence)
                .cpu()
                .view(1, 1)
            )
            self._counts.draft_head_s += time.perf_counter() - head_s
            proposed.append(int(tokens))
        self._guessed = count - 1
        self._counts.draft_s += time.perf_counter() - start_s
        return proposed


@torch.inference_mode()
def decode_with_draft(
    model: Any,
    choose: Choose,
    draft: EagleDraft,
    choose_draft: Choose,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    num_drafts: int,
    stop_token_ids: frozenset[int] = frozenset(),
    sequence: int = 0,
) -> tuple[list[int], DraftCounts]:
    """Continue `prompt` until a stop token or `max_new_tokens`; the new tokens, and the account.

    model: a transformers causal language model, of which the body is used; choose: its head.
    choose_draft: the head over the draft's states. num_drafts: proposals a round, 0 for none, which
    is plain decoding by the same loop. sequence: keys the noise of sampling.

    Raises:
        UserError: an empty prompt, a number out of range, or a state that cannot be rolled back.
    """
    if not prompt:
        raise UserError("a prompt is empty: give it at least one token, such as <bos>")
    if num_drafts < 0 or max_new_tokens < 1:
        raise UserError(
            f"{num_drafts} drafts a round and {max_new_tokens} new tokens: give 0 or more of the "
            "former and 1 or more of the latter"
        )
    counts, start_s = DraftCounts(), time.perf_counter()
    number = torch.tensor([sequence])
    target = _Target(model)
    chain = _Chain(draft, model.get_input_embeddings(), choose_draft, number, counts)

    def read(token_ids: Sequence[int]) -> Tensor:
        begin_s = time.perf_counter()
        found = target.read(token_ids)
        counts.passes += 1
        counts.target_s += time.perf_counter() - begin_s
        return found

    def decide(states: Tensor, position: int) -> list[int]:
        begin_s = time.perf_counter()
        positions = torch.arange(position, position + len(states))
        chosen: list[int] = choose(states, positions, number.repeat(len(states))).tolist()
        counts.verify_s += time.perf_counter() - begin_s
        return chosen

    states = read(prompt)
    text = decide(states[-1:], len(prompt))
    told = [*prompt[1:], *text]
    while len(text) < max_new_tokens and text[-1] not in stop_token_ids:
        place = len(prompt) + len(text)
        # The last token of a text is never a proposal: it needs no pass of the target's.
        count = min(num_drafts, max_new_tokens - len(text) - 1)
        proposed = chain.propose(states, told, place, count) if count else []
        states = read([text[-1], *proposed])
        chosen = decide(states, place)
        accepted = next((i for i in range(count) if proposed[i] != chosen[i]), count)
        counts.count(count, accepted)
        target.forget(count - accepted)
        states, told = states[: accepted + 1], chosen[: accepted + 1]
        stops = [i for i, token in enumerate(told) if token in stop_token_ids]
        text += told[: stops[0] + 1] if stops else told
    counts.total_s = time.perf_counter() - start_s
    return text, counts

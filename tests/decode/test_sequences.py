"""The bookkeeping of decoding: stops, left padding, and lossless mode's confirm and take back."""

from __future__ import annotations

import random

import pytest
import torch

from flashhead_dist.decode.sequences import DecodeState, FinishReason
from flashhead_dist.errors import UserError

VOCAB = 11


def rule(seed: int, history: list[int]) -> int:
    """A 'model': the next token is a function of a sequence's own tokens, and of nothing else."""
    return random.Random(f"{seed} {history}").randrange(VOCAB)


class Machine:
    """Feeds a DecodeState as a decoding loop would, with a cache that must stay in step with it."""

    def __init__(self, state: DecodeState, seed: int, wrong: float) -> None:
        self.state, self.seed, self.wrong = state, seed, wrong
        self.cache: list[list[int]] = []
        self.luck = random.Random(seed)
        self.released: list[list[int]] = [[] for _ in state.prompts]

    def dense(self, step: int) -> list[int]:
        """What the dense head says of the state that this step was drawn from."""
        state = self.state
        columns = [[column[row] for column in self.cache[:step]] for row in range(state.batch_size)]
        return [
            rule(self.seed, prompt + column)
            for prompt, column in zip(state.prompts, columns, strict=True)
        ]

    def run(self) -> list[list[int]]:
        state = self.state
        while True:
            chosen = self.dense(len(self.cache))
            guess = [
                self.luck.randrange(VOCAB) if self.wrong > self.luck.random() else t for t in chosen
            ]
            state.advance(torch.tensor(guess))
            if state.check_due:
                first = state.num_steps - state.unconfirmed
                dense = [self.dense(step) for step in range(first, state.num_steps)]
                crop = state.settle(torch.tensor(dense))
                assert 0 <= crop <= len(self.cache)
                del self.cache[len(self.cache) - crop :]
            for row in range(state.batch_size):
                self.released[row] += state.released(row)
            if state.done:
                return self.released
            self.cache.append(state.next_tokens().tolist())
            assert len(self.cache) == state.num_steps


def make_state(seed: int, check_every: int) -> DecodeState:
    luck = random.Random(seed)
    prompts = [[luck.randrange(VOCAB) for _ in range(luck.randint(1, 4))] for _ in range(3)]
    return DecodeState(
        prompts, max_new_tokens=17, stop_token_ids=frozenset({3}), check_every=check_every
    )


@pytest.mark.parametrize("check_every", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.6])
def test_lossless_gives_the_dense_tokens(check_every: int, wrong: float) -> None:
    for seed in range(30):
        expected = Machine(make_state(seed, 0), seed, 0.0).run()
        state = make_state(seed, check_every)
        assert Machine(state, seed, wrong).run() == expected
        assert state.counts.confirmed + state.counts.corrected == sum(map(len, expected))
        if wrong == 0:
            assert state.counts.rollbacks == state.counts.discarded == 0


def test_without_lossless_mode_the_differences_stay() -> None:
    """Or the test above could not fail."""
    texts = [Machine(make_state(seed, 0), seed, 0.6).run() for seed in range(5)]
    assert texts != [Machine(make_state(seed, 0), seed, 0.0).run() for seed in range(5)]


def test_a_token_is_released_when_it_is_confirmed_and_not_before() -> None:
    state = DecodeState([[1], [2, 2]], max_new_tokens=5, check_every=3)
    for token in (4, 5):
        state.advance(torch.tensor([token, token]))
        assert not state.check_due
        assert state.released(0) == []
    state.advance(torch.tensor([6, 6]))
    assert state.check_due
    with pytest.raises(RuntimeError, match="check is due"):
        state.advance(torch.tensor([7, 7]))
    assert state.settle(torch.tensor([[4, 4], [5, 9], [6, 6]])) == 1
    assert state.released(0) == [4, 5]
    assert state.released(1) == [4, 9]
    assert state.next_tokens().tolist() == [5, 9]
    assert vars(state.counts) == {
        "checks": 1, "rollbacks": 1, "confirmed": 3, "corrected": 1, "discarded": 2,
    }  # fmt: skip


def test_an_ended_sequence_is_padded_and_its_later_tokens_are_not_compared() -> None:
    state = DecodeState(
        [[1], [1]], max_new_tokens=9, stop_token_ids=frozenset({3}), pad_token_id=8, check_every=3
    )
    state.advance(torch.tensor([3, 4]))
    state.advance(torch.tensor([5, 5]))
    assert state.next_tokens().tolist() == [8, 5]
    state.advance(torch.tensor([5, 3]))
    assert state.check_due
    assert state.settle(torch.tensor([[3, 4], [0, 5], [0, 3]])) == 0
    assert state.done
    assert [state.tokens(row) for row in (0, 1)] == [[3], [4, 5, 3]]
    assert state.finish_reason(0) is FinishReason.STOP


def test_a_stop_that_the_dense_head_denies_does_not_end_the_sequence() -> None:
    state = DecodeState([[1]], max_new_tokens=4, stop_token_ids=frozenset({3}), check_every=8)
    state.advance(torch.tensor([3]))
    assert state.check_due
    assert not state.done
    assert state.settle(torch.tensor([[6]])) == 0
    assert not state.done
    assert state.finish_reason(0) is None
    for _ in range(3):
        state.advance(torch.tensor([7]))
    assert state.settle(torch.tensor([[7], [7], [7]])) == 0
    assert state.done
    assert state.tokens(0) == [6, 7, 7, 7]
    assert state.finish_reason(0) is FinishReason.LENGTH


def test_left_padding_and_positions() -> None:
    state = DecodeState([[5], [6, 7, 8]], max_new_tokens=4, pad_token_id=9, first_sequence=12)
    ids, mask = state.prompt_ids()
    assert ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert state.positions.tolist() == [1, 3]
    assert state.sequences.tolist() == [12, 13]
    state.advance(torch.tensor([1, 2]))
    assert state.positions.tolist() == [2, 4]
    assert state.attention_mask().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert state.is_padded


def test_what_cannot_be_decoded_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        DecodeState([[1], []], max_new_tokens=4)
    with pytest.raises(UserError, match="max_new_tokens"):
        DecodeState([[1]], max_new_tokens=0)
    with pytest.raises(UserError, match="check interval"):
        DecodeState([[1]], max_new_tokens=1, check_every=-1)


def test_a_sequence_can_be_ended_from_outside() -> None:
    state = DecodeState([[5], [6]], max_new_tokens=4)
    state.advance(torch.tensor([1, 2]))
    state.stop(0)
    assert state.finish_reason(0) is FinishReason.STOP
    state.advance(torch.tensor([3, 4]))
    assert (state.tokens(0), state.tokens(1)) == ([1], [2, 4])
    state.stop(1)
    assert state.done


def test_no_sequence_is_ended_while_tokens_may_be_taken_back() -> None:
    """Fails where it is: a check would be due in the middle of a step."""
    state = DecodeState([[5]], max_new_tokens=4, check_every=2)
    state.advance(torch.tensor([1]))
    state.stop(0)
    assert state.finish_reason(0) is None
    assert not state.check_due
    state.advance(torch.tensor([2]))
    assert state.settle(torch.tensor([[1], [2]])) == 0
    state.stop(0)
    assert state.done

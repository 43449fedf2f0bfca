"""The order of a pipeline's messages: no deadlock where messages block, and no time lost by it.

`StageLoop` runs in threads, with stages that are sums, over transports that block as NCCL may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_dist.decode.loop import decode
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.integrations.pipeline_bubble import (
    continuous_bubble,
    flushed_bubble,
    replay,
)
from flashhead_dist.integrations.pipeline_stage import StageInput, StageLoop
from tests.integrations.pipeline_transport import (
    DeadlockError,
    ThreadLinks,
    Transport,
    Wait,
    run_stages,
)

VOCAB = 13
CHECK_EVERY = 3
BLOCKING = [Wait.AT_SENDS, Wait.AT_POSTS, Wait.AT_COMPUTE]


class SumCache:
    """What a stage was fed, `[B, L]` a time; the part of transformers' cache that the loop uses."""

    layers = ()

    def __init__(self) -> None:
        self.fed = torch.empty(0)

    def activate_past_recording(self) -> None:
        pass

    def crop(self, length: int) -> None:
        if length:
            self.fed = self.fed[:, :length]


class SumStage:
    """Hidden states `[B, L, 1]`, each from all that came before it: a lost rollback shows."""

    hidden_size, dtype = 1, torch.float64

    def __init__(self, stage: int, pp_size: int) -> None:
        self.is_first, self.is_last = stage == 0, stage == pp_size - 1

    def new_cache(self, *, recording: bool) -> SumCache:
        return SumCache()

    def __call__(self, fed: StageInput) -> Tensor:
        values = fed.inputs.double() if self.is_first else fed.inputs[..., 0]
        cache = fed.cache
        before = cache.fed.shape[-1]
        cache.fed = torch.cat([cache.fed, values], 1) if before else values
        return (cache.fed.cumsum(1)[:, before:] * 5 + 3).remainder(101).unsqueeze(-1)


class SumBody:
    """All stages in one process, as `decode` wants them."""

    def __init__(self, pp_size: int) -> None:
        self._stages = [SumStage(stage, pp_size) for stage in range(pp_size)]
        self._caches = [SumCache() for _ in self._stages]

    def prefill(self, token_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        hidden = token_ids
        for stage, cache in zip(self._stages, self._caches, strict=True):
            hidden = stage(StageInput(hidden, attention_mask, cache))
        return hidden[:, -1]

    def step(self, token_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.prefill(token_ids.unsqueeze(1), attention_mask)

    def rollback(self, num_tokens: int) -> None:
        for cache in self._caches:
            cache.crop(-num_tokens)


def right(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
    return (hidden[:, 0].long() + positions) % VOCAB


def wrong(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
    chosen = right(hidden, positions, sequences)
    return torch.where((positions + sequences) % 4 == 0, (chosen + 1) % VOCAB, chosen)


def states(num_micro_batches: int, *, lossless: bool, even: bool = False) -> list[DecodeState]:
    """Micro-batches of unlike prompts and, unless even, unlike ends, by length and by stop token.

    Lengths keep the first from being the last to end.
    """
    return [
        DecodeState(
            [
                [number + row + place for place in range(1 + number)]
                for row in range(1 + number % 2)
            ],
            max_new_tokens=6 if even else 3 + 2 * number % 7,
            stop_token_ids=frozenset() if even else frozenset({2}),
            first_sequence=2 * number,
            check_every=CHECK_EVERY if lossless else 0,
        )
        for number in range(num_micro_batches)
    ]


def texts(decoded: list[DecodeState]) -> list[list[list[int]]]:
    return [[state.tokens(row) for row in range(state.batch_size)] for state in decoded]


def expected_texts(pp_size: int, num_micro_batches: int) -> list[list[list[int]]]:
    decoded = states(num_micro_batches, lossless=False)
    for state in decoded:
        decode(SumBody(pp_size), state, right)
    return texts(decoded)


class WaitingLoop(StageLoop):
    """Where the loop synchronizes, the device waits for what the transport says."""

    def _synchronize(self) -> None:
        links: Any = self._links
        if links.transport.wait is Wait.AT_COMPUTE:
            links.transport.wait_for_posted(links.stage)


class TokensWhenNeeded(WaitingLoop):
    """The order that needs sends not to block: tokens are expected only when they are taken in."""

    def _expect_tokens(self, *, until: int) -> None:
        if until == self._ready_slot:
            super()._expect_tokens(until=until)


def run_loop(
    transport: Transport,
    batches: Callable[[], list[DecodeState]],
    *,
    flushed: bool,
    loop_class: type[StageLoop] = WaitingLoop,
    duration_s: Callable[[int, int], float] = lambda stage, length: 1.0,
) -> list[tuple[StageLoop, list[DecodeState]]]:
    """Every stage's loop and what it has decoded.

    duration_s: compute of a stage that is fed that many tokens, on the virtual clocks.
    """

    def run(links: Any) -> tuple[StageLoop, list[DecodeState]]:
        stage: Any = SumStage(links.stage, links.pp_size)

        def run_stage(fed: StageInput) -> Tensor:
            transport.compute(links.stage, duration_s(links.stage, fed.inputs.shape[1]))
            hidden: Tensor = stage(fed)
            return hidden

        decoded = batches()
        lossless = decoded[0].check_every > 0
        loop = loop_class(
            stage,
            run_stage,
            links,
            torch.device("cpu"),
            choose=(wrong if lossless else right) if stage.is_last else None,
            confirm=right if stage.is_last else None,
            on_step=None,
        )
        loop.run(decoded, flushed=flushed)
        return loop, decoded

    return run_stages(transport, run)


@pytest.mark.parametrize("wait", BLOCKING)
@pytest.mark.parametrize("pp_size", [2, 3, 4])
def test_blocking_messages_do_not_deadlock(pp_size: int, wait: Wait) -> None:
    """Up to six micro-batches, both schedules, plain and lossless; the texts are one rank's."""
    for num_micro_batches in range(1, 7):
        expected = expected_texts(pp_size, num_micro_batches)
        for flushed in (False, True):
            for lossless in (False, True):
                transport = Transport(pp_size, wait)
                results = run_loop(
                    transport,
                    lambda n=num_micro_batches, ls=lossless: states(n, lossless=ls),
                    flushed=flushed,
                )
                for _, decoded in results:
                    assert texts(decoded) == expected


def test_the_micro_batches_end_unevenly_and_lossless_mode_has_work() -> None:
    """What the other test is about: ends by length and by a stop token, and tokens taken back."""
    decoded = states(6, lossless=True)
    for state in decoded:
        decode(SumBody(3), state, wrong, confirm=right)
    assert len({state.num_steps for state in decoded}) > 3
    assert any(state.num_steps < state.max_new_tokens for state in decoded)
    assert sum(state.counts.discarded for state in decoded) > 3


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize(
    ("pp_size", "num_micro_batches", "wait"),
    [
        (2, 2, Wait.AT_SENDS),
        (2, 3, Wait.AT_COMPUTE),
        (3, 4, Wait.AT_COMPUTE),
        (4, 6, Wait.AT_COMPUTE),
    ],
)
def test_tokens_expected_only_when_needed_deadlock(
    pp_size: int, num_micro_batches: int, wait: Wait, flushed: bool
) -> None:
    def batches() -> list[DecodeState]:
        return states(num_micro_batches, lossless=False)

    options: dict[str, Any] = {"flushed": flushed, "loop_class": TokensWhenNeeded}
    run_loop(Transport(pp_size, Wait.FOR_NOTHING), batches, **options)
    with pytest.raises(DeadlockError):
        run_loop(Transport(pp_size, wait), batches, **options)


@pytest.mark.parametrize("wait", [Wait.FOR_NOTHING, Wait.AT_SENDS, Wait.AT_POSTS])
@pytest.mark.parametrize("pp_size", [2, 3, 4])
def test_equal_stages_idle_no_longer_than_they_must_though_messages_block(
    pp_size: int, wait: Wait
) -> None:
    for m in range(1, 7):
        for flushed in (False, True):
            transport = Transport(pp_size, wait)
            run_loop(transport, lambda m=m: states(m, lossless=False, even=True), flushed=flushed)
            idle = 1 - 6 * m / max(transport.clock_s)
            bubble = flushed_bubble(pp_size, m) if flushed else continuous_bubble(pp_size, m, 6)
            assert idle == pytest.approx(bubble)


@pytest.mark.parametrize("flushed", [False, True])
def test_unequal_steps_overlap_as_in_a_replay_where_messages_do_not_block(flushed: bool) -> None:
    """The order makes no stage wait for what it does not need; prompts of 1 to 6 tokens."""
    transport = Transport(3, Wait.FOR_NOTHING)

    def duration_s(stage: int, length: int) -> float:
        return (1 + stage % 2) * (1 + length**2)

    results = run_loop(
        transport, lambda: states(6, lossless=False), flushed=flushed, duration_s=duration_s
    )
    order = results[0][0].times.micro_batches
    first = [order.index(number) for number in range(6)]
    compute_s = [
        [duration_s(stage, order[i] + 1 if i in first else 1) for i in range(len(order))]
        for stage in range(3)
    ]
    assert max(transport.clock_s) == replay(compute_s, order, flushed)


def test_the_clock_waits_for_the_stream_of_the_compute_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wait for the whole device would be one for every send under way."""
    waits: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            waits.append("stream")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append("device"))
    stage: Any = SumStage(0, 2)
    links: Any = ThreadLinks(Transport(2, Wait.FOR_NOTHING), 0)
    device = torch.device("cuda")
    loop = StageLoop(stage, stage, links, device, choose=None, confirm=None, on_step=None)
    loop._synchronize()
    assert waits == ["stream"]

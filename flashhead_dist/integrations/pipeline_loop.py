"""What one stage does while a pipeline decodes: its turns, in the order that all stages share.

Every stage visits the micro-batches in the same order and keeps a `DecodeState` of each. The last
stage chooses tokens and tells the others, which take them in when they next come to that
micro-batch; until then they work on others. In lossless mode the dense tokens come with those of a
step that ends in a check, and every stage rolls its own KV cache back by what `DecodeState.settle`
says.

All stages post their messages in one order, so that there is no deadlock even where a send or a
receive blocks its stage until the other side has posted too. Over NCCL that happens whenever the
host waits for the device: while memory is freed, a kernel is loaded, or DeepSpeed's communication
log is on. The order is the one of a clock that ticks once a turn. The step of a micro-batch gets a
slot c: at least one after the turn before, and p (stages) after its own step before. Stage s would
run it from time c + s on; so its hidden states leave stage s at c + s + 1, and its tokens leave the
last stage at c + p. Messages are posted by that time; at equal times tokens go before hidden
states, tokens of earlier receivers first, hidden states of later stages first. Whatever message is
the first that has not passed, both its stages come to it next, and neither is blocked by another.

Letters: B sequences of a micro-batch, L tokens fed to each, D hidden size, n unconfirmed steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.decode.loop import Choose, DecodeTimes, confirm_unsettled
from flashhead_dist.decode.recording import record_past
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.integrations.pipeline_bubble import StageTimes
from flashhead_dist.integrations.pipeline_links import Links, Posted
from flashhead_dist.integrations.pipeline_stage import PipelineStage, StageInput
from flashhead_profiles.ranges import BODY, RECEIVE, STEP, annotate

RunStage = Callable[[StageInput], Tensor]


@dataclass
class MicroBatch:
    """One micro-batch on one stage. `number` is its place among all of the run."""

    number: int
    state: DecodeState
    times: DecodeTimes = field(default_factory=DecodeTimes)
    cache: Any = None
    slot: int = 0
    """Of its latest step; unused on the last stage."""
    awaiting: bool = False
    """Fed, and its token not yet known on this stage."""
    sends: list[Posted] = field(default_factory=list)
    unconfirmed: list[Tensor] = field(default_factory=list)
    """Hidden states `[B, D]` of the n steps since the last check; on the last stage alone."""
    last_s: float = 0.0


class StageLoop:
    """The turns of one stage over one run."""

    def __init__(
        self,
        stage: PipelineStage,
        run_stage: RunStage,
        links: Links,
        device: torch.device,
        *,
        choose: Choose | None,
        confirm: Choose | None,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self._stage = stage
        self._run_stage = run_stage
        self._links = links
        self._device = device
        self._choose = choose
        self._confirm = confirm
        self._on_step = on_step
        self.times = StageTimes()
        self._start_s = 0.0
        self._next_slot = 0
        """One after the turn before."""
        self._ready_slot = 0
        """p after the latest step whose tokens have been taken in."""
        self._fed: deque[MicroBatch] = deque()
        """By slot, those whose tokens are yet to be expected."""
        self._expected: deque[Posted] = deque()
        """By slot, receives of tokens that are yet to be taken in."""

    def run(self, states: Sequence[DecodeState], *, flushed: bool) -> list[DecodeTimes]:
        """Decode all states to their end; every stage calls it with equal ones."""
        batches = [MicroBatch(number, state) for number, state in enumerate(states)]
        self._start_s = time.perf_counter()
        running = list(batches)
        while running:
            if flushed:
                for batch in running:
                    self._take_in(batch)
            for batch in running:
                self._take_in(batch)
                if not batch.state.done:
                    batch.slot = max(self._next_slot, self._ready_slot)
                    self._next_slot = batch.slot + 1
                    with annotate(STEP, batch.number):
                        self._step(batch)
            running = [batch for batch in running if not batch.state.done]
        for batch in batches:
            _wait_for(batch.sends)
        self.times.total_s = time.perf_counter() - self._start_s
        return [batch.times for batch in batches]

    def _step(self, batch: MicroBatch) -> None:
        """Feed this stage the prompts or one token a sequence, and pass the result on."""
        # They were received, or this micro-batch would not have come round again.
        _wait_for(batch.sends)
        state = batch.state
        is_prompt = batch.cache is None
        if is_prompt:
            batch.cache = self._stage.new_cache(recording=state.check_every > 0)
            batch.last_s = time.perf_counter()
        ids, mask = state.prompt_ids() if is_prompt else (state.next_tokens().unsqueeze(1), None)
        inputs = ids.to(self._device) if self._stage.is_first else self._receive_hidden(batch, ids)
        start_s = time.perf_counter()
        if state.is_padded:
            mask = state.attention_mask() if mask is None else mask
            mask = mask.to(self._device)
        else:
            mask = None
        with annotate(BODY, ids.numel()):
            hidden = self._run_stage(StageInput(inputs, mask, batch.cache))
        if is_prompt and state.check_every:
            record_past(batch.cache)
        if self._stage.is_last:
            self._finish_step(batch, hidden[:, -1])
        self._synchronize()
        self.times.compute_s.append(time.perf_counter() - start_s)
        self.times.micro_batches.append(batch.number)
        if not self._stage.is_last:
            self._expect_tokens(until=batch.slot + self._links.stage + 1)
            batch.sends = [self._links.send_hidden(hidden)]
            batch.awaiting = True
            self._fed.append(batch)

    def _finish_step(self, batch: MicroBatch, hidden: Tensor) -> None:
        """Choose tokens from `hidden [B, D]` and tell the other stages; check where it is due."""
        if self._choose is None:
            raise ValueError("the last stage needs a head that chooses")
        state = batch.state
        start_s = time.perf_counter()
        chosen = self._choose(hidden, state.positions, state.sequences).cpu()
        batch.times.head_s += time.perf_counter() - start_s
        tokens = torch.zeros(_tokens_shape(state), dtype=torch.int64)
        tokens[0] = chosen
        self._advance(batch, chosen)
        if state.check_every:
            batch.unconfirmed.append(hidden)
        if state.check_due:
            start_s = time.perf_counter()
            tokens[1:] = confirm_unsettled(state, batch.unconfirmed, self._confirm)
            batch.times.check_s += time.perf_counter() - start_s
            batch.unconfirmed = []
        batch.sends = self._links.send_tokens(tokens)
        if state.check_due:
            self._settle(batch, tokens[1:])
        self._tell(batch)

    def _expect_tokens(self, *, until: int) -> None:
        """Post the receives of all tokens that leave the last stage at time `until` or before."""
        while self._fed and self._fed[0].slot + self._links.pp_size <= until:
            shape = _tokens_shape(self._fed.popleft().state)
            self._expected.append(self._links.expect_tokens(shape))

    def _take_in(self, batch: MicroBatch) -> None:
        """Learn the token of the step that this stage has passed on, and follow its check."""
        if not batch.awaiting:
            return
        batch.awaiting = False
        state = batch.state
        self._ready_slot = batch.slot + self._links.pp_size
        self._expect_tokens(until=self._ready_slot)
        tokens = self._received(self._expected.popleft()).cpu()
        self._advance(batch, tokens[0])
        if state.check_due:
            self._settle(batch, tokens[1:])
        self._tell(batch)

    def _advance(self, batch: MicroBatch, chosen: Tensor) -> None:
        now_s = time.perf_counter()
        if batch.state.num_steps == 0:
            batch.times.first_token_s = now_s - self._start_s
        else:
            batch.times.step_s.append(now_s - batch.last_s)
        batch.state.advance(chosen)
        batch.last_s = now_s

    def _settle(self, batch: MicroBatch, dense: Tensor) -> None:
        batch.cache.crop(-batch.state.settle(dense))
        batch.last_s = time.perf_counter()

    def _tell(self, batch: MicroBatch) -> None:
        if batch.state.done:
            batch.times.total_s = time.perf_counter() - self._start_s
            batch.cache = None
        if self._on_step is not None:
            self._on_step(batch.number)

    def _receive_hidden(self, batch: MicroBatch, ids: Tensor) -> Tensor:
        """The hidden states `[B, L, D]` of what the stage before was fed, `ids [B, L]`."""
        self._expect_tokens(until=batch.slot + self._links.stage)
        shape = (*ids.shape, self._stage.hidden_size)
        return self._received(self._links.expect_hidden(shape, self._stage.dtype))

    def _received(self, receive: Posted) -> Tensor:
        start_s = time.perf_counter()
        with annotate(RECEIVE, receive.tensor.nbytes):
            receive.wait()
            self._synchronize()
        self.times.wait_s += time.perf_counter() - start_s
        return receive.tensor

    def _synchronize(self) -> None:
        """On CUDA, let the clock see what was launched on this stream, and no message beside it."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _tokens_shape(state: DecodeState) -> tuple[int, int]:
    """Of what the last stage tells before `state` advances: the chosen `[B]`, then dense `[n, B]`.

    In lossless mode a stop token, yet unknown to the others, may call for a check at any step, so
    that its rows are always sent.
    """
    return 1 + (state.unconfirmed + 1 if state.check_every else 0), state.batch_size


def _wait_for(sends: list[Posted]) -> None:
    while sends:
        sends.pop().wait()

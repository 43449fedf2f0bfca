"""What one stage does while a pipeline decodes: its turns, in the order that all stages share.

Every stage visits the micro-batches in the same order and keeps a `DecodeState` of each. The last
stage chooses tokens and tells the others, which take them in when they next come to that
micro-batch; until then they work on others. In lossless mode the dense tokens follow at each check,
and every stage rolls its own KV cache back by what `DecodeState.settle` says.

Letters: B sequences of a micro-batch, L tokens fed to each, D hidden size, n unconfirmed steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.decode.loop import Choose, DecodeTimes, confirm_unsettled
from flashhead_dist.decode.recording import record_past
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.integrations.pipeline_bubble import StageTimes
from flashhead_dist.integrations.pipeline_links import Links
from flashhead_dist.integrations.pipeline_stage import PipelineStage, StageInput
from flashhead_profiles.ranges import BODY, STEP, annotate

RunStage = Callable[[StageInput], Tensor]


@dataclass
class MicroBatch:
    """One micro-batch on one stage. `number` is its place among all of the run."""

    number: int
    state: DecodeState
    times: DecodeTimes = field(default_factory=DecodeTimes)
    cache: Any = None
    awaiting: bool = False
    """Fed, and its token not yet known on this stage."""
    sends: list[Any] = field(default_factory=list)
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
        inputs = ids.to(self._device) if self._stage.is_first else self._receive(ids)
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
            batch.sends = [self._links.send_hidden(hidden)]
            batch.awaiting = True

    def _finish_step(self, batch: MicroBatch, hidden: Tensor) -> None:
        """Choose tokens from `hidden [B, D]` and tell the other stages; check where it is due."""
        if self._choose is None:
            raise ValueError("the last stage needs a head that chooses")
        state = batch.state
        start_s = time.perf_counter()
        chosen = self._choose(hidden, state.positions, state.sequences).cpu()
        batch.times.head_s += time.perf_counter() - start_s
        batch.sends = self._links.announce(chosen)
        self._advance(batch, chosen)
        if state.check_every:
            batch.unconfirmed.append(hidden)
        if state.check_due:
            start_s = time.perf_counter()
            dense = confirm_unsettled(state, batch.unconfirmed, self._confirm)
            batch.times.check_s += time.perf_counter() - start_s
            batch.unconfirmed = []
            batch.sends += self._links.announce(dense)
            self._settle(batch, dense)
        self._tell(batch)

    def _take_in(self, batch: MicroBatch) -> None:
        """Learn the token of the step that this stage has passed on, and follow its check."""
        if not batch.awaiting:
            return
        batch.awaiting = False
        state = batch.state
        start_s = time.perf_counter()
        chosen = self._links.learn(state.batch_size)
        self._advance(batch, chosen)
        if state.check_due:
            dense = self._links.learn(state.unconfirmed, state.batch_size)
            self._settle(batch, dense)
        self.times.wait_s += time.perf_counter() - start_s
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

    def _receive(self, ids: Tensor) -> Tensor:
        """The hidden states `[B, L, D]` of what the stage before was fed, `ids [B, L]`."""
        start_s = time.perf_counter()
        shape = (*ids.shape, self._stage.hidden_size)
        hidden = self._links.receive_hidden(shape, self._stage.dtype)
        self._synchronize()
        self.times.wait_s += time.perf_counter() - start_s
        return hidden

    def _synchronize(self) -> None:
        """On CUDA, let the clock see what was launched; sends would wait for it anyway."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _wait_for(sends: list[Any]) -> None:
    while sends:
        sends.pop().wait()

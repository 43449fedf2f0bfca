"""One stage of a pipeline: its slice of the model, its messages, and its turns while it decodes.

`PipelineStage` is a contiguous slice of a transformers causal LM. It runs through the decoder's own
`forward`, so masks, rotary embeddings and cache layers are the model's own. `Links` carries hidden
states to the next stage and chosen tokens from the last stage to all others. `StageLoop` visits the
micro-batches in the same order on every stage, and keeps a `DecodeState` of each. In lossless mode
the dense tokens travel with those of a step that ends in a check, and every stage rolls its own KV
cache back by the result of `DecodeState.settle`.

All stages post their messages in one order, so that there is no deadlock even where a send or a
receive blocks its stage until the other side has posted too. Over NCCL that happens whenever the
host waits for the device: while memory is freed, a kernel is loaded, or DeepSpeed's communication
log is on. The order is that of a clock that ticks once a turn. The step of a micro-batch gets a
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
import torch.distributed as dist
from torch import Tensor, nn

from flashhead_dist.decode.body import new_cache, record_past, token_positions
from flashhead_dist.decode.loop import Choose, DecodeTimes, confirm_unsettled
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.integrations.deepspeed import drop_head, shard_body
from flashhead_dist.integrations.pipeline_bubble import StageTimes
from flashhead_profiles.ranges import BODY, RECEIVE, SEND, STEP, annotate

HIDDEN_LOG_NAME, TOKENS_LOG_NAME = "pipeline_hidden_states", "pipeline_tokens"
"""Names of the sends in DeepSpeed's communication log."""
MODEL_TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose stages are tested against the unsharded model.

Others may do more between the embedding and the first layer than a later stage, which is fed hidden
states, repeats.
"""


@dataclass(frozen=True)
class StageInput:
    """The inputs of one stage for one micro-batch.

    inputs: token ids int64 `[B, L]` at the first stage, hidden states `[B, L, D]` at the others.
    attention_mask: int64 `[B, all tokens so far]`, None where nothing is padded.
    cache: the KV cache of this stage and micro-batch.
    """

    inputs: Tensor
    attention_mask: Tensor | None
    cache: Any


def layer_bounds(
    num_layers: int, pp_size: int, layers_per_stage: Sequence[int] | None = None
) -> list[int]:
    """The first layer of each stage, and the end: `pp_size + 1` ascending numbers.

    layers_per_stage: one number a stage; where None an even split in which earlier stages may have
    one more, as in DeepSpeed's uniform partition.

    Raises:
        UserError: a stage without layers, or counts that do not add up to the model's.
    """
    if layers_per_stage is None:
        if pp_size > num_layers:
            raise UserError(
                f"pp_size {pp_size} is more than the model's {num_layers} layers: "
                f"use {num_layers} stages or fewer"
            )
        share, extra = divmod(num_layers, pp_size)
        layers_per_stage = [share + (stage < extra) for stage in range(pp_size)]
    counts = " + ".join(map(str, layers_per_stage))
    if len(layers_per_stage) != pp_size or min(layers_per_stage) < 1:
        raise UserError(
            f"layers per stage {counts} do not give each of {pp_size} stages a layer: "
            f"name {pp_size} numbers of 1 or more"
        )
    if sum(layers_per_stage) != num_layers:
        raise UserError(
            f"layers per stage {counts} are {sum(layers_per_stage)}, but the model has "
            f"{num_layers} layers: name numbers that add up to that"
        )
    return [sum(layers_per_stage[:stage]) for stage in range(pp_size + 1)]


class PipelineStage(nn.Module):
    """Layers `start..stop` of a model; the first stage embeds, the last one normalizes.

    `hidden_size` is D, `dtype` that of the hidden states between stages. The weights of other
    stages and the output head are dropped as soon as the model is loaded.
    """

    def __init__(
        self,
        load_model: Callable[[], Any],
        stage: int,
        pp_size: int,
        layers_per_stage: Sequence[int] | None = None,
    ) -> None:
        """load_model: returns a causal LM in eval mode, which is modified.

        Raises:
            UserError: a model of an unsupported kind, or layers that cannot be split like this.
        """
        super().__init__()
        model = load_model()
        decoder = model.get_decoder()
        config = decoder.config
        if config.model_type not in MODEL_TYPES:
            raise UserError(
                f"a {config.model_type} model cannot be split into pipeline stages: "
                f"choose one of {', '.join(MODEL_TYPES)}, or leave out the pipeline"
            )
        bounds = layer_bounds(config.num_hidden_layers, pp_size, layers_per_stage)
        self.start, self.stop = bounds[stage : stage + 2]
        self.is_first, self.is_last = stage == 0, stage == pp_size - 1
        self.hidden_size: int = config.hidden_size
        self.dtype: torch.dtype = model.dtype
        _keep_layers(decoder, self.start, self.stop)
        drop_head(model)
        if not self.is_first:
            decoder.embed_tokens = nn.Identity()
        if not self.is_last:
            decoder.norm = nn.Identity()
        self.model = model

    def shard(self, group: dist.ProcessGroup) -> None:
        """Split the layers over the ranks of `group`; every rank of every stage calls it at once.

        Raises:
            UserError: a model that DeepSpeed cannot shard over so many ranks.
        """
        self.model = shard_body(self.model, group, self.dtype)

    def new_cache(self, *, recording: bool) -> Any:
        """An empty KV cache of this stage's layers; recording: what `crop` may be asked of.

        Raises:
            UserError: recording a state that cannot be rolled back.
        """
        return new_cache(self.model.get_decoder().config, recording=recording)

    def forward(self, fed: StageInput) -> Tensor:
        """Hidden states `[B, L, D]` after this stage's layers."""
        name = "input_ids" if self.is_first else "inputs_embeds"
        mask, positions = fed.attention_mask, None
        if mask is not None:
            positions = token_positions(mask, fed.inputs.shape[1])
        output = self.model.get_decoder()(
            **{name: fed.inputs},
            attention_mask=mask,
            position_ids=positions,
            past_key_values=fed.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def _keep_layers(decoder: Any, start: int, stop: int) -> None:
    """Keep layers `start..stop` of the decoder, and adapt the configuration of masks and caches."""
    config = decoder.config
    decoder.layers = decoder.layers[start:stop]
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(config.layer_types[start:stop])
    config.num_hidden_layers = stop - start
    for place, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = place


@dataclass(frozen=True)
class Posted:
    """A send or receive in progress, and the tensor that it reads or fills."""

    tensor: Tensor
    work: Any

    def wait(self) -> None:
        """Wait until it has passed; on CUDA the current stream waits, not the host."""
        self.work.wait()


class Links:
    """Messages between this rank and the other stages at the same tensor-parallel rank.

    Both directions have process groups of their own: the messages of one NCCL communicator queue
    behind each other, and hidden states would wait for tokens that are yet to be chosen.
    `deepspeed.runtime.pipe.p2p` cannot post a message without waiting for it.

    grid: DeepSpeed's PipelineParallelGrid. stage: this rank's, of `pp_size`.
    """

    def __init__(self, grid: Any, device: torch.device) -> None:
        from deepspeed import comm

        self._comm = comm
        self._device = device
        self._ranks: list[int] = list(grid.pp_group)
        self._tokens_group = grid.get_pipe_parallel_group()
        self.stage: int = grid.get_stage_id()
        self.pp_size = len(self._ranks)

    def send_hidden(self, hidden: Tensor) -> Posted:
        """Post the send of `[B, L, D]` to the next stage."""
        hidden = hidden.contiguous()
        rank = self._ranks[self.stage + 1]
        with annotate(SEND, hidden.nbytes):
            return Posted(hidden, self._comm.isend(hidden, rank, log_name=HIDDEN_LOG_NAME))

    def expect_hidden(self, shape: Sequence[int], dtype: torch.dtype) -> Posted:
        """Post the receive of `shape` = `[B, L, D]` from the stage before."""
        hidden = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        return Posted(hidden, self._comm.irecv(hidden, self._ranks[self.stage - 1]))

    def send_tokens(self, token_ids: Tensor) -> list[Posted]:
        """Post the sends of int64 ids of any shape from the last stage to all others, in order."""
        ids = token_ids.to(self._device, torch.int64).contiguous()
        group, log_name = self._tokens_group, TOKENS_LOG_NAME
        with annotate(SEND, ids.nbytes):
            return [
                Posted(ids, self._comm.isend(ids, rank, group=group, log_name=log_name))
                for rank in self._ranks[:-1]
            ]

    def expect_tokens(self, shape: Sequence[int]) -> Posted:
        """Post the receive of int64 ids of that shape from the last stage."""
        ids = torch.empty(tuple(shape), dtype=torch.int64, device=self._device)
        return Posted(ids, self._comm.irecv(ids, self._ranks[-1], group=self._tokens_group))


@dataclass
class MicroBatch:
    """One micro-batch on one stage."""

    number: int
    state: DecodeState
    times: DecodeTimes = field(default_factory=DecodeTimes)
    cache: Any = None
    slot: int = 0
    """Of its latest step; unused on the last stage."""
    awaiting: bool = False
    """Its token is not yet known on this stage."""
    sends: list[Posted] = field(default_factory=list)
    unconfirmed: list[Tensor] = field(default_factory=list)
    """Hidden states `[B, D]` of the n steps since the last check; on the last stage only."""
    last_s: float = 0.0


class StageLoop:
    """The turns of one stage over one run.

    run_stage: calls `stage`. choose, confirm: as in `decode.loop.decode`, on the last stage only.
    on_step: called with the number of a micro-batch that may have released tokens.
    """

    def __init__(
        self,
        stage: PipelineStage,
        run_stage: Callable[[StageInput], Tensor],
        links: Links,
        device: torch.device,
        *,
        choose: Choose | None,
        confirm: Choose | None,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self._stage, self._run_stage, self._links = stage, run_stage, links
        self._device = device
        self._choose, self._confirm, self._on_step = choose, confirm, on_step
        self.times = StageTimes()
        self._start_s = 0.0
        self._next_slot = 0
        """One after the turn before."""
        self._ready_slot = 0
        """p after the latest step whose tokens have been received."""
        self._fed: deque[MicroBatch] = deque()
        """By slot, those whose tokens are yet to be expected."""
        self._expected: deque[Posted] = deque()
        """By slot, posted receives of tokens."""

    def run(self, states: Sequence[DecodeState], *, flushed: bool) -> list[DecodeTimes]:
        """Decode all states to their end; every stage calls it with equal states."""
        batches = [MicroBatch(number, state) for number, state in enumerate(states)]
        self._start_s = time.perf_counter()
        running = list(batches)
        while running:
            if flushed:
                for batch in running:
                    self._receive_tokens(batch)
            for batch in running:
                self._receive_tokens(batch)
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
        # They were received before this micro-batch's turn came again.
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
        """Choose tokens from `hidden [B, D]`, check them where due, and send them to all stages."""
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
        self._report(batch)

    def _expect_tokens(self, *, until: int) -> None:
        """Post the receives of all tokens that leave the last stage at time `until` or before."""
        while self._fed and self._fed[0].slot + self._links.pp_size <= until:
            shape = _tokens_shape(self._fed.popleft().state)
            self._expected.append(self._links.expect_tokens(shape))

    def _receive_tokens(self, batch: MicroBatch) -> None:
        """Receive the tokens of the latest step, and roll back as its check says."""
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
        self._report(batch)

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

    def _report(self, batch: MicroBatch) -> None:
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
        """On CUDA, wait for the current stream, and not for messages on others."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _tokens_shape(state: DecodeState) -> tuple[int, int]:
    """Of the last stage's message before `state` advances: the chosen `[B]`, then dense `[n, B]`.

    In lossless mode the dense rows are always sent: a stop token may require a check at any step.
    """
    return 1 + (state.unconfirmed + 1 if state.check_every else 0), state.batch_size


def _wait_for(sends: list[Posted]) -> None:
    while sends:
        sends.pop().wait()

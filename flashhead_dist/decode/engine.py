"""One rank of a model that decodes with several heads in turn, on any layout of ranks.

Also the bytes that its collectives carry for each token (`count_traffic`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashhead_dist.decode.body import TransformersBody, share_embedding
from flashhead_dist.decode.cpu_body import speed_up_body
from flashhead_dist.decode.loop import Choose, DecodeTimes, decode
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.dense import DenseLocalMax
from flashhead_dist.heads.flashhead_escalate import Escalation
from flashhead_dist.heads.registry import HeadBuilder, NamedHead
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from flashhead_dist.integrations.deepspeed import (
    HEAD_PREFIX,
    DeepSpeedCalls,
    LoggedCollective,
    communication_log,
    drop_head,
    shard_body,
)
from flashhead_dist.integrations.pipeline import PipelineDecoder
from flashhead_dist.integrations.pipeline_bubble import StageTimes
from flashhead_dist.models import ModelSource
from flashhead_dist.models.quantized import unpack_linears
from flashhead_dist.parallel import TensorParallel

DENSE = DenseLocalMax.name
"""The reference of other heads, and of lossless mode."""
_CONFIRMING = "confirming"
_TRAFFIC_STEPS = 4


@dataclass(frozen=True)
class Variant:
    """A head, and how often a dense pass checks it: every `check_every` tokens, 0 for never.

    num_probes, index: of this head only; the engine's where None.
    """

    head: str
    check_every: int = 0
    num_probes: int | None = None
    index: Path | None = None

    @property
    def named(self) -> NamedHead:
        """The head without its checks."""
        return NamedHead(self.head, self.num_probes, self.index)

    @property
    def label(self) -> str:
        """Its name in tables."""
        own = self.named.label
        return f"{own} --lossless {self.check_every}" if self.check_every else own


@dataclass(frozen=True)
class Layout:
    """`pp_size` pipeline stages of `tp_size` ranks: rank = stage * tp_size + tp_rank."""

    pp_size: int = 1
    tp_size: int = 1

    def check(self, world_size: int) -> None:
        """Raise UserError unless that is how many ranks there are."""
        if self.pp_size < 1 or self.tp_size < 1:
            raise UserError(
                f"--pp-size {self.pp_size} and --tp-size {self.tp_size} must be 1 or more"
            )
        if self.pp_size * self.tp_size != world_size:
            raise UserError(
                f"--pp-size {self.pp_size} x --tp-size {self.tp_size} needs "
                f"{self.pp_size * self.tp_size} ranks, but {world_size} started: give torchrun "
                f"--nproc-per-node {self.pp_size * self.tp_size}, or other sizes"
            )

    @property
    def head_ranks(self) -> range:
        """The ranks that hold the head: those of the last stage."""
        return range((self.pp_size - 1) * self.tp_size, self.pp_size * self.tp_size)


@dataclass(kw_only=True, eq=False)
class Engine:
    """The model's body and the heads over it, as this rank holds them. Call `load` first.

    escalation: of flashhead_escalate; each index's own calibration where None. context_length:
    tokens, prompt and text together; None where the model names none.
    """

    model: ModelSource
    index_dir: Path | None
    variants: Sequence[Variant]
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    parameters: SamplingParameters
    num_probes: int | None = None
    escalation: Escalation | None = None
    layers_per_stage: Sequence[int] | None = None

    tokenizer: Any = field(init=False, default=None)
    context_length: int | None = field(init=False, default=None)
    stop_token_ids: frozenset[int] = field(init=False, default=frozenset())
    pad_token_id: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._named = list(dict.fromkeys(variant.named for variant in self.variants))
        self._heads: dict[str, Head] = {}
        self._body: Any = None
        self._pipeline: PipelineDecoder | None = None

    def load(self) -> None:
        """Read the model and its heads; every rank calls it at once.

        Raises:
            UserError: what cannot be read, does not fit, or cannot be sharded like this.
        """
        if self.layout.pp_size > 1:
            self._pipeline = PipelineDecoder(
                self._load_body,
                pp_size=self.layout.pp_size,
                tp_size=self.layout.tp_size,
                layers_per_stage=self.layers_per_stage,
                device=self.device,
            )
            if self._pipeline.is_last:
                self._build_heads(self._pipeline.tp)
            return
        group = dist.group.WORLD if self.layout.tp_size > 1 else None
        tp, lookups = (
            TensorParallel.single(self.device)
            if group is None
            else TensorParallel.from_group(group, self.device, calls=DeepSpeedCalls(prefix))
            for prefix in (HEAD_PREFIX, "embedding")
        )
        self._build_heads(tp)
        body = self._load_body()
        # One set of rows in memory for both ends of a tied model.
        for head in self._heads.values():
            if share_embedding(body, head, lookups):
                break
        drop_head(body)
        if group is not None:
            body = shard_body(body, group, self.dtype)
        self._body = body.to(self.device)
        speed_up_body(self._body)

    def _build_heads(self, tp: TensorParallel) -> None:
        builders = {
            folder: HeadBuilder(
                tp=tp, model=self.model, index_dir=folder, dtype=self.dtype, device=self.device,
                escalation=self.escalation,
            )
            for folder in {self.index_dir, *(head.index for head in self._named)}
        }  # fmt: skip
        for head in self._named:
            probes = None if head.name == DENSE else head.num_probes or self.num_probes
            builder = builders[head.index or self.index_dir]
            self._heads[head.label] = builder.build(head.name, num_probes=probes)
        if any(variant.check_every for variant in self.variants):
            self._heads[_CONFIRMING] = builders[self.index_dir].build_confirming()
        zero = torch.zeros(1, dtype=torch.int64)
        hidden = torch.zeros(1, self.model.hidden_size, dtype=self.dtype, device=self.device)
        for label in self._heads:
            # Once, so that a head's errors come before a body is loaded.
            choose = self._chooser(label)
            assert choose is not None
            choose(hidden, zero, zero)

    def _load_body(self) -> Any:
        body, self.tokenizer = self.model.load_body(self.dtype)
        if self.device.type != "cpu":
            unpack_linears(body, self.dtype)
        self.context_length = getattr(body.get_decoder().config, "max_position_embeddings", None)
        stops = body.generation_config.eos_token_id
        self.stop_token_ids = frozenset([stops] if isinstance(stops, int) else stops or [])
        self.pad_token_id = self.tokenizer.pad_token_id or 0
        return body

    def head(self, label: str) -> Head | None:
        """This rank's part of a head; None on a stage that holds none, or if it is not loaded."""
        return self._heads.get(label)

    def decode(
        self,
        variant: Variant,
        states: Sequence[DecodeState],
        on_step: Callable[[int], None] | None = None,
    ) -> tuple[list[DecodeTimes], list[StageTimes]]:
        """Decode `states` to their end, the same ones on every rank.

        One after the other; with pipeline stages all in flight at once. Returns times of each
        state, and of each pipeline stage where there are any.
        on_step: called with the number of a state that may have released tokens.
        """
        choose = self._chooser(variant.named.label)
        confirm = self._chooser(_CONFIRMING) if variant.check_every else None
        if self._pipeline is not None:
            return self._pipeline.decode(states, choose, confirm=confirm, on_step=on_step)
        assert choose is not None
        found = []
        for number, state in enumerate(states):
            body = TransformersBody(self._body, recording=state.check_every > 0)
            step = None if on_step is None else partial(on_step, number)
            found.append(decode(body, state, choose, confirm=confirm, on_step=step))
        return found, []

    def _chooser(self, label: str) -> Choose | None:
        head = self._heads.get(label)
        if head is None:
            return None  # a pipeline stage without a head
        contract = self.model.contract

        def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
            return choose_tokens(
                head, hidden, positions, sequences, self.parameters, contract=contract
            )

        return choose


@dataclass(frozen=True)
class Traffic:
    """Message bytes of this rank's collectives for a token of one sequence, without the prompt."""

    head_bytes_per_token: float
    body_bytes_per_token: float
    collectives: tuple[LoggedCollective, ...]


def count_traffic(
    engine: Engine, variants: Sequence[Variant], prompt: list[int]
) -> dict[str, Traffic]:
    """Traffic by label, from DeepSpeed's communication log: a few more tokens less the first one.

    The run is unmeasured: the log's timers would be part of every step.
    """
    found = {}
    for variant in (variant for variant in variants if not variant.check_every):
        logs = [_log(engine, variant, prompt, steps) for steps in (1, 1 + _TRAFFIC_STEPS)]
        sums = [_sums(log) for log in logs]
        head, body = ((more - less) / _TRAFFIC_STEPS for less, more in zip(*sums, strict=True))
        found[variant.label] = Traffic(head, body, tuple(logs[1]))
    return found


def _log(engine: Engine, variant: Variant, prompt: list[int], steps: int) -> list[LoggedCollective]:
    with communication_log() as log:
        engine.decode(variant, [DecodeState([prompt], max_new_tokens=steps)])
    return log


def _sums(log: Sequence[LoggedCollective]) -> tuple[int, int]:
    head = sum(item.total_bytes for item in log if item.name.startswith(HEAD_PREFIX))
    return head, sum(item.total_bytes for item in log) - head

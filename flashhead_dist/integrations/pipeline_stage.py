"""A contiguous slice of a transformers causal LM, as the one layer of a DeepSpeed pipeline stage.

The slice runs through the decoder's own `forward`, so masks, rotary embeddings and cache layers are
the model's own. Letters: B sequences, L tokens fed to each, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashhead_dist.decode.recording import new_cache, token_positions
from flashhead_dist.errors import UserError
from flashhead_dist.integrations.deepspeed_tp import drop_head, shard_body

MODEL_TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Kinds of model whose stages are tested against the unsharded model.

A decoder of another kind may do more between the embedding and the first layer than a later stage,
which is fed hidden states, would know of.
"""


@dataclass(frozen=True)
class StageInput:
    """What one stage is fed for one micro-batch.

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
    """Where each stage's layers start, and the end: `pp_size + 1` ascending numbers.

    layers_per_stage: as many as there are stages; as even as can be where None, earlier stages
    having one more, as DeepSpeed's own uniform partition.

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
        """load_model: gives a causal LM of its own, in eval mode, which is taken apart.

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
    """Cut the decoder down to its layers `start..stop`, which find their cache by their new place.

    Not only the module list: masks and caches are made from the configuration.
    """
    config = decoder.config
    decoder.layers = decoder.layers[start:stop]
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(config.layer_types[start:stop])
    config.num_hidden_layers = stop - start
    for place, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = place

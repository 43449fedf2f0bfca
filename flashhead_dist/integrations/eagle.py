"""A draft model that continues a target model's own last hidden states (EAGLE).

One layer of the target's kind reads, at each position t, the target's hidden state h[t] beside the
embedding of the token chosen from it, x[t + 1], and predicts h[t + 1]; an output head over that
state proposes x[t + 2]. From there it goes on from its own predictions. The head is the target's,
dense or retrieval, whole or over fewer tokens. Li et al., "EAGLE", arXiv 2401.15077, section 4.1;
both inputs are brought to unit rms first, as in EAGLE-3 (arXiv 2503.01840).

Letters: `B` sequences, `L` positions, `D` hidden size.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache

from flashhead_dist.errors import UserError

_WEIGHTS, _ORIGIN = "draft.safetensors", "draft.json"
_EPS = 1e-6


class EagleDraft(nn.Module):
    """The draft without a head and without an embedding: it is given states and embeddings."""

    def __init__(self, target_config: Any) -> None:
        """target_config: the text config of the target, a transformers causal language model."""
        super().__init__()
        config = copy.deepcopy(target_config)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"]
        # Its own embedding is never used.
        config.vocab_size, config.pad_token_id = 1, None
        size: int = config.hidden_size
        self.hidden_size = size
        self.fuse = nn.Linear(2 * size, size, bias=False)
        auto: Any = AutoModel
        self.decoder = auto.from_config(config)

    def start_from(self, target: Any) -> None:
        """Take the target's last layer and final norm, and pass its state on: where training
        begins."""
        decoder = target.get_decoder()
        self.decoder.layers[0].load_state_dict(decoder.layers[-1].state_dict())
        self.decoder.norm.load_state_dict(decoder.norm.state_dict())
        with torch.no_grad():
            self.fuse.weight.mul_(0.1)
            self.fuse.weight[:, : self.hidden_size].add_(torch.eye(self.hidden_size))

    def new_cache(self) -> Any:
        """An empty KV cache for `forward`."""
        return DynamicCache(config=self.decoder.config)

    def forward(self, states: Tensor, embeddings: Tensor, cache: Any = None) -> Tensor:
        """Predicted next states `[B, L, D]`.

        states: `[B, L, D]`, the target's or predicted ones; embeddings: `[B, L, D]`, of the token
        chosen from each; cache: continued by L positions where it is given.
        """
        both = torch.cat([_unit_rms(states), _unit_rms(embeddings)], -1)
        found: Tensor = self.decoder(
            inputs_embeds=self.fuse(both), past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        return found

    def save(self, folder: Path, origin: dict[str, Any]) -> None:
        """Write weights, and `origin` (JSON: what it was trained for, and on) to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        # The embedding of its own that a decoder comes with.
        weights = {n: w for n, w in self.state_dict().items() if "embed_tokens" not in n}
        save_file(weights, folder / _WEIGHTS)
        text = json.dumps(origin | {"hidden_size": self.hidden_size}, indent=1) + "\n"
        (folder / _ORIGIN).write_text(text, encoding="utf-8")


def load_draft(folder: Path, target: Any, weight_hash: str) -> EagleDraft:
    """The draft that `EagleDraft.save` wrote for `target`, in eval mode and float32.

    weight_hash: of the target's output embedding.

    Raises:
        UserError: nothing readable there, or a draft of another target.
    """
    try:
        origin = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
        weights = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} holds no readable draft model ({error}): train one with launch/drafts.py"
        ) from error
    if origin.get("weight_hash") != weight_hash:
        raise UserError(
            f"the draft in {folder} was trained for {origin.get('model')} with another output "
            "embedding than this model's: train one for it with launch/drafts.py"
        )
    draft = EagleDraft(target.get_decoder().config)
    missing, unexpected = draft.load_state_dict(weights, strict=False)
    if unexpected or any("embed_tokens" not in name for name in missing):
        raise UserError(
            f"the draft in {folder} has other layers than this model's: train one with "
            "launch/drafts.py"
        )
    return draft.eval()


def _unit_rms(values: Tensor) -> Tensor:
    return values * torch.rsqrt(values.float().square().mean(-1, keepdim=True) + _EPS).to(values)

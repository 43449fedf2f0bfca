"""Training of an EAGLE draft on texts, from the target's own hidden states.

The loss is EAGLE's (arXiv 2401.15077, section 4.2): smooth L1 between predicted and true states,
and cross entropy between what the target's head says of either. The head is taken over the texts'
own tokens only, or a large vocabulary would be most of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashhead_dist.integrations.eagle import EagleDraft
from flashhead_dist.states.body import run_body
from flashhead_dist.states.split import Passage

BATCH_TOKENS = 1024
_NOISE = 0.1
"""Uniform noise on the true states, in their rms, against predictions that are not exact."""
_STATE_WEIGHT, _TOKEN_WEIGHT = 1.0, 0.3
LEARNING_RATE = 6e-4


@dataclass(frozen=True)
class TrainingText:
    """token_ids: int64 `[L]`; states: bfloat16 `[L, D]`, the target's last hidden states."""

    token_ids: Tensor
    states: Tensor


def read_states(target: Any, texts: Sequence[list[int]], *, progress: bool) -> list[TrainingText]:
    """Run the target once over every text of two tokens or more."""
    passages = [
        Passage("", "calibration", number, token_ids, list(range(len(token_ids))))
        for number, token_ids in enumerate(texts)
        if len(token_ids) > 2
    ]
    states = run_body(target, passages, device=torch.device("cpu"), progress=progress)
    return [
        TrainingText(torch.tensor(passage.token_ids), found)
        for passage, found in zip(passages, states, strict=True)
    ]


def train_draft(
    target: Any,
    texts: Sequence[TrainingText],
    *,
    num_epochs: int,
    learning_rate: float = LEARNING_RATE,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    on_batch: Callable[[float], None] | None = None,
) -> EagleDraft:
    """Train a draft of `target` in float32; deterministic for a given seed and thread count.

    on_batch: told of each batch's loss.
    """
    torch.manual_seed(seed)
    draft = EagleDraft(target.get_decoder().config).float()
    draft.start_from(target)
    used = torch.unique(torch.cat([text.token_ids for text in texts]))
    rows = target.get_output_embeddings().weight.detach()[used].float()  # [U, D]
    embedding = target.get_input_embeddings()
    num_batches = num_epochs * len(list(_batches(texts, batch_tokens, seed)))
    weights = [p for name, p in draft.named_parameters() if "embed_tokens" not in name]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(num_batches, 2), pct_start=0.1
    )
    draft.train()
    for epoch in range(num_epochs):
        for batch in _batches(texts, batch_tokens, seed + epoch):
            loss = _loss(draft, embedding, rows, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            if on_batch is not None:
                on_batch(loss.item())
    return draft.eval()


def _loss(
    draft: EagleDraft, embedding: nn.Module, rows: Tensor, batch: Sequence[TrainingText]
) -> Tensor:
    """One batch's, texts padded on the right: under causal attention padding reaches no token."""
    states = nn.utils.rnn.pad_sequence([t.states.float() for t in batch], batch_first=True)
    token_ids = nn.utils.rnn.pad_sequence([t.token_ids for t in batch], batch_first=True)
    lengths = torch.tensor([len(t.token_ids) for t in batch])
    real = torch.arange(states.shape[1] - 1) < (lengths - 1).unsqueeze(1)
    given, wanted = states[:, :-1], states[:, 1:][real]  # [B, L - 1, D], [n, D]
    scale = wanted.square().mean().sqrt()
    noise = (torch.rand_like(given) - 0.5) * 2 * _NOISE * scale
    with torch.no_grad():
        embeddings = embedding(token_ids[:, 1:]).float()
        truth = (wanted @ rows.T).softmax(-1)
    found = draft(given + noise, embeddings)[real]
    on_states = nn.functional.smooth_l1_loss(found / scale, wanted / scale)
    on_tokens = nn.functional.cross_entropy(found @ rows.T, truth)
    return _STATE_WEIGHT * on_states + _TOKEN_WEIGHT * on_tokens


def _batches(
    texts: Sequence[TrainingText], batch_tokens: int, seed: int
) -> Iterator[list[TrainingText]]:
    """All texts in a random order, those of a batch of like length."""
    generator = torch.Generator().manual_seed(seed)
    ordered = sorted(texts, key=lambda text: len(text.token_ids))
    batches: list[list[TrainingText]] = [[]]
    for text in ordered:
        if batches[-1] and (len(batches[-1]) + 1) * len(text.token_ids) > batch_tokens:
            batches.append([])
        batches[-1].append(text)
    for number in torch.randperm(len(batches), generator=generator).tolist():
        if batches[number]:
            yield batches[number]

"""Comparison of draft heads in turn, over one target, one draft and one dense verifier."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.decode.body import share_embedding
from flashhead_dist.decode.compare import identical_share, middle
from flashhead_dist.decode.cpu_body import speed_up_body
from flashhead_dist.decode.loop import Choose
from flashhead_dist.decode.prompts import Prompt
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.dense import DenseLocalMax
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from flashhead_dist.index import IndexOptions, ensure_index
from flashhead_dist.index.build import default_states
from flashhead_dist.integrations.deepspeed import drop_head
from flashhead_dist.integrations.eagle import (
    DraftCounts,
    DraftDecoder,
    frequent_token_ids,
    load_draft,
    over_full_vocabulary,
    read_states,
    train_draft,
)
from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.models.base import reduce_vocabulary
from flashhead_dist.models.cache import make_once
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states.split import shipped_texts, split_by_document, texts_hash

PLAIN = "no draft"
_HEADS = (DenseLocalMax.name, FlashHead.name)
_TRAINING_CONTEXT = 128
_MOST_GROUPS = 128
"""Probing groups of a reduced vocabulary's index, where it is large."""
_VERSION = 1


def training_texts(tokenizer: Any, context: int = _TRAINING_CONTEXT) -> list[list[int]]:
    """Token ids of the shipped corpus's calibration documents, at most `context` of each.

    Prompts come from the other documents.
    """
    documents = shipped_texts()
    parts = zip(documents, split_by_document(documents), strict=True)
    texts = [document.text for document, part in parts if part == "calibration"]
    return [list(tokenizer(text, truncation=True, max_length=context).input_ids) for text in texts]


def ensure_draft(
    source: ModelSource,
    model: Any,
    tokenizer: Any,
    *,
    num_epochs: int,
    on_batch: Callable[[float], None] | None = None,
) -> Path:
    """The cached draft of `model`, trained first where there is none (minutes on a CPU)."""
    settings = [_VERSION, source.weight_hash, texts_hash(shipped_texts()), num_epochs]
    key = hashlib.sha256(json.dumps([*settings, _TRAINING_CONTEXT]).encode()).hexdigest()[:12]

    def make(folder: Path) -> None:
        config = model.get_decoder().config
        longest = getattr(config, "max_position_embeddings", _TRAINING_CONTEXT)
        chosen = training_texts(tokenizer, min(_TRAINING_CONTEXT, longest))
        texts = read_states(model, chosen, progress=False)
        draft = train_draft(model, texts, num_epochs=num_epochs, on_batch=on_batch)
        origin = {"model": source.name, "weight_hash": source.weight_hash, "epochs": num_epochs}
        draft.save(folder, origin)

    return make_once(cache_root() / "drafts" / f"{source.name.replace('/', '--')}-{key}", make)


@dataclass
class Drafted:
    """The results of one draft head, prompt by prompt."""

    label: str
    head_bytes: int = 0
    texts: list[list[int]] = field(default_factory=list)
    counts: list[DraftCounts] = field(default_factory=list)


class DraftHeads:
    """A target with its dense head, one draft, and the heads that propose for it in turn."""

    def __init__(
        self,
        source: ModelSource,
        model: Any,
        draft_dir: Path,
        index: Path,
        texts: Sequence[Sequence[int]],
        *,
        vocabularies: Sequence[int],
        threads: int,
    ) -> None:
        """texts: their most frequent tokens make reduced `vocabularies`, one of each size.

        Raises:
            UserError: what does not fit the model.
        """
        draft = load_draft(draft_dir, model, source.weight_hash)
        tp = TensorParallel.single(torch.device("cpu"))
        build = HeadBuilder(tp=tp, model=source, index_dir=index, dtype=torch.float32).build
        dense = build(DenseLocalMax.name)
        target = _chooser(dense)
        self.measured = [Drafted(PLAIN)]
        self._decoders: dict[str, DraftDecoder] = {}

        def add(label: str, choose: Choose, head_bytes: int) -> None:
            self._decoders[label] = DraftDecoder(model, target, draft, choose)
            self.measured.append(Drafted(label, head_bytes))

        for name in _HEADS:
            head = build(name)
            add(name, _chooser(head), head.read_bytes_per_row)
        self._decoders[PLAIN] = self._decoders[DenseLocalMax.name]
        for size in vocabularies:
            token_ids = frequent_token_ids(texts, source.vocab_size, size)
            reduced = reduce_vocabulary(source, token_ids)
            options = IndexOptions(num_groups=max(1, min(_MOST_GROUPS, size // 256)))
            states = partial(default_states, source, None, False)
            folder = ensure_index(reduced, options, states=states)
            builder = HeadBuilder(tp=tp, model=reduced, index_dir=folder, dtype=torch.float32)
            for name in _HEADS:
                head = builder.build(name)
                choose = over_full_vocabulary(_chooser(head), token_ids)
                add(f"{name}, {size:,} tokens", choose, head.read_bytes_per_row)
        share_embedding(model, dense, tp)
        drop_head(model)
        if threads > 1:
            speed_up_body(model)

    def decode(
        self, token_ids: Sequence[int], label: str, num_drafts: int, count: int
    ) -> tuple[list[int], DraftCounts]:
        """`DraftDecoder.decode` with the head of that label; without drafts for PLAIN."""
        return self._decoders[label].decode(
            token_ids, max_new_tokens=count, num_drafts=0 if label == PLAIN else num_drafts
        )

    def compare(
        self, tokenizer: Any, prompts: Sequence[Prompt], num_drafts: int, max_new_tokens: int
    ) -> Iterator[Prompt]:
        """Decode every prompt with every head, pausing after each prompt; the order rotates."""
        for turn, prompt in enumerate(prompts):
            token_ids = tokenizer(prompt.text).input_ids
            for place in range(len(self.measured)):
                entry = self.measured[(place + turn) % len(self.measured)]
                text, counts = self.decode(token_ids, entry.label, num_drafts, max_new_tokens)
                entry.texts.append(text)
                entry.counts.append(counts)
            yield prompt


def _chooser(head: Head) -> Choose:
    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return choose_tokens(head, hidden, positions, sequences, SamplingParameters())

    return choose


def summarise(measured: Sequence[Drafted], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """A row for each head; times in ms, medians over prompts."""
    rows: list[dict[str, Any]] = []
    for item in measured:
        total = DraftCounts()
        by_source: dict[str, DraftCounts] = defaultdict(DraftCounts)
        for prompt, counts in zip(prompts, item.counts, strict=True):
            total.add(counts)
            by_source[prompt.source].add(counts)
        drafted = [(counts, n) for counts in item.counts if (n := sum(counts.proposed_at))]
        seconds = [c.total_s / len(t) for c, t in zip(item.counts, item.texts, strict=True)]
        row = {
            "head": item.label,
            "head_bytes": item.head_bytes,
            "identical_tokens_share": identical_share(item.texts, measured[0].texts),
            "acceptance": None,
            "accepted_at": total.accepted_at,
            "proposed_at": total.proposed_at,
            "tokens_per_pass": sum(map(len, item.texts)) / total.passes,
            "draft_head_ms": None,
            "draft_ms": None,
            "ms_per_token": middle([s * 1e3 for s in seconds]),
            "acceptance_by_source": {},
        }
        if drafted:
            row["acceptance"] = total.acceptance
            row["draft_head_ms"] = middle([c.draft_head_s / n * 1e3 for c, n in drafted])
            row["draft_ms"] = middle([c.draft_s / n * 1e3 for c, n in drafted])
            row["acceptance_by_source"] = {name: c.acceptance for name, c in by_source.items()}
        rows.append(row)
    return rows

"""Decoding prompts with draft heads in turn, over one target, one draft and one dense verifier."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.decode.cpu_attention import fuse_attention
from flashhead_dist.decode.cpu_linear import stream_linears
from flashhead_dist.decode.cpu_mlp import fuse_mlps
from flashhead_dist.decode.cpu_norm import fuse_norms
from flashhead_dist.decode.embedding import share_embedding
from flashhead_dist.decode.loop import Choose
from flashhead_dist.decode.prompts import Prompt
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.dense import DenseLocalMax
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from flashhead_dist.index import IndexOptions, ensure_index
from flashhead_dist.index.locate import default_states
from flashhead_dist.integrations.deepspeed import drop_head
from flashhead_dist.integrations.draft_vocabulary import frequent_token_ids, over_whole_vocabulary
from flashhead_dist.integrations.eagle import EagleDraft, load_draft
from flashhead_dist.integrations.eagle_decode import DraftCounts, decode_with_draft
from flashhead_dist.integrations.eagle_train import read_states, train_draft
from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.models.cache import make_once
from flashhead_dist.models.subset import reduce_vocabulary
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states.split import split_by_document
from flashhead_dist.states.texts import shipped_texts, texts_hash

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


def draft_folder(source: ModelSource, num_epochs: int) -> Path:
    """Where the draft of `source` is kept in the cache."""
    settings = [_VERSION, source.weight_hash, texts_hash(shipped_texts()), num_epochs]
    key = hashlib.sha256(json.dumps([*settings, _TRAINING_CONTEXT]).encode()).hexdigest()[:12]
    return cache_root() / "drafts" / f"{source.name.replace('/', '--')}-{key}"


def ensure_draft(
    source: ModelSource,
    model: Any,
    tokenizer: Any,
    *,
    num_epochs: int,
    on_batch: Callable[[float], None] | None = None,
) -> Path:
    """The folder of a draft of `model`, trained first where there is none (minutes on a CPU)."""

    def make(folder: Path) -> None:
        config = model.get_decoder().config
        longest = getattr(config, "max_position_embeddings", _TRAINING_CONTEXT)
        chosen = training_texts(tokenizer, min(_TRAINING_CONTEXT, longest))
        texts = read_states(model, chosen, progress=False)
        draft = train_draft(model, texts, num_epochs=num_epochs, on_batch=on_batch)
        origin = {"model": source.name, "weight_hash": source.weight_hash, "epochs": num_epochs}
        draft.save(folder, origin)

    return make_once(draft_folder(source, num_epochs), make)


@dataclass
class Drafted:
    """What one draft head has done so far, prompt by prompt."""

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
        """texts: of which the frequent tokens make reduced `vocabularies`, one each of that size.

        Raises:
            UserError: what does not fit the model.
        """
        self._model = model
        states = partial(default_states, source, None, False)
        self._draft: EagleDraft = load_draft(draft_dir, model, source.weight_hash)
        tp = TensorParallel.single(torch.device("cpu"))
        whole = HeadBuilder(tp=tp, model=source, index_dir=index, dtype=torch.float32)
        self.measured = [Drafted(PLAIN)]
        self._heads: dict[str, Choose] = {}
        for name in _HEADS:
            self._add(name, whole.build(name), None)
        self._target = self._heads[DenseLocalMax.name]
        dense = whole.build(DenseLocalMax.name)
        self._heads[PLAIN] = self._target
        for size in vocabularies:
            token_ids = frequent_token_ids(texts, source.vocab_size, size)
            few = reduce_vocabulary(source, token_ids)
            options = IndexOptions(num_groups=max(1, min(_MOST_GROUPS, size // 256)))
            folder = ensure_index(few, options, states=states)
            some = HeadBuilder(tp=tp, model=few, index_dir=folder, dtype=torch.float32)
            for name in _HEADS:
                self._add(f"{name}, {size:,} tokens", some.build(name), token_ids)
        share_embedding(model, dense, tp)
        drop_head(model)
        if threads > 1:
            stream_linears(model, model.get_decoder())
            fuse_norms(model)
            fuse_attention(model)
            fuse_mlps(model)

    def _add(self, label: str, head: Head, token_ids: Tensor | None) -> None:
        parameters = SamplingParameters()

        def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
            return choose_tokens(head, hidden, positions, sequences, parameters)

        found = choose if token_ids is None else over_whole_vocabulary(choose, token_ids)
        self._heads[label] = found
        self.measured.append(Drafted(label, head.read_bytes_per_row))

    def decode(self, token_ids: Sequence[int], label: str, num_drafts: int, count: int) -> Any:
        """`decode_with_draft` under the head of that label, and none for PLAIN."""
        return decode_with_draft(
            self._model,
            self._target,
            self._draft,
            self._heads[label],
            token_ids,
            max_new_tokens=count,
            num_drafts=0 if label == PLAIN else num_drafts,
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

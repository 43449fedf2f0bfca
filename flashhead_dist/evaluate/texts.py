"""Greedy texts of heads beside the dense head's: where they first differ.

The dense head decodes every prompt once, and the hidden state of each of its tokens is stored. The
text of another head is the same up to the first of these states from which that head chooses
another token: until then it is fed the same tokens, so its body makes the same states. One decoding
therefore serves every head and every index.

Letters: `B` prompts, `T` tokens of a text, `D` hidden size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.decode.body import TransformersBody
from flashhead_dist.decode.loop import decode
from flashhead_dist.decode.prompts import Prompt, check_lengths
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.intervals import Interval, bootstrap_median, wilson
from flashhead_dist.heads.base import Head, Want
from flashhead_dist.heads.registry import BASELINE, EmulatedHead, build_head
from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.models.cache import cached_tensors
from flashhead_dist.parallel import TensorParallel

DENSE = BASELINE
_BODY_DTYPE = torch.float32
_VERSION = 1
_ROWS = 64
"""Rows of a head's call."""


@dataclass(frozen=True)
class Batch:
    """Prompts decoded together; first: the number of the first one.

    A row's hidden states depend on the shape of its batch.
    """

    first: int
    prompts: tuple[Prompt, ...]
    token_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DenseTexts:
    """token_ids int64 `[B, T]`; states float32 `[B, T, D]`, from which each token was chosen."""

    batch: Batch
    token_ids: Tensor
    states: Tensor


class TextDecoder:
    """Greedy decoding over the body of a model, which is loaded at its first use."""

    def __init__(self, model: ModelSource, *, max_new_tokens: int, batch_size: int) -> None:
        """Raises UserError for less than one token or one prompt a batch."""
        for flag, value in (("--max-new-tokens", max_new_tokens), ("--batch-size", batch_size)):
            if value < 1:
                raise UserError(f"{flag} {value} is too small: give at least 1")
        self.model = model
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._loaded: tuple[Any, Any] | None = None
        self._dense: Head | None = None

    def batches(self, prompts: Sequence[Prompt]) -> list[Batch]:
        """The prompts as token ids, `batch_size` at a time in the order given.

        Raises:
            UserError: a prompt without tokens, or one that does not fit the model's context.
        """
        body, tokenizer = self._load()
        limit = getattr(body.get_decoder().config, "max_position_embeddings", None)
        rows = [tuple(tokenizer(prompt.text).input_ids) for prompt in prompts]
        check_lengths(rows, self.max_new_tokens, limit)
        size = self.batch_size
        return [
            Batch(first, tuple(prompts[first : first + size]), tuple(rows[first : first + size]))
            for first in range(0, len(rows), size)
        ]

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a text; decoding continues after them."""
        stops = self._load()[0].generation_config.eos_token_id
        return frozenset([stops] if isinstance(stops, int) else stops or [])

    def dense_texts(self, batch: Batch) -> DenseTexts:
        """The dense head's texts, cached by weights, prompts and length."""
        settings = [_VERSION, self.model.weight_hash, self.model.name, self.max_new_tokens]
        key = json.dumps([*settings, str(_BODY_DTYPE), batch.token_ids])
        name = f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        path = cache_root() / "texts" / name

        def compute() -> dict[str, Tensor]:
            self._dense = self._dense or build_head(
                DENSE, tp=TensorParallel.single(), model=self.model
            )
            tokens, states = self.decode(batch, self._dense)
            return {"token_ids": tokens, "states": states}

        return DenseTexts(batch, **cached_tensors(path, compute))

    def decode(self, batch: Batch, head: Head) -> tuple[Tensor, Tensor]:
        """Decode with any head: its tokens int64 `[B, T]` and their states float32 `[B, T, D]`."""
        state = DecodeState(
            batch.token_ids,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self._load()[1].pad_token_id or 0,
            first_sequence=batch.first,
        )
        states: list[Tensor] = []

        def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
            states.append(hidden.float().cpu())
            return head.serve(hidden, Want()).token_ids[:, 0]

        decode(TransformersBody(self._load()[0]), state, choose)
        tokens = torch.tensor([state.tokens(row) for row in range(state.batch_size)])
        return tokens, torch.stack(states, dim=1).contiguous()

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = self.model.load_body(_BODY_DTYPE)
        return self._loaded


@dataclass(frozen=True)
class TextRecord:
    """One prompt and one head.

    key: identifies the head, its index and the texts, so that a later run can reuse the record.
    first_difference: number of the first token that differs, from 0; None where none does.
    agreeing: of all `num_tokens` states of the dense text, those from which the head chooses the
    dense token. ends_at: number of the dense text's first stop token; None where there is none.
    """

    key: str
    head: str
    prompt: int
    source: str
    num_tokens: int
    first_difference: int | None
    dense_token: int | None
    head_token: int | None
    agreeing: int
    ends_at: int | None


def compare_texts(
    head: Head | EmulatedHead,
    texts: DenseTexts,
    stop_token_ids: frozenset[int],
    *,
    key: str,
    label: str,
) -> list[TextRecord]:
    """A record for each text of the batch."""
    batch_size, length, hidden_size = texts.states.shape
    rows = texts.states.view(-1, hidden_size)
    chosen = torch.cat(
        [head.serve(part, Want()).token_ids[:, 0].cpu() for part in torch.split(rows, _ROWS)]
    ).view(batch_size, length)
    records = []
    for row, (dense, own) in enumerate(zip(texts.token_ids, chosen, strict=True)):
        place = first_difference(dense, own)
        ends = [n for n, token in enumerate(dense.tolist()) if token in stop_token_ids]
        records.append(
            TextRecord(
                key=key,
                head=label,
                prompt=texts.batch.first + row,
                source=texts.batch.prompts[row].source,
                num_tokens=length,
                first_difference=place,
                dense_token=None if place is None else int(dense[place]),
                head_token=None if place is None else int(own[place]),
                agreeing=int((dense == own).sum()),
                ends_at=ends[0] if ends else None,
            )
        )
    return records


def first_difference(left: Tensor, right: Tensor) -> int | None:
    """Index of the first token int64 `[T]` that differs, None where none does."""
    places = (left != right).nonzero()
    return int(places[0, 0]) if len(places) else None


def append_records(path: Path, records: list[TextRecord]) -> None:
    """Add records to a .jsonl file, one line each.

    Raises:
        UserError: the file cannot be written.
    """
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another") from error


def read_records(path: Path) -> list[TextRecord]:
    """The records of a file, none where it is missing; an incomplete last line is skipped.

    Raises:
        UserError: another line that is no record.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    names = {field.name for field in fields(TextRecord)}
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            item: Any = json.loads(line)
            if set(item) != names:
                raise ValueError
            records.append(TextRecord(**item))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(
                f"line {number} of {path} is no record of this command: name another --out, or "
                f"delete it"
            ) from error
    return records


@dataclass(frozen=True)
class TextSummary:
    """One head over all prompts; intervals are at 95 %.

    identical: share of texts equal to the dense head's in every token (Wilson's interval: prompts
    are independent). identical_to_end: the same up to the dense text's first stop token.
    median_first_difference: over all texts, infinite for one that never differs (bootstrap of
    texts). median_of_differing: over those that differ; None where none does.
    token_agreement: share of the dense texts' states from which the head chooses the dense token.
    """

    head: str
    num_texts: int
    num_tokens: int
    identical: Interval
    identical_to_end: Interval
    median_first_difference: Interval
    median_of_differing: Interval | None
    token_agreement: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict of every field; null for infinity."""
        document = asdict(self)
        for value in document.values():
            if isinstance(value, dict):
                value.update({k: None if v == math.inf else v for k, v in value.items()})
        return document


def summarize(records: Sequence[TextRecord]) -> TextSummary:
    """Summarize the records of one head, at least one."""
    places = [r.first_difference for r in records]
    differing = [place for place in places if place is not None]
    to_end = [
        r.first_difference is None or (r.ends_at is not None and r.first_difference > r.ends_at)
        for r in records
    ]
    tokens = sum(r.num_tokens for r in records)
    return TextSummary(
        head=records[0].head,
        num_texts=len(records),
        num_tokens=tokens,
        identical=wilson(len(records) - len(differing), len(records)),
        identical_to_end=wilson(sum(to_end), len(records)),
        median_first_difference=bootstrap_median(
            np.array([math.inf if place is None else place for place in places], dtype=float)
        ),
        median_of_differing=bootstrap_median(np.array(differing)) if differing else None,
        token_agreement=sum(r.agreeing for r in records) / tokens,
    )

"""The module that replaces a transformers model's linear output head.

The model's class scales or caps what its head returns (see `models.contract`), but rows of a
retrieval head are final: estimates cannot pass a cap twice. `held_rows` takes them past the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

import torch
from torch import Tensor, nn

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import refuse_non_finite
from flashhead_dist.integrations.transformers_rows import LogitRows, RowParts
from flashhead_dist.models.contract import OutputContract

_ROWS_AT_ONCE = 64
"""Hidden states whose whole vocabulary is scored at a time, which bounds the memory for it."""


class RowKind(Enum):
    """What `RetrievalHead` returns; only the first two may be read as log-probabilities."""

    CLOSED_FORM = "closed form"
    CLOSED_FORM_BESIDE = "closed form beside estimates"
    """At temperature 1, to be kept; tokens are settled on estimates as if no one had asked."""
    ESTIMATED = "estimated"
    CHOICE = "choice"
    """1 at the head's greedy token and 0 elsewhere: for an argmax, soft-capped or not."""


@dataclass
class Session:
    """One decoding loop: which rows it can use, and what the last forward pass retrieved."""

    head: RetrievalHead
    kind: RowKind
    temperature: float
    greedy: bool
    found: RowParts | None = None
    rows: Tensor | None = None
    """Estimated rows `[n, V]` of the last forward pass. Where these were returned, assisted
    decoding writes over a row once its logits processors have had it; `generate` makes a copy."""
    next_row: int = 0

    @property
    def settles(self) -> bool:
        """Whether tokens are taken from estimates, so that clusters have to be opened."""
        return self.kind in (RowKind.ESTIMATED, RowKind.CLOSED_FORM_BESIDE)


_OPEN_SESSIONS: ContextVar[tuple[Session, ...]] = ContextVar("open_sessions", default=())


@contextmanager
def open_session(session: Session) -> Iterator[Session]:
    """Let `session.head` serve `session` in this thread; an inner session of it goes first."""
    token = _OPEN_SESSIONS.set((*_OPEN_SESSIONS.get(), session))
    try:
        yield session
    finally:
        _OPEN_SESSIONS.reset(token)


_HELD_ROWS: ContextVar[list[Tensor] | None] = ContextVar("held_rows", default=None)


@contextmanager
def held_rows() -> Iterator[list[Tensor]]:
    """Collect the rows that retrieval heads make in this thread.

    The model sees one value of each row, so that what it does with them costs nothing.
    """
    rows: list[Tensor] = []
    token = _HELD_ROWS.set(rows)
    try:
        yield rows
    finally:
        _HELD_ROWS.reset(token)


class RetrievalHead(nn.Module):
    """Maps hidden states `[..., D]` to float32 rows `[..., V]` through an index.

    Outside a decoding loop that has opened a session the rows are the closed form at temperature 1:
    their softmax is the head's distribution over the whole vocabulary, and they cost as much as a
    dense head.
    """

    def __init__(
        self, rows: LogitRows, contract: OutputContract, *, serves_closed_form: bool
    ) -> None:
        """contract: the model's; rows already follow what it says of logits.

        serves_closed_form: raise UserError instead where closed-form rows are asked for.
        """
        super().__init__()
        self.logit_rows = rows
        self.contract = contract
        self.serves_closed_form = serves_closed_form
        self.in_features = rows.head.hidden_size
        self.out_features = rows.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the index lies; hidden states are brought here and rows taken back."""
        return self.logit_rows.head.shard.rows.device

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor) -> Tensor:
        """See the class.

        Raises:
            UserError: closed-form rows of a head that does not serve them, or a hidden state with
                NaN or inf in a decoding loop.
        """
        flat = hidden_states.detach().reshape(-1, self.in_features).to(self.device)
        sessions = [session for session in _OPEN_SESSIONS.get() if session.head is self]
        rows = self._serve(sessions[-1], flat) if sessions else self._closed_form(flat, 1.0)
        rows = rows.view(*hidden_states.shape[:-1], self.out_features).to(hidden_states.device)
        held = _HELD_ROWS.get()
        if held is None:
            return rows
        held.append(rows)
        return rows[..., :1]

    def _serve(self, session: Session, flat: Tensor) -> Tensor:
        if session.kind is RowKind.CLOSED_FORM:
            return self._closed_form(flat, session.temperature)
        if session.kind is RowKind.CHOICE:
            chosen = self.logit_rows.choose(flat)
            return flat.new_zeros((len(flat), self.out_features), dtype=torch.float32).scatter_(
                1, chosen.unsqueeze(1), 1.0
            )
        refuse_non_finite(flat)
        session.found = self.logit_rows.retrieve(flat, session.temperature, greedy=session.greedy)
        session.rows = self.logit_rows.estimated(session.found, below_best=session.greedy)
        session.next_row = 0
        if session.kind is RowKind.CLOSED_FORM_BESIDE:
            return self._closed_form(flat, 1.0)
        return session.rows

    def _closed_form(self, flat: Tensor, temperature: float) -> Tensor:
        if not self.serves_closed_form:
            raise UserError(
                'this output head was placed with full_logits="error", and a value for every token '
                "was asked for (output_logits, output_scores, a forward pass of its own, or a "
                'logits processor that reads them): place it with full_logits="closed_form"'
            )
        rows = flat.new_empty((len(flat), self.out_features), dtype=torch.float32)
        for first in range(0, len(flat), _ROWS_AT_ONCE):
            some = flat[first : first + _ROWS_AT_ONCE]
            found = self.logit_rows.retrieve(some, temperature)
            rows[first : first + len(some)] = self.logit_rows.closed_form(found)
        return rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        refuse_to_move(self, fn)
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"a retrieval head has no {name} over the vocabulary: put the model's own output "
                "head back with restore_head(model) first"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        head = self.logit_rows.head
        return f"{self.in_features}, {self.out_features}, num_probes={head.num_probes}"


def refuse_to_move(head: RetrievalHead, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise UserError where `fn`, as `nn.Module._apply` takes it, would move or cast the index."""
    rows = head.logit_rows.head.shard.rows
    before = rows.new_empty(0)
    after = fn(before)
    if (after.device, after.dtype) != (before.device, before.dtype):
        raise UserError(
            f"a model with a retrieval head cannot be taken from {before.dtype} on "
            f"{before.device} to {after.dtype} on {after.device}: place and cast it before "
            "replace_head, or put its own head back with restore_head(model) first"
        )

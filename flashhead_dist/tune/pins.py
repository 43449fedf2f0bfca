"""Tokens that a tokenizer was taught to be frequent: known without any text of one's own."""

from __future__ import annotations

import json
from typing import Any


def frequent_tokens(tokenizer: Any, count: int, vocab_size: int) -> list[int]:
    """Up to `count` token ids, the most frequent in what taught the tokenizer, best first.

    A merge of a byte-pair encoding comes the earlier the more frequent its result was, so tokens
    come in the order of the merge that makes them (Sennrich et al.,
    https://arxiv.org/abs/1508.07909); characters, which no merge makes, after them by id. A
    tokenizer without merges gives its tokens in the order of their ids, which is that of its
    training. Special tokens are left out: they are pinned anyway.
    """
    special = set(tokenizer.all_special_ids)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    made: list[int] = []
    for merge in _merges(tokenizer):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        token = vocabulary.get(left + right)
        if token is not None:
            made.append(token)
    ordered = dict.fromkeys((*made, *sorted(vocabulary.values())))
    return [t for t in ordered if t not in special and 0 <= t < vocab_size][:count]


def _merges(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    merges: list[Any] = json.loads(backend.to_str())["model"].get("merges") or []
    return merges

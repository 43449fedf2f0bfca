"""A draft head over fewer tokens than the model has, chosen by how often texts use them.

What a draft proposes is verified, so a token that it cannot propose costs a round and nothing else
(Zhao et al., "FR-Spec", arXiv 2502.14856; EAGLE-3's draft vocabulary, arXiv 2503.01840).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from flashhead_dist.decode.loop import Choose
from flashhead_dist.errors import UserError


def frequent_token_ids(texts: Iterable[Iterable[int]], vocab_size: int, count: int) -> Tensor:
    """The `count` tokens most used in `texts`, int64 ascending; of equal use, smaller ids first.

    Tokenizers give small ids to frequent pieces, so where texts are few the rest is filled up well.

    Raises:
        UserError: count outside 1..vocab_size.
    """
    if not 1 <= count <= vocab_size:
        raise UserError(
            f"a draft vocabulary of {count} tokens must lie between 1 and the model's {vocab_size}"
        )
    used = Counter(token for text in texts for token in text)
    ordered = sorted(range(vocab_size), key=lambda token: (-used[token], token))
    return torch.tensor(sorted(ordered[:count]))


def over_whole_vocabulary(choose: Choose, token_ids: Tensor) -> Choose:
    """`choose` over a vocabulary whose token i is `token_ids[i]` of the whole one, int64 `[n]`."""

    def chosen(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return token_ids[choose(hidden, positions, sequences).cpu()]

    return chosen

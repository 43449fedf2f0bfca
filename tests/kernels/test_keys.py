"""Packed keys order candidates by (larger logit, smaller id), whatever the logits' bit patterns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flashhead_kernels.keys import EMPTY_KEY, pack_keys, unpack_keys

AWKWARD = [
    -math.inf, -3.4e38, -1.5, -1e-38, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.0, 1.5, 3.4e38, math.inf,
]  # fmt: skip


def test_keys_sort_as_logit_then_smaller_id() -> None:
    ids = [0, 1, 255, 256, 65535, 2**31 - 1]
    pairs = list(itertools.product(AWKWARD, ids))
    logits = torch.tensor([p[0] for p in pairs])
    keys = pack_keys(logits, torch.tensor([p[1] for p in pairs]))
    by_key = sorted(range(len(pairs)), key=lambda i: -int(keys[i]))
    by_rule = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0] + 0.0, pairs[i][1]))
    assert [pairs[i] for i in by_key] == [pairs[i] for i in by_rule]


def test_pads_are_empty_and_below_everything() -> None:
    keys = pack_keys(torch.tensor([math.inf, -math.inf]), torch.tensor([-1, 5]))
    assert int(keys[0]) == EMPTY_KEY
    assert int(keys[1]) > EMPTY_KEY
    logit, token_id = unpack_keys(keys[0])
    assert float(logit) == -math.inf
    assert int(token_id) == -1


def test_nan_is_refused_unless_it_is_a_pad() -> None:
    with pytest.raises(ValueError, match="NaN"):
        pack_keys(torch.tensor([math.nan]), torch.tensor([0]))
    assert int(pack_keys(torch.tensor([math.nan]), torch.tensor([-1]))) == EMPTY_KEY

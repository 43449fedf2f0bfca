"""The lists of faiss_ivf: trained once, filled with every row, refused where damaged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.heads import faiss_ivf
from flashhead_dist.heads.faiss_ivf import TrainedLists, default_num_lists


def test_faiss_lists_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(500, 16, generator=torch.Generator().manual_seed(2))
    cache = tmp_path / "lists.safetensors"
    first = TrainedLists.of(rows, cache)
    monkeypatch.setitem(sys.modules, "faiss", None)
    again = TrainedLists.of(rows, cache)
    assert torch.equal(first.assignments, again.assignments)
    assert first.centroids.shape == (default_num_lists(500), 16)
    assert first.assignments.shape == (500,)
    cache.write_bytes(cache.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"lists\.safetensors is damaged .* delete it"):
        TrainedLists.of(rows, cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_faiss_lists_hold_every_row_once_and_as_it_is(dtype: torch.dtype) -> None:
    """Lists are filled in pieces of whole lists; here one of them is longer than a piece."""
    rows = torch.randn(20000, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    assignments = torch.randint(2, 7, (20000,), generator=torch.Generator().manual_seed(4))
    assignments[:9000] = 5
    lists = TrainedLists(torch.eye(8), assignments.to(torch.int32))
    faiss = pytest.importorskip("faiss")
    index = faiss_ivf._build(faiss, rows, lists, torch.device("cpu"))
    assert index.ntotal == 20000
    for number in range(8):
        size = index.invlists.list_size(number)
        ids = torch.from_numpy(
            faiss.rev_swig_ptr(index.invlists.get_ids(number), size).astype("int64")
        )
        assert torch.equal(ids, (assignments == number).nonzero()[:, 0])
        codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size)
        assert codes.tobytes() == rows[ids].contiguous().view(torch.uint8).numpy().tobytes()

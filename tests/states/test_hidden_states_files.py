"""Hidden states in a file: what is written is read back, and what is unusable is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flashhead_dist.errors import UserError
from flashhead_dist.states import (
    HiddenStates,
    load_hidden_states,
    require_hidden_size,
    save_hidden_states,
)

D = 32


def states_of(n: int = 6, **changes: Any) -> HiddenStates:
    values: dict[str, Any] = {
        "states": torch.arange(float(n * D)).reshape(n, D).to(torch.bfloat16),
        "source_ids": torch.arange(n) % 2,
        "sources": ("a", "b"),
        "origin": "a test",
        "documents": torch.arange(n) // 2,
    }
    return HiddenStates(**(values | changes))


def test_file_round_trip(tmp_path: Path) -> None:
    hidden_states = states_of()
    save_hidden_states(tmp_path / "states.safetensors", hidden_states)
    loaded = load_hidden_states(tmp_path / "states.safetensors")
    for name in ("states", "source_ids", "documents"):
        assert torch.equal(getattr(loaded, name), getattr(hidden_states, name))
    assert (loaded.sources, loaded.origin) == (("a", "b"), "a test")
    assert loaded.counts() == {"a": 3, "b": 3}


def test_file_with_the_states_alone_is_one_source(tmp_path: Path) -> None:
    save_file({"hidden_states": torch.randn(3, D)}, tmp_path / "bare.safetensors")
    loaded = load_hidden_states(tmp_path / "bare.safetensors")
    assert loaded.counts() == {"all": 3}
    assert loaded.documents is None
    assert loaded.states.dtype == torch.float32


def test_subset_by_mask_and_by_index() -> None:
    hidden_states = states_of()
    mask = hidden_states.source_ids == 1
    picked = hidden_states.subset(mask)
    assert torch.equal(picked.states, hidden_states.states[[1, 3, 5]])
    assert picked.counts() == {"b": 3}
    again = hidden_states.subset(torch.tensor([5, 0]))
    assert again.source_ids.tolist() == [1, 0]
    assert again.documents is not None
    assert again.documents.tolist() == [2, 0]


def with_nan(path: Path) -> None:
    states = torch.randn(5, D)
    states[3, 7] = float("nan")
    states[4, 0] = float("inf")
    save_file({"hidden_states": states}, path)


def truncated(path: Path) -> None:
    save_hidden_states(path, states_of())
    path.write_bytes(path.read_bytes()[:-3])


def named_too_few(path: Path) -> None:
    tensors = {"hidden_states": torch.randn(2, D), "source": torch.tensor([0, 2])}
    save_file(tensors, path, {"sources": '["a", "b"]'})


def named(sources: str) -> Callable[[Path], object]:
    return lambda path: save_file({"hidden_states": torch.randn(2, D)}, path, {"sources": sources})


REFUSALS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "do not exist"),
    (lambda path: path.write_text("no tensors"), "no readable safetensors file"),
    (truncated, "no readable safetensors file"),
    (with_nan, "NaN or infinity, first in row 3"),
    (named_too_few, "source 2, but its metadata names 2 sources"),
    (named("en,code"), r"`sources` .* 'en,code': it must be a JSON list"),
    (named('{"en": 1}'), "must be a JSON list of names"),
    (named("[1, 2]"), "must be a JSON list"),
    (lambda path: save_file({"states": torch.randn(2, D)}, path), "holds no such tensor"),
    (lambda path: save_file({"hidden_states": torch.randn(D)}, path), r"holds torch.float32 \(32,"),
    (lambda path: save_file({"hidden_states": torch.ones(2, D).int()}, path), "torch.int32"),
    (lambda path: save_file({"hidden_states": torch.randn(0, D)}, path), "N >= 1"),
    (
        lambda path: save_file(
            {"hidden_states": torch.randn(2, D), "source": torch.zeros(3).int()}, path
        ),
        "source of .* must hold 2 integers",
    ),
]


@pytest.mark.parametrize(("write", "message"), REFUSALS, ids=[m[:24] for _, m in REFUSALS])
def test_unusable_file_is_refused(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "states.safetensors"
    write(path)
    with pytest.raises(UserError, match=message):
        load_hidden_states(path)


def test_states_of_another_size_are_refused() -> None:
    require_hidden_size(states_of(), D, "this model")
    with pytest.raises(UserError, match=f"size {D}, but this model has hidden size 640"):
        require_hidden_size(states_of(), 640, "this model")


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot be written"):
        save_hidden_states(tmp_path / "full" / "states.safetensors", states_of())

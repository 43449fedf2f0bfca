"""Building an index: whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from flashhead_dist.index import HeadIndexError, build, load_manifest, load_shard, store
from flashhead_dist.models import open_model

Build = Callable[..., Path]


def stored_bytes(index: Path) -> bytes:
    return (index / "index.safetensors").read_bytes()


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["cluster_tokens", "calibrate_escalation", "cohesion"])
def test_a_build_that_fails_leaves_nothing_and_what_was_there(
    build_one: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    failure: type[BaseException],
) -> None:
    index = build_one()
    stored = stored_bytes(index)

    def fail(*arguments: Any, **named: Any) -> None:
        raise failure

    monkeypatch.setattr(build, stage, fail)
    for name in ("index", "new"):
        with pytest.raises(failure):
            build_one(name, replace=True, seed=1)
        assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert stored_bytes(index) == stored
    load_shard(index)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["save_file", "save_manifest", "_flush"])
def test_storing_that_fails_leaves_nothing_and_what_was_there(
    build_one: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    failure: BaseException,
) -> None:
    index = build_one()
    stored = stored_bytes(index)
    done = getattr(store, step)

    def fail(*arguments: Any, **named: Any) -> None:
        done(*arguments, **named)
        raise failure

    monkeypatch.setattr(store, step, fail)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else HeadIndexError
    for name in ("index", "new"):
        with pytest.raises(expected) as raised:
            build_one(name, replace=True, seed=1)
        if expected is HeadIndexError:
            assert "No space left" in str(raised.value)
            assert str(tmp_path / name) in str(raised.value)
        assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert stored_bytes(index) == stored


def test_what_cannot_be_is_refused_before_the_work(
    build_one: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_one()
    monkeypatch.setattr(build, "cluster_tokens", None)
    with pytest.raises(HeadIndexError, match="exists already"):
        build_one()
    with pytest.raises(HeadIndexError, match="between 1 and the 256 clusters"):
        build_one("other", num_probes=257)


def test_an_index_is_replaced_only_if_asked(build_one: Build, tmp_path: Path) -> None:
    index = build_one()
    stored = stored_bytes(index)
    with pytest.raises(HeadIndexError, match=r"index exists already.*--force"):
        build_one(seed=1)
    assert stored_bytes(index) == stored
    build_one(replace=True, seed=1)
    assert load_manifest(index).seed == 1
    load_shard(index)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    (index / "notes.txt").write_text("mine")
    with pytest.raises(HeadIndexError, match="not an index"):
        build_one(replace=True)
    assert (index / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    build_one: Build,
    tied_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
) -> None:
    monkeypatch.setattr(build, "_READ_ROWS", 100)
    broken = tmp_path / "broken"
    shutil.copytree(tied_model, broken)
    rows = load_file(broken / "model.safetensors")["lm_head.weight"]
    rows[701, 3] = value
    save_file({"lm_head.weight": rows}, broken / "model.safetensors")
    with pytest.raises(HeadIndexError, match=r"at token 701; use"):
        build_one(model=open_model(str(broken)))
    assert not (tmp_path / "index").exists()

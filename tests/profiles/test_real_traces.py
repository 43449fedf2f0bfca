"""Real torch.profiler traces of two gloo ranks, read back: the ranges are the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flashhead_dist.decode.loop import decode
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.heads.registry import build_head
from flashhead_dist.models import open_model
from flashhead_dist.parallel import split_tensor_parallel
from flashhead_profiles.ranges import STEP, annotate
from flashhead_profiles.readers import read_chrome_trace

Run = Callable[..., list[Any]]
BATCH, STEPS = 512, 12


class _Body:
    """Some work that takes a millisecond or two, in the place of a model below its head."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._weight = torch.randn(64, 4096)

    def prefill(self, token_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.step(token_ids[:, -1], attention_mask)

    def step(self, token_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        hidden = torch.ones(len(token_ids), 64) * (token_ids.unsqueeze(1) % 7)
        return (hidden @ self._weight @ self._weight.T).to(torch.bfloat16)

    def rollback(self, num_tokens: int) -> None:
        raise AssertionError("nothing is checked")


def _rank(rank: int, world_size: int, folder: str, model_dir: str, index_dir: str) -> None:
    place = split_tensor_parallel((world_size,))[world_size]
    assert place is not None
    head = build_head("flashhead", tp=place, model=open_model(model_dir), index_dir=Path(index_dir))
    hidden = torch.randn(BATCH, 64).to(torch.bfloat16)
    prompts = [[1 + number] for number in range(BATCH)]
    head.forward(hidden)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for number in range(STEPS):
            place.barrier()
            with annotate(STEP, number):
                head.forward(hidden)
    profiled.export_chrome_trace(f"{folder}/head_rank{rank}.json")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        decode(
            _Body(),
            DecodeState(prompts, max_new_tokens=STEPS),
            lambda states, positions, sequences: head.forward(states).token_ids[:, 0],
        )
    profiled.export_chrome_trace(f"{folder}/decode_rank{rank}.json")


@pytest.fixture(scope="module")
def folder(
    run_ranks: Run, tied_model: Path, tied_index: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    traces = tmp_path_factory.mktemp("traces")
    run_ranks(_rank, 2, str(traces), str(tied_model), str(tied_index))
    return traces


def read(folder: Path, name: str) -> pd.DataFrame:
    """The timelines of both ranks."""
    frames = [read_chrome_trace(path) for path in sorted(folder.glob(f"{name}_rank*.json"))]
    both = pd.concat(frames, ignore_index=True)
    both.attrs["missing"] = frames[0].attrs["missing"]
    return both


def covered_shares(frame: pd.DataFrame, parent: str) -> list[float]:
    """The share of each `parent` range that the ranges directly inside it cover."""
    shares = []
    for outer in frame[frame["range"] == parent].itertuples():
        inside = frame[
            (frame["rank"] == outer.rank)
            & (frame["depth"] == outer.depth + 1)
            & frame["start_us"].between(outer.start_us, outer.start_us + outer.duration_us)
        ]
        shares.append(inside["duration_us"].sum() / outer.duration_us)
    return shares


@pytest.fixture(scope="module")
def heads(folder: Path) -> pd.DataFrame:
    return read(folder, "head")


def test_every_step_of_both_ranks_is_there_with_its_parts(heads: pd.DataFrame) -> None:
    counts = heads.groupby(["rank", "range"]).size().unstack()
    assert list(counts.index) == [0, 1]
    parts = ["head/check", "head/centroids", "head/candidates", "head/exchange", "head/result"]
    assert (counts[["step", "head", *parts]] == STEPS).all(axis=None)
    assert set(heads[heads["range"] == "head"]["label"]) == {"flashhead"}
    assert list(heads["depth"].unique()) == [0, 1, 2]


@pytest.mark.parametrize("parent", ["step", "head"])
def test_the_ranges_of_a_step_add_up_to_it_within_five_per_cent(
    heads: pd.DataFrame, parent: str
) -> None:
    """In the median: a rank that loses its core between two ranges has a gap there."""
    shares = covered_shares(heads, parent)
    assert len(shares) == 2 * STEPS
    assert 0.95 <= median(shares) <= 1


def test_body_and_head_are_the_step_of_a_decoding_loop(folder: Path) -> None:
    frame = read(folder, "decode")
    inside = frame[frame["depth"] == 1]
    assert set(inside["range"]) == {"body", "head"}
    # The last step of each rank has no body: nothing follows its token.
    shares = covered_shares(frame, "step")
    assert len(shares) == 2 * STEPS
    assert 0.95 <= median(shares) <= 1


def test_communication_is_gloos_own_time_within_the_exchange(heads: pd.DataFrame) -> None:
    """gloo works on a thread of its own: found by time, not by thread."""
    exchanges = heads[heads["range"] == "head/exchange"]
    assert (exchanges["communication_us"] > 0).all()
    assert (exchanges["communication_us"] <= exchanges["duration_us"] * 1.001).all()
    elsewhere = heads[heads["range"].isin(["head/centroids", "head/candidates"])]
    assert (elsewhere["communication_us"] == 0).all()
    assert heads["kernels_us"].isna().all()
    assert "CPU" in heads.attrs["missing"]["kernels_us"]


def test_ranks_are_those_of_the_traces(folder: Path) -> None:
    for rank, path in enumerate(sorted(folder.glob("head_rank*.json"))):
        assert json.loads(path.read_text())["distributedInfo"]["rank"] == rank

"""Messages between pipeline stages: overlap, bytes, recorded ranges, and the failure of a stage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_dist.decode.loop import Choose
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.integrations.pipeline import PipelineDecoder
from flashhead_dist.integrations.pipeline_stage import HIDDEN_LOG_NAME, TOKENS_LOG_NAME
from flashhead_profiles.ranges import recording
from tests.integrations.small_models import greedy_text, small_model

HIDDEN, TOKENS = 32, 5
PATIENCE_S = 30
PROMPTS = [[5, 6, 7, 8], [12, 13, 14, 15]]


def tiny() -> Any:
    return small_model(num_hidden_layers=3)


def states(max_new_tokens: int) -> list[DecodeState]:
    return [DecodeState([prompt], max_new_tokens=max_new_tokens) for prompt in PROMPTS]


def dense_choice() -> Choose:
    head = tiny().lm_head

    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        chosen: Tensor = head(hidden).argmax(-1)
        return chosen

    return choose


def on_forward(pipeline: PipelineDecoder, act: Callable[[int], None]) -> None:
    """Call `act(n)` before this stage's n-th forward pass, n from 1."""
    count = 0

    def hook(*arguments: Any) -> None:
        nonlocal count
        count += 1
        act(count)

    pipeline._stage.register_forward_pre_hook(hook)


def overlapping(
    rank: int, world_size: int, folder: Path, flushed: bool
) -> tuple[list[list[int]], dict[tuple[str, int], int]]:
    """Decode such that the head ends a turn only once the first stage has begun the one after."""
    from flashhead_dist.integrations.deepspeed import communication_log

    pipeline = PipelineDecoder(tiny, pp_size=2)
    batches = states(6)
    num_turns = 6 * len(batches)
    dense, turn = dense_choice(), 0

    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        nonlocal turn
        turn += 1
        deadline = time.monotonic() + PATIENCE_S
        while turn < num_turns and not (folder / str(turn + 1)).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the first stage has not begun turn {turn + 1}")
            time.sleep(0.002)
        return dense(hidden, positions, sequences)

    if rank == 0:
        on_forward(pipeline, lambda number: (folder / str(number)).touch())
    with communication_log() as log:
        pipeline.decode(batches, choose, flushed=flushed)
    sent = {(c.name, c.message_bytes): c.num_calls for c in log if c.name.startswith("pipeline")}
    return [state.tokens(0) for state in batches], sent


def test_a_stage_works_on_one_micro_batch_while_the_next_stage_works_on_another(
    run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Hangs until its deadline if a stage waits for a token before it takes the other batch."""
    results = run_ranks(overlapping, 2, tmp_path, False)
    model = tiny()
    for texts, _ in results:
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert text == greedy_text(model, prompt, 6)
    # One row of hidden states forward for each token fed, eight bytes back for each token chosen.
    row = HIDDEN * 4
    assert results[0][1] == {(HIDDEN_LOG_NAME, 4 * row): 2, (HIDDEN_LOG_NAME, row): 10}
    assert results[1][1] == {(TOKENS_LOG_NAME, 8): 12}


def dying(rank: int, world_size: int, folder: Path) -> None:
    """Three stages, of which the one in the middle dies at its ninth turn."""
    pipeline = PipelineDecoder(tiny, pp_size=3)
    if rank == 1:
        on_forward(pipeline, lambda number: os._exit(9) if number == 9 else None)
    batches = states(50)
    kept = (folder / f"text_{rank}").open("w", buffering=1)

    def keep(number: int) -> None:
        kept.writelines(f"{number} {token}\n" for token in batches[number].released(0))

    pipeline.decode(batches, dense_choice(), on_step=keep)


def test_the_death_of_a_stage_ends_the_others_and_their_text_is_kept(tmp_path: Path) -> None:
    torch.save((tmp_path,), tmp_path / "arguments.pt")
    processes = []
    for rank in range(3):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
        environment |= {"RANK_TIMEOUT_S": "600", "PYTHONPATH": os.pathsep.join(sys.path)}
        script = Path(__file__).parents[1] / "rank_main.py"
        processes.append(
            subprocess.Popen(
                [sys.executable, script, tmp_path, __file__, "dying"],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        # Far below the collectives' own timeout.
        for process in processes:
            process.communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 9, 1]
    # Eight turns passed the middle stage; tokens of at least three steps have come back by then.
    assert len((tmp_path / "text_0").read_text().splitlines()) >= 6


def recorded(rank: int, world_size: int) -> dict[tuple[str, int | None], int]:
    """How often each range with each payload."""
    pipeline = PipelineDecoder(tiny, pp_size=world_size)
    with recording() as recorder:
        pipeline.decode(states(TOKENS), dense_choice())
        spans = recorder.take()
    depths = {span.name: span.depth for span in spans}
    assert depths["step"] == 0
    assert depths["body"] == 1
    return dict(Counter((span.name, span.payload) for span in spans))


def test_each_stage_steps_runs_its_layers_and_names_its_messages(
    run_ranks: Callable[..., list[Any]],
) -> None:
    """Bytes of a prompt's four rows of hidden states, then of one row; a token id is eight."""
    first, last = run_ranks(recorded, 2)
    row_bytes, turns = HIDDEN * 4, TOKENS * len(PROMPTS)
    prompts, later = len(PROMPTS), turns - len(PROMPTS)
    assert first["pipeline/send", 4 * row_bytes] == prompts
    assert first["pipeline/send", row_bytes] == later
    assert first["pipeline/recv", 8] == turns
    assert last["pipeline/recv", 4 * row_bytes] == prompts
    assert last["pipeline/recv", row_bytes] == later
    assert last["pipeline/send", 8] == turns
    for stage in (first, last):
        assert (stage["body", 4], stage["body", 1]) == (prompts, later)
        assert sum(count for (name, _), count in stage.items() if name == "step") == turns


@pytest.mark.parametrize(
    ("pp_size", "tp_size", "sentence"),
    [
        (1, 1, "a pipeline needs 2 stages or more, got pp_size 1"),
        (2, 0, "tp_size must be at least 1, got 0"),
        (2, 2, "pp_size 2 x tp_size 2 needs 4 ranks, but 1 started: use --nproc-per-node 4"),
    ],
)
def test_sizes_that_do_not_fit_the_ranks_are_refused(
    pp_size: int, tp_size: int, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        PipelineDecoder(tiny, pp_size=pp_size, tp_size=tp_size)

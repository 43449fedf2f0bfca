"""The pipeline benchmark: synthetic stages, prompts of one length, bubbles by schedule."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from rich.table import Table

from flashhead_dist.decode.loop import Choose
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.integrations.pipeline import PipelineDecoder
from flashhead_dist.integrations.pipeline_bubble import (
    continuous_bubble,
    flushed_bubble,
    ideal_bubble,
    measured_bubble,
)
from flashhead_dist.states.split import shipped_texts

SCHEDULES = {"continuous": False, "flushed": True}
"""Whether each step of all micro-batches ends before the next begins, by schedule."""
_VOCAB = 64


def sleeping_model(num_layers: int, sleep_ms: float) -> Any:
    """A Llama too small to take time, whose decoder sleeps `sleep_ms` before each forward pass.

    It sleeps without a core, so that more stages than cores overlap as if each had its own.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCAB,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=num_layers,
            num_attention_heads=1,
        )
    )

    def sleep(*_: Any) -> None:
        time.sleep(sleep_ms / 1e3)

    model.get_decoder().register_forward_pre_hook(sleep)
    return model.eval()


def synthetic_prompts(count: int, length: int) -> list[list[int]]:
    """Prompts for `sleeping_model`."""
    return [[(number + i) % _VOCAB for i in range(length)] for number in range(count)]


def corpus_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """The beginnings of `count` shipped texts, of `length` tokens each.

    Raises:
        UserError: too few texts are that long.
    """
    prompts: list[list[int]] = []
    for document in shipped_texts():
        ids: Sequence[int] = tokenizer(document.text[: 20 * length]).input_ids[:length]
        if len(ids) == length:
            prompts.append(list(ids))
        if len(prompts) == count:
            return prompts
    raise UserError(
        f"the shipped texts give {len(prompts)} prompts of {length} tokens, fewer than {count}: "
        f"make --prompt-tokens, --batch-size or --micro-batches smaller"
    )


def measure_bubbles(
    pipeline: PipelineDecoder,
    choose: Choose,
    batches: Sequence[Sequence[Sequence[int]]],
    *,
    new_tokens: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """The run of median bubble of each schedule; they take turns, after one run to warm up.

    choose: the head. batches: the prompts of each micro-batch.
    """
    runs: dict[str, list[dict[str, Any]]] = {schedule: [] for schedule in SCHEDULES}
    for repeat in range(-1, repeats):
        for schedule, flushed in SCHEDULES.items():
            states = [DecodeState(prompts, max_new_tokens=new_tokens) for prompts in batches]
            _, stages = pipeline.decode(states, choose, flushed=flushed)
            total_s = max(stage.total_s for stage in stages)
            run = {
                "tokens_per_s": sum(map(len, batches)) * new_tokens / total_s,
                "stage_idle_shares": [stage.idle_share for stage in stages],
                "stage_step_ms": [1e3 * median(stage.compute_s) for stage in stages],
                "measured_bubble": measured_bubble(stages),
                "ideal_bubble": ideal_bubble(stages, flushed=flushed),
            }
            if repeat >= 0:
                runs[schedule].append(run)
    formulas = {
        "continuous": continuous_bubble(pipeline.pp_size, len(batches), new_tokens),
        "flushed": flushed_bubble(pipeline.pp_size, len(batches)),
    }
    rows = []
    for schedule, found in runs.items():
        found.sort(key=lambda run: float(run["measured_bubble"]))
        row = {"micro_batches": len(batches), "schedule": schedule}
        rows.append(row | {"formula_bubble": formulas[schedule]} | found[len(found) // 2])
    return rows


def bubble_table(rows: Sequence[dict[str, Any]], title: str, caption: str) -> Table:
    """A line for each number of micro-batches and schedule."""
    table = Table(title=title, caption=caption, caption_justify="left")
    for column in ("m", "schedule", "tok/s", "ms", "idle %", "measured", "formula", "ideal"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for row in rows:
        table.add_row(
            str(row["micro_batches"]),
            row["schedule"],
            f"{row['tokens_per_s']:.1f}",
            " ".join(f"{ms:.1f}" for ms in row["stage_step_ms"]),
            " ".join(f"{100 * share:.0f}" for share in row["stage_idle_shares"]),
            *(f"{row[name]:.1%}" for name in ("measured_bubble", "formula_bubble", "ideal_bubble")),
        )
    return table

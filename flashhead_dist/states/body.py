"""Run the body of a model over token sequences and keep chosen last hidden states."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from flashhead_dist.states.split import Passage

_CPU_BATCH_TOKENS = 1024
_GPU_BATCH_TOKENS = 16384


def body_dtype(device: torch.device) -> torch.dtype | None:
    """As stored where the processor multiplies bf16; float32 on a CPU that would emulate it."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    bf16 = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")
    if device.type != "cpu" or any(capabilities.get(name) for name in bf16):
        return None
    return torch.float32


def run_body(
    model: Any, passages: list[Passage], *, device: torch.device, progress: bool
) -> list[torch.Tensor]:
    """States [len(positions), D] bf16, on the CPU, of every passage, in the order given.

    Sequences of similar length share a batch, padded on the right without a mask: under causal
    attention the padding cannot reach a position before it.
    """
    decoder = model.get_decoder().to(device)
    states: list[torch.Tensor] = [torch.empty(0)] * len(passages)
    budget = _CPU_BATCH_TOKENS if device.type == "cpu" else _GPU_BATCH_TOKENS
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    total = sum(len(p.token_ids) for p in passages)
    with bar, torch.inference_mode(), _all_cores(device):
        task = bar.add_task("Hidden states", total=total)
        for batch in _batches(passages, budget):
            longest = max(len(passages[i].token_ids) for i in batch)
            tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
            for row, i in enumerate(batch):
                tokens[row, : len(passages[i].token_ids)] = torch.tensor(passages[i].token_ids)
            hidden = decoder(input_ids=tokens.to(device), use_cache=False).last_hidden_state
            for row, i in enumerate(batch):
                states[i] = hidden[row, passages[i].positions].to("cpu", torch.bfloat16)
            bar.advance(task, sum(len(passages[i].token_ids) for i in batch))
    return states


def _batches(passages: list[Passage], budget: int) -> Iterator[list[int]]:
    batch: list[int] = []
    longest = 0
    # Longest first: the peak of memory comes at once, and the estimate of time errs high.
    for i in sorted(range(len(passages)), key=lambda i: -len(passages[i].token_ids)):
        if batch and (len(batch) + 1) * longest > budget:
            yield batch
            batch = []
        longest = longest if batch else len(passages[i].token_ids)
        batch.append(i)
    if batch:
        yield batch


@contextmanager
def _all_cores(device: torch.device) -> Iterator[None]:
    """Use every core while the body runs: torchrun leaves a rank one thread."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)

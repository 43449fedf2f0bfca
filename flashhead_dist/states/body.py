"""Run the body of a model over token sequences and keep chosen last hidden states."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from flashhead_dist.progress import progress as show_progress
from flashhead_dist.states.split import Passage
from flashhead_kernels.cpu_threads import compute_threads

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
    total = sum(len(p.token_ids) for p in passages)
    # torchrun leaves a rank one thread.
    threads = len(os.sched_getaffinity(0)) if device.type == "cpu" else torch.get_num_threads()
    with (
        torch.inference_mode(),
        compute_threads(threads),
        show_progress("hidden states", total=total, unit="tokens", visible=progress) as advance,
    ):
        for batch in _batches(passages, budget):
            longest = max(len(passages[i].token_ids) for i in batch)
            tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
            for row, i in enumerate(batch):
                tokens[row, : len(passages[i].token_ids)] = torch.tensor(passages[i].token_ids)
            hidden = decoder(input_ids=tokens.to(device), use_cache=False).last_hidden_state
            for row, i in enumerate(batch):
                states[i] = hidden[row, passages[i].positions].to("cpu", torch.bfloat16)
            advance(sum(len(passages[i].token_ids) for i in batch))
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

"""Hidden states of a model over texts, computed once and cached, and those of a synthetic model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.models.cache import make_once
from flashhead_dist.progress import progress as show_progress
from flashhead_dist.states.files import (
    HiddenStates,
    HiddenStatesError,
    load_hidden_states,
    require_finite,
    require_hidden_size,
    save_hidden_states,
)
from flashhead_dist.states.split import (
    PARTS,
    PLAN_SETTINGS,
    Document,
    Part,
    Passage,
    plan_passages,
    read_texts,
    shipped_texts,
    texts_hash,
)
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


_VERSION = 1
DEFAULT_MAX_TOKENS = 48_000
_MAX_CONTEXT = 512
_OVERSAMPLING = 1.0


def collect_hidden_states(
    model: ModelSource,
    texts: Path | None = None,
    *,
    cache_dir: Path | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    progress: bool = True,
) -> tuple[HiddenStates, HiddenStates]:
    """(calibration, test) states of `model` over the shipped corpus or the user's `texts`.

    Cached by output-embedding hash, model name, texts and settings. The first call loads the body
    (on the GPU where there is one); an interrupted call leaves nothing behind. Concurrent ranks
    compute it once.
    Raises UserError for unreadable texts, a model without a body, or states that are not finite.
    """
    documents = shipped_texts() if texts is None else read_texts(texts)
    settings: list[object] = [
        _VERSION,
        model.weight_hash,
        model.name,
        texts_hash(documents),
        max_tokens,
    ]
    settings += [_MAX_CONTEXT, _OVERSAMPLING, PLAN_SETTINGS]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = cache_root(cache_dir) / "hidden_states" / f"{model.name.replace('/', '--')}-{key}"

    def compute(target: Path) -> None:
        parts = _compute(model, documents, texts, max_tokens, progress=progress)
        target.mkdir()
        for part in PARTS:
            save_hidden_states(target / f"{part}.safetensors", parts[part])

    make_once(folder, compute)
    calibration, test = (load_hidden_states(folder / f"{part}.safetensors") for part in PARTS)
    return calibration, test


def _compute(
    model: ModelSource,
    documents: list[Document],
    texts: Path | None,
    max_tokens: int,
    *,
    progress: bool,
) -> dict[Part, HiddenStates]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # transformers tokenizers fork-warn and oversubscribe under torchrun otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    body, tokenizer = model.load_body(body_dtype(device))
    limit = getattr(body.config.get_text_config(), "max_position_embeddings", _MAX_CONTEXT)
    context = min(_MAX_CONTEXT, limit)
    token_ids = [
        list(tokenizer(d.text, truncation=True, max_length=context).input_ids) for d in documents
    ]
    passages = plan_passages(
        documents,
        token_ids,
        max_tokens=max_tokens,
        max_context=context,
        oversampling=_OVERSAMPLING,
    )
    origin = f"{model.name} ({str(body.dtype).removeprefix('torch.')}) over " + (
        "the corpus of flashhead-dist" if texts is None else str(texts)
    )
    missing = {"calibration", "test"} - {p.part for p in passages}
    if missing:
        raise HiddenStatesError(
            f"The texts {texts} give no {' and no '.join(sorted(missing))} part; give at least two "
            "documents of more than one token."
        )
    states = run_body(body, passages, device=device, progress=progress)
    sources = tuple(sorted({p.source for p in passages}))
    parts = {part: _gather(passages, states, part, sources, origin) for part in PARTS}
    for part in parts.values():
        require_finite(part.states, part.origin)
        require_hidden_size(part, model.hidden_size, model.name)
    return parts


def _gather(
    passages: list[Passage],
    states: list[torch.Tensor],
    part: Part,
    sources: tuple[str, ...],
    origin: str,
) -> HiddenStates:
    mine = [(p, s) for p, s in zip(passages, states, strict=True) if p.part == part]
    counts = torch.tensor([len(s) for _, s in mine])
    source_ids = torch.tensor([sources.index(p.source) for p, _ in mine])
    documents = torch.tensor([p.document for p, _ in mine])
    return HiddenStates(
        states=torch.cat([s for _, s in mine]),
        source_ids=source_ids.repeat_interleave(counts),
        sources=sources,
        origin=f"{origin}, {part} part",
        documents=documents.repeat_interleave(counts),
    )


_ROWS_AT_ONCE = 16384
_GAIN = 40.0
_NOISE = 0.7


def synthetic_hidden_states(
    model: ModelSource, *, num_states: int = 8192, seed: int = 0
) -> tuple[HiddenStates, HiddenStates]:
    """(calibration, test), `num_states` each: noisy copies of rows whose tokens follow Zipf's law.

    The gain leaves the softmax neither flat nor certain. Streams the embedding once.
    """
    draw = torch.Generator().manual_seed(seed)
    total = 2 * num_states
    frequency = 1.0 / torch.arange(1, model.vocab_size + 1, dtype=torch.float64)
    # torch.multinomial takes at most 2**24 categories; inverting the cumulative sum takes any.
    cumulative = frequency.cumsum(0)
    uniform = torch.rand(total, generator=draw, dtype=torch.float64) * cumulative[-1]
    tokens = torch.searchsorted(cumulative, uniform).clamp_(max=model.vocab_size - 1)
    # Frequent tokens lie anywhere in the vocabulary, not at its start alone.
    tokens = torch.randperm(model.vocab_size, generator=draw)[tokens]
    states = torch.randn(total, model.hidden_size, generator=draw)
    states *= _NOISE / model.hidden_size**0.5
    for start in range(0, model.vocab_size, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, model.vocab_size)
        here = (tokens >= start) & (tokens < stop)
        if bool(here.any()):
            rows = model.read_rows(start, stop).float()[tokens[here] - start]
            states[here] += rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)
    states = (states * _GAIN).to(torch.bfloat16)
    calibration, test = (
        HiddenStates(
            states=half,
            source_ids=torch.zeros(num_states, dtype=torch.int64),
            sources=("synthetic",),
            origin=f"synthetic states for {model.name}, seed {seed}, {part} part",
        )
        for half, part in zip(torch.split(states, num_states), ("calibration", "test"), strict=True)
    )
    return calibration, test

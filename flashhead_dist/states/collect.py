"""Real hidden states of a model, computed once and cached: a calibration and a test part."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.models.cache import make_once
from flashhead_dist.states.body import body_dtype, run_body
from flashhead_dist.states.errors import HiddenStatesError
from flashhead_dist.states.split import PARTS, PLAN_SETTINGS, Part, Passage, plan_passages
from flashhead_dist.states.states import HiddenStates, require_finite, require_hidden_size
from flashhead_dist.states.storage import load_hidden_states, save_hidden_states
from flashhead_dist.states.texts import Document, read_texts, shipped_texts, texts_hash

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

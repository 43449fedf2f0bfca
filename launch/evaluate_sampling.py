"""The commands `sampling` and `likelihood` of evaluate.py: their options, runs and tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from flashhead_dist import corpus
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.divergence import evaluate_likelihood, predict_tokens
from flashhead_dist.evaluate.sampling import evaluate_sampling
from flashhead_dist.heads.distribution import require_sampling_head
from flashhead_dist.heads.registry import BASELINE, DEFAULT_HEAD, build_head, emulate_head
from flashhead_dist.index import load_manifest
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states.split import read_texts
from options import (
    Checked,
    IndexedModel,
    JsonOutput,
    ModelWithStates,
    Positive,
    Value,
    text_table,
)

_SHIPPED = tuple(Path(corpus.__file__).parent / name for name in ("wikitext2", "udhr"))


@dataclass(kw_only=True)
class _Draws(Checked):
    """The head and its draws."""

    head: Value[str] = DEFAULT_HEAD
    """name of a head that samples"""
    num_probes: Value[int | None] = None
    """clusters probed (default: the index's)"""
    draws: Positive[int] = 200_000
    """draws in all"""
    states: Positive[int] = 50
    """hidden states"""
    temperatures: Value[list[float]] = field(default_factory=lambda: [0.7, 1.0])
    """temperatures"""
    tp_sizes: Value[list[int]] = field(default_factory=lambda: [1, 2, 3])
    """tp sizes to compare, 1 among them"""
    seed: Value[int] = 0
    """of the noise"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 1 not in self.tp_sizes:
            raise UserError("--tp-sizes must hold 1, which the others are compared with: add it")


@dataclass(kw_only=True)
class SamplingCommand:
    """Draws of a head against the dense distribution."""

    source: ModelWithStates
    sampling: _Draws
    output: JsonOutput

    def run(self) -> dict[str, Any]:
        """Measure; raises UserError for what cannot be used."""
        options = self.sampling
        model = self.source.open()
        index = self.source.index_folder(model)
        assert index is not None
        tp_sizes = [1, *(size for size in options.tp_sizes if size != 1)]
        heads = [
            emulate_head(
                options.head,
                tp_size=size,
                model=model,
                index_dir=index,
                num_probes=options.num_probes,
            )
            for size in tp_sizes
        ]
        require_sampling_head(heads[0].ranks[0])
        dense = build_head(BASELINE, tp=TensorParallel.single(), model=model)
        states = self.source.test_states(model)
        count = min(options.states, len(states))
        chosen = (2 * torch.arange(count) + 1) * len(states) // (2 * count)
        found = [
            evaluate_sampling(
                heads,
                dense,
                states.states[chosen],
                temperature=temperature,
                num_draws=options.draws,
                seed=options.seed,
                contract=model.contract,
            )
            for temperature in options.temperatures
        ]
        return {
            "model": model.name,
            "synthetic": model.synthetic,
            "head": options.head,
            "index_hash": load_manifest(index).index_hash,
            "num_probes": options.num_probes or load_manifest(index).num_probes,
            "hidden_states": states.origin,
            "tp_sizes": tp_sizes,
            "temperatures": [asdict(item) for item in found],
        }

    def show(self, document: dict[str, Any]) -> list[Table]:
        """The document as a table: a row a figure, a column a temperature."""
        items = document["temperatures"]
        rows = []
        for name in items[0]:
            if name not in ("head", "temperature"):
                values = [item[name] for item in items]
                cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in values]
                rows.append([name.replace("_", " "), *cells])
        headings = ["", *(f"T = {item['temperature']}" for item in items)]
        title = f"Draws of {document['head']} of {document['model']}, pooled over hidden states"
        return [text_table(headings, rows, title=title)]


@dataclass(kw_only=True)
class _Texts(Checked):
    """The texts."""

    num_probes: Value[int | None] = None
    """clusters probed (default: the index's)"""
    texts: Value[list[Path] | None] = None
    """files or folders of texts (default: wikitext2 and udhr)"""
    tokens: Positive[int] = 20_000
    """tokens of each text"""


@dataclass(kw_only=True)
class LikelihoodCommand:
    """Perplexity of texts under the closed form of flashhead and under the dense head."""

    source: IndexedModel
    texts: _Texts
    output: JsonOutput

    def run(self) -> dict[str, Any]:
        """Measure; raises UserError for what cannot be used."""
        paths = self.texts.texts or _SHIPPED
        documents = [read_texts(path) for path in paths]
        model = self.source.open()
        index = self.source.index_folder(model)
        assert index is not None
        head = build_head(
            DEFAULT_HEAD,
            tp=TensorParallel.single(),
            model=model,
            index_dir=index,
            num_probes=self.texts.num_probes,
        )
        texts = []
        for path, own in zip(paths, documents, strict=True):
            predicted = predict_tokens(model, own, max_tokens=self.texts.tokens)
            texts.append({"text": path.stem} | evaluate_likelihood(head, model, predicted))
        return {
            "model": model.name,
            "head": DEFAULT_HEAD,
            "index_hash": load_manifest(index).index_hash,
            "num_probes": self.texts.num_probes or load_manifest(index).num_probes,
            "texts": texts,
        }

    def show(self, document: dict[str, Any]) -> list[Table]:
        """The document as a table."""
        rows = [
            [
                text["text"],
                str(text["num_tokens"]),
                f"{text['dense_perplexity']:.3f}",
                f"{text['perplexity']:.3f}",
                f"{text['ratio']:.4f}",
                f"{text['worst_ratio']:.4f}",
            ]
            for text in document["texts"]
        ]
        headings = ("text", "tokens", "dense", "closed form", "ratio", "worst source")
        title = f"Perplexity under {document['head']} of {document['model']}"
        return [text_table(headings, rows, title=title)]

"""The command `fidelity` of evaluate.py: its options, its run and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.divergence import evaluate_divergence, predict_tokens
from flashhead_dist.evaluate.fidelity import evaluate_fidelity
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.registry import (
    DEFAULT_HEAD,
    check_head_names,
    emulate_head,
    sampling_heads,
)
from flashhead_dist.index import load_manifest
from flashhead_dist.states.split import Document, read_texts, shipped_texts, split_by_document
from flashhead_kernels.cpu_threads import compute_threads
from options import (
    Checked,
    ModelWithStates,
    Number,
    Positive,
    TableOutput,
    ThreadOptions,
    Value,
    available_device,
    text_table,
)

_COLUMNS = (
    ("top-1, %", "top1_agreement", 100, 2),
    ("top-10, %", "top10_containment", 100, 2),
    ("mass, %", "candidate_mass", 100, 2),
    ("KL, millinats", "kl_nats", 1000, 2),
    ("dense perplexity", "dense_perplexity", 1, 2),
    ("perplexity", "perplexity", 1, 2),
    ("ratio", "perplexity_ratio", 1, 4),
)
"""Heading, name in a row, factor and decimals."""


@dataclass(kw_only=True)
class _HeadOptions(Checked):
    """The head, and what it is measured on."""

    head: Value[str] = DEFAULT_HEAD
    """name of the head"""
    tp_size: Value[int] = 1
    """ranks to emulate"""
    num_probes: Value[int | None] = None
    """clusters probed in all (default: the index's)"""
    alpha: Number[float | None] = None
    """weight of a cluster's spread in its score (default: the index's)"""
    device: Value[str] = "cpu"
    """where the head runs: cpu or cuda"""
    texts: Value[list[Path] | None] = None
    """predict the tokens of these .jsonl and .txt files or folders; without a path, of the shipped
    corpus's test documents"""
    tokens: Positive[int] = 30_000
    """tokens of --texts, over all sources"""
    kl: Value[bool] = True
    """the divergence, one more pass over the output embedding"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_head_names([self.head])
        available_device(self.device)


@dataclass(kw_only=True)
class FidelityCommand:
    """A head against the dense head, by source of the texts, with 95 % confidence intervals.

    How often the head's first token is the dense head's (top-1), the share of the dense head's ten
    best that are among the head's ten (top-10), the dense probability of its candidates (mass), the
    KL divergence of its closed form from the dense softmax and, with --texts, the perplexity of
    both. Without --texts and --hidden-states: the test part of the shipped corpus.
    """

    source: ModelWithStates
    head: _HeadOptions
    threads: ThreadOptions
    output: TableOutput

    def run(self) -> dict[str, Any]:
        """Measure; raises UserError for what cannot be used."""
        # Mistakes that show at once come before what takes minutes.
        options = self.head
        documents = self._documents()
        if self.source.index is not None:
            load_manifest(self.source.index)
        model = self.source.open()
        states, token_ids = None, None
        if self.source.hidden_states is not None:
            states = self.source.test_states(model)
        index = self.source.index_folder(model, [options.head])
        head = emulate_head(
            options.head,
            tp_size=options.tp_size,
            model=model,
            index_dir=index,
            num_probes=options.num_probes,
            alpha=options.alpha,
            device=options.device,
        )
        with compute_threads(self.threads.count):
            if documents is not None:
                origin = ", ".join(map(str, options.texts or ())) or (
                    "the shipped corpus's test documents"
                )
                found = predict_tokens(model, documents, max_tokens=options.tokens, origin=origin)
                states, token_ids = found.hidden_states, found.token_ids
            states = states or self.source.test_states(model)
            truth = dense_truth(model, states.states)
            divergence = None
            if options.kl and options.head in sampling_heads():
                on_device = states.states.to(options.device)
                divergence = evaluate_divergence(head, model, on_device, token_ids)
            fidelity = evaluate_fidelity(
                head, states, truth, divergence=divergence, device=options.device
            )
        self.output.write_csv(fidelity.by_source)
        return asdict(fidelity) | {
            "model": model.name,
            "weight_hash": model.weight_hash,
            "synthetic": model.synthetic,
            "index_hash": load_manifest(index).index_hash if index else None,
            "hidden_states": states.origin,
        }

    def _documents(self) -> list[Document] | None:
        """The texts given; None for hidden states."""
        texts = self.head.texts
        if texts is None:
            return None
        if self.source.hidden_states is not None or self.source.synthetic is not None:
            raise UserError(
                "--texts excludes --hidden-states and --synthetic, which give states without "
                "texts: leave it or them out"
            )
        if texts:
            return [document for path in texts for document in read_texts(path)]
        documents = shipped_texts()
        parts = split_by_document(documents)
        return [d for d, part in zip(documents, parts, strict=True) if part == "test"]

    def show(self, document: dict[str, Any]) -> list[Table | str]:
        """The document as a table, worst source first, and a sentence."""
        *by_source, overall = document["by_source"]
        by_source.sort(key=lambda row: row["top1_agreement"])
        columns = [column for column in _COLUMNS if column[1] in overall]
        synthetic = " (synthetic)" if document["synthetic"] else ""
        table = text_table(
            ["source", "states", *(heading for heading, *_ in columns)],
            [
                [row["source"], str(row["states"]), *(_cell(row, *c[1:]) for c in columns)]
                for row in [*by_source, overall]
            ],
            title=f"{document['head']} at tp_size {document['tp_size']}, emulated in one process, "
            f"against the dense head of {document['model']}{synthetic}",
            caption=f"hidden states: {document['hidden_states']}; 95 % intervals in brackets, by a "
            f"bootstrap of {document['interval_clusters']}",
        )
        log_z = "none"
        if document["logz_error"] is not None:
            log_z = (
                f"{document['logz_error']:+.4f} nats mean, {document['logz_error_p99']:.4f} at p99"
            )
        return [
            table,
            f"top-10 containment {100 * document['top10_containment']:.2f} %, "
            f"candidate mass {100 * document['candidate_mass']:.2f} %, log Z error {log_z}, "
            f"bytes {100 * document['bytes_share']:.2f} % of the dense head's in bf16",
        ]


def _cell(row: dict[str, Any], name: str, factor: float, decimals: int) -> str:
    value, low, high = (
        "?" if row[key] is None else f"{factor * row[key]:.{decimals}f}"
        for key in (name, f"{name}_low", f"{name}_high")
    )
    return f"{value} [{low}, {high}]"

"""The command `fidelity` of evaluate.py: its options, its run and its table."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.divergence import evaluate_divergence, predict_tokens
from flashhead_dist.evaluate.fidelity import evaluate_fidelity
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.registry import (
    HEADS,
    check_head_names,
    emulate_head,
    needs_index,
    sampling_heads,
)
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.states import (
    HiddenStates,
    collect_hidden_states,
    load_hidden_states,
    require_hidden_size,
    synthetic_hidden_states,
)
from flashhead_dist.states.split import Document, read_texts, shipped_texts, split_by_document
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine

COMMANDS = ("fidelity",)
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


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of evaluate.py."""
    fidelity = commands.add_parser(
        "fidelity",
        help="a head against the dense head, by source",
        description="By source of the texts, with 95 % confidence intervals: how often the head's "
        "first token is the dense head's (top-1), the share of the dense head's ten best that are "
        "among the head's ten (top-10), the dense probability of its candidates (mass), the KL "
        "divergence of its closed form from the dense softmax and, with --texts, the perplexity "
        "of both. Without --texts and --hidden-states: the test part of the shipped corpus.",
    )
    fidelity.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    fidelity.add_argument("--synthetic", metavar="V,D", help="a made-up embedding, marked as such")
    fidelity.add_argument("--index", type=Path, metavar="DIR", help="index folder")
    fidelity.add_argument(
        "--hidden-states", type=Path, metavar="FILE", help="safetensors with hidden_states [N, D]"
    )
    fidelity.add_argument(
        "--texts", type=Path, nargs="*", metavar="PATH",
        help="predict the tokens of these texts, or where none is named of the shipped corpus's "
        "test documents: files or folders of .jsonl and .txt",
    )  # fmt: skip
    fidelity.add_argument(
        "--tokens", type=int, default=30_000, metavar="N", help="of --texts, over all sources"
    )
    fidelity.add_argument(
        "--head", default="flashhead", metavar="NAME", help=f"one of {', '.join(HEADS)}"
    )
    fidelity.add_argument("--tp-size", type=int, default=1, metavar="N", help="ranks to emulate")
    fidelity.add_argument(
        "--num-probes", type=int, metavar="P", help="clusters probed in all (default: the index's)"
    )
    fidelity.add_argument("--alpha", type=float, metavar="A", help="default: the index's")
    fidelity.add_argument("--device", default="cpu", help="where the head runs: cpu or cuda")
    fidelity.add_argument(
        "--kl", action=argparse.BooleanOptionalAction, default=True,
        help="the divergence, one more pass over the output embedding",
    )  # fmt: skip
    fidelity.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    fidelity.add_argument("--csv", type=Path, metavar="FILE", help="write the figures by source")
    fidelity.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return its document.

    Raises:
        UserError: something given cannot be used.
    """
    # What is quickly seen to be wrong comes before what takes minutes.
    check_head_names([arguments.head])
    _check_device(arguments.device)
    documents = _documents(arguments)
    index_dir = arguments.index
    if index_dir is not None:
        load_manifest(index_dir)
    states = None
    if arguments.hidden_states is not None:
        states = load_hidden_states(arguments.hidden_states)
    model = open_model(arguments.model, synthetic=arguments.synthetic)
    if states is not None:
        require_hidden_size(states, model.hidden_size, model.name)
    if index_dir is None and needs_index(arguments.head):
        index_dir = ensure_index(model)
    head = emulate_head(
        arguments.head,
        tp_size=arguments.tp_size,
        model=model,
        index_dir=index_dir,
        num_probes=arguments.num_probes,
        alpha=arguments.alpha,
        device=arguments.device,
    )
    with compute_threads(arguments.threads or probe_machine().num_cores):
        token_ids = None
        if documents is not None:
            origin = ", ".join(map(str, arguments.texts)) or "the shipped corpus's test documents"
            predicted = predict_tokens(model, documents, max_tokens=arguments.tokens, origin=origin)
            states, token_ids = predicted.hidden_states, predicted.token_ids
        elif states is None:
            states = _test_states(model)
        truth = dense_truth(model, states.states)
        divergence = None
        if arguments.kl and arguments.head in sampling_heads():
            divergence = evaluate_divergence(
                head, model, states.states.to(arguments.device), token_ids
            )
        fidelity = evaluate_fidelity(
            head, states, truth, divergence=divergence, device=arguments.device
        )
    _write_csv(arguments.csv, fidelity.by_source)
    return asdict(fidelity) | {
        "model": model.name,
        "weight_hash": model.weight_hash,
        "synthetic": model.synthetic,
        "index_hash": load_manifest(index_dir).index_hash if index_dir else None,
        "hidden_states": states.origin,
    }


def _documents(arguments: argparse.Namespace) -> list[Document] | None:
    """The texts that were asked for; None for hidden states."""
    if arguments.texts is None:
        return None
    if arguments.tokens < 1:
        raise UserError(f"--tokens {arguments.tokens} is too small: give at least 1")
    if arguments.hidden_states is not None or arguments.synthetic is not None:
        raise UserError(
            "--texts excludes --hidden-states and --synthetic, which give states without texts: "
            "leave it or them out"
        )
    if arguments.texts:
        return [document for path in arguments.texts for document in read_texts(path)]
    documents = shipped_texts()
    parts = split_by_document(documents)
    return [d for d, part in zip(documents, parts, strict=True) if part == "test"]


def _write_csv(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another --csv") from (
            error
        )


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    here = device.type == "cpu" or (
        device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    )
    if not here:
        raise UserError(f"device {name} is not there: use cpu, or cuda on a machine with a GPU")


def _test_states(model: ModelSource) -> HiddenStates:
    if model.synthetic:
        return synthetic_hidden_states(model)[1]
    return collect_hidden_states(model)[1]


def show(document: dict[str, Any]) -> None:
    """Print the document as a table."""
    console = Console()
    made_up = " (synthetic)" if document["synthetic"] else ""
    title = (
        f"{document['head']} at tp_size {document['tp_size']}, emulated in one process, against "
        f"the dense head of {document['model']}{made_up}"
    )
    intervals = f"95 % intervals in brackets, by a bootstrap of {document['interval_clusters']}"
    table = Table(title=title, caption=f"hidden states: {document['hidden_states']}; {intervals}")
    table.add_column("source")
    rows = sorted(document["by_source"][:-1], key=lambda row: row["top1_agreement"])
    columns = [column for column in _COLUMNS if column[1] in document["by_source"][-1]]
    for heading in ("states", *(heading for heading, *_ in columns)):
        table.add_column(heading, justify="right")
    for row in [*rows, document["by_source"][-1]]:
        if row is document["by_source"][-1]:
            table.add_section()
        table.add_row(row["source"], str(row["states"]), *(_cell(row, *c[1:]) for c in columns))
    console.print(table)
    log_z = "none"
    if document["logz_error"] is not None:
        log_z = f"{document['logz_error']:+.4f} nats mean, {document['logz_error_p99']:.4f} at p99"
    console.print(
        f"top-10 containment {100 * document['top10_containment']:.2f} %, "
        f"candidate mass {100 * document['candidate_mass']:.2f} %, log Z error {log_z}, "
        f"bytes {100 * document['bytes_share']:.2f} % of the dense head's in bf16"
    )


def _cell(row: dict[str, Any], name: str, factor: float, decimals: int) -> str:
    value, low, high = (
        "?" if row[key] is None else f"{factor * row[key]:.{decimals}f}"
        for key in (name, f"{name}_low", f"{name}_high")
    )
    return f"{value} [{low}, {high}]"

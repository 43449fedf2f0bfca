"""The commands `sampling` and `likelihood` of evaluate.py: their options, runs and tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flashhead_dist import corpus
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.divergence import evaluate_likelihood, predict_tokens
from flashhead_dist.evaluate.sampling import evaluate_sampling
from flashhead_dist.heads.distribution import require_sampling_head
from flashhead_dist.heads.registry import BASELINE, build_head, emulate_head, sampling_heads
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states import (
    collect_hidden_states,
    load_hidden_states,
    require_hidden_size,
    synthetic_hidden_states,
)
from flashhead_dist.states.split import read_texts

COMMANDS = ("sampling", "likelihood")
_SHIPPED = ("wikitext2", "udhr")


def add_commands(commands: Any) -> None:
    """Add both commands to the subparsers of evaluate.py."""
    sampling = commands.add_parser("sampling", help="draws against the dense distribution")
    likelihood = commands.add_parser("likelihood", help="perplexity in closed form")
    for parser in (sampling, likelihood):
        parser.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
        parser.add_argument("--index", type=Path, metavar="DIR", help="index folder")
        parser.add_argument(
            "--num-probes", type=int, metavar="P", help="clusters probed (default: the index's)"
        )
        parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    sampling.add_argument("--synthetic", metavar="V,D", help="a made-up embedding, marked as such")
    sampling.add_argument(
        "--head", default="flashhead", help=f"one of {', '.join(sampling_heads())}"
    )
    sampling.add_argument("--draws", type=int, default=200_000, metavar="N", help="in all")
    sampling.add_argument("--states", type=int, default=50, metavar="N", help="hidden states")
    sampling.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0], metavar="T")
    sampling.add_argument("--tp-sizes", type=int, nargs="+", default=[1, 2, 3], metavar="P")
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument(
        "--hidden-states", type=Path, metavar="FILE", help="safetensors with hidden_states [N, D]"
    )
    likelihood.add_argument(
        "--texts", type=Path, nargs="+", metavar="PATH", help="default: wikitext2 and udhr"
    )
    likelihood.add_argument("--tokens", type=int, default=20_000, metavar="N", help="of each text")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run either command and return its document."""
    return _likelihood(arguments) if arguments.command == "likelihood" else _sampling(arguments)


def show(document: dict[str, Any]) -> None:
    """Print the document as a table."""
    console = Console()
    if "texts" in document:
        table = Table(title=f"Perplexity under {document['head']} of {document['model']}")
        for name in ("text", "tokens", "dense", "closed form", "ratio", "worst source"):
            table.add_column(name, justify="left" if name == "text" else "right")
        for text in document["texts"]:
            table.add_row(
                text["text"],
                str(text["num_tokens"]),
                f"{text['dense_perplexity']:.3f}",
                f"{text['perplexity']:.3f}",
                f"{text['ratio']:.4f}",
                f"{text['worst_ratio']:.4f}",
            )
        console.print(table)
        return
    table = Table(
        title=f"Draws of {document['head']} of {document['model']}, pooled over hidden states"
    )
    table.add_column("")
    for item in document["temperatures"]:
        table.add_column(f"T = {item['temperature']}", justify="right")
    for name in document["temperatures"][0]:
        if name not in ("head", "temperature"):
            values = [item[name] for item in document["temperatures"]]
            cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in values]
            table.add_row(name.replace("_", " "), *cells)
    console.print(table)


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    for name, value in (("--draws", arguments.draws), ("--states", arguments.states)):
        if value < 1:
            raise UserError(f"{name} {value} is too small: give at least 1")
    if 1 not in arguments.tp_sizes:
        raise UserError("--tp-sizes must hold 1, which the others are compared with: add it")
    model = open_model(arguments.model, synthetic=arguments.synthetic)
    index = arguments.index or ensure_index(model)
    tp_sizes = [1, *(size for size in arguments.tp_sizes if size != 1)]
    heads = [
        emulate_head(
            arguments.head,
            tp_size=size,
            model=model,
            index_dir=index,
            num_probes=arguments.num_probes,
        )
        for size in tp_sizes
    ]
    require_sampling_head(heads[0].ranks[0])
    dense = build_head(BASELINE, tp=TensorParallel.single(), model=model)
    if arguments.hidden_states is not None:
        states = load_hidden_states(arguments.hidden_states)
    elif model.synthetic:
        states = synthetic_hidden_states(model)[1]
    else:
        states = collect_hidden_states(model)[1]
    require_hidden_size(states, model.hidden_size, model.name)
    count = min(arguments.states, len(states))
    chosen = (2 * torch.arange(count) + 1) * len(states) // (2 * count)
    found = [
        evaluate_sampling(
            heads,
            dense,
            states.states[chosen],
            temperature=temperature,
            num_draws=arguments.draws,
            seed=arguments.seed,
            contract=model.contract,
        )
        for temperature in arguments.temperatures
    ]
    return {
        "model": model.name,
        "synthetic": model.synthetic,
        "head": arguments.head,
        "index_hash": load_manifest(index).index_hash,
        "num_probes": arguments.num_probes or load_manifest(index).num_probes,
        "hidden_states": states.origin,
        "tp_sizes": tp_sizes,
        "temperatures": [item.to_json() for item in found],
    }


def _likelihood(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.tokens < 1:
        raise UserError(f"--tokens {arguments.tokens} is too small: give at least 1")
    shipped = Path(corpus.__file__).parent
    paths = arguments.texts or [shipped / name for name in _SHIPPED]
    documents = [read_texts(path) for path in paths]
    model = open_model(arguments.model)
    index = arguments.index or ensure_index(model)
    head = build_head(
        "flashhead",
        tp=TensorParallel.single(),
        model=model,
        index_dir=index,
        num_probes=arguments.num_probes,
    )
    texts = []
    for path, own in zip(paths, documents, strict=True):
        predicted = predict_tokens(model, own, max_tokens=arguments.tokens)
        found = evaluate_likelihood(head, model, predicted)
        texts.append({"text": path.stem, **found})
    return {
        "model": model.name,
        "head": "flashhead",
        "index_hash": load_manifest(index).index_hash,
        "num_probes": arguments.num_probes or load_manifest(index).num_probes,
        "texts": texts,
    }

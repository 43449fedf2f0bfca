"""The command `fidelity` of evaluate.py: its options, its run and its table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.fidelity import evaluate_fidelity
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.registry import HEAD_NAMES, check_head_names, emulate_head, needs_index
from flashhead_dist.hidden_states import (
    HiddenStates,
    collect_hidden_states,
    load_hidden_states,
    require_hidden_size,
    synthetic_hidden_states,
)
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.model_source import ModelSource, open_model

COMMANDS = ("fidelity",)


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of evaluate.py."""
    fidelity = commands.add_parser("fidelity", help="a head against the dense head")
    fidelity.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    fidelity.add_argument("--synthetic", metavar="V,D", help="a made-up embedding, marked as such")
    fidelity.add_argument("--index", type=Path, metavar="DIR", help="index folder")
    fidelity.add_argument(
        "--hidden-states", type=Path, metavar="FILE", help="safetensors with hidden_states [N, D]"
    )
    fidelity.add_argument(
        "--head", default="flashhead", metavar="NAME", help=f"one of {', '.join(HEAD_NAMES)}"
    )
    fidelity.add_argument("--tp-size", type=int, default=1, metavar="N", help="ranks to emulate")
    fidelity.add_argument(
        "--num-probes", type=int, metavar="P", help="clusters probed in all (default: the index's)"
    )
    fidelity.add_argument("--alpha", type=float, metavar="A", help="default: the index's")
    fidelity.add_argument("--device", default="cpu", help="where the head runs: cpu or cuda")
    fidelity.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return its document.

    Raises:
        UserError: something given cannot be used.
    """
    # What is quickly seen to be wrong comes before what takes minutes.
    check_head_names([arguments.head])
    _check_device(arguments.device)
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
    if states is None:
        states = _test_states(model)
    truth = dense_truth(model, states.states)
    fidelity = evaluate_fidelity(head, states, truth, device=arguments.device)
    return fidelity.to_json() | {
        "model": model.name,
        "weight_hash": model.weight_hash,
        "synthetic": model.synthetic,
        "index_hash": load_manifest(index_dir).index_hash if index_dir else None,
        "hidden_states": states.origin,
    }


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
    table = Table(title=title, caption=f"hidden states: {document['hidden_states']}")
    table.add_column("source")
    table.add_column("states", justify="right")
    table.add_column("top-1 agreement, %", justify="right")
    by_source = document["top1_agreement_by_source"]
    for source, share in sorted(by_source.items(), key=lambda item: item[1]):
        count = document["num_states_by_source"][source]
        table.add_row(source, str(count), f"{100 * share:.2f}")
    table.add_section()
    table.add_row("all", str(document["num_states"]), f"{100 * document['top1_agreement']:.2f}")
    console.print(table)
    log_z = "none"
    if document["logz_error"] is not None:
        log_z = f"{document['logz_error']:+.4f} nats mean, {document['logz_error_p99']:.4f} at p99"
    console.print(
        f"top-10 containment {100 * document['top10_containment']:.2f} %, "
        f"candidate mass {100 * document['candidate_mass']:.2f} %, log Z error {log_z}, "
        f"bytes {100 * document['bytes_share']:.2f} % of the dense head's in bf16"
    )
